"""URLs as they may be told: without what gives access to the place that they name."""

from __future__ import annotations

import re

__all__ = ["without_secrets"]

HIDDEN = "..."
SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*")
PARTS = re.compile(r"(?P<authority>[^/?#]*)(?P<path>[^?#]*)(?P<rest>.*)", re.DOTALL)
HOST = r"(?:\[[0-9A-Fa-f:.]+\]|[^\[\]:,@\s]*)(?::\d{0,5})?"
HOSTS = re.compile(rf"{HOST}(?:,{HOST})*")


def without_secrets(url: str) -> str:
    """Take the user information, the query and the fragment out of a URL.

    Of one that can be read in more than one way, as where a password has a slash that isn't percent-encoded, only the
    scheme is left.
    """
    scheme, separator, rest = url.partition("://")
    if not separator:
        return HIDDEN if "@" in url else url.partition("?")[0]
    parts = PARTS.fullmatch(rest)
    assert parts is not None
    host = parts["authority"].rpartition("@")[2]
    if not SCHEME.fullmatch(scheme) or "@" in parts["path"] + parts["rest"] or not HOSTS.fullmatch(host):
        return f"{scheme if SCHEME.fullmatch(scheme) else ''}://{HIDDEN}"
    return f"{scheme}://{host}{parts['path']}"
