"""Stores that are broken on purpose, each in one way: the conformance suite finds every one out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from inspect import getmembers, isfunction
from pathlib import Path
from typing import Any

import msgspec
import pytest
from anyio import TASK_STATUS_IGNORED, sleep_forever
from msgspec.structs import replace

from chanflow.tasks import Change, Claimed, Store, TaskRecord, TaskStatus
from chanflow.tasks.conformance import StoreConformance
from chanflow.tasks.record import claim
from chanflow.tasks.store import Decoder, TaskStarted, Tell
from chanflow.tasks.stores.memory import MemoryStore
from chanflow.tasks.stores.sqlite import SqliteStore
from tests.support.sqlite_store import SqliteConformance
from tests.support.virtual_time import passes

CONFORMANCE = sorted(name for name, _ in getmembers(StoreConformance, isfunction) if name.startswith("test_"))
# These skip a store in memory; below, they get one that says that it is more.
BEYOND = {
    "test_what_outlives_the_store",
    "test_two_connections_see_the_same",
    "test_one_connection_hears_of_the_other",
}
# Nobody else writes in a store in memory: seen to fail below.
SPOILED = {"test_a_record_that_cannot_be_read"}


class LosesFields(MemoryStore):
    async def create(self, record: TaskRecord) -> TaskRecord:
        return await super().create(replace(record, progress=None))


class LosesChanges(MemoryStore):
    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        record = self._records.get(task_id)
        return None if record is None else change(record)


class AcceptsRefusals(MemoryStore):
    """Takes no for the task as it was."""

    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        return await super().change(task_id, change) or self._records.get(task_id)


class ClaimsInTwoSteps(MemoryStore):
    """Lets others in between looking and claiming."""

    async def claim(self, names: Any, *, now: float, limit: int, **more: Any) -> Claimed:
        before = (await self.due(list(names), now, limit)).records
        await asyncio.sleep(0)
        await super().claim(names, now=now, limit=limit, **more)
        how = {name: more[name] for name in ("worker", "lease_until")}
        claimed = [run for record in before if (run := claim(record, now=now, **how)) is not None]
        self._records |= {run.id: run for run in claimed}
        return Claimed(claimed)


class NeverEndsLeases(MemoryStore):
    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        record = self._records.get(task_id)
        if record is not None and record.lease_until is not None:
            self._records[task_id] = replace(record, lease_until=float("inf"))
        return await super().change(task_id, change)


class CannotCancel(MemoryStore):
    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        changed = await super().change(task_id, change)
        if changed is not None and changed.status is TaskStatus.CANCELLED:
            self._records[task_id] = replace(changed, status=TaskStatus.FAILED)
        return self._records.get(task_id) if changed is not None else None


class NoKeys(MemoryStore):
    async def create(self, record: TaskRecord) -> TaskRecord:
        await super().create(replace(record, idempotency_key=None))
        return record


class KeysForEver(MemoryStore):
    async def forget(self, now: float) -> None:
        kept = dict(self._keys)
        records = dict(self._records)
        await super().forget(now)
        self._keys = kept
        self._records |= {kept[key]: records[kept[key]] for key in kept}


class NeverForgets(MemoryStore):
    async def forget(self, now: float) -> None:
        pass


class ForgetsAFew(MemoryStore):
    """Forgets a thousand at most."""

    async def forget(self, now: float) -> None:
        expiring = sorted(self._expiring)
        self._expiring = expiring[:1000]
        await super().forget(now)

    async def count(self, now: float) -> dict[TaskStatus, int]:
        return await super().count(0.0)


class ShowsTheExpired(MemoryStore):
    async def get(self, task_id: str, now: float) -> TaskRecord | None:
        return self._records.get(task_id)


class OldestFirst(MemoryStore):
    async def page(self, now: float, **options: Any) -> Sequence[TaskRecord]:
        return list(reversed(await super().page(now, **options)))


class CountsNothing(MemoryStore):
    async def count(self, now: float) -> dict[TaskStatus, int]:
        return dict.fromkeys(TaskStatus, 0)


class CreatesAgain(MemoryStore):
    """Overwrites what has begun or ended, when it is asked once more."""

    async def create(self, record: TaskRecord) -> TaskRecord:
        there = self._records.pop(record.id, None)
        if there is not None:
            self._counts[there.status] -= 1
        return await super().create(record)


class CreatesOneOfMany(MemoryStore):
    async def create_many(self, records: Sequence[TaskRecord]) -> list[TaskRecord]:
        return [*await super().create_many(records[:1]), *records[1:]]


class ChangesOneOfMany(MemoryStore):
    async def change_many(self, changes: Any) -> list[TaskRecord | None]:
        return [*await super().change_many(changes[:1]), *[None] * len(changes[1:])]


class ClaimsTooEarly(MemoryStore):
    async def claim(self, names: Any, *, now: float, **more: Any) -> Claimed:
        return await super().claim(names, now=now + 100.0, **more)


class ClaimsTheUnknown(MemoryStore):
    """Takes tasks whose handlers it was not asked for."""

    async def claim(self, names: Any, **more: Any) -> Claimed:
        return await super().claim(dict.fromkeys(self._queues) | dict(names), **more)


class KnowsNoPriority(MemoryStore):
    async def create(self, record: TaskRecord) -> TaskRecord:
        await super().create(replace(record, priority=0))
        self._records[record.id] = record
        return record


class KnowsNoLimits(MemoryStore):
    async def claim(self, names: Any, **more: Any) -> Claimed:
        return await super().claim(dict.fromkeys(names), **more)


class LosesTheLost(MemoryStore):
    """Never claims a task whose worker is gone."""

    def _queue(self, record: TaskRecord, entry: Any) -> None:
        if record.status is TaskStatus.PENDING:
            super()._queue(record, entry)


class QueuesTheCancelled(MemoryStore):
    """Forgets to take out of the queue what was put back, and then cancelled."""

    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        changed = await super().change(task_id, change)
        if changed is not None and changed.status is TaskStatus.CANCELLED:
            self._records[task_id] = replace(changed, status=TaskStatus.PENDING)
        return changed


class ClaimsAnyInsteadOfOne(MemoryStore):
    async def claim(self, names: Any, *, task_id: str | None = None, **more: Any) -> Claimed:
        return await super().claim(names, **more)


class PublishesAgain(MemoryStore):
    """Lists what was published just now as due."""

    async def due(self, names: Sequence[str], now: float, limit: int) -> Claimed:
        found = [each for each in self._records.values() if each.name in names and each.run_at <= now]
        next_at = (await super().due(names, now, 1)).next_at
        return Claimed([each for each in found if not each.status.is_end][:limit], next_at)


class Silent(MemoryStore):
    async def news(self, tell: Tell, *, task_status: TaskStarted = TASK_STATUS_IGNORED) -> None:
        task_status.started()
        await sleep_forever()


class GoesBack(MemoryStore):
    def now(self) -> float:
        return time.time() - time.monotonic()


BROKEN = [kind for kind in MemoryStore.__subclasses__() if kind.__module__ == __name__]


def conforms(name: str, open_store: Callable[[], Store], **how: Any) -> bool:
    """Run one conformance test."""
    return passes(getattr(StoreConformance(), name)(open_store), **how)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, set[str]]:
    """Give the tests that each broken store fails."""
    kinds: list[type[MemoryStore]] = [MemoryStore, *BROKEN]
    return {
        kind.__name__: {name for name in CONFORMANCE if name not in BEYOND | SPOILED and not conforms(name, kind)}
        for kind in kinds
    }


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_each_broken_store_is_found_out(kind: type, verdicts: dict[str, set[str]]) -> None:
    """At least one conformance test fails on each of them, and none on the one that they are made of."""
    assert verdicts["MemoryStore"] == set()
    assert verdicts[kind.__name__]


@pytest.mark.parametrize("name", sorted({*CONFORMANCE} - BEYOND - SPOILED))
def test_each_conformance_test_finds_something(name: str, verdicts: dict[str, set[str]]) -> None:
    """No conformance test passes on all of the broken stores."""
    assert any(name in failed for failed in verdicts.values())


@pytest.mark.parametrize("name", sorted(BEYOND))
def test_a_store_that_says_too_much_of_itself_is_found_out(name: str) -> None:
    """One that says it is durable and shared, and has each time its own memory, is not; one with one memory is."""

    class Boastful(MemoryStore):
        durable = True
        shared = True

    one = Boastful()
    assert not conforms(name, Boastful)
    assert conforms(name, lambda: one)


def test_a_store_that_stumbles_over_a_record_is_found_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One that raises where it can't read, and one that logs it each time, are; our own is not."""

    class Stumbles(Decoder):
        def __call__(self, task_id: str, encoded: bytes) -> TaskRecord | None:
            return msgspec.msgpack.decode(encoded, type=TaskRecord)

    class Repeats(Decoder):
        def __call__(self, task_id: str, encoded: bytes) -> TaskRecord | None:
            return Decoder()(task_id, encoded)

    def verdict(kind: type[Decoder]) -> bool:
        def open_store() -> Store:
            store = SqliteStore(tmp_path / f"{kind.__name__}.db")
            store._decode = kind()
            return store

        caplog.clear()
        test = SqliteConformance().test_a_record_that_cannot_be_read(open_store, caplog)
        return passes(test, loop_factory=None)

    assert verdict(Decoder)
    assert not verdict(Stumbles)
    assert not verdict(Repeats)


def test_so_many_unreadable_records_are_remembered(caplog: pytest.LogCaptureFixture) -> None:
    """After that, one may be logged a second time."""
    decode = Decoder()
    for number in range(10_001):
        assert decode(str(number), b"") is None
    assert decode("10000", b"") is None
    assert len(caplog.records) == 10_001
    assert decode("0", b"") is None
    assert len(caplog.records) == 10_002
