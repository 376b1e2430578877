"""The promises of a store of tasks as tests, for any store: subclass `StoreConformance` in a test module.

They run on the event loops that the fixture `anyio_backend` gives, under pytest with anyio's plugin.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import pytest
from anyio import create_task_group, fail_after, sleep
from msgspec.structs import replace

from chanflow.tasks._errors import UnknownTaskError
from chanflow.tasks.record import (
    NEGLECT,
    ProgressReport,
    TaskRecord,
    TaskStatus,
    cancel,
    claim,
    finish,
    publish,
    put_back,
    renew,
    report,
    revive,
)
from chanflow.tasks.store import News, Store

__all__ = ["StoreConformance"]

OpenStore = Callable[[], Store]
NOW = 1_000_000.0


def task(number: int, **fields: Any) -> TaskRecord:
    """Make a record."""
    about: dict[str, Any] = {"name": "name", "arguments": b"\x80", "created_at": NOW, "run_at": NOW}
    return TaskRecord(id=f"task {number}", **{**about, **fields})


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
            priority=-7,
            published_at=NOW + 2,
            started_at=NOW + 3,
            finished_at=NOW + 4,
            expires_at=NOW + 5,
            idempotency_key="kéy",
            fingerprint="f",
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
        assert revived == replace(task(0), run_at=NOW + 5)
        assert await store.get("task 0", NOW + 11) == revived
        await store.aclose()

    async def test_a_task_is_created_once(self, open_store: OpenStore) -> None:
        """To create a task again, because the answer was lost, changes nothing, whatever has become of it meanwhile."""
        store = open_store()
        await store.open()
        await store.create(task(1, idempotency_key="key"))
        assert await store.create(task(1, idempotency_key="key")) == task(1, idempotency_key="key")
        [run] = (await store.claim({"name": None}, worker="a", now=NOW, lease_until=NOW + 10, limit=9)).records
        assert await store.create(task(1, idempotency_key="key")) == run
        ended = await store.change("task 1", partial(finish, worker="a", status=TaskStatus.FAILED, now=NOW, ttl=99.0))
        assert await store.create(task(1, idempotency_key="key")) == ended
        assert await store.get("task 1", NOW) == ended
        assert (await store.claim({"name": None}, worker="b", now=NOW + 1, lease_until=NOW + 10, limit=9)).records == []
        counts = await store.count(NOW)
        assert counts == {**dict.fromkeys(TaskStatus, 0), TaskStatus.FAILED: 1}
        await store.aclose()

    async def test_many_are_created_in_one_step(self, open_store: OpenStore) -> None:
        """Each is kept, or what has its id or key is given, in their order."""
        store = open_store()
        await store.open()
        first = await store.create(task(1, idempotency_key="key"))
        records = [task(2), task(3, idempotency_key="key"), task(1, idempotency_key="key"), task(4)]
        assert await store.create_many(records) == [task(2), first, first, task(4)]
        assert await store.create_many([]) == []
        assert [record.id for record in await store.page(NOW)] == ["task 4", "task 2", "task 1"]
        await store.aclose()

    async def test_many_changes(self, open_store: OpenStore) -> None:
        """Each is a step of its own, in their order; those that refuse, or whose task is unknown, give None."""
        store = open_store()
        await store.open()
        await store.create_many([task(1), task(2)])
        begin, more = partial(claim, now=NOW, lease_until=NOW + 10), partial(renew, lease_until=NOW + 20)
        results = await store.change_many(
            [
                ("task 1", partial(begin, worker="a")),
                ("task 2", partial(more, worker="a")),
                ("unknown", partial(begin, worker="a")),
                ("task 1", partial(more, worker="a")),
                ("task 1", partial(begin, worker="b")),
            ]
        )
        assert [None if each is None else (each.worker, each.lease_until) for each in results] == [
            ("a", NOW + 10),
            None,
            None,
            ("a", NOW + 20),
            None,
        ]
        assert await store.get("task 1", NOW) == results[3]
        assert await store.get("task 2", NOW) == task(2)
        assert await store.change_many([]) == []
        await store.aclose()

    # The queue

    async def test_a_claim_begins_runs(self, open_store: OpenStore) -> None:
        """So many as were asked for, of the wanted handlers, once they are due; each by one claim only."""
        store = open_store()
        await store.open()
        await store.create_many([task(1), task(2, name="other"), task(3, run_at=NOW + 5), task(4), task(5)])
        begin = partial(store.claim, now=NOW, lease_until=NOW + 10)
        first = await begin({"name": None, "unknown": None}, worker="a", limit=2)
        assert first.records == [claim(task(number), worker="a", now=NOW, lease_until=NOW + 10) for number in (1, 4)]
        assert [await store.get(record.id, NOW) for record in first.records] == first.records
        second = await begin({"name": None}, worker="b", limit=2)
        assert [record.id for record in second.records] == ["task 5"]
        assert second.next_at == NOW + 5
        assert (await begin({"name": None}, worker="c", limit=2)).records == []
        assert (await store.count(NOW))[TaskStatus.RUNNING] == 3
        late = await store.claim({"name": None}, worker="d", now=NOW + 5, lease_until=NOW + 15, limit=2)
        assert [record.id for record in late.records] == ["task 3"]
        rest = await begin({"other": None}, worker="e", limit=2)
        assert [record.id for record in rest.records] == ["task 2"]
        await store.aclose()

    async def test_the_order_of_claims(self, open_store: OpenStore) -> None:
        """By priority, then by when they became due, then by when they were made; whatever their handler."""
        store = open_store()
        await store.open()
        await store.create_many(
            [
                task(1, run_at=NOW + 2),
                task(2, name="other"),
                task(3),
                task(4, priority=1, run_at=NOW + 3),
                task(5, priority=-1),
                task(6, priority=1, name="other", run_at=NOW + 1),
                task(7),
            ]
        )
        found = await store.claim(
            {"name": None, "other": None}, worker="a", now=NOW + 9, lease_until=NOW + 10, limit=100
        )
        assert [int(record.id[-1]) for record in found.records] == [6, 4, 2, 3, 7, 1, 5]
        await store.aclose()

    async def test_a_task_that_waits_for_its_next_attempt_is_claimed_in_time(self, open_store: OpenStore) -> None:
        """What was put back, revived or cancelled is in the queue once, or not at all."""
        store = open_store()
        await store.open()
        await store.create_many([task(1), task(2), task(3)])
        begin = partial(store.claim, {"name": None}, limit=100)
        await begin(worker="a", now=NOW, lease_until=NOW + 100)
        await store.change("task 1", partial(put_back, worker="a", run_at=NOW + 5))
        await store.change("task 2", partial(put_back, worker="a", run_at=NOW + 1, attempted=False))
        await store.change("task 2", partial(cancel, now=NOW, ttl=100.0))
        await store.change("task 3", partial(finish, worker="a", status=TaskStatus.FAILED, now=NOW, ttl=100.0))
        assert (await begin(worker="b", now=NOW + 4, lease_until=NOW + 100)).next_at == NOW + 5
        await store.change("task 3", partial(revive, now=NOW + 6))
        found = await begin(worker="c", now=NOW + 6, lease_until=NOW + 100)
        assert [(record.id, record.attempts) for record in found.records] == [("task 1", 2), ("task 3", 1)]
        assert (await begin(worker="d", now=NOW + 7, lease_until=NOW + 100)).records == []
        await store.aclose()

    async def test_a_lease_that_has_run_out(self, open_store: OpenStore) -> None:
        """Its task is claimed by another, before any other task, and the attempt counts; a renewed one is not."""
        store = open_store()
        await store.open()
        begin = partial(store.claim, {"name": None})
        await store.create_many([task(1), task(2), task(3, priority=9)])
        assert len((await begin(worker="a", now=NOW, lease_until=NOW + 10, limit=3)).records) == 3
        await store.create(task(4, priority=1000))
        await store.change_many([(f"task {n}", partial(renew, worker="a", lease_until=NOW + 20)) for n in (1, 3)])
        [lost] = (await begin(worker="b", now=NOW + 10, lease_until=NOW + 30, limit=1)).records
        assert (lost.id, lost.attempts, lost.worker, lost.started_at) == ("task 2", 2, "b", NOW + 10)
        # The one who had it before has no say any more.
        for change in (
            partial(renew, worker="a", lease_until=NOW + 50),
            partial(put_back, worker="a", run_at=NOW),
            partial(finish, worker="a", status=TaskStatus.FAILED, now=NOW, ttl=1.0),
        ):
            assert await store.change("task 2", change) is None
        assert await store.get("task 2", NOW + 10) == lost
        found = await begin(worker="c", now=NOW + 20, lease_until=NOW + 30, limit=9)
        assert [record.id for record in found.records] == ["task 1", "task 3", "task 4"]
        again = await begin(worker="d", now=NOW + 30, lease_until=NOW + 40, limit=9)
        assert sorted((record.id, record.attempts) for record in again.records) == [
            ("task 1", 3),
            ("task 2", 3),
            ("task 3", 3),
            ("task 4", 2),
        ]
        await store.aclose()

    async def test_a_limit_for_a_handler(self, open_store: OpenStore) -> None:
        """No more of its tasks run at the same time, whoever claims them; lost ones count until they are claimed."""
        store = open_store()
        await store.open()
        await store.create_many([task(number) for number in range(5)])
        await store.create(task(5, name="other"))
        wanted = {"name": 2, "other": None}
        begin = partial(store.claim, wanted, limit=9)
        found = await begin(worker="a", now=NOW, lease_until=NOW + 10)
        assert [record.id for record in found.records] == ["task 0", "task 1", "task 5"]
        assert (await begin(worker="b", now=NOW, lease_until=NOW + 10)).records == []
        await store.change("task 0", partial(finish, worker="a", status=TaskStatus.SUCCESS, now=NOW, ttl=9.0))
        found = await begin(worker="c", now=NOW + 1, lease_until=NOW + 20)
        assert [record.id for record in found.records] == ["task 2"]
        # That of "a" is lost, and takes no room for one more.
        found = await begin(worker="d", now=NOW + 15, lease_until=NOW + 20)
        assert sorted(record.id for record in found.records) == ["task 1", "task 5"]
        assert (await begin(worker="e", now=NOW + 15, lease_until=NOW + 20)).records == []
        await store.aclose()

    async def test_one_certain_task_is_claimed(self, open_store: OpenStore) -> None:
        """It, or nothing: if it isn't due, runs, is at its end, is of another handler, or too many run."""
        store = open_store()
        await store.open()
        await store.create_many([task(0), task(1), task(2, run_at=NOW + 5), task(3), task(4)])
        await store.change("task 3", partial(cancel, now=NOW, ttl=9.0))
        await store.change("task 4", partial(publish, now=NOW))

        workers = map(str, count())

        async def begin(wanted: dict[str, int | None], number: int, now: float = NOW) -> list[str]:
            claimed = await store.claim(
                wanted, worker=next(workers), now=now, lease_until=now + 10, limit=1, task_id=f"task {number}"
            )
            return [record.id for record in claimed.records]

        assert await begin({"other": None}, 1) == []
        assert await begin({"name": 1}, 1) == ["task 1"]
        assert await begin({"name": None}, 1) == []
        assert await begin({"name": None}, 2) == []
        assert await begin({"name": None}, 3) == []
        assert await begin({"name": None}, 9) == []
        assert await begin({"name": 1}, 0) == []
        assert await begin({"name": None}, 4) == ["task 4"]
        assert await begin({"name": None}, 2, NOW + 5) == ["task 2"]
        assert await begin({"name": 1}, 1, NOW + 11) == ["task 1"]
        await store.aclose()

    async def test_one_of_many_claims(self, open_store: OpenStore) -> None:
        """However many try at the same time, one has the task."""
        store = open_store()
        await store.open()
        await store.create_many([task(number) for number in range(50)])
        claimed: list[TaskRecord] = []

        async def try_to_claim(worker: str) -> None:
            for turn in range(3):
                found = await store.claim(
                    {"name": None}, worker=f"{worker}.{turn}", now=NOW, lease_until=NOW + 10, limit=2
                )
                claimed.extend(found.records)

        async with create_task_group() as tasks:
            for number in range(10):
                tasks.start_soon(try_to_claim, str(number))
        assert sorted(record.id for record in claimed) == sorted(f"task {number}" for number in range(50))
        for record in claimed:
            assert await store.get(record.id, NOW) == record
        await store.aclose()

    async def test_what_is_due(self, open_store: OpenStore) -> None:
        """What could be claimed is listed, without what was published to a bus lately."""
        store = open_store()
        await store.open()
        await store.create_many([task(0), task(1), task(2, run_at=NOW + 5), task(3, name="other"), task(4)])
        await store.change("task 1", partial(publish, now=NOW))
        await store.change("task 4", partial(claim, worker="a", now=NOW, lease_until=NOW + 10))

        async def due(now: float, limit: int = 100) -> set[str]:
            return {record.id for record in (await store.due(["name"], now, limit)).records}

        assert await due(NOW) == {"task 0"}
        assert (await store.due(["name"], NOW, 100)).next_at == NOW + 5
        assert await due(NOW + 10) == {"task 0", "task 2", "task 4"}
        assert await store.change("task 0", partial(publish, now=NOW + 20)) is not None
        assert await store.change("task 0", partial(publish, now=NOW + 20)) is None
        assert await due(NOW + 20) == {"task 2", "task 4"}
        assert await due(NOW + NEGLECT) == {"task 1", "task 2", "task 4"}
        assert len(await due(NOW + NEGLECT, 2)) == 2
        await store.aclose()

    async def test_news(self, open_store: OpenStore) -> None:
        """Every change of a task is told, whoever made it, apart from renewed leases."""
        store = open_store()
        await store.open()
        heard: list[tuple[str, str, TaskStatus, bool]] = []

        def tell(news: News | None) -> None:
            if news is not None:
                heard.append((news.id, news.name, news.status, news.cancel_requested))

        async with create_task_group() as tasks:
            await tasks.start(store.news, tell)
            await store.create_many([task(1), task(2, name="other")])
            await store.claim({"name": None}, worker="a", now=NOW, lease_until=NOW + 10, limit=9)
            await store.change("task 1", partial(renew, worker="a", lease_until=NOW + 20))
            await store.change("task 1", partial(report, worker="a", progress=ProgressReport(1, 2)))
            await store.change("task 1", partial(cancel, now=NOW, ttl=9.0))
            await store.change("task 1", partial(finish, worker="a", status=TaskStatus.FAILED, now=NOW, ttl=9.0))
            await store.change("task 1", partial(revive, now=NOW))
            with fail_after(10.0):
                while len(heard) < 7:
                    await sleep(0.01)
            tasks.cancel_scope.cancel()
        pending, running = TaskStatus.PENDING, TaskStatus.RUNNING
        assert heard == [
            ("task 1", "name", pending, False),
            ("task 2", "other", pending, False),
            ("task 1", "name", running, False),
            ("task 1", "name", running, False),
            ("task 1", "name", running, True),
            ("task 1", "name", TaskStatus.FAILED, True),
            ("task 1", "name", pending, False),
        ]
        # Nobody is told any more.
        await store.create(task(3))
        assert len(heard) == 7
        await store.aclose()

    async def test_the_clock(self, open_store: OpenStore) -> None:
        """It tells about the time, and never goes back."""
        store = open_store()
        await store.open()
        times = [store.now() for _ in range(1000)]
        assert abs(times[0] - time.time()) < 60.0
        assert times == sorted(times)
        await store.aclose()

    async def spoil(self, store: Store, task_id: str) -> None:
        """Put something that is no record in the place of a task's; for stores where that can be."""
        del store, task_id
        pytest.skip("nobody else can write in this store")

    async def test_a_record_that_cannot_be_read(self, open_store: OpenStore, caplog: pytest.LogCaptureFixture) -> None:
        """It is logged once and set aside, and is in nobody's way."""
        store = open_store()
        await store.open()
        await store.create_many([task(1), task(2), task(3)])
        await self.spoil(store, "task 1")
        await store.aclose()
        store = open_store()
        await store.open()
        assert await store.get("task 1", NOW) is None
        assert await store.change("task 1", lambda record: record) is None
        assert [record.id for record in await store.page(NOW, limit=2)] == ["task 3", "task 2"]
        # It may take the place of others once, but not again.
        await store.due(["name"], NOW, 1)
        [listed] = (await store.due(["name"], NOW, 1)).records
        assert listed.id in {"task 2", "task 3"}
        begin = partial(store.claim, {"name": None}, now=NOW, lease_until=NOW + 10, limit=1)
        found = [(await begin(worker=str(number))).records for number in range(4)]
        assert [record.id for records in found for record in records] == ["task 2", "task 3"]
        assert (await store.count(NOW))[TaskStatus.PENDING] == 0
        assert [line.message for line in caplog.records if "can't be read, and is set aside" in line.message] == [
            line.message for line in caplog.records
        ]
        assert len(caplog.records) == 1
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
        for number in (5, 3):
            with pytest.raises(UnknownTaskError):
                await store.page(NOW, after=f"task {number + 100}")
            assert await store.page(NOW, after=f"task {number}") != []
        counts = await store.count(NOW)
        assert counts == {**dict.fromkeys(TaskStatus, 0), TaskStatus.PENDING: 4, TaskStatus.CANCELLED: 3}
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

    async def test_one_connection_hears_of_the_other(self, open_store: OpenStore) -> None:
        """The news of a shared store are told in every process."""
        first, second = open_store(), open_store()
        await first.open()
        if not first.shared:
            await first.aclose()
            pytest.skip("this store has one connection")
        await second.open()
        heard: list[tuple[str, str, TaskStatus, bool]] = []

        def tell(news: News | None) -> None:
            if news is not None:
                heard.append((news.id, news.name, news.status, news.cancel_requested))

        async with create_task_group() as tasks:
            await tasks.start(second.news, tell)
            await first.create(task(1))
            await first.claim({"name": None}, worker="a", now=NOW, lease_until=NOW + 10, limit=9)
            await first.change("task 1", partial(renew, worker="a", lease_until=NOW + 20))
            await first.change("task 1", partial(cancel, now=NOW, ttl=9.0))
            await first.change("task 1", partial(finish, worker="a", status=TaskStatus.SUCCESS, now=NOW, ttl=9.0))
            with fail_after(10.0):
                while len(heard) < 4:
                    await sleep(0.01)
            tasks.cancel_scope.cancel()
        assert heard == [
            ("task 1", "name", TaskStatus.PENDING, False),
            ("task 1", "name", TaskStatus.RUNNING, False),
            ("task 1", "name", TaskStatus.RUNNING, True),
            ("task 1", "name", TaskStatus.SUCCESS, True),
        ]
        await second.aclose()
        await first.aclose()
