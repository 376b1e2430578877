"""Our own stores of tasks under the conformance suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from chanflow.tasks import Store
from chanflow.tasks.conformance import StoreConformance
from chanflow.tasks.stores.memory import MemoryStore
from chanflow.tasks.stores.redis import RedisStore
from chanflow.tasks.stores.sqlite import SqliteStore
from tests.conftest import another_way
from tests.redis_server import running_redis


class TestMemory(StoreConformance):
    @pytest.fixture
    def open_store(self) -> Callable[[], Store]:
        return MemoryStore


class TestSqlite(StoreConformance):
    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        # A virtual clock doesn't wait for its thread.
        return request.param

    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[], Store]:
        return lambda: SqliteStore(another_way(tmp_path / "tasks.db"))


@pytest.fixture(scope="session")
def redis() -> Iterator[str]:
    with running_redis() as url:
        yield url


class TestRedis(StoreConformance):
    @pytest.fixture(params=["asyncio", "trio"])
    def anyio_backend(self, request: pytest.FixtureRequest) -> str:
        return request.param

    @pytest.fixture
    def open_store(self, redis: str) -> Callable[[], Store]:
        prefix = f"{uuid4()}:"
        return lambda: RedisStore(redis, prefix=prefix)
