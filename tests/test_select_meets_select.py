"""Selects that meet selects on one channel or several."""

from __future__ import annotations

from functools import partial
from typing import Any

import anyio
import pytest
from anyio import WouldBlock, wait_all_tasks_blocked

from chanflow import Channel, Send, select, select_nowait
from tests.support.channels import assert_at_rest
from tests.support.operations import keep

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("senders_first", [True, False])
@pytest.mark.parametrize("pairs", [1, 2, 7])
async def test_two_selects_meet(pairs: int, *, senders_first: bool) -> None:
    """On one unbuffered channel selects that send and selects that receive meet in pairs."""
    channel, quiet, idle = Channel[int](), Channel[int](), Channel[int]()
    sent: list[Any] = []
    received: list[Any] = []
    async with anyio.create_task_group() as tasks:
        for number in range(2 * pairs):
            if (number < pairs) == senders_first:
                tasks.start_soon(keep, sent, partial(select, Send(quiet, -1), Send(channel, number % pairs)))
            else:
                tasks.start_soon(keep, received, partial(select, channel, idle))
            await wait_all_tasks_blocked()
    assert sent == [(1, channel, None, False)] * pairs
    assert received == [(0, channel, number, False) for number in range(pairs)]
    assert channel.statistics().sent == pairs
    assert_at_rest(channel, quiet, idle)


async def test_selects_over_two_channels_meet_once() -> None:
    """Two selects that could meet on either of two channels meet on exactly one."""
    kept: list[Any] = []
    left, right = Channel[int](), Channel[int]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(Send(left, 1), Send(right, 1)))
        tasks.start_soon(keep, kept, lambda: select(left, right))
    assert sorted(case.item is None for case in kept) == [False, True]
    assert kept[0].channel is kept[1].channel
    assert left.statistics().sent + right.statistics().sent == 1
    assert_at_rest(left)
    assert_at_rest(right)


async def test_select_does_not_match_itself() -> None:
    """A select that sends to and receives from one unbuffered channel waits for somebody else."""
    channel = Channel[int]()
    with pytest.raises(WouldBlock):
        select_nowait(channel, Send(channel, 1))
    with anyio.move_on_after(1) as scope:
        await select(channel, Send(channel, 1))
    assert scope.cancelled_caught
    assert channel.statistics().sent == 0
    assert_at_rest(channel)
    assert len(channel._state.receivers) == len(channel._state.senders) == 0


@pytest.mark.parametrize("tasks_count", [2, 10])
async def test_selects_that_do_both_meet_each_other(tasks_count: int) -> None:
    """Selects that both send and receive on one channel meet another one, never themselves."""
    channel = Channel[int]()
    met: dict[int, Any] = {}

    async def meet(me: int) -> None:
        met[me] = await select(channel, Send(channel, me))

    async with anyio.create_task_group() as tasks:
        for me in range(tasks_count):
            tasks.start_soon(meet, me)
    receivers = {me: case.item for me, case in met.items() if case.index == 0}
    senders = {me for me, case in met.items() if case.index == 1}
    assert len(receivers) == len(senders) == tasks_count // 2
    assert set(receivers.values()) == senders
    assert_at_rest(channel)


@pytest.mark.parametrize("other_sends", [True, False])
async def test_both_rooms_of_one_select(*, other_sends: bool) -> None:
    """A plain sender or receiver meets the select that waits in both rooms, and the other place is void at once."""
    channel = Channel[int]()
    kept: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(channel, Send(channel, 1)))
        await wait_all_tasks_blocked()
        if other_sends:
            channel.send_nowait(2)
        else:
            assert channel.receive_nowait() == 1
        with pytest.raises(WouldBlock):
            channel.send_nowait(3)
        with pytest.raises(WouldBlock):
            channel.receive_nowait()
    assert kept == [(0, channel, 2, False) if other_sends else (1, channel, None, False)]
    assert_at_rest(channel)
