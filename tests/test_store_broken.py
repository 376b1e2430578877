"""Stores that are broken on purpose, each in one way: the conformance suite finds every one out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from inspect import getmembers, isfunction
from typing import Any

import pytest
from msgspec.structs import replace

from chanflow.tasks import Change, Store, TaskRecord, TaskStatus
from chanflow.tasks.conformance import StoreConformance
from chanflow.tasks.stores.memory import MemoryStore
from tests.virtual_time import passes

CONFORMANCE = sorted(name for name, _ in getmembers(StoreConformance, isfunction) if name.startswith("test_"))
# These skip a store in memory; below, they get one that says that it is more.
BEYOND = {"test_what_outlives_the_store", "test_two_connections_see_the_same"}


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


class IsNotOneStep(MemoryStore):
    """Lets others in between looking and changing."""

    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        record = self._records.get(task_id)
        await asyncio.sleep(0)
        changed = None if record is None else change(record)
        return None if changed is None else await super().change(task_id, lambda _record: changed)


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


class NeglectsTheNeglected(MemoryStore):
    async def neglected(self, since: float, limit: int) -> Sequence[str]:
        return []


BROKEN = [kind for kind in MemoryStore.__subclasses__() if kind.__module__ == __name__]


def conforms(name: str, open_store: Callable[[], Store], **how: Any) -> bool:
    """Run one conformance test."""
    return passes(getattr(StoreConformance(), name)(open_store), **how)


@pytest.fixture(scope="module")
def verdicts() -> dict[str, set[str]]:
    """Give the tests that each broken store fails."""
    kinds: list[type[MemoryStore]] = [MemoryStore, *BROKEN]
    return {
        kind.__name__: {name for name in CONFORMANCE if name not in BEYOND and not conforms(name, kind)}
        for kind in kinds
    }


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_each_broken_store_is_found_out(kind: type, verdicts: dict[str, set[str]]) -> None:
    """At least one conformance test fails on each of them, and none on the one that they are made of."""
    assert verdicts["MemoryStore"] == set()
    assert verdicts[kind.__name__]


@pytest.mark.parametrize("name", sorted({*CONFORMANCE} - BEYOND))
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
