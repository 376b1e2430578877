"""What Go's own tests ask of channels and select, asked again: the ideas of `runtime/chan_test.go`.

Each test is named after the Go one. Where chanflow differs on purpose, the test says so.
"""

from __future__ import annotations

import math
from collections import Counter
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import WouldBlock, wait_all_tasks_blocked

from chanflow import Case, Channel, Send, SendChannel, select, select_nowait
from chanflow._channel import _select as select_module
from tests.support.channels import assert_at_rest
from tests.support.go import blocks, spawn

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("chan_cap", [*range(11), 50, 100, 150, 200])
async def test_chan(chan_cap: int) -> None:
    """Go runtime, TestChan: blocking, not blocking, closing, order and several tasks, at many capacities."""
    # Receiving from an empty channel blocks, and does not with a default.
    channel = Channel[int](chan_cap)
    assert await blocks(channel.receive)
    assert await blocks(lambda: select(channel, None))
    with pytest.raises(WouldBlock):
        select_nowait(channel)
    # Sending to a full one likewise.
    for number in range(chan_cap):
        channel.send_nowait(number)
    assert len(channel) == channel.capacity == chan_cap
    assert await blocks(lambda: channel.send(-1))
    with pytest.raises(WouldBlock):
        select_nowait(Send(channel, -1))
    # Closing lets the items through, then gives the end.
    channel.close()
    assert [await channel.receive() for _ in range(chan_cap)] == list(range(chan_cap))
    assert (await select(channel)).closed
    assert_at_rest(channel)

    # Closing unblocks a receiver.
    channel = Channel[int](chan_cap)
    async with anyio.create_task_group() as tasks:
        unblocked = await spawn(tasks, lambda: select(channel))
        channel.close()
    assert unblocked == [(0, channel, None, True)]
    assert_at_rest(channel)

    # 100 numbers in order.
    channel = Channel[int](chan_cap)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.send_many, range(100))
        assert [await channel.receive() for _ in range(100)] == list(range(100))
    assert_at_rest(channel)

    # Numbers from 4 tasks to 4 tasks, half of them by select; each number 4 times.
    channel = Channel[int](chan_cap)
    got: Counter[int] = Counter()

    async def send(number: int) -> None:
        for item in range(100):
            await (channel.send(item) if number % 2 else select(Send(channel, item), None))

    async def receive(number: int) -> None:
        last = Counter[int]()
        for _ in range(100):
            item = await channel.receive() if number % 2 else (await select(None, channel)).item
            assert item is not None
            last[item] += 1
        got.update(last)

    async with anyio.create_task_group() as tasks:
        for number in range(4):
            tasks.start_soon(send, number)
            tasks.start_soon(receive, number)
    assert got == Counter(list(range(100)) * 4)
    assert_at_rest(channel)


async def test_nonblock_recv_race() -> None:
    """Go runtime, TestNonblockRecvRace: what was sent before a close is seen by a receive that doesn't wait, ever."""

    async def receive(channel: Channel[int]) -> None:
        assert not select_nowait(channel).closed

    for _ in range(1_000):
        channel = Channel[int](1)
        async with anyio.create_task_group() as tasks:
            channel.send_nowait(1)
            tasks.start_soon(receive, channel)
            channel.close()
        assert select_nowait(channel).closed
        assert_at_rest(channel)


async def test_nonblock_select_race() -> None:
    """Go runtime, TestNonblockSelectRace and its 2: where one channel has an item or is closed, one is ready."""

    async def look(one: Channel[int], two: Channel[int], done: Channel[str]) -> None:
        try:
            select_nowait(one, two)
        except WouldBlock:
            done.send_nowait("nothing was ready")
        else:
            done.send_nowait("ready")

    done = Channel[str](1)
    for run in range(1_000):
        one, two = Channel[int](1), Channel[int]()
        async with anyio.create_task_group() as tasks:
            one.send_nowait(1)
            tasks.start_soon(look, one, two, done)
            if run % 2:
                two.close()
            else:
                two.close()
                await select(one, two, priority=True)
            assert await done.receive() == "ready"
        assert_at_rest(one)
        assert_at_rest(two)
    assert_at_rest(done)


@pytest.mark.parametrize("chan_cap", [0, 10])
async def test_self_select(chan_cap: int) -> None:
    """Go runtime, TestSelfSelect: a select that sends to and receives from one channel never receives its own item."""
    channel = Channel[int](chan_cap)
    own: list[int] = []

    async def run(me: int) -> None:
        for turn in range(1_000):
            if me == 0 or turn % 2 == 0:
                case: Case[int | None] = await select(Send(channel, me), channel)
            else:
                case = await select(channel, Send(channel, me))
            own.extend([me] * (case.item == me))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run, 0)
        tasks.start_soon(run, 1)
    if chan_cap == 0:
        assert own == []
    assert_at_rest(channel)


async def test_select_fairness(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go runtime, TestSelectFairness: two channels that are always ready are chosen alike, within 10 sigma."""
    monkeypatch.setattr(select_module, "random", Random(31).random)
    trials = 10_000
    one, two = Channel[int](trials + 1), Channel[int](trials + 1)
    for _ in range(trials + 1):
        one.send_nowait(1)
        two.send_nowait(2)
    three, four = Channel[int](), Channel[int]()
    out, done = Channel[int](), Channel[None]()
    counts: Counter[int] = Counter()

    async def choose() -> None:
        while True:
            case = await select(three, four, one, two)
            item = case.item
            assert item is not None
            if (await select(Send(out, item), done)).index == 1:
                return

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(choose)
        for _ in range(trials):
            counts[await out.receive()] += 1
        await done.send(None)
    assert abs(counts[1] - counts[2]) < 2 * 10 * math.sqrt(trials * 0.25)
    channels: list[Channel[Any]] = [one, two, three, four, out, done]
    assert_at_rest(*channels)


async def test_select_stress() -> None:
    """Go runtime, TestSelectStress: plain senders, plain receivers and selects on four channels at once, none stuck."""
    count = 1_000
    channels = [Channel[int](0), Channel[int](0), Channel[int](2), Channel[int](3)]
    got: list[list[int]] = [[] for _ in channels]

    async def send(channel: Channel[int]) -> None:
        for number in range(count):
            await channel.send(number)

    async def receive(index: int) -> None:
        for _ in range(count):
            got[index].append(await channels[index].receive())

    async def send_selecting() -> None:
        left = [count] * 4
        while any(left):
            cases = [
                Send(channel, count + number) if number else None
                for channel, number in zip(channels, left, strict=True)
            ]
            left[(await select(*cases)).index] -= 1

    async def receive_selecting() -> None:
        left = [count] * 4
        while any(left):
            cases = [channel if number else None for channel, number in zip(channels, left, strict=True)]
            case = await select(*cases)
            left[case.index] -= 1
            assert case.item is not None
            got[case.index].append(case.item)

    async with anyio.create_task_group() as tasks:
        for index, channel in enumerate(channels):
            tasks.start_soon(send, channel)
            tasks.start_soon(receive, index)
        tasks.start_soon(send_selecting)
        tasks.start_soon(receive_selecting)
    everything = [*range(count), *range(count + 1, 2 * count + 1)]
    assert [sorted(items) for items in got] == [everything] * 4
    assert_at_rest(*channels)


WORKERS = 23

ITEMS = 271_828

NUMBERS = (2, 3, 7, 11, 13, 17, 19, 23, 27, 31)


@pytest.mark.parametrize(
    ("queue_capacity", "items"),
    [(0, 5_000), (1, 5_000), (2, 5_000), (10, 20_000), (WORKERS * 3, ITEMS), (math.inf, 20_000)],
)
async def test_multi_consumer(queue_capacity: float, items: int) -> None:
    """Go runtime, TestMultiConsumer: 23 workers forward 271,828 items, each once and in order."""
    queue, results = Channel[int](queue_capacity), Channel[int](queue_capacity)
    producers = 2

    async def produce(producer: int, out: SendChannel[int]) -> None:
        with out:
            for number in range(producer, items, producers):
                await out.send(number)

    async def work(worker: int, out: SendChannel[int]) -> None:
        last = [-1] * producers
        mark = NUMBERS[worker % len(NUMBERS)]
        with out:
            async for number in queue:
                # Each consumer sees what each producer sent in order.
                producer = number % producers
                assert number > last[producer]
                last[producer] = number
                # Mess with the regular turns.
                if NUMBERS[number % len(NUMBERS)] == mark and number % 50 < 10:
                    await anyio.lowlevel.checkpoint()
                await out.send(number)

    seen = bytearray(items)
    async with anyio.create_task_group() as tasks:
        with queue.sender as out:
            for producer in range(producers):
                tasks.start_soon(produce, producer, out.clone())
        with results.sender as out:
            for worker in range(WORKERS):
                tasks.start_soon(work, worker, out.clone())
        async for number in results:
            seen[number] += 1
    assert seen == bytearray([1]) * items
    assert queue.statistics().sent == results.statistics().received == items
    assert_at_rest(queue)
    assert_at_rest(results)


@pytest.mark.parametrize("chan_cap", [0, 1, 10])
async def test_pseudo_random_send(chan_cap: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Go runtime, TestPseudoRandomSend: of two sends to one channel both happen, about as often."""
    monkeypatch.setattr(select_module, "random", Random(37).random)
    count = 1_000
    channel = Channel[int](chan_cap)
    got: list[int] = []

    async def receive() -> None:
        for _ in range(count):
            item = await channel.receive()
            got.append(item)

    async def send() -> None:
        for _ in range(count):
            # Let the receiver wait first, so that the select finds both cases ready.
            await anyio.lowlevel.checkpoint()
            await anyio.lowlevel.checkpoint()
            await select(Send(channel, 0), Send(channel, 1))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        tasks.start_soon(send)
    assert count / 10 < sum(got) < count * 9 / 10
    assert_at_rest(channel)


async def test_select_duplicate_channel() -> None:
    """Go runtime, TestSelectDuplicateChannel: one task may wait on a channel several times, and leaves each place."""
    c, d, e = Channel[int](), Channel[int](), Channel[int]()
    async with anyio.create_task_group() as tasks:
        first = await spawn(tasks, lambda: select(c, c, d))
        second = await spawn(tasks, c.receive)
        await d.send(7)
        await wait_all_tasks_blocked()
        assert first == [(2, d, 7, False)]
        await c.send(8)
        await wait_all_tasks_blocked()
        assert second == [8]
    assert_at_rest(c, d, e)


async def test_chan_send_interface() -> None:
    """Go runtime, TestChanSendInterface: however an item is sent, it is handed over by reference."""
    channel = Channel[object](1)
    item = object()
    await channel.send(item)
    for operation in (channel.send_nowait, lambda item: select_nowait(Send(channel, item))):
        with pytest.raises(WouldBlock):
            operation(item)
    assert await channel.receive() is item
    select_nowait(Send(channel, item), Send(channel, item))
    assert (await select(channel)).item is item
    assert_at_rest(channel)


async def test_nil_channel_in_a_merge() -> None:
    """The Go idiom of setting a drained channel to nil: a merge ends when all its cases are None."""
    inputs: list[Channel[int] | None] = [Channel[int](number) for number in (1, 2, 3)]
    channels = [channel for channel in inputs if channel is not None]
    for channel in channels:
        for number in range(int(channel.capacity)):
            channel.send_nowait(number)
        channel.close()
    got: list[int | None] = []
    while any(channel is not None for channel in inputs):
        case = await select(*inputs)
        if case.closed:
            inputs[case.index] = None
        else:
            got.append(case.item)
    assert sorted(number for number in got if number is not None) == [0, 0, 0, 1, 1, 2]
    assert len(got) == 6
    assert await blocks(lambda: select(*inputs))
    assert_at_rest(*channels)
