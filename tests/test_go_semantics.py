"""What Go's own tests ask of channels and select, asked again: the ideas of `test/chan` and `runtime/chan_test.go`.

Each test is named after the Go one. Where chanflow differs on purpose, the test says so.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from fractions import Fraction
from functools import partial
from itertools import islice, pairwise
from math import factorial
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream, WouldBlock, wait_all_tasks_blocked
from anyio.abc import TaskGroup

from chanflow import Case, Channel, ReceiveChannel, Send, SendChannel, after, select, select_nowait
from chanflow._channel import _select as select_module
from tests.support.channels import assert_at_rest

pytestmark = pytest.mark.anyio


async def blocks(operation: Callable[[], Awaitable[Any]]) -> bool:
    """Tell whether an operation waits for what nobody is going to do."""
    with anyio.move_on_after(1) as scope:
        await operation()
    return scope.cancelled_caught


async def spawn(tasks: TaskGroup, operation: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Start an operation, wait until it waits, and give the list that its result comes into."""
    kept: list[Any] = []

    async def run() -> None:
        kept.append(await operation())

    tasks.start_soon(run)
    await wait_all_tasks_blocked()
    return kept


# test/chan


async def test_fifo_asynch() -> None:
    """test/chan/fifo.go, AsynchFifo: what is buffered comes out in order."""
    channel = Channel[int](10)
    for number in range(10):
        await channel.send(number)
    assert [await channel.receive() for _ in range(10)] == list(range(10))
    assert_at_rest(channel)


async def test_fifo_synch() -> None:
    """test/chan/fifo.go, SynchFifo: a chain of tasks, each released by the one before, takes in order."""
    channel = Channel[int]()
    took: list[int] = []

    async def take(number: int, turn: Channel[None], done: Channel[None]) -> None:
        await turn.receive()
        assert await channel.receive() == number
        took.append(number)
        await done.send(None)

    async with anyio.create_task_group() as tasks:
        first = turn = Channel[None]()
        for number in range(10):
            done = Channel[None]()
            tasks.start_soon(take, number, turn, done)
            turn = done
        await first.send(None)
        for number in range(10):
            await channel.send(number)
        await turn.receive()
    assert took == list(range(10))
    assert_at_rest(channel)


async def test_fifo_of_waiters() -> None:
    """Go's waiting queues are first come first served, for receivers and for senders, in a select or not."""
    channel, quiet = Channel[int](), Channel[int]()
    served: list[int] = []

    async def receive(number: int) -> None:
        if number % 2:
            await channel.receive()
        else:
            await select(quiet, channel)
        served.append(number)

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(receive, number)
            await wait_all_tasks_blocked()
        for number in range(20):
            channel.send_nowait(number)
            await wait_all_tasks_blocked()
        assert served == list(range(20))
        for number in range(20):
            tasks.start_soon(channel.send, number)
            await wait_all_tasks_blocked()
        assert [channel.receive_nowait() for _ in range(20)] == list(range(20))
    assert_at_rest(channel)
    assert_at_rest(quiet)


async def test_goroutines() -> None:
    """test/chan/goroutines.go: a daisy chain of 1,000 tasks, each adding one on the way."""
    links = [Channel[int]() for _ in range(1_001)]

    async def add_one(left: Channel[int], right: Channel[int]) -> None:
        await left.send(1 + await right.receive())

    async with anyio.create_task_group() as tasks:
        for left, right in pairwise(links):
            tasks.start_soon(add_one, left, right)
        await links[-1].send(1)
        assert await links[0].receive() == 1_001
    assert_at_rest(*links)


@pytest.mark.parametrize("buffer", [0, 10])
@pytest.mark.parametrize("item", [1, "text", 1.5, None, (1, 2)])
async def test_nonblock(buffer: int, item: Any) -> None:
    """test/chan/nonblock.go: operations that don't block, with nobody there, with room, and with somebody waiting."""
    channel = Channel[Any](buffer)
    for receive in (channel.receive_nowait, partial(select_nowait, channel)):
        with pytest.raises(WouldBlock):
            receive()
    async with anyio.create_task_group() as tasks:
        for send in (channel.send_nowait, lambda item: select_nowait(Send(channel, item))):
            if not buffer:
                with pytest.raises(WouldBlock):
                    send(item)
            got = await spawn(tasks, channel.receive)
            send(item)
            with pytest.raises(WouldBlock):
                channel.receive_nowait()
            await wait_all_tasks_blocked()
            assert got == [item]
        for _ in range(buffer):
            channel.send_nowait(item)
        with pytest.raises(WouldBlock):
            channel.send_nowait(item)
        sent = await spawn(tasks, lambda: channel.send(item))
        assert sent == []
        assert [select_nowait(channel).item for _ in range(buffer + 1)] == [item] * (buffer + 1)
    assert sent == [None]
    assert_at_rest(channel)


async def test_doubleselect() -> None:
    """test/chan/doubleselect.go: a select with the same item on several channels sends it on exactly one."""
    channels = [Channel[int]() for _ in range(4)]
    collected = Channel[int]()
    count = 5_000

    async def send() -> None:
        for number in range(count):
            await select(*(Send(channel, number) for channel in channels))
        for channel in channels:
            channel.close()

    async def forward(channel: Channel[int], out: SendChannel[int]) -> None:
        with out:
            async for number in channel:
                await out.send(number)

    async with anyio.create_task_group() as tasks:
        with collected.sender as out:
            for channel in channels:
                tasks.start_soon(forward, channel, out.clone())
        tasks.start_soon(send)
        assert sorted([number async for number in collected]) == list(range(count))
    assert_at_rest(*channels, collected)


async def test_select() -> None:
    """test/chan/select.go: a loop that switches its cases off by None gets all counts through, each once."""
    data, control = Channel[int](), Channel[int]()
    got: list[int] = []

    async def send() -> None:
        numbers = iter(range(1_000))
        target_data: Channel[int] | None = data
        target_control: Channel[int] | None = control
        for number in numbers:
            case = await select(
                None if target_data is None else Send(target_data, number),
                None if target_control is None else Send(target_control, -number),
            )
            # Whichever took it is off for the next turn, as the Go test's functions return nil.
            target_data, target_control = (None, control) if case.index == 0 else (data, None)
        data.close()
        control.close()

    async def receive(channel: Channel[int]) -> None:
        got.extend([abs(number) async for number in channel])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive, data)
        tasks.start_soon(receive, control)
        tasks.start_soon(send)
    assert sorted(got) == list(range(1_000))
    assert abs(data.statistics().sent - control.statistics().sent) <= 1
    assert_at_rest(data)
    assert_at_rest(control)


async def test_select2() -> None:
    """test/chan/select2.go: a select that loses a case again and again leaves nothing in that channel."""
    channel, dummy = Channel[int](), Channel[int]()

    async def send() -> None:
        for number in range(10_000):
            await select(Send(channel, number), Send(dummy, number))

    async def receive() -> None:
        for _ in range(10_000):
            assert (await select(channel, after(math.inf), None)).index == 0
            assert len(dummy._state.senders) <= 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        tasks.start_soon(receive)
    assert len(dummy._state.senders) == 0
    assert_at_rest(channel)
    assert_at_rest(dummy)


async def test_select3() -> None:
    """test/chan/select3.go: which operations block, for nil, closed, full and empty channels."""
    empty, full, closed = Channel[int](), Channel[int](1), Channel[int](1)
    full.send_nowait(1)
    closed.close()
    # A select of nothing, and of nil channels only.
    assert await blocks(select)
    assert await blocks(lambda: select(None))
    assert await blocks(lambda: select(None, None))
    # Unbuffered and full channels.
    assert await blocks(empty.receive)
    assert await blocks(lambda: empty.send(1))
    assert await blocks(lambda: select(empty, Send(empty, 1)))
    assert await blocks(lambda: full.send(2))
    assert await blocks(lambda: select(Send(full, 2), None))
    # What is ready.
    assert not await blocks(lambda: select(Send(full, 2), full, None, empty))
    assert not await blocks(lambda: select(Send(full, 3), None))
    # A closed channel never blocks.
    assert not await blocks(lambda: select(closed, empty))
    for operation in (closed.receive, lambda: closed.send(1)):
        with pytest.raises((EndOfStream, ClosedResourceError)):
            assert not await blocks(operation)
    assert full.drain() == [3]
    assert_at_rest(empty, full, closed)


async def test_select4() -> None:
    """test/chan/select4.go: a case that is nil for now beside one that has its item already."""
    channel = Channel[int](1)
    blocked = Channel[int]()
    channel.send_nowait(42)
    case = await select(blocked, channel)
    assert (case.index, case.item) == (1, 42)
    assert_at_rest(channel)
    assert_at_rest(blocked)


async def test_select5() -> None:
    """test/chan/select5.go: the operands of all cases are evaluated once, in source order, whichever case happens."""
    log: list[str] = []
    out, inbox, idle = Channel[int](1), Channel[int](1), Channel[int]()

    def note(what: str, value: Any) -> Any:
        log.append(what)
        return value

    for ready in (0, 1):
        log.clear()
        if ready:
            inbox.send_nowait(5)
        case = await select(
            Send(note("idle", idle), note("idle item", 1)),
            Send(note("out", idle if ready else out), note("out item", 2)),
            note("in", inbox),
            note("nil", None),
        )
        assert log == ["idle", "idle item", "out", "out item", "in", "nil"]
        assert case.index == 1 + ready
    assert out.drain() == [2]
    assert_at_rest(out, inbox, idle)


async def test_select6() -> None:
    """test/chan/select6.go, issue 2075: leaving a room from its middle does not break the queue there."""
    c1, c2, c3 = Channel[int](), Channel[int](), Channel[int]()
    async with anyio.create_task_group() as tasks:
        first = await spawn(tasks, c1.receive)
        second = await spawn(tasks, lambda: select(c1, c2))
        third = await spawn(tasks, c1.receive)
        fourth = await spawn(tasks, lambda: select(c3, c1))
        await c2.send(1)
        await wait_all_tasks_blocked()
        assert [case.channel for case in second] == [c2]
        for waiting in (first, third, fourth):
            assert waiting == []
            await c1.send(1)
            await wait_all_tasks_blocked()
            assert len(waiting) == 1
        with pytest.raises(WouldBlock):
            c1.send_nowait(1)
    assert_at_rest(c1, c2, c3)


RECEIVES: dict[str, Callable[[Channel[int], Channel[int]], Awaitable[Any]]] = {
    "receive": lambda channel, _dummy: channel.receive(),
    "select": lambda channel, _dummy: select(channel),
    "select of two": lambda channel, dummy: select(dummy, channel),
}
SENDS: dict[str, Callable[[Channel[int], Channel[int]], Awaitable[Any]]] = {
    "send": lambda channel, _dummy: channel.send(7),
    "select": lambda channel, _dummy: select(Send(channel, 7)),
    "select of two": lambda channel, dummy: select(Send(channel, 7), Send(dummy, 8)),
}


@pytest.mark.parametrize("receive", RECEIVES.values(), ids=RECEIVES.keys())
@pytest.mark.parametrize("send", SENDS.values(), ids=SENDS.keys())
async def test_select7(receive: Callable[..., Awaitable[Any]], send: Callable[..., Awaitable[Any]]) -> None:
    """test/chan/select7.go: ways to receive meet ways to send, whichever comes first, and without waiting."""
    channel, dummy_in, dummy_out = Channel[int](), Channel[int](), Channel[int]()
    to_receive, to_send = partial(receive, channel, dummy_in), partial(send, channel, dummy_out)
    async with anyio.create_task_group() as tasks:
        received = await spawn(tasks, to_receive)
        await to_send()
        await wait_all_tasks_blocked()
        sent = await spawn(tasks, to_send)
        received.append(await to_receive())
        await wait_all_tasks_blocked()
        assert [case if isinstance(case, int) else case.item for case in received] == [7, 7]
        assert len(sent) == 1
        # The other side waits, and this one need not.
        received = await spawn(tasks, to_receive)
        select_nowait(Send(channel, 7))
        sent = await spawn(tasks, to_send)
        assert select_nowait(channel).item == 7
    assert len(received) == len(sent) == 1
    assert_at_rest(channel, dummy_in, dummy_out)


PRIMES = [2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71, 73, 79, 83, 89, 97]


async def test_sieve1() -> None:
    """test/chan/sieve1.go: the prime sieve, a chain of filters that grows by one with each prime."""

    async def generate(out: Channel[int]) -> None:
        number = 2
        while True:
            await out.send(number)
            number += 1

    async def sift(inbox: Channel[int], out: Channel[int], prime: int) -> None:
        async for number in inbox:
            if number % prime:
                await out.send(number)

    primes: list[int] = []
    links = [Channel[int]()]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(generate, links[0])
        while len(primes) < len(PRIMES):
            primes.append(await links[-1].receive())
            links.append(Channel[int]())
            tasks.start_soon(sift, links[-2], links[-1], primes[-1])
        tasks.cancel_scope.cancel()
    assert primes == PRIMES
    assert_at_rest(*links)


async def test_sieve2() -> None:
    """test/chan/sieve2.go: the sieve that merges streams of multiples by a heap, over buffered channels."""
    channels: list[Channel[int]] = []

    async def stream(out: Channel[int], first: int, step: int) -> None:
        while True:
            await out.send(first)
            first += step

    async with anyio.create_task_group() as tasks:

        def start(first: int, step: int) -> Channel[int]:
            channels.append(Channel[int](10))
            tasks.start_soon(stream, channels[-1], first, step)
            return channels[-1]

        primes = [2]
        odds = start(3, 2)
        heads: list[tuple[int, int, Channel[int]]] = []
        while len(primes) < len(PRIMES):
            number = await odds.receive()
            composite = False
            while heads and heads[0][0] <= number:
                head, prime, multiples = heads[0]
                composite = composite or head == number
                heapq.heapreplace(heads, (await multiples.receive(), prime, multiples))
            if not composite:
                primes.append(number)
                multiples = start(number * number, 2 * number)
                heapq.heappush(heads, (await multiples.receive(), number, multiples))
        tasks.cancel_scope.cancel()
    assert primes == PRIMES
    assert_at_rest(*channels)


class PowerSeries:
    """Power series as channels of coefficients, each operation a task: what test/chan/powser1.go does."""

    def __init__(self, tasks: TaskGroup) -> None:
        self.tasks = tasks
        self.channels: list[Channel[Fraction]] = []

    def channel(self, capacity: float = 0) -> Channel[Fraction]:
        self.channels.append(Channel[Fraction](capacity))
        return self.channels[-1]

    def start(self, coefficients: Callable[[], AsyncGenerator[Fraction, None]]) -> Channel[Fraction]:
        out = self.channel()

        async def run() -> None:
            async with aclosing(coefficients()) as generator:
                async for coefficient in generator:
                    await out.send(coefficient)

        self.tasks.start_soon(run)
        return out

    def constant(self, *first: int, rest: int = 0) -> Channel[Fraction]:
        async def coefficients() -> AsyncGenerator[Fraction, None]:
            for coefficient in first:
                yield Fraction(coefficient)
            while True:
                yield Fraction(rest)

        return self.start(coefficients)

    def split(self, series: Channel[Fraction], into: list[Channel[Fraction]]) -> None:
        async def run() -> None:
            async for coefficient in series:
                for out in into:
                    await out.send(coefficient)

        self.tasks.start_soon(run)

    def add(self, left: Channel[Fraction], right: Channel[Fraction]) -> Channel[Fraction]:
        async def coefficients() -> AsyncGenerator[Fraction, None]:
            # Whichever comes first, as the Go program's `get2` does.
            while True:
                case = await select(left, right)
                other = right if case.channel is left else left
                assert case.item is not None
                yield case.item + await other.receive()

        return self.start(coefficients)

    def multiply(self, left: Channel[Fraction], right: Channel[Fraction]) -> Channel[Fraction]:
        async def coefficients() -> AsyncGenerator[Fraction, None]:
            lefts: list[Fraction] = []
            rights: list[Fraction] = []
            while True:
                lefts.append(await left.receive())
                rights.append(await right.receive())
                yield sum((a * b for a, b in zip(lefts, reversed(rights), strict=True)), Fraction(0))

        return self.start(coefficients)

    def derive(self, series: Channel[Fraction]) -> Channel[Fraction]:
        async def coefficients() -> AsyncGenerator[Fraction, None]:
            await series.receive()
            power = 1
            while True:
                yield power * await series.receive()
                power += 1

        return self.start(coefficients)

    def integrate(self, constant: int, series: Channel[Fraction]) -> Channel[Fraction]:
        async def coefficients() -> AsyncGenerator[Fraction, None]:
            yield Fraction(constant)
            power = 1
            while True:
                yield await series.receive() / power
                power += 1

        return self.start(coefficients)

    def exponential(self, series: Channel[Fraction]) -> Channel[Fraction]:
        # Z = exp(U) solves Z' = Z U': a loop of channels.
        out, back = self.channel(), self.channel(math.inf)
        self.split(self.integrate(1, self.multiply(back, self.derive(series))), [back, out])
        return out

    def tangent(self) -> Channel[Fraction]:
        # T = tan x solves T' = 1 + T T.
        out, one, two = self.channel(), self.channel(math.inf), self.channel(math.inf)
        squared = self.multiply(one, two)
        self.split(self.integrate(0, self.add(self.constant(1), squared)), [one, two, out])
        return out


async def test_powser1() -> None:
    """test/chan/powser1.go: power series as channels, with loops, give the coefficients that are known."""

    async def first(series: Channel[Fraction], count: int = 8) -> list[Fraction]:
        return [await series.receive() for _ in range(count)]

    async with anyio.create_task_group() as tasks:
        series = PowerSeries(tasks)
        ones = partial(series.constant, rest=1)
        assert await first(series.add(ones(), ones())) == [2] * 8
        assert await first(series.multiply(ones(), ones())) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert await first(series.derive(ones())) == [1, 2, 3, 4, 5, 6, 7, 8]
        assert await first(series.integrate(0, ones())) == [0, *(Fraction(1, power) for power in range(1, 8))]
        exponential = await first(series.exponential(series.constant(0, 1)), 12)
        assert exponential == [Fraction(1, factorial(power)) for power in range(12)]
        tangent = [0, 1, 0, Fraction(1, 3), 0, Fraction(2, 15), 0, Fraction(17, 315), 0, Fraction(62, 2835)]
        assert await first(series.tangent(), 10) == tangent
        tasks.cancel_scope.cancel()
    assert_at_rest(*series.channels)


async def test_perm() -> None:
    """test/chan/perm.go: a receive-only end can't send, a send-only end can't receive, and only senders close."""
    channel = Channel[int](1)
    with channel.sender as sender, channel.receiver as receiver:
        assert isinstance(sender, SendChannel)
        assert isinstance(receiver, ReceiveChannel)
        for name in ("send", "send_nowait", "send_many"):
            assert hasattr(channel, name)
            assert hasattr(sender, name)
            assert not hasattr(receiver, name)
        for name in ("receive", "receive_nowait", "receive_many", "__aiter__"):
            assert hasattr(channel, name)
            assert hasattr(receiver, name)
            assert not hasattr(sender, name)
        wrong: Any = sender
        with pytest.raises(
            TypeError, match=r"^case 0 must be a Channel, ReceiveChannel, Send, .+, got <SendChannel .+>$"
        ):
            await select(wrong)
        wrong = receiver
        with pytest.raises(TypeError, match=r"^channel must be a Channel or SendChannel, got <ReceiveChannel .+>$"):
            Send(wrong, 1)
        # Go refuses to close a receive-only channel; here that end is given up, and the channel is not closed.
        with receiver.clone():
            pass
        assert not channel.closed
        await sender.send(1)
        assert await receiver.receive() == 1
    assert channel.closed
    assert_at_rest(channel)


async def test_sendstmt() -> None:
    """test/chan/sendstmt.go: channel and item are evaluated before the send waits, the channel first."""
    log: list[str] = []
    inner, outer = Channel[Channel[int]](1), Channel[int](1)

    def note(what: str, value: Any) -> Any:
        log.append(what)
        return value

    inner.send_nowait(outer)
    await note("channel", await inner.receive()).send(note("item", 1))
    assert log == ["channel", "item"]
    # A full channel: both were evaluated although the item is sent later, and as it was then.
    item = 2
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(note("channel", outer).send, note("item", item))
        await wait_all_tasks_blocked()
        item = 3
        assert log == ["channel", "item"] * 2
        assert [await outer.receive(), await outer.receive()] == [1, 2]
    assert_at_rest(inner)
    assert_at_rest(outer)


@pytest.mark.parametrize("buffered", [0, 2])
async def test_closedchan(buffered: int) -> None:
    """test/chan/closedchan.go: what is in a closed channel is received, then its end; sending is an error.

    Closing twice panics in Go. Here it does nothing, as with every `close` of Python and anyio.
    """
    channel = Channel[int](buffered, "c")
    for number in range(buffered):
        channel.send_nowait(number)
    channel.close()
    channel.close()
    await channel.aclose()
    if buffered:
        assert await channel.receive() == 0
        assert await select(channel) == (0, channel, 1, False)
    for _ in range(2):
        with pytest.raises(EndOfStream, match=r"^channel 'c' is closed and drained$"):
            await channel.receive()
        with pytest.raises(EndOfStream, match=r"^channel 'c' is closed and drained$"):
            channel.receive_nowait()
        assert [number async for number in channel] == []
        assert await select(channel, None) == (0, channel, None, True)
        assert select_nowait(channel) == (0, channel, None, True)
        for send in (channel.send, lambda item: select(Send(channel, item)), lambda item: channel.send_many([item])):
            with pytest.raises(ClosedResourceError, match=r"^channel 'c' is closed$"):
                await send(1)
        for send_nowait in (channel.send_nowait, lambda item: select_nowait(Send(channel, item))):
            with pytest.raises(ClosedResourceError, match=r"^channel 'c' is closed$"):
                send_nowait(1)
    assert channel.statistics().sent == buffered
    assert_at_rest(channel)


# runtime/chan_test.go


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


# golang.org/x/sync, by channels


async def test_semaphore() -> None:
    """x/sync/semaphore: a buffered channel of tokens lets so many in at a time, and all of them at last, in turn."""
    tokens = Channel[None](3)
    inside = most = 0
    order: list[int] = []

    async def enter(number: int) -> None:
        nonlocal inside, most
        await tokens.send(None)
        inside += 1
        most = max(most, inside)
        order.append(number)
        await anyio.sleep(1)
        inside -= 1
        await tokens.receive()

    async with anyio.create_task_group() as tasks:
        for number in range(20):
            tasks.start_soon(enter, number)
            await anyio.sleep(0.01)
    assert (inside, most) == (0, 3)
    assert order == list(range(20))
    assert_at_rest(tokens)


async def test_semaphore_try_acquire_and_timeout() -> None:
    """x/sync/semaphore, TryAcquire and a cancelled Acquire: a token is neither lost nor doubled."""
    tokens = Channel[None](1)
    assert select_nowait(Send(tokens, None)).index == 0
    with pytest.raises(WouldBlock):
        select_nowait(Send(tokens, None))
    assert (await select(Send(tokens, None), after(1))).index == 1
    assert len(tokens) == 1
    tokens.receive_nowait()
    assert (await select(Send(tokens, None), after(1))).index == 0
    assert tokens.drain() == [None]
    assert_at_rest(tokens)


async def test_singleflight() -> None:
    """x/sync/singleflight: many who ask at a time share one call, told by closing a channel."""
    calls: list[str] = []
    answers: dict[str, str] = {}
    flights: dict[str, Channel[None]] = {}

    async def ask(key: str) -> str:
        flight = flights.get(key)
        if flight is None:
            flight = flights[key] = Channel[None]()
            calls.append(key)
            await anyio.sleep(1)
            answers[key] = key.upper()
            flight.close()
        else:
            assert (await select(flight)).closed
        return answers[key]

    kept: list[str] = []

    async def keep(key: str) -> None:
        kept.append(await ask(key))

    async with anyio.create_task_group() as tasks:
        for _ in range(100):
            tasks.start_soon(keep, "a")
            tasks.start_soon(keep, "b")
    assert sorted(calls) == ["a", "b"]
    assert Counter(kept) == {"A": 100, "B": 100}
    assert_at_rest(*flights.values())


async def test_waitgroup() -> None:
    """sync.WaitGroup by a channel: whoever waits goes on when the last end is closed."""
    channel = Channel[None]()
    ended: list[int] = []

    async def run(number: int, done: SendChannel[None]) -> None:
        with done:
            await anyio.sleep(number)
            ended.append(number)

    async with anyio.create_task_group() as tasks:
        with channel.sender as done:
            for number in range(10):
                tasks.start_soon(run, number, done.clone())
        assert (await select(channel)).closed
        assert ended == list(range(10))
    assert_at_rest(channel)


async def test_broken_pipe() -> None:
    """What Go lacks: when the last receiver has gone, senders hear of it, waiting or not."""
    channel = Channel[int](0, "pipe")
    async with anyio.create_task_group() as tasks:
        errors: list[str] = []

        async def send() -> None:
            try:
                await channel.send(1)
            except BrokenResourceError as error:
                errors.append(str(error))

        tasks.start_soon(send)
        await wait_all_tasks_blocked()
        channel.receiver.close()
    with pytest.raises(BrokenResourceError, match=r"^channel 'pipe' has no receiver left$"):
        await channel.send(1)
    assert errors == ["channel 'pipe' has no receiver left"]
    assert list(islice(channel.drain(), 1)) == []
    assert_at_rest(channel)
