"""Worker groups: bounds, order, retries, dead letters, map, and the ways in which they end."""

# ruff: noqa: FBT001, PT012, SIM117 -- flags come from parametrize; a group raises when its block is left; nesting is shown
# ruff: noqa: PERF401 -- what was seen before an error is kept

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import math
import tracemalloc
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing
from itertools import pairwise
from random import Random
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, Event, WouldBlock, wait_all_tasks_blocked

from chanflow import (
    Channel,
    DeadLetter,
    Result,
    ResultCancelledError,
    Retry,
    WorkerGroup,
    WorkerStatistics,
    set_checkpoint_interval,
)
from tests.support.channels import assert_at_rest
from tests.support.messages import whole
from tests.support.virtual_time import VirtualTimeLoop
from tests.support.worker_groups import (
    BAD_SHUTDOWN,
    DEADLOCK,
    ELSEWHERE,
    OUTSIDE,
    SHUTTING_DOWN,
    Handler,
    assert_nothing_left,
    echo,
    fail,
    sleepy,
)

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


# Resizing


async def test_growing_starts_what_waits() -> None:
    """At once."""
    handler = Handler(held=True)
    async with WorkerGroup(handler, workers=1, buffer=10) as group:
        for number in range(6):
            group.submit_nowait(number)
        await wait_all_tasks_blocked()
        assert handler.running == 1
        group.resize(4)
        await wait_all_tasks_blocked()
        assert handler.running == 4
        assert group.statistics()[:3] == (4, 4, 2)
        handler.release_all()
    assert handler.in_order() == list(range(6))
    assert_nothing_left(group)


async def test_regression_growing_takes_jobs_of_waiting_submitters() -> None:
    """Without a buffer too, and nobody overtakes them."""
    handler = Handler(held=True)
    async with anyio.create_task_group() as tasks, WorkerGroup(handler, workers=1, buffer=0) as group:
        group.submit_nowait(0)
        for number in 1, 2:
            tasks.start_soon(group.submit, number)
            await wait_all_tasks_blocked()
        group.resize(2)
        with pytest.raises(WouldBlock):
            group.submit_nowait(3)
        await wait_all_tasks_blocked()
        assert handler.started == [0, 1]
        handler.release_all()
    assert handler.started == [0, 1, 2]
    assert_nothing_left(group)


async def test_shrinking_interrupts_nothing() -> None:
    """Those that run finish, and no other starts until few enough do."""
    handler = Handler(held=True)
    async with WorkerGroup(handler, workers=4, buffer=10) as group:
        for number in range(8):
            group.submit_nowait(number)
        await wait_all_tasks_blocked()
        group.resize(2)
        assert group.statistics()[:3] == (2, 4, 4)
        for released, started in (0, 4), (1, 4), (2, 5), (3, 6):
            handler.release(released)
            await wait_all_tasks_blocked()
            assert len(handler.started) == started
        assert handler.running == 2
        handler.release_all()
    assert handler.in_order() == list(range(8))
    assert_nothing_left(group)


async def test_shrinking_sends_idle_workers_away() -> None:
    """At once, and growing brings new ones when there are jobs."""
    handler = Handler()
    async with WorkerGroup(handler, workers=4) as group:
        async for _ in group.map(range(8)):
            pass
        await wait_all_tasks_blocked()
        assert len(group._workers) == 4
        group.resize(2)
        group.resize(2)
        await wait_all_tasks_blocked()
        assert len(group._workers) == 2
        # In one tick: who was sent away stays.
        group.resize(1)
        group.resize(3)
        await wait_all_tasks_blocked()
        handler.most = 0
        async for _ in group.map(range(9)):
            pass
    assert handler.most == 3
    assert_nothing_left(group)


async def test_a_worker_that_was_woken_waits_for_its_turn_after_shrinking() -> None:
    """It had been given a job in the tick in which the group was made smaller; it doesn't start too early."""
    handler = Handler(held=True)
    async with WorkerGroup(handler, workers=3, buffer=3) as group:
        handler.release(-1, -2, -3)
        for number in -1, -2, -3:
            group.submit_nowait(number)
        await wait_all_tasks_blocked()
        results = [group.submit_nowait(number) for number in range(3)]
        group.resize(1)
        await wait_all_tasks_blocked()
        assert handler.running == group.statistics().running == 1
        # One of those that wait is cancelled, and the other comes next.
        [first] = handler.started[3:]
        cancelled, last = {0, 1, 2} - {first}
        results[cancelled].cancel()
        await wait_all_tasks_blocked()
        assert handler.started[3:] == [first]
        handler.release(first)
        await wait_all_tasks_blocked()
        assert handler.started[3:] == [first, last]
        handler.release_all()
    assert isinstance(results[cancelled].exception(), ResultCancelledError)
    assert_nothing_left(group)


async def test_regression_shrinking_loses_no_job_whose_worker_has_not_run_yet() -> None:
    """Jobs were accepted, each with a worker of its own, in the tick in which the group was made smaller."""
    handler = Handler()
    async with WorkerGroup(handler, workers=3, buffer=0) as group:
        results = [group.submit_nowait(number) for number in range(3)]
        group.resize(1)
        assert [await result for result in results] == [0, 1, 2]
    assert handler.most == 1
    assert group.leftover == ()
    assert_nothing_left(group)


async def test_growing_again_gives_turns() -> None:
    """Workers that wait with a job in hand start when the group grows."""
    handler = Handler(held=True)
    async with WorkerGroup(handler, workers=3, buffer=3) as group:
        handler.release(-1, -2, -3)
        for number in -1, -2, -3:
            group.submit_nowait(number)
        await wait_all_tasks_blocked()
        for number in range(3):
            group.submit_nowait(number)
        group.resize(1)
        await wait_all_tasks_blocked()
        assert handler.running == 1
        group.resize(2)
        await wait_all_tasks_blocked()
        assert handler.running == 2
        handler.release_all()
    assert sorted(handler.started[3:]) == [0, 1, 2]
    assert_nothing_left(group)


async def test_a_turn_given_to_a_worker_that_is_cancelled_goes_to_the_next() -> None:
    """The job is cancelled in the very tick in which its worker's turn came."""
    handler = Handler(held=True)
    async with WorkerGroup(handler, workers=3, buffer=3) as group:
        handler.release(-1, -2, -3)
        for number in -1, -2, -3:
            group.submit_nowait(number)
        await wait_all_tasks_blocked()
        results = [group.submit_nowait(number) for number in range(3)]
        group.resize(1)
        await wait_all_tasks_blocked()
        group.resize(2)
        results[1].cancel()
        await wait_all_tasks_blocked()
        assert handler.running == 2
        handler.release_all()
    assert sorted(handler.finished[3:]) in ([0, 1, 2], [0, 2])
    assert_nothing_left(group)


async def test_resizing_before_and_after_the_block() -> None:
    """It only sets the number."""
    group = WorkerGroup(sleepy, workers=1)
    group.resize(3)
    start = anyio.current_time()
    async with group:
        for number in range(3):
            group.submit_nowait(number)
    assert anyio.current_time() - start == pytest.approx(1)
    group.resize(4)
    assert group.statistics().workers == 4
    assert_nothing_left(group)


@pytest.mark.parametrize(
    ("workers", "error"),
    [
        (0, ValueError("workers must be >= 1, got 0")),
        (True, TypeError("workers must be an int, got True")),
        (1.5, TypeError("workers must be an int, got 1.5")),
    ],
)
async def test_resizing_checks_its_argument(workers: Any, error: Exception) -> None:
    """And changes nothing if it is wrong."""
    group = WorkerGroup(echo, workers=2)
    with pytest.raises(type(error), match=whole(str(error))):
        group.resize(workers)
    assert group.statistics().workers == 2


async def test_regression_a_deadlock_that_shrinking_causes_is_seen() -> None:
    """The only worker left waits to submit to its own full group: it is told so, or the job finds a worker."""
    outcomes: list[Any] = []
    gate = Event()

    async def handle(job: str) -> None:
        if job == "nested":
            try:
                await group.submit("inner")
            except RuntimeError as error:
                outcomes.append(str(error))
        elif job == "other":
            await gate.wait()

    with anyio.fail_after(1000):
        async with WorkerGroup(handle, workers=2, buffer=0) as group:
            group.submit_nowait("other")
            group.submit_nowait("nested")
            await wait_all_tasks_blocked()
            group.resize(1)
            gate.set()
    assert outcomes in ([], [DEADLOCK])
    assert_nothing_left(group)


# Cancelling jobs


async def test_cancelling_a_running_job() -> None:
    """Its handler is cancelled, the result is done when it has stopped, and its worker goes on."""
    stopped = False

    async def handle(job: int) -> int:
        nonlocal stopped
        if job:
            return job
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)
            stopped = True
        return job

    async with WorkerGroup(handle, workers=1) as group:
        running, behind = group.submit_nowait(0), group.submit_nowait(1)
        await wait_all_tasks_blocked()
        running.cancel()
        running.cancel()
        assert not running.done
        with pytest.raises(ResultCancelledError, match=whole("the task was cancelled")):
            await running
        assert stopped
        assert await behind == 1
    assert group.statistics()[5:] == (1, 0, 1, 0)
    assert group.leftover == ()
    assert_nothing_left(group)


async def test_cancelling_before_the_worker_has_run() -> None:
    """Its handler isn't called."""
    handler = Handler()
    async with WorkerGroup(handler, workers=1) as group:
        result = group.submit_nowait(1)
        result.cancel()
        with pytest.raises(ResultCancelledError):
            await result
        assert await group.submit_nowait(2) == 2
    assert handler.started == [2]
    assert result.attempts == 0
    assert_nothing_left(group)


async def test_cancelling_a_queued_job() -> None:
    """It is done at once, and passed over."""
    handler = Handler()
    async with WorkerGroup(handler, workers=1) as group:
        results = [group.submit_nowait(number) for number in range(3)]
        results[1].cancel()
        assert results[1].done
        results[1].cancel()
    assert handler.started == [0, 2]
    assert group.statistics()[5:] == (2, 0, 1, 0)
    assert_nothing_left(group)


async def test_cancelling_a_delayed_job() -> None:
    """It is done at once, isn't attempted again, and leaving doesn't wait for its time."""
    start = anyio.current_time()
    async with WorkerGroup(fail, retry=Retry(5, delay=50, jitter=0)) as group:
        result = group.submit_nowait(ValueError())
        await wait_all_tasks_blocked()
        assert group.statistics().delayed == 1
        result.cancel()
        assert result.done
    assert anyio.current_time() - start < 1
    assert result.attempts == 1
    assert group.statistics()[5:] == (0, 0, 1, 1)
    assert_nothing_left(group)


async def test_cancelling_a_job_that_holds_its_worker_between_attempts() -> None:
    """The worker goes on to the next job."""

    async def handle(job: int) -> int:
        if job:
            return job
        raise ValueError

    async with WorkerGroup(handle, workers=1, buffer=0, retry=Retry(5, delay=50, jitter=0)) as group:
        result = group.submit_nowait(0)
        await wait_all_tasks_blocked()
        assert group.statistics()[:5] == (1, 1, 0, 0, 0)
        result.cancel()
        with pytest.raises(ResultCancelledError):
            await result
        assert await (await group.submit(1)) == 1
    assert group.statistics()[5:] == (1, 0, 1, 1)
    assert_nothing_left(group)


async def test_cancelling_a_delayed_job_that_waits_for_room() -> None:
    """Its delay is over, but the queue is full."""
    handler = Handler(held=True)
    first = True

    async def handle(job: Any) -> None:
        nonlocal first
        if job == "flaky" and first:
            first = False
            raise ValueError
        await handler(job)

    async with WorkerGroup(handle, workers=1, buffer=1, retry=Retry(2, delay=1, jitter=0)) as group:
        result = group.submit_nowait("flaky")
        await wait_all_tasks_blocked()
        group.submit_nowait(1)
        await wait_all_tasks_blocked()
        group.submit_nowait(2)
        await anyio.sleep(5)
        figures = group.statistics()
        assert (figures.queued, figures.delayed, figures.submitters_waiting) == (1, 1, 1)
        result.cancel()
        assert result.done
        await wait_all_tasks_blocked()
        assert group.statistics()[3:5] == (0, 0)
        handler.release_all()
    assert handler.started == [1, 2]
    assert_nothing_left(group)


async def test_a_handler_that_returns_in_spite_of_being_cancelled_succeeds() -> None:
    """As if the cancellation had come too late."""

    async def handle(job: int) -> int:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(1)
        return job

    async with WorkerGroup(handle, workers=1) as group:
        result, behind = group.submit_nowait(1), group.submit_nowait(2)
        await wait_all_tasks_blocked()
        result.cancel()
        assert await result == 1
        assert await behind == 2
    assert group.statistics()[5:] == (2, 0, 0, 0)
    assert_nothing_left(group)


@pytest.mark.parametrize("buffer", [0, 10])
async def test_regression_a_cancelled_job_is_not_attempted_again(buffer: int) -> None:
    """A handler that turns its cancellation into an error has been cancelled all the same."""

    async def handle(_job: int) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            msg = "interrupted"
            raise ValueError(msg)

    async with WorkerGroup(handle, buffer=buffer, retry=Retry(3, delay=1)) as group:
        result = group.submit_nowait(1)
        await wait_all_tasks_blocked()
        result.cancel()
        await anyio.sleep(1000)
        assert result.done
        assert result.attempts == 1
        assert result.exception() is not None
        result.cancel()
    assert group.statistics().retries == 0
    assert_nothing_left(group)


async def test_a_handler_may_cancel_its_own_job() -> None:
    """It is cancelled at its next wait."""
    results: list[Result[None]] = []

    async def handle(_job: int) -> None:
        results[0].cancel()
        await anyio.sleep(1)

    async with WorkerGroup(handle) as group:
        results.append(group.submit_nowait(1))
        with pytest.raises(ResultCancelledError):
            await results[0]
    assert_nothing_left(group)


# Timeouts


async def test_a_timeout_fails_the_attempt() -> None:
    """With TimeoutError, at its time; the worker goes on."""
    start = anyio.current_time()
    async with WorkerGroup(anyio.sleep, workers=1, timeout=5) as group:
        slow, quick = group.submit_nowait(6), group.submit_nowait(4)
        with pytest.raises(TimeoutError, match=whole("the handler took longer than 5 s")):
            await slow
        assert anyio.current_time() - start == pytest.approx(5)
        assert await quick is None
    assert group.statistics()[5:] == (1, 1, 0, 0)
    assert_nothing_left(group)


async def test_each_attempt_has_its_own_timeout() -> None:
    """And is worth a retry like any error."""
    attempts = 0

    async def handle(_job: int) -> str:
        nonlocal attempts
        attempts += 1
        await anyio.sleep(10 if attempts < 3 else 4)
        return "done"

    start = anyio.current_time()
    retry = Retry(3, delay=1, factor=1, jitter=0, on=TimeoutError)
    async with WorkerGroup(handle, timeout=5, retry=retry) as group:
        result = group.submit_nowait(1)
        assert await result == "done"
    assert anyio.current_time() - start == pytest.approx(5 + 1 + 5 + 1 + 4)
    assert_nothing_left(group)


async def test_a_handlers_own_timeout_error_is_passed_on() -> None:
    """The very error."""
    error = TimeoutError("own")
    async with WorkerGroup(fail, timeout=5) as group:
        with pytest.raises(TimeoutError, match=whole("own")) as caught:
            await group.submit_nowait(error)
    assert caught.value is error


async def test_cancelling_a_job_with_a_timeout() -> None:
    """It is cancelled, not timed out."""
    async with WorkerGroup(anyio.sleep, timeout=5) as group:
        result = group.submit_nowait(1000)
        await wait_all_tasks_blocked()
        result.cancel()
        with pytest.raises(ResultCancelledError):
            await result
    assert_nothing_left(group)


# Retries


async def test_attempts_come_at_the_exact_times() -> None:
    """With no jitter, under virtual time."""
    times = []

    async def handle(_job: int) -> None:
        times.append(anyio.current_time() - start)
        raise ValueError

    retry = Retry(5, delay=1, factor=3, max_delay=10, jitter=0)
    start = anyio.current_time()
    async with WorkerGroup(handle, retry=retry) as group:
        result = group.submit_nowait(1)
        with pytest.raises(ValueError, match=r"^$"):
            await result
    assert times == pytest.approx([0, 1, 4, 13, 23])
    assert result.attempts == 5
    assert group.statistics()[5:] == (0, 1, 0, 4)
    assert_nothing_left(group)


async def test_jitter_stays_within_its_share() -> None:
    """No attempt comes later than without it, nor earlier than the share allows."""
    times: dict[int, list[float]] = {number: [] for number in range(50)}

    async def handle(job: int) -> None:
        times[job].append(anyio.current_time())
        raise ValueError

    retry = Retry(3, delay=10, factor=1, jitter=0.5)
    async with WorkerGroup(handle, workers=50, retry=retry) as group:
        for result in [group.submit_nowait(number) for number in times]:
            with pytest.raises(ValueError, match=r"^$"):
                await result
    waits = [later - earlier for seen in times.values() for earlier, later in pairwise(seen)]
    assert len(waits) == 100
    assert 5 <= min(waits) < max(waits) <= 10 + 1e-6
    assert_nothing_left(group)


async def test_a_job_succeeds_after_failures() -> None:
    """Its result gives the value, and tells of the attempts."""
    failures = 2

    async def handle(job: int) -> int:
        nonlocal failures
        if failures:
            failures -= 1
            raise ValueError
        return job

    async with WorkerGroup(handle, retry=Retry(5)) as group:
        result = group.submit_nowait(7)
        assert await result == 7
        assert result.attempts == 3
    assert group.statistics()[5:] == (1, 0, 0, 2)
    assert_nothing_left(group)


@pytest.mark.parametrize(
    ("on", "attempts"),
    [
        (ValueError, 3),
        (KeyError, 1),
        ((KeyError, ValueError), 3),
        (lambda error: "again" in str(error), 3),
        (lambda error: "never" in str(error), 1),
    ],
)
async def test_only_what_is_worth_it_is_attempted_again(on: Any, attempts: int) -> None:
    """`on` as a class, a tuple of them, and a function."""
    error = ValueError("again")
    async with WorkerGroup(fail, retry=Retry(3, on=on)) as group:
        result = group.submit_nowait(error)
        with pytest.raises(ValueError, match=whole("again")):
            await result
        assert result.attempts == attempts
    assert group.statistics().retries == attempts - 1
    assert_nothing_left(group)


async def test_a_predicate_that_raises_fails_the_job() -> None:
    """With its own error, in the context of the first."""
    error = ValueError("first")
    second = KeyError("predicate")

    def predicate(_error: Exception) -> bool:
        raise second

    letters = Channel[DeadLetter[Any]](1)
    async with WorkerGroup(fail, workers=1, retry=Retry(3, on=predicate), dead_letters=letters) as group:
        result = group.submit_nowait(error)
        with pytest.raises(KeyError) as caught:
            await result
        assert caught.value is second
        assert caught.value.__context__ is error
        assert letters.receive_nowait() == (error, second, 1)
    assert_nothing_left(group)


async def test_a_delayed_job_frees_its_worker() -> None:
    """The others go on while it waits for its next attempt."""
    done: list[Any] = []

    async def handle(job: int) -> None:
        if not job and len(done) < 3:
            raise ValueError
        done.append(job)

    async with WorkerGroup(handle, workers=1, buffer=10, retry=Retry(2, delay=5, jitter=0)) as group:
        for number in range(4):
            group.submit_nowait(number)
        await wait_all_tasks_blocked()
        assert done == [1, 2, 3]
        assert group.statistics()[:5] == (1, 0, 0, 1, 0)
    assert done == [1, 2, 3, 0]
    assert_nothing_left(group)


@pytest.mark.parametrize("buffer", [0, 1, 2])
async def test_more_delayed_jobs_than_the_buffer_hold_their_workers(buffer: int) -> None:
    """So that failures can't pile up beyond the bound."""
    attempts: Counter[int] = Counter()

    async def handle(job: int) -> int:
        attempts[job] += 1
        if attempts[job] == 1:
            raise ValueError
        return job

    async with WorkerGroup(handle, workers=3, buffer=buffer, retry=Retry(2, delay=5, jitter=0)) as group:
        results = []
        for number in range(3):
            results.append(group.submit_nowait(number))
            await wait_all_tasks_blocked()
        figures = group.statistics()
        assert figures.delayed == buffer
        assert figures.running == 3 - buffer
        assert [await result for result in results] == [0, 1, 2]
    assert group.statistics()[5:] == (3, 0, 0, 3)
    assert_nothing_left(group)


async def test_leaving_waits_for_delayed_jobs() -> None:
    """They are jobs that were submitted."""
    attempts = 0

    async def handle(_job: int) -> None:
        nonlocal attempts
        attempts += 1
        if attempts < 4:
            raise ValueError

    async with WorkerGroup(handle, retry=Retry(4, delay=100, jitter=0)) as group:
        result = group.submit_nowait(1)
    assert result.exception() is None
    assert attempts == 4
    assert_nothing_left(group)


async def test_regression_a_job_fails_again_before_its_delay_task_has_run() -> None:
    """The old delay leaves the new one alone.

    The delayed job waits for room; the worker takes the job before it, which makes room and wakes the delay; and in
    the same tick the worker gets through both, so that the delayed job fails again before its first delay is over.
    """
    gate = Event()
    started = []

    async def handle(job: str) -> None:
        started.append(job)
        if job == "busy":
            await gate.wait()
        elif job == "flaky":
            raise ValueError

    for _ in range(5):
        gate = Event()
        started.clear()
        with anyio.fail_after(1000):
            async with WorkerGroup(handle, workers=1, buffer=1, retry=Retry(4, delay=1, factor=1, jitter=0)) as group:
                result = group.submit_nowait("flaky")
                await wait_all_tasks_blocked()
                group.submit_nowait("busy")
                await wait_all_tasks_blocked()
                group.submit_nowait("quick")
                await anyio.sleep(2)
                assert group.statistics()[2:5] == (1, 1, 1)
                gate.set()
                await wait_all_tasks_blocked()
                assert started == ["flaky", "busy", "quick", "flaky"]
                assert group.statistics().delayed == 1
                with pytest.raises(ValueError, match=r"^$"):
                    await result
        assert result.attempts == 4
        assert_nothing_left(group)


# Dead letters


async def test_what_failed_for_good_goes_to_the_dead_letters() -> None:
    """With the error and the number of attempts; and only that."""
    letters = Channel[DeadLetter[Any]](10)
    error = ValueError("bad")

    async def handle(job: Any) -> Any:
        if isinstance(job, Exception):
            raise job
        return job

    async with WorkerGroup(handle, retry=Retry(3, delay=0), dead_letters=letters) as group:
        failing, good = group.submit_nowait(error), group.submit_nowait(1)
        with pytest.raises(ValueError, match=whole("bad")):
            await failing
        assert await good == 1
    letter = letters.receive_nowait()
    assert letter == DeadLetter(error, error, 3)
    assert (letter.job, letter.error, letter.attempts) == (error, error, 3)
    with pytest.raises(WouldBlock):
        letters.receive_nowait()
    assert_nothing_left(group)
    assert_at_rest(letters)


async def test_dead_letters_press_back() -> None:
    """A worker waits until its letter is taken; through a sending end as well."""
    letters = Channel[DeadLetter[Any]](0)
    async with WorkerGroup(fail, workers=1, dead_letters=letters.sender) as group, letters.sender:
        results = [group.submit_nowait(ValueError(number)) for number in range(2)]
        await wait_all_tasks_blocked()
        assert group.statistics()[:3] == (1, 1, 1)
        for number in range(2):
            assert str((await letters.receive()).error) == str(number)
        for result in results:
            await wait_all_tasks_blocked()
            assert isinstance(result.exception(), ValueError)
    letters.close()
    assert_nothing_left(group)


@pytest.mark.parametrize("closing", ["sender", "receiver", "before"])
async def test_letters_that_can_not_be_sent_are_logged(closing: str, caplog: pytest.LogCaptureFixture) -> None:
    """The job fails as it would have, and the group goes on."""
    letters = Channel[DeadLetter[Any]](0)
    if closing == "before":
        letters.close()
    error = ValueError("bad")
    async with WorkerGroup(fail, workers=1, dead_letters=letters) as group:
        result = group.submit_nowait(error)
        await wait_all_tasks_blocked()
        if closing == "sender":
            letters.close()
        elif closing == "receiver":
            letters.receiver.close()
        with pytest.raises(ValueError, match=whole("bad")):
            await result
    why = f"channel at {id(letters._state):#x} {'has no receiver left' if closing == 'receiver' else 'is closed'}"
    [record] = [record for record in caplog.records if record.name == "chanflow"]
    assert record.getMessage() == f"job {error!r} could not be sent to the dead letters: {why}"
    assert record.levelno == logging.WARNING
    assert group.statistics().failed == 1
    assert_nothing_left(group)


async def test_stopping_while_a_letter_waits_leaves_the_job_over() -> None:
    """It is not lost unseen."""
    letters = Channel[DeadLetter[Any]](0)
    job = ValueError("bad")
    async with WorkerGroup(fail, dead_letters=letters) as group:
        result = group.submit_nowait(job)
        assert await group.shutdown(5) == [job]
        with pytest.raises(ResultCancelledError):
            await result
    assert_nothing_left(group)
    assert_at_rest(letters)


# Ending


async def test_nothing_to_do() -> None:
    """Entering and leaving starts no worker."""
    async with WorkerGroup(echo) as group:
        assert group.statistics() == WorkerStatistics(10, 0, 0, 0, 0, 0, 0, 0, 0)
        assert not group._workers
    assert group.leftover == ()
    assert_nothing_left(group)


async def test_using_it_outside_of_its_block() -> None:
    """Neither before nor after; who comes just too late is told as those are who come while it ends."""
    group = WorkerGroup(echo)
    for error, message in (RuntimeError, OUTSIDE), (ClosedResourceError, "the worker group is over"):
        with pytest.raises(error, match=whole(message)):
            group.submit_nowait(1)
        with pytest.raises(error, match=whole(message)):
            await group.submit(1)
        with pytest.raises(error, match=whole(message)):
            group.map([1])
        with pytest.raises(RuntimeError, match=whole(BAD_SHUTDOWN)):
            await group.shutdown()
        if group._tasks is None:
            async with group:
                pass


async def test_entering_twice() -> None:
    """Neither again while it is open, nor afterwards."""
    group = WorkerGroup(echo)
    async with group:
        with pytest.raises(RuntimeError, match=whole("a WorkerGroup may only be entered once")):
            await group.__aenter__()
    with pytest.raises(RuntimeError, match=whole("a WorkerGroup may only be entered once")):
        await group.__aenter__()


async def test_using_it_from_another_loop_or_thread() -> None:
    """It belongs to the loop that it was entered in."""

    async def elsewhere() -> None:
        with pytest.raises(RuntimeError, match=whole(ELSEWHERE)):
            await group.submit(1)
        with pytest.raises(RuntimeError, match=whole(ELSEWHERE)):
            group.submit_nowait(1)

    def other_loops() -> None:
        for backend in "asyncio", "trio":
            anyio.run(elsewhere, backend=backend)
        with pytest.raises(RuntimeError, match=whole(ELSEWHERE)):
            group.submit_nowait(1)

    async with WorkerGroup(echo) as group:
        await anyio.to_thread.run_sync(other_loops)
    assert_nothing_left(group)


@pytest.mark.parametrize("shield", [False, True])
async def test_an_error_in_the_block_stops(shield: bool, caplog: pytest.LogCaptureFixture) -> None:
    """It is raised as it is; what isn't finished is left over, and the log says so."""
    handler = Handler()
    error = ValueError("block")
    with pytest.raises(ValueError, match=whole("block")) as caught:
        async with WorkerGroup(handler, workers=1, buffer=2) as group:
            results = [group.submit_nowait(number) for number in range(3)]
            if shield:
                await anyio.sleep(1.5)
            raise error
    assert caught.value is error
    assert group.leftover == ((1, 2) if shield else (0, 1, 2))
    for number, result in enumerate(results):
        if number in group.leftover:
            assert isinstance(result.exception(), ResultCancelledError)
        else:
            assert await result == number
    assert [record.getMessage() for record in caplog.records] == [
        f"{group!r} was stopped with {len(group.leftover)} job(s) left over"
    ]
    assert group.statistics().cancelled == 0
    assert_nothing_left(group)


async def test_an_outer_cancellation_stops() -> None:
    """Running, queued and delayed jobs are left over; those who wait to submit are refused or cancelled."""
    outcomes: list[Any] = []

    async def submit(number: int) -> None:
        try:
            await group.submit(number)
        except ClosedResourceError:
            outcomes.append("refused")

    async def handle(job: int) -> None:
        if not job:
            raise ValueError
        await anyio.sleep_forever()

    async with anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with WorkerGroup(handle, workers=1, buffer=1, retry=Retry(2, delay=100)) as group:
                group.submit_nowait(0)
                await wait_all_tasks_blocked()
                group.submit_nowait(1)
                await wait_all_tasks_blocked()
                group.submit_nowait(2)
                tasks.start_soon(submit, 3)
                await wait_all_tasks_blocked()
                assert group.statistics()[:5] == (1, 1, 1, 1, 1)
                scope.cancel()
                await anyio.sleep(1)
    assert scope.cancelled_caught
    assert outcomes == ["refused"]
    assert sorted(group.leftover) == [0, 1, 2]
    assert_nothing_left(group)


async def test_a_cancellation_during_the_drain_stops() -> None:
    """Leaving that takes too long is ended by a timeout around the block."""
    with anyio.move_on_after(2.5) as scope:
        async with WorkerGroup(sleepy, workers=1, buffer=10) as group:
            for number in range(5):
                group.submit_nowait(number)
    assert scope.cancelled_caught
    assert group.statistics().succeeded == 2
    assert group.leftover == (2, 3, 4)
    assert_nothing_left(group)


async def test_regression_a_cancelled_group_starts_no_queued_job() -> None:
    """Not even while the block takes its time over its own cleanup."""
    handler = Handler()
    with anyio.CancelScope() as scope:
        async with WorkerGroup(handler, workers=2, buffer=20) as group:
            for number in range(10):
                group.submit_nowait(number)
            await wait_all_tasks_blocked()
            scope.cancel()
            try:
                await anyio.sleep(1)
            finally:
                with anyio.CancelScope(shield=True):
                    await anyio.sleep(5)
    assert sorted(handler.started) == [0, 1]
    assert sorted(group.leftover) == list(range(10))
    assert_nothing_left(group)


async def test_regression_an_exception_group_from_the_block_is_not_wrapped() -> None:
    """Any error of the block goes on as it is, also one that is a group itself, of a Group inside, say."""
    error = ExceptionGroup("own", [ValueError("inner")])
    with pytest.raises(ExceptionGroup) as caught:
        async with WorkerGroup(sleepy) as group:
            group.submit_nowait(1)
            raise error
    assert caught.value is error
    assert group.leftover == (1,)
    assert_nothing_left(group)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_keyboard_interrupt_in_a_handler_is_raised(backend: str) -> None:
    """It is not a job's failure: it ends the group, with nothing lost."""
    groups: list[WorkerGroup[int, None]] = []
    results: list[Result[None]] = []

    async def handle(job: int) -> None:
        await anyio.lowlevel.checkpoint()
        if job == 2:
            raise KeyboardInterrupt
        await anyio.sleep_forever()

    async def main() -> None:
        async with WorkerGroup(handle, workers=2, buffer=10) as group:
            groups.append(group)
            results.extend(group.submit_nowait(number) for number in (1, 2, 3))
            await anyio.sleep_forever()

    with pytest.raises(BaseException) as caught:  # noqa: PT011 -- trio raises a group of it
        anyio.run(main, backend=backend)
    error = caught.value
    while isinstance(error, BaseExceptionGroup):
        [error] = error.exceptions
    assert isinstance(error, KeyboardInterrupt)
    assert sorted(groups[0].leftover) == [1, 2, 3]
    assert all(isinstance(result.exception(), ResultCancelledError) for result in results)
    assert_nothing_left(groups[0])


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": VirtualTimeLoop})])
@pytest.mark.parametrize("buffer", [0, 10])
async def test_regression_a_handler_that_awaits_a_cancelled_future_ends_only_its_job(buffer: int) -> None:
    """asyncio.CancelledError without anybody having cancelled the worker: the others are done."""

    async def handle(job: int) -> int:
        if not job:
            future = asyncio.get_running_loop().create_future()
            future.cancel()
            await future
        await anyio.sleep(1)
        return job

    results: dict[int, Result[int]] = {}

    async def submit(number: int) -> None:
        results[number] = await group.submit(number)

    with anyio.fail_after(1000):
        async with WorkerGroup(handle, workers=1, buffer=buffer) as group:
            async with anyio.create_task_group() as tasks:
                for number in range(4):
                    tasks.start_soon(submit, number)
            assert [await results[number] for number in (1, 2, 3)] == [1, 2, 3]
            assert results[0].done
    error = results[0].exception()
    assert isinstance(error, RuntimeError)
    assert str(error) == "the task awaited something that was cancelled, but was not cancelled itself"
    assert isinstance(error.__cause__, asyncio.CancelledError)
    assert group.statistics().succeeded == 3
    assert_nothing_left(group)


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
def test_native_cancellation_of_the_block(anyio_backend: str) -> None:
    """`task.cancel()` in the block and during the drain stops the group, and arrives."""

    async def main(*, draining: bool) -> None:
        groups = []

        async def block() -> None:
            async with WorkerGroup(sleepy, workers=1, buffer=10) as group:
                groups.append(group)
                for number in range(5):
                    group.submit_nowait(number)
                if not draining:
                    await asyncio.sleep(1000)

        task = asyncio.create_task(block())
        await asyncio.sleep(1.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert groups[0].leftover == (1, 2, 3, 4)
        assert_nothing_left(groups[0])

    for draining in False, True:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(main(draining=draining))


class TestShutdown:
    async def test_it_drains_without_a_bound(self) -> None:
        """All jobs are done, and nothing is left over."""
        handler = Handler()
        async with WorkerGroup(handler, workers=2) as group:
            results = [group.submit_nowait(number) for number in range(6)]
            assert await group.shutdown() == []
            assert all(result.done for result in results)
            with pytest.raises(ClosedResourceError, match=whole(SHUTTING_DOWN)):
                await group.submit(7)
            with pytest.raises(ClosedResourceError, match=whole(SHUTTING_DOWN)):
                group.submit_nowait(7)
            with pytest.raises(ClosedResourceError, match=whole(SHUTTING_DOWN)):
                group.map([7])
            assert await group.shutdown() == []
        assert_nothing_left(group)

    async def test_it_returns_what_is_left_over(self, caplog: pytest.LogCaptureFixture) -> None:
        """After its time; the group's end says nothing more about them."""
        start = anyio.current_time()
        async with WorkerGroup(sleepy, workers=1, buffer=10) as group:
            results = [group.submit_nowait(number) for number in range(5)]
            assert await group.shutdown(2.5) == [2, 3, 4]
            assert anyio.current_time() - start == pytest.approx(2.5)
            assert [result.exception() is None for result in results] == [True, True, False, False, False]
            assert await group.shutdown(1) == [2, 3, 4]
            group.resize(20)
        assert group.leftover == (2, 3, 4)
        assert caplog.records == []
        assert_nothing_left(group)

    async def test_at_once(self) -> None:
        """A timeout of zero cancels what runs, also what has just been submitted."""
        handler = Handler()
        async with WorkerGroup(handler, workers=2) as group:
            for number in range(5):
                group.submit_nowait(number)
            assert sorted(await group.shutdown(0)) == list(range(5))
        assert handler.finished == []
        assert_nothing_left(group)

    async def test_own_handlers_may_submit_meanwhile(self) -> None:
        """What they submit is done too, what others submit is refused."""
        done = []

        async def handle(job: int) -> None:
            await anyio.sleep(1)
            done.append(job)
            if job:
                await group.submit(job - 1)

        async def outsider() -> None:
            await anyio.sleep(0.5)
            with pytest.raises(ClosedResourceError, match=whole(SHUTTING_DOWN)):
                group.submit_nowait(9)

        async with anyio.create_task_group() as tasks, WorkerGroup(handle, workers=1, buffer=1) as group:
            group.submit_nowait(3)
            tasks.start_soon(outsider)
            assert await group.shutdown(100) == []
        assert done == [3, 2, 1, 0]
        assert_nothing_left(group)

    async def test_handlers_of_another_group_are_outsiders(self) -> None:
        """Being a handler elsewhere gives no right here."""
        refused: list[Any] = []

        async def handle(job: int) -> None:
            try:
                target.submit_nowait(job)
            except ClosedResourceError as error:
                refused.append(str(error))

        async with WorkerGroup(sleepy) as target, WorkerGroup(handle) as other:
            target.submit_nowait(0)
            other.submit_nowait(1)
            await wait_all_tasks_blocked()
            await target.shutdown()
            await other.submit_nowait(2)
        assert refused == [SHUTTING_DOWN]
        assert target.statistics().succeeded == 2

    async def test_a_handler_of_the_group_can_not_shut_it_down(self) -> None:
        """It would wait for itself."""

        async def handle(_job: int) -> None:
            await group.shutdown()

        async with WorkerGroup(handle) as group:
            with pytest.raises(RuntimeError, match=whole(BAD_SHUTDOWN)):
                await group.submit_nowait(1)
        assert_nothing_left(group)

    async def test_a_handler_of_another_group_can(self) -> None:
        """It waits for others only."""

        async def handle(_job: int) -> list[int]:
            return await target.shutdown()

        async with WorkerGroup(sleepy) as target, WorkerGroup(handle) as other:
            target.submit_nowait(1)
            assert await other.submit_nowait(1) == []
        assert target.statistics().succeeded == 1

    async def test_its_argument_is_checked(self) -> None:
        """And nothing is shut down if it is wrong."""
        async with WorkerGroup(echo) as group:
            with pytest.raises(ValueError, match=whole("timeout must be >= 0, got -1")):
                await group.shutdown(-1)
            assert await group.submit_nowait(1) == 1

    async def test_when_it_is_cancelled_the_group_accepts_no_more(self) -> None:
        """Leaving the block then drains what there is."""
        async with WorkerGroup(sleepy, workers=1) as group:
            results = [group.submit_nowait(number) for number in range(3)]
            with anyio.move_on_after(1.5) as scope:
                await group.shutdown()
            assert scope.cancelled_caught
            with pytest.raises(ClosedResourceError, match=whole(SHUTTING_DOWN)):
                group.submit_nowait(3)
        assert [await result for result in results] == [0, 1, 2]
        assert_nothing_left(group)

    async def test_it_ends_delayed_and_held_jobs(self) -> None:
        """They are left over, without waiting for their time."""
        async with WorkerGroup(fail, workers=2, buffer=1, retry=Retry(9, delay=100, jitter=0)) as group:
            jobs = [ValueError(number) for number in range(2)]
            for job in jobs:
                group.submit_nowait(job)
                await wait_all_tasks_blocked()
            assert group.statistics()[:4] == (2, 1, 0, 1)
            start = anyio.current_time()
            assert sorted(await group.shutdown(5), key=str) == jobs
        assert anyio.current_time() - start == pytest.approx(5)
        assert_nothing_left(group)

    async def test_a_delay_that_has_not_begun_is_ended_too(self) -> None:
        """The job failed in the tick of the shutdown."""
        gate = Event()

        async def handle(_job: int) -> None:
            await gate.wait()
            raise ValueError

        async with WorkerGroup(handle, retry=Retry(2, delay=100)) as group:
            result = group.submit_nowait(1)
            await wait_all_tasks_blocked()
            gate.set()
            while not group._delayed:
                await anyio.lowlevel.checkpoint()
            assert await group.shutdown(0) == [1]
            assert result.attempts == 1
        assert_nothing_left(group)

    async def test_regression_a_failing_cleanup_is_not_retried_after_the_time_is_over(self) -> None:
        """A handler that turns the cancellation into an error doesn't put its end off."""

        async def handle(_job: int) -> None:
            try:
                await anyio.sleep_forever()
            finally:
                raise ValueError

        start = anyio.current_time()
        async with WorkerGroup(handle, retry=Retry(2, delay=50, jitter=0)) as group:
            result = group.submit_nowait(1)
            leftover = await group.shutdown(1)
            assert anyio.current_time() - start == pytest.approx(1)
            assert result.done
            assert leftover in ([], [1])
            assert result.exception() is not None
        assert_nothing_left(group)

    @pytest.mark.parametrize("leave", [False, True])
    async def test_regression_twice_at_the_same_time(self, leave: bool) -> None:
        """By two tasks, or by one while the block is being left: both return."""
        returned = []

        async def shut_down(delay: float, timeout: float | None) -> None:
            await anyio.sleep(delay)
            returned.append(await group.shutdown(timeout))

        with anyio.fail_after(1000):
            async with anyio.create_task_group() as tasks:
                async with WorkerGroup(sleepy, workers=1, buffer=10) as group:
                    for number in range(5):
                        group.submit_nowait(number)
                    tasks.start_soon(shut_down, 0.5, None)
                    if not leave:
                        tasks.start_soon(shut_down, 0.6, None)
                        await anyio.sleep(10)
        assert returned == [[]] * (1 if leave else 2)
        assert group.statistics().succeeded == 5
        assert_nothing_left(group)

    async def test_regression_a_short_one_during_a_long_one(self) -> None:
        """The shorter time counts, and whoever waited longer gets the same jobs."""
        returned = []

        async def shut_down(delay: float, timeout: float | None) -> None:
            await anyio.sleep(delay)
            returned.append(await group.shutdown(timeout))

        with anyio.fail_after(1000):
            async with anyio.create_task_group() as tasks:
                async with WorkerGroup(sleepy, workers=1, buffer=10) as group:
                    for number in range(5):
                        group.submit_nowait(number)
                    tasks.start_soon(shut_down, 0, None)
                    tasks.start_soon(shut_down, 0.5, 1)
                    await anyio.sleep(10)
        assert returned == [[1, 2, 3, 4]] * 2
        assert_nothing_left(group)

    async def test_regression_a_short_one_while_the_block_is_left(self) -> None:
        """What SIGTERM does to a program that is about to end: leaving ends with it."""
        returned = []

        async def shut_down() -> None:
            await anyio.sleep(0.5)
            returned.append(await group.shutdown(1))

        with anyio.fail_after(1000):
            async with anyio.create_task_group() as tasks:
                async with WorkerGroup(sleepy, workers=1, buffer=10) as group:
                    for number in range(5):
                        group.submit_nowait(number)
                    tasks.start_soon(shut_down)
        assert returned == [[1, 2, 3, 4]]
        assert group.leftover == (1, 2, 3, 4)
        assert_nothing_left(group)


# Submitting to one's own group


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("buffer", [0, 1])
async def test_a_self_submission_that_could_never_end_is_refused(workers: int, buffer: int) -> None:
    """Only the last of the handlers is, when all the others already wait; its failure lets the others go on."""
    errors: list[Any] = []

    async def handle(job: int) -> None:
        if job:
            await anyio.sleep(1)
            try:
                await group.submit(0)
            except RuntimeError as error:
                errors.append(str(error))

    with anyio.fail_after(1000):
        async with WorkerGroup(handle, workers=workers, buffer=buffer) as group:
            for _ in range(workers + buffer):
                group.submit_nowait(1)
    assert errors
    assert set(errors) == {DEADLOCK}
    assert_nothing_left(group)


async def test_a_self_submission_waits_while_another_handler_can_go_on() -> None:
    """That one will make room."""

    async def handle(job: int) -> int:
        if job == 1:
            await group.submit(0)
        elif job == 2:
            await anyio.sleep(10)
        return job

    async with WorkerGroup(handle, workers=2, buffer=0) as group:
        results = [group.submit_nowait(number) for number in (1, 2)]
        assert [await result for result in results] == [1, 2]
    assert group.statistics().succeeded == 3
    assert_nothing_left(group)


async def test_a_handler_that_holds_its_worker_between_attempts_can_go_on() -> None:
    """It isn't blocked, it only waits."""
    attempts = 0

    async def handle(job: int) -> int:
        nonlocal attempts
        if job == 1:
            await anyio.sleep(1)
            await group.submit(0)
        elif job == 2:
            attempts += 1
            if attempts == 1:
                raise ValueError
        return job

    async with WorkerGroup(handle, workers=2, buffer=0, retry=Retry(2, delay=10, jitter=0)) as group:
        results = [group.submit_nowait(number) for number in (1, 2)]
        assert [await result for result in results] == [1, 2]
    assert_nothing_left(group)


async def test_regression_a_handler_whose_job_was_just_taken_is_not_blocked() -> None:
    """No deadlock is seen where a handler only hasn't run yet.

    One handler waits to submit. The other ends; its worker takes the next job, which makes room for the first one's and
    wakes it; and in the same tick that next job submits, and finds the group full. The first handler will go on.
    """
    gate = Event()
    errors: list[Any] = []

    async def handle(job: str) -> None:
        if job == "waits":
            await group.submit("inner")
        elif job == "ends":
            await gate.wait()
        elif job == "submits":
            try:
                await group.submit("last")
            except RuntimeError as error:
                errors.append(str(error))

    async with WorkerGroup(handle, workers=2, buffer=1) as group:
        group.submit_nowait("ends")
        await wait_all_tasks_blocked()
        group.submit_nowait("waits")
        group.submit_nowait("submits")
        await wait_all_tasks_blocked()
        assert group.statistics()[:5] == (2, 2, 1, 0, 1)
        gate.set()
    assert errors == []
    assert group.statistics().succeeded == 5
    assert_nothing_left(group)


async def test_regression_a_handler_that_is_being_cancelled_is_not_blocked() -> None:
    """Its job was cancelled in this tick, so that its worker comes free."""
    errors: list[Any] = []
    first: list[Result[None]] = []

    async def handle(job: str) -> None:
        if job == "waits":
            await group.submit("inner")
        elif job == "submits":
            await anyio.sleep(1)
            first[0].cancel()
            try:
                await group.submit("last")
            except RuntimeError as error:
                errors.append(str(error))

    async with WorkerGroup(handle, workers=2, buffer=0) as group:
        # It is started second, so that it waits.
        group.submit_nowait("submits")
        await wait_all_tasks_blocked()
        first.append(group.submit_nowait("waits"))
    assert errors == []
    assert group.statistics()[5:] == (2, 0, 1, 0)
    assert_nothing_left(group)


async def test_a_handlers_child_task_that_waits_is_no_deadlock() -> None:
    """The handler itself may go on without it."""

    async def handle(job: int) -> int:
        if job:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(group.submit, 0)
                await anyio.sleep(1)
                tasks.cancel_scope.cancel()
        return job

    async with WorkerGroup(handle, workers=1, buffer=0) as group:
        assert await group.submit_nowait(1) == 1
    assert group.statistics().succeeded == 1
    assert_nothing_left(group)


async def test_a_submission_to_another_group_is_never_a_deadlock() -> None:
    """Only one's own counts."""

    async def handle(job: int) -> int:
        await target.submit(job)
        return job

    async with WorkerGroup(sleepy, workers=1, buffer=0) as target, WorkerGroup(handle, workers=1) as group:
        results = [group.submit_nowait(number) for number in range(4)]
        assert [await result for result in results] == [0, 1, 2, 3]
    assert target.statistics().succeeded == 4


# map


async def agen(jobs: Any) -> AsyncIterator[Any]:
    for job in jobs:
        await anyio.lowlevel.checkpoint()
        yield job


def sources(kind: str, count: int) -> Any:
    if kind == "list":
        return list(range(count))
    if kind == "generator":
        return (number for number in range(count))
    if kind == "async generator":
        return agen(range(count))
    channel = Channel[int](math.inf)
    for number in range(count):
        channel.send_nowait(number)
    channel.close()
    return channel if kind == "channel" else channel.receiver


class TestMap:
    @pytest.mark.parametrize("kind", ["list", "generator", "async generator", "channel", "receiver"])
    @pytest.mark.parametrize("ordered", [True, False])
    async def test_it_goes_over_any_source(self, kind: str, ordered: bool) -> None:
        """Each job gives one result."""
        async with WorkerGroup(sleepy, workers=3, buffer=2) as group:
            source = sources(kind, 20)
            seen = [value async for value in group.map(source, ordered=ordered)]
            if kind == "receiver":
                source.close()
        assert seen == list(range(20)) if ordered else sorted(seen) == list(range(20))
        assert_nothing_left(group)

    async def test_the_order_is_that_of_the_jobs_or_of_their_ends(self) -> None:
        """As asked for."""

        async def handle(job: int) -> int:
            await anyio.sleep(job)
            return job

        async with WorkerGroup(handle, workers=3) as group:
            assert [value async for value in group.map([3, 1, 2])] == [3, 1, 2]
            assert [value async for value in group.map([3, 1, 2], ordered=False)] == [1, 2, 3]
        assert_nothing_left(group)

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_an_empty_source(self, ordered: bool) -> None:
        """Gives nothing and ends."""
        async with WorkerGroup(echo) as group:
            assert [value async for value in group.map([], ordered=ordered)] == []
        assert_nothing_left(group)

    @pytest.mark.parametrize("ordered", [True, False])
    @pytest.mark.parametrize("asynchronous", [True, False])
    @pytest.mark.parametrize(("workers", "buffer"), [(1, 0), (1, 1), (3, 0), (3, 5)])
    async def test_the_source_is_read_no_further_than_the_window(
        self, ordered: bool, asynchronous: bool, workers: int, buffer: int
    ) -> None:
        """At most `workers + buffer` jobs ahead of what was iterated over, whoever is slow."""
        read = given = furthest = 0

        def source() -> Iterator[int]:
            nonlocal read, furthest
            for number in range(30):
                read += 1
                furthest = max(furthest, read - given)
                yield number

        for pause in 0, 0.1, 10:
            read = given = furthest = 0
            async with WorkerGroup(sleepy, workers=workers, buffer=buffer) as group:
                jobs = agen(source()) if asynchronous else source()
                async for _ in group.map(jobs, ordered=ordered):
                    given += 1
                    await anyio.sleep(pause)
            assert given == 30
            assert workers <= furthest <= workers + buffer
            assert_nothing_left(group)

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_leaving_early_cancels_the_rest(self, ordered: bool) -> None:
        """Of an endless source too; the group is free for other work."""
        handler = Handler()

        def endless() -> Iterator[int]:
            number = 0
            while True:
                yield number
                number += 1

        async with WorkerGroup(handler, workers=2, buffer=3) as group:
            async with aclosing(group.map(endless(), ordered=ordered)) as values:
                async for value in values:
                    if value >= 5:
                        break
            await wait_all_tasks_blocked()
            assert group.statistics()[:5] == (2, 0, 0, 0, 0)
            assert await group.submit_nowait(1000) == 1000
        assert len(handler.started) < 15
        assert group.statistics().cancelled > 0
        assert group.leftover == ()
        assert_nothing_left(group)

    async def test_closing_before_the_first_step(self) -> None:
        """No job is handled, and iterating is over."""
        handler = Handler()
        async with WorkerGroup(handler) as group:
            values = group.map(range(5))
            await values.aclose()
            await values.aclose()
            assert [value async for value in values] == []
        assert handler.finished == []
        assert_nothing_left(group)

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_the_first_failure_is_raised_and_cancels_the_rest(self, ordered: bool) -> None:
        """After the results before it."""

        async def handle(job: int) -> int:
            await anyio.sleep(job)
            if job == 3:
                raise ValueError(job)
            return job

        seen = []
        async with WorkerGroup(handle, workers=10) as group:
            with pytest.raises(ValueError, match=whole("3")):
                async for value in group.map([1, 2, 3, 4, 5], ordered=ordered):
                    seen.append(value)
            await wait_all_tasks_blocked()
            assert group.statistics()[:5] == (10, 0, 0, 0, 0)
        assert seen == [1, 2]
        assert group.statistics()[5:] == (2, 1, 2, 0)
        assert_nothing_left(group)

    async def test_in_order_the_first_failure_is_the_first_of_the_jobs(self) -> None:
        """Though another failed earlier."""

        async def handle(job: int) -> None:
            await anyio.sleep(job)
            raise ValueError(job)

        async with WorkerGroup(handle, workers=10) as group:
            with pytest.raises(ValueError, match=whole("2")):
                async for _ in group.map([2, 1]):
                    pass
            with pytest.raises(ValueError, match=whole("1")):
                async for _ in group.map([2, 1], ordered=False):
                    pass

    @pytest.mark.parametrize("ordered", [True, False])
    @pytest.mark.parametrize("asynchronous", [True, False])
    async def test_an_error_of_the_source_comes_after_the_results(self, ordered: bool, asynchronous: bool) -> None:
        """Of the jobs before it."""

        def source() -> Iterator[int]:
            yield from range(3)
            msg = "source"
            raise KeyError(msg)

        seen = []
        async with WorkerGroup(sleepy, workers=2) as group:
            with pytest.raises(KeyError, match=whole("'source'")):
                async for value in group.map(agen(source()) if asynchronous else source(), ordered=ordered):
                    seen.append(value)
        assert sorted(seen) == [0, 1, 2]
        assert_nothing_left(group)

    async def test_retries_are_invisible(self) -> None:
        """But for their time."""
        failed = set()

        async def handle(job: int) -> int:
            if job not in failed:
                failed.add(job)
                raise ValueError
            return job

        async with WorkerGroup(handle, workers=2, buffer=1, retry=Retry(2)) as group:
            assert [value async for value in group.map(range(20))] == list(range(20))
        assert group.statistics().retries == 20
        assert_nothing_left(group)

    async def test_what_is_not_iterable_is_refused(self) -> None:
        """At once, not at the first step."""
        async with WorkerGroup(echo) as group:
            with pytest.raises(TypeError, match=whole("jobs must be an iterable or asynchronous iterable, got 7")):
                group.map(7)  # type: ignore[arg-type]

    async def test_several_at_once(self) -> None:
        """They share the workers."""
        handler = Handler()
        sums = []

        async def total(jobs: range) -> None:
            sums.append(sum([value async for value in group.map(jobs)]))

        async with WorkerGroup(handler, workers=3, buffer=0) as group, anyio.create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(total, range(number * 10, number * 10 + 10))
        assert sorted(sums) == [45, 145, 245, 345]
        assert handler.most == 3
        assert_nothing_left(group)

    async def test_a_cancelled_iteration_cancels_the_rest(self) -> None:
        """As leaving it does."""
        async with WorkerGroup(sleepy, workers=2) as group:
            with anyio.move_on_after(2.5) as scope:
                async for _ in group.map(range(100)):
                    pass
            assert scope.cancelled_caught
            await wait_all_tasks_blocked()
            assert group.statistics()[:5] == (2, 0, 0, 0, 0)
        assert group.statistics().succeeded == 4
        assert_nothing_left(group)

    async def test_during_a_shutdown_it_ends_with_an_error(self) -> None:
        """The jobs that were taken give their results first."""
        seen: list[Any] = []
        errors: list[Any] = []

        async def consume() -> None:
            try:
                async for value in group.map(range(100)):
                    seen.append(value)
            except ClosedResourceError as error:
                errors.append(str(error))

        async with anyio.create_task_group() as tasks, WorkerGroup(sleepy, workers=1, buffer=2) as group:
            tasks.start_soon(consume)
            await anyio.sleep(1.5)
            assert await group.shutdown(100) == []
        assert seen == list(range(len(seen)))
        assert len(seen) == group.statistics().succeeded
        assert len(errors) == 1
        assert_nothing_left(group)

    @pytest.mark.parametrize("ending", ["normal", "error"])
    @pytest.mark.parametrize("ordered", [True, False])
    async def test_regression_a_half_read_map_does_not_hold_up_the_end(self, ending: str, ordered: bool) -> None:
        """Its generator may still be referred to when the block is left."""
        with anyio.fail_after(1000):
            with contextlib.suppress(KeyError):
                async with WorkerGroup(echo, workers=1, buffer=1) as group:
                    values = group.map(range(1000), ordered=ordered)
                    async for _ in values:
                        await wait_all_tasks_blocked()
                        if ending == "error":
                            raise KeyError
                        break
        await values.aclose()
        assert_nothing_left(group)

    @pytest.mark.parametrize("ending", ["cancellation", "error"])
    async def test_regression_stopping_ends_a_map_that_waits_for_its_source(self, ending: str) -> None:
        """Both the task that reads the source and the one that iterates elsewhere."""
        idle_source = Channel[int]()
        errors: list[Any] = []

        async def consume() -> None:
            try:
                async for _ in group.map(idle_source):
                    pass
            except (ClosedResourceError, ResultCancelledError) as error:
                errors.append(error)

        with anyio.fail_after(1000):
            async with anyio.create_task_group() as tasks:
                with anyio.CancelScope() as scope, contextlib.suppress(KeyError):
                    async with WorkerGroup(echo) as group:
                        tasks.start_soon(consume)
                        await wait_all_tasks_blocked()
                        if ending == "error":
                            raise KeyError
                        scope.cancel()
                        await anyio.sleep(1)
        assert len(errors) == 1
        assert_nothing_left(group)
        assert_at_rest(idle_source)

    async def test_regression_a_job_submitted_in_the_tick_of_the_break_is_cancelled(self) -> None:
        """The feeding task's job was taken, and before it ran on, the iteration was left.

        It waits to submit; a worker takes the job before, which makes room for its; and in the same tick, the
        iterating task closes.
        """
        started = []
        go_on = Event()
        gates = {"first": Event(), "other": Event()}

        async def source() -> AsyncGenerator[int, None]:
            yield 0
            await go_on.wait()
            for number in range(1, 10):
                yield number

        async def handle(job: Any) -> Any:
            started.append(job)
            if job in gates:
                await gates[job].wait()
                return job
            if job == 1:
                await values.aclose()
            if job != 0:
                await anyio.sleep(1000)
            return job

        async with WorkerGroup(handle, workers=1, buffer=1) as group, aclosing(source()) as jobs:
            values = group.map(jobs)
            assert await anext(values) == 0
            for job in gates:
                group.submit_nowait(job)
            go_on.set()
            for gate in gates.values():
                await wait_all_tasks_blocked()
                assert group.statistics()[:5] == (1, 1, 1, 0, 1)
                gate.set()
            await wait_all_tasks_blocked()
            figures = group.statistics()
        assert started[:4] == [0, "first", "other", 1]
        assert 3 not in started
        assert figures[:5] == (1, 0, 0, 0, 0)
        assert group.statistics().succeeded == 3
        assert_nothing_left(group)


# Bounds on memory, and randomised runs


async def test_many_jobs_in_bounded_memory() -> None:
    """A hundred thousand jobs, dropped as they finish."""
    done = 0

    async def count(_job: int) -> None:
        nonlocal done
        done += 1

    async with WorkerGroup(count, workers=4, buffer=100) as group:
        for number in range(90_000):
            await group.submit(number)
        # By their type, since a weak proxy of another test's passes itself off for what is gone.
        results = sum(issubclass(type(thing), Result) for thing in gc.get_objects())
        # Tracing is slow, so only the rest is traced: had it kept each job, it would be megabytes.
        tracemalloc.start()
        try:
            for number in range(10_000):
                await group.submit(number)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert done == 100_000
    assert results < 200
    assert peak < 500_000
    assert_nothing_left(group)


async def test_failing_jobs_in_bounded_memory(caplog: pytest.LogCaptureFixture) -> None:
    """Failures that nobody looks at are logged and gone."""
    caplog.set_level(logging.CRITICAL, "chanflow")
    async with WorkerGroup(fail, workers=4, buffer=100) as group:
        for number in range(2000):
            await group.submit(ValueError(number))
        await wait_all_tasks_blocked()
        gc.collect()
        assert len(group._failures) <= 4
    assert group.statistics().failed == 2000
    assert_nothing_left(group)


class Chaos:
    """One seeded run: random jobs, failures, resizes, cancellations, and a random end."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.endings = ["leave", "error", "cancel", "shutdown", "shutdown and leave"]
        self.retry = Retry(random.randint(1, 3), delay=random.choice([0, 0.5]), on=ValueError)
        self.letters = Channel[DeadLetter[int]](math.inf)
        self.group = WorkerGroup(
            self.handle,
            workers=random.randint(1, 4),
            buffer=random.choice([0, 1, 3, math.inf]),
            retry=random.choice([None, self.retry]),
            timeout=random.choice([None, 1.0]),
            dead_letters=random.choice([None, self.letters]),
        )
        self.accepted: dict[int, Result[int]] = {}
        self.finished: Counter[int] = Counter()
        self.running = 0
        self.violations: list[Any] = []
        self.seen: set[int] = set()
        self.nested = 1000

    async def handle(self, job: int) -> int:
        self.running += 1
        # A worker that holds its job between two attempts counts as running, and keeps its place in a smaller group.
        first = job not in self.seen
        self.seen.add(job)
        running = self.group.statistics().running
        if self.running > running or (first and running > self.group._limit):
            self.violations.append((self.running, self.group.statistics()))
        try:
            what = self.random.random()
            if what < 0.6:
                await anyio.sleep(self.random.choice([0, 0.1, 0.1, 0.5, 2]))
            if what < 0.2:
                raise self.random.choice([ValueError, KeyError])(job)
            if what > 0.9:
                self.nested += 1
                with contextlib.suppress(WouldBlock, ClosedResourceError):
                    self.accepted[self.nested] = self.group.submit_nowait(self.nested)
        finally:
            self.running -= 1
        self.finished[job] += 1
        return job

    async def submit(self, start: int, count: int) -> None:
        for job in range(start, start + count):
            with contextlib.suppress(ClosedResourceError, WouldBlock):
                if self.random.random() < 0.5:
                    self.accepted[job] = self.group.submit_nowait(job)
                else:
                    self.accepted[job] = await self.group.submit(job)
            if self.random.random() < 0.3:
                await anyio.sleep(self.random.choice([0, 0.1]))
            if self.random.random() < 0.1 and self.accepted:
                self.random.choice(list(self.accepted.values())).cancel()
            if self.random.random() < 0.1:
                self.group.resize(self.random.randint(1, 4))

    async def run(self) -> None:
        ending = self.random.choice(self.endings)
        returned: list[int] = []

        async def shut_down() -> None:
            await anyio.sleep(self.random.choice([0, 0.3, 1]))
            with contextlib.suppress(RuntimeError):
                returned.extend(await self.group.shutdown(self.random.choice([0, 0.5, None])))

        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope, contextlib.suppress(ZeroDivisionError):
                async with self.group as group:
                    for number in range(3):
                        tasks.start_soon(self.submit, number * 100, 20)
                    await anyio.sleep(self.random.choice([0, 0.1, 0.5, 2]))
                    if ending == "error":
                        raise ZeroDivisionError
                    if ending == "cancel":
                        scope.cancel()
                        await anyio.sleep(1)
                    if ending == "shutdown":
                        await shut_down()
                    if ending == "shutdown and leave":
                        tasks.start_soon(shut_down)
        self.check(ending, returned, group)

    def check(self, ending: str, returned: list[int], group: WorkerGroup[int, int]) -> None:
        leftover = Counter(group.leftover)
        assert set(leftover.values()) <= {1}
        if ending == "leave":
            assert leftover == Counter()
        if ending == "shutdown":
            assert returned == list(group.leftover)
        letters = Counter(letter.job for letter in self.letters.drain())
        figures = group.statistics()
        succeeded = failed = 0
        for job, result in self.accepted.items():
            assert result.done, job
            error = result.exception()
            if job in leftover:
                assert isinstance(error, ResultCancelledError)
            elif error is None:
                succeeded += 1
                assert self.finished[job] == 1
            elif not isinstance(error, ResultCancelledError):
                failed += 1
                if group._dead_letters is not None:
                    assert letters[job] == 1
        assert set(leftover) <= set(self.accepted)
        assert (figures.succeeded, figures.failed) == (succeeded, failed)
        # Whatever is neither done nor left over was cancelled on purpose.
        assert succeeded + failed + figures.cancelled + len(leftover) == len(self.accepted)
        assert self.violations == []
        assert self.running == 0
        assert_nothing_left(group)


async def test_no_job_is_lost_in_random_runs(caplog: pytest.LogCaptureFixture) -> None:
    """Two hundred seeds: each accepted job is done or left over, exactly once, and the bound holds at each start."""
    caplog.set_level(logging.CRITICAL, "chanflow")
    for seed in range(200):
        try:
            with anyio.fail_after(10_000):
                await Chaos(seed).run()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        caplog.clear()


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


async def test_a_receiving_end_is_no_dead_letter_channel() -> None:
    """Letters are sent."""
    receiver = Channel[Any]().receiver
    message = f"dead_letters must be a Channel, SendChannel or None, got {receiver!r}"
    with pytest.raises(TypeError, match=whole(message)):
        WorkerGroup(echo, dead_letters=receiver)  # type: ignore[call-overload]
    receiver.close()


async def test_map_that_another_thread_collects_is_stopped_in_the_loop() -> None:
    """The garbage collector may run anywhere: the jobs are cancelled, in the event loop."""
    async with WorkerGroup(sleepy, workers=1) as group:
        values = group.map(range(100))
        await anext(values)
        await anyio.to_thread.run_sync(values.__del__)
        await wait_all_tasks_blocked()
        assert values._feed.stopped
        assert group.statistics()[:5] == (1, 0, 0, 0, 0)
    assert_nothing_left(group)


async def test_results_do_not_keep_their_jobs() -> None:
    """A job is let go as soon as it has ended, whoever keeps its result."""

    class Job:
        pass

    job = Job()
    gone = weakref.ref(job)
    async with WorkerGroup(echo) as group:
        result = group.submit_nowait(job)
        await result
        assert gone() is job
        result._value = None  # the handler gave the job back
        del job
        await wait_all_tasks_blocked()
        assert gone() is None
    assert_nothing_left(group)


class Double:
    async def __call__(self, number: int) -> int:
        return 2 * number


async def test_what_a_map_looks_like() -> None:
    """It says where it stands, and in a plain `for` what is missing."""
    async with WorkerGroup[int, int](Double(), workers=1, buffer=1) as group:
        results = group.map(range(5))
        assert repr(results) == "<MapIterator of Double: not started>"
        message = "a map's results come as they are ready: use `async for`, not `for`"
        with pytest.raises(TypeError, match=whole(message)):
            iter(results)
        assert await anext(results) == 0
        assert repr(results) == "<MapIterator of Double: 1 unfinished>"
        await results.aclose()
        assert repr(results) == "<MapIterator of Double: stopped>"
