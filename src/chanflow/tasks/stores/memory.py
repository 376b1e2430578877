"""Tasks in the memory of one process."""

# Invariants:
# 1. Each task that is not at its end is due from one moment on, `due_at`. It has an entry with that moment in the queue
#    of its handler, or among those that come later.
# 2. An entry whose task has another moment by now is dead: it is skipped, and swept out before the dead are more than
#    the tasks that are not at their end.

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import count, islice
from typing import TypeAlias

from anyio import TASK_STATUS_IGNORED, sleep_forever

from chanflow._loop._home import Home, running_home
from chanflow.tasks._errors import unknown_cursor
from chanflow.tasks.record import TaskRecord, TaskStatus, claim, due_at, expired
from chanflow.tasks.store import Change, Claimed, Store, TaskStarted, Tell, news_of

__all__ = ["MemoryStore"]

# When a task is due, a number that tells which of two came first, and its id.
Entry: TypeAlias = tuple[float, int, str]

SPARE = 32
"""So many dead entries are never swept, and after so many changes it is asked whether there are more."""


class Queue:
    """The tasks of a handler that are due."""

    __slots__ = ("lines", "running")

    def __init__(self) -> None:
        # By rank, each in the order in which its tasks became due.
        self.lines: dict[float, deque[Entry]] = defaultdict(deque)
        self.running: int = 0


class MemoryStore(Store):
    """Tasks in memory; they end with the process."""

    durable = False
    shared = False

    def __init__(self) -> None:
        # In the order of their making.
        self._records: dict[str, TaskRecord] = {}
        self._keys: dict[str, str] = {}
        self._expiring: list[tuple[float, str]] = []
        self._counts: dict[TaskStatus, int] = dict.fromkeys(TaskStatus, 0)
        self._queues: dict[str, Queue] = defaultdict(Queue)
        self._entries = 0
        self._later: list[Entry] = []
        # Changes since it was last asked whether the dead entries are too many.
        self._unswept = 0
        self._numbers = count()
        self._listeners: list[Tell] = []
        self._home: Home | None = None
        self._clock: Callable[[], float]
        self._moved_by: float

    async def open(self) -> None:
        home = running_home()
        if home is not self._home:
            # By the event loop's clock, which doesn't jump.
            self._home, self._clock = home, home.time
            self._moved_by = time.time() - home.time()

    async def aclose(self) -> None:
        """Nothing needs to be done."""

    def now(self) -> float:
        return self._moved_by + self._clock()

    async def create_many(self, records: Sequence[TaskRecord]) -> list[TaskRecord]:
        return [await self.create(record) for record in records]

    async def create(self, record: TaskRecord) -> TaskRecord:
        if self._expiring and self._expiring[0][0] <= record.created_at:
            await self.forget(record.created_at)
        there = self._records.get(record.id)
        key = record.idempotency_key
        if key is not None and there is None:
            there = self._records.get(self._keys.setdefault(key, record.id))
        if there is not None:
            return there
        self._note(None, record)
        due = due_at(record)
        if due is not None:
            if due <= record.created_at:
                self._promote(record.created_at)
                self._queue(record, (due, next(self._numbers), record.id))
            else:
                heappush(self._later, (due, next(self._numbers), record.id))
        return record

    async def get(self, task_id: str, now: float) -> TaskRecord | None:
        record = self._records.get(task_id)
        return None if record is None or expired(record, now) else record

    async def change_many(self, changes: Sequence[tuple[str, Change]]) -> list[TaskRecord | None]:
        return [await self.change(task_id, change) for task_id, change in changes]

    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        record = self._records.get(task_id)
        changed = None if record is None else change(record)
        if record is not None and changed is not None and changed is not record:
            self._replace(record, changed)
        return changed

    def _replace(self, record: TaskRecord, changed: TaskRecord) -> None:
        self._note(record, changed)
        due = due_at(changed)
        if due is not None and due != due_at(record):
            heappush(self._later, (due, next(self._numbers), changed.id))
        if changed.expires_at is not None:
            heappush(self._expiring, (changed.expires_at, changed.id))
        self._unswept += 1
        if self._unswept >= SPARE:
            self._sweep()

    def _note(self, before: TaskRecord | None, after: TaskRecord) -> None:
        """Keep a record, count it, and tell of it."""
        self._records[after.id] = after
        if before is None or before.status is not after.status:
            self._count(before, -1)
            self._count(after, 1)
        if self._listeners:
            news = news_of(before, after)
            if news is not None:
                for tell in self._listeners:
                    tell(news)

    def _count(self, record: TaskRecord | None, number: int) -> None:
        if record is not None:
            self._counts[record.status] += number
            if record.status is TaskStatus.RUNNING:
                self._queues[record.name].running += number

    # What is due

    def _queue(self, record: TaskRecord, entry: Entry) -> None:
        self._queues[record.name].lines[rank_of(record)].append(entry)
        self._entries += 1

    def _promote(self, now: float) -> None:
        """Move what has become due to the queues."""
        while self._later and self._later[0][0] <= now:
            entry = heappop(self._later)
            record = self._alive(entry)
            if record is not None:
                self._queue(record, entry)

    def _alive(self, entry: Entry) -> TaskRecord | None:
        """Give the task of an entry, unless the entry is dead."""
        record = self._records.get(entry[2])
        return record if record is not None and due_at(record) == entry[0] else None

    def _head(self, queue: Queue, *, full: bool) -> tuple[float, Entry, TaskRecord] | None:
        """Give the first task of a queue; if no more may run, of those that count already."""
        for rank in sorted(queue.lines, reverse=True):
            if full and rank < math.inf:
                break
            line = queue.lines[rank]
            while line:
                record = self._alive(line[0])
                if record is not None:
                    return -rank, line[0], record
                line.popleft()
                self._entries -= 1
            del queue.lines[rank]
        return None

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
        self._promote(now)
        claimed: list[TaskRecord] = []
        if task_id is not None:
            there = self._records.get(task_id)
            if there is not None and there.name in names:
                most = names[there.name]
                if there.status is TaskStatus.RUNNING or most is None or self._queues[there.name].running < most:
                    self._claim(there, worker, now, lease_until, claimed)
            return Claimed(claimed)
        wanted = [(self._queues[name], most) for name, most in names.items() if name in self._queues]
        while len(claimed) < limit:
            heads = [
                head
                for queue, most in wanted
                if (head := self._head(queue, full=most is not None and queue.running >= most)) is not None
            ]
            if not heads:
                return Claimed(claimed, self._later[0][0] if self._later else None)
            rank, _, record = min(heads, key=first_two) if len(heads) > 1 else heads[0]
            self._queues[record.name].lines[-rank].popleft()
            self._entries -= 1
            self._claim(record, worker, now, lease_until, claimed)
        return Claimed(claimed, now)

    def _claim(
        self, record: TaskRecord, worker: str, now: float, lease_until: float, claimed: list[TaskRecord]
    ) -> None:
        changed = claim(record, worker=worker, now=now, lease_until=lease_until)
        if changed is not None:
            self._replace(record, changed)
            claimed.append(changed)

    async def due(self, names: Sequence[str], now: float, limit: int) -> Claimed:
        self._promote(now)
        lines = (line for name in names if name in self._queues for line in self._queues[name].lines.values())
        found = (record for line in lines for entry in line if (record := self._alive(entry)) is not None)
        return Claimed(list(islice(found, limit)), self._later[0][0] if self._later else None)

    def _sweep(self) -> None:
        """Let go of dead entries, if they are too many."""
        self._unswept = 0
        most = SPARE + 2 * (self._counts[TaskStatus.PENDING] + self._counts[TaskStatus.RUNNING])
        if len(self._later) > most:
            self._later = [entry for entry in self._later if self._alive(entry) is not None]
            heapify(self._later)
        if self._entries > most:
            for queue in self._queues.values():
                for rank, line in list(queue.lines.items()):
                    queue.lines[rank] = deque(entry for entry in line if self._alive(entry) is not None)
            self._entries = sum(len(line) for queue in self._queues.values() for line in queue.lines.values())

    # Looking around

    def _newest(self, now: float, after: str | None) -> Iterator[TaskRecord]:
        records = reversed(self._records.values())
        if after is not None:
            if after not in self._records:
                raise unknown_cursor(after)
            while next(records).id != after:
                pass
        return (record for record in records if not expired(record, now))

    async def page(
        self, now: float, *, status: TaskStatus | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[TaskRecord]:
        chosen = (record for record in self._newest(now, after) if status in {None, record.status})
        return list(islice(chosen, limit))

    async def count(self, now: float) -> dict[TaskStatus, int]:
        await self.forget(now)
        return dict(self._counts)

    async def forget(self, now: float) -> None:
        while self._expiring and self._expiring[0][0] <= now:
            _, task_id = heappop(self._expiring)
            record = self._records.get(task_id)
            # It may have been revived, and expire later.
            if record is not None and expired(record, now):
                del self._records[task_id]
                self._counts[record.status] -= 1
                if record.idempotency_key is not None:
                    self._keys.pop(record.idempotency_key, None)

    async def news(self, tell: Tell, *, task_status: TaskStarted = TASK_STATUS_IGNORED) -> None:
        self._listeners.append(tell)
        task_status.started()
        try:
            await sleep_forever()
        finally:
            self._listeners.remove(tell)


def rank_of(record: TaskRecord) -> float:
    """Tell which tasks that are due come first: those that were begun already, then by priority."""
    return record.priority if record.status is TaskStatus.PENDING else math.inf


def first_two(head: tuple[float, Entry, TaskRecord]) -> tuple[float, Entry]:
    """Tell which head comes first."""
    return head[:2]
