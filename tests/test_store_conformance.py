"""Our own stores of tasks under the conformance suite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chanflow.tasks import Store
from chanflow.tasks.conformance import StoreConformance
from chanflow.tasks.stores.memory import MemoryStore
from chanflow.tasks.stores.sqlite import SqliteStore


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
        return lambda: SqliteStore(tmp_path / "tasks.db")
