"""The store in a file under the conformance suite."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from chanflow.tasks import Store
from chanflow.tasks.conformance import StoreConformance
from chanflow.tasks.stores.sqlite import SqliteStore
from tests.support.paths import another_way


@pytest.mark.real_time
class SqliteConformance(StoreConformance):
    @pytest.fixture
    def open_store(self, tmp_path: Path) -> Callable[[], Store]:
        return lambda: SqliteStore(another_way(tmp_path / "tasks.db"))

    async def spoil(self, store: Store, task_id: str) -> None:
        with closing(sqlite3.connect(store._path)) as connection:  # type: ignore[attr-defined]
            connection.execute("UPDATE tasks SET record = ? WHERE id = ?", [b"garbage", task_id])
            connection.commit()
