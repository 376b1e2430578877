"""Channels from threads, with every hand-over between threads and the event loop."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import threading
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from random import Random
from time import monotonic
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream, WouldBlock, to_thread
from anyio.lowlevel import checkpoint

from chanflow import Channel, Send, ThreadChannel, select, select_nowait
from chanflow._channel import _ledger, _threads
from chanflow._channel._state import ChannelState
from chanflow._channel._threads import Parked, Request
from chanflow._loop._home import current_home
from tests.support.channels import assert_at_rest
from tests.support.messages import whole
from tests.support.threads import PATIENCE, Interruption, Job, lend, reserve, until, waiting

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("bounded")]

# One direction at a time


async def test_threads_send_to_the_loop(capacity: float) -> None:
    """What one thread sends arrives in its order, then the end."""
    channel = Channel[int](capacity)

    def produce(handle: ThreadChannel[int]) -> None:
        with handle:
            for number in range(300):
                handle.send(number)

    job = Job(produce, channel.from_thread())
    assert [number async for number in channel] == list(range(300))
    await job
    assert channel.closed
    assert_at_rest(channel)


async def test_the_loop_sends_to_threads(capacity: float) -> None:
    """A thread iterates over what the loop sends, until the channel is closed and drained."""
    channel = Channel[int](capacity)
    job = Job(list, channel.from_thread())
    for number in range(300):
        await channel.send(number)
    channel.close()
    assert await job == list(range(300))
    assert_at_rest(channel)


async def test_threads_send_to_threads(capacity: float) -> None:
    """Two threads that talk to each other go through the event loop between them."""
    channel = Channel[int](capacity)
    handle = channel.from_thread()

    def produce() -> None:
        for number in range(300):
            handle.send(number)
        handle.close()

    consumer, producer = Job(list, handle), Job(produce)
    await producer
    assert await consumer == list(range(300))
    assert_at_rest(channel)


async def test_threads_answer_the_loop_over_two_channels() -> None:
    """A request and its answer, with a thread as the server."""
    questions, answers = Channel[int](), Channel[int]()
    incoming, outgoing = questions.from_thread(), answers.from_thread()

    def serve() -> None:
        with outgoing:
            for number in incoming:
                outgoing.send(number * number)

    job = Job(serve)
    for number in range(20):
        await questions.send(number)
        assert await answers.receive() == number * number
    questions.close()
    await job
    with pytest.raises(EndOfStream):
        await answers.receive()
    assert_at_rest(questions)
    assert_at_rest(answers)


async def test_none_and_exceptions_are_items_like_any_other() -> None:
    """Whatever is sent is handed over by reference."""
    channel = Channel[object](1)
    handle = channel.from_thread()
    items = [None, EndOfStream(), TimeoutError, Request()]
    job = Job(lambda: [handle.receive() for _ in items])
    for item in items:
        await channel.send(item)
    assert all(got is item for got, item in zip(await job, items, strict=True))
    assert_at_rest(channel)


# Capacity and order


@pytest.mark.parametrize("senders", [1, 3])
async def test_threads_fill_the_channel_to_its_capacity(capacity: float, senders: int) -> None:
    """With nobody receiving, exactly `capacity` items are accepted, whatever room was lent."""
    channel = Channel[int](capacity)
    handle = channel.from_thread()
    accepted = threading.Semaphore(0)

    def produce() -> None:
        with suppress(ClosedResourceError):
            for number in range(12):
                handle.send(number)
                accepted.release()

    jobs = [Job(produce) for _ in range(senders)]
    full = min(capacity, 12 * senders)
    await until(lambda: accepted._value == full and (capacity == math.inf or waiting(channel)[0] == senders))
    assert accepted._value == len(channel) == channel.statistics().sent == full
    channel.close()
    for job in jobs:
        await job
    assert len(channel.drain()) == full
    assert_at_rest(channel)


async def test_a_receive_makes_room_for_one_sending_thread() -> None:
    """Threads that wait for room are served in their order, one for each item received."""
    channel = Channel[str](1)
    handle = channel.from_thread()
    jobs = []
    for number, item in enumerate("abcd"):
        jobs.append(Job(handle.send, item))
        await until(
            partial(lambda number: waiting(channel)[0] == number or (channel._state.buffer and number == 0), number)
        )
    await jobs[0]
    assert waiting(channel) == (3, 0)
    for number, item in enumerate("abcd"):
        assert await channel.receive() == item
        assert waiting(channel) == (max(0, 2 - number), 0)
    for job in jobs:
        await job
    assert_at_rest(channel)


async def test_threads_are_served_in_the_order_in_which_they_came() -> None:
    """Neither threads nor tasks overtake each other in the waiting room for items."""
    channel = Channel[int]()
    handle = channel.from_thread()
    got: list[int] = []

    async def receive() -> None:
        got.append(await channel.receive())

    first = Job(handle.receive)
    await until(lambda: waiting(channel) == (0, 1))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await until(lambda: waiting(channel) == (0, 2))
        last = Job(handle.receive)
        await until(lambda: waiting(channel) == (0, 3))
        for number in range(3):
            channel.send_nowait(number)
            # The task takes what it was woken for before the next item comes: a thread may run sooner than a task.
            await until(partial(lambda number: number != 1 or got, number))
    assert (await first, got, await last) == (0, [1], 2)  # pyright: ignore[reportGeneralTypeIssues] # bound in the block
    assert_at_rest(channel)


async def test_a_thread_never_receives_an_older_item_after_a_newer_one() -> None:
    """Loop: wakes a task for 1, hands 2 to the thread, pumps before the task runs: the thread's next is not 1."""
    channel = Channel[int](10)
    handle = channel.from_thread()
    got: list[int] = []

    async def receive() -> None:
        got.append(await channel.receive())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await until(lambda: waiting(channel) == (0, 1))
        job = Job(lambda: [handle.receive(), handle.receive()])
        await until(lambda: waiting(channel) == (0, 2))
        for number in (1, 2, 3):
            channel.send_nowait(number)
        deadline = monotonic() + PATIENCE
        while not handle._receiving:
            assert monotonic() < deadline
        handle._pump()
    first, second = await job  # pyright: ignore[reportGeneralTypeIssues] # bound in the block
    assert first < second
    assert sorted([first, second, *got]) == [1, 2, 3]
    assert_at_rest(channel)


EACH = 250


async def send_all(channel: Channel[tuple[int, int]], who: int, dice: Random) -> None:
    """Send the items of one producer in batches, as the dice fall."""
    number = 0
    while number < EACH:
        count = dice.randint(1, min(4, EACH - number))
        await channel.send_many([(who, number + more) for more in range(count)])
        number += count
        assert len(channel) <= channel.capacity
        if dice.random() < 0.2:
            await checkpoint()


async def receive_all(channel: Channel[tuple[int, int]], received: list[tuple[int, int]], dice: Random) -> None:
    """Receive until the end, one item or several at a time."""
    with suppress(EndOfStream):
        while True:
            if dice.random() < 0.5:
                received.append(await channel.receive())
            else:
                received.extend(await channel.receive_many(3))
            assert len(channel) <= channel.capacity


@pytest.mark.parametrize("seed", range(2))
async def test_every_item_arrives_once_and_in_the_order_of_its_producer(capacity: float, seed: int) -> None:
    """Four threads on each side, with two tasks on each: nothing is lost, doubled, overtaken or too much."""
    channel = Channel[tuple[int, int]](capacity)
    handle = channel.from_thread()
    dice = Random(seed)
    received: list[list[tuple[int, int]]] = [[] for _ in range(6)]

    def produce(who: int) -> None:
        for number in range(EACH):
            handle.send((who, number))

    consumers = [Job(received[who].extend, handle) for who in range(4)]
    async with anyio.create_task_group() as receiving:
        for who in (4, 5):
            receiving.start_soon(receive_all, channel, received[who], dice)
        producers = [Job(produce, who) for who in range(4)]
        async with anyio.create_task_group() as sending:
            for who in (4, 5):
                sending.start_soon(send_all, channel, who, dice)
        for job in producers:
            await job
        channel.close()
    for job in consumers:
        await job
    everything = sorted(item for items in received for item in items)
    assert everything == [(who, number) for who in range(6) for number in range(EACH)]
    for items in received:
        for who in range(6):
            numbers = [number for sender, number in items if sender == who]
            assert numbers == sorted(numbers)
    assert channel.statistics().received == 6 * EACH
    assert_at_rest(channel)


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


# Lending


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


# Overflow


@pytest.mark.parametrize(("overflow", "kept"), [("drop_newest", [0, 1]), ("drop_oldest", [8, 9])])
async def test_overflow_holds_for_threads(overflow: Any, kept: list[int]) -> None:
    """A thread that sends into a full channel that drops never waits."""
    channel = Channel[int](2, overflow=overflow)
    handle = channel.from_thread()
    await Job(lambda: [handle.send(number) for number in range(10)])
    assert channel.statistics().dropped == 8
    assert channel.drain() == kept
    assert_at_rest(channel)


@pytest.mark.parametrize(("overflow", "kept"), [("drop_newest", [0, 1]), ("drop_oldest", [8, 9])])
async def test_overflow_holds_for_tasks_beside_threads(overflow: Any, kept: list[int]) -> None:
    """Lent room and reserved items make no difference to what is dropped."""
    channel = Channel[Any](2, overflow=overflow)
    handle = channel.from_thread()
    await lend(channel, handle)
    for number in range(10):
        channel.send_nowait(number)
    assert await Job(lambda: [handle.receive(), handle.receive()]) == kept
    assert channel.statistics().dropped == 8
    assert_at_rest(channel)


class Intruded:
    """A buffer in which something happens between the taking of an item and what follows."""

    def __init__(self, buffer: Any, intrude: Callable[[], object]) -> None:
        self._buffer = buffer
        self._intrude = intrude

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)

    def __len__(self) -> int:
        return len(self._buffer)

    def popleft(self) -> Any:
        item = self._buffer.popleft()
        if threading.current_thread() is threading.main_thread():
            self._intrude()
        return item


async def test_dropping_the_oldest_leaves_threads_what_they_were_promised() -> None:
    """Task: drops the oldest item; thread: takes all that is reserved for it; task: adds its own."""
    channel = Channel[int](2, overflow="drop_oldest")
    handle = channel.from_thread()
    for number in (1, 2):
        channel.send_nowait(number)
    # A request that was given up leaves all items reserved for the next.
    with pytest.raises(TimeoutError):
        Job(handle.receive, timeout=0).result()
    await until(lambda: handle._ledger._claims == 2)
    jobs: list[Job] = []

    def intrude() -> None:
        jobs.append(Job(lambda: [handle.receive(), handle.receive()]))
        deadline = monotonic() + PATIENCE
        while jobs[0].running and not handle._receiving:
            assert monotonic() < deadline

    state = channel._state
    buffer = state.buffer
    intruded: Any = Intruded(buffer, intrude)
    state.buffer = intruded
    channel.send_nowait(3)
    state.buffer = buffer
    assert await jobs[0] == [2, 3]
    assert channel.statistics().dropped == 1
    assert_at_rest(channel)


# Timeouts


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


# Closing


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


# Interrupted


async def test_an_interrupted_receive_gives_the_item_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop: serves the thread; thread: is interrupted. The item is the next again, before all that came later."""
    channel = Channel[int](3)
    interruption = Interruption(monkeypatch, served=True)
    job = await interruption.receive(channel, 1, 2, 3)
    await interruption.happen(job)
    await until(lambda: not channel.from_thread()._scheduled)
    assert channel.drain() == [1, 2, 3]
    assert_at_rest(channel)


async def test_an_interrupted_receive_gives_the_item_to_a_receiver_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loop: serves the thread, then a task comes to wait; thread: is interrupted. The task gets the item."""
    channel = Channel[int](3)
    interruption = Interruption(monkeypatch, served=True)
    job = await interruption.receive(channel, 1)
    got: list[int] = []

    async def receive() -> None:
        got.append(await channel.receive())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        await until(lambda: waiting(channel) == (0, 1))
        await interruption.happen(job)
        await until(lambda: got)
    assert got == [1]
    assert_at_rest(channel)


async def test_an_interrupted_receive_that_was_not_served_takes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that was interrupted while waiting waits no more."""
    channel = Channel[int]()
    interruption = Interruption(monkeypatch, served=False)
    job = await interruption.receive(channel)
    await interruption.happen(job)
    assert waiting(channel) == (0, 0)
    with pytest.raises(WouldBlock):
        channel.send_nowait(1)
    assert_at_rest(channel)


async def test_an_interrupted_receive_gives_back_while_the_loop_is_scheduled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop need not be woken again when it is going to look anyway."""
    channel = Channel[int](3)
    handle = channel.from_thread()
    interruption = Interruption(monkeypatch, served=True)
    job = await interruption.receive(channel, 1)
    handle._scheduled = True
    interruption.now.set()
    with pytest.raises(KeyboardInterrupt):
        job.result()
    assert list(handle._ledger._returned) == [1]
    handle._pump()
    assert channel.drain() == [1]
    assert_at_rest(channel)


async def test_an_interrupted_send_that_was_not_served_delivers_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that was interrupted while waiting for room takes its item with it."""
    channel = Channel[int](1)
    handle = channel.from_thread()
    channel.send_nowait(1)
    interruption = Interruption(monkeypatch, served=False)
    job = Job(handle.send, 2)
    await until(lambda: waiting(channel) == (1, 0))
    await interruption.happen(job)
    assert waiting(channel) == (0, 0)
    assert channel.drain() == [1]
    assert_at_rest(channel)


async def test_an_interrupted_send_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that was interrupted before the loop looked at it is not let in."""
    channel = Channel[int](1)
    handle = channel.from_thread()
    interruption = Interruption(monkeypatch, served=False)
    job = Job(handle.send, 1)
    assert interruption.waiting.wait(PATIENCE)
    interruption.now.set()
    with pytest.raises(KeyboardInterrupt):
        job.result()
    assert len(handle._sending) == 1
    await until(lambda: not handle._sending)
    assert channel.drain() == []
    assert_at_rest(channel)


async def test_an_interrupted_send_that_was_served_has_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    """An item that was let in stays in."""
    channel = Channel[int](1)
    handle = channel.from_thread()
    interruption = Interruption(monkeypatch, served=True)
    job = Job(handle.send, 1)
    await until(interruption.waiting.is_set)
    await interruption.happen(job)
    assert channel.drain() == [1]
    assert_at_rest(channel)


# Where it may be used


async def test_a_channel_has_one_thread_side() -> None:
    """`from_thread` gives the same object each time."""
    channel = Channel[int](name="c")
    handle = channel.from_thread()
    assert channel.from_thread() is handle
    assert repr(handle) == "<ThreadChannel of channel 'c'>"


async def test_waiting_in_the_loops_own_thread_is_refused() -> None:
    """It would block the event loop that it waits for, even where nothing has to be waited for."""
    channel = Channel[int](2, "c")
    handle = channel.from_thread()
    message = (
        r"\A<ThreadChannel of channel 'c'> would block the event loop of its own thread; "
        r"use the channel itself there\Z"
    )
    channel.send_nowait(1)
    with pytest.raises(RuntimeError, match=message):
        handle.send(2)
    with pytest.raises(RuntimeError, match=message):
        handle.receive(timeout=1)
    with pytest.raises(RuntimeError, match=message):
        next(handle)
    assert channel.drain() == [1]
    assert_at_rest(channel)


async def test_close_in_the_loops_own_thread_does_not_wait() -> None:
    """Closing is allowed anywhere."""
    channel = Channel[int](2)
    with channel.from_thread():
        pass
    await until(lambda: channel.closed)
    assert_at_rest(channel)


ELSEWHERE = (
    r"\Achannel 'c' belongs to another event loop; "
    r"call channel.from_thread\(\) there, and use here what it returns\Z"
)
USES: dict[str, Callable[[Channel[int]], object]] = {
    "send_nowait": lambda channel: channel.send_nowait(1),
    "receive_nowait": Channel.receive_nowait,
    "close": Channel.close,
    "drain": Channel.drain,
    "clone": lambda channel: channel.sender.clone(),
    "select_nowait": select_nowait,
    "from_thread": Channel.from_thread,
}


@pytest.mark.parametrize("use", USES)
async def test_the_channel_itself_is_refused_to_other_threads(use: str) -> None:
    """The error tells what to do instead."""
    channel = Channel[int](1, "c")
    channel.from_thread()
    with pytest.raises(RuntimeError, match=ELSEWHERE):
        await Job(USES[use], channel)
    assert not channel.closed
    assert_at_rest(channel)
    channel.sender.close()


async def use_waiting(name: str, channel: Channel[int]) -> object:
    """Use a channel in ways that may wait."""
    if name == "send":
        return await channel.send(1)
    if name == "receive":
        return await channel.receive()
    if name == "select":
        return await select(channel)
    return USES[name](channel)


@pytest.mark.parametrize("use", ["send", "receive", "select", *USES])
@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_the_channel_itself_is_refused_to_other_loops(use: str, other: str) -> None:
    """A loop in another thread is told to use from_thread, too."""
    channel = Channel[int](1, "c")
    channel.from_thread()
    with pytest.raises(RuntimeError, match=ELSEWHERE):
        await Job(anyio.run, use_waiting, use, channel, backend=other)
    assert_at_rest(channel)
    channel.close()
    channel.sender.close()


def test_from_thread_needs_a_loop() -> None:
    """There must be an event loop for threads to reach."""
    with pytest.raises(RuntimeError, match=r"\Achannel 'c' was used outside of asyncio and trio\Z"):
        Channel[int](name="c").from_thread()


@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_two_loops_talk_through_from_thread(other: str) -> None:
    """A loop in another thread reaches the channel as any thread does: in worker threads of its own."""
    channel = Channel[int](1)
    handle = channel.from_thread()

    async def elsewhere() -> int:
        await to_thread.run_sync(handle.send, 1)
        return await to_thread.run_sync(handle.receive)

    job = Job(anyio.run, elsewhere, backend=other)
    assert await channel.receive() == 1
    await channel.send(2)
    assert await job == 2
    assert_at_rest(channel)


# Select


async def test_select_receives_from_threads() -> None:
    """A parked select is woken by what a thread sends."""
    channel, other = Channel[int](), Channel[int]()
    handle = channel.from_thread()
    job = Job(handle.send, 1)
    case = await select(other, channel)
    assert (case.index, case.item) == (1, 1)
    await job
    assert_at_rest(channel)
    assert_at_rest(other)


async def test_select_sends_to_threads() -> None:
    """A parked select is woken by a thread that receives."""
    channel, other = Channel[int](), Channel[int]()
    job = Job(channel.from_thread().receive)
    case = await select(other, Send(channel, 1))
    assert case.index == 1
    assert await job == 1
    assert_at_rest(channel)
    assert_at_rest(other)


async def test_select_takes_back_what_was_lent() -> None:
    """A case is ready for room that was lent, and for items that were reserved."""
    channel = Channel[Any](1)
    handle = channel.from_thread()
    await lend(channel, handle)
    assert select_nowait(Send(channel, 1)).index == 0
    with pytest.raises(WouldBlock):
        select_nowait(Send(channel, 2))
    assert await Job(handle.receive) == 1
    channel = Channel[Any](2)
    handle = channel.from_thread()
    await reserve(channel, handle, 3)
    assert select_nowait(channel).item == 3
    with pytest.raises(WouldBlock):
        select_nowait(channel)
    assert_at_rest(channel)


async def test_select_wins_and_loses_against_threads() -> None:
    """Selects and threads share all items of a channel."""
    channel, never = Channel[int](1), Channel[int]()
    handle = channel.from_thread()
    producers = [Job(lambda: [handle.send(number) for number in range(50)]) for _ in range(2)]
    consumer = Job(list, handle)
    mine: list[Any] = [(await select(channel, never)).item for _ in range(20)]
    for job in producers:
        await job
    channel.close()
    assert sorted([*mine, *await consumer]) == sorted([*range(50), *range(50)])
    assert_at_rest(channel)
    assert_at_rest(never)


# The end of the loop


def run(backend: str, main: Callable[[], Awaitable[Any]]) -> Any:
    return anyio.run(main, backend=backend)


ENDED = r"\Athe event loop of channel 'c' has ended\Z"


@pytest.fixture(params=["asyncio", "trio"])
def loop_kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_end_of_the_loop_wakes_waiting_threads(loop_kind: str) -> None:
    """Threads that wait when `run` returns get BrokenResourceError, and so do those that come later."""
    sent, received = Channel[int](1, "c"), Channel[int](1, "c")

    async def main() -> tuple[ThreadChannel[int], list[Job]]:
        handle = sent.from_thread()
        sent.send_nowait(0)
        jobs = [Job(handle.send, 1), Job(received.from_thread().receive)]
        await until(lambda: waiting(sent) == (1, 0) and waiting(received) == (0, 1))
        return handle, jobs

    handle, jobs = run(loop_kind, main)
    for job in jobs:
        with pytest.raises(BrokenResourceError, match=ENDED):
            job.result()
    with pytest.raises(BrokenResourceError, match=ENDED):
        handle.send(1)
    with pytest.raises(BrokenResourceError, match=ENDED):
        Job(handle.receive, timeout=1).result()
    handle.close()
    # The item that was in the channel is still there.
    assert sent.drain() == [0]
    assert waiting(sent) == waiting(received) == (0, 0)


def test_the_end_of_the_loop_keeps_what_was_sent_and_reserved(loop_kind: str) -> None:
    """What threads had not received or had sent too late for anybody stays in the channel."""
    sent, received = Channel[Any](5), Channel[Any](5)

    async def main() -> None:
        handle = sent.from_thread()
        await lend(sent, handle)
        await reserve(received, received.from_thread(), 1, 2)
        Job(handle.send, 3).result()

    run(loop_kind, main)
    assert sent.drain() == [3]
    assert received.drain() == [1, 2]


def test_a_pump_after_the_end_does_nothing(loop_kind: str) -> None:
    """A call that was on its way when the loop ended finds nothing to do, and ending twice is ending once."""
    channel = Channel[int](1)

    async def main() -> None:
        handle = channel.from_thread()
        job = Job(handle.receive)
        await until(lambda: waiting(channel) == (0, 1))
        handle.end()
        handle.end()
        handle._pump()
        with pytest.raises(BrokenResourceError):
            await job

    run(loop_kind, main)
    assert channel.drain() == []


def test_a_thread_that_was_served_before_the_end_gets_what_it_was_served(
    loop_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loop: closes the channel and ends; thread: runs only then, and is told of the close, not of the end."""
    channel = Channel[int](name="c")
    original = Request.wait
    ended = threading.Event()

    def wait(request: Request, _seconds: float) -> bool:
        assert original(request, PATIENCE)
        return ended.wait(PATIENCE)

    monkeypatch.setattr(Request, "wait", wait)

    async def main() -> Job:
        job = Job(list, channel.from_thread())
        await until(lambda: waiting(channel) == (0, 1))
        channel.close()
        return job

    job = run(loop_kind, main)
    ended.set()
    assert job.result() == []


@pytest.fixture
def raw_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that a program closes itself, without the notice that `asyncio.run` gives."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_waiting_threads_notice_a_loop_that_was_just_closed(
    raw_loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that waits looks now and then whether the loop still is."""
    monkeypatch.setattr(_threads, "POLL", 0.01)
    sent, received = Channel[int](name="c"), Channel[int](name="c")

    async def main() -> list[Job]:
        jobs = [Job(sent.from_thread().send, 1), Job(received.from_thread().receive)]
        await until(lambda: waiting(sent) == (1, 0) and waiting(received) == (0, 1))
        return jobs

    jobs = raw_loop.run_until_complete(main())
    raw_loop.close()
    for job in jobs:
        with pytest.raises(BrokenResourceError, match=ENDED):
            job.result()
    assert waiting(sent) == waiting(received) == (0, 0)


def test_requests_that_a_closed_loop_never_saw_are_answered(
    raw_loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that came as the loop stopped ends as well."""
    monkeypatch.setattr(_threads, "POLL", 0.01)
    channel = Channel[int](name="c")

    async def main() -> ThreadChannel[int]:
        return channel.from_thread()

    handle = raw_loop.run_until_complete(main())
    jobs = [Job(handle.send, 1), Job(handle.receive)]
    deadline = monotonic() + PATIENCE
    while not (handle._sending and handle._receiving):
        assert monotonic() < deadline
    raw_loop.close()
    for job in jobs:
        with pytest.raises(BrokenResourceError, match=ENDED):
            job.result()
    assert channel.drain() == []


@pytest.mark.parametrize("operation", ["send", "receive"])
def test_a_thread_that_comes_after_a_loop_was_just_closed_is_told(
    raw_loop: asyncio.AbstractEventLoop, operation: str
) -> None:
    """The loop can't be woken: that is how the thread learns of its end."""
    channel = Channel[int](1, "c")

    async def main() -> ThreadChannel[int]:
        return channel.from_thread()

    handle = raw_loop.run_until_complete(main())
    raw_loop.close()
    with pytest.raises(BrokenResourceError, match=ENDED):
        Job(handle.send, 1).result() if operation == "send" else Job(handle.receive).result()
    handle.close()
    assert channel.drain() == []


def test_close_after_a_loop_was_just_closed_does_nothing(raw_loop: asyncio.AbstractEventLoop) -> None:
    """Closing never fails."""
    channel = Channel[int](1, "c")

    async def main() -> ThreadChannel[int]:
        return channel.from_thread()

    handle = raw_loop.run_until_complete(main())
    raw_loop.close()
    Job(handle.close).result()
    with pytest.raises(BrokenResourceError, match=ENDED):
        Job(handle.receive).result()


async def park_and_lend(channel: Channel[Any]) -> tuple[ThreadChannel[Any], asyncio.Task[Any]]:
    """Leave a task waiting for an item, and room lent to threads."""
    handle = channel.from_thread()
    await asyncio.to_thread(handle.send, "first")
    assert await channel.receive() == "first"
    handle._pump()
    task = asyncio.ensure_future(channel.receive())
    await until(lambda: waiting(channel) == (0, 1))
    return handle, task


def test_tasks_abandoned_in_a_closed_loop_do_not_trouble_threads(raw_loop: asyncio.AbstractEventLoop) -> None:
    """A thread sends into room it was lent, for a task that can't be woken any more: it is told of the end."""
    channel = Channel[Any](3, "c")
    handle, task = raw_loop.run_until_complete(park_and_lend(channel))
    raw_loop.run_until_complete(raw_loop.shutdown_default_executor())
    raw_loop.close()
    # The item may stay in the channel, but "Event loop is closed" is no answer.
    with suppress(BrokenResourceError):
        Job(handle.send, 1).result()
    with pytest.raises(BrokenResourceError, match=ENDED):
        Job(handle.receive).result()
    with pytest.raises(BrokenResourceError, match=ENDED):
        Job(handle.send, 2).result()
    # Nobody will ever end it.
    setattr(task, "_log_destroy_pending", False)  # noqa: B010 -- it isn't in the types of asyncio
    with suppress(RuntimeError):
        task.get_coro().close()


def test_a_channel_used_in_a_second_loop_has_a_new_thread_side(loop_kind: str) -> None:
    """A channel outlives its event loop, and so do its threads' ways into it."""
    channel = Channel[int](1)

    async def main() -> int:
        await Job(channel.from_thread().send, 1)
        number = await channel.receive()
        assert_at_rest(channel)
        return number

    assert run(loop_kind, main) == 1
    assert run(loop_kind, main) == 1


def test_reserved_items_of_a_lost_loop_are_in_one_place(raw_loop: asyncio.AbstractEventLoop) -> None:
    """Items that were reserved when a loop was just closed are the next loop's or the threads', never both's."""
    channel = Channel[Any](5, "c")

    async def first() -> ThreadChannel[Any]:
        handle = channel.from_thread()
        await reserve(channel, handle, 1, 2, 3)
        return handle

    handle = raw_loop.run_until_complete(first())
    raw_loop.close()

    async def second() -> list[Any]:
        got = [await channel.receive() for _ in range(3)]
        # An IndexError, or an item twice, if it still believed to have them.
        with pytest.raises(BrokenResourceError, match=ENDED):
            await Job(handle.receive)
        with pytest.raises(WouldBlock):
            channel.receive_nowait()
        assert channel._state.room == 5
        assert_at_rest(channel)
        return got

    assert asyncio.run(second()) == [1, 2, 3]


def test_the_thread_of_a_closed_loop_is_like_any_other(raw_loop: asyncio.AbstractEventLoop) -> None:
    """Once the loop is closed, its own thread gets BrokenResourceError; nothing can be blocked any more."""
    channel = Channel[int](name="c")

    async def main() -> ThreadChannel[int]:
        return channel.from_thread()

    handle = raw_loop.run_until_complete(main())
    raw_loop.close()
    with pytest.raises(BrokenResourceError, match=ENDED):
        handle.receive(timeout=1)


# Being dropped


async def test_a_dropped_channel_leaves_no_warning(backend: str) -> None:
    """The notice of the loop's end goes with the channel: no warning, and nothing is kept alive."""
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(20):
            channel = Channel[int](2)
            handle = channel.from_thread()
            await Job(handle.send, number)
            # An entry in a waiting room, too, must not hold it.
            channel._state.receivers.append((Parked(Request(), handle._hand_over), handle))
            gone = weakref.ref(handle)
            state: weakref.ref[ChannelState[int]] = weakref.ref(channel._state)
            del channel, handle
            await checkpoint()
            gc.collect()
            assert gone() is None
            assert state() is None
        await checkpoint()
    assert [str(warning.message) for warning in caught] == []


def test_a_thread_side_may_be_dropped_while_the_end_is_told(loop_kind: str) -> None:
    """Loop: tells that it ends; garbage collector, in between: collects the thread side, which wants no notice."""
    told: list[BaseException | None] = []

    def drop() -> None:
        try:
            cancel()
        except RuntimeError as error:
            told.append(error)
        else:
            told.append(None)

    cancel: Any = None

    async def main() -> None:
        nonlocal cancel
        home = current_home()
        assert home is not None
        cancel = home.on_end(drop)

    run(loop_kind, main)
    assert told == [None]


async def test_a_channel_that_is_kept_while_its_thread_side_is_dropped() -> None:
    """The channel keeps its thread side: what was lent to it is never lost."""
    channel = Channel[int](2)
    await Job(channel.from_thread().send, 1)
    gc.collect()
    handle = channel.from_thread()
    await Job(handle.send, 2)
    assert channel.drain() == [1, 2]
    assert_at_rest(channel)


async def test_a_thread_that_waits_for_long_goes_on_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking whether the loop has ended is not the end of the wait."""
    monkeypatch.setattr("chanflow._channel._threads.POLL", 0.001)
    channel = Channel[int]()
    original = Request.wait
    looks: list[bool] = []

    def wait(request: Request, seconds: float) -> bool:
        looks.append(original(request, seconds))
        return looks[-1]

    monkeypatch.setattr(Request, "wait", wait)
    job = Job(channel.from_thread().receive)
    await until(lambda: len(looks) > 3)
    await channel.send(1)
    assert await job == 1
    assert looks[-1]
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


def test_a_loss_is_noticed_once(raw_loop: asyncio.AbstractEventLoop) -> None:
    """Two threads notice that the loop is over: the second finds nothing to do."""
    channel = Channel[int](1, "c")

    async def main() -> Any:
        return channel.from_thread()

    handle = raw_loop.run_until_complete(main())
    raw_loop.close()
    handle._lost()
    handle._lost()
    with pytest.raises(BrokenResourceError, match=ENDED):
        Job(handle.receive).result()


# What asks for what is long there, and what can't be served


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


async def test_regression_a_batch_is_cancelled_while_a_thread_takes() -> None:
    """In the tick in which very many items come: all of them arrive, with the batch's own at first."""
    channel = Channel[int](math.inf)
    handle = channel.from_thread()
    received: list[int] = []

    async def collect() -> None:
        with anyio.CancelScope() as scope:
            scopes.append(scope)
            await channel.receive_many(10**6, max_wait=1e6)

    scopes: list[anyio.CancelScope] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect)
        await anyio.wait_all_tasks_blocked()
        channel.send_nowait(0)
        await anyio.wait_all_tasks_blocked()
        jobs = [Job(lambda: received.extend(handle))]
        await until(lambda: len(channel._state.receivers) == 2)
        await channel.send_many(range(1, 100_000))
        scopes[0].cancel()
    channel.close()
    await jobs[0]
    assert sorted(received) == list(range(100_000))
    assert_at_rest(channel)


async def test_what_counts_the_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called in each forked process, where nothing else can be asked of it."""
    handle = Channel[int](1, "c").from_thread()
    monkeypatch.setattr(_threads.Process, "forks", _threads.Process.forks)
    _threads.Process.forked()
    message = "<ThreadChannel of channel 'c'> was made before a fork: its event loop runs in the parent process only"
    for call in handle.close, handle.receive, partial(handle.send, 1):
        with pytest.raises(RuntimeError, match=whole(message)):
            call()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
@pytest.mark.parametrize("call", ["send", "receive", "next", "close"])
async def test_regression_a_forked_process_is_refused(call: str) -> None:
    """Nobody would ever serve it there."""
    channel = Channel[int](1, "c")
    handle = channel.from_thread()
    calls: dict[str, Callable[[], object]] = {
        "send": lambda: handle.send(1),
        "receive": lambda: handle.receive(1),
        "next": lambda: next(handle),
        "close": handle.close,
    }
    with warnings.catch_warnings():
        # Python warns of forks beside threads, which is what this is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        status = 1
        try:
            calls[call]()
        except RuntimeError as error:
            message = (
                "<ThreadChannel of channel 'c'> was made before a fork: its event loop runs in the parent process only"
            )
            status = 0 if str(error) == message else 2
        finally:
            os._exit(status)
    _, status = await Job(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    channel.send_nowait(1)
    assert await Job(handle.receive) == 1
