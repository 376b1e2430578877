"""Names of files."""

from __future__ import annotations

from itertools import count
from pathlib import Path

detours = count()


def another_way(path: Path) -> Path:
    """Name a file in another way, so that it is opened once more and not shared."""
    detour = path.parent / f"detour {next(detours)}"
    detour.mkdir()
    return detour / ".." / path.name
