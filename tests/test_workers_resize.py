"""Worker groups that grow and shrink while they run."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import Event, WouldBlock, wait_all_tasks_blocked

from chanflow import ResultCancelledError, WorkerGroup
from tests.support.messages import whole
from tests.support.worker_groups import DEADLOCK, Handler, assert_nothing_left, echo, sleepy

pytestmark = pytest.mark.anyio


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
