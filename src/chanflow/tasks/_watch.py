"""Who waits here for what becomes of a task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from chanflow._signal import Signal
from chanflow.tasks.record import TaskRecord

__all__ = ["Watch", "Watches"]


class Watch(Signal):
    """Those who watch one task."""

    __slots__ = ("told", "watchers")

    def __init__(self) -> None:
        super().__init__()
        self.watchers: int = 0
        self.told: TaskRecord | None = None
        """The task as it was after the last change that they were told of."""


class Watches(dict[str, Watch]):
    """The tasks that are watched, by id."""

    @contextmanager
    def watching(self, task_id: str) -> Iterator[Watch]:
        """Watch a task while the block lasts."""
        watch = self.get(task_id)
        if watch is None:
            watch = self[task_id] = Watch()
        watch.watchers += 1
        try:
            yield watch
        finally:
            watch.watchers -= 1
            if not watch.watchers:
                del self[task_id]

    def tell(self, record: TaskRecord) -> None:
        """Tell those who watch a task of a change."""
        watch = self.get(record.id)
        if watch is not None:
            watch.told = record
            watch.send_all()

    def tell_end(self) -> None:
        """Wake all: nobody will be told of anything any more."""
        for watch in self.values():
            watch.send_all()
