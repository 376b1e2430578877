"""The context of a job: whose variables its handler sees, and who counts as its handler."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import ClosedResourceError, Event, wait_all_tasks_blocked

from chanflow import Retry, WorkerGroup
from tests.support.messages import whole
from tests.support.worker_groups import BAD_SHUTDOWN, DEADLOCK, assert_nothing_left

pytestmark = pytest.mark.anyio

request: ContextVar[str] = ContextVar("request", default="none")


async def look(_job: object) -> str:
    """Tell what is seen before and after waiting, and leave something behind."""
    before = request.get()
    request.set(f"{before}, by a job")
    await anyio.lowlevel.checkpoint()
    assert request.get() == f"{before}, by a job"
    return before


def look_in_thread(_job: object) -> str:
    before = request.get()
    request.set("by a job")
    return before


@pytest.mark.parametrize("handler", [look, look_in_thread])
@pytest.mark.parametrize("timeout", [None, math.inf])
async def test_a_job_sees_what_its_submitter_saw(handler: Callable[[object], Any], timeout: float | None) -> None:
    """Whoever started its worker, and whatever earlier jobs of that worker did."""
    seen: dict[str, list[str]] = {}

    async def submit(name: str) -> None:
        request.set(name)
        seen[name] = [await (await workers.submit(number)) for number in range(3)]

    async with WorkerGroup(handler, workers=1, buffer=1, timeout=timeout) as workers:
        async with anyio.create_task_group() as tasks:
            for name in "abc":
                tasks.start_soon(submit, name)
        assert await (await workers.submit(0)) == "none"
    assert seen == {name: [name] * 3 for name in "abc"}


@pytest.mark.parametrize("capacity", [0, 10])
async def test_each_attempt_sees_what_its_submitter_saw(capacity: int) -> None:
    """Not what the attempt before left behind."""
    seen = []

    async def handle(_job: int) -> None:
        seen.append(request.get())
        request.set("by an attempt")
        raise ValueError

    async with WorkerGroup(handle, workers=1, buffer=capacity, retry=Retry(3, delay=1)) as workers:
        request.set("submitter")
        result = workers.submit_nowait(1)
        request.set("later")
        with pytest.raises(ValueError, match=r"^$"):
            await result
    assert seen == ["submitter"] * 3


@pytest.mark.parametrize("ordered", [True, False])
async def test_jobs_of_a_map_see_what_its_caller_saw(*, ordered: bool) -> None:
    """When `map` was called, wherever it is iterated over."""
    async with WorkerGroup(look, workers=2) as workers:
        request.set("caller")
        results = workers.map(range(5), ordered=ordered)
        request.set("later")
        assert [seen async for seen in results] == ["caller"] * 5


async def test_an_idle_worker_keeps_nothing_of_its_last_job() -> None:
    """Neither do those that are started while a job runs."""

    class Payload:
        alive = 0

        def __init__(self) -> None:
            Payload.alive += 1

        def __del__(self) -> None:
            Payload.alive -= 1

    payload: ContextVar[Payload] = ContextVar("payload")

    async def submit() -> None:
        payload.set(Payload())
        await (await workers.submit(1))

    async def handle(_job: int) -> None:
        workers.resize(3)
        await anyio.lowlevel.checkpoint()

    async with WorkerGroup(handle, workers=1) as workers:
        for _ in range(3):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(submit)
            await wait_all_tasks_blocked()
        assert Payload.alive == 0


# Who counts as the handler


async def test_a_task_that_a_handler_started_may_shut_down() -> None:
    """It is not the handler, which is only left to end."""

    async def stop() -> None:
        left.extend(await workers.shutdown())

    async def handle(job: int) -> int:
        if job == 1:
            tasks.start_soon(stop)
        with pytest.raises(RuntimeError, match=whole(BAD_SHUTDOWN)):
            await workers.shutdown()
        return job

    left: list[int] = []
    async with anyio.create_task_group() as tasks, WorkerGroup(handle, workers=1) as workers:
        results = [workers.submit_nowait(job) for job in range(4)]
        assert [await result for result in results] == [0, 1, 2, 3]
        await wait_all_tasks_blocked()
        with pytest.raises(ClosedResourceError):
            workers.submit_nowait(5)
    assert left == []


async def test_tasks_of_a_running_handler_may_submit_while_the_group_drains() -> None:
    """But not those that outlived it."""
    outcomes: list[object] = []
    late = Event()

    async def submit(job: int, when: Event | None = None) -> None:
        if when is not None:
            await when.wait()
        try:
            outcomes.append(await (await workers.submit(job)))
        except ClosedResourceError as error:
            outcomes.append(str(error))

    async def handle(job: int) -> int:
        if job == 0:
            outer.start_soon(submit, 2, late)
            await gate.wait()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(submit, 1)
        if job == 1:
            late.set()
            await wait_all_tasks_blocked()
        return job

    gate = Event()
    async with anyio.create_task_group() as outer:
        async with WorkerGroup(handle, workers=2) as workers:
            workers.submit_nowait(0)
            await wait_all_tasks_blocked()
            outer.start_soon(release, gate)
        outer.start_soon(submit, 3)
    assert sorted(map(str, outcomes)) == ["1", "2", "the worker group is over"]


async def release(gate: Event) -> None:
    await wait_all_tasks_blocked()
    gate.set()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("through", ["thread", "to_thread"])
def test_regression_handlers_whose_threads_all_submit_to_their_full_group(backend: str, through: str) -> None:
    """Each waits for the others: on asyncio, too, one is refused, and then the others go on."""
    refused = []

    def in_thread(job: int) -> int:
        if job < 2:
            try:
                anyio.from_thread.run(workers[0].submit, job + 10)
            except RuntimeError as error:
                refused.append(str(error))
        return job

    async def asynchronous(job: int) -> int:
        return await anyio.to_thread.run_sync(in_thread, job)

    workers: list[WorkerGroup[int, Any]] = []

    async def main() -> None:
        handler: Callable[[int], Any] = in_thread if through == "thread" else asynchronous
        with anyio.fail_after(20):
            async with WorkerGroup(handler, workers=2, buffer=0) as group:
                workers.append(group)
                results = [await group.submit(job) for job in range(2)]
                assert [await result for result in results] == [0, 1]
        assert_nothing_left(group)

    anyio.run(main, backend=backend)
    assert set(refused) == {DEADLOCK}


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_thread_may_not_shut_its_own_group_down(backend: str) -> None:
    """Its handler would wait for itself."""

    def handle(_job: int) -> None:
        anyio.from_thread.run(workers[0].shutdown)

    workers: list[WorkerGroup[int, None]] = []

    async def main() -> None:
        with anyio.fail_after(20):
            async with WorkerGroup(handle) as group:
                workers.append(group)
                with pytest.raises(RuntimeError, match=whole(BAD_SHUTDOWN)):
                    await group.submit_nowait(1)

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_task_that_serves_a_thread_is_told_from_others(backend: str) -> None:
    """Only for it a thread is known to wait, and for that the task that called it."""
    from chanflow._loop._home import current_home  # noqa: PLC0415 -- next to what it is about

    async def ask(task_id: int) -> bool:
        home = current_home()
        assert home is not None
        return home.serves(task_id)

    async def main() -> None:
        own = anyio.get_current_task().id
        answers = [await ask(own)]

        async def child() -> None:
            answers.append(await ask(own))
            answers.append(await anyio.to_thread.run_sync(anyio.from_thread.run, ask, own))

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child)
        if backend == "asyncio":
            answers.append(await asyncio.create_task(ask(own)))
        assert not any(answers)
        # On trio, that is the task that waits for the thread.
        assert await anyio.to_thread.run_sync(anyio.from_thread.run, ask, own) == (backend == "asyncio")

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_thread_of_a_task_that_a_handler_started_may_wait_for_room(backend: str) -> None:
    """Nobody knows whether the handler waits for it, and here it does not."""
    results: list[int] = []

    async def submit() -> None:
        result: Any = await anyio.to_thread.run_sync(anyio.from_thread.run, workers[0].submit, 1)
        results.append(await result)

    async def handle(job: int) -> int:
        if job == 0:
            tasks[0].start_soon(submit)
            await anyio.sleep(0.05)
        return job

    workers: list[WorkerGroup[int, int]] = []
    tasks: list[Any] = []

    async def main() -> None:
        with anyio.fail_after(20):
            async with WorkerGroup(handle, workers=1, buffer=0) as group, anyio.create_task_group() as outer:
                workers.append(group)
                tasks.append(outer)
                assert await (await group.submit(0)) == 0

    anyio.run(main, backend=backend)
    assert results == [1]


async def test_an_asynchronous_source_of_a_map_runs_there_too() -> None:
    """It is a part of the map."""

    async def source() -> AsyncIterator[str]:
        yield request.get()

    async with WorkerGroup(look) as workers:
        request.set("caller")
        results = workers.map(source())
        request.set("later")
        assert [seen async for seen in results] == ["caller"]
