"""Workloads of tasks that send to each other through channels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from anyio import create_task_group

from benchmarks.floor import alternate_on_asyncio, alternate_on_trio, call_around_deque
from benchmarks.peers import CHANNELS, Ends
from benchmarks.plan import ASYNCIO, BOTH, TRIO, Entry, UnsupportedError, Workload

__all__ = ["workloads"]

Open = Callable[[int], Ends]
Body = Callable[..., Any]

BATCH = 100
CHAIN = 1000
FAN = 10
OVER = -1
"""An item that tells a receiver to stop; some peers can't be closed, and some can't send None."""


async def send_all(ends: Ends, count: int) -> None:
    send = ends.send
    for number in range(count):
        await send(number)


async def receive_all(ends: Ends, count: int) -> None:
    receive = ends.receive
    for _ in range(count):
        await receive()


async def pass_buffered(open_channel: Open, capacity: int, count: int) -> None:
    ends = open_channel(capacity)
    async with create_task_group() as tasks:
        tasks.start_soon(send_all, ends, count)
        tasks.start_soon(receive_all, ends, count)


async def iterate(open_channel: Open, capacity: int, count: int) -> None:
    ends = open_channel(capacity)
    close = ends.close
    if ends.items is None or close is None:
        msg = "has no `async for`"
        raise UnsupportedError(msg)

    async def produce() -> None:
        await send_all(ends, count)
        close()

    async def consume() -> None:
        async for _ in ends.items:
            pass

    async with create_task_group() as tasks:
        tasks.start_soon(produce)
        tasks.start_soon(consume)


async def ping_pong(open_channel: Open, count: int) -> None:
    there, back = open_channel(0), open_channel(0)

    async def ping() -> None:
        send, receive = there.send, back.receive
        for number in range(count):
            await send(number)
            await receive()

    async def pong() -> None:
        send, receive = back.send, there.receive
        for _ in range(count):
            await send(await receive())

    async with create_task_group() as tasks:
        tasks.start_soon(ping)
        tasks.start_soon(pong)


async def send_batch(ends: Ends, batch: list[int]) -> None:
    send_nowait, would_block = ends.send_nowait, ends.would_block
    if would_block:
        for item in batch:
            try:
                send_nowait(item)
            except would_block:
                await ends.send(item)
    else:
        for item in batch:
            if not send_nowait(item):
                await ends.send(item)


async def receive_batch(ends: Ends) -> list[int]:
    receive_nowait, would_block = ends.receive_nowait, ends.would_block
    batch = [await ends.receive()]
    if would_block:
        try:
            while len(batch) < BATCH:
                batch.append(receive_nowait())
        except would_block:
            pass
    else:
        while len(batch) < BATCH and (item := receive_nowait()) is not None:
            batch.append(item)
    return batch


async def pass_batches(open_channel: Open, count: int) -> None:
    ends = open_channel(1000)
    # Numbers from 1 on: some peers tell nothing from something by its truth.
    batch = list(range(1, BATCH + 1))
    # A batch call of the channel's own is used where there is one, as its user would.
    send_many = getattr(ends.channel, "send_many", None) or partial(send_batch, ends)
    receive_many = getattr(ends.channel, "receive_many", None)
    receive = partial(receive_many, BATCH) if receive_many else partial(receive_batch, ends)

    async def produce() -> None:
        for _ in range(count // BATCH):
            await send_many(batch)

    async def consume() -> None:
        left = count // BATCH * BATCH
        while left:
            left -= len(await receive())

    async with create_task_group() as tasks:
        tasks.start_soon(produce)
        tasks.start_soon(consume)


async def fan_in(open_channel: Open, count: int) -> None:
    ends = open_channel(100)
    async with create_task_group() as tasks:
        for _ in range(FAN):
            tasks.start_soon(send_all, ends, count // FAN)
        tasks.start_soon(receive_all, ends, count // FAN * FAN)


async def fan_out(open_channel: Open, count: int) -> None:
    ends = open_channel(100)

    async def produce() -> None:
        await send_all(ends, count)
        for _ in range(FAN):
            await ends.send(OVER)

    async def consume() -> None:
        receive = ends.receive
        while await receive() != OVER:
            pass

    async with create_task_group() as tasks:
        tasks.start_soon(produce)
        for _ in range(FAN):
            tasks.start_soon(consume)


async def daisy_chain(open_channel: Open, count: int) -> None:
    """Build a chain, and pass one item along it; as often as it takes."""

    async def link(left: Ends, right: Ends) -> None:
        await left.send(1 + await right.receive())

    for _ in range(max(count // CHAIN, 1)):
        leftmost = right = open_channel(0)
        async with create_task_group() as tasks:
            for _ in range(CHAIN):
                left, right = right, open_channel(0)
                tasks.start_soon(link, left, right)
            tasks.start_soon(send_all, right, 1)
            assert await leftmost.receive() == CHAIN


def entries(body: Body, *arguments: Any, unbuffered: bool = False) -> dict[str, Entry]:
    return {
        name: Entry(
            partial(body, peer.open, *arguments),
            peer.backends,
            note="capacity 1, its least" if unbuffered and peer.least else "",
        )
        for name, peer in CHANNELS.items()
    }


def workloads() -> Iterator[Workload]:
    workload = partial(Workload, group="channel", go_scale=20.0)
    deque_floor = {"floor: deque": Entry(call_around_deque, BOTH, note="two bare coroutine calls around a deque")}
    for capacity, count in ((1, 20_000), (100, 40_000), (1000, 40_000)):
        yield workload(
            f"buffered-{capacity}",
            f"Send and receive, capacity {capacity}",
            "item",
            count,
            entries(pass_buffered, capacity) | deque_floor,
        )
    yield workload("async-for", "`async for`, capacity 1000", "item", 40_000, entries(iterate, 1000))
    note = "two tasks alternating on a bare future"
    switch_floor = {
        "floor: switch": Entry(alternate_on_asyncio, ASYNCIO, note=note),
        "floor: switch, trio": Entry(alternate_on_trio, TRIO, note=note),
    }
    yield workload(
        "ping-pong",
        "Ping-pong over two unbuffered channels",
        "round trip",
        20_000,
        entries(ping_pong, unbuffered=True) | switch_floor,
    )
    yield workload("batches", "Batches of 100, capacity 1000", "item", 50_000, entries(pass_batches))
    yield workload("fan-in", "Fan-in, 10 to 1, capacity 100", "item", 20_000, entries(fan_in))
    yield workload("fan-out", "Fan-out, 1 to 10, capacity 100", "item", 20_000, entries(fan_out))
    yield workload(
        "daisy-chain",
        "Daisy chain of 1,000 tasks, made and passed once",
        "task",
        5000,
        entries(daisy_chain, unbuffered=True),
    )
