"""Results: the channel of one item that each task and each job has."""

# ruff: noqa: FBT001, PT012 -- flags come from parametrize; a group raises when its block is left

from __future__ import annotations

import asyncio
import gc
import logging
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, EndOfStream, Event, WouldBlock, wait_all_tasks_blocked

from chanflow import (
    Channel,
    Group,
    Result,
    ResultCancelledError,
    WorkerGroup,
    after,
    select,
    select_nowait,
    set_checkpoint_interval,
)
from tests.support.channels import assert_at_rest
from tests.support.messages import whole
from tests.support.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio


class Oracle:
    """A handler that answers or fails when it is told to."""

    def __init__(self) -> None:
        self.gate = Event()

    async def __call__(self, job: Any) -> Any:
        await self.gate.wait()
        if isinstance(job, BaseException):
            raise job
        return job


def errors_logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]


async def test_many_tasks_await_many_times() -> None:
    """Each of them gets the same object, before the end and after it."""
    oracle = Oracle()
    value = object()
    seen = []

    async def wait_for(result: Result[Any]) -> None:
        seen.append(await result)
        seen.append(await result)

    async with Group() as group:
        result = group.go(oracle, value)
        for _ in range(3):
            group.go(wait_for, result)
        await wait_all_tasks_blocked()
        assert result._waiting is not None
        assert result._waiting.count_live() == 3
        oracle.gate.set()
        assert await result is value
    assert await result is value
    assert seen == [value] * 6
    assert not result._waiting


async def test_a_failure_is_raised_to_all_with_its_own_traceback() -> None:
    """Each await raises the same error, and its traceback doesn't grow with those that awaited before."""
    oracle = Oracle()
    error = ValueError("bad")
    depths = []
    async with WorkerGroup(oracle) as workers:
        result = workers.submit_nowait(error)
        oracle.gate.set()
        for _ in range(3):
            with pytest.raises(ValueError, match=whole("bad")) as caught:
                await result
            assert caught.value is error
            depths.append(len(caught.traceback))
    assert depths == [depths[0]] * 3
    assert result.exception() is error


@pytest.mark.parametrize("early", [True, False])
async def test_as_a_channel_it_gives_its_item_once(early: bool) -> None:
    """Then it is closed and drained; awaiting still gives the value."""
    oracle = Oracle()
    async with Group() as group:
        result = group.go(oracle, 7)
        if early:
            with pytest.raises(WouldBlock):
                result.receive_nowait()
        oracle.gate.set()
        if not early:
            assert await result == 7
        assert await result.receive() == 7
        with pytest.raises(EndOfStream, match=whole("channel 'result' is closed and drained")):
            await result.receive()
        with pytest.raises(EndOfStream, match=whole("channel 'result' is closed and drained")):
            result.receive_nowait()
        assert await result == 7
    assert result._channel is not None
    assert_at_rest(result._channel)


async def test_receive_gives_the_item_to_one_of_several() -> None:
    """The first that came gets it, the others the end."""
    oracle = Oracle()
    seen: list[Any] = []

    async def receive(result: Result[Any], name: str) -> None:
        try:
            seen.append((name, await result.receive()))
        except EndOfStream:
            seen.append((name, "end"))

    async with Group() as group:
        result = group.go(oracle, 7)
        for name in "a", "b":
            group.go(receive, result, name)
            await wait_all_tasks_blocked()
        oracle.gate.set()
    assert sorted(seen) == [("a", 7), ("b", "end")]
    assert result._channel is not None
    assert_at_rest(result._channel)


async def test_receive_raises_a_failure_once() -> None:
    """The error is the item."""
    oracle = Oracle()
    async with WorkerGroup(oracle) as workers:
        results = [workers.submit_nowait(ValueError("bad")) for _ in range(2)]
        oracle.gate.set()
        with pytest.raises(ValueError, match=whole("bad")):
            await results[0].receive()
        with pytest.raises(EndOfStream):
            await results[0].receive()
        await wait_all_tasks_blocked()
        with pytest.raises(ValueError, match=whole("bad")):
            results[1].receive_nowait()


async def test_a_case_of_select() -> None:
    """Ready with the value once, afterwards closed."""
    oracle = Oracle()
    async with Group() as group:
        result = group.go(oracle, 7)
        other = Channel[int]()
        with pytest.raises(WouldBlock):
            select_nowait(result, other)
        case = await select(other, result, after(1))
        assert case.index == 2
        oracle.gate.set()
        case = await select(other, result)
        assert (case.index, case.channel, case.item, case.closed) == (1, result, 7, False)
        case = await select(other, result)
        assert (case.index, case.item, case.closed) == (1, None, True)
        assert await result == 7
    assert_at_rest(other)
    assert result._channel is not None
    assert_at_rest(result._channel)


@pytest.mark.parametrize("ready", [True, False])
async def test_a_failure_as_a_case_of_select_raises(ready: bool) -> None:
    """Whether it came before the select or woke it."""
    oracle = Oracle()
    async with WorkerGroup(oracle) as workers:
        result = workers.submit_nowait(ValueError("bad"))

        async def open_gate() -> None:
            await wait_all_tasks_blocked()
            oracle.gate.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(open_gate)
            if ready:
                await anyio.sleep(1)
            with pytest.raises(ValueError, match=whole("bad")):
                await select(result)
        case = await select(result)
        assert case.closed


@pytest.mark.parametrize("ready", [True, False])
async def test_regression_a_failure_that_is_an_end_of_stream_is_no_closed_case(ready: bool) -> None:
    """A task that read past the end of its channel has failed, and select raises that as any other failure."""
    oracle = Oracle()
    async with WorkerGroup(oracle) as workers:
        result = workers.submit_nowait(EndOfStream("of the job"))

        async def open_gate() -> None:
            await wait_all_tasks_blocked()
            oracle.gate.set()

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(open_gate)
            if ready:
                await anyio.sleep(1)
            with pytest.raises(EndOfStream, match=whole("of the job")):
                await select(result)


async def test_a_cancelled_task_as_a_case_of_select() -> None:
    """It raises what awaiting it raises."""
    async with Group() as group:
        result = group.go(anyio.sleep_forever)
        await wait_all_tasks_blocked()
        result.cancel()
        with pytest.raises(ResultCancelledError, match=whole("the task was cancelled")):
            await select(result)


async def test_a_select_that_is_cancelled_takes_nothing() -> None:
    """In the tick of the end too: the item is there for the next."""
    oracle = Oracle()
    async with Group() as group:
        result = group.go(oracle, 7)

        with anyio.CancelScope() as scope:

            async def end_and_cancel() -> None:
                await wait_all_tasks_blocked()
                oracle.gate.set()
                while not result.done:
                    await anyio.lowlevel.checkpoint()
                scope.cancel()

            group.go(end_and_cancel)
            await select(result)
        if scope.cancelled_caught:
            assert await result.receive() == 7
        else:
            with pytest.raises(EndOfStream):
                await result.receive()
    assert result._channel is not None
    assert_at_rest(result._channel)


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": VirtualTimeLoop})])
async def test_a_select_that_is_cancelled_natively_after_it_was_woken_takes_nothing() -> None:
    """`task.cancel()` in the tick of the end: the item goes back, for the next."""
    oracle = Oracle()
    async with Group() as group:
        result = group.go(oracle, 7)
        task = asyncio.create_task(select(result))
        await wait_all_tasks_blocked()
        oracle.gate.set()
        while not result.done:
            await anyio.lowlevel.checkpoint()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await result.receive() == 7
    assert result._channel is not None
    assert_at_rest(result._channel)


@pytest.mark.parametrize("way", ["await", "receive", "select"])
async def test_a_cancelled_awaiter_leaves_nothing_and_the_task_goes_on(way: str) -> None:
    """Whoever waits may go; the task isn't told."""
    oracle = Oracle()

    async def wait(result: Result[Any]) -> None:
        if way == "await":
            await result
        elif way == "receive":
            await result.receive()
        else:
            await select(result)

    async with Group() as group:
        result = group.go(oracle, 7)
        for _ in range(3):
            with anyio.move_on_after(1) as scope:
                await wait(result)
            assert scope.cancelled_caught
        assert not result._waiting
        if result._channel is not None:
            assert_at_rest(result._channel)
        assert not result.done
        oracle.gate.set()
        await wait(result)
        assert await result == 7


async def test_a_watched_result_makes_no_channel_and_an_unwatched_one_nothing() -> None:
    """So that many tasks stay cheap."""
    oracle = Oracle()
    async with Group() as group:
        unwatched = group.go(oracle, 1)
        watched = group.go(oracle, 2)
        oracle.gate.set()
        await watched
    assert unwatched._waiting is None
    assert unwatched._channel is None
    assert watched._waiting is not None
    assert watched._channel is None
    # Nor does awaiting it when it is done.
    await unwatched
    assert unwatched.exception() is None
    assert unwatched._waiting is None
    assert unwatched._channel is None


async def test_done_exception_and_attempts() -> None:
    """What can be asked at any time."""
    oracle = Oracle()
    error = ValueError("bad")
    async with WorkerGroup(oracle, workers=1) as workers:
        value, failure = workers.submit_nowait(7), workers.submit_nowait(error)
        for result in value, failure:
            assert not result.done
            with pytest.raises(WouldBlock):
                result.exception()
        await wait_all_tasks_blocked()
        assert (value.attempts, failure.attempts) == (1, 0)
        oracle.gate.set()
        await wait_all_tasks_blocked()
        assert value.done
        assert failure.done
        assert value.exception() is None
        assert failure.exception() is error
        assert (value.attempts, failure.attempts) == (1, 1)


async def test_cancelling_what_is_done_does_nothing() -> None:
    """The first end counts."""
    async with Group() as group:
        result = group.go(anyio.sleep, 0)
        await result
        result.cancel()
        assert result.exception() is None
        assert await result is None


async def test_repr_shows_the_outcome() -> None:
    """Pending, the value, or the error."""
    oracle = Oracle()
    async with WorkerGroup(oracle) as workers:
        value, failure = workers.submit_nowait(7), workers.submit_nowait(ValueError("bad"))
        assert repr(value) == f"<Result pending at {id(value):#x}>"
        oracle.gate.set()
        await wait_all_tasks_blocked()
        assert repr(value) == f"<Result 7 at {id(value):#x}>"
        assert repr(failure) == f"<Result ValueError('bad') at {id(failure):#x}>"
        assert failure.exception() is not None


def test_being_cancelled_is_a_broken_resource() -> None:
    """So that code written for anyio's streams takes it as it takes a peer that went away."""
    assert issubclass(ResultCancelledError, BrokenResourceError)


async def test_none_is_a_value() -> None:
    """A task that returns nothing is done all the same."""
    async with Group() as group:
        result = group.go(anyio.sleep, 1)
        assert await result.receive() is None
        assert result.done


async def test_awaiting_in_another_event_loop_is_refused() -> None:
    """Done or not."""
    message = whole("this result belongs to another event loop; use it there, as with anyio.from_thread.run")

    async def elsewhere() -> None:
        await result

    def other_loops() -> None:
        for backend in "asyncio", "trio":
            with pytest.raises(RuntimeError, match=message):
                anyio.run(elsewhere, backend=backend)

    async with Group() as group:
        result = group.go(Event().wait)
        await anyio.to_thread.run_sync(other_loops)
        result.cancel()
        await wait_all_tasks_blocked()
        assert result.done
        await anyio.to_thread.run_sync(other_loops)


async def test_receiving_in_another_event_loop_is_refused() -> None:
    """As from any channel of another loop."""
    message = whole(
        "channel 'result' belongs to another event loop; call channel.from_thread() there, and use here what it returns"
    )

    async def receive() -> None:
        await result.receive()

    async def choose() -> None:
        await select(result)

    def other_loops() -> None:
        for backend in "asyncio", "trio":
            for way in receive, choose:
                with pytest.raises(RuntimeError, match=message):
                    anyio.run(way, backend=backend)
        with pytest.raises(RuntimeError, match=message):
            result.receive_nowait()

    async with Group() as group:
        result = group.go(Event().wait)
        await anyio.to_thread.run_sync(other_loops)
        group.cancel()


async def test_awaiting_what_is_done_is_a_checkpoint_every_so_often() -> None:
    """The shared budget counts it too: an interval of one lets another task run at each."""
    steps = 0

    async def count() -> None:
        nonlocal steps
        while True:
            steps += 1
            await anyio.lowlevel.checkpoint()

    set_checkpoint_interval(1)
    try:
        async with Group() as group:
            result = group.go(anyio.sleep, 0)
            await result
            counting = group.go(count)
            await anyio.lowlevel.checkpoint()
            before = steps
            for _ in range(10):
                await result
            assert steps - before >= 9
            counting.cancel()
    finally:
        set_checkpoint_interval()


class TestUnseenFailures:
    """Each is logged once, with its traceback, unless somebody looked."""

    @pytest.fixture(autouse=True)
    def _nothing_from_before(self, caplog: pytest.LogCaptureFixture) -> None:
        gc.collect()
        caplog.clear()

    async def test_logged_when_the_group_ends(self, caplog: pytest.LogCaptureFixture) -> None:
        """Though its result is still held."""
        oracle = Oracle()
        error = ValueError("bad")
        async with WorkerGroup(oracle) as workers:
            result = workers.submit_nowait(error)
            oracle.gate.set()
            await wait_all_tasks_blocked()
            assert result.done
            assert errors_logged(caplog) == []
        assert errors_logged(caplog) == ["job ValueError('bad') failed and nobody looked at its result"]
        assert caplog.records[0].exc_info == (ValueError, error, error.__traceback__)
        assert caplog.records[0].name == "chanflow"
        assert result.exception() is error
        del result
        gc.collect()
        assert len(errors_logged(caplog)) == 1

    async def test_logged_when_its_result_is_dropped(self, caplog: pytest.LogCaptureFixture) -> None:
        """Then nobody can look any more, and the end of the group doesn't log it again."""
        oracle = Oracle()
        async with WorkerGroup(oracle) as workers:
            workers.submit_nowait(ValueError("bad"))
            oracle.gate.set()
            await wait_all_tasks_blocked()
            gc.collect()
            assert errors_logged(caplog) == ["job ValueError('bad') failed and nobody looked at its result"]
        gc.collect()
        assert len(errors_logged(caplog)) == 1

    @pytest.mark.parametrize("way", ["await", "receive", "receive_nowait", "select", "exception"])
    async def test_not_logged_when_somebody_looked(self, caplog: pytest.LogCaptureFixture, way: str) -> None:
        """In whichever way."""
        oracle = Oracle()
        error = ValueError("bad")
        async with WorkerGroup(oracle) as workers:
            result = workers.submit_nowait(error)
            oracle.gate.set()
            await wait_all_tasks_blocked()
            if way == "exception":
                assert result.exception() is error
            else:
                with pytest.raises(ValueError, match=whole("bad")):
                    if way == "await":
                        await result
                    elif way == "receive":
                        await result.receive()
                    elif way == "receive_nowait":
                        result.receive_nowait()
                    else:
                        await select(result)
        del result
        gc.collect()
        assert errors_logged(caplog) == []

    async def test_not_logged_when_somebody_waits(self, caplog: pytest.LogCaptureFixture) -> None:
        """Who waits when it fails has looked, though the group ends in that very moment."""
        oracle = Oracle()
        caught = []

        async def wait_for(result: Result[Any]) -> None:
            try:
                await result
            except ValueError as error:
                caught.append(error)

        async with anyio.create_task_group() as tasks, WorkerGroup(oracle) as workers:
            tasks.start_soon(wait_for, workers.submit_nowait(ValueError("bad")))
            await wait_all_tasks_blocked()
            oracle.gate.set()
        gc.collect()
        assert len(caught) == 1
        assert errors_logged(caplog) == []

    async def test_not_logged_when_it_was_cancelled(self, caplog: pytest.LogCaptureFixture) -> None:
        """That was somebody's decision."""
        oracle = Oracle()
        async with WorkerGroup(oracle, workers=1) as workers:
            for result in [workers.submit_nowait(number) for number in range(3)]:
                result.cancel()
        gc.collect()
        assert errors_logged(caplog) == []
        assert workers.statistics().cancelled == 3

    async def test_not_logged_by_a_group_which_raises_it(self, caplog: pytest.LogCaptureFixture) -> None:
        """A Group's failures are raised on leaving it."""
        oracle = Oracle()
        with pytest.raises(ExceptionGroup):
            async with Group() as group:
                group.go(oracle, ValueError("bad"))
                oracle.gate.set()
        gc.collect()
        assert errors_logged(caplog) == []


async def test_only_the_first_end_counts() -> None:
    """What comes after the end changes nothing: a thread that returns after its timeout, say."""
    async with Group() as group:
        result = group.go(anyio.sleep, 0)
        await result
    result._succeed("again")
    assert result._fail(ValueError("late")) is None
    result._end_cancelled()
    assert await result is None
    assert result.exception() is None


async def test_when_done_calls_back_at_once_if_it_is() -> None:
    """Before the end it calls back at the end, after it at once, each time once."""
    oracle = Oracle()
    calls: list[Any] = []
    async with Group() as group:
        result = group.go(oracle, 7)
        result._when_done(calls.append)
        # A waiter that leaves sweeps the room, and callbacks stay.
        with anyio.move_on_after(1):
            await result
        assert calls == []
        oracle.gate.set()
        await result
        assert calls == [result]
        result._when_done(calls.append)
        assert calls == [result, result]
