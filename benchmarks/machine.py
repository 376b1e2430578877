"""What the figures were measured on, and with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks import golang
from benchmarks.peers import DISTRIBUTIONS

__all__ = ["describe"]

ROOT = Path(__file__).parent.parent
# Asked of the interpreter that is measured.
QUESTION = """
import json, platform, sys
from importlib.metadata import PackageNotFoundError, version
def find(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
names = sys.argv[1:]
print(json.dumps({"Python": platform.python_version(), **{name: find(name) for name in names}}))
"""


def describe(pythons: Iterable[str]) -> dict[str, Any]:
    return {
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "load": load(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.now(UTC).date().isoformat(),
        "commit": commit(),
        "versions": [versions(python) for python in pythons],
        "go": golang.version() or "not installed",
    }


def versions(python: str) -> dict[str, str]:
    """Ask an interpreter for its version and those of the peers."""
    answer = subprocess.run(
        [python, "-c", QUESTION, *DISTRIBUTIONS], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return dict(json.loads(answer.stdout))


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or "unknown"
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def load() -> str:
    """Tell what else keeps the machine busy, before there is anything of ours."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def commit() -> str:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=10"],  # noqa: S607 -- whichever git there is
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()
