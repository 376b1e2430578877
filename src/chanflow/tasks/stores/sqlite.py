"""Tasks in an SQLite file, which several processes may share, and which outlives them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from chanflow._storage import Connection, Database
from chanflow.tasks.record import TaskRecord, TaskStatus, looked_for_at
from chanflow.tasks.store import Change, Store

__all__ = ["SqliteStore"]

# The record is the truth; the columns beside it are for finding it.
SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    idempotency_key TEXT,
    status TEXT NOT NULL,
    looked_for_at REAL,
    expires_at REAL,
    record BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS tasks_by_key ON tasks (idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS tasks_by_status ON tasks (status, number);
CREATE INDEX IF NOT EXISTS tasks_looked_for ON tasks (looked_for_at) WHERE looked_for_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS tasks_expiring ON tasks (expires_at) WHERE expires_at IS NOT NULL;
"""
THERE = "(expires_at IS NULL OR expires_at > ?)"


class SqliteStore(Store):
    """Tasks in an SQLite file."""

    durable = True
    shared = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._database: Database

    async def open(self) -> None:
        self._database = await Database.open(self._path, SCHEMA)

    async def aclose(self) -> None:
        await self._database.aclose()

    async def create(self, record: TaskRecord) -> TaskRecord:
        def create(connection: Connection) -> TaskRecord:
            if record.idempotency_key is not None:
                # The key may be that of a task whose time is over.
                forget(connection, record.created_at)
                query = "SELECT record FROM tasks WHERE idempotency_key = ?"
                row = connection.execute(query, [record.idempotency_key]).fetchone()
                if row is not None:
                    return decode(row)
            connection.execute(
                "INSERT INTO tasks (id, idempotency_key, status, looked_for_at, expires_at, record)"
                " VALUES (?, ?, ?, ?, ?, ?)",
                [record.id, record.idempotency_key, *columns(record)],
            )
            return record

        return await self._database.run(create)

    async def get(self, task_id: str, now: float) -> TaskRecord | None:
        def get(connection: Connection) -> TaskRecord | None:
            query = f"SELECT record FROM tasks WHERE id = ? AND {THERE}"  # noqa: S608 -- no one else's words
            row = connection.execute(query, [task_id, now]).fetchone()
            return None if row is None else decode(row)

        return await self._database.run(get)

    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        def apply(connection: Connection) -> TaskRecord | None:
            row = connection.execute("SELECT record FROM tasks WHERE id = ?", [task_id]).fetchone()
            changed = None if row is None else change(decode(row))
            if changed is not None:
                connection.execute(
                    "UPDATE tasks SET status = ?, looked_for_at = ?, expires_at = ?, record = ? WHERE id = ?",
                    [*columns(changed), task_id],
                )
            return changed

        return await self._database.run(apply)

    async def page(
        self, now: float, *, status: TaskStatus | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[TaskRecord]:
        def page(connection: Connection) -> list[TaskRecord]:
            query = f"SELECT record FROM tasks WHERE {THERE}"  # noqa: S608 -- no one else's words
            arguments: list[Any] = [now]
            if status is not None:
                query += " AND status = ?"
                arguments.append(status.value)
            if after is not None:
                query += " AND number < (SELECT number FROM tasks WHERE id = ?)"
                arguments.append(after)
            return [
                decode(row) for row in connection.execute(f"{query} ORDER BY number DESC LIMIT ?", [*arguments, limit])
            ]

        return await self._database.run(page)

    async def count(self, now: float) -> dict[TaskStatus, int]:
        def count(connection: Connection) -> dict[TaskStatus, int]:
            query = f"SELECT status, count(*) FROM tasks WHERE {THERE} GROUP BY status"  # noqa: S608 -- the same
            counts = {TaskStatus(status): number for status, number in connection.execute(query, [now])}
            return {status: counts.get(status, 0) for status in TaskStatus}

        return await self._database.run(count)

    async def neglected(self, since: float, limit: int) -> Sequence[str]:
        def neglected(connection: Connection) -> list[str]:
            query = "SELECT id FROM tasks WHERE looked_for_at <= ? ORDER BY looked_for_at LIMIT ?"
            return [task_id for (task_id,) in connection.execute(query, [since, limit])]

        return await self._database.run(neglected)

    async def forget(self, now: float) -> None:
        await self._database.run(lambda connection: forget(connection, now))


def columns(record: TaskRecord) -> list[Any]:
    """Give what changes with a record."""
    looked_for = None if record.status.is_end else looked_for_at(record)
    return [record.status.value, looked_for, record.expires_at, msgspec.msgpack.encode(record)]


def decode(row: Sequence[bytes]) -> TaskRecord:
    """Read a record."""
    return msgspec.msgpack.decode(row[0], type=TaskRecord)


def forget(connection: Connection, now: float) -> None:
    """Let go of what has expired."""
    connection.execute("DELETE FROM tasks WHERE expires_at <= ?", [now])
