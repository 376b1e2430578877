"""`select` on None, on what is closed or broken, and on results of tasks that failed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream, WouldBlock, wait_all_tasks_blocked

from chanflow import Channel, Group, Result, Send, after, select, select_nowait
from tests.support.backends import native
from tests.support.channels import assert_at_rest
from tests.support.messages import whole
from tests.support.operations import keep

pytestmark = pytest.mark.anyio


# None, closed and broken


@pytest.mark.parametrize("cases", [(), (None,), (None, None)])
async def test_only_none_waits_until_cancelled(cases: tuple[None, ...]) -> None:
    """Without any case but None, `select` waits for ever, and `select_nowait` has nothing."""
    with anyio.move_on_after(1_000_000) as scope:
        await select(*cases)
    assert scope.cancelled_caught
    with pytest.raises(WouldBlock, match=whole("")):
        select_nowait(*cases)


async def test_closed_and_drained_is_always_ready() -> None:
    """A closed channel first gives what is in it, and is ready with `closed` from then on."""
    channel, idle = Channel[int](2), Channel[int]()
    channel.send_nowait(1)
    channel.close()
    assert await select(idle, channel) == (1, channel, 1, False)
    for _ in range(3):
        assert await select(idle, channel) == (1, channel, None, True)
        assert select_nowait(channel) == (0, channel, None, True)
    assert_at_rest(channel)
    assert_at_rest(idle)


async def test_closed_while_waiting() -> None:
    """Closing wakes every select that waits to receive, each with `closed`."""
    channel, idle = Channel[int](), Channel[int]()
    kept: list[Any] = []
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(keep, kept, lambda: select(idle, channel))
        await wait_all_tasks_blocked()
        channel.close()
    assert kept == [(1, channel, None, True)] * 3
    assert_at_rest(channel)
    assert_at_rest(idle)


async def test_send_to_closed_channel() -> None:
    """Sending to a closed channel raises if that case happens, which needs no other to be ready."""
    out, idle, ready = Channel[int](1, "out"), Channel[int](), Channel[int](1)
    out.close()
    ready.send_nowait(1)
    assert (await select(ready, Send(out, 1), priority=True)).item == 1
    with pytest.raises(ClosedResourceError, match=whole("channel 'out' is closed")):
        await select(idle, Send(out, 1))
    with pytest.raises(ClosedResourceError, match=whole("channel 'out' is closed")):
        select_nowait(idle, Send(out, 1))
    assert_at_rest(out, idle, ready)


async def test_send_to_broken_channel() -> None:
    """Sending to a channel without receivers raises, with and without waiting."""
    out, idle = Channel[int](1, "out"), Channel[int]()
    out.receiver.close()
    with pytest.raises(BrokenResourceError, match=whole("channel 'out' has no receiver left")):
        await select(idle, Send(out, 1))
    with pytest.raises(BrokenResourceError, match=whole("channel 'out' has no receiver left")):
        select_nowait(idle, Send(out, 1))
    assert_at_rest(out)
    assert_at_rest(idle)


@pytest.mark.parametrize(
    ("end_it", "error", "message"),
    [
        (lambda channel: channel.close(), ClosedResourceError, "channel 'out' is closed"),
        (lambda channel: channel.sender.close(), ClosedResourceError, "channel 'out' is closed"),
        (lambda channel: channel.receiver.close(), BrokenResourceError, "channel 'out' has no receiver left"),
    ],
    ids=["channel", "sending end", "receiving end"],
)
async def test_send_ended_while_waiting(
    end_it: Callable[[Channel[int]], None], error: type[Exception], message: str
) -> None:
    """A select that waits to send gets the error of what was closed, and its item is not sent."""
    out, idle = Channel[int](0, "out"), Channel[int]()
    kept: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(idle, Send(out.sender, 1)))
        await wait_all_tasks_blocked()
        end_it(out)
    assert [(type(kept[0]), str(kept[0]))] == [(error, message)]
    assert out.statistics().sent == 0
    assert_at_rest(out)
    assert_at_rest(idle)
    out.sender.close()


async def test_receiving_end_closed_while_waiting() -> None:
    """Closing the end that a select waits on ends that select, and no other."""
    channel, idle = Channel[int](0, "in"), Channel[int]()
    clone = channel.receiver.clone()
    kept: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(idle, clone))
        await wait_all_tasks_blocked()
        tasks.start_soon(keep, kept, lambda: select(idle, channel.receiver))
        await wait_all_tasks_blocked()
        clone.close()
        await wait_all_tasks_blocked()
        assert [(type(error), str(error)) for error in kept] == [(ClosedResourceError, "channel 'in' is closed")]
        channel.send_nowait(1)
    assert kept[1:] == [(1, channel.receiver, 1, False)]
    channel.receiver.close()
    assert_at_rest(channel)
    assert_at_rest(idle)


async def test_handed_over_before_its_end_was_closed() -> None:
    """An item handed to a select is received although the end is closed before the select runs."""
    channel = Channel[int]()
    clone = channel.receiver.clone()
    kept: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(clone))
        await wait_all_tasks_blocked()
        channel.send_nowait(1)
        clone.close()
    assert kept == [(0, clone, 1, False)]
    channel.receiver.close()
    assert_at_rest(channel)


async def test_ends_closed_before() -> None:
    """A closed end as a case is an error that says whose end it is."""
    channel = Channel[int](1, "both")
    sender, receiver = channel.sender.clone(), channel.receiver.clone()
    sender.close()
    receiver.close()
    for case in (receiver, Send(sender, 1)):
        with pytest.raises(ClosedResourceError, match=whole("this end of channel 'both' is closed")):
            await select(case)
        with pytest.raises(ClosedResourceError, match=whole("this end of channel 'both' is closed")):
            select_nowait(case)
    channel.sender.close()
    channel.receiver.close()
    assert_at_rest(channel)


async def test_broken_channel_as_receiving_case() -> None:
    """Receiving from a channel all of whose receiving ends were closed is an error, not an end of stream."""
    channel = Channel[int](0, "in")
    channel.receiver.close()
    with pytest.raises(ClosedResourceError, match=whole("channel 'in' is closed")):
        await select(channel)
    assert_at_rest(channel)


async def select_from_failing(fail: Callable[[], Awaitable[None]], other: Any) -> tuple[Result[None], list[Any]]:
    """Select from the result of a task that is going to fail, and another case; give what that raised."""
    errors: list[Any] = []
    try:
        async with Group() as group:
            result = group.go(fail)
            with anyio.CancelScope(shield=True):
                await keep(errors, lambda: select(result, other))
            await anyio.sleep(10)
    except ExceptionGroup:
        return result, errors
    raise AssertionError


async def test_result_of_a_failed_task() -> None:
    """The error of a task is raised by the select in which its result happened, ready or waited for."""
    idle = Channel[int]()

    async def fail() -> None:
        await anyio.sleep(1)
        msg = "it failed"
        raise ValueError(msg)

    result, errors = await select_from_failing(fail, idle)
    assert [(type(error), str(error)) for error in errors] == [(ValueError, "it failed")]
    assert await select(result, idle) == (0, result, None, True)
    # Another result, that was there before the select.
    result, _errors = await select_from_failing(fail, after(0))
    with pytest.raises(ValueError, match=whole("it failed")):
        select_nowait(result, idle)
    assert_at_rest(idle)


# Errors that look like the end of a stream


async def test_result_of_a_task_that_failed_with_end_of_stream() -> None:
    """A task that failed with EndOfStream failed: that is not a result which was received already."""

    async def fail() -> None:
        await anyio.sleep(1)
        msg = "from the task"
        raise EndOfStream(msg)

    _result, errors = await select_from_failing(fail, None)
    assert [(type(error), str(error)) for error in errors] == [(EndOfStream, "from the task")]
    result, _errors = await select_from_failing(fail, after(0))
    with pytest.raises(EndOfStream, match=whole("from the task")):
        select_nowait(result)
    assert_at_rest(result._as_channel())


@native
@pytest.mark.parametrize("by", ["select", "receive"])
async def test_item_that_comes_back_in_the_tick_of_closing(by: str) -> None:
    """Handed over, closed, cancelled in one tick: the next who waits gets the item, not the end."""
    channel = Channel[int]()
    kept: list[Any] = []
    first = asyncio.create_task(select(channel))
    await wait_all_tasks_blocked()
    second = asyncio.create_task(keep(kept, channel.receive if by == "receive" else lambda: select(channel)))
    await wait_all_tasks_blocked()
    channel.send_nowait(1)
    channel.close()
    first.cancel()
    await second
    assert kept == [1 if by == "receive" else (0, channel, 1, False)]
    assert first.cancelled()
    assert_at_rest(channel)


async def test_batch_given_back_in_the_tick_of_closing() -> None:
    """A batch that is cancelled in the tick of closing gives its items to the select that waits, not the end."""
    channel = Channel[int]()
    kept: list[Any] = []
    scope = anyio.CancelScope()

    async def batch() -> None:
        with scope:
            await channel.receive_many(10, max_wait=1_000)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(batch)
        await wait_all_tasks_blocked()
        channel.send_nowait(1)
        await wait_all_tasks_blocked()
        tasks.start_soon(keep, kept, lambda: select(channel))
        await wait_all_tasks_blocked()
        scope.cancel()
        channel.close()
    assert kept == [(0, channel, 1, False)]
    assert_at_rest(channel)


async def test_closed_while_an_item_may_still_come_back() -> None:
    """A closed channel whose last item is on its way to somebody is neither ready nor at its end until then."""
    channel = Channel[int]()
    async with anyio.create_task_group() as tasks:
        batch: list[Any] = []
        ended: list[Any] = []
        tasks.start_soon(keep, batch, lambda: channel.receive_many(10, max_wait=1_000))
        await wait_all_tasks_blocked()
        channel.send_nowait(1)
        await wait_all_tasks_blocked()
        tasks.start_soon(keep, ended, lambda: select(channel))
        await wait_all_tasks_blocked()
        channel.close()
        with pytest.raises(WouldBlock):
            select_nowait(channel)
        assert ended == []
    assert batch == [[1]]
    assert ended == [(0, channel, None, True)]
    assert_at_rest(channel)
