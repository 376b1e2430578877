"""Our own stores of tasks under the conformance suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from uuid import uuid4

import pytest

from chanflow.tasks import Store
from chanflow.tasks.conformance import StoreConformance
from chanflow.tasks.stores.memory import MemoryStore
from chanflow.tasks.stores.redis import RedisStore
from tests.support.redis import running_redis
from tests.support.sqlite_store import SqliteConformance


class TestMemory(StoreConformance):
    @pytest.fixture
    def open_store(self) -> Callable[[], Store]:
        return MemoryStore


class TestSqlite(SqliteConformance):
    """In a file."""


@pytest.fixture(scope="session")
def redis() -> Iterator[str]:
    with running_redis() as url:
        yield url


@pytest.mark.real_time
class TestRedis(StoreConformance):
    @pytest.fixture
    def open_store(self, redis: str) -> Callable[[], Store]:
        prefix = f"{uuid4()}:"
        return lambda: RedisStore(redis, prefix=prefix)

    async def spoil(self, store: Store, task_id: str) -> None:
        await store._client.hset(f"{store._prefix}task:{task_id}", {"r": b"garbage"})  # type: ignore[attr-defined]
