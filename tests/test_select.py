"""`select` and `select_nowait`: readiness, waiting, losing, fairness, errors and cancellation."""

from __future__ import annotations

import asyncio
import gc
import math
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from random import Random
from typing import Any, Literal, NamedTuple, Never, assert_type, get_args

import anyio
import anyio.lowlevel
import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream, WouldBlock, wait_all_tasks_blocked

from chanflow import (
    Case,
    Channel,
    Group,
    ReceiveChannel,
    Result,
    Send,
    after,
    select,
    select_nowait,
    set_checkpoint_interval,
    ticker,
)
from chanflow._channel import _select as select_module
from tests.support.channels import assert_at_rest
from tests.support.messages import whole

pytestmark = pytest.mark.anyio

native = pytest.mark.parametrize("anyio_backend", ["asyncio"], indirect=True)
"""For what only asyncio has: cancellation of a task from outside of any scope."""


def dice(seed: int) -> Random:
    """Make a generator that gives the same in every run."""
    return Random(seed)


async def keep(kept: list[Any], operation: Callable[[], Awaitable[Any]]) -> None:
    """Run an operation, and keep its result or its error."""
    try:
        kept.append(await operation())
    except Exception as error:  # noqa: BLE001
        kept.append(error)


def keep_now(kept: list[Any], operation: Callable[[], Any]) -> None:
    """Run an operation that doesn't wait, and keep its result unless it would have to wait."""
    try:
        kept.append(operation())
    except WouldBlock:
        return


# Every kind of case


class Kind(NamedTuple):
    """One kind of case, and how to make one ready."""

    case: Any
    channel: Any
    make_ready: Callable[[], Awaitable[None]]
    item: Any
    assert_settled: Callable[[], None]


@asynccontextmanager
async def receiving(*, end: bool) -> AsyncIterator[Kind]:
    channel = Channel[str](1)
    case = channel.receiver if end else channel

    async def make_ready() -> None:
        channel.send_nowait("item")

    def assert_settled() -> None:
        assert_at_rest(channel)
        assert channel.statistics().received == 1

    yield Kind(case, case, make_ready, "item", assert_settled)
    channel.receiver.close()


@asynccontextmanager
async def sending(*, end: bool) -> AsyncIterator[Kind]:
    channel = Channel[str](1)
    channel.send_nowait("before")
    target = channel.sender if end else channel

    async def make_ready() -> None:
        assert channel.receive_nowait() == "before"

    def assert_settled() -> None:
        assert_at_rest(channel)
        assert channel.drain() == ["sent"]

    yield Kind(Send(target, "sent"), target, make_ready, None, assert_settled)
    channel.close()


@asynccontextmanager
async def result_of_task() -> AsyncIterator[Kind]:
    async with Group() as group:
        go_on = anyio.Event()

        async def task() -> str:
            await go_on.wait()
            return "value"

        result = group.go(task)

        async def make_ready() -> None:
            go_on.set()
            await wait_all_tasks_blocked()

        yield Kind(result, result, make_ready, "value", lambda: assert_at_rest(result._as_channel()))


@asynccontextmanager
async def timer(*, ticking: bool) -> AsyncIterator[Kind]:
    case = ticker(5.0) if ticking else after(5.0)
    yield Kind(case, case, partial(anyio.sleep, 6), anyio.current_time() + 5, lambda: None)


KINDS: dict[str, Callable[[], Any]] = {
    "Channel": partial(receiving, end=False),
    "ReceiveChannel": partial(receiving, end=True),
    "Send to Channel": partial(sending, end=False),
    "Send to SendChannel": partial(sending, end=True),
    "Result": result_of_task,
    "after": partial(timer, ticking=False),
    "ticker": partial(timer, ticking=True),
}

every_kind = pytest.mark.parametrize("open_kind", KINDS.values(), ids=KINDS.keys())


@every_kind
async def test_case_that_is_ready_happens_at_once(open_kind: Callable[[], Any]) -> None:
    """Each kind of case that is ready happens, and tells its place, channel and item."""
    idle = Channel[int]()
    async with open_kind() as kind:
        await kind.make_ready()
        case = await select(idle, None, kind.case)
        assert (case.index, case.channel, case.item, case.closed) == (2, kind.channel, kind.item, False)
        assert case == (2, kind.channel, kind.item, False)
        kind.assert_settled()
    assert_at_rest(idle)


@every_kind
async def test_case_that_becomes_ready_happens(open_kind: Callable[[], Any]) -> None:
    """Each kind of case wakes a select that waits for it."""
    idle = Channel[int]()
    kept: list[Any] = []
    async with open_kind() as kind, anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(Send(idle, 1), kind.case, None))
        await wait_all_tasks_blocked()
        assert kept == []
        await kind.make_ready()
        await wait_all_tasks_blocked()
        assert kept == [(1, kind.channel, kind.item, False)]
        kind.assert_settled()
    assert_at_rest(idle)
    assert idle.statistics().sent == 0


@every_kind
async def test_nowait_takes_what_is_ready(open_kind: Callable[[], Any]) -> None:
    """`select_nowait` refuses to wait for any kind of case, and lets it happen once it is ready."""
    idle = Channel[int]()
    async with open_kind() as kind:
        with pytest.raises(WouldBlock, match=whole("")):
            select_nowait(None, idle, kind.case)
        await kind.make_ready()
        assert select_nowait(idle, kind.case, None) == (1, kind.channel, kind.item, False)
        kind.assert_settled()
    assert_at_rest(idle)


@every_kind
async def test_cancelled_while_waiting(open_kind: Callable[[], Any]) -> None:
    """A select whose scope is cancelled leaves every kind of case as it was, ready for the next."""
    idle = Channel[int]()
    async with open_kind() as kind:
        with anyio.move_on_after(1) as scope:
            await select(kind.case, idle, Send(idle, 1))
        assert scope.cancelled_caught
        assert_at_rest(idle)
        assert idle.statistics().sent == 0
        await kind.make_ready()
        assert await select(kind.case) == (0, kind.channel, kind.item, False)
        kind.assert_settled()


@every_kind
async def test_kinds_as_losers(open_kind: Callable[[], Any]) -> None:
    """Each kind of case can lose, before and after waiting, and happens later all the same."""
    winner = Channel[int](2)
    kept: list[Any] = []
    async with open_kind() as kind:
        winner.send_nowait(1)
        assert (await select(kind.case, winner)).item == 1
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(keep, kept, lambda: select(kind.case, winner))
            await wait_all_tasks_blocked()
            winner.send_nowait(2)
        await kind.make_ready()
        winner.send_nowait(3)
        assert (await select(winner, kind.case, priority=True)).item == 3
        assert select_nowait(kind.case) == (0, kind.channel, kind.item, False)
        kind.assert_settled()
    assert kept == [(1, winner, 2, False)]
    assert_at_rest(winner)


async def test_item_that_is_none() -> None:
    """An item None is told from a closed channel by `closed`."""
    channel = Channel[None](1)
    channel.send_nowait(None)
    channel.close()
    assert await select(channel) == (0, channel, None, False)
    assert await select(channel) == (0, channel, None, True)
    assert_at_rest(channel)


def test_a_case_in_annotations_that_are_evaluated() -> None:
    """`Case[int]` is a case at any place, on every Python."""
    assert Case[int] == Case[int, int]
    assert get_args(Case[int, Literal[0]]) == (int, Literal[0])


async def test_result_is_typed() -> None:
    """The place tells the type of the item; a type checker reads this test."""
    numbers, words = Channel[int](1), Channel[str](1)
    numbers.send_nowait(1)
    case = assert_type(await select(numbers, words), Case[int, Literal[0]] | Case[str, Literal[1]])
    assert assert_type(case.item, int | str | None) == 1
    words.send_nowait("word")
    assert (
        assert_type(
            select_nowait(words, after(math.inf), None),
            Case[str, Literal[0]] | Case[float, Literal[1]] | Case[Never, Literal[2]],
        ).item
        == "word"
    )
    assert_at_rest(numbers)
    assert_at_rest(words)


# Exactly one


async def test_exactly_one_of_several_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    """In 10,000 selects over several ready cases each time one item moves, and it is the one that is told."""
    monkeypatch.setattr(select_module, "random", dice(1).random)
    choices = dice(2)
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
    choices = dice(3)
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


# Selects that meet selects


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


# Fairness


@pytest.mark.parametrize("count", [2, 3, 5])
async def test_fair_among_ready_cases(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of several ready cases happens as often as chance allows, within 10 sigma."""
    monkeypatch.setattr(select_module, "random", dice(4).random)
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


# None, closed and broken


@pytest.mark.parametrize("cases", [(), (None,), (None, None)])
async def test_only_none_waits_until_cancelled(cases: tuple[None, ...]) -> None:
    """Without any case but None, `select` waits for ever, and `select_nowait` has nothing."""
    with anyio.move_on_after(1_000_000) as scope:
        await select(*cases)
    assert scope.cancelled_caught
    with pytest.raises(WouldBlock, match=whole("")):
        select_nowait(*cases)


async def test_closed_and_drained_is_always_ready() -> None:
    """A closed channel first gives what is in it, and is ready with `closed` from then on."""
    channel, idle = Channel[int](2), Channel[int]()
    channel.send_nowait(1)
    channel.close()
    assert await select(idle, channel) == (1, channel, 1, False)
    for _ in range(3):
        assert await select(idle, channel) == (1, channel, None, True)
        assert select_nowait(channel) == (0, channel, None, True)
    assert_at_rest(channel)
    assert_at_rest(idle)


async def test_closed_while_waiting() -> None:
    """Closing wakes every select that waits to receive, each with `closed`."""
    channel, idle = Channel[int](), Channel[int]()
    kept: list[Any] = []
    async with anyio.create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(keep, kept, lambda: select(idle, channel))
        await wait_all_tasks_blocked()
        channel.close()
    assert kept == [(1, channel, None, True)] * 3
    assert_at_rest(channel)
    assert_at_rest(idle)


async def test_send_to_closed_channel() -> None:
    """Sending to a closed channel raises if that case happens, which needs no other to be ready."""
    out, idle, ready = Channel[int](1, "out"), Channel[int](), Channel[int](1)
    out.close()
    ready.send_nowait(1)
    assert (await select(ready, Send(out, 1), priority=True)).item == 1
    with pytest.raises(ClosedResourceError, match=whole("channel 'out' is closed")):
        await select(idle, Send(out, 1))
    with pytest.raises(ClosedResourceError, match=whole("channel 'out' is closed")):
        select_nowait(idle, Send(out, 1))
    assert_at_rest(out, idle, ready)


async def test_send_to_broken_channel() -> None:
    """Sending to a channel without receivers raises, with and without waiting."""
    out, idle = Channel[int](1, "out"), Channel[int]()
    out.receiver.close()
    with pytest.raises(BrokenResourceError, match=whole("channel 'out' has no receiver left")):
        await select(idle, Send(out, 1))
    with pytest.raises(BrokenResourceError, match=whole("channel 'out' has no receiver left")):
        select_nowait(idle, Send(out, 1))
    assert_at_rest(out)
    assert_at_rest(idle)


@pytest.mark.parametrize(
    ("end_it", "error", "message"),
    [
        (lambda channel: channel.close(), ClosedResourceError, "channel 'out' is closed"),
        (lambda channel: channel.sender.close(), ClosedResourceError, "channel 'out' is closed"),
        (lambda channel: channel.receiver.close(), BrokenResourceError, "channel 'out' has no receiver left"),
    ],
    ids=["channel", "sending end", "receiving end"],
)
async def test_send_ended_while_waiting(
    end_it: Callable[[Channel[int]], None], error: type[Exception], message: str
) -> None:
    """A select that waits to send gets the error of what was closed, and its item is not sent."""
    out, idle = Channel[int](0, "out"), Channel[int]()
    kept: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(idle, Send(out.sender, 1)))
        await wait_all_tasks_blocked()
        end_it(out)
    assert [(type(kept[0]), str(kept[0]))] == [(error, message)]
    assert out.statistics().sent == 0
    assert_at_rest(out)
    assert_at_rest(idle)
    out.sender.close()


async def test_receiving_end_closed_while_waiting() -> None:
    """Closing the end that a select waits on ends that select, and no other."""
    channel, idle = Channel[int](0, "in"), Channel[int]()
    clone = channel.receiver.clone()
    kept: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(idle, clone))
        await wait_all_tasks_blocked()
        tasks.start_soon(keep, kept, lambda: select(idle, channel.receiver))
        await wait_all_tasks_blocked()
        clone.close()
        await wait_all_tasks_blocked()
        assert [(type(error), str(error)) for error in kept] == [(ClosedResourceError, "channel 'in' is closed")]
        channel.send_nowait(1)
    assert kept[1:] == [(1, channel.receiver, 1, False)]
    channel.receiver.close()
    assert_at_rest(channel)
    assert_at_rest(idle)


async def test_handed_over_before_its_end_was_closed() -> None:
    """An item handed to a select is received although the end is closed before the select runs."""
    channel = Channel[int]()
    clone = channel.receiver.clone()
    kept: list[Any] = []
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(keep, kept, lambda: select(clone))
        await wait_all_tasks_blocked()
        channel.send_nowait(1)
        clone.close()
    assert kept == [(0, clone, 1, False)]
    channel.receiver.close()
    assert_at_rest(channel)


async def test_ends_closed_before() -> None:
    """A closed end as a case is an error that says whose end it is."""
    channel = Channel[int](1, "both")
    sender, receiver = channel.sender.clone(), channel.receiver.clone()
    sender.close()
    receiver.close()
    for case in (receiver, Send(sender, 1)):
        with pytest.raises(ClosedResourceError, match=whole("this end of channel 'both' is closed")):
            await select(case)
        with pytest.raises(ClosedResourceError, match=whole("this end of channel 'both' is closed")):
            select_nowait(case)
    channel.sender.close()
    channel.receiver.close()
    assert_at_rest(channel)


async def test_broken_channel_as_receiving_case() -> None:
    """Receiving from a channel all of whose receiving ends were closed is an error, not an end of stream."""
    channel = Channel[int](0, "in")
    channel.receiver.close()
    with pytest.raises(ClosedResourceError, match=whole("channel 'in' is closed")):
        await select(channel)
    assert_at_rest(channel)


async def select_from_failing(fail: Callable[[], Awaitable[None]], other: Any) -> tuple[Result[None], list[Any]]:
    """Select from the result of a task that is going to fail, and another case; give what that raised."""
    errors: list[Any] = []
    try:
        async with Group() as group:
            result = group.go(fail)
            with anyio.CancelScope(shield=True):
                await keep(errors, lambda: select(result, other))
            await anyio.sleep(10)
    except ExceptionGroup:
        return result, errors
    raise AssertionError


async def test_result_of_a_failed_task() -> None:
    """The error of a task is raised by the select in which its result happened, ready or waited for."""
    idle = Channel[int]()

    async def fail() -> None:
        await anyio.sleep(1)
        msg = "it failed"
        raise ValueError(msg)

    result, errors = await select_from_failing(fail, idle)
    assert [(type(error), str(error)) for error in errors] == [(ValueError, "it failed")]
    assert await select(result, idle) == (0, result, None, True)
    # Another result, that was there before the select.
    result, _errors = await select_from_failing(fail, after(0))
    with pytest.raises(ValueError, match=whole("it failed")):
        select_nowait(result, idle)
    assert_at_rest(idle)


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


# Wrong use


async def test_wrong_argument() -> None:
    """What is not a case is refused with its place, the rule and what it is."""
    channel = Channel[int](0, "x")
    rule = "must be a Channel, ReceiveChannel, Send, Result, timer or None, got"
    wrong: Any
    for wrong in (3, "channel", channel.sender, [channel]):
        with pytest.raises(TypeError, match=whole(f"case 1 {rule} {wrong!r}")):
            await select(channel, wrong)
        with pytest.raises(TypeError, match=whole(f"case 0 {rule} {wrong!r}")):
            select_nowait(wrong)
    assert repr(Send(channel, 5)) == f"Send(channel={channel!r}, item=5)"
    with pytest.raises(TypeError, match=whole("channel must be a Channel or SendChannel, got 5")):
        Send(5, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=whole(f"channel must be a Channel or SendChannel, got {channel.receiver!r}")):
        Send(channel.receiver, 1)  # type: ignore[arg-type]
    channel.sender.close()
    channel.receiver.close()
    assert_at_rest(channel)


async def test_attribute_error_inside_of_a_case_is_not_hidden() -> None:
    """An AttributeError from within a case is not taken for a wrong argument."""

    class Faulty:
        def _attempt(self, _home: Any) -> bool:
            msg = "from within"
            raise AttributeError(msg)

    faulty: Any = Faulty()
    with pytest.raises(AttributeError, match=whole("from within")):
        await select(faulty)


def test_outside_of_an_event_loop() -> None:
    """`select` needs an event loop; `select_nowait` works without one, as the channel's own `_nowait` calls do."""
    channel = Channel[int](1)
    with pytest.raises(RuntimeError, match=whole("select was used outside of asyncio and trio")):
        select(channel).send(None)
    assert select_nowait(Send(channel, 1), priority=True) == (0, channel, None, False)
    assert select_nowait(channel) == (0, channel, 1, False)
    assert_at_rest(channel)


@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_channel_of_another_loop(other: str) -> None:
    """A channel that belongs to an event loop is refused in another, in either direction."""
    channel = Channel[int](0, "home")
    message = (
        "channel 'home' belongs to another event loop; call channel.from_thread() there, and use here what it returns"
    )
    kept: list[Any] = []

    async def elsewhere() -> None:
        await keep(kept, lambda: select(channel))
        await keep(kept, lambda: select(Send(channel, 1)))
        for operation in (select_nowait, partial(select_nowait, priority=True)):
            with pytest.raises(RuntimeError, match=whole(message)):
                operation(channel)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.receive)
        await wait_all_tasks_blocked()
        thread = threading.Thread(target=lambda: anyio.run(elsewhere, backend=other))
        thread.start()
        thread.join()
        channel.send_nowait(1)
    assert [(type(error), str(error)) for error in kept] == [(RuntimeError, message)] * 2
    assert_at_rest(channel)


async def test_coroutine_closed_while_waiting() -> None:
    """A select whose coroutine is closed by hand waits nowhere any more, so nothing is handed to it."""
    inbox, outbox = Channel[int](), Channel[int]()
    coroutine = select(inbox, Send(outbox, 1))
    coroutine.send(None)
    assert (inbox.statistics().tasks_waiting_receive, outbox.statistics().tasks_waiting_send) == (1, 1)
    coroutine.close()
    with pytest.raises(WouldBlock):
        inbox.send_nowait(1)
    with pytest.raises(WouldBlock):
        outbox.receive_nowait()
    assert_at_rest(inbox)
    assert_at_rest(outbox)


@pytest.mark.parametrize("where", ["asyncio", "trio"])
def test_abandoned_with_its_loop(where: str) -> None:
    """What is left of a select whose event loop has ended goes away silently, and the channel serves another."""
    channel = Channel[int]()
    left: list[Any] = []

    async def abandon() -> None:
        left.append(select(channel))
        left[0].send(None)

    async def use() -> None:
        with pytest.raises(WouldBlock):
            channel.send_nowait(1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(channel.send, 2)
            assert (await select(channel)).item == 2

    anyio.run(abandon, backend=where)
    left.pop().close()
    for backend in ("asyncio", "trio"):
        anyio.run(use, backend=backend)
    assert_at_rest(channel)


async def test_waiting_makes_the_channel_at_home() -> None:
    """A channel belongs to the event loop in which a select first waited on it, for either direction."""
    inbox, outbox = Channel[int](0, "in"), Channel[int](0, "out")
    with anyio.move_on_after(1):
        await select(inbox, Send(outbox, 1))
    kept: list[Any] = []

    async def elsewhere() -> None:
        await keep(kept, inbox.receive)
        await keep(kept, lambda: outbox.send(1))

    thread = threading.Thread(target=lambda: anyio.run(elsewhere))
    thread.start()
    thread.join()
    rest = "belongs to another event loop; call channel.from_thread() there, and use here what it returns"
    assert list(map(str, kept)) == [f"channel 'in' {rest}", f"channel 'out' {rest}"]
    assert_at_rest(inbox)
    assert_at_rest(outbox)


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


async def test_select_cancelled_at_its_checkpoint() -> None:
    """The checkpoint of a ready select comes before the operation: cancelled there, it took nothing."""
    channel = Channel[int](1)
    set_checkpoint_interval(1)
    try:
        with anyio.CancelScope() as scope:
            channel.send_nowait(1)
            scope.cancel()
            await select(channel)
    finally:
        set_checkpoint_interval()
    assert scope.cancelled_caught
    assert channel.drain() == [1]
    assert_at_rest(channel)


# Cancellation in the tick of the hand-over, by scopes


@pytest.mark.parametrize("second_waits", [True, False])
async def test_scope_cancelled_after_the_hand_over(*, second_waits: bool) -> None:
    """A select that was handed an item before its scope is cancelled in that tick returns it, or passes it on."""
    channel, idle = Channel[int](), Channel[int]()
    kept: list[Any] = []
    scope = anyio.CancelScope()

    async def first() -> None:
        with scope:
            kept.append((await select(idle, channel)).item)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        await wait_all_tasks_blocked()
        if second_waits:
            tasks.start_soon(keep, kept, channel.receive)
            await wait_all_tasks_blocked()
        channel.send_nowait(1)
        scope.cancel()
        await wait_all_tasks_blocked()
        kept += channel.drain()
        assert kept == [1]
        tasks.cancel_scope.cancel()
    assert_at_rest(channel)
    assert_at_rest(idle)


async def test_scope_cancelled_before_the_hand_over() -> None:
    """A select whose scope was cancelled is no waiter any more: nothing is handed to it or taken from it."""
    inbox, outbox = Channel[int](), Channel[int]()
    scope = anyio.CancelScope()

    async def first() -> None:
        with scope:
            await select(inbox, Send(outbox, 1))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        await wait_all_tasks_blocked()
        scope.cancel()
        with pytest.raises(WouldBlock):
            inbox.send_nowait(1)
        with pytest.raises(WouldBlock):
            outbox.receive_nowait()
    assert scope.cancelled_caught
    assert (inbox.statistics().sent, outbox.statistics().sent) == (0, 0)
    assert_at_rest(inbox)
    assert_at_rest(outbox)


async def test_scope_cancelled_after_a_send_was_taken() -> None:
    """A Send that was taken before its scope is cancelled in that tick happened: the select returns."""
    channel, idle = Channel[int](), Channel[int]()
    kept: list[Any] = []
    scope = anyio.CancelScope()

    async def first() -> None:
        with scope:
            kept.append(await select(idle, Send(channel, 1)))
            await anyio.sleep(1)
            kept.append("not cancelled")

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(first)
        await wait_all_tasks_blocked()
        assert channel.receive_nowait() == 1
        scope.cancel()
    assert kept == [(1, channel, None, False)]
    assert scope.cancelled_caught
    assert_at_rest(channel)
    assert_at_rest(idle)


# Native cancellation: asyncio only


class Attempt:
    """An asyncio task that runs one operation, then passes one checkpoint, and how to cancel it natively."""

    def __init__(self, how: str, operation: Callable[[], Awaitable[Any]]) -> None:
        self.how = how
        self._operation = operation
        self.happened: list[Any] = []
        self.went_on = False
        self.cancelling: list[int] = []
        self._failure = asyncio.Event()
        self._timeout = asyncio.timeout(None)
        self.task = asyncio.create_task(getattr(self, f"_by_{how}")())

    async def _run(self) -> None:
        self.happened.append(await self._operation())
        # The next checkpoint.
        await asyncio.sleep(0)
        self.went_on = True

    async def _by_cancel(self) -> None:
        await self._run()

    async def _by_timeout(self) -> None:
        try:
            async with self._timeout:
                await self._run()
        finally:
            self.cancelling.append(self.task.cancelling())

    async def _by_group(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._fail())
                await self._run()
        finally:
            self.cancelling.append(self.task.cancelling())

    async def _by_child(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._fail())
            group.create_task(self._run())

    async def _fail(self) -> None:
        await self._failure.wait()
        msg = "abort"
        raise OSError(msg)

    def cancel(self, first: Callable[[], Any] = lambda: None) -> None:
        """Cancel, after doing something else in the very tick, which the task does not see before."""
        loop = asyncio.get_running_loop()
        if self.how == "cancel":
            first()
            self.task.cancel()
        elif self.how == "timeout":
            # In the loop's queue: the hand-over, the timeout, then what the hand-over woke.
            loop.call_soon(first)
            self._timeout.reschedule(loop.time())
        else:
            # In the loop's queue: the failing task, the hand-over, the abort, then what the hand-over woke.
            self._failure.set()
            loop.call_soon(first)

    async def end(self) -> None:
        """Wait for the task, and check that it ended as such a cancellation ends it."""
        await asyncio.wait([self.task])
        if self.how == "cancel":
            assert self.task.cancelled()
            return
        error = self.task.exception()
        if self.how == "timeout":
            assert isinstance(error, TimeoutError)
        else:
            assert isinstance(error, ExceptionGroup)
            assert [str(one) for one in error.exceptions] == ["abort"]
        assert self.cancelling in ([], [0])


natively = pytest.mark.parametrize("how", ["cancel", "timeout", "group", "child"])


@native
@natively
async def test_native_cancellation_while_waiting(how: str) -> None:
    """A natively cancelled select took and sent nothing, and waits nowhere any more."""
    inbox, outbox = Channel[int](), Channel[int]()
    attempt = Attempt(how, lambda: select(inbox, Send(outbox, 1), after(1_000)))
    await wait_all_tasks_blocked()
    attempt.cancel()
    await attempt.end()
    assert attempt.happened == []
    assert (inbox.statistics().sent, outbox.statistics().sent) == (0, 0)
    assert len(inbox._state.receivers) == len(outbox._state.senders) == 0
    assert_at_rest(inbox)
    assert_at_rest(outbox)


@native
@natively
@pytest.mark.parametrize("next_waits", ["receive", "select", "nobody"])
async def test_native_cancellation_in_the_tick_of_the_hand_over(how: str, next_waits: str) -> None:
    """An item handed to a select that is natively cancelled in that tick goes to the next, or stays."""
    channel, idle = Channel[int](), Channel[int]()
    kept: list[Any] = []
    attempt = Attempt(how, lambda: select(idle, channel))
    await wait_all_tasks_blocked()
    if next_waits == "receive":
        waiting = asyncio.create_task(keep(kept, channel.receive))
    elif next_waits == "select":
        waiting = asyncio.create_task(keep(kept, lambda: select(channel, idle)))
    else:
        waiting = asyncio.create_task(keep(kept, partial(asyncio.sleep, 0, "nobody")))
    await wait_all_tasks_blocked()
    attempt.cancel(first=lambda: channel.send_nowait(1))
    await attempt.end()
    await waiting
    assert attempt.happened == []
    assert channel.drain() == ([1] if next_waits == "nobody" else [])
    assert kept == [{"receive": 1, "select": (0, channel, 1, False), "nobody": "nobody"}[next_waits]]
    assert_at_rest(channel)
    assert_at_rest(idle)


@native
@natively
async def test_native_cancellation_in_the_tick_in_which_a_send_was_taken(how: str) -> None:
    """A Send that was taken happened: the select returns, and the cancellation arrives at the next checkpoint."""
    channel, idle = Channel[int](), Channel[int]()
    taken: list[int] = []
    attempt = Attempt(how, lambda: select(idle, Send(channel, 1)))
    await wait_all_tasks_blocked()
    attempt.cancel(first=lambda: taken.append(channel.receive_nowait()))
    await attempt.end()
    assert taken == [1]
    assert attempt.happened == [(1, channel, None, False)]
    assert not attempt.went_on
    assert_at_rest(channel)
    assert_at_rest(idle)


@native
async def test_cancelling_is_right_after_a_late_cancellation() -> None:
    """A task that was cancelled too late counts as many requests after the select as were made, with their message."""
    channel = Channel[int]()
    seen: list[Any] = []

    async def sender() -> None:
        task = asyncio.current_task()
        assert task is not None
        await select(Send(channel, 1))
        seen.append(task.cancelling())
        try:
            await asyncio.sleep(1)
        except asyncio.CancelledError as error:
            seen.extend([task.cancelling(), error.args])
            task.uncancel()
        # It arrives once.
        await asyncio.sleep(1)
        seen.append(task.cancelling())

    task = asyncio.create_task(sender())
    await wait_all_tasks_blocked()
    assert channel.receive_nowait() == 1
    task.cancel("too late")
    await task
    assert seen == [1, 1, ("too late",), 0]
    assert_at_rest(channel)


@native
async def test_timeout_that_comes_too_late() -> None:
    """`asyncio.timeout` around nothing but a Send that was taken neither raises nor leaves a request behind."""
    channel = Channel[int]()
    timeout = asyncio.timeout(None)
    kept: list[Any] = []

    async def sender() -> None:
        async with timeout:
            kept.append(await select(Send(channel, 1)))
        task = asyncio.current_task()
        assert task is not None
        kept.append(task.cancelling())
        await asyncio.sleep(1)
        kept.append(task.cancelling())

    task = asyncio.create_task(sender())
    await wait_all_tasks_blocked()
    loop = asyncio.get_running_loop()
    loop.call_soon(channel.receive_nowait)
    timeout.reschedule(loop.time())
    await task
    assert timeout.expired()
    assert kept == [(0, channel, None, False), 0, 0]
    assert_at_rest(channel)


@native
async def test_late_timeout_while_cleaning_up_after_a_cancellation() -> None:
    """A late timeout that was withdrawn doesn't cancel a task again that is ending because of an earlier request."""
    channel = Channel[int]()
    timeout = asyncio.timeout(None)
    kept: list[Any] = []

    async def sender() -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await asyncio.sleep(1_000)
        finally:
            async with timeout:
                kept.append(await select(Send(channel, 1)))
            kept.append(task.cancelling())
            await asyncio.sleep(1)
            kept.append("cleaned up")

    task = asyncio.create_task(sender())
    await wait_all_tasks_blocked()
    task.cancel()
    await wait_all_tasks_blocked()
    loop = asyncio.get_running_loop()
    loop.call_soon(channel.receive_nowait)
    timeout.reschedule(loop.time())
    await asyncio.wait([task])
    assert kept == [(0, channel, None, False), 1, "cleaned up"]
    assert_at_rest(channel)


@native
@pytest.mark.parametrize("hops", range(6))
@pytest.mark.parametrize("sends", [True, False])
async def test_wait_for_around_a_hand_over(hops: int, *, sends: bool) -> None:
    """Wherever `asyncio.wait_for` ends about the hand-over, the item is delivered or not, and it tells which."""
    channel, idle = Channel[int](), Channel[int]()
    loop = asyncio.get_running_loop()
    cases = (idle, Send(channel, 1)) if sends else (idle, channel)
    got: list[int] = []

    def hand_over(left: int) -> None:
        if left:
            loop.call_soon(hand_over, left - 1)
        elif sends:
            keep_now(got, channel.receive_nowait)
        else:
            keep_now(got, lambda: channel.send_nowait(1))

    due = loop.time() + 1
    early = hops % 2
    if early:
        loop.call_at(due, hand_over, hops // 2)
    kept: list[Any] = []
    task = asyncio.create_task(keep(kept, lambda: asyncio.wait_for(select(*cases), 1)))
    await asyncio.sleep(0)
    if not early:
        loop.call_at(due, hand_over, hops // 2)
    await task
    await asyncio.sleep(1)
    assert task.cancelling() == 0
    happened = not isinstance(kept[0], TimeoutError)
    if sends:
        assert got == ([1] if happened else [])
    else:
        assert channel.drain() == ([1] if got and not happened else [])
    if happened:
        assert kept == [(1, channel, None if sends else 1, False)]
    assert_at_rest(channel)
    assert_at_rest(idle)


@native
@pytest.mark.parametrize("sends", [True, False])
async def test_cancelled_in_the_tick_of_closing(*, sends: bool) -> None:
    """A native cancellation in the tick in which a channel is closed wins: nothing happened that would be lost."""
    channel = Channel[int]()
    task = asyncio.create_task(select(Send(channel, 1) if sends else channel))
    await wait_all_tasks_blocked()
    channel.close()
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert channel.statistics().sent == 0
    assert_at_rest(channel)


@native
async def test_cancelled_in_the_tick_in_which_a_timer_came() -> None:
    """A native cancellation in the tick of a timer wins, and the timer is still to happen."""
    timer = after(1.0)
    task = asyncio.create_task(select(timer))
    loop = asyncio.get_running_loop()
    await asyncio.sleep(0)
    # The select's own timer was set before this one.
    loop.call_at(timer._due, task.cancel)
    await asyncio.wait([task])
    assert task.cancelled()
    assert select_nowait(timer).channel is timer


@native
async def test_cancelled_in_the_tick_in_which_a_ticker_is_closed() -> None:
    """A native cancellation in the tick in which a ticker is closed wins."""
    with ticker(1.0) as ticks:
        task = asyncio.create_task(select(ticks))
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.wait([task])
    assert task.cancelled()
    assert len(ticks._room) == 0


@native
async def test_cancelled_in_the_tick_in_which_a_result_came() -> None:
    """The one item of a Result is there for the next who selects it."""
    go_on = asyncio.Event()

    async def task() -> str:
        await go_on.wait()
        return "value"

    async with Group() as group:
        result = group.go(task)
        waiting = asyncio.create_task(select(result))
        await wait_all_tasks_blocked()
        result._when_done(lambda _: waiting.cancel())
        go_on.set()
        await asyncio.wait([waiting])
        assert waiting.cancelled()
        assert await select(result) == (0, result, "value", False)
    assert_at_rest(result._as_channel())


# Errors that look like the end of a stream


async def test_result_of_a_task_that_failed_with_end_of_stream() -> None:
    """A task that failed with EndOfStream failed: that is not a result which was received already."""

    async def fail() -> None:
        await anyio.sleep(1)
        msg = "from the task"
        raise EndOfStream(msg)

    _result, errors = await select_from_failing(fail, None)
    assert [(type(error), str(error)) for error in errors] == [(EndOfStream, "from the task")]
    result, _errors = await select_from_failing(fail, after(0))
    with pytest.raises(EndOfStream, match=whole("from the task")):
        select_nowait(result)
    assert_at_rest(result._as_channel())


@native
@pytest.mark.parametrize("by", ["select", "receive"])
async def test_item_that_comes_back_in_the_tick_of_closing(by: str) -> None:
    """Handed over, closed, cancelled in one tick: the next who waits gets the item, not the end."""
    channel = Channel[int]()
    kept: list[Any] = []
    first = asyncio.create_task(select(channel))
    await wait_all_tasks_blocked()
    second = asyncio.create_task(keep(kept, channel.receive if by == "receive" else lambda: select(channel)))
    await wait_all_tasks_blocked()
    channel.send_nowait(1)
    channel.close()
    first.cancel()
    await second
    assert kept == [1 if by == "receive" else (0, channel, 1, False)]
    assert first.cancelled()
    assert_at_rest(channel)


async def test_batch_given_back_in_the_tick_of_closing() -> None:
    """A batch that is cancelled in the tick of closing gives its items to the select that waits, not the end."""
    channel = Channel[int]()
    kept: list[Any] = []
    scope = anyio.CancelScope()

    async def batch() -> None:
        with scope:
            await channel.receive_many(10, max_wait=1_000)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(batch)
        await wait_all_tasks_blocked()
        channel.send_nowait(1)
        await wait_all_tasks_blocked()
        tasks.start_soon(keep, kept, lambda: select(channel))
        await wait_all_tasks_blocked()
        scope.cancel()
        channel.close()
    assert kept == [(0, channel, 1, False)]
    assert_at_rest(channel)


async def test_closed_while_an_item_may_still_come_back() -> None:
    """A closed channel whose last item is on its way to somebody is neither ready nor at its end until then."""
    channel = Channel[int]()
    async with anyio.create_task_group() as tasks:
        batch: list[Any] = []
        ended: list[Any] = []
        tasks.start_soon(keep, batch, lambda: channel.receive_many(10, max_wait=1_000))
        await wait_all_tasks_blocked()
        channel.send_nowait(1)
        await wait_all_tasks_blocked()
        tasks.start_soon(keep, ended, lambda: select(channel))
        await wait_all_tasks_blocked()
        channel.close()
        with pytest.raises(WouldBlock):
            select_nowait(channel)
        assert ended == []
    assert batch == [[1]]
    assert ended == [(0, channel, None, True)]
    assert_at_rest(channel)


# Stress


class Stress:
    """Random selects over a few channels, cancelled at random, with every item accounted for."""

    OPERATIONS = 10_000
    TOGETHER = 8

    def __init__(self, seed: int) -> None:
        self.dice = dice(seed)
        self.channels = [Channel[int](0), Channel[int](0), Channel[int](1), Channel[int](3)]
        self.sent: list[int] = []
        self.received: list[int] = []
        self.cancelled = 0
        self.number = 0

    def cases(self) -> list[Any]:
        cases: list[Any] = []
        for channel in self.dice.sample(self.channels, self.dice.randint(1, 3)):
            self.number += 1
            cases.append(channel if self.dice.random() < 0.5 else Send(channel, self.number))
        return cases

    def count(self, cases: list[Any], case: Case[int]) -> None:
        chosen = cases[case.index]
        if isinstance(chosen, Send):
            self.sent.append(chosen.item)
        else:
            assert case.item is not None
            self.received.append(case.item)

    async def operate(self) -> None:
        cases = self.cases()
        self.count(cases, await select(*cases))

    def act(self) -> None:
        """Do something that hands an item over, without waiting."""
        cases = self.cases()
        try:
            self.count(cases, select_nowait(*cases))
        except WouldBlock:
            return

    def settle(self) -> None:
        left = [item for channel in self.channels for item in channel.drain()]
        assert len(set(self.sent)) == len(self.sent) > self.OPERATIONS // 10
        assert sorted(self.received + left) == sorted(self.sent)
        assert self.cancelled > self.OPERATIONS // 20
        assert_at_rest(*self.channels)


@pytest.mark.parametrize("seed", [11, 12])
async def test_stress_with_scopes(seed: int) -> None:
    """10,000 selects with scopes cancelled at random conserve every item exactly once."""
    stress = Stress(seed)
    scopes: list[anyio.CancelScope] = []

    async def operate(scope: anyio.CancelScope) -> None:
        with scope:
            await stress.operate()
        stress.cancelled += scope.cancelled_caught
        scopes.remove(scope)

    async with anyio.create_task_group() as tasks:
        for _ in range(stress.OPERATIONS):
            while len(scopes) >= stress.TOGETHER:
                for action in stress.dice.sample([stress.act, stress.dice.choice(scopes).cancel], 2):
                    action()
                await anyio.lowlevel.checkpoint()
            scopes.append(anyio.CancelScope())
            tasks.start_soon(operate, scopes[-1])
        await wait_all_tasks_blocked()
        for scope in scopes:
            scope.cancel()
    stress.settle()


@native
@pytest.mark.parametrize("seed", [21, 22])
async def test_stress_with_native_cancellation(seed: int) -> None:
    """10,000 selects in tasks cancelled natively at random conserve every item exactly once."""
    stress = Stress(seed)
    running: set[asyncio.Task[None]] = set()

    def done(task: asyncio.Task[None]) -> None:
        running.discard(task)
        stress.cancelled += task.cancelled()

    for _ in range(stress.OPERATIONS):
        while len(running) >= stress.TOGETHER:
            victim = stress.dice.choice(sorted(running, key=lambda task: task.get_name()))
            actions: list[Callable[[], object]] = [stress.act, victim.cancel]
            for action in stress.dice.sample(actions, 2):
                action()
            await asyncio.sleep(0)
        task = asyncio.create_task(stress.operate(), name=f"{stress.number:07}")
        task.add_done_callback(done)
        running.add(task)
    await wait_all_tasks_blocked()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    stress.settle()


async def test_receive_only_end_as_a_case_has_its_type() -> None:
    """A ReceiveChannel is told as itself, so that a program can compare it."""
    channel = Channel[int](1)
    receiver: ReceiveChannel[int] = channel.receiver
    channel.send_nowait(1)
    case = await select(receiver)
    assert case.channel is receiver
    receiver.close()
    assert_at_rest(channel)
