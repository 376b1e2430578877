"""Worker groups: the bound on handlers, the order of jobs, submitting, and arguments."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, WouldBlock, wait_all_tasks_blocked

from chanflow import WorkerGroup, WorkerStatistics, set_checkpoint_interval
from tests.support.messages import whole
from tests.support.worker_groups import SHUTTING_DOWN, Handler, assert_nothing_left, echo

pytestmark = pytest.mark.anyio


# The bound and the order


@pytest.mark.parametrize("workers", [1, 2, 5])
@pytest.mark.parametrize("buffer", [0, 1, 10, math.inf])
async def test_never_more_handlers_than_workers_and_never_fewer_than_needed(workers: int, buffer: float) -> None:
    """However many jobs wait, and after the group was idle as well."""
    handler = Handler()
    async with WorkerGroup(handler, workers=workers, buffer=buffer) as group:
        for _ in range(2):
            start = anyio.current_time()
            results = [await group.submit(number) for number in range(10)]
            assert [await result for result in results] == list(range(10))
            assert anyio.current_time() - start == pytest.approx(10 / workers)
    assert handler.most == workers
    assert group.statistics() == WorkerStatistics(workers, 0, 0, 0, 0, 20, 0, 0, 0)
    assert_nothing_left(group)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("buffer", [0, 1, 10, math.inf])
async def test_jobs_start_in_the_order_of_submission(workers: int, buffer: float, backend: str) -> None:
    """But those that start in the same tick on trio do so in any order, as its tasks do."""
    for _ in range(5):
        handler = Handler()
        async with WorkerGroup(handler, workers=workers, buffer=buffer) as group:
            for number in range(12):
                await group.submit(number)
        if backend == "asyncio" or workers == 1:
            assert handler.started == list(range(12))
        assert handler.in_order() == list(range(12))
        assert_nothing_left(group)


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("buffer", [0, 1, 10])
async def test_submit_nowait_is_refused_exactly_when_all_is_full(workers: int, buffer: int) -> None:
    """`workers + buffer` jobs and no more, from a cold start as after being idle."""
    handler = Handler(held=True)
    async with WorkerGroup(handler, workers=workers, buffer=buffer) as group:
        results = [group.submit_nowait(number) for number in range(workers + buffer)]
        for _ in range(2):
            with pytest.raises(WouldBlock):
                group.submit_nowait(-1)
            await wait_all_tasks_blocked()
        assert group.statistics()[:5] == (workers, workers, buffer, 0, 0)
        handler.release(0)
        assert await results[0] == 0
        await wait_all_tasks_blocked()
        group.submit_nowait(100)
        with pytest.raises(WouldBlock):
            group.submit_nowait(-1)
        handler.release_all()
    assert -1 not in handler.started
    assert len(handler.finished) == workers + buffer + 1
    assert_nothing_left(group)


@pytest.mark.parametrize("workers", [2, 3, 5])
@pytest.mark.parametrize("buffer", [0, 1, 10])
async def test_regression_a_burst_after_a_rest_is_not_refused(workers: int, buffer: int) -> None:
    """One idle worker, which was handed a job and hasn't run yet, doesn't hide that more may be started."""
    handler = Handler(held=True)
    async with WorkerGroup(handler, workers=workers, buffer=buffer) as group:
        handler.release(-1)
        await group.submit_nowait(-1)
        await wait_all_tasks_blocked()
        for number in range(workers + buffer):
            group.submit_nowait(number)
        with pytest.raises(WouldBlock):
            group.submit_nowait(-2)
        await wait_all_tasks_blocked()
        assert group.statistics()[:5] == (workers, workers, buffer, 0, 0)
        handler.release_all()
    assert_nothing_left(group)


async def test_an_unbounded_buffer_takes_everything() -> None:
    """`math.inf` never refuses."""
    async with WorkerGroup(echo, workers=1, buffer=math.inf) as group:
        results = [group.submit_nowait(number) for number in range(1000)]
    assert [await result for result in results] == list(range(1000))
    assert_nothing_left(group)


async def test_submit_waits_for_room() -> None:
    """Each waiting submitter goes on when a place comes free, in the order in which they came."""
    handler = Handler(held=True)
    accepted: list[Any] = []

    async def submit(number: int) -> None:
        await group.submit(number)
        accepted.append(number)

    async with anyio.create_task_group() as tasks, WorkerGroup(handler, workers=1, buffer=1) as group:
        for number in range(4):
            tasks.start_soon(submit, number)
            await wait_all_tasks_blocked()
        assert accepted == [0, 1]
        assert group.statistics()[:5] == (1, 1, 1, 0, 2)
        assert repr(group) == "<WorkerGroup of Handler: 1 of 1 running, 1 queued>"
        handler.release(0)
        await wait_all_tasks_blocked()
        assert accepted == [0, 1, 2]
        handler.release_all()
    assert accepted == handler.started == [0, 1, 2, 3]
    assert_nothing_left(group)


@pytest.mark.parametrize("buffer", [0, 1])
async def test_a_cancelled_submit_submitted_nothing(buffer: int) -> None:
    """Its job never starts."""
    handler = Handler(held=True)
    async with WorkerGroup(handler, workers=1, buffer=buffer) as group:
        for number in range(1 + buffer):
            group.submit_nowait(number)
        with anyio.move_on_after(5) as scope:
            await group.submit("cancelled")
        assert scope.cancelled_caught
        assert group.statistics().submitters_waiting == 0
        handler.release_all()
    assert handler.started == list(range(1 + buffer))
    assert_nothing_left(group)


async def test_leaving_waits_for_blocked_submitters_in_other_tasks() -> None:
    """What waits to be submitted when the block is left is done as well."""
    handler = Handler()
    async with anyio.create_task_group() as tasks:
        async with WorkerGroup(handler, workers=1, buffer=0) as group:
            for number in range(5):
                tasks.start_soon(group.submit, number)
            await wait_all_tasks_blocked()
            assert group.statistics().submitters_waiting == 4
        assert sorted(handler.finished) == list(range(5))
    assert group.statistics().succeeded == 5
    assert_nothing_left(group)


async def test_leaving_waits_for_what_handlers_submit() -> None:
    """Also when they submit while the block is being left, when others may not."""
    done = []
    refused: list[Any] = []

    async def tree(depth: int) -> None:
        await anyio.sleep(1)
        done.append(depth)
        if depth:
            group.submit_nowait(depth - 1)
            await group.submit(depth - 1)

    async def outsider() -> None:
        await anyio.sleep(0.5)
        try:
            await group.submit(0)
        except ClosedResourceError as error:
            refused.append(str(error))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(outsider)
        async with WorkerGroup(tree, workers=2, buffer=100) as group:
            group.submit_nowait(4)
    assert Counter(done) == {4: 1, 3: 2, 2: 4, 1: 8, 0: 16}
    assert refused == [SHUTTING_DOWN]
    assert_nothing_left(group)


async def test_a_handlers_child_task_may_submit_during_the_drain() -> None:
    """It belongs to the handler."""
    done = []

    async def handle(job: int) -> None:
        done.append(job)
        await anyio.sleep(1)
        if job:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(group.submit, job - 1)

    async with WorkerGroup(handle, workers=1, buffer=1) as group:
        group.submit_nowait(2)
    assert done == [2, 1, 0]
    assert_nothing_left(group)


async def test_submitting_is_a_checkpoint_every_so_often() -> None:
    """A task that only submits doesn't starve the others; and what closes meanwhile is noticed."""
    set_checkpoint_interval(1)
    try:
        async with WorkerGroup(echo, workers=1, buffer=math.inf) as group:
            done = await group.submit(1)
            await group.submit(2)
            await group.submit(3)
            assert done.done
    finally:
        set_checkpoint_interval()
    assert_nothing_left(group)


async def test_one_failure_does_not_harm_the_others() -> None:
    """It fails its result, and the worker takes the next job."""

    async def handle(job: int) -> int:
        if job % 2:
            raise ValueError(job)
        return job

    async with WorkerGroup(handle, workers=1) as group:
        results = [group.submit_nowait(number) for number in range(6)]
        for number, result in enumerate(results):
            if number % 2:
                with pytest.raises(ValueError, match=whole(str(number))):
                    await result
            else:
                assert await result == number
    assert group.statistics()[5:] == (3, 3, 0, 0)
    assert_nothing_left(group)


async def test_a_handler_that_raises_before_it_awaits() -> None:
    """A wrong number of arguments, say."""

    async def handle() -> None: ...

    handler: Callable[..., Any] = handle
    async with WorkerGroup(handler) as group:
        with pytest.raises(TypeError, match=r"takes 0 positional arguments but 1 was given$"):
            await group.submit_nowait(1)
    assert_nothing_left(group)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"handler": 7}, TypeError("handler must be callable, got 7")),
        ({"workers": 0}, ValueError("workers must be >= 1, got 0")),
        ({"workers": True}, TypeError("workers must be an int, got True")),
        ({"workers": math.inf}, TypeError("workers must be an int, got inf")),
        ({"buffer": -1}, ValueError("buffer must be >= 0, got -1")),
        ({"buffer": 1.5}, TypeError("buffer must be an int or math.inf, got 1.5")),
        ({"timeout": 0}, ValueError("timeout must be > 0, got 0")),
        ({"timeout": -1}, ValueError("timeout must be > 0, got -1")),
        ({"timeout": math.nan}, ValueError("timeout must be > 0, got nan")),
        ({"retry": 3}, TypeError("retry must be a Retry or None, got 3")),
        ({"dead_letters": []}, TypeError("dead_letters must be a Channel, SendChannel or None, got []")),
        ({"offload": "process"}, ValueError("offload must be 'thread' or None, got 'process'")),
        ({"offload": "thread"}, ValueError("offload must be None for an async handler, got 'thread'")),
    ],
    ids=str,
)
def test_arguments_are_checked(arguments: dict[str, Any], error: Exception) -> None:
    """Each error names the argument, the rule and the value."""
    with pytest.raises(type(error), match=whole(str(error))):
        WorkerGroup(**{"handler": echo, **arguments})
