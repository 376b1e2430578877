"""The task service on a Redis store."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from contextlib import ExitStack

import pytest
from anyio import create_task_group, fail_after, sleep

from chanflow.bus import StorageError
from chanflow.tasks import TaskService, TaskStatus
from tests.redis_server import running_redis

pytestmark = pytest.mark.anyio


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    # A virtual clock doesn't wait for a server.
    return request.param


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


def test_without_its_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, and how to install it, is said."""
    monkeypatch.delitem(sys.modules, "chanflow.tasks.stores.redis", raising=False)
    monkeypatch.setitem(sys.modules, "coredis", None)
    with pytest.raises(ModuleNotFoundError, match=r"^a store in Redis needs coredis: pip install 'chanflow\[redis\]'$"):
        TaskService(store="redis://127.0.0.1")
