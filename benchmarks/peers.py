"""The channels and queues of others, each with its own calls under the same names.

The calls are the peer's own bound methods: nothing stands between a workload and what it measures.
A peer is imported when it is opened, so that each process imports one of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from attrs import frozen

from benchmarks.plan import ASYNCIO, BOTH, TRIO

__all__ = ["CHANNELS", "DISTRIBUTIONS", "Ends", "Peer"]

# Whose versions the report names.
DISTRIBUTIONS = (
    "chanflow",
    "anyio",
    "trio",
    "aiochan",
    "asyncio-channel",
    "janus",
    "culsans",
    "aiologic",
    "aiometer",
    "aiojobs",
    "huey",
    "taskiq",
    "streaq",
    "arq",
    "coredis",
    "starlette",
    "uvicorn",
    "hypercorn",
    "fastapi",
)


@frozen
class Ends:
    """The calls of one channel."""

    channel: Any
    send: Callable[[Any], Any]
    receive: Callable[[], Any]
    send_nowait: Callable[[Any], Any]
    receive_nowait: Callable[[], Any]
    would_block: tuple[type[Exception], ...] = ()
    """What the nowait calls raise; without it, they return something false."""
    items: Any = None
    """What `async for` goes over."""
    close: Callable[[], Any] | None = None


@frozen
class Peer:
    """One peer's channel."""

    open: Callable[[int], Ends]
    """Make a channel of a capacity, or of the least one that the peer has."""
    backends: tuple[str, ...] = BOTH
    least: int = 0


def open_chanflow(capacity: int) -> Ends:
    from anyio import WouldBlock

    from chanflow import Channel

    channel: Channel[Any] = Channel(capacity)
    return Ends(
        channel,
        channel.send,
        channel.receive,
        channel.send_nowait,
        channel.receive_nowait,
        (WouldBlock,),
        channel,
        channel.close,
    )


def open_queue(capacity: int) -> Ends:
    from asyncio import Queue, QueueEmpty, QueueFull

    queue: Queue[Any] = Queue(max(capacity, 1))
    return Ends(queue, queue.put, queue.get, queue.put_nowait, queue.get_nowait, (QueueFull, QueueEmpty))


def stream_ends(sender: Any, receiver: Any, would_block: type[Exception]) -> Ends:
    """Give the calls of a pair of streams: anyio took the names of its own from trio."""
    return Ends(
        (sender, receiver),
        sender.send,
        receiver.receive,
        sender.send_nowait,
        receiver.receive_nowait,
        (would_block,),
        receiver,
        sender.close,
    )


def open_anyio(capacity: int) -> Ends:
    from anyio import WouldBlock, create_memory_object_stream

    return stream_ends(*create_memory_object_stream[Any](capacity), WouldBlock)


def open_trio(capacity: int) -> Ends:
    from trio import WouldBlock, open_memory_channel

    return stream_ends(*open_memory_channel[Any](capacity), WouldBlock)


def open_aiochan(capacity: int) -> Ends:
    from aiochan import Chan

    channel = Chan(capacity or None)
    return Ends(
        channel, channel.put, channel.get, channel.put_nowait, channel.get_nowait, items=channel, close=channel.close
    )


def open_asyncio_channel(capacity: int) -> Ends:
    from asyncio_channel import create_channel

    channel = create_channel(max(capacity, 1))
    return Ends(channel, channel.put, channel.take, channel.offer, channel.poll, items=channel, close=channel.close)


def open_janus(capacity: int) -> Ends:
    from janus import AsyncQueueEmpty, AsyncQueueFull, Queue

    whole: Queue[Any] = Queue(max(capacity, 1))
    queue = whole.async_q
    return Ends(whole, queue.put, queue.get, queue.put_nowait, queue.get_nowait, (AsyncQueueFull, AsyncQueueEmpty))


def open_culsans(capacity: int) -> Ends:
    from culsans import Queue, QueueEmpty, QueueFull

    queue: Queue[Any] = Queue(max(capacity, 1))
    return Ends(queue, queue.async_put, queue.async_get, queue.put_nowait, queue.get_nowait, (QueueFull, QueueEmpty))


def open_aiologic(capacity: int) -> Ends:
    from functools import partial

    from aiologic import Queue, QueueEmpty, QueueFull

    queue: Queue[Any] = Queue(max(capacity, 1))
    return Ends(
        queue,
        queue.async_put,
        queue.async_get,
        partial(queue.green_put, blocking=False),
        partial(queue.green_get, blocking=False),
        (QueueFull, QueueEmpty),
    )


CHANNELS = {
    "chanflow": Peer(open_chanflow),
    "asyncio.Queue": Peer(open_queue, ASYNCIO, least=1),
    "anyio": Peer(open_anyio),
    "trio": Peer(open_trio, TRIO),
    "aiochan": Peer(open_aiochan, ASYNCIO),
    "asyncio-channel": Peer(open_asyncio_channel, ASYNCIO, least=1),
    "janus": Peer(open_janus, ASYNCIO, least=1),
    "culsans": Peer(open_culsans, least=1),
    "aiologic": Peer(open_aiologic, least=1),
}
