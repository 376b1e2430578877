"""Channels that drop items, from threads."""

from __future__ import annotations

import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest

from chanflow import Channel
from tests.support.channels import assert_at_rest
from tests.support.threads import PATIENCE, Job, lend, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("bounded")]


@pytest.mark.parametrize(("overflow", "kept"), [("drop_newest", [0, 1]), ("drop_oldest", [8, 9])])
async def test_overflow_holds_for_threads(overflow: Any, kept: list[int]) -> None:
    """A thread that sends into a full channel that drops never waits."""
    channel = Channel[int](2, overflow=overflow)
    handle = channel.from_thread()
    await Job(lambda: [handle.send(number) for number in range(10)])
    assert channel.statistics().dropped == 8
    assert channel.drain() == kept
    assert_at_rest(channel)


@pytest.mark.parametrize(("overflow", "kept"), [("drop_newest", [0, 1]), ("drop_oldest", [8, 9])])
async def test_overflow_holds_for_tasks_beside_threads(overflow: Any, kept: list[int]) -> None:
    """Lent room and reserved items make no difference to what is dropped."""
    channel = Channel[Any](2, overflow=overflow)
    handle = channel.from_thread()
    await lend(channel, handle)
    for number in range(10):
        channel.send_nowait(number)
    assert await Job(lambda: [handle.receive(), handle.receive()]) == kept
    assert channel.statistics().dropped == 8
    assert_at_rest(channel)


class Intruded:
    """A buffer in which something happens between the taking of an item and what follows."""

    def __init__(self, buffer: Any, intrude: Callable[[], object]) -> None:
        self._buffer = buffer
        self._intrude = intrude

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)

    def __len__(self) -> int:
        return len(self._buffer)

    def popleft(self) -> Any:
        item = self._buffer.popleft()
        if threading.current_thread() is threading.main_thread():
            self._intrude()
        return item


async def test_dropping_the_oldest_leaves_threads_what_they_were_promised() -> None:
    """Task: drops the oldest item; thread: takes all that is reserved for it; task: adds its own."""
    channel = Channel[int](2, overflow="drop_oldest")
    handle = channel.from_thread()
    for number in (1, 2):
        channel.send_nowait(number)
    # A request that was given up leaves all items reserved for the next.
    with pytest.raises(TimeoutError):
        Job(handle.receive, timeout=0).result()
    await until(lambda: handle._ledger._claims == 2)
    jobs: list[Job] = []

    def intrude() -> None:
        jobs.append(Job(lambda: [handle.receive(), handle.receive()]))
        deadline = monotonic() + PATIENCE
        while jobs[0].running and not handle._receiving:
            assert monotonic() < deadline

    state = channel._state
    buffer = state.buffer
    intruded: Any = Intruded(buffer, intrude)
    state.buffer = intruded
    channel.send_nowait(3)
    state.buffer = buffer
    assert await jobs[0] == [2, 3]
    assert channel.statistics().dropped == 1
    assert_at_rest(channel)
