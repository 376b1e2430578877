"""What there is to measure: workloads, and who takes part in each."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from attrs import field, frozen

__all__ = ["ASYNCIO", "BOTH", "LOOPLESS", "TRIO", "Entry", "UnsupportedError", "Workload"]

ASYNCIO = ("asyncio",)
TRIO = ("trio",)
BOTH = ("asyncio", "trio")
# Threads, processes and Go have no event loop; they are set against chanflow on asyncio.
LOOPLESS = ("-",)


class UnsupportedError(Exception):
    """A peer can't do this; the message, which goes into the table, says why."""


@frozen
class Entry:
    """One peer in one workload: `run` does so many operations, as a coroutine function where there is a loop."""

    run: Callable[[int], Any] | None
    backends: tuple[str, ...] = BOTH
    scale: float = 1.0
    """Which part of the workload's operations it does: a slow peer would hold up the run."""
    note: str = ""
    script: str = ""
    """A program that measures itself, instead of `run`."""


@frozen
class Workload:
    """The same work for each of its peers."""

    name: str
    title: str
    unit: str
    """What one operation is."""
    count: int
    """How many operations a full run does."""
    entries: dict[str, Entry]
    group: str
    missing: dict[str, str] = field(factory=dict)
    """Peers that can't take part, and why."""
    go_scale: float = 0.0
    """How much more of it Go does, to take long enough to be measured; 0 for a workload it doesn't have."""
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    """What has to be there while it runs, and is not measured."""
    warm_up: int | None = None
    """How many operations come before those that are measured; None for a small part of them."""
    memory: bool = False
    """`run` returns bytes; nothing is timed."""
    fixed: bool = False
    """The amount of work is what it is, also in a quick run."""
    slow: bool = False
    """It takes too long for a quick run."""
