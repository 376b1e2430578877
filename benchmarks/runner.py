"""Run the measurements, each in a process of its own, interleaved peer by peer.

A fresh process is the fair choice: in one process, the interpreter would specialise the code that the peers share for
the one that comes first, and each would inherit the heap and the imports of those before.
A round measures every peer of a workload once before the next workload, and all workloads before the next round, so
that whatever else the machine does meets all alike.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterable
from itertools import product
from pathlib import Path
from typing import Any

from attrs import asdict, define, field

from benchmarks.plan import Entry, Workload

__all__ = ["Row", "measure_all", "plan_rows"]

ROOT = Path(__file__).parent.parent
QUICK = 0.05
LEAST = 1000
TIMEOUT = 60.0


@define
class Row:
    """What came of one peer in one workload on one backend."""

    workload: str
    python: str
    """The version of the interpreter."""
    peer: str
    backend: str
    operations: int
    note: str = ""
    reason: str = ""
    """Why there are no figures, or no more of them."""
    wall: list[float] = field(factory=list)
    """Seconds of each round, for all operations."""
    cpu: list[float] = field(factory=list)
    bytes: int | None = None

    def least(self) -> float:
        """Give the seconds of one operation in the best round."""
        return min(self.wall) / self.operations

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_rows(
    workloads: Iterable[Workload], *, pythons: Iterable[str], quick: bool, go: Path | str
) -> list[tuple[Workload, Row]]:
    """List what is to be measured with which versions of Python, and what can't be."""
    rows = []
    first, *_ = pythons = list(pythons)
    for workload, python in product(workloads, pythons):
        part = QUICK if quick and not workload.fixed else 1.0
        for peer, entry in workload.entries.items():
            for backend in entry.backends:
                left_out = "left out of a quick run" if quick and workload.slow else ""
                count = workload.count
                if not workload.fixed:
                    count = max(int(count * part * entry.scale), LEAST)
                rows.append((workload, Row(workload.name, python, peer, backend, count, entry.note, left_out)))
        rows += [
            (workload, Row(workload.name, python, peer, "-", 0, "", why)) for peer, why in workload.missing.items()
        ]
        if workload.go_scale and python == first:
            count = max(int(workload.count * part * workload.go_scale), LEAST)
            reason = go if isinstance(go, str) else ""
            rows.append((workload, Row(workload.name, python, "Go", "-", count, "the far limit", reason)))
    return rows


def measure_all(
    rows: list[tuple[Workload, Row]],
    *,
    pythons: dict[str, str],
    go: Path | str,
    rounds: int,
    done: Callable[[Row], object],
    ended: Callable[[int], object],
) -> None:
    """Fill the rows in with the interpreters of their versions; `ended` is called after each round."""
    for path in pythons.values():
        # The first import of all compiles.
        call([path, "-c", "import anyio, asyncio, trio, chanflow.cli.demos.digest"])
    for number in range(rounds):
        for workload, row in rows:
            # A byte count is the same each time.
            if not (row.reason or (workload.memory and number)):
                add(row, call(command(workload, row, pythons[row.python], go)))
            done(row)
        ended(number + 1)


def command(workload: Workload, row: Row, python: str, go: Path | str) -> list[str]:
    if row.peer == "Go":
        return [str(go), row.workload, str(row.operations)]
    entry: Entry = workload.entries[row.peer]
    if entry.script:
        return [python, "-c", entry.script]
    return [python, "-m", "benchmarks.measure", row.workload, row.peer, row.backend, str(row.operations)]


def call(arguments: list[str]) -> dict[str, Any]:
    # As it is where a program is installed: bytecode is kept from one start to the next.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    try:
        done = subprocess.run(
            arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
    except subprocess.TimeoutExpired:
        return {"reason": f"took more than {TIMEOUT:.0f} s"}
    try:
        return dict(json.loads(done.stdout.splitlines()[-1]))
    except (ValueError, IndexError):
        return {"reason": (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]}


def add(row: Row, result: dict[str, Any]) -> None:
    if uninvited := result.get("uninvited"):
        row.note = f"{row.note}, which imported {uninvited} too"
        if row.peer == "chanflow":
            row.reason = f"imports {uninvited}, and must not"
    if "reason" in result:
        row.reason = result["reason"]
    elif "bytes" in result:
        row.bytes = result["bytes"]
    else:
        row.wall.append(result["wall"])
        row.cpu.append(result["cpu"])
