"""Text for a terminal: nothing in it moves the cursor, or does anything but show itself."""

from __future__ import annotations

__all__ = ["visible"]

LAYOUT = {"\n", "\t"}


def visible(text: str) -> str:
    """Escape what is not printable, but for the ends of lines and tabs, as Python's literals do."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each in LAYOUT else each.encode("unicode_escape").decode() for each in text
    )
