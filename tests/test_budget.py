"""The shared budget: what finishes at once takes from it, and what has to wait parks at once."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream, wait_all_tasks_blocked

from chanflow import Channel, Group, ReceiveChannel, Send, WorkerGroup, after, select, ticker
from chanflow._loop._home import current_home
from chanflow._work._map import Feed, MapIterator
from tests.support.virtual_time import VirtualTimeLoop

pytestmark = pytest.mark.anyio

OPERATIONS = 1280


def filled(capacity: float = 5, **options: Any) -> Channel[int]:
    channel = Channel[int](capacity, **options)
    for number in range(5 if capacity == math.inf else int(capacity)):
        channel.send_nowait(number)
    return channel


def closed() -> Channel[int]:
    channel = Channel[int](1)
    channel.close()
    return channel


def broken() -> Channel[int]:
    channel = Channel[int](1)
    channel.receiver.close()
    return channel


def closed_sender() -> Any:
    sender = Channel[int](1).sender
    sender.close()
    return sender


def closed_receiver() -> Any:
    receiver = Channel[int](1).receiver
    receiver.close()
    return receiver


def of_threads() -> Channel[int]:
    channel = filled(math.inf)
    channel.from_thread()
    return channel


def closed_ticker() -> Any:
    ticks = ticker(1)
    ticks.close()
    return ticks


def ended_group() -> Any:
    group = WorkerGroup(anyio.sleep)
    group._closing = group._stopping = True
    group._home = current_home()
    return group


def ended_map() -> Any:
    feed: Feed[float, None] = Feed(WorkerGroup(anyio.sleep), [], ordered=True, window=1)
    feed.stopped = True
    return MapIterator(feed)


async def send_and_receive(channel: Channel[int]) -> None:
    """Receive an item of a channel that never runs empty."""
    channel.send_nowait(1)
    await channel.receive()


async def empty(channel: Channel[int]) -> None:
    """Read a channel that is at its end."""
    async for _ in channel:
        raise AssertionError


# What is made once, and what is done with it again and again.
AT_ONCE: dict[str, tuple[Callable[[], Any], Callable[[Any], Awaitable[object]]]] = {
    "send": (lambda: Channel(math.inf), lambda channel: channel.send(1)),
    "send, newest dropped": (lambda: filled(overflow="drop_newest"), lambda channel: channel.send(1)),
    "send, oldest dropped": (lambda: filled(overflow="drop_oldest"), lambda channel: channel.send(1)),
    "send to a closed channel": (closed, lambda channel: channel.send(1)),
    "send to a broken channel": (broken, lambda channel: channel.send(1)),
    "send to a closed end": (closed_sender, lambda end: end.send(1)),
    "send beside threads": (of_threads, lambda channel: channel.send(1)),
    "send_many": (lambda: Channel(math.inf), lambda channel: channel.send_many([1])),
    "send_many of nothing": (lambda: Channel(0), lambda channel: channel.send_many([])),
    "send_many, dropped": (lambda: filled(overflow="drop_newest"), lambda channel: channel.send_many([1])),
    "send_many to a closed end": (closed_sender, lambda end: end.send_many([1])),
    "receive": (lambda: filled(math.inf), send_and_receive),
    "receive beside threads": (of_threads, send_and_receive),
    "receive at the end": (closed, Channel.receive),
    "receive from a closed end": (closed_receiver, ReceiveChannel.receive),
    "async for at the end": (closed, empty),
    "receive_many at the end": (closed, lambda channel: channel.receive_many(5)),
    "receive_many from a closed end": (closed_receiver, lambda end: end.receive_many(5)),
    "select at the end": (closed, select),
    "select, several": (closed, lambda channel: select(channel, Channel[int](), priority=True)),
    "select, sending": (lambda: Channel(math.inf), lambda channel: select(Send(channel, 1))),
    "select, dropped": (lambda: filled(overflow="drop_oldest"), lambda channel: select(Send(channel, 1))),
    "select, a closed end": (closed_receiver, select),
    "select, sending to a closed end": (closed_sender, lambda end: select(Send(end, 1))),
    "submit after the end": (ended_group, lambda group: group.submit(1)),
    "map after its end": (ended_map, lambda results: anext(results, None)),
    "select, a timer": (lambda: None, lambda _: select(after(0))),
    "select, a ticker": (closed_ticker, select),
}


@pytest.mark.parametrize("name", AT_ONCE)
async def test_what_finishes_at_once_takes_from_the_budget(name: str) -> None:
    """So each way of sending, receiving and selecting lets others run, every so often."""
    make, operation = AT_ONCE[name]
    made = make()
    trips = 0

    async def count() -> None:
        nonlocal trips
        while True:
            await anyio.lowlevel.checkpoint()
            trips += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        await anyio.lowlevel.checkpoint()
        begun = trips
        for _ in range(OPERATIONS):
            try:
                await operation(made)
            except (ClosedResourceError, BrokenResourceError, EndOfStream):
                """It finished, too."""
        done = trips - begun
        tasks.cancel_scope.cancel()
    assert done >= OPERATIONS // 128 - 2
    # Nor does it yield each time.
    assert done <= OPERATIONS // 8


async def test_regression_sending_into_a_full_channel_that_drops_can_be_cancelled() -> None:
    """Its deadline comes."""
    for overflow in "drop_oldest", "drop_newest":
        channel = filled(overflow=overflow)
        sent = 0
        with anyio.move_on_after(0) as scope:
            while sent < 100_000:
                await channel.send(1)
                sent += 1
        assert scope.cancelled_caught
        assert sent <= 128


async def forget(case: Any) -> None:
    """Leave dead entries in a waiting room, as a select that is cancelled does."""
    for _ in range(3):
        with anyio.move_on_after(0):
            await select(case)


async def waits(name: str) -> Any:
    """Make an operation that has to wait."""
    empty_channel, full = Channel[int](1), filled(1)
    if "dead" in name:
        await forget(empty_channel)
        await forget(Send(full, 1))
    if "threads" in name:
        empty_channel.from_thread()
        full.from_thread()
        await wait_all_tasks_blocked()
    if "(a closed end)" in name:
        # As after the closing of one of several.
        empty_channel._state.special = full._state.special = True
    operations: dict[str, Callable[[], Any]] = {
        "send": lambda: full.send(1),
        "send_many": lambda: full.send_many([1, 2]),
        "receive": empty_channel.receive,
        "receive_many": lambda: empty_channel.receive_many(5),
        "receive_many, a while": lambda: empty_channel.receive_many(5, max_wait=1),
        "async for": lambda: anext(empty_channel),
        "select": lambda: select(empty_channel, Channel[int](), Send(full, 1)),
        "select, a timer": lambda: select(empty_channel, after(10)),
    }
    return operations[name.partition(" (")[0]]()


WAYS = [
    "send",
    "send_many",
    "receive",
    "receive_many",
    "receive_many, a while",
    "async for",
    "select",
    "select, a timer",
]


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": VirtualTimeLoop})])
@pytest.mark.parametrize("beside", ["", " (dead ones)", " (threads)", " (a closed end)"])
@pytest.mark.parametrize("way", WAYS)
async def test_what_waits_parks_at_once_and_takes_nothing(way: str, beside: str) -> None:
    """Even with no budget left it makes no trip through the event loop first."""
    home = current_home()
    assert home is not None
    for left in 0, 100:
        operation = await waits(way + beside)
        home.renew(left)
        # A checkpoint would give None here, and a task that parks gives what it waits for.
        parked = operation.send(None)
        assert asyncio.isfuture(parked)
        assert home.turns_left() >= left - (way.startswith("select") or "dead" in beside)
        with pytest.raises(asyncio.CancelledError):
            operation.throw(asyncio.CancelledError())


@pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": VirtualTimeLoop})])
async def test_results_and_submissions_park_at_once() -> None:
    """As channels do."""
    home = current_home()
    assert home is not None

    async def handle(_job: int) -> None:
        await anyio.sleep(1000)

    async with WorkerGroup(handle, workers=1, buffer=0) as workers, Group() as group:
        waiting: list[Any] = [
            group.go(anyio.sleep, 1000).__await__(),
            group.go(anyio.sleep, 1000).receive(),
            workers.submit_nowait(1).__await__(),
            workers.submit(2),
        ]
        for operation in waiting:
            home.renew(0)
            assert asyncio.isfuture(operation.send(None))
            with pytest.raises(asyncio.CancelledError):
                operation.throw(asyncio.CancelledError())
        group.cancel()
        assert await workers.shutdown(0) == [1]


# Ends that are closed meanwhile


async def test_regression_a_batch_takes_nothing_more_through_an_end_that_was_closed() -> None:
    """It returns what it has; the next call raises."""
    channel = Channel[int](10)
    receiver = channel.receiver.clone()
    batches: list[list[int]] = []

    async def collect() -> None:
        batches.append(await receiver.receive_many(10, max_wait=100))
        with pytest.raises(ClosedResourceError):
            await receiver.receive_many(10, max_wait=100)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect)
        await wait_all_tasks_blocked()
        channel.send_nowait(1)
        await wait_all_tasks_blocked()
        receiver.close()
        await wait_all_tasks_blocked()
        assert batches == [[1]]
        channel.send_nowait(2)
    assert channel.drain() == [2]
    channel.receiver.close()


async def test_the_same_in_the_tick_in_which_it_was_handed_an_item() -> None:
    """That item is its own, and nothing else."""
    channel = Channel[int](10)
    receiver = channel.receiver.clone()
    batches: list[list[int]] = []

    async def collect() -> None:
        batches.append(await receiver.receive_many(10, max_wait=100))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(collect)
        await wait_all_tasks_blocked()
        channel.send_nowait(1)
        channel.send_nowait(2)
        receiver.close()
    assert batches == [[1]]
    assert channel.drain() == [2]
    channel.receiver.close()


async def test_send_many_sends_nothing_more_through_an_end_that_was_closed() -> None:
    """In the tick in which an item of it was taken."""
    channel = Channel[int](1)
    sender = channel.sender.clone()
    left: list[list[int]] = []

    async def send() -> None:
        items = deque([1, 2, 3, 4])
        with pytest.raises(ClosedResourceError):
            await sender.send_many(items)
        left.append(list(items))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        await wait_all_tasks_blocked()
        assert channel.receive_nowait() == 1
        assert channel.receive_nowait() == 2
        sender.close()
    assert left == [[3, 4]]
    channel.sender.close()


class Counted:
    """A waiter that counts how often it is looked at."""

    looks = 0

    def __init__(self) -> None:
        self.over = False

    def done(self) -> bool:
        Counted.looks += 1
        return self.over

    def set_result(self, _outcome: object) -> None:
        self.over = True


@pytest.mark.parametrize("side", ["sender", "receiver"])
def test_regression_closing_many_ends_looks_at_each_waiter_a_few_times(side: str) -> None:
    """Not at all of them for each end."""
    channel = Channel[int]()
    first = getattr(channel, side)
    ends = [first.clone() for _ in range(1000)]
    Counted.looks = 0
    for end in ends:
        waiter = Counted()
        end._waiters.append(waiter)
        room = channel._state.senders if side == "sender" else channel._state.receivers
        room.append((waiter, end, 1))  # pyright: ignore[reportArgumentType] # what a sender's has
    for end in ends:
        end.close()
    assert Counted.looks <= 10_000
    first.close()


async def test_an_end_forgets_those_who_waited() -> None:
    """A long life of waiting takes no memory."""
    channel = Channel[int]()
    with channel.receiver as receiver:
        for number in range(100):
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(receiver.receive)
                await wait_all_tasks_blocked()
                channel.send_nowait(number)
        assert receiver._waiters is not None
        assert len(receiver._waiters) <= 20


@pytest.mark.parametrize("drained", [True, False])
async def test_a_forgotten_receiver_of_a_drained_channel_warns_of_nothing(*, drained: bool) -> None:
    """Everything was received, so that nobody misses anything."""
    channel = Channel[int](5, "orders")
    channel.send_nowait(1)
    receiver: Any = channel.receiver.clone()
    channel.close()
    if drained:
        assert await receiver.receive() == 1
        receiver = None
    else:
        with pytest.warns(ResourceWarning, match=r"^Unclosed <ReceiveChannel of channel 'orders' at 0x"):
            receiver = None
        channel.drain()
    assert receiver is None


async def test_results_take_from_the_budget_of_a_select() -> None:
    """A failed one as well as one that gave its value."""
    home = current_home()
    assert home is not None
    async with Group() as group:
        for _ in range(2):
            result = group.go(anyio.lowlevel.checkpoint)
            await wait_all_tasks_blocked()
            home.renew(0)
            assert (await select(result, Channel[int]())).channel is result
            assert home.turns_left() > 100


def test_a_closed_end_refuses_outside_of_event_loops_too() -> None:
    """There is no budget to take from."""
    with pytest.raises(ClosedResourceError):
        closed_sender().send(1).send(None)


async def test_a_rendezvous_yields_when_the_budget_is_used_up() -> None:
    """On either side, with somebody waiting on the other."""
    home = current_home()
    assert home is not None
    channel = Channel[int]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.send, 1)
        await wait_all_tasks_blocked()
        home.renew(0)
        assert await channel.receive() == 1
        assert home.turns_left() > 100
        tasks.start_soon(channel.receive)
        await wait_all_tasks_blocked()
        home.renew(0)
        await channel.send(2)
        assert home.turns_left() > 100
