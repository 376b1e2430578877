"""One task's trouble is one task's: whatever its handler does, the service goes on."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import fail_after, sleep, wait_all_tasks_blocked
from msgspec.structs import replace

from chanflow import Retry
from chanflow._check import show_error
from chanflow.bus import Message, connect
from chanflow.tasks import TaskFailedError, TaskRecord, TaskService, TaskStatus
from chanflow.tasks.stores.memory import MemoryStore
from tests.support.redis import running_redis

pytestmark = pytest.mark.anyio


class Unspeakable(Exception):  # noqa: N818 -- it is about its message
    def __str__(self) -> str:
        msg = "no words"
        raise ValueError(msg)


class Own(BaseException):
    pass


ENDS: dict[str, BaseException] = {
    "SystemExit": SystemExit(1),
    "Own": Own("mine"),
    "Unspeakable": Unspeakable(),
    "BaseExceptionGroup": BaseExceptionGroup("all", [SystemExit(1), ValueError("one")]),
    "ExceptionGroup": ExceptionGroup("all", [Unspeakable()]),
}


@pytest.mark.parametrize("timeout", [None, 5.0])
@pytest.mark.parametrize("where", ["event loop", "thread"])
@pytest.mark.parametrize("kind", ENDS)
async def test_whatever_a_handler_raises(kind: str, where: str, timeout: float | None) -> None:
    """It is that task's failure, with the class of the error; the next task runs, and so does the service."""
    service = TaskService(workers=1)

    async def raise_it() -> None:
        raise ENDS[kind]

    def raise_in_thread() -> None:
        raise ENDS[kind]

    async def fine() -> str:
        return "fine"

    service.task(name="bad", timeout=timeout)(raise_it if where == "event loop" else raise_in_thread)
    service.task(fine)
    async with service:
        # Without a deadline, since a virtual clock doesn't wait for a thread.
        record = await service.wait(await service.submit("bad"))
        assert (record.status, record.attempts) == (TaskStatus.FAILED, 1)
        if where == "event loop" or timeout is None:
            assert record.error_type == (kind if isinstance(ENDS[kind], Exception) else "RuntimeError")
            if not isinstance(ENDS[kind], Exception):
                assert record.error_message == f"the task raised {show_error(ENDS[kind])}"
        assert await service.result(await service.submit("fine")) == "fine"
    if kind == "Unspeakable" and record.error_type == kind:
        assert record.error_message == "<its str raises ValueError>"


async def test_a_retry_for_what_is_no_exception() -> None:
    """`SystemExit` is worth another attempt, as any failure; a function may say that it is not."""
    service = TaskService()

    @service.task(retry=Retry(3, delay=0.0, on=lambda error: not isinstance(error.__cause__, SystemExit)))
    async def once() -> None:
        raise SystemExit(1)

    @service.task(retry=Retry(3, delay=0.0))
    async def thrice() -> None:
        raise SystemExit(1)

    async with service:
        assert (await service.wait(await service.submit(once))).attempts == 1
        assert (await service.wait(await service.submit(thrice))).attempts == 3


@pytest.mark.parametrize("kind", ENDS)
async def test_whatever_a_consumer_raises(kind: str) -> None:
    """It is that message's failure, and the next one is handled."""
    handled: list[bytes] = []

    async def handle(message: Message) -> None:
        if message.body == b"bad":
            raise ENDS[kind]
        handled.append(message.body)

    async with connect("memory://") as bus, anyio.create_task_group() as tasks:
        tasks.start_soon(consume_one, bus, handle)
        await wait_all_tasks_blocked()
        for body in b"bad", b"good":
            await bus.publish("topic", body)
        await wait_all_tasks_blocked()
        assert handled == [b"good"]
        [dead] = await bus.dead_letters("dead")
        assert dead.reason.startswith(kind if isinstance(ENDS[kind], Exception) else "RuntimeError: the task raised ")
        tasks.cancel_scope.cancel()


async def consume_one(bus: Any, handle: Any) -> None:
    await bus.consume("topic", handle, group="group", workers=1, retry=Retry(1), dead_letter="dead")


async def test_a_cancellation_is_no_failure() -> None:
    """A handler that gathers its cancellation in a group with errors of its own is still put back."""
    store = MemoryStore()

    async def grouped() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(fail_when_cancelled)
            await sleep(math.inf)

    async def fail_when_cancelled() -> None:
        await sleep(math.inf)

    service = TaskService(store=store)
    service.task(grouped)
    with anyio.move_on_after(5.0):
        async with service:
            await service.submit("grouped")
            await sleep(math.inf)
    [record] = store._records.values()
    assert (record.status, record.attempts) == (TaskStatus.PENDING, 0)


# Workers that are gone


def lost(record: TaskRecord, attempts: int) -> TaskRecord:
    """Give a task as a worker that was killed left it."""
    return replace(record, status=TaskStatus.RUNNING, worker="dead", lease_until=record.created_at, attempts=attempts)


@pytest.mark.parametrize(
    ("retry", "attempts", "status"),
    [
        (Retry(1), 1, TaskStatus.FAILED),
        (Retry(2), 1, TaskStatus.SUCCESS),
        (Retry(2), 2, TaskStatus.FAILED),
        (Retry(5, on=KeyError), 4, TaskStatus.SUCCESS),
        (None, 1, TaskStatus.SUCCESS),
        (None, 2, TaskStatus.SUCCESS),
        (None, 3, TaskStatus.FAILED),
    ],
)
async def test_an_attempt_that_ended_with_its_worker_counts(
    retry: Retry | None, attempts: int, status: TaskStatus
) -> None:
    """After the last one, the task has failed, and says why; it is not begun once more."""
    store = MemoryStore()

    async def work() -> str:
        return "done"

    front, back = (TaskService(store=store, workers=workers) for workers in (0, 1))
    for service in front, back:
        service.task(work) if retry is None else service.task(retry=retry)(work)
    async with front:
        task_id = await front.submit("work")
        await store.change(task_id, lambda record: lost(record, attempts))
        async with back:
            with fail_after(2.0):
                record = await back.wait(task_id)
    assert record.status is status
    if status is TaskStatus.FAILED:
        assert record.attempts == attempts
        assert (record.error_type, record.error_message) == (
            "WorkerLostError",
            f"the worker was gone before attempt {attempts} ended",
        )


async def test_an_error_without_a_retry_is_final() -> None:
    """By default, an error ends the task; only a lost worker is made up for."""
    service = TaskService()

    @service.task
    async def broken() -> None:
        raise ValueError

    async with service:
        with pytest.raises(TaskFailedError) as caught:
            await service.result(await service.submit(broken))
        assert caught.value.record.attempts == 1


SUICIDAL = """
import os, sys, anyio, chanflow
from chanflow.tasks import TaskService
service = TaskService(store=sys.argv[1], workers=1, lease=0.5)

@service.task(retry=chanflow.Retry(2))
async def die() -> None:
    os._exit(9)

async def main():
    async with service:
        await anyio.sleep(60)

anyio.run(main)
"""


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "redis":
        with running_redis() as url:
            yield url
    else:
        yield f"sqlite:///{tmp_path}/tasks.db"


def test_a_task_that_kills_its_worker_ends(store: str) -> None:
    """It takes down so many workers as it has attempts, and then has failed; those after it live."""

    async def submit() -> str:
        service = TaskService(store=store, workers=0)

        @service.task
        async def die() -> None: ...

        async with service:
            return await service.submit(die)

    async def end(task_id: str) -> TaskRecord:
        service = TaskService(store=store, workers=1, lease=0.5)

        @service.task(retry=Retry(2))
        async def die() -> None:
            os._exit(9)

        async with service:
            with fail_after(30.0):
                return await service.wait(task_id)

    task_id = anyio.run(submit)
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", SUICIDAL, store], check=False, timeout=60).returncode == 9
    record = anyio.run(end, task_id)
    assert (record.status, record.error_type, record.attempts) == (TaskStatus.FAILED, "WorkerLostError", 2)


async def test_what_is_left_of_a_worker_is_taken_over_within_its_lease() -> None:
    """A worker that is gone holds up what it ran until its lease has run out, and no longer."""
    store = MemoryStore()

    async def work() -> str:
        return "done"

    front, back = (TaskService(store=store, workers=workers) for workers in (0, 1))
    for service in front, back:
        service.task(work)
    async with front, back:
        await wait_all_tasks_blocked()
        now = store.now()
        task_id = await front.submit("work", delay=1000.0)
        await store.change(task_id, lambda record: replace(lost(record, 1), run_at=now, lease_until=now + 30.0))
        with fail_after(31.0):
            assert await front.result(task_id) == "done"
