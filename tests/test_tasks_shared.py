"""Services that share a store: none blocks, fills or holds what is another's."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
import sys
import threading
import time
import tracemalloc
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from anyio import create_task_group, fail_after, sleep, wait_all_tasks_blocked

from chanflow.bus import StorageError
from chanflow.tasks import TaskRecord, TaskService, TaskStatus
from chanflow.tasks.stores import _bell as bell_module
from chanflow.tasks.stores._bell import Bell
from chanflow.tasks.stores.memory import MemoryStore
from chanflow.tasks.stores.redis import RedisStore
from chanflow.tasks.stores.sqlite import SqliteStore
from tests.support.paths import another_way
from tests.support.redis import running_redis
from tests.support.tasks import double

pytestmark = pytest.mark.anyio


async def other(number: int = 1) -> int:
    return number


async def test_tasks_that_nobody_here_knows() -> None:
    """However many of another program's tasks are in the store, they are left alone, and are in nobody's way."""
    store = MemoryStore()
    with_other, with_double = (TaskService(store=store, workers=1) for _ in range(2))
    with_other.task(other)
    with_double.task(double)
    front = TaskService(store=store, workers=0)
    front.task(double)
    async with front, with_other:
        ids = await front.submit_many("double", [{}] * 20_000)
        await sleep(1000.0)
        assert (await front.count())[TaskStatus.PENDING] == 20_000
        with fail_after(1.0):
            assert await with_other.result(await with_other.submit("other", number=5)) == 5
        async with with_double:
            with fail_after(100.0):
                assert await front.result(ids[-1]) == 2
            assert (await front.get(ids[0])).attempts == 1


async def test_what_is_delayed_or_over_fills_nothing() -> None:
    """However many tasks wait for their time or were cancelled, the next one runs at once."""
    service = TaskService(workers=1)
    service.task(double)
    async with service:
        for _ in range(3):
            delayed = await service.submit_many("double", [{}] * 10_001, delay=3600.0)
            for task_id in delayed[:5000]:
                await service.cancel(task_id)
        with fail_after(1.0):
            assert await service.result(await service.submit("double", number=4)) == 8


async def test_a_handler_that_submits_many_children() -> None:
    """It waits for nobody, though it holds the only worker."""
    service = TaskService(workers=1)
    service.task(double)

    @service.task
    async def parent() -> int:
        for number in range(10_001):
            await service.submit("double", number=number)
        return 10_001

    async with service:
        with fail_after(10.0):
            assert await service.result(await service.submit(parent)) == 10_001
        await service.shutdown(0.0)


async def test_memory_ends_where_it_began() -> None:
    """What has ended and expired, was cancelled or put back leaves nothing in the queues of a store in memory."""

    async def run_many(service: TaskService) -> None:
        for _ in range(10):
            ids = await service.submit_many("double", [{"number": number} for number in range(500)])
            delayed = await service.submit_many("double", [{}] * 500, delay=1e6)
            for task_id in delayed:
                await service.cancel(task_id)
            for task_id in ids:
                await service.result(task_id)
            await sleep(200.0)

    service = TaskService(workers=10, ttl=100.0)
    service.task(double)
    async with service:
        tracemalloc.start()
        try:
            await run_many(service)
            before, _ = tracemalloc.get_traced_memory()
            await run_many(service)
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        store: Any = service._store
        assert not store._records
        assert len(store._later) + store._entries < 1000
    # Ten thousand tasks: two bytes for each would be more.
    assert after - before < 20_000


async def test_regression_what_changes_nothing_takes_no_memory() -> None:
    """Whoever cancels a task that has ended, however often, leaves nothing behind."""
    store = MemoryStore()
    service = TaskService(store=store)
    service.task(double)
    async with service:
        task_id = await service.submit("double")
        ended = await service.wait(task_id)
        for _ in range(10):
            assert await service.cancel(task_id) == ended
        assert len(store._expiring) == 1


@pytest.mark.slow
async def test_nothing_is_left_of_very_many_tasks() -> None:
    """Not of one in a hundred: whoever keeps a task's record has an allocated block or more for each."""

    async def run_many(service: TaskService, batches: int) -> int:
        for _ in range(batches):
            await service.submit_many("double", [{"number": number} for number in range(1000)])
            await sleep(1.0)
            assert not sum((await service.count()).values())
        gc.collect()
        return sys.getallocatedblocks()

    service = TaskService(workers=10, ttl=0.0)
    service.task(double)
    async with service:
        # What is made once, and then stays.
        await run_many(service, 10)
        before = await run_many(service, 10)
        after = await run_many(service, 200)
    assert after - before < 6000


# In a file


@pytest.mark.real_time
class TestFile:
    async def test_reading_waits_for_nobody_who_writes(self, tmp_path: Path) -> None:
        """While another process has the file's lock, tasks are counted, listed, found and waited for."""
        path = tmp_path / "tasks.db"
        service = TaskService(store=f"sqlite:///{path}", workers=1)
        service.task(double)
        async with service:
            task_id = await service.submit("double")
            await service.result(task_id)
            with closing(sqlite3.connect(path, isolation_level=None)) as blocker:
                blocker.execute("BEGIN IMMEDIATE")
                with fail_after(2.0):
                    assert (await service.count())[TaskStatus.SUCCESS] == 1
                    assert (await service.get(task_id)).status is TaskStatus.SUCCESS
                    assert [record.id for record in await service.page()] == [task_id]
                    assert await service.result(task_id) == 2
                blocker.execute("ROLLBACK")

    async def test_counting_and_looking_for_tasks_look_at_few(self, tmp_path: Path) -> None:
        """The steps that SQLite takes for that don't grow with the tasks that are there."""

        async def steps(store: SqliteStore) -> int:
            taken = 0

            def count() -> None:
                nonlocal taken
                taken += 1

            for database in store._reader, store._database:
                await database.run(lambda connection: connection.set_progress_handler(count, 1))
            now = store.now()
            await store.count(now)
            await store.claim({"unknown": None}, worker="a", now=now, lease_until=now + 1, limit=10)
            await store.claim({"double": 1}, worker="b", now=now, lease_until=now + 1, limit=1)
            for database in store._reader, store._database:
                await database.run(lambda connection: connection.set_progress_handler(None, 0))
            return taken

        service = TaskService(store=f"sqlite:///{tmp_path}/tasks.db", workers=0)
        service.task(double)
        async with service:
            store: Any = service._store
            await service.submit_many("double", [{}] * 10)
            few = await steps(store)
            await service.submit_many("double", [{}] * 5000)
            await service.submit_many("double", [{}] * 5000, delay=3600.0)
            many = await steps(store)
        assert many < 2 * few

    async def test_a_machine_without_such_a_clock(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """There, the time is the wall clock's."""
        monkeypatch.delattr(time, "CLOCK_BOOTTIME")
        store = SqliteStore(tmp_path / "tasks.db")
        await store.open()
        assert store._clock is time.time
        await store.aclose()

    async def test_a_file_that_cannot_be_used(self, tmp_path: Path) -> None:
        """It is one clear error, and nothing is left open."""
        (tmp_path / "tasks.db").write_bytes(b"no database, but long enough to be taken for something else")
        with pytest.raises(StorageError, match="not a database"):
            await SqliteStore(tmp_path / "tasks.db").open()

    async def test_a_table_that_is_anothers(self, tmp_path: Path) -> None:
        """A file in which the tables are somebody else's is refused, and closed."""
        with closing(sqlite3.connect(tmp_path / "tasks.db")) as connection:
            connection.execute("CREATE VIEW clock AS SELECT 1")
        with pytest.raises(StorageError):
            await SqliteStore(tmp_path / "tasks.db").open()

    async def test_a_file_that_cannot_be_watched_for_a_while(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The bell begins again, and whoever listens is told that some news may have been missed."""
        monkeypatch.setattr(bell_module, "AGAIN", 0.01)
        monkeypatch.setattr(bell_module, "LOOK_INTERVAL", 0.0)
        path = tmp_path / "tasks.db"
        store, other = SqliteStore(path), SqliteStore(another_way(path))
        await store.open()
        await other.open()
        heard: list[Any] = []
        async with create_task_group() as tasks:
            await tasks.start(store.news, heard.append)
            await other._database.run(lambda connection: connection.execute("ALTER TABLE changes RENAME TO away"))
            with fail_after(10.0):
                while "can't be watched" not in caplog.text:  # noqa: ASYNC110 -- as below
                    await sleep(0.01)
            await other._database.run(lambda connection: connection.execute("ALTER TABLE away RENAME TO changes"))
            with fail_after(10.0):
                while None not in heard:  # noqa: ASYNC110 -- nobody tells that it has been told
                    await sleep(0.01)
            # News that were deleted before they could be read are missed, too.
            heard.clear()

            def skip(connection: sqlite3.Connection) -> None:
                connection.execute("DELETE FROM changes")
                connection.execute("INSERT INTO changes VALUES (1000, 'x', 'id', 'double', NULL, 'pending', 0)")

            await other._database.run(skip)
            with fail_after(10.0):
                while len(heard) < 2:  # noqa: ASYNC110 -- as above
                    await sleep(0.01)
            assert heard[0] is None
            assert heard[1].id == "id"
            tasks.cancel_scope.cancel()
        await other.aclose()
        await store.aclose()

    async def test_a_key_of_a_task_that_cannot_be_read(self, tmp_path: Path) -> None:
        """That is an error, rather than a second task with this key."""
        service = TaskService(store=f"sqlite:///{tmp_path}/tasks.db", workers=0)
        service.task(double)
        async with service:
            await service.submit("double", idempotency_key="key")
            database = service._store._database  # type: ignore[attr-defined]
            await database.run(lambda connection: connection.execute("UPDATE tasks SET record = x'00'"))
            with pytest.raises(StorageError, match="the task with the idempotency key 'key' can't be read"):
                await service.submit("double", idempotency_key="key")

    async def test_a_full_disk(self, tmp_path: Path) -> None:
        """A submission that raised has left nothing, and what was there stays."""
        service = TaskService(store=f"sqlite:///{tmp_path}/tasks.db", workers=0)

        @service.task
        async def store_text(text: str) -> None: ...

        async with service:
            task_id = await service.submit(store_text, text="short")
            database = service._store._database  # type: ignore[attr-defined]
            [pages] = await database.run(lambda connection: connection.execute("PRAGMA page_count").fetchone())
            await database.run(lambda connection: connection.execute(f"PRAGMA max_page_count = {pages}").fetchone())
            with pytest.raises(StorageError, match="full"):
                await service.submit(store_text, text="long" * 100_000)
            with pytest.raises(StorageError, match="full"):
                await service.submit_many(store_text, [{"text": "short"}, {"text": "long" * 100_000}])
            assert [record.id for record in await service.page()] == [task_id]
            assert (await service.count())[TaskStatus.PENDING] == 1

    async def test_a_file_of_before(self, tmp_path: Path) -> None:
        """What waits in a file that was made before the store was the queue is run, and what has ended is kept."""
        path = tmp_path / "tasks.db"
        service = TaskService(store=f"sqlite:///{path}", workers=0)
        service.task(double)
        async with service:
            ids = await service.submit_many("double", [{"number": number} for number in range(3)])
            await service.cancel(ids[0])
            keyed = await service.submit("double", idempotency_key="key")
        with closing(sqlite3.connect(path)) as connection:
            connection.executescript("""
                CREATE TABLE old (
                    number INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, idempotency_key TEXT, status TEXT NOT NULL,
                    looked_for_at REAL, expires_at REAL, record BLOB NOT NULL
                );
                INSERT INTO old SELECT number, id, idempotency_key, status, due_at, expires_at, record FROM tasks;
                INSERT INTO old VALUES (99, 'bad', NULL, 'pending', 0.0, NULL, x'00');
                DROP VIEW totals; DROP VIEW uncounted;
                DROP TABLE tasks; DROP TABLE counts; DROP TABLE changes; DROP TABLE counted;
                ALTER TABLE old RENAME TO tasks;
                CREATE INDEX tasks_by_status ON tasks (status, number);
            """)
        after = TaskService(store=f"sqlite:///{path}", workers=1)
        after.task(double)
        async with after:
            with fail_after(10.0):
                assert [await after.result(task_id) for task_id in ids[1:]] == [2, 4]
                assert await after.submit("double", idempotency_key="key") == keyed
                assert await after.result(keyed) == 2
            counts = await after.count()
            assert [counts[status] for status in TaskStatus] == [0, 0, 3, 0, 1]

    async def test_the_wall_clock_may_jump(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A process that starts when it is an hour ahead has the same time as the others."""
        path = tmp_path / "tasks.db"
        first = SqliteStore(path)
        await first.open()
        real = time.time()
        monkeypatch.setattr(time, "time", lambda: real + 3600.0)
        second = SqliteStore(another_way(path))
        await second.open()
        assert abs(second.now() - first.now()) < 1.0
        assert abs(first.now() - real) < 60.0
        await second.aclose()
        await first.aclose()


@pytest.mark.real_time
class TestRedis:
    async def test_the_wall_clock_may_be_wrong(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The time is the server's, whatever a machine believes."""
        with running_redis() as url:
            first = RedisStore(url)
            await first.open()
            real = time.time()
            monkeypatch.setattr(time, "time", lambda: real + 60.0)
            second = RedisStore(url)
            await second.open()
            assert abs(second.now() - first.now()) < 1.0
            assert abs(second.now() - real) < 10.0
            await second.aclose()
            await first.aclose()

    async def test_ids_whose_records_are_gone(self) -> None:
        """What was evicted is in nobody's way: others are found, listed, counted and run, up to the limit."""
        with running_redis() as url:
            service = TaskService(store=url, workers=0)
            service.task(limit=1)(double)
            worker = TaskService(store=url, workers=2)
            worker.task(limit=1)(double)
            async with service:
                ids = await service.submit_many("double", [{}] * 5)
                store: Any = service._store
                now = store.now()
                [run] = (await store.claim({"double": 1}, worker="x", now=now, lease_until=now + 0.2, limit=1)).records
                assert run.id == ids[0]
                for task_id in ids[:3]:
                    await store._client.delete([f"chanflow:tasks:task:{task_id}"])
                assert [record.id for record in await service.page(limit=2)] == [ids[4], ids[3]]
                async with worker:
                    with fail_after(10.0):
                        assert [await service.result(task_id) for task_id in ids[3:]] == [2, 2]
                    assert [record.id for record in await service.page()] == [ids[4], ids[3]]
                    counts = await service.count()
                    assert sum(counts.values()) == counts[TaskStatus.SUCCESS] == 2

    async def test_somebody_elses_news(self) -> None:
        """What is no news of ours is a reason to look again, and no more; so are too many to be told."""
        with running_redis() as url:
            store, stranger = RedisStore(url), RedisStore(url)
            await store.open()
            await stranger.open()
            heard: list[Any] = []
            async with create_task_group() as tasks:
                await tasks.start(store.news, heard.append)
                heard.clear()
                for message in b"\xc1", b"\x05", b"\x91\xa1x", b"\x92\xa1x\x01":
                    await stranger._client.publish("chanflow:tasks:news", message)
                records = [
                    TaskRecord(id=str(number), name="double", arguments=b"\x80", created_at=1.0, run_at=1.0)
                    for number in range(1001)
                ]
                await stranger.create_many(records)
                with fail_after(5.0):
                    while len(heard) < 5:  # noqa: ASYNC110 -- nobody tells that it has been told
                        await sleep(0.01)
                tasks.cancel_scope.cancel()
            assert heard == [None] * 5
            await stranger.aclose()
            await store.aclose()

    async def test_somebody_elses_value(self) -> None:
        """A key that is no task of ours is set aside, and lists, claims and questions go on."""
        with running_redis() as url:
            service = TaskService(store=url, workers=1)
            service.task(double)
            async with service:
                await service.shutdown()
                ids = await service.submit_many("double", [{}] * 3)
                store: Any = service._store
                await store._client.set(f"chanflow:tasks:task:{ids[0]}", "a stranger's")
                await store._client.hset(f"chanflow:tasks:task:{ids[1]}", {"r": b"garbage"})
            again = TaskService(store=url, workers=1)
            again.task(double)
            async with again:
                with fail_after(10.0):
                    assert await again.result(ids[2]) == 2
                    for task_id in ids[:2]:
                        with pytest.raises(LookupError):
                            await again.get(task_id)
                assert [record.id for record in await again.page()] == [ids[2]]
                assert (await again.count())[TaskStatus.PENDING] == 0


async def test_a_task_that_waits_is_heard_of_at_once() -> None:
    """Submitted by one service, run by another, and its result heard by the first, without any time passing."""
    store = MemoryStore()
    front, back = (TaskService(store=store, workers=workers) for workers in (0, 1))
    for service in front, back:
        service.task(double)
    async with front, back:
        await wait_all_tasks_blocked()
        began = store.now()
        async with create_task_group() as tasks:
            for _ in range(3):
                tasks.start_soon(front.result, await front.submit("double"))
        assert store.now() - began < 0.1


def test_an_event_loop_that_ends_without_closing_its_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that watches the file ends, too."""
    monkeypatch.setattr(bell_module, "LOOK_INTERVAL", 0.0)
    path = tmp_path / "tasks.db"

    async def leave_open() -> Bell:
        store = SqliteStore(path)
        await store.open()
        bell = await Bell(path, "writer", lambda _news: None).__aenter__()
        await store.aclose()
        return bell

    loop = asyncio.new_event_loop()
    bell = loop.run_until_complete(leave_open())
    loop.close()
    deadline = time.monotonic() + 10.0
    while any(thread.name == "chanflow tasks.db bell" for thread in threading.enumerate()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert bell._stop.is_set()
