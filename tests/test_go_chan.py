"""What Go's own tests ask of channels and select, asked again: the ideas of `test/chan`.

Each test is named after the Go one. Where chanflow differs on purpose, the test says so.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from fractions import Fraction
from functools import partial
from itertools import pairwise
from math import factorial
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, EndOfStream, WouldBlock, wait_all_tasks_blocked
from anyio.abc import TaskGroup

from chanflow import Channel, ReceiveChannel, Send, SendChannel, after, select, select_nowait
from tests.support.channels import assert_at_rest
from tests.support.go import blocks, spawn

pytestmark = pytest.mark.anyio


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
