"""Workloads of `select`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from anyio import create_task_group
from attrs import frozen

from benchmarks.peers import CHANNELS, Ends
from benchmarks.plan import ASYNCIO, BOTH, Entry, Workload

__all__ = ["workloads"]

# Racing two receives takes items from both, or loses one, so it stands for no select.
NO_SELECT = dict.fromkeys(("asyncio.Queue", "anyio", "trio", "janus", "culsans", "aiologic"), "has no select")


@frozen
class Selector:
    """A peer's own select: how it is called, and where the chosen channel is in what it gives."""

    select: Callable[..., Any]
    chosen: Callable[[Any], Any]


def chanflow_selector() -> Selector:
    from operator import attrgetter

    from chanflow import select

    return Selector(select, attrgetter("channel"))


def aiochan_selector() -> Selector:
    from operator import itemgetter

    from aiochan import select

    return Selector(select, itemgetter(1))


def asyncio_channel_selector() -> Selector:
    from operator import itemgetter

    from asyncio_channel import complete_one

    return Selector(complete_one, itemgetter(1))


SELECTORS = {
    "chanflow": (chanflow_selector, BOTH),
    "aiochan": (aiochan_selector, ASYNCIO),
    "asyncio-channel": (asyncio_channel_selector, ASYNCIO),
}


async def select_ready(make: Callable[[], Selector], peer: str, width: int, count: int) -> None:
    """Each operation selects one item and puts one back where it came from, so that all stay ready."""
    selector = make()
    ends = [CHANNELS[peer].open(1) for _ in range(width)]
    refill = {id(end.channel): end.send_nowait for end in ends}
    channels = [end.channel for end in ends]
    select, chosen = selector.select, selector.chosen
    for end in ends:
        end.send_nowait(1)
    for _ in range(count):
        refill[id(chosen(await select(*channels)))](1)


async def select_idle(make: Callable[[], Selector], peer: str, count: int) -> None:
    """Each operation parks on two idle channels, is woken through one, and acknowledges."""
    select = make().select
    first, second, acknowledged = (CHANNELS[peer].open(0) for _ in range(3))

    async def wake(ends: tuple[Ends, Ends]) -> None:
        for number in range(count):
            await ends[number & 1].send(1)
            await acknowledged.receive()

    async with create_task_group() as tasks:
        tasks.start_soon(wake, (first, second))
        for _ in range(count):
            await select(first.channel, second.channel)
            await acknowledged.send(1)


def workloads() -> Iterator[Workload]:
    for width in (2, 10):
        yield Workload(
            f"select-{width}-ready",
            f"`select` over {width} ready channels, and refilling the chosen one",
            "select",
            20_000,
            {
                name: Entry(partial(select_ready, make, name, width), backends)
                for name, (make, backends) in SELECTORS.items()
            },
            "select",
            missing=NO_SELECT,
            go_scale=20.0,
        )
    yield Workload(
        "select-2-idle",
        "`select` over 2 idle channels, one of which becomes ready, and an acknowledgement",
        "select",
        10_000,
        {
            name: Entry(
                partial(select_idle, make, name),
                backends,
                note="capacity 1, its least" if CHANNELS[name].least else "",
            )
            for name, (make, backends) in SELECTORS.items()
        },
        "select",
        missing=NO_SELECT,
        go_scale=20.0,
    )
