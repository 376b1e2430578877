"""Exactly one case of a `select` happens, and the others leave no trace: not in order, items, rooms or memory."""

from __future__ import annotations

import gc
import math
import sys
import tracemalloc
from collections import Counter
from functools import partial
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import WouldBlock, wait_all_tasks_blocked

from chanflow import Channel, Send, after, select
from chanflow._channel import _select as select_module
from tests.support.channels import assert_at_rest
from tests.support.operations import keep

pytestmark = pytest.mark.anyio


# Exactly one


async def test_exactly_one_of_several_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 10,000 selects over several ready cases each time one item moves, and it is the one that is told."""
    monkeypatch.setattr(select_module, "random", Random(1).random)
    choices = Random(2)
    channels = [Channel[int](2) for _ in range(4)]
    happened: Counter[int] = Counter()
    for run in range(10_000):
        cases: list[Any] = []
        for channel in channels:
            channel.drain()
            channel.send_nowait(run)
            cases.append(channel if choices.random() < 0.5 else Send(channel, -run - 1))
        case = await select(*cases)
        for index, channel in enumerate(channels):
            left = channel.drain()
            if index != case.index:
                assert left == [run]
            elif cases[index] is channel:
                assert (case, left) == ((index, channel, run, False), [])
            else:
                assert (case, left) == ((index, channel, None, False), [run, -run - 1])
        happened[case.index] += 1
    assert sorted(happened) == [0, 1, 2, 3]
    assert_at_rest(*channels)


async def test_exactly_one_of_several_that_become_ready_in_one_tick() -> None:
    """In 10,000 waits, of several channels sent to or received from in one tick one loses its item or takes one."""
    choices = Random(3)
    channels = [Channel[int](1) for _ in range(3)]
    full = Channel[int](1)
    full.send_nowait(-1)
    kept: list[Any] = []

    gate = Channel[int](1)

    async def selector() -> None:
        async for run in gate:
            case = await select(*channels, Send(full, run))
            kept.append(case)

    async with anyio.create_task_group() as tasks, gate:
        tasks.start_soon(selector)
        for run in range(10_000):
            gate.send_nowait(run)
            while not channels[0].statistics().tasks_waiting_receive:
                await anyio.lowlevel.checkpoint()
            order = [0, 1, 2, 3]
            choices.shuffle(order)
            for index in order:
                if index == 3:
                    full.receive_nowait()
                else:
                    channels[index].send_nowait(run)
            # The select is woken by the first in order, and by nothing else.
            while not kept:
                await anyio.lowlevel.checkpoint()
            case = kept.pop()
            left = [channel.drain() for channel in channels]
            assert case.index == order[0]
            assert left == [[] if index == case.index else [run] for index in range(3)]
            assert full.drain() == ([run] if case.index == 3 else [])
            full.send_nowait(-1)
    assert_at_rest(*channels, full, gate)


async def test_losers_have_no_side_effect() -> None:
    """The item of a losing Send is not sent, and from a losing channel nothing is taken."""
    winner, idle, ready, out = Channel[int](1), Channel[int](), Channel[int](1), Channel[int](1)
    winner.send_nowait(1)
    ready.send_nowait(2)
    case = await select(winner, idle, Send(idle, 3), ready, Send(out, 4), priority=True)
    assert case == (0, winner, 1, False)
    assert ready.drain() == [2]
    assert (out.statistics().sent, idle.statistics().sent) == (0, 0)
    assert_at_rest(winner, idle, ready, out)


async def test_losers_of_waiting_leave_no_trace() -> None:
    """After a wait, the losing rooms hold nobody: neither their next sender nor their next receiver meets a ghost."""
    winner, idle, full = Channel[int](), Channel[int](), Channel[int](1)
    full.send_nowait(0)
    kept: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(idle, winner, Send(full, 3), Send(idle, 4)))
        await wait_all_tasks_blocked()
        assert idle.statistics()[4:6] == (1, 1)
        assert (winner.statistics().tasks_waiting_receive, full.statistics().tasks_waiting_send) == (1, 1)
        winner.send_nowait(1)
        # In this very tick, before the select runs.
        with pytest.raises(WouldBlock):
            idle.send_nowait(5)
        with pytest.raises(WouldBlock):
            idle.receive_nowait()
        assert full.receive_nowait() == 0
    assert kept == [(1, winner, 1, False)]
    assert full.drain() == []
    assert len(idle._state.receivers) == len(idle._state.senders) == len(full._state.senders) == 0
    assert_at_rest(winner, idle, full)


async def test_loser_passes_its_place_on() -> None:
    """A waiter behind a select in a room is served although the select lost there."""
    shared, other = Channel[str](), Channel[str]()
    kept: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(shared, other))
        await wait_all_tasks_blocked()
        tasks.start_soon(keep, kept, shared.receive)
        await wait_all_tasks_blocked()
        other.send_nowait("to the select")
        shared.send_nowait("to the receiver")
    assert sorted(kept, key=str) == [(1, other, "to the select", False), "to the receiver"]
    assert_at_rest(shared)
    assert_at_rest(other)


async def test_waiters_are_served_in_the_order_in_which_they_came() -> None:
    """Selects and plain receivers share one waiting room, first come first served; so do senders."""
    channel, idle, quiet = Channel[int](), Channel[int](), Channel[int]()
    kept: list[Any] = []

    async def by_select(number: int) -> None:
        kept.append((number, (await select(idle, channel)).item))

    async def by_receive(number: int) -> None:
        kept.append((number, await channel.receive()))

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            tasks.start_soon(by_select if number % 2 else by_receive, number)
            await wait_all_tasks_blocked()
        for number in range(6):
            channel.send_nowait(number)
            await wait_all_tasks_blocked()
    assert kept == [(number, number) for number in range(6)]

    async with anyio.create_task_group() as tasks:
        for number in range(6):
            if number % 2:
                tasks.start_soon(channel.send, number)
            else:
                tasks.start_soon(keep, [], partial(select, Send(quiet, -1), Send(channel, number)))
            await wait_all_tasks_blocked()
        assert [channel.receive_nowait() for _ in range(6)] == [0, 1, 2, 3, 4, 5]
    assert quiet.statistics().sent == 0
    assert_at_rest(channel, idle, quiet)


async def test_items_go_to_waiters_in_order_within_one_tick() -> None:
    """The first who waits gets the first item even if all are sent in one tick, in whatever order they then run."""
    channel, idle = Channel[int](), Channel[int]()
    kept: list[Any] = []

    async def wait(number: int) -> None:
        kept.append((number, (await select(idle, channel)).item if number % 2 else await channel.receive()))

    async with anyio.create_task_group() as tasks:
        for number in range(12):
            tasks.start_soon(wait, number)
            await wait_all_tasks_blocked()
        for number in range(12):
            channel.send_nowait(number)
    assert sorted(kept) == [(number, number) for number in range(12)]
    assert_at_rest(channel)
    assert_at_rest(idle)


async def test_one_channel_in_several_cases() -> None:
    """A channel may be in a select more than once, for either direction; one item moves."""
    channel, out = Channel[int](), Channel[int]()
    kept: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(channel, channel, Send(out, 1), Send(out, 2)))
        await wait_all_tasks_blocked()
        channel.send_nowait(7)
    assert kept == [(0, channel, 7, False)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(channel, channel, Send(out, 1), Send(out, 2)))
        await wait_all_tasks_blocked()
        assert out.receive_nowait() == 1
        with pytest.raises(WouldBlock):
            out.receive_nowait()
    assert kept[1:] == [(2, out, None, False)]
    assert_at_rest(channel)
    assert_at_rest(out)


# Memory


async def test_100_000_selects_leave_nothing_behind() -> None:
    """Selects that wait and lose leave memory and the losing rooms as they were."""
    busy, idle, full = Channel[int](), Channel[int](), Channel[int](1)
    full.send_nowait(0)
    never = after(math.inf)
    longest = 0

    async def selector() -> None:
        nonlocal longest
        for _ in range(100_000):
            await select(busy, idle, Send(full, 1), never)
            longest = max(longest, len(idle._state.receivers), len(full._state.senders))

    async def feeder() -> None:
        send = busy.send
        for number in range(1_000):
            await send(number)
        gc.collect()
        blocks = sys.getallocatedblocks()
        for number in range(79_000):
            await send(number)
        gc.collect()
        assert sys.getallocatedblocks() - blocks < 1_000
        # Tracing makes all several times slower, so it watches the last part.
        tracemalloc.start(1)
        before, _peak = tracemalloc.get_traced_memory()
        for number in range(19_000):
            await send(number)
        gc.collect()
        now, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert now - before < 20_000
        assert peak - before < 200_000
        for number in range(1_000):
            await send(number)

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(selector)
            tasks.start_soon(feeder)
    finally:
        tracemalloc.stop()
    assert longest <= 1
    assert len(idle._state.receivers) == len(full._state.senders) == len(busy._state.receivers) == 0
    assert_at_rest(busy, idle, full)


async def test_losers_beside_one_who_waits_on() -> None:
    """Where somebody else waits too, the dead places of losers are swept before they outnumber the living."""
    busy, shared = Channel[int](), Channel[int]()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(shared.receive)
        await wait_all_tasks_blocked()
        for _ in range(1_000):
            tasks.start_soon(busy.send, 1)
            await select(busy, shared)
            assert len(shared._state.receivers) <= 3
        shared.send_nowait(1)
    assert_at_rest(busy)
    assert_at_rest(shared)
