"""What all tests share: both backends under virtual time, every kind of capacity, both ways to the buffer."""

from __future__ import annotations

import math
import re
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import trio.testing
from hypothesis import settings

from chanflow._channel import _state
from chanflow._channel._ends import Channel
from chanflow._loop import _home as _park
from tests.virtual_time import VirtualTimeLoop

# The same examples each time, so that a failure is everybody's; `--hypothesis-profile=explore` looks for new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("same")


detours = count()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--public-calls",
        action="store_true",
        help="use only public calls of anyio and trio, as if the stream's deque and trio's run could not be reached",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--public-calls"):
        _state.reach_buffer = _state.PublicBuffer
        _park.reach_run = cache(lambda trio: partial(_park.trio_token, trio))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    if request.param == "asyncio":
        return "asyncio", {"loop_factory": VirtualTimeLoop}
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


@pytest.fixture(params=[0, 1, 2, 10, math.inf], ids="capacity={}".format)
def capacity(request: pytest.FixtureRequest) -> float:
    return request.param


@pytest.fixture
def backend(anyio_backend: tuple[str, dict[str, Any]]) -> str:
    return anyio_backend[0]


def whole(message: str) -> str:
    """Match this message and nothing more."""
    return f"^{re.escape(message)}$"


def at_rest(channel: Channel[Any]) -> bool:
    """Tell whether nobody waits on a channel, nothing is reserved, and no item is unaccounted for."""
    state = channel._state
    figures = channel.statistics()
    return (
        figures.tasks_waiting_send == figures.tasks_waiting_receive == state.reserved == 0
        and figures.sent == figures.received + figures.dropped + figures.current_buffer_used
    )


def another_way(path: Path) -> Path:
    """Name a file in another way, so that it is opened once more and not shared."""
    detour = path.parent / f"detour {next(detours)}"
    detour.mkdir()
    return detour / ".." / path.name
