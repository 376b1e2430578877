"""A task service, and handlers for it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from anyio import (
    sleep,
)

from chanflow.tasks import (
    Progress,
    TaskService,
)


async def double(number: int = 1) -> int:
    """Double."""
    return number * 2


async def slow(seconds: float = 10.0) -> str:
    """Take a while."""
    await sleep(seconds)
    return "done"


async def broken(message: str = "out of order") -> None:
    raise ValueError(message)


async def count_up(upto: int, progress: Progress) -> int:
    for number in range(upto):
        await progress.update(number, upto, f"number {number}")
        await sleep(1.0)
    return upto


@asynccontextmanager
async def serving(*handlers: Any, **options: Any) -> AsyncIterator[TaskService]:
    """Run a service with some handlers."""
    service = TaskService(**options)
    for handler in handlers:
        service.task(handler)
    async with service:
        yield service


async def echo(value: Any = None) -> Any:
    return value


async def endless() -> None:
    await sleep(math.inf)
