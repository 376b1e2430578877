"""The workload of a thread that sends into the event loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from anyio import create_task_group, to_thread

from benchmarks.plan import ASYNCIO, BOTH, Entry, Workload

__all__ = ["workloads"]

CAPACITY = 1000


def produce(send: Callable[[Any], Any], count: int) -> None:
    for number in range(count):
        send(number)


async def consume(send: Callable[[Any], Any], receive: Callable[[], Any], count: int) -> None:
    async with create_task_group() as tasks:
        tasks.start_soon(to_thread.run_sync, produce, send, count)
        for _ in range(count):
            await receive()


async def through_chanflow(count: int) -> None:
    from chanflow import Channel

    channel: Channel[int] = Channel(CAPACITY)
    await consume(channel.from_thread().send, channel.receive, count)


async def through_janus(count: int) -> None:
    from janus import Queue

    queue: Queue[int] = Queue(CAPACITY)
    await consume(queue.sync_q.put, queue.async_q.get, count)


async def through_culsans(count: int) -> None:
    from culsans import Queue

    queue: Queue[int] = Queue(CAPACITY)
    await consume(queue.sync_put, queue.async_get, count)


async def through_aiologic(count: int) -> None:
    from aiologic import Queue

    queue: Queue[int] = Queue(CAPACITY)
    await consume(queue.green_put, queue.async_get, count)


async def through_anyio(count: int) -> None:
    from anyio import create_memory_object_stream, from_thread

    sender, receiver = create_memory_object_stream[int](CAPACITY)
    await consume(lambda item: from_thread.run(sender.send, item), receiver.receive, count)


async def through_run_coroutine_threadsafe(count: int) -> None:
    from asyncio import Queue, get_running_loop, run_coroutine_threadsafe

    queue: Queue[int] = Queue(CAPACITY)
    loop = get_running_loop()
    await consume(lambda item: run_coroutine_threadsafe(queue.put(item), loop).result(), queue.get, count)


async def through_call_soon_threadsafe(count: int) -> None:
    from asyncio import Queue, get_running_loop

    queue: Queue[int] = Queue()
    call_soon_threadsafe = get_running_loop().call_soon_threadsafe
    await consume(lambda item: call_soon_threadsafe(queue.put_nowait, item), queue.get, count)


def workloads() -> Iterator[Workload]:
    yield Workload(
        "thread-to-loop",
        "Producer in a thread, consumer in the loop, capacity 1000",
        "item",
        20_000,
        {
            "chanflow": Entry(through_chanflow),
            "janus": Entry(through_janus, ASYNCIO),
            "culsans": Entry(through_culsans),
            "aiologic": Entry(through_aiologic),
            "anyio": Entry(through_anyio, BOTH, scale=0.1, note="from_thread.run"),
            "asyncio.Queue": Entry(
                through_run_coroutine_threadsafe, ASYNCIO, scale=0.1, note="run_coroutine_threadsafe"
            ),
            "asyncio.Queue, unbounded": Entry(
                through_call_soon_threadsafe, ASYNCIO, note="call_soon_threadsafe: no back-pressure"
            ),
        },
        "thread",
        missing={
            "trio": "its channels know no threads",
            "aiochan": "its channels know no threads",
            "asyncio-channel": "its channels know no threads",
        },
    )
