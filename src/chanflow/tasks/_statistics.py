"""Figures of a task service."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping

from attrs import define, evolve, field, frozen

from chanflow.tasks.record import TaskRecord, TaskStatus

__all__ = ["BOUNDS", "HandlerStatistics", "Histogram", "Tally", "TaskStatistics"]

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
"""Seconds: what the intervals of a histogram go up to; one more is without bound."""
RECENT = 256
"""Of how many tasks the times are kept."""


@define
class Histogram:
    """How many times fell into which interval."""

    counts: list[int] = field(factory=lambda: [0] * (len(BOUNDS) + 1))
    """How many were at most so long, and longer than the bound before; the last is without bound."""
    total: float = 0.0
    """Their sum, in seconds."""

    def add(self, seconds: float) -> None:
        """Count a time."""
        self.counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds


@define
class HandlerStatistics:
    """What became of one handler's tasks here."""

    submitted: int = 0
    running: int = 0
    ended: dict[TaskStatus, int] = field(
        factory=lambda: dict.fromkeys((TaskStatus.SUCCESS, TaskStatus.FAILED, TaskStatus.CANCELLED), 0)
    )
    retried: int = 0
    """Attempts that failed, and were made again."""
    waited: Histogram = field(factory=Histogram)
    """From when a task could have been begun until it was."""
    ran: Histogram = field(factory=Histogram)
    """From the beginning of the last attempt to the end of the task."""


@frozen
class TaskStatistics:
    """Figures of a task service, since it was made, of what was submitted and run in this process."""

    workers: int
    """How many tasks may run at the same time."""
    running: int
    """How many do."""
    handlers: Mapping[str, HandlerStatistics]
    """By name."""
    recent: tuple[tuple[float, float], ...]
    """Of the last 256 tasks that ended: seconds that each waited, and ran."""


class Tally:
    """Counts what comes of the tasks."""

    def __init__(self) -> None:
        self._handlers: dict[str, HandlerStatistics] = {}
        self._recent: deque[tuple[float, float]] = deque(maxlen=RECENT)

    def add(self, name: str) -> None:
        """Take up a handler."""
        self._handlers[name] = HandlerStatistics()

    def submitted(self, name: str, number: int = 1) -> None:
        """Count tasks that were accepted."""
        self._handlers[name].submitted += number

    def begun(self, record: TaskRecord) -> None:
        """Count an attempt that begins."""
        figures = self._handlers[record.name]
        figures.running += 1
        figures.waited.add(waited(record))

    def left(self, record: TaskRecord) -> None:
        """Count an attempt that is over, whatever came of it."""
        self._handlers[record.name].running -= 1

    def retried(self, record: TaskRecord) -> None:
        """Count an attempt that failed, and is made again."""
        self._handlers[record.name].retried += 1

    def ended(self, record: TaskRecord) -> None:
        """Count a task that came to its end here."""
        figures = self._handlers[record.name]
        figures.ended[record.status] += 1
        if record.started_at is not None and record.finished_at is not None:
            ran = max(record.finished_at - record.started_at, 0.0)
            figures.ran.add(ran)
            self._recent.append((waited(record), ran))

    def snapshot(self, workers: int, running: int) -> TaskStatistics:
        """Give the figures as they are now."""
        handlers = {
            name: evolve(
                figures,
                ended=dict(figures.ended),
                waited=evolve(figures.waited, counts=list(figures.waited.counts)),
                ran=evolve(figures.ran, counts=list(figures.ran.counts)),
            )
            for name, figures in self._handlers.items()
        }
        return TaskStatistics(workers=workers, running=running, handlers=handlers, recent=tuple(self._recent))


def waited(record: TaskRecord) -> float:
    """Tell how long a task waited for a worker, in seconds, since it could have been begun."""
    return max((record.started_at or record.run_at) - record.run_at, 0.0)
