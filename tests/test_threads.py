"""Channels from threads: what is sent arrives, once, in order and within the capacity, and where threads may use it."""

from __future__ import annotations

import math
import threading
from contextlib import suppress
from functools import partial
from random import Random
from time import monotonic

import anyio
import pytest
from anyio import ClosedResourceError, EndOfStream, to_thread
from anyio.lowlevel import checkpoint

from chanflow import Channel, ThreadChannel
from chanflow._channel._threads import Request
from tests.support.channels import assert_at_rest
from tests.support.threads import PATIENCE, Job, until, waiting

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


# Where it may be used


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
