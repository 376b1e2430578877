"""Closing a channel that threads use, from a thread or from the event loop."""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream

from chanflow import Channel, ThreadChannel
from tests.support.channels import assert_at_rest
from tests.support.threads import PATIENCE, Job, lend, until, waiting

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("bounded")]


async def test_close_from_a_thread_comes_after_what_was_sent() -> None:
    """Items that were sent before the close arrive before the end, even if the loop was busy all the while."""
    channel = Channel[Any](10, "c")
    handle = channel.from_thread()
    await lend(channel, handle)

    def produce() -> None:
        for number in range(10):
            handle.send(number)
        handle.close()
        handle.close()

    Job(produce).result()
    assert not channel.closed
    with pytest.raises(ClosedResourceError, match=r"\Achannel 'c' is closed\Z"):
        Job(handle.send, 10).result()
    assert [number async for number in channel] == list(range(10))
    assert channel.closed
    assert_at_rest(channel)


async def test_close_from_the_loop_comes_after_what_threads_sent() -> None:
    """A close in the loop lets in first what is on its way."""
    channel = Channel[Any](10)
    handle = channel.from_thread()
    await lend(channel, handle)
    Job(handle.send, 1).result()
    channel.close()
    assert [number async for number in channel] == [1]
    assert_at_rest(channel)


async def test_close_wakes_sending_threads() -> None:
    """A thread that waits for room gets ClosedResourceError, and its item is not delivered."""
    channel = Channel[int](1, "c")
    handle = channel.from_thread()
    await Job(handle.send, 1)
    jobs = [Job(handle.send, number) for number in (2, 3)]
    await until(lambda: waiting(channel) == (2, 0))
    channel.close()
    for job in jobs:
        with pytest.raises(ClosedResourceError, match=r"\Achannel 'c' is closed\Z"):
            await job
    with pytest.raises(ClosedResourceError, match=r"\Achannel 'c' is closed\Z"):
        await Job(handle.send, 4)
    assert await Job(list, handle) == [1]
    assert_at_rest(channel)


async def test_close_wakes_receiving_threads() -> None:
    """A thread that waits for an item gets EndOfStream."""
    channel = Channel[int](name="c")
    handle = channel.from_thread()
    jobs = [Job(handle.receive), Job(list, handle)]
    await until(lambda: waiting(channel) == (0, 2))
    channel.close()
    with pytest.raises(EndOfStream, match=r"\Achannel 'c' is closed and drained\Z"):
        await jobs[0]
    assert await jobs[1] == []
    with pytest.raises(EndOfStream, match=r"\Achannel 'c' is closed and drained\Z"):
        await Job(handle.receive)
    assert_at_rest(channel)


@pytest.mark.parametrize("operation", ["receive", "iterate", "send"])
async def test_an_error_that_comes_before_the_thread_waits_is_raised(
    operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thread: asks the loop; loop: answers with the end; thread: only then goes on to wait. None is no item."""
    channel = Channel[int](name="c")
    handle = channel.from_thread()
    original = ThreadChannel._wake

    def wake(self: ThreadChannel[int]) -> None:
        original(self)
        deadline = monotonic() + PATIENCE
        while self._scheduled:
            assert monotonic() < deadline

    monkeypatch.setattr(ThreadChannel, "_wake", wake)
    channel.close()
    # As if a send had come before the close.
    handle._refusal = None
    if operation == "receive":
        with pytest.raises(EndOfStream, match=r"\Achannel 'c' is closed and drained\Z"):
            await Job(handle.receive)
    elif operation == "iterate":
        assert await Job(list, handle) == []
    else:
        with pytest.raises(ClosedResourceError, match=r"\Achannel 'c' is closed\Z"):
            await Job(handle.send, 1)
    assert_at_rest(channel)


async def test_close_from_one_thread_wakes_another() -> None:
    """Go's close: whoever waits, on either side, learns of it."""
    full, empty = Channel[int](name="full"), Channel[int](name="empty")
    sending, receiving = full.from_thread(), empty.from_thread()
    sender, receiver = Job(sending.send, 1), Job(receiving.receive)
    await until(lambda: waiting(full) == (1, 0) and waiting(empty) == (0, 1))
    await Job(lambda: (sending.close(), receiving.close()))
    with pytest.raises(ClosedResourceError, match=r"\Achannel 'full' is closed\Z"):
        await sender
    with pytest.raises(EndOfStream, match=r"\Achannel 'empty' is closed and drained\Z"):
        await receiver
    assert_at_rest(full)
    assert_at_rest(empty)


async def test_a_closed_channel_is_drained_by_threads_and_tasks() -> None:
    """What is left in a closed channel is still received, by whom ever."""
    channel = Channel[int](10)
    handle = channel.from_thread()
    for number in range(10):
        channel.send_nowait(number)
    channel.close()
    assert await Job(lambda: [handle.receive() for _ in range(3)]) == [0, 1, 2]
    assert await channel.receive() == 3
    assert await Job(list, handle) == [4, 5, 6, 7, 8, 9]
    assert_at_rest(channel)


@pytest.mark.parametrize("how", ["send", "send_nowait", "send_many"])
async def test_a_closed_channel_refuses_items_while_threads_drain_it(how: str) -> None:
    """Threads took reserved items that the loop has not accounted for: that makes no room in a closed channel."""
    channel = Channel[int](10, "c")
    handle = channel.from_thread()
    for number in range(5):
        channel.send_nowait(number)
    channel.close()
    assert await Job(lambda: [handle.receive() for _ in range(4)]) == [0, 1, 2, 3]

    async def send() -> None:
        if how == "send_nowait":
            channel.send_nowait(5)
        else:
            await (channel.send(5) if how == "send" else channel.send_many([5]))

    with pytest.raises(ClosedResourceError, match=r"\Achannel 'c' is closed\Z"):
        await send()
    assert await Job(list, handle) == [4]
    assert_at_rest(channel)


async def test_a_broken_channel_refuses_threads(caplog: pytest.LogCaptureFixture) -> None:
    """When the last receiver is gone, senders get BrokenResourceError; what they sent is counted as unread."""
    channel = Channel[int](1, "c")
    handle = channel.from_thread()
    await Job(handle.send, 1)
    sender = Job(handle.send, 2)
    await until(lambda: waiting(channel) == (1, 0))
    channel.receiver.close()
    with pytest.raises(BrokenResourceError, match=r"\Achannel 'c' has no receiver left\Z"):
        await sender
    with pytest.raises(BrokenResourceError, match=r"\Achannel 'c' has no receiver left\Z"):
        await Job(handle.send, 3)
    assert caplog.messages == ["channel 'c' was closed by its last receiver with 1 unread item(s)"]
    assert channel.drain() == [1]
    assert_at_rest(channel)


async def test_a_broken_channel_counts_what_threads_have_on_the_way(caplog: pytest.LogCaptureFixture) -> None:
    """An item that was sent before the last receiver closed is in the channel, not lost."""
    channel = Channel[Any](2, "c")
    handle = channel.from_thread()
    await lend(channel, handle)
    Job(handle.send, 1).result()
    channel.receiver.close()
    assert caplog.messages == ["channel 'c' was closed by its last receiver with 1 unread item(s)"]
    assert channel.drain() == [1]
    assert_at_rest(channel)


async def test_a_broken_channel_wakes_receiving_threads() -> None:
    """A thread that waits for an item of a channel whose receiving side is closed gets ClosedResourceError."""
    channel = Channel[int](name="c")
    handle = channel.from_thread()
    job = Job(handle.receive)
    await until(lambda: waiting(channel) == (0, 1))
    channel.receiver.close()
    with pytest.raises(ClosedResourceError, match=r"\Achannel 'c' is closed\Z"):
        await job
    with pytest.raises(ClosedResourceError, match=r"\Achannel 'c' is closed\Z"):
        await Job(handle.receive)
    assert_at_rest(channel)


@pytest.mark.parametrize(
    ("end", "error", "message"),
    [
        (Channel.close, ClosedResourceError, "channel 'c' is closed"),
        (lambda channel: channel.receiver.close(), BrokenResourceError, "channel 'c' has no receiver left"),
    ],
    ids=["closed", "broken"],
)
async def test_a_channel_that_was_over_before_is_over_for_threads(
    end: Callable[[Channel[int]], None], error: type[Exception], message: str
) -> None:
    """`from_thread` of a closed or broken channel gives one that refuses."""
    channel = Channel[int](2, "c")
    end(channel)
    handle = channel.from_thread()
    with pytest.raises(error) as caught:
        await Job(handle.send, 1)
    assert str(caught.value) == message
    assert_at_rest(channel)


@pytest.mark.parametrize("way", ["closed", "broken"])
async def test_a_send_that_crosses_the_end_is_refused(way: str) -> None:
    """Thread: asks for room; loop, before it looks: closes one side."""
    channel = Channel[int](2, "c")
    handle = channel.from_thread()
    job = Job(handle.send, 1)
    deadline = monotonic() + PATIENCE
    while not handle._sending:
        assert monotonic() < deadline
    # The loop has not looked at the request yet.
    if way == "closed":
        channel.close()
        with pytest.raises(ClosedResourceError, match=r"\Achannel 'c' is closed\Z"):
            await job
    else:
        channel.receiver.close()
        with pytest.raises(BrokenResourceError, match=r"\Achannel 'c' has no receiver left\Z"):
            await job
    assert_at_rest(channel)
