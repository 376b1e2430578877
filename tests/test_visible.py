"""Text for a terminal."""

from __future__ import annotations

import sys
import unicodedata

import pytest

from chanflow.cli.visible import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("", ""),
        ("größer → 👍", "größer → 👍"),
        ("one\n\ttwo", "one\n\ttwo"),
        ("\x1b[31m\x07\r\x7f", r"\x1b[31m\x07\r\x7f"),
        # The C1 controls, of which some terminals take the first for ESC [.
        ("\x9b31m\x85", r"\x9b31m\x85"),
        # What turns the direction of writing, ends lines, or is no character.
        ("\u202e\u2066\u2028\ufeff\udcff", r"\u202e\u2066\u2028\ufeff\udcff"),
    ],
)
def test_visible(text: str, shown: str) -> None:
    """What does something to a terminal is escaped, and nothing else."""
    assert visible(text) == shown


def test_no_control_is_left() -> None:
    """Of all characters."""
    shown = visible("".join(map(chr, range(sys.maxunicode + 1))))
    assert {each for each in shown if unicodedata.category(each)[0] == "C"} == {"\n", "\t"}
