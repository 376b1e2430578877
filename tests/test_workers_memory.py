"""Worker groups keep nothing of the jobs that have ended."""

from __future__ import annotations

import gc
import logging
import tracemalloc
import weakref

import pytest
from anyio import wait_all_tasks_blocked

from chanflow import Result, WorkerGroup
from tests.support.worker_groups import assert_nothing_left, echo, fail

pytestmark = pytest.mark.anyio


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
