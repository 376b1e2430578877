"""Our own stores of tasks under the conformance suite."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest

from chanflow.tasks import Store
from chanflow.tasks.conformance import StoreConformance
from chanflow.tasks.stores.memory import MemoryStore
from chanflow.tasks.stores.redis import RedisStore
from chanflow.tasks.stores.sqlite import SqliteStore
from tests.support.paths import another_way
from tests.support.redis import running_redis


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

    async def spoil(self, store: Store, task_id: str) -> None:
        with closing(sqlite3.connect(store._path)) as connection:  # type: ignore[attr-defined]
            connection.execute("UPDATE tasks SET record = ? WHERE id = ?", [b"garbage", task_id])
            connection.commit()


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

    async def spoil(self, store: Store, task_id: str) -> None:
        await store._client.hset(f"{store._prefix}task:{task_id}", {"r": b"garbage"})  # type: ignore[attr-defined]
