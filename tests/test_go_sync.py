"""What Go's `sync` and `golang.org/x/sync` do, done with channels.

Each test is named after the Go one. Where chanflow differs on purpose, the test says so.
"""

from __future__ import annotations

from collections import Counter
from itertools import islice

import anyio
import pytest
from anyio import BrokenResourceError, WouldBlock, wait_all_tasks_blocked

from chanflow import Channel, Send, SendChannel, after, select, select_nowait
from tests.support.channels import assert_at_rest

pytestmark = pytest.mark.anyio


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
