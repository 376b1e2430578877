"""Groups and results."""

from __future__ import annotations

import anyio
import pytest

from chanflow import Group

pytestmark = pytest.mark.anyio


async def double(number: int) -> int:
    await anyio.sleep(1)
    return number * 2


async def test_results_are_awaited_in_any_order() -> None:
    """Each task has its own result; virtual time passes at once."""
    async with Group() as group:
        results = [group.go(double, number) for number in range(3)]
        assert [await result for result in reversed(results)] == [4, 2, 0]
    assert anyio.current_time() % 1 < 1e-6
