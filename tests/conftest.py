"""What all tests share: both backends under virtual time, every kind of capacity, both ways to the buffer."""

from __future__ import annotations

import math
import signal
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

import pytest
import trio.testing
from hypothesis import settings

from chanflow._channel import _state
from chanflow._loop import _home
from tests.support.threads import PATIENCE
from tests.support.virtual_time import VirtualTimeLoop

# The same examples each time, so that a failure is everybody's; `--hypothesis-profile=explore` looks for new ones.
settings.register_profile("same", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--public-calls",
        action="store_true",
        help="use only public calls of anyio and trio, as if the stream's deque and trio's run could not be reached",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--public-calls"):
        _state.reach_buffer = _state.PublicBuffer
        _home.reach_run = cache(lambda trio: partial(_home.trio_token, trio))


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    # A virtual clock waits neither for threads nor for servers or processes.
    if request.node.get_closest_marker("real_time"):
        return request.param, {}
    if request.param == "asyncio":
        return "asyncio", {"loop_factory": VirtualTimeLoop}
    return "trio", {"clock": trio.testing.MockClock(autojump_threshold=0)}


@pytest.fixture(params=[0, 1, 2, 10, math.inf], ids="capacity={}".format)
def capacity(request: pytest.FixtureRequest) -> float:
    return request.param


@pytest.fixture
def backend(anyio_backend: tuple[str, dict[str, Any]]) -> str:
    return anyio_backend[0]


@pytest.fixture
def bounded() -> Iterator[None]:
    """End a test whose loop waits for ever. A timer of the loop's won't do: virtual time doesn't wait for threads."""

    def give_up(signum: int, frame: object) -> None:
        msg = "the event loop still waits"
        raise AssertionError(msg)

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, 2 * PATIENCE)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)
