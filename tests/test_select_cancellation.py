"""Selects that are cancelled, by a scope or natively, also in the tick of the hand-over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import WouldBlock, wait_all_tasks_blocked

from chanflow import Channel, Group, Send, after, select, select_nowait, set_checkpoint_interval, ticker
from tests.support.backends import native
from tests.support.channels import assert_at_rest
from tests.support.operations import keep

pytestmark = pytest.mark.anyio


def keep_now(kept: list[Any], operation: Callable[[], Any]) -> None:
    """Run an operation that doesn't wait, and keep its result unless it would have to wait."""
    try:
        kept.append(operation())
    except WouldBlock:
        return


# Cancellation at the checkpoint


async def test_select_cancelled_at_its_checkpoint() -> None:
    """The checkpoint of a ready select comes before the operation: cancelled there, it took nothing."""
    channel = Channel[int](1)
    set_checkpoint_interval(1)
    try:
        with anyio.CancelScope() as scope:
            channel.send_nowait(1)
            scope.cancel()
            await select(channel)
    finally:
        set_checkpoint_interval()
    assert scope.cancelled_caught
    assert channel.drain() == [1]
    assert_at_rest(channel)


# Cancellation in the tick of the hand-over, by scopes


@pytest.mark.parametrize("second_waits", [True, False])
async def test_scope_cancelled_after_the_hand_over(*, second_waits: bool) -> None:
    """A select that was handed an item before its scope is cancelled in that tick returns it, or passes it on."""
    channel, idle = Channel[int](), Channel[int]()
    kept: list[Any] = []
    scope = anyio.CancelScope()

    async def first() -> None:
        with scope:
            kept.append((await select(idle, channel)).item)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        await wait_all_tasks_blocked()
        if second_waits:
            tasks.start_soon(keep, kept, channel.receive)
            await wait_all_tasks_blocked()
        channel.send_nowait(1)
        scope.cancel()
        await wait_all_tasks_blocked()
        kept += channel.drain()
        assert kept == [1]
        tasks.cancel_scope.cancel()
    assert_at_rest(channel)
    assert_at_rest(idle)


async def test_scope_cancelled_before_the_hand_over() -> None:
    """A select whose scope was cancelled is no waiter any more: nothing is handed to it or taken from it."""
    inbox, outbox = Channel[int](), Channel[int]()
    scope = anyio.CancelScope()

    async def first() -> None:
        with scope:
            await select(inbox, Send(outbox, 1))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        await wait_all_tasks_blocked()
        scope.cancel()
        with pytest.raises(WouldBlock):
            inbox.send_nowait(1)
        with pytest.raises(WouldBlock):
            outbox.receive_nowait()
    assert scope.cancelled_caught
    assert (inbox.statistics().sent, outbox.statistics().sent) == (0, 0)
    assert_at_rest(inbox)
    assert_at_rest(outbox)


async def test_scope_cancelled_after_a_send_was_taken() -> None:
    """A Send that was taken before its scope is cancelled in that tick happened: the select returns."""
    channel, idle = Channel[int](), Channel[int]()
    kept: list[Any] = []
    scope = anyio.CancelScope()

    async def first() -> None:
        with scope:
            kept.append(await select(idle, Send(channel, 1)))
            await anyio.sleep(1)
            kept.append("not cancelled")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        await wait_all_tasks_blocked()
        assert channel.receive_nowait() == 1
        scope.cancel()
    assert kept == [(1, channel, None, False)]
    assert scope.cancelled_caught
    assert_at_rest(channel)
    assert_at_rest(idle)


# Native cancellation: asyncio only


class Attempt:
    """An asyncio task that runs one operation, then passes one checkpoint, and how to cancel it natively."""

    def __init__(self, how: str, operation: Callable[[], Awaitable[Any]]) -> None:
        self.how = how
        self._operation = operation
        self.happened: list[Any] = []
        self.went_on = False
        self.cancelling: list[int] = []
        self._failure = asyncio.Event()
        self._timeout = asyncio.timeout(None)
        self.task = asyncio.create_task(getattr(self, f"_by_{how}")())

    async def _run(self) -> None:
        self.happened.append(await self._operation())
        # The next checkpoint.
        await asyncio.sleep(0)
        self.went_on = True

    async def _by_cancel(self) -> None:
        await self._run()

    async def _by_timeout(self) -> None:
        try:
            async with self._timeout:
                await self._run()
        finally:
            self.cancelling.append(self.task.cancelling())

    async def _by_group(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._fail())
                await self._run()
        finally:
            self.cancelling.append(self.task.cancelling())

    async def _by_child(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._fail())
            group.create_task(self._run())

    async def _fail(self) -> None:
        await self._failure.wait()
        msg = "abort"
        raise OSError(msg)

    def cancel(self, first: Callable[[], Any] = lambda: None) -> None:
        """Cancel, after doing something else in the very tick, which the task does not see before."""
        loop = asyncio.get_running_loop()
        if self.how == "cancel":
            first()
            self.task.cancel()
        elif self.how == "timeout":
            # In the loop's queue: the hand-over, the timeout, then what the hand-over woke.
            loop.call_soon(first)
            self._timeout.reschedule(loop.time())
        else:
            # In the loop's queue: the failing task, the hand-over, the abort, then what the hand-over woke.
            self._failure.set()
            loop.call_soon(first)

    async def end(self) -> None:
        """Wait for the task, and check that it ended as such a cancellation ends it."""
        await asyncio.wait([self.task])
        if self.how == "cancel":
            assert self.task.cancelled()
            return
        error = self.task.exception()
        if self.how == "timeout":
            assert isinstance(error, TimeoutError)
        else:
            assert isinstance(error, ExceptionGroup)
            assert [str(one) for one in error.exceptions] == ["abort"]
        assert self.cancelling in ([], [0])


natively = pytest.mark.parametrize("how", ["cancel", "timeout", "group", "child"])


@native
@natively
async def test_native_cancellation_while_waiting(how: str) -> None:
    """A natively cancelled select took and sent nothing, and waits nowhere any more."""
    inbox, outbox = Channel[int](), Channel[int]()
    attempt = Attempt(how, lambda: select(inbox, Send(outbox, 1), after(1_000)))
    await wait_all_tasks_blocked()
    attempt.cancel()
    await attempt.end()
    assert attempt.happened == []
    assert (inbox.statistics().sent, outbox.statistics().sent) == (0, 0)
    assert len(inbox._state.receivers) == len(outbox._state.senders) == 0
    assert_at_rest(inbox)
    assert_at_rest(outbox)


@native
@natively
@pytest.mark.parametrize("next_waits", ["receive", "select", "nobody"])
async def test_native_cancellation_in_the_tick_of_the_hand_over(how: str, next_waits: str) -> None:
    """An item handed to a select that is natively cancelled in that tick goes to the next, or stays."""
    channel, idle = Channel[int](), Channel[int]()
    kept: list[Any] = []
    attempt = Attempt(how, lambda: select(idle, channel))
    await wait_all_tasks_blocked()
    if next_waits == "receive":
        waiting = asyncio.create_task(keep(kept, channel.receive))
    elif next_waits == "select":
        waiting = asyncio.create_task(keep(kept, lambda: select(channel, idle)))
    else:
        waiting = asyncio.create_task(keep(kept, partial(asyncio.sleep, 0, "nobody")))
    await wait_all_tasks_blocked()
    attempt.cancel(first=lambda: channel.send_nowait(1))
    await attempt.end()
    await waiting
    assert attempt.happened == []
    assert channel.drain() == ([1] if next_waits == "nobody" else [])
    assert kept == [{"receive": 1, "select": (0, channel, 1, False), "nobody": "nobody"}[next_waits]]
    assert_at_rest(channel)
    assert_at_rest(idle)


@native
@natively
async def test_native_cancellation_in_the_tick_in_which_a_send_was_taken(how: str) -> None:
    """A Send that was taken happened: the select returns, and the cancellation arrives at the next checkpoint."""
    channel, idle = Channel[int](), Channel[int]()
    taken: list[int] = []
    attempt = Attempt(how, lambda: select(idle, Send(channel, 1)))
    await wait_all_tasks_blocked()
    attempt.cancel(first=lambda: taken.append(channel.receive_nowait()))
    await attempt.end()
    assert taken == [1]
    assert attempt.happened == [(1, channel, None, False)]
    assert not attempt.went_on
    assert_at_rest(channel)
    assert_at_rest(idle)


@native
async def test_cancelling_is_right_after_a_late_cancellation() -> None:
    """A task that was cancelled too late counts as many requests after the select as were made, with their message."""
    channel = Channel[int]()
    seen: list[Any] = []

    async def sender() -> None:
        task = asyncio.current_task()
        assert task is not None
        await select(Send(channel, 1))
        seen.append(task.cancelling())
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError as error:
            seen.extend([task.cancelling(), error.args])
            task.uncancel()
        # It arrives once.
        await asyncio.sleep(1)
        seen.append(task.cancelling())

    task = asyncio.create_task(sender())
    await wait_all_tasks_blocked()
    assert channel.receive_nowait() == 1
    task.cancel("too late")
    await task
    assert seen == [1, 1, ("too late",), 0]
    assert_at_rest(channel)


@native
async def test_timeout_that_comes_too_late() -> None:
    """`asyncio.timeout` around nothing but a Send that was taken neither raises nor leaves a request behind."""
    channel = Channel[int]()
    timeout = asyncio.timeout(None)
    kept: list[Any] = []

    async def sender() -> None:
        async with timeout:
            kept.append(await select(Send(channel, 1)))
        task = asyncio.current_task()
        assert task is not None
        kept.append(task.cancelling())
        await asyncio.sleep(1)
        kept.append(task.cancelling())

    task = asyncio.create_task(sender())
    await wait_all_tasks_blocked()
    loop = asyncio.get_running_loop()
    loop.call_soon(channel.receive_nowait)
    timeout.reschedule(loop.time())
    await task
    assert timeout.expired()
    assert kept == [(0, channel, None, False), 0, 0]
    assert_at_rest(channel)


@native
async def test_late_timeout_while_cleaning_up_after_a_cancellation() -> None:
    """A late timeout that was withdrawn doesn't cancel a task again that is ending because of an earlier request."""
    channel = Channel[int]()
    timeout = asyncio.timeout(None)
    kept: list[Any] = []

    async def sender() -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await asyncio.sleep(1_000)
        finally:
            async with timeout:
                kept.append(await select(Send(channel, 1)))
            kept.append(task.cancelling())
            await asyncio.sleep(1)
            kept.append("cleaned up")

    task = asyncio.create_task(sender())
    await wait_all_tasks_blocked()
    task.cancel()
    await wait_all_tasks_blocked()
    loop = asyncio.get_running_loop()
    loop.call_soon(channel.receive_nowait)
    timeout.reschedule(loop.time())
    await asyncio.wait([task])
    assert kept == [(0, channel, None, False), 1, "cleaned up"]
    assert_at_rest(channel)


@native
@pytest.mark.parametrize("hops", range(6))
@pytest.mark.parametrize("sends", [True, False])
async def test_wait_for_around_a_hand_over(hops: int, *, sends: bool) -> None:
    """Wherever `asyncio.wait_for` ends about the hand-over, the item is delivered or not, and it tells which."""
    channel, idle = Channel[int](), Channel[int]()
    loop = asyncio.get_running_loop()
    cases = (idle, Send(channel, 1)) if sends else (idle, channel)
    got: list[int] = []

    def hand_over(left: int) -> None:
        if left:
            loop.call_soon(hand_over, left - 1)
        elif sends:
            keep_now(got, channel.receive_nowait)
        else:
            keep_now(got, lambda: channel.send_nowait(1))

    due = loop.time() + 1
    early = hops % 2
    if early:
        loop.call_at(due, hand_over, hops // 2)
    kept: list[Any] = []
    task = asyncio.create_task(keep(kept, lambda: asyncio.wait_for(select(*cases), 1)))
    await asyncio.sleep(0)
    if not early:
        loop.call_at(due, hand_over, hops // 2)
    await task
    await asyncio.sleep(1)
    assert task.cancelling() == 0
    happened = not isinstance(kept[0], TimeoutError)
    if sends:
        assert got == ([1] if happened else [])
    else:
        assert channel.drain() == ([1] if got and not happened else [])
    if happened:
        assert kept == [(1, channel, None if sends else 1, False)]
    assert_at_rest(channel)
    assert_at_rest(idle)


@native
@pytest.mark.parametrize("sends", [True, False])
async def test_cancelled_in_the_tick_of_closing(*, sends: bool) -> None:
    """A native cancellation in the tick in which a channel is closed wins: nothing happened that would be lost."""
    channel = Channel[int]()
    task = asyncio.create_task(select(Send(channel, 1) if sends else channel))
    await wait_all_tasks_blocked()
    channel.close()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert channel.statistics().sent == 0
    assert_at_rest(channel)


@native
async def test_cancelled_in_the_tick_in_which_a_timer_came() -> None:
    """A native cancellation in the tick of a timer wins, and the timer is still to happen."""
    timer = after(1.0)
    task = asyncio.create_task(select(timer))
    loop = asyncio.get_running_loop()
    await asyncio.sleep(0)
    # The select's own timer was set before this one.
    loop.call_at(timer._due, task.cancel)
    await asyncio.wait([task])
    assert task.cancelled()
    assert select_nowait(timer).channel is timer


@native
async def test_cancelled_in_the_tick_in_which_a_ticker_is_closed() -> None:
    """A native cancellation in the tick in which a ticker is closed wins."""
    with ticker(1.0) as ticks:
        task = asyncio.create_task(select(ticks))
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert len(ticks._room) == 0


@native
async def test_cancelled_in_the_tick_in_which_a_result_came() -> None:
    """The one item of a Result is there for the next who selects it."""
    go_on = asyncio.Event()

    async def task() -> str:
        await go_on.wait()
        return "value"

    async with Group() as group:
        result = group.go(task)
        waiting = asyncio.create_task(select(result))
        await wait_all_tasks_blocked()
        result._when_done(lambda _: waiting.cancel())
        go_on.set()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        assert await select(result) == (0, result, "value", False)
    assert_at_rest(result._as_channel())
