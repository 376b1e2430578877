"""The least that Python allows: what no channel between two tasks can get below."""

from __future__ import annotations

from collections import deque
from typing import Any

from anyio import create_task_group

__all__ = ["alternate_on_asyncio", "alternate_on_trio", "call_around_deque"]


async def call_around_deque(count: int) -> None:
    """Two bare coroutine calls around a deque for each item, in one task."""
    items: deque[int] = deque()

    async def put(item: int) -> None:
        items.append(item)

    async def get() -> int:
        return items.popleft()

    for number in range(count):
        await put(number)
        await get()


async def alternate_on_asyncio(count: int) -> None:
    """Two tasks that wake each other through bare futures; an operation is there and back."""
    from asyncio import Future, get_running_loop

    new_future = get_running_loop().create_future
    turns: list[Future[None]] = [new_future(), new_future()]

    async def play(me: int, other: int) -> None:
        for _ in range(count):
            await turns[me]
            turns[me] = new_future()
            turns[other].set_result(None)

    async with create_task_group() as tasks:
        tasks.start_soon(play, 0, 1)
        tasks.start_soon(play, 1, 0)
        turns[0].set_result(None)


async def alternate_on_trio(count: int) -> None:
    """Do the same by rescheduling."""
    from trio.lowlevel import Abort, current_task, reschedule, wait_task_rescheduled

    parked: list[Any] = []

    def abort(_raise_cancel: Any) -> Abort:
        return Abort.SUCCEEDED

    async def play() -> None:
        for _ in range(count):
            if parked:
                reschedule(parked.pop())
            parked.append(current_task())
            await wait_task_rescheduled(abort)
        if parked:
            reschedule(parked.pop())

    async with create_task_group() as tasks:
        tasks.start_soon(play)
        tasks.start_soon(play)
