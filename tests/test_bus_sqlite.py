"""The SQLite backend, when its file can't be used or is full."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from chanflow.bus import StorageError, connect
from tests.support.messages import whole

pytestmark = [pytest.mark.anyio, pytest.mark.real_time]


async def test_a_file_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    """A missing directory and a file of another kind: one clear error, and nothing is left behind."""
    missing = tmp_path / "missing" / "bus.db"
    with pytest.raises(StorageError, match=whole(f"{missing}: unable to open database file")):
        async with connect(f"sqlite:///{missing}"):
            pass
    other = tmp_path / "other.db"
    other.write_bytes(b"something else entirely" * 100)
    with pytest.raises(StorageError, match=whole(f"{other}: file is not a database")):
        async with connect(f"sqlite:///{other}"):
            pass
    assert other.read_bytes() == b"something else entirely" * 100
    assert [path.name for path in tmp_path.iterdir()] == ["other.db"]  # noqa: ASYNC240 -- a test may block


async def test_a_full_disk_refuses_and_keeps_what_was_there(tmp_path: Path) -> None:
    """What does not fit is not published; what was is delivered, and there is room again after that."""

    def fill(connection: sqlite3.Connection) -> None:
        connection.execute(f"PRAGMA max_page_count = {connection.execute('PRAGMA page_count').fetchone()[0] + 5}")

    path = tmp_path / "bus.db"
    async with connect(f"sqlite:///{path}") as bus:
        backend: Any = bus._backend
        await backend._database.run(fill)
        published = 0

        async def publish_all() -> None:
            nonlocal published
            while True:
                await bus.publish("topic", b"x" * 2000)
                published += 1

        with pytest.raises(StorageError, match=whole(f"{path}: database or disk is full")):
            await publish_all()
        assert published > 0
        async with bus.subscribe("topic", group="group") as messages:
            for _ in range(published):
                await (await anext(messages)).ack()
        await bus.publish("topic", b"x" * 2000)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert connection.execute("SELECT count(*) FROM bus_messages").fetchall() == [(1,)]
    connection.close()
