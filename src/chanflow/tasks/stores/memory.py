"""Tasks in the memory of one process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import islice

from chanflow.tasks.record import TaskRecord, TaskStatus, expired, looked_for_at
from chanflow.tasks.store import Change, Store

__all__ = ["MemoryStore"]


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

    async def open(self) -> None:
        """Nothing needs to be done."""

    async def aclose(self) -> None:
        """Nothing needs to be done."""

    async def create(self, record: TaskRecord) -> TaskRecord:
        if self._expiring and self._expiring[0][0] <= record.created_at:
            await self.forget(record.created_at)
        key = record.idempotency_key
        if key is not None:
            there = self._records.get(self._keys.setdefault(key, record.id))
            if there is not None:
                return there
        self._records[record.id] = record
        self._counts[record.status] += 1
        return record

    async def get(self, task_id: str, now: float) -> TaskRecord | None:
        record = self._records.get(task_id)
        return None if record is None or expired(record, now) else record

    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        record = self._records.get(task_id)
        changed = None if record is None else change(record)
        if record is not None and changed is not None:
            self._records[task_id] = changed
            self._counts[record.status] -= 1
            self._counts[changed.status] += 1
            if changed.expires_at is not None:
                heappush(self._expiring, (changed.expires_at, task_id))
        return changed

    def _newest(self, now: float, after: str | None) -> Iterator[TaskRecord]:
        records = reversed(self._records.values())
        if after is not None:
            for record in records:
                if record.id == after:
                    break
        return (record for record in records if not expired(record, now))

    async def page(
        self, now: float, *, status: TaskStatus | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[TaskRecord]:
        chosen = (record for record in self._newest(now, after) if status in {None, record.status})
        return list(islice(chosen, limit))

    async def count(self, now: float) -> dict[TaskStatus, int]:
        await self.forget(now)
        return dict(self._counts)

    async def neglected(self, since: float, limit: int) -> Sequence[str]:
        records = self._records.values()
        return list(
            islice((each.id for each in records if not each.status.is_end and looked_for_at(each) <= since), limit)
        )

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
