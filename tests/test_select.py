"""`select` and `select_nowait`: every kind of case, ready or waited for, and what each tells."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, Never, assert_type, get_args

import anyio
import pytest
from anyio import WouldBlock, wait_all_tasks_blocked

from chanflow import Case, Channel, Group, ReceiveChannel, Send, after, select, select_nowait, ticker
from tests.support.channels import assert_at_rest
from tests.support.messages import whole
from tests.support.operations import keep

pytestmark = pytest.mark.anyio


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


async def test_receive_only_end_as_a_case_has_its_type() -> None:
    """A ReceiveChannel is told as itself, so that a program can compare it."""
    channel = Channel[int](1)
    receiver: ReceiveChannel[int] = channel.receiver
    channel.send_nowait(1)
    case = await select(receiver)
    assert case.channel is receiver
    receiver.close()
    assert_at_rest(channel)
