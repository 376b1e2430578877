"""Who waits here for what becomes of a task."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from chanflow._loop._signal import Signal
from chanflow.tasks.record import TaskRecord, TaskStatus
from chanflow.tasks.store import News

__all__ = ["Watch", "Watches"]


class Watch(Signal):
    """Those who watch one task."""

    __slots__ = ("changes", "record", "watchers")

    def __init__(self) -> None:
        super().__init__()
        self.watchers: int = 0
        self.changes: int = 0
        """How many changes they were told of."""
        self.record: TaskRecord | None = None
        """The task as it was after the last of them; None where that has to be asked."""


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

    def tell(self, news: News | None) -> None:
        """Tell those who watch a task of a change; of None, all of them."""
        watches = list(self.values()) if news is None else [self[news.id]] if news.id in self else []
        for watch in watches:
            if news is not None and watch.record is not None and is_late(news, watch.record):
                continue
            watch.changes += 1
            watch.record = None if news is None else news.record
            watch.send_all()

    def tell_end(self) -> None:
        """Wake all: nobody will be told of anything any more."""
        for watch in self.values():
            watch.send_all()


def is_late(news: News, record: TaskRecord) -> bool:
    """Tell whether news is older than what is known: two changes may be told in the wrong order, by two callers."""
    return record.status.is_end and news.status is TaskStatus.RUNNING
