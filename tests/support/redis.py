"""A real Redis server for the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from benchmarks import redis_server


@contextmanager
def running_redis() -> Iterator[str]:
    """Run a server, and give its URL; the test is skipped where there is none."""
    try:
        with redis_server.running_redis() as url:
            yield url
    except FileNotFoundError as error:
        pytest.skip(str(error))
