"""`select` on channels that threads use."""

from __future__ import annotations

from typing import Any

import pytest
from anyio import WouldBlock

from chanflow import Channel, Send, select, select_nowait
from tests.support.channels import assert_at_rest
from tests.support.threads import Job, lend, reserve

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("bounded")]


async def test_select_receives_from_threads() -> None:
    """A parked select is woken by what a thread sends."""
    channel, other = Channel[int](), Channel[int]()
    handle = channel.from_thread()
    job = Job(handle.send, 1)
    case = await select(other, channel)
    assert (case.index, case.item) == (1, 1)
    await job
    assert_at_rest(channel)
    assert_at_rest(other)


async def test_select_sends_to_threads() -> None:
    """A parked select is woken by a thread that receives."""
    channel, other = Channel[int](), Channel[int]()
    job = Job(channel.from_thread().receive)
    case = await select(other, Send(channel, 1))
    assert case.index == 1
    assert await job == 1
    assert_at_rest(channel)
    assert_at_rest(other)


async def test_select_takes_back_what_was_lent() -> None:
    """A case is ready for room that was lent, and for items that were reserved."""
    channel = Channel[Any](1)
    handle = channel.from_thread()
    await lend(channel, handle)
    assert select_nowait(Send(channel, 1)).index == 0
    with pytest.raises(WouldBlock):
        select_nowait(Send(channel, 2))
    assert await Job(handle.receive) == 1
    channel = Channel[Any](2)
    handle = channel.from_thread()
    await reserve(channel, handle, 3)
    assert select_nowait(channel).item == 3
    with pytest.raises(WouldBlock):
        select_nowait(channel)
    assert_at_rest(channel)


async def test_select_wins_and_loses_against_threads() -> None:
    """Selects and threads share all items of a channel."""
    channel, never = Channel[int](1), Channel[int]()
    handle = channel.from_thread()
    producers = [Job(lambda: [handle.send(number) for number in range(50)]) for _ in range(2)]
    consumer = Job(list, handle)
    mine: list[Any] = [(await select(channel, never)).item for _ in range(20)]
    for job in producers:
        await job
    channel.close()
    assert sorted([*mine, *await consumer]) == sorted([*range(50), *range(50)])
    assert_at_rest(channel)
    assert_at_rest(never)
