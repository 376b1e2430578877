"""The task service on a Redis store."""

from __future__ import annotations

import gc
import math
import sys
from collections import Counter
from contextlib import ExitStack
from functools import partial
from unittest.mock import AsyncMock

import pytest
from anyio import CancelScope, Event, create_task_group, fail_after, sleep
from msgspec.structs import replace

from chanflow.bus import StorageError
from chanflow.tasks import TaskRecord, TaskService, TaskStatus
from chanflow.tasks.record import claim, finish, put_back, renew
from chanflow.tasks.stores import redis as redis_module
from chanflow.tasks.stores.redis import RedisStore
from tests.support.redis import running_redis

pytestmark = [pytest.mark.anyio, pytest.mark.real_time]


async def test_two_services_share_a_redis() -> None:
    """What one is given the other finds, and each task runs once; they need no bus in common."""
    runs: Counter[int] = Counter()

    async def work(number: int) -> int:
        runs[number] += 1
        await sleep(0.01)
        return number * 2

    async def endless() -> None:
        await sleep(3600.0)

    with running_redis() as url:
        front, first, second = (TaskService(store=url, workers=workers) for workers in (0, 1, 1))
        for service in front, first, second:
            service.task(work)
            service.task(endless)
        async with front, first, second:
            ids = [await front.submit("work", number=number) for number in range(30)]
            ids += [await first.submit("work", number=number) for number in range(30, 60)]
            with fail_after(60.0):
                assert [await second.result(task_id) for task_id in ids] == [number * 2 for number in range(60)]
            assert set(runs.values()) == {1}
            task_id = await first.submit("endless")
            with fail_after(30.0):
                while (await second.get(task_id)).status is not TaskStatus.RUNNING:  # noqa: ASYNC110 -- of another
                    await sleep(0.01)
                async with create_task_group() as tasks:
                    for _ in range(2):
                        tasks.start_soon(second.wait, task_id)
                    await sleep(0.3)
                    await second.cancel(task_id)
                assert (await second.get(task_id)).status is TaskStatus.CANCELLED
            assert (await front.count())[TaskStatus.SUCCESS] == 60
            await second.shutdown()
            await front.submit("work", number=60)
            with fail_after(30.0):
                while not runs[60]:  # noqa: ASYNC110 -- as above
                    await sleep(0.01)


@pytest.mark.parametrize("where", ["outside", "inside"])
async def test_regression_a_cancelled_service_puts_back_what_runs(where: str) -> None:
    """Its client outlives the cancellation for that, and the service can be entered again."""
    begun = Event()

    async def endless() -> None:
        begun.set()
        await sleep(math.inf)

    with running_redis() as url, fail_after(30.0):
        service = TaskService(store=url)
        service.task(endless)
        with CancelScope() as outside:
            async with service:
                with CancelScope() as inside:
                    await service.submit("endless")
                    await begun.wait()
                    (outside if where == "outside" else inside).cancel()
                    await sleep(math.inf)
                await service.shutdown(0.0)
        async with TaskService(store=url, workers=0) as other:
            [record] = await other.page()
        assert (record.status, record.attempts) == (TaskStatus.PENDING, 0)
        begun = Event()
        async with service:
            await begun.wait()
            await service.shutdown(0.0)


async def test_regression_a_store_of_two_services() -> None:
    """Its client would end with the one that entered first; the other is refused."""
    with running_redis() as url:
        store = RedisStore(url)
        async with TaskService(store=store, workers=0) as service:
            message = "this store in Redis is open already: each service needs one of its own"
            with pytest.raises(RuntimeError, match=f"^{message}$"):
                await TaskService(store=store).__aenter__()
            assert await service.page() == []


async def test_finished_tasks_expire_by_themselves() -> None:
    """A record leaves Redis after its time, whether a service is there or not."""

    async def short() -> str:
        return "done"

    with running_redis() as url:
        service = TaskService(store=url, ttl=0.5)
        service.task(short)
        async with service:
            task_id = await service.submit("short", idempotency_key="key")
            assert await service.result(task_id) == "done"
            client = service._store._client  # type: ignore[attr-defined]
            assert await client.keys("*task:*") == {b"chanflow:tasks:task:" + task_id.encode()}
            await sleep(0.7)
            assert await client.keys("*task:*") == set()
            assert await client.keys("*key:*") == set()


NOW = 1000.0


def new(number: int) -> TaskRecord:
    return TaskRecord(id=f"task {number}", name="work", arguments=b"\x80", created_at=NOW, run_at=NOW)


async def test_what_a_store_remembers_is_only_a_guess() -> None:
    """A change begins with what this process knows of the task; if another has changed it, it is looked at again."""
    ours, others = partial(claim, worker="a", now=NOW, lease_until=NOW + 10), partial(put_back, worker="a", run_at=NOW)
    with running_redis() as url:
        store, other = RedisStore(url), RedisStore(url)
        await store.open()
        await other.open()
        asked = store._find = AsyncMock(wraps=store._find)  # type: ignore[method-assign]
        # Nobody else has changed it: no question is needed.
        await store.create(new(1))
        assert (await store.change("task 1", ours)) is not None
        assert asked.await_count == 0
        # Another has: what we would refuse, and what we would do to what it was.
        assert (await other.change("task 1", others)) is not None
        again = await store.change("task 1", ours)
        assert again is not None
        assert again.attempts == 2
        assert (await other.change("task 1", others)) is not None
        back = await store.change("task 1", partial(renew, worker="a", lease_until=NOW + 20))
        assert back is None
        # A success is for good, and needs no question either, until it expires.
        assert (await store.change("task 1", ours)) is not None
        done = await store.change(
            "task 1", partial(finish, worker="a", status=TaskStatus.SUCCESS, now=NOW, ttl=10.0, result=b"\xc0")
        )
        asked.reset_mock()
        assert await store.get("task 1", NOW + 9) == done
        assert await store.get("task 1", NOW + 10) is None
        assert asked.await_count == 0
        await other.aclose()
        await store.aclose()


async def test_a_store_remembers_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest is forgotten, and what is large is not kept."""
    monkeypatch.setattr(redis_module, "MOST_REMEMBERED", 3)
    with running_redis() as url:
        store = RedisStore(url)
        await store.open()
        await store.create(replace(new(0), arguments=b"\x80" * 1000))
        for number in range(1, 6):
            await store.create(new(number))
        assert list(store._last) == ["task 3", "task 4", "task 5"]
        await store.aclose()


# coredis leaves streams of its own open when it can't connect.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function MemoryObject:pytest.PytestUnraisableExceptionWarning"
)
async def test_a_redis_that_is_away_or_goes() -> None:
    """It is one clear error: on entering, and for each call later on."""
    with pytest.raises(StorageError, match=r"^redis://127\.0\.0\.1:1: "):
        async with TaskService(store="redis://127.0.0.1:1"):
            pass
    with ExitStack() as stack:
        url = stack.enter_context(running_redis())
        service = TaskService(store=url, workers=0)
        async with service, create_task_group():
            await service.count()
            stack.close()
            with pytest.raises(StorageError, match=f"^{url}: "):
                await service.get("id")
        gc.collect()


@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function MemoryObject:pytest.PytestUnraisableExceptionWarning"
)
async def test_a_password_is_not_told() -> None:
    """Neither the error nor the log has it."""
    with pytest.raises(StorageError) as caught:
        async with TaskService(store="redis://user:secret@127.0.0.1:1/0"):
            pass
    assert str(caught.value).startswith("redis://127.0.0.1:1/0: ")
    assert "secret" not in str(caught.value)
    del caught
    gc.collect()


def test_without_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, and how to install it, is said."""
    for name in "chanflow.tasks.stores.redis", "chanflow.tasks.stores._redis_client":
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "coredis", None)
    with pytest.raises(ModuleNotFoundError, match=r"^a store in Redis needs coredis: pip install 'chanflow\[redis\]'$"):
        TaskService(store="redis://127.0.0.1")
