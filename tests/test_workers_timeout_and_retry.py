"""The attempts that a worker group makes at a job: their timeouts, and when one follows another."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from typing import Any

import anyio
import pytest
from anyio import Event, wait_all_tasks_blocked

from chanflow import Channel, DeadLetter, ResultCancelledError, Retry, WorkerGroup
from tests.support.messages import whole
from tests.support.worker_groups import assert_nothing_left, fail

pytestmark = pytest.mark.anyio


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
