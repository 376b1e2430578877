"""Threads that wait for an item for a bounded time."""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from typing import Any

import anyio
import pytest
from anyio import WouldBlock

from chanflow import Channel, ThreadChannel
from chanflow._channel._threads import Parked, Request
from tests.support.channels import assert_at_rest
from tests.support.threads import PATIENCE, Job, until, waiting

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("bounded")]


async def test_receive_times_out() -> None:
    """A bounded wait ends with an error that names the channel, and takes nothing."""
    channel = Channel[int](name="c")
    handle = channel.from_thread()
    with pytest.raises(TimeoutError) as caught:
        await Job(handle.receive, timeout=0.01)
    assert str(caught.value) == "nothing to receive from channel 'c' within 0.01 s"
    assert waiting(channel) == (0, 0)
    with pytest.raises(WouldBlock):
        channel.send_nowait(1)
    assert_at_rest(channel)


async def test_receive_with_a_timeout_gets_what_comes_in_time() -> None:
    """A timeout changes nothing for an item that is there."""
    channel = Channel[int](1)
    handle = channel.from_thread()
    channel.send_nowait(1)
    assert await Job(handle.receive, timeout=PATIENCE) == 1
    job = Job(handle.receive, timeout=PATIENCE)
    await until(lambda: waiting(channel) == (0, 1))
    channel.send_nowait(2)
    assert await job == 2
    assert_at_rest(channel)


async def test_an_infinite_timeout_is_none() -> None:
    """`math.inf` is a bound that never comes."""
    channel = Channel[int](1)
    job = Job(channel.from_thread().receive, timeout=math.inf)
    await channel.send(1)
    assert await job == 1
    assert_at_rest(channel)


@pytest.mark.parametrize("timeout", [-1, -0.5, math.nan])
async def test_timeout_must_not_be_negative(timeout: float) -> None:
    """A bad timeout is refused before anything happens."""
    handle = Channel[int]().from_thread()
    with pytest.raises(ValueError, match=rf"\Atimeout must be >= 0, got {timeout}\Z"):
        await Job(handle.receive, timeout=timeout)


@pytest.mark.parametrize("capacity", [0, 2])
async def test_timeout_between_the_look_and_the_hand_over_passes_the_item_on(capacity: int) -> None:
    """Sender: sees the thread wait; thread: its time is over; sender: hands over to the next receiver instead."""
    channel = Channel[int](capacity)
    handle = channel.from_thread()
    request = abandoned_in_the_hand_over(channel, handle)
    got: list[int] = []

    async def receive() -> None:
        got.append(await channel.receive())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await until(lambda: len(channel._state.receivers) == 2)
        channel.send_nowait(1)
    assert got == [1]
    assert request.outcome is TimeoutError
    assert_at_rest(channel)


async def test_timeout_between_the_look_and_the_hand_over_leaves_the_item_in_the_channel() -> None:
    """The same, with no other receiver: even a rendezvous then keeps the item for the next."""
    channel = Channel[int]()
    handle = channel.from_thread()
    request = abandoned_in_the_hand_over(channel, handle)
    channel.send_nowait(1)
    assert request.outcome is TimeoutError
    assert len(channel) == 1
    assert await Job(handle.receive) == 1
    assert_at_rest(channel)


def abandoned_in_the_hand_over(channel: Channel[Any], handle: ThreadChannel[Any]) -> Request:
    """Let a thread wait whose time is over as soon as somebody has looked whether it waits."""
    request = Request()
    parked = Parked(request, handle._hand_over)

    def done() -> bool:
        was = request.done()
        request.finish(TimeoutError)
        return was

    parked.done = done
    channel._state.receivers.append((parked, handle))
    return request


async def test_timeout_before_the_loop_looks_takes_nothing() -> None:
    """A request that was given up while the event loop was busy is passed over."""
    channel = Channel[int](1)
    handle = channel.from_thread()
    channel.send_nowait(1)
    with pytest.raises(TimeoutError):
        Job(handle.receive, timeout=0.01).result()
    assert len(handle._receiving) == 1
    await until(lambda: not handle._receiving)
    assert channel.receive_nowait() == 1
    assert_at_rest(channel)


async def test_timeout_after_the_hand_over_returns_the_item(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop: serves the thread; thread: finds its time over, and that it has an item all the same."""
    channel = Channel[int](1)
    handle = channel.from_thread()
    channel.send_nowait(1)
    served = threading.Event()
    original = Request.wait

    def wait(request: Request, seconds: float) -> bool:
        if not served.is_set():
            assert original(request, PATIENCE)
            served.set()
            request._gate.release()
            return False
        return original(request, seconds)

    monkeypatch.setattr(Request, "wait", wait)
    assert await Job(handle.receive, timeout=0) == 1
    assert_at_rest(channel)


async def test_polling_an_idle_channel_leaves_nothing_behind() -> None:
    """Each wait that timed out leaves the waiting room, though a task waits there before it."""
    channel = Channel[int]()
    handle = channel.from_thread()

    def poll() -> None:
        for _ in range(20):
            with suppress(TimeoutError):
                handle.receive(timeout=0.002)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.receive)
        await until(lambda: waiting(channel) == (0, 1))
        await Job(poll)
        await until(lambda: not handle._scheduled)
        assert len(channel._state.receivers) < 10
        channel.send_nowait(1)
    assert_at_rest(channel)


@pytest.mark.parametrize("timeout", [0, 0.001])
async def test_regression_a_short_timeout_gets_what_is_there(timeout: float) -> None:
    """The event loop has to look before it can tell that there is nothing."""
    channel = Channel[int](10, "c")
    handle = channel.from_thread()
    await channel.send_many(range(10))

    def poll() -> list[int]:
        received = [handle.receive(timeout) for _ in range(10)]
        with pytest.raises(TimeoutError, match=f"^nothing to receive from channel 'c' within {timeout} s$"):
            handle.receive(timeout)
        return received

    assert await Job(poll) == list(range(10))
    assert waiting(channel) == (0, 0)
    assert_at_rest(channel)
