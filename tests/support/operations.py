"""Operations whose outcome is kept, so that a task may run them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any


async def keep(kept: list[Any], operation: Callable[[], Awaitable[Any]]) -> None:
    """Run an operation, and keep its result or its error."""
    try:
        kept.append(await operation())
    except Exception as error:  # noqa: BLE001
        kept.append(error)
