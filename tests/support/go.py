"""What Go's tests do with goroutines."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import anyio
from anyio import wait_all_tasks_blocked
from anyio.abc import TaskGroup


async def blocks(operation: Callable[[], Awaitable[Any]]) -> bool:
    """Tell whether an operation waits for what nobody is going to do."""
    with anyio.move_on_after(1) as scope:
        await operation()
    return scope.cancelled_caught


async def spawn(tasks: TaskGroup, operation: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Start an operation, wait until it waits, and give the list that its result comes into."""
    kept: list[Any] = []

    async def run() -> None:
        kept.append(await operation())

    tasks.start_soon(run)
    await wait_all_tasks_blocked()
    return kept
