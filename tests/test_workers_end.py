"""The ways in which a worker group ends: leaving its block, an error, a cancellation, and `shutdown`."""

# ruff: noqa: FBT001, PT012, SIM117 -- flags come from parametrize; a group raises when its block is left; nesting is shown

from __future__ import annotations

import asyncio
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, Event, wait_all_tasks_blocked

from chanflow import Result, ResultCancelledError, Retry, WorkerGroup, WorkerStatistics
from tests.support.messages import whole
from tests.support.virtual_time import VirtualTimeLoop
from tests.support.worker_groups import (
    BAD_SHUTDOWN,
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
