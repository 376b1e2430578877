"""Groups of tasks: limits, turns, and the ways in which they end."""

# ruff: noqa: PT012 -- a group raises when its block is left

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import Event, WouldBlock, wait_all_tasks_blocked

from chanflow import Group, Result, ResultCancelledError
from tests.support.messages import whole
from tests.support.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio

OUTSIDE = "a Group may only start tasks inside of its `async with` block, in the same event loop"


def assert_nothing_left(group: Group) -> None:
    """Check that nothing of a group is left, once its block is."""
    assert not group._running
    assert not group._waiting
    assert group._home is None


async def double(number: int) -> int:
    await anyio.sleep(1)
    return number * 2


async def fail(error: BaseException) -> None:
    await anyio.sleep(1)
    raise error


async def forever() -> None:
    await anyio.sleep_forever()


class Meter:
    """A task that counts how many of its kind run."""

    def __init__(self) -> None:
        self.running = 0
        self.most = 0
        self.started: list[int] = []

    async def __call__(self, number: int) -> int:
        self.running += 1
        self.most = max(self.most, self.running)
        self.started.append(number)
        try:
            await anyio.sleep(1)
        finally:
            self.running -= 1
        return number


async def test_results_are_awaited_in_any_order() -> None:
    """Each task has its own result; virtual time passes at once."""
    start = anyio.current_time()
    async with Group() as group:
        results = [group.go(double, number) for number in range(3)]
        assert [await result for result in reversed(results)] == [4, 2, 0]
    assert anyio.current_time() - start == pytest.approx(1)
    assert_nothing_left(group)


@pytest.mark.parametrize("limit", [1, 2, 3])
async def test_the_limit_holds_and_turns_are_first_come_first_served(limit: int) -> None:
    """Never more than `limit` run, never fewer while some wait, and they start in the order in which they came."""
    meter = Meter()
    start = anyio.current_time()
    async with Group(limit=limit) as group:
        results = [group.go(meter, number) for number in range(6)]
        assert repr(group) == f"<Group {limit} running, {6 - limit} waiting, limit {limit}>"
    assert [await result for result in results] == list(range(6))
    assert meter.most == limit
    # Those that needn't wait start together, and trio starts such in any order.
    assert sorted(meter.started[:limit]) == list(range(limit))
    assert [number // limit for number in meter.started] == [number // limit for number in range(6)]
    assert anyio.current_time() - start == pytest.approx(6 / limit)
    assert_nothing_left(group)


async def test_turns_are_taken_strictly_in_order() -> None:
    """With a limit of one, the order is the one of the calls, also for tasks that come while others wait."""
    meter = Meter()
    async with Group(limit=1) as group:
        for number in range(4):
            group.go(meter, number)
        await anyio.sleep(1.5)
        for number in range(4, 8):
            group.go(meter, number)
    assert meter.started == list(range(8))
    assert_nothing_left(group)


async def test_go_never_blocks() -> None:
    """It is a plain function: nothing has run when it returns, however many wait already."""
    meter = Meter()
    async with Group(limit=1) as group:
        results = [group.go(meter, number) for number in range(1000)]
        assert not meter.started
        assert not any(result.done for result in results)
        group.cancel()
    assert_nothing_left(group)


async def test_without_a_limit_all_run_at_once() -> None:
    """The default has no bound."""
    meter = Meter()
    async with Group() as group:
        for number in range(100):
            group.go(meter, number)
    assert meter.most == 100


async def test_tasks_may_start_tasks() -> None:
    """A task starts others while the block is left already, and leaving waits for them too."""
    done = []

    async def grow(depth: int) -> None:
        await anyio.sleep(1)
        done.append(depth)
        if depth:
            group.go(grow, depth - 1)

    async with Group() as group:
        group.go(grow, 3)
    assert done == [3, 2, 1, 0]
    assert_nothing_left(group)


async def test_the_first_failure_cancels_the_rest() -> None:
    """Of a failure, those that run are cancelled, the block too, and leaving raises it in a group."""
    error = ValueError("first")
    went_on = False
    with pytest.raises(ExceptionGroup) as caught:
        async with Group() as group:
            failing = group.go(fail, error)
            running = group.go(forever)
            await anyio.sleep(2)
            went_on = True
    assert caught.value.exceptions == (error,)
    assert not went_on
    assert failing.exception() is error
    with pytest.raises(ResultCancelledError, match=whole("the task was cancelled")):
        await running  # pyright: ignore[reportGeneralTypeIssues] # bound in the block
    assert_nothing_left(group)


@pytest.mark.parametrize("waiters", [0, 1, 2])
async def test_each_error_is_raised_once(waiters: int) -> None:
    """The block and other tasks that await the failing result raise the same error, which is in the group once."""
    error = ValueError("once")

    async def wait_for(result: Result[None]) -> None:
        await result

    with pytest.raises(ExceptionGroup) as caught:
        async with Group() as group:
            result = group.go(fail, error)
            for _ in range(waiters):
                group.go(wait_for, result)
            await result
    assert caught.value.exceptions == (error,)
    assert_nothing_left(group)


async def test_failures_in_one_tick_are_all_raised() -> None:
    """Errors of different tasks that fail before the cancellation reaches them are each in the group."""
    errors = [ValueError("a"), KeyError("b")]
    with pytest.raises(ExceptionGroup) as caught:
        async with Group() as group:
            for error in errors:
                group.go(fail, error)
    assert set(map(id, caught.value.exceptions)) <= set(map(id, errors))
    assert_nothing_left(group)


async def test_after_a_failure_those_that_wait_never_start() -> None:
    """The place of the one that failed goes to nobody."""
    meter = Meter()
    with pytest.raises(ExceptionGroup) as caught:
        async with Group(limit=1) as group:
            group.go(fail, ValueError("first"))
            waiting = [group.go(meter, number) for number in range(3)]
    assert [repr(error) for error in caught.value.exceptions] == ["ValueError('first')"]
    assert not meter.started
    assert all(isinstance(result.exception(), ResultCancelledError) for result in waiting)
    assert [result.attempts for result in waiting] == [0, 0, 0]
    assert_nothing_left(group)


async def test_regression_those_that_wait_do_not_start_after_a_base_exception() -> None:
    """An error that is no Exception ends the group as well, before the next in turn is started."""

    class Ending(BaseException):
        pass

    meter = Meter()
    with pytest.raises(BaseExceptionGroup) as caught:
        async with Group(limit=1) as group:
            group.go(fail, Ending())
            waiting = group.go(meter, 1)
    assert [type(error) for error in caught.value.exceptions] == [Ending]
    assert not meter.started
    assert isinstance(waiting.exception(), ResultCancelledError)
    assert_nothing_left(group)


async def test_after_an_outer_cancellation_those_that_wait_never_start() -> None:
    """The tasks end one by one, and none of them hands its place on."""
    meter = Meter()
    with anyio.CancelScope() as scope:
        async with Group(limit=2) as group:
            results = [group.go(meter, number) for number in range(6)]
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert sorted(meter.started) == [0, 1]
    assert all(isinstance(result.exception(), ResultCancelledError) for result in results)
    assert_nothing_left(group)


async def test_an_error_in_the_block_cancels_the_tasks() -> None:
    """It is raised in a group, as a task's is."""
    error = ValueError("block")
    with pytest.raises(ExceptionGroup) as caught:
        async with Group(limit=1) as group:
            running = group.go(forever)
            waiting = group.go(forever)
            raise error
    assert caught.value.exceptions == (error,)
    for result in running, waiting:
        assert isinstance(result.exception(), ResultCancelledError)
    assert_nothing_left(group)


async def test_cancel_ends_tasks_and_block_quietly() -> None:
    """Cancelling on purpose is no error."""
    went_on = False
    async with Group(limit=1) as group:
        running = group.go(forever)
        waiting = group.go(forever)
        group.cancel()
        await anyio.sleep(1)
        went_on = True
    assert not went_on
    for result in running, waiting:
        assert isinstance(result.exception(), ResultCancelledError)
    group.cancel()
    assert_nothing_left(group)


async def test_cancel_before_entering_does_nothing() -> None:
    """There is nothing to cancel yet."""
    group = Group()
    group.cancel()
    async with group:
        assert await group.go(double, 1) == 2


async def test_one_task_is_cancelled_and_the_group_goes_on() -> None:
    """Result.cancel on a running task ends only that one, and the next in turn starts."""
    async with Group(limit=1) as group:
        running = group.go(forever)
        behind = group.go(double, 4)
        await wait_all_tasks_blocked()
        running.cancel()
        running.cancel()
        assert not running.done
        assert await behind == 8
    assert isinstance(running.exception(), ResultCancelledError)
    assert running.attempts == 1
    assert_nothing_left(group)


async def test_a_task_cancelled_before_its_turn_is_passed_over() -> None:
    """Those behind it keep their turns, and it is done at once."""
    meter = Meter()
    async with Group(limit=1) as group:
        results = [group.go(meter, number) for number in range(4)]
        for number in 1, 2:
            results[number].cancel()
            assert results[number].done
        assert not results[0].done
    assert meter.started == [0, 3]
    assert [result.attempts for result in results] == [1, 0, 0, 1]
    assert_nothing_left(group)


async def test_a_task_that_was_cancelled_but_returns_anyway_succeeds() -> None:
    """What it gave is its result, as if the cancellation had come too late."""

    async def stubborn() -> str:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(1)
        return "done"

    async with Group() as group:
        result = group.go(stubborn)
        await wait_all_tasks_blocked()
        result.cancel()
        assert await result == "done"
    assert_nothing_left(group)


async def test_a_task_that_fails_while_it_is_cancelled_fails_the_group() -> None:
    """An error in its cleanup is an error."""
    error = ValueError("cleanup")

    async def clumsy() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            raise error

    with pytest.raises(ExceptionGroup) as caught:
        async with Group() as group:
            result = group.go(clumsy)
            await wait_all_tasks_blocked()
            result.cancel()
    assert caught.value.exceptions == (error,)
    assert result.exception() is error
    assert_nothing_left(group)


async def test_go_outside_of_the_block_is_refused() -> None:
    """Neither before nor after it, nor from a thread."""
    group = Group()
    with pytest.raises(RuntimeError, match=whole(OUTSIDE)):
        group.go(double, 1)
    async with group:
        with pytest.raises(RuntimeError, match=whole(OUTSIDE)):
            await anyio.to_thread.run_sync(group.go, double, 1)
    with pytest.raises(RuntimeError, match=whole(OUTSIDE)):
        group.go(double, 1)
    assert_nothing_left(group)


async def test_go_from_another_event_loop_is_refused() -> None:
    """A group belongs to the loop that it was entered in."""

    async def elsewhere() -> None:
        group.go(double, 1)

    async with Group() as group:
        for backend in "asyncio", "trio":
            with pytest.raises(RuntimeError, match=whole(OUTSIDE)):
                await anyio.to_thread.run_sync(partial(anyio.run, elsewhere, backend=backend))
    assert_nothing_left(group)


async def test_a_group_is_entered_once() -> None:
    """Neither again while it is open, nor afterwards."""
    group = Group()
    async with group:
        with pytest.raises(RuntimeError, match=whole("a Group may only be entered once")):
            await group.__aenter__()
    with pytest.raises(RuntimeError, match=whole("a Group may only be entered once")):
        await group.__aenter__()


async def test_what_is_no_function_is_refused() -> None:
    """A coroutine instead of a function is the common mistake; the group goes on."""
    coroutine = double(1)
    async with Group() as group:
        with pytest.raises(TypeError, match=whole(f"fn must be an async function, got {coroutine!r}")):
            group.go(coroutine)  # type: ignore[arg-type]
        coroutine.close()
        assert await group.go(double, 1) == 2
    assert_nothing_left(group)


async def test_a_function_that_returns_no_awaitable_fails() -> None:
    """A sync function is told from an async one by what it returns."""
    fn: Any = int
    with pytest.raises(ExceptionGroup) as caught:
        async with Group() as group:
            group.go(fn)
    [error] = caught.value.exceptions
    assert repr(error) == """TypeError('fn must be an async function, but int returned 0')"""
    assert_nothing_left(group)


async def test_a_function_that_raises_before_it_returns_fails_the_group() -> None:
    """As if it had failed after."""

    def broken() -> Awaitable[None]:
        msg = "no awaitable"
        raise ValueError(msg)

    with pytest.raises(ExceptionGroup) as caught:
        async with Group() as group:
            result = group.go(broken)
    assert caught.value.exceptions == (result.exception(),)
    assert_nothing_left(group)


@pytest.mark.parametrize(
    ("limit", "error"),
    [
        (0, ValueError("limit must be >= 1, got 0")),
        (-1, ValueError("limit must be >= 1, got -1")),
        (True, TypeError("limit must be an int, got True")),
        (1.5, TypeError("limit must be an int, got 1.5")),
        ("3", TypeError("limit must be an int, got '3'")),
    ],
)
def test_limits_are_checked(limit: Any, error: Exception) -> None:
    """The error names the argument, the rule and the value."""
    with pytest.raises(type(error), match=whole(str(error))):
        Group(limit)


async def test_a_task_sees_the_context_of_its_caller() -> None:
    """Also when it waited for its turn, and was started when another task had ended."""
    variable: ContextVar[str] = ContextVar("variable", default="none")

    async def look(replacement: str) -> str:
        seen = variable.get()
        variable.set(replacement)
        await anyio.sleep(1)
        return seen

    async with Group(limit=1) as group:
        results = []
        for value in "a", "b", "c":
            variable.set(value)
            results.append(group.go(look, f"changed by {value}"))
        variable.set("later")
        assert [await result for result in results] == ["a", "b", "c"]
        assert variable.get() == "later"
    assert_nothing_left(group)


async def test_a_block_that_awaits_nothing_still_waits_for_the_tasks() -> None:
    """Leaving is the wait."""
    async with Group(limit=2) as group:
        results = [group.go(double, number) for number in range(5)]
    assert [result.receive_nowait() for result in results] == [0, 2, 4, 6, 8]
    assert_nothing_left(group)


async def test_a_value_that_is_awaitable_once_is_passed_through() -> None:
    """Whatever can be awaited will do, not only a coroutine."""

    async def inner() -> int:
        return 3

    class Once:
        def __await__(self) -> Any:
            return inner().__await__()

    async with Group() as group:
        assert await group.go(Once) == 3


async def test_nested_groups() -> None:
    """An inner group's failure is the outer block's error."""
    error = ValueError("inner")
    with pytest.raises(ExceptionGroup) as caught:
        async with Group() as outer:
            other = outer.go(forever)
            async with Group() as inner:
                inner.go(fail, error)
    [nested] = caught.value.exceptions
    assert isinstance(nested, ExceptionGroup)
    assert nested.exceptions == (error,)
    assert isinstance(other.exception(), ResultCancelledError)
    assert_nothing_left(outer)
    assert_nothing_left(inner)


async def test_a_task_may_use_anyio_scopes_around_a_group() -> None:
    """A timeout around a group ends it, and raises TimeoutError and nothing else."""
    with pytest.raises(TimeoutError):
        with anyio.fail_after(1):
            async with Group(limit=1) as group:
                group.go(forever)
                waiting = group.go(forever)
    assert isinstance(waiting.exception(), ResultCancelledError)
    assert_nothing_left(group)


async def test_leaving_during_a_pending_cancellation() -> None:
    """A group that is left in a cancelled scope starts nothing more."""
    meter = Meter()
    with anyio.CancelScope() as scope:
        async with Group(limit=1) as group:
            group.go(meter, 0)
            group.go(meter, 1)
            await wait_all_tasks_blocked()
            scope.cancel()
            # No checkpoint: the cancellation arrives in __aexit__.
    assert meter.started == [0]
    assert_nothing_left(group)


def run_natively(main: Callable[[], Any]) -> None:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())


@pytest.mark.parametrize("anyio_backend", ["asyncio"])
class TestNativeCancellation:
    def test_of_the_block(self, anyio_backend: str) -> None:
        """`task.cancel()` on the task in the block cancels the tasks, and arrives there."""
        groups = []

        async def block() -> None:
            async with Group(limit=1) as group:
                groups.append(group)
                group.go(forever)
                group.go(forever)
                await asyncio.sleep(1000)

        async def main() -> None:
            task = asyncio.create_task(block())
            await asyncio.sleep(1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert_nothing_left(groups[0])

        run_natively(main)

    def test_asyncio_timeout(self, anyio_backend: str) -> None:
        """`asyncio.timeout` around a group fires once, and leaves no cancellation behind."""

        async def main() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(1), Group() as group:
                    group.go(forever)
            current = asyncio.current_task()
            assert current is not None
            assert current.cancelling() == 0
            await asyncio.sleep(0)
            assert_nothing_left(group)

        run_natively(main)

    def test_of_an_awaiter(self, anyio_backend: str) -> None:
        """In the tick of the end too: the result stays for the others."""

        async def wait_for(result: Result[int]) -> int:
            return await result

        async def main() -> None:
            gate = Event()

            async def gated() -> int:
                await gate.wait()
                return 7

            async with Group() as group:
                result = group.go(gated)
                awaiters = [asyncio.create_task(wait_for(result)) for _ in range(3)]
                await asyncio.sleep(1)
                awaiters[0].cancel()
                await asyncio.sleep(1)
                assert not result.done
                gate.set()
                while not result.done:  # noqa: ASYNC110 -- the very tick is wanted
                    await asyncio.sleep(0)
                awaiters[1].cancel()
                outcomes = await asyncio.gather(*awaiters, return_exceptions=True)
                assert isinstance(outcomes[0], asyncio.CancelledError)
                assert outcomes[2] == 7
                assert await result == 7
                assert not result._waiting

        run_natively(main)


async def test_results_are_looked_at_without_waiting() -> None:
    """From the block, while others run."""
    async with Group() as group:
        result = group.go(double, 2)
        with pytest.raises(WouldBlock):
            result.receive_nowait()
        await anyio.sleep(2)
        assert result.receive_nowait() == 4


async def test_go_is_quick_from_inside_a_cancelled_group() -> None:
    """A task started in a group that is being cancelled is cancelled at its first wait."""
    results: list[Result[Any]] = []

    async def last_words() -> None:
        try:
            await anyio.sleep_forever()
        finally:
            results.append(group.go(forever))

    async with Group() as group:
        group.go(last_words)
        await wait_all_tasks_blocked()
        group.cancel()
    assert isinstance(results[0].exception(), ResultCancelledError)
    assert_nothing_left(group)


def test_threads_leave_no_trace() -> None:
    """The tests of this module leave no thread of their own behind."""
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("chanflow")]
