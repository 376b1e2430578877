"""What a store of tasks implements: it keeps records, is the queue of the workers, and tells of what happens in it."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import anyio.abc
import msgspec
from anyio import TASK_STATUS_IGNORED

from chanflow.tasks.record import TaskRecord, TaskStatus

__all__ = ["Change", "Claimed", "Decoder", "News", "Store", "TaskStarted", "Tell", "news_of"]

logger: logging.Logger = logging.getLogger("chanflow.tasks")

MOST_UNREADABLE = 10_000
"""So many ids of records that can't be read are remembered."""

Change: TypeAlias = Callable[[TaskRecord], TaskRecord | None]
"""Gives a task as it is after a change, or None to refuse; it may be called more than once, and has no other effect."""


class News(msgspec.Struct, frozen=True, gc=False):
    """That a task has changed."""

    id: str
    name: str
    status: TaskStatus
    cancel_requested: bool = False
    record: TaskRecord | None = None
    """The task as it was then, where that is at hand."""


Tell: TypeAlias = Callable[[News | None], None]
"""Is called in the event loop with each change; with None where some may have been missed."""


TaskStarted: TypeAlias = anyio.abc.TaskStatus[None]


class Claimed(msgspec.Struct, frozen=True, gc=False):
    """What a claim gives."""

    records: Sequence[TaskRecord]
    """As they are then: each runs."""
    next_at: float | None = None
    """When there may be more, as far as the store can tell now; None where only news can tell."""


class Store(ABC):
    """Where the tasks are. What a call returned for is kept, as far as the place is durable.

    Every step is safe to repeat, for an answer may be lost: a task that was created already is found, a change whose
    result is already there is done, and a claim that was carried out gives the same tasks again.

    A record that can't be decoded is logged once and set aside: no call finds it.
    """

    durable: bool
    """Whether what is in it outlives the process."""
    shared: bool
    """Whether other processes may change what is in it."""

    @abstractmethod
    async def open(self) -> None:
        """Get ready.

        Raises:
            StorageError: the place can't be used.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of everything, also when cancelled."""

    def now(self) -> float:
        """Tell the time by the clock that all users of the store share, in seconds since the epoch."""
        return time.time()

    async def create(self, record: TaskRecord) -> TaskRecord:
        """Keep a new task, and give it; or give the one that has its id or idempotency key already."""
        [kept] = await self.create_many([record])
        return kept

    @abstractmethod
    async def create_many(self, records: Sequence[TaskRecord]) -> list[TaskRecord]:
        """Keep new tasks, all or none, in one step; what each gives is as for `create`."""

    @abstractmethod
    async def get(self, task_id: str, now: float) -> TaskRecord | None:
        """Find a task that has not expired."""

    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        """Change a task in one step, and give it as it is then; None if it is not there, or the change refused."""
        [changed] = await self.change_many([(task_id, change)])
        return changed

    @abstractmethod
    async def change_many(self, changes: Sequence[tuple[str, Change]]) -> list[TaskRecord | None]:
        """Change tasks, each in one step of its own; what each gives is as for `change`."""

    @abstractmethod
    async def claim(
        self,
        names: Mapping[str, int | None],
        *,
        worker: str,
        now: float,
        lease_until: float,
        limit: int,
        task_id: str | None = None,
    ) -> Claimed:
        """Begin runs, in one step: of tasks that are due, or whose lease has run out; see `record.claim`.

        Those whose lease has run out come first, then those with the highest priority, then those that have been due
        for the longest time.

        Args:
            names: the handlers whose tasks are wanted, each with how many of them may run at the same time in all
                processes together, or None. One whose lease has run out still counts until it is claimed.
            worker: the id of these runs, which no other claim has.
            now: the time.
            lease_until: until when the tasks are leased.
            limit: the most to claim, at least 1.
            task_id: claim this task or none; None for any.
        """

    @abstractmethod
    async def due(self, names: Sequence[str], now: float, limit: int) -> Claimed:
        """List tasks that could be claimed, in no particular order, as `claim` would find them."""

    @abstractmethod
    async def page(
        self, now: float, *, status: TaskStatus | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[TaskRecord]:
        """List tasks that have not expired, the newest first.

        Args:
            now: the time.
            status: only those; None for all.
            after: the id of the last one of the page before; None for the first page.
            limit: the most to give.

        Raises:
            UnknownTaskError: `after` has expired, or never was: where its page ended is not known any more.
        """

    @abstractmethod
    async def count(self, now: float) -> dict[TaskStatus, int]:
        """Count the tasks that have not expired, by their status, without looking at each."""

    @abstractmethod
    async def forget(self, now: float) -> None:
        """Let go of what has expired."""

    @abstractmethod
    async def news(self, tell: Tell, *, task_status: TaskStarted = TASK_STATUS_IGNORED) -> None:
        """Call a function with each change of a task, whoever makes it, except renewed leases; until cancelled.

        It is a bell, not a log: what comes late or is missed is found by looking again. A failure is logged, and
        told as None once the news go on.

        Args:
            tell: the function.
            task_status: is told once each change that begins from then on will be told.
        """


def news_of(before: TaskRecord | None, after: TaskRecord) -> News | None:
    """Make the news of a change; None where only the lease was renewed or the task was published."""
    if (
        before is not None
        and before.status is after.status
        and before.worker == after.worker
        and before.run_at == after.run_at
        and before.progress == after.progress
        and before.cancel_requested == after.cancel_requested
    ):
        return None
    return News(after.id, after.name, after.status, after.cancel_requested, after)


class Decoder:
    """Reads records, and logs each that can't be read once."""

    def __init__(self) -> None:
        self._unreadable: set[str] = set()

    def __call__(self, task_id: str, encoded: bytes) -> TaskRecord | None:
        """Read a record; None if it can't be read."""
        try:
            return msgspec.msgpack.decode(encoded, type=TaskRecord)
        except (msgspec.DecodeError, ValueError, TypeError, RecursionError) as error:
            if task_id not in self._unreadable:
                if len(self._unreadable) >= MOST_UNREADABLE:
                    self._unreadable.clear()
                self._unreadable.add(task_id)
                logger.error("the record of task %s can't be read, and is set aside: %s", task_id, error)  # noqa: TRY400
            return None
