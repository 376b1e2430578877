"""The promises of a store of tasks as tests, for any store: subclass `StoreConformance` in a test module.

They run on the event loops that the fixture `anyio_backend` gives, under pytest with anyio's plugin.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from anyio import create_task_group
from msgspec.structs import replace

from chanflow.tasks.record import (
    ProgressReport,
    TaskRecord,
    TaskStatus,
    cancel,
    claim,
    finish,
    put_back,
    renew,
    report,
    requeue,
    revive,
)
from chanflow.tasks.store import Store

__all__ = ["StoreConformance"]

OpenStore = Callable[[], Store]
NOW = 1_000_000.0


def task(number: int, **fields: Any) -> TaskRecord:
    """Make a record."""
    about: dict[str, Any] = {"arguments": b"\x80", "created_at": NOW, "run_at": NOW, "queued_at": NOW}
    return TaskRecord(id=f"task {number}", name="name", **{**about, **fields})


class StoreConformance:
    """What every store has to pass."""

    pytestmark: pytest.MarkDecorator = pytest.mark.anyio

    @pytest.fixture
    def open_store(self) -> OpenStore:
        """Give a function that makes a store on one empty place, the same each time."""
        raise NotImplementedError

    async def test_what_is_created_is_found(self, open_store: OpenStore) -> None:
        """Every field comes back as it was, and an unknown id is none."""
        full = TaskRecord(
            id="an id",
            name="näme",
            status=TaskStatus.FAILED,
            arguments=bytes(range(256)),
            result=b"",
            error_type="ValueError",
            error_message="a\nb\0c",
            attempts=3,
            progress=ProgressReport(0.5, 2, "half"),
            created_at=NOW + 0.123456789,
            run_at=NOW + 1,
            queued_at=NOW + 2,
            started_at=NOW + 3,
            finished_at=NOW + 4,
            expires_at=NOW + 5,
            idempotency_key="kéy",
            worker="w",
            lease_until=NOW + 6,
            cancel_requested=True,
        )
        store = open_store()
        await store.open()
        for record in full, task(1):
            assert await store.create(record) == record
            assert await store.get(record.id, NOW) == record
        assert await store.get("another id", NOW) is None
        assert await store.change("another id", lambda record: record) is None
        await store.aclose()

    async def test_the_life_of_a_task(self, open_store: OpenStore) -> None:
        """Each change gives the task as it is then, and is kept; one that refuses changes nothing."""
        store = open_store()
        await store.open()
        await store.create(task(1))
        claimed = await store.change("task 1", partial(claim, worker="a", now=NOW, lease_until=NOW + 10))
        assert claimed == replace(
            task(1), status=TaskStatus.RUNNING, attempts=1, started_at=NOW, worker="a", lease_until=NOW + 10
        )
        assert await store.change("task 1", partial(claim, worker="b", now=NOW + 9, lease_until=NOW + 20)) is None
        assert await store.get("task 1", NOW) == claimed
        assert claimed is not None
        renewed = await store.change("task 1", partial(renew, worker="a", lease_until=NOW + 15))
        assert renewed is not None
        assert renewed == replace(claimed, lease_until=NOW + 15)
        progress = ProgressReport(1, 2, "half")
        assert await store.change("task 1", partial(report, worker="a", progress=progress)) == replace(
            renewed, progress=progress
        )
        back = await store.change(
            "task 1", partial(put_back, worker="a", run_at=NOW + 30, error=("ValueError", "message"))
        )
        assert back is not None
        assert (back.status, back.error_type, back.error_message) == (TaskStatus.PENDING, "ValueError", "message")
        assert await store.change("task 1", partial(claim, worker="b", now=NOW + 29, lease_until=NOW + 40)) is None
        again = await store.change("task 1", partial(claim, worker="b", now=NOW + 30, lease_until=NOW + 40))
        assert again is not None
        assert again.attempts == 2
        # The one who had it before has no say any more.
        for change in (
            partial(renew, worker="a", lease_until=NOW + 50),
            partial(report, worker="a", progress=progress),
            partial(put_back, worker="a", run_at=NOW),
            partial(finish, worker="a", status=TaskStatus.FAILED, now=NOW, ttl=1.0),
        ):
            assert await store.change("task 1", change) is None
        ended = await store.change(
            "task 1", partial(finish, worker="b", status=TaskStatus.SUCCESS, now=NOW + 35, ttl=100.0, result=b"\x01")
        )
        assert ended is not None
        assert (ended.result, ended.finished_at, ended.expires_at) == (b"\x01", NOW + 35, NOW + 135)
        assert (ended.worker, ended.lease_until, ended.error_type) == (None, None, None)
        assert await store.get("task 1", NOW) == ended
        assert await store.change("task 1", partial(claim, worker="c", now=NOW + 99, lease_until=NOW + 100)) is None
        assert await store.change("task 1", partial(cancel, now=NOW + 99, ttl=1.0)) == ended
        assert await store.change("task 1", partial(revive, now=NOW + 99)) is None
        await store.aclose()

    async def test_a_dead_workers_task_is_claimed_again(self, open_store: OpenStore) -> None:
        """Once the lease has run out, another worker may have the task, and not before."""
        store = open_store()
        await store.open()
        await store.create(task(1))
        await store.change("task 1", partial(claim, worker="a", now=NOW, lease_until=NOW + 10))
        assert await store.change("task 1", partial(claim, worker="b", now=NOW + 9.9, lease_until=NOW + 20)) is None
        claimed = await store.change("task 1", partial(claim, worker="b", now=NOW + 10, lease_until=NOW + 20))
        assert claimed is not None
        assert (claimed.worker, claimed.attempts) == ("b", 2)
        await store.aclose()

    async def test_cancelling(self, open_store: OpenStore) -> None:
        """A pending task is cancelled at once; of a running one it is asked for; and both can be revived."""
        store = open_store()
        await store.open()
        for number in range(2):
            await store.create(task(number))
        cancelled = await store.change("task 0", partial(cancel, now=NOW, ttl=10.0))
        assert cancelled is not None
        assert (cancelled.status, cancelled.expires_at) == (TaskStatus.CANCELLED, NOW + 10)
        await store.change("task 1", partial(claim, worker="a", now=NOW, lease_until=NOW + 10))
        asked = await store.change("task 1", partial(cancel, now=NOW, ttl=10.0))
        assert asked is not None
        assert (asked.status, asked.cancel_requested) == (TaskStatus.RUNNING, True)
        # Its worker dies, and the next one hears of it, without another attempt.
        taken = await store.change("task 1", partial(claim, worker="b", now=NOW + 10, lease_until=NOW + 20))
        assert taken is not None
        assert (taken.cancel_requested, taken.attempts) == (True, 1)
        revived = await store.change("task 0", partial(revive, now=NOW + 5))
        assert revived == replace(task(0), run_at=NOW + 5, queued_at=NOW + 5)
        assert await store.get("task 0", NOW + 11) == revived
        await store.aclose()

    async def test_one_of_many_claims(self, open_store: OpenStore) -> None:
        """However many try at the same time, one has the task."""
        store = open_store()
        await store.open()
        await store.create(task(1))
        claimed: list[TaskRecord | None] = []

        async def try_to_claim(worker: str) -> None:
            claimed.append(await store.change("task 1", partial(claim, worker=worker, now=NOW, lease_until=NOW + 10)))

        async with create_task_group() as tasks:
            for number in range(20):
                tasks.start_soon(try_to_claim, str(number))
        [winner] = [record for record in claimed if record is not None]
        assert await store.get("task 1", NOW) == winner
        await store.aclose()

    async def test_idempotency_keys(self, open_store: OpenStore) -> None:
        """A key belongs to its first task until that has expired; tasks without a key are all different."""
        store = open_store()
        await store.open()
        first = await store.create(task(1, idempotency_key="key"))
        assert await store.create(task(2, idempotency_key="key", arguments=b"\x81")) == first
        assert await store.get("task 2", NOW) is None
        assert (await store.create(task(3, idempotency_key="another"))).id == "task 3"
        await store.change("task 1", partial(cancel, now=NOW, ttl=10.0))
        assert (await store.create(task(4, idempotency_key="key", created_at=NOW + 9))).id == "task 1"
        late = task(5, idempotency_key="key", created_at=NOW + 11)
        assert await store.create(late) == late
        for number in (6, 7):
            assert (await store.create(task(number))).id == f"task {number}"
        await store.aclose()

    async def test_expiry(self, open_store: OpenStore) -> None:
        """A finished task is not there after its time; one that is not finished never expires."""
        store = open_store()
        await store.open()
        for number in range(3):
            await store.create(task(number))
        await store.change("task 0", partial(cancel, now=NOW, ttl=10.0))
        await store.change("task 1", partial(cancel, now=NOW, ttl=10.0))
        await store.change("task 1", partial(revive, now=NOW))
        assert await store.get("task 0", NOW + 9) is not None
        for look in range(2):
            assert await store.get("task 0", NOW + 10) is None
            assert [record.id for record in await store.page(NOW + 10)] == ["task 2", "task 1"]
            assert (await store.count(NOW + 10))[TaskStatus.CANCELLED] == 0
            if not look:
                await store.forget(NOW + 10)
        assert await store.change("task 0", lambda record: record) is None
        await store.aclose()

    async def test_forgetting_many(self, open_store: OpenStore) -> None:
        """However many have expired, all are forgotten."""
        store = open_store()
        await store.open()

        async def cancelled(number: int) -> None:
            await store.create(task(number))
            await store.change(f"task {number}", partial(cancel, now=NOW, ttl=10.0))

        async with create_task_group() as tasks:
            for number in range(1100):
                tasks.start_soon(cancelled, number)
        assert (await store.count(NOW))[TaskStatus.CANCELLED] == 1100
        await store.forget(NOW + 10)
        assert await store.count(NOW) == dict.fromkeys(TaskStatus, 0)
        await store.aclose()

    async def test_pages(self, open_store: OpenStore) -> None:
        """Tasks are listed from the newest on, all or by status, page by page, and counted."""
        store = open_store()
        await store.open()
        for number in range(7):
            await store.create(task(number))
        for number in (1, 3, 5):
            await store.change(f"task {number}", partial(cancel, now=NOW, ttl=10.0))

        async def pages(limit: int, status: TaskStatus | None) -> list[list[str]]:
            found: list[list[str]] = []
            after = None
            while page := await store.page(NOW, status=status, after=after, limit=limit):
                found.append([record.id for record in page])
                after = page[-1].id
            return found

        assert await pages(3, None) == [
            ["task 6", "task 5", "task 4"],
            ["task 3", "task 2", "task 1"],
            ["task 0"],
        ]
        assert await pages(2, TaskStatus.CANCELLED) == [["task 5", "task 3"], ["task 1"]]
        assert await pages(100, TaskStatus.RUNNING) == []
        assert await store.page(NOW, after="unknown") == []
        counts = await store.count(NOW)
        assert counts == {**dict.fromkeys(TaskStatus, 0), TaskStatus.PENDING: 4, TaskStatus.CANCELLED: 3}
        await store.aclose()

    async def test_neglected_tasks_are_found(self, open_store: OpenStore) -> None:
        """What waits since long, or whose lease ran out long ago, is found until it is told of once more."""
        store = open_store()
        await store.open()
        for number, run_at in enumerate([NOW, NOW, NOW + 100, NOW]):
            await store.create(task(number, run_at=run_at))
        await store.change("task 1", partial(claim, worker="a", now=NOW, lease_until=NOW + 50))
        await store.change("task 3", partial(cancel, now=NOW, ttl=1000.0))
        assert sorted(await store.neglected(NOW - 1, 10)) == []
        assert sorted(await store.neglected(NOW + 10, 10)) == ["task 0"]
        assert sorted(await store.neglected(NOW + 50, 10)) == ["task 0", "task 1"]
        assert sorted(await store.neglected(NOW + 100, 10)) == ["task 0", "task 1", "task 2"]
        assert len(await store.neglected(NOW + 100, 2)) == 2
        told = partial(requeue, now=NOW + 60, since=NOW + 10)
        assert await store.change("task 0", told) is not None
        assert await store.change("task 0", told) is None
        assert await store.change("task 1", told) is None
        assert sorted(await store.neglected(NOW + 50, 10)) == ["task 1"]
        await store.aclose()

    async def test_what_outlives_the_store(self, open_store: OpenStore) -> None:
        """A durable store has all of it after it was closed and opened again."""
        store = open_store()
        await store.open()
        durable = store.durable
        await store.create(task(1, idempotency_key="key"))
        claimed = await store.change("task 1", partial(claim, worker="a", now=NOW, lease_until=NOW + 10))
        await store.aclose()
        if not durable:
            pytest.skip("this store keeps nothing")
        again = open_store()
        await again.open()
        assert await again.get("task 1", NOW) == claimed
        assert await again.create(task(2, idempotency_key="key")) == claimed
        await again.aclose()

    async def test_two_connections_see_the_same(self, open_store: OpenStore) -> None:
        """A shared store is one, whichever connection is used."""
        first, second = open_store(), open_store()
        await first.open()
        if not first.shared:
            await first.aclose()
            pytest.skip("this store has one connection")
        await second.open()
        await first.create(task(1))
        claimed = await second.change("task 1", partial(claim, worker="a", now=NOW, lease_until=NOW + 10))
        assert claimed is not None
        assert await first.change("task 1", partial(claim, worker="b", now=NOW, lease_until=NOW + 10)) is None
        assert await first.get("task 1", NOW) == claimed
        await second.aclose()
        await first.aclose()
