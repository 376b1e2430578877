"""Which of the ready cases of a `select` happens, and who else gets a turn."""

from __future__ import annotations

import math
from collections import Counter
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest

from chanflow import Channel, Send, after, select, select_nowait
from chanflow._channel import _select as select_module
from tests.support.channels import assert_at_rest

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("count", [2, 3, 5])
async def test_fair_among_ready_cases(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several ready cases happens as often as chance allows, within 10 sigma."""
    monkeypatch.setattr(select_module, "random", Random(4).random)
    runs = 10_000
    ready = [Channel[int](math.inf) for _ in range(count)]
    for channel in ready:
        await channel.send_many(range(runs))
    # Cases that aren't ready don't take anybody's share.
    idle = Channel[int]()
    cases: list[Any] = [idle, *ready, None, Send(idle, 1)]
    happened = Counter([(await select(*cases)).index for _ in range(runs)])
    share = 1 / count
    sigma = math.sqrt(runs * share * (1 - share))
    assert sorted(happened) == list(range(1, count + 1))
    assert all(abs(times - runs * share) < 10 * sigma for times in happened.values())
    assert_at_rest(*ready)


async def test_priority_takes_the_first_ready() -> None:
    """With `priority=True` the first ready case in the order given happens, now and after a timer woke the select."""
    first, second, out = Channel[int](10), Channel[int](10), Channel[int](10)
    for number in range(10):
        first.send_nowait(number)
        second.send_nowait(number)
    taken = [(await select(None, first, second, Send(out, 0), priority=True)).index for _ in range(20)]
    assert taken == [1] * 10 + [2] * 10
    assert select_nowait(after(math.inf), Send(out, 1), after(0), priority=True).index == 1
    timers = [after(1.0) for _ in range(3)]
    assert [(await select(*timers, priority=True)).index for _ in timers] == [0, 1, 2]
    assert_at_rest(first, second, out)


@pytest.mark.parametrize("waited_on", [True, False])
async def test_ready_selects_let_others_run(*, waited_on: bool) -> None:
    """A task that only selects what is ready yields to the event loop every so often."""
    channel = Channel[int](math.inf)
    ran: list[int] = []

    async def other() -> None:
        ran.append(len(channel))

    if waited_on:
        with anyio.move_on_after(1):
            await channel.receive()
    async with anyio.create_task_group() as tasks:
        await anyio.lowlevel.checkpoint()
        tasks.start_soon(other)
        for number in range(1_000):
            await select(Send(channel, number))
        assert ran
    # trio may put this task first once more.
    assert ran[0] <= 257
