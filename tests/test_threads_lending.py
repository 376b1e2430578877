"""Channels from threads: room that is lent to threads, items that are reserved for them, and taking both back."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio import WouldBlock

from chanflow import Channel
from chanflow._channel import _ledger
from tests.support.channels import assert_at_rest
from tests.support.threads import Interruption, Job, lend, reserve, until, waiting

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("bounded")]


async def test_the_loop_is_woken_once_for_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many items are sent while the event loop is busy, it is woken for the first only."""
    channel = Channel[Any](100)
    handle = channel.from_thread()
    await lend(channel, handle)
    calls: list[object] = []
    home = type(handle._home)
    original = home.call_soon

    def call_soon(self: Any, callback: Callable[[], object]) -> None:
        calls.append(callback)
        original(self, callback)

    monkeypatch.setattr(home, "call_soon", call_soon)
    Job(lambda: [handle.send(number) for number in range(100)]).result()
    assert len(calls) == 1
    assert [await channel.receive() for _ in range(100)] == list(range(100))
    assert_at_rest(channel)


async def test_reserved_items_need_no_loop() -> None:
    """What is reserved for threads they receive while the event loop is busy."""
    channel = Channel[Any](100)
    handle = channel.from_thread()
    await reserve(channel, handle, *range(99))
    assert Job(lambda: [handle.receive() for _ in range(99)]).result() == list(range(99))
    assert_at_rest(channel)


async def test_no_more_is_reserved_than_prefetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is reserved for threads at a time is bounded."""
    monkeypatch.setattr(_ledger, "PREFETCH", 2)
    channel = Channel[Any](10)
    handle = channel.from_thread()
    for number in range(6):
        channel.send_nowait(number)
    assert await Job(handle.receive) == 0
    assert handle._ledger._claims == 2
    assert await Job(lambda: [handle.receive() for _ in range(5)]) == [1, 2, 3, 4, 5]
    assert_at_rest(channel)


async def test_room_made_by_a_thread_wakes_a_sending_task() -> None:
    """A thread took a reserved item and stopped: the room it made is for the task that waits for it."""
    channel = Channel[Any](3)
    handle = channel.from_thread()
    await reserve(channel, handle, 1, 2)
    channel.send_nowait(3)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.send, 4)
        await until(lambda: waiting(channel) == (1, 0))
        assert await Job(handle.receive) == 1
        await until(lambda: waiting(channel) == (0, 0))
    assert channel.drain() == [2, 3, 4]
    assert_at_rest(channel)


async def test_room_made_by_a_thread_wakes_a_sending_thread() -> None:
    """The same with two threads."""
    channel = Channel[Any](3)
    handle = channel.from_thread()
    await reserve(channel, handle, 1, 2)
    await Job(handle.send, 3)
    sender = Job(handle.send, 4)
    await until(lambda: waiting(channel) == (1, 0))
    assert await Job(handle.receive) == 1
    await until(lambda: not sender.running)
    assert channel.drain() == [2, 3, 4]
    assert_at_rest(channel)


async def test_a_sending_task_takes_lent_room_back(capacity: float) -> None:
    """Room that no thread used is the loop's as soon as the loop looks for it."""
    if capacity == 0:
        pytest.skip("a rendezvous has no room to lend")
    channel = Channel[Any](capacity)
    handle = channel.from_thread()
    await lend(channel, handle)
    count = int(min(capacity, 20))
    for number in range(count):
        channel.send_nowait(number)
    if capacity != math.inf:
        with pytest.raises(WouldBlock):
            channel.send_nowait("too much")
    assert channel.drain() == list(range(count))
    assert_at_rest(channel)


async def test_what_threads_sent_takes_part_of_the_room_that_comes_back() -> None:
    """An item that has not arrived in the channel yet counts, and comes first."""
    channel = Channel[Any](2)
    handle = channel.from_thread()
    await lend(channel, handle)
    Job(handle.send, "thread").result()
    channel.send_nowait("loop")
    with pytest.raises(WouldBlock):
        channel.send_nowait("too much")
    assert [channel.receive_nowait(), channel.receive_nowait()] == ["thread", "loop"]
    assert_at_rest(channel)


@pytest.mark.parametrize("take", [Channel.receive_nowait, lambda channel: channel.drain()[0]], ids=["receive", "drain"])
async def test_a_receiver_takes_reserved_items_back(take: Callable[[Channel[Any]], Any]) -> None:
    """Items that no thread took are the loop's as soon as the loop looks for one."""
    channel = Channel[Any](2)
    handle = channel.from_thread()
    await reserve(channel, handle, 1)
    assert take(channel) == 1
    assert handle._ledger._claims == 0
    with pytest.raises(TimeoutError):
        await Job(handle.receive, timeout=0)
    assert_at_rest(channel)


async def test_a_receiver_finds_what_threads_have_sent_just_now() -> None:
    """A task need not wait for the event loop to be woken."""
    channel = Channel[Any](2)
    handle = channel.from_thread()
    await lend(channel, handle)
    Job(handle.send, 1).result()
    assert len(channel) == 1
    assert channel.receive_nowait() == 1
    assert_at_rest(channel)


async def test_statistics_count_what_threads_do() -> None:
    """Waiting threads, items on their way and items taken show up in every figure."""
    channel = Channel[Any](2)
    handle = channel.from_thread()
    await lend(channel, handle)
    Job(handle.send, 1).result()
    assert channel.statistics()[:1] + channel.statistics()[6:] == (1, 2, 1, 0)
    assert channel.receive_nowait() == 1
    await reserve(channel, handle, 2)
    assert Job(handle.receive).result() == 2
    assert channel.statistics() == (0, 2, 1, 1, 0, 0, 4, 4, 0)
    receiver = Job(handle.receive)
    await until(lambda: channel.statistics().tasks_waiting_receive == 1)
    channel.send_nowait(3)
    assert await receiver == 3
    jobs = [Job(handle.send, number) for number in range(3)]
    await until(lambda: channel.statistics().tasks_waiting_send == 1)
    assert channel.statistics().current_buffer_used == 2
    assert sorted(channel.drain() + channel.drain()) == [0, 1, 2]
    for job in jobs:
        await job
    assert_at_rest(channel)


async def test_a_channel_shows_its_length_in_a_thread_that_took_items() -> None:
    """`len` and `repr` must not fail for what the loop has not accounted for yet."""
    channel = Channel[Any](5, "c")
    handle = channel.from_thread()
    await reserve(channel, handle, 1, 2, 3)

    def take_and_look() -> tuple[int, str]:
        for _ in range(2):
            handle.receive()
        return len(channel), repr(channel)

    length, text = await Job(take_and_look)
    assert length >= 0
    assert text.startswith("<Channel 'c' ")
    assert channel.drain() == [3]
    assert_at_rest(channel)


async def test_overfull_channel_keeps_its_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that an interrupted thread gave back left no room for one on its way: the capacity stays what it is."""
    channel = Channel[Any](1)
    handle = channel.from_thread()
    await lend(channel, handle)
    interruption = Interruption(monkeypatch, served=True)
    job = await interruption.receive(channel, 1)
    handle._pump()
    assert handle._ledger._credits == 1
    Job(handle.send, 2).result()
    interruption.now.set()
    with pytest.raises(KeyboardInterrupt):
        job.result()
    # Both are on their way now, for room that is enough for one.
    assert (list(handle._ledger._inbox), list(handle._ledger._returned)) == ([2], [1])
    handle._ledger.recall_room()
    assert channel._state.room == 1
    assert channel.drain() == [1, 2]
    channel.send_nowait(3)
    with pytest.raises(WouldBlock):
        channel.send_nowait(4)
    assert channel.drain() == [3]
    assert_at_rest(channel)


async def test_room_made_while_a_sender_parks_is_seen() -> None:
    """Thread: takes a reserved item just before a sender is in the waiting room; the sender itself asks then."""
    channel = Channel[Any](3)
    handle = channel.from_thread()
    await reserve(channel, handle, 1, 2)
    assert Job(handle.receive).result() == 1
    assert handle._ledger._taken == 1
    handle.sender_parked()
    await until(lambda: not handle._ledger._taken)
    handle.sender_parked()
    assert not handle._scheduled
    assert channel.drain() == [2]
    assert_at_rest(channel)
