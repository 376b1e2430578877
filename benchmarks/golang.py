"""The same workloads in Go, when there is a `go` tool: the far limit."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from shutil import which

__all__ = ["build", "version"]

SOURCE = Path(__file__).parent / "go"


def build(directory: Path) -> Path | str:
    """Build the program into a directory; or tell why it can't be."""
    go = which("go")
    if go is None:
        return "no `go` tool"
    program = directory / "bench"
    # It needs no module but its own, and so no network.
    environment = os.environ | {"GOTOOLCHAIN": "local", "GOFLAGS": "-mod=mod", "GOPROXY": "off"}
    done = subprocess.run(
        [go, "build", "-o", program, "."], cwd=SOURCE, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        return "go build: " + (done.stderr.strip().splitlines() or ["failed"])[-1]
    return program


def version() -> str | None:
    go = which("go")
    return go and subprocess.run([go, "version"], capture_output=True, text=True, check=True).stdout.split()[2]
