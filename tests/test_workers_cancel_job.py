"""Cancelling single jobs of a worker group: queued, running, delayed or waiting for room."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import wait_all_tasks_blocked

from chanflow import Result, ResultCancelledError, Retry, WorkerGroup
from tests.support.messages import whole
from tests.support.worker_groups import Handler, assert_nothing_left, fail

pytestmark = pytest.mark.anyio


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
