"""Messages of errors."""

from __future__ import annotations

import re


def whole(message: str) -> str:
    """Match this message and nothing more."""
    return f"^{re.escape(message)}$"
