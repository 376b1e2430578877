"""The command `chanflow`, run as a process."""

from __future__ import annotations

import sys
from pathlib import Path

PATIENCE = 60.0
COMMAND = [str(Path(sys.executable).with_name("chanflow"))]
if not Path(COMMAND[0]).exists():
    COMMAND = [sys.executable, "-m", "chanflow"]
