"""Threads that are interrupted by Ctrl-C while they send or receive, and batches cancelled beside them."""

from __future__ import annotations

import math

import anyio
import pytest
from anyio import WouldBlock

from chanflow import Channel
from tests.support.channels import assert_at_rest
from tests.support.threads import PATIENCE, Interruption, Job, until, waiting

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("bounded")]


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
