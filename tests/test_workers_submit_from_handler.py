"""Handlers that submit to their own worker group: what waits, and what could never end."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anyio import Event, wait_all_tasks_blocked

from chanflow import Result, Retry, WorkerGroup
from tests.support.worker_groups import DEADLOCK, assert_nothing_left, sleepy

pytestmark = pytest.mark.anyio


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
