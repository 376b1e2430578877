"""Tasks in an SQLite file, which several processes may share, and which outlives them."""

# Invariants:
# 1. The record is the truth; the columns beside it are for finding it, and change with it in one transaction.
# 2. A task that is not at its end has `due_at`. Once that has come, it is given a `rank` by whoever looks for tasks
#    next: those with one are the queue of their handler.
# 3. `changes` has the latest changes of tasks, which are the news of other processes. `counts` has the number of
#    records of each handler and status as it was after the change that `counted` names: the changes since then have to
#    be added. To count in each transaction would cost it a page more.

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import nsmallest
from itertools import islice
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeAlias, TypeVar

import msgspec
from anyio import TASK_STATUS_IGNORED, sleep_forever

from chanflow._errors import StorageError
from chanflow._sqlite import Connection, Database
from chanflow.tasks._errors import unknown_cursor
from chanflow.tasks.record import TaskRecord, TaskStatus, claim, due_at
from chanflow.tasks.store import Change, Claimed, Decoder, News, Store, TaskStarted, Tell, news_of
from chanflow.tasks.stores._bell import Bell

__all__ = ["SqliteStore"]

T = TypeVar("T")
# What `COLUMNS` names.
Chosen: TypeAlias = tuple[Any, ...]

SCHEMA = """
CREATE TABLE IF NOT EXISTS tasks (
    number INTEGER PRIMARY KEY,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    status TEXT NOT NULL,
    priority INTEGER NOT NULL,
    due_at REAL,
    rank INTEGER,
    expires_at REAL,
    idempotency_key TEXT,
    record BLOB NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS tasks_by_key ON tasks (idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX IF NOT EXISTS tasks_open ON tasks (number) WHERE due_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS tasks_ended ON tasks (status, number) WHERE due_at IS NULL;
CREATE INDEX IF NOT EXISTS tasks_ready ON tasks (name, rank DESC, due_at, number) WHERE rank IS NOT NULL;
CREATE INDEX IF NOT EXISTS tasks_later ON tasks (due_at) WHERE rank IS NULL AND due_at IS NOT NULL;
CREATE INDEX IF NOT EXISTS tasks_expiring ON tasks (expires_at, name, status) WHERE expires_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS counts (
    name TEXT NOT NULL, status TEXT NOT NULL, number INTEGER NOT NULL, PRIMARY KEY (name, status)
) WITHOUT ROWID;
DROP TABLE IF EXISTS news;
CREATE TABLE IF NOT EXISTS changes (
    number INTEGER PRIMARY KEY,
    writer TEXT NOT NULL,
    id TEXT NOT NULL,
    name TEXT NOT NULL,
    before TEXT,
    status TEXT NOT NULL,
    cancelling INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS counted (change INTEGER NOT NULL);
INSERT INTO counted SELECT 0 WHERE NOT EXISTS (SELECT 1 FROM counted);
CREATE VIEW IF NOT EXISTS uncounted AS
    SELECT name, status, 1 AS number FROM changes WHERE number > (SELECT change FROM counted)
    UNION ALL
    SELECT name, before, -1 FROM changes WHERE number > (SELECT change FROM counted) AND before IS NOT NULL;
CREATE VIEW IF NOT EXISTS totals AS SELECT * FROM counts UNION ALL SELECT * FROM uncounted;
CREATE TABLE IF NOT EXISTS clock (boot TEXT NOT NULL, moved_by REAL NOT NULL)
"""
THERE = "(expires_at IS NULL OR expires_at > ?)"
LOST = 1_000_000
"""The rank of tasks whose lease has run out: they come before all that were never begun."""
UNREADABLE = "unreadable"
"""The status of records that can't be read."""
PART = 1000
"""The most tasks to promote or to forget in one transaction."""
KEPT_CHANGES = 10_000
COUNT_EVERY = 100
"""After so many changes they are added to the counts."""


class SqliteStore(Store):
    """Tasks in an SQLite file."""

    durable = True
    shared = True

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writer = token_hex(8)
        self._database: Database
        self._reader: Database
        self._clock: Callable[[], float]
        self._decode = Decoder()
        self._listeners: list[Tell] = []
        # Whether the last claim left nothing, and nothing has come from here since.
        self._empty = True

    async def open(self) -> None:
        self._database = await Database.open(self._path, "")
        try:
            self._clock = await self._database.run(set_up)
            self._reader = await Database.open(self._path, "", reads=True)
        except BaseException:
            await self._database.aclose()
            raise

    async def aclose(self) -> None:
        try:
            await self._reader.aclose()
        finally:
            await self._database.aclose()

    def now(self) -> float:
        return self._clock()

    async def create_many(self, records: Sequence[TaskRecord]) -> list[TaskRecord]:
        kept, news = await self._write(lambda connection: create_all(self._log(connection), records))
        self._tell(news)
        return kept

    async def get(self, task_id: str, now: float) -> TaskRecord | None:
        def get(connection: Connection) -> TaskRecord | None:
            query = f"SELECT record FROM tasks WHERE id = ? AND {THERE}"  # noqa: S608 -- no one else's words
            row = connection.execute(query, [task_id, now]).fetchone()
            return None if row is None else self._decode(task_id, row[0])

        return await self._reader.run(get)

    async def change_many(self, changes: Sequence[tuple[str, Change]]) -> list[TaskRecord | None]:
        def apply(connection: Connection) -> tuple[list[TaskRecord | None], list[News]]:
            log = self._log(connection)
            return [change_one(log, task_id, change) for task_id, change in changes], log.news

        changed, news = await self._write(apply)
        self._tell(news)
        return changed

    async def claim(
        self,
        names: Mapping[str, int | None],
        *,
        worker: str,
        now: float,
        lease_until: float,
        limit: int,
        task_id: str | None = None,
    ) -> Claimed:
        # Whoever is woken for nothing takes no lock.
        if task_id is None and self._empty:
            next_at = await self._reader.run(lambda connection: look(connection, names, now))
            if next_at is None or next_at > now:
                return Claimed([], next_at)

        def begin(connection: Connection) -> tuple[list[TaskRecord], float | None, list[News]]:
            log = self._log(connection)
            next_at = promote(connection, now)
            chosen = choose(connection, names, limit) if task_id is None else choose_one(connection, names, task_id)
            runs = [run for each in chosen if (run := begin_run(log, each, worker, now, lease_until)) is not None]
            if len(chosen) == limit:
                next_at = now
            elif runs:
                next_at = min(lease_until, lease_until if next_at is None else next_at)
            return runs, next_at, log.news

        self._empty = True
        runs, next_at, news = await self._write(begin)
        self._empty = self._empty and len(runs) < limit
        self._tell(news)
        return Claimed(runs, next_at)

    async def due(self, names: Sequence[str], now: float, limit: int) -> Claimed:
        def due(connection: Connection) -> Claimed:
            found: list[TaskRecord] = []
            for name in names:
                rows = connection.execute("SELECT id, record FROM tasks WHERE name = ? AND due_at <= ?", [name, now])
                found += islice((record for row in rows if (record := self._decode(*row)) is not None), limit)
            return Claimed(found[:limit], next_later(connection))

        await self._write(lambda connection: promote(connection, now))
        return await self._reader.run(due)

    async def page(
        self, now: float, *, status: TaskStatus | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[TaskRecord]:
        def page(connection: Connection) -> list[TaskRecord]:
            query = f"SELECT id, record FROM tasks WHERE {THERE}"  # noqa: S608 -- no one else's words
            arguments: list[Any] = [now]
            if status is not None:
                query += f" AND status = ? AND due_at IS {'NULL' if status.is_end else 'NOT NULL'}"
                arguments.append(status.value)
            if after is not None:
                row = connection.execute("SELECT number FROM tasks WHERE id = ?", [after]).fetchone()
                if row is None:
                    raise unknown_cursor(after)
                query += " AND number < ?"
                arguments += row
            rows = connection.execute(f"{query} ORDER BY number DESC", arguments)
            return list(islice((record for row in rows if (record := self._decode(*row)) is not None), limit))

        return await self._reader.run(page)

    async def count(self, now: float) -> dict[TaskStatus, int]:
        def count(connection: Connection) -> dict[TaskStatus, int]:
            numbers = Counter(dict(connection.execute("SELECT status, sum(number) FROM totals GROUP BY status")))
            query = "SELECT status, count(*) FROM tasks INDEXED BY tasks_expiring WHERE expires_at <= ? GROUP BY status"
            numbers.subtract(dict(connection.execute(query, [now])))
            return {status: numbers[status.value] for status in TaskStatus}

        return await self._reader.run(count)

    async def forget(self, now: float) -> None:
        def forget_part(connection: Connection) -> int:
            return forget(connection, "number IN (SELECT number FROM tasks WHERE expires_at <= ? LIMIT ?)", [now, PART])

        while await self._reader.run(lambda connection: anything_expired(connection, now)):
            await self._write(forget_part)
        await self._write(
            lambda connection: (
                connection.execute(
                    "DELETE FROM changes WHERE number <= (SELECT max(number) FROM changes) - ?", [KEPT_CHANGES]
                ).rowcount
            )
        )

    async def news(self, tell: Tell, *, task_status: TaskStarted = TASK_STATUS_IGNORED) -> None:
        self._listeners.append(tell)
        try:
            async with Bell(self._path, self._writer, tell):
                task_status.started()
                await sleep_forever()
        finally:
            self._listeners.remove(tell)

    def _log(self, connection: Connection) -> Log:
        return Log(connection, self._writer, self._decode)

    async def _write(self, operation: Callable[[Connection], T]) -> T:
        try:
            return await self._database.run(operation)
        except BaseException:
            # It may be carried out all the same.
            self._tell([None])
            raise

    def _tell(self, news: Iterable[News | None]) -> None:
        for each in news:
            if each is not None and each.status is TaskStatus.PENDING:
                self._empty = False
            for tell in self._listeners:
                tell(each)


class Log:
    """Writes down what one transaction does to tasks."""

    def __init__(self, connection: Connection, writer: str, decode: Decoder) -> None:
        self.connection = connection
        self.decode = decode
        self._writer = writer
        self.news: list[News] = []

    def add(self, before: TaskRecord | None, after: TaskRecord) -> None:
        """Write down a change, unless it is of no interest to others."""
        news = news_of(before, after)
        if news is not None:
            status = None if before is None else before.status.value
            written = self.connection.execute(
                "INSERT INTO changes (writer, id, name, before, status, cancelling) VALUES (?, ?, ?, ?, ?, ?)",
                [self._writer, news.id, news.name, status, news.status.value, news.cancel_requested],
            )
            assert written.lastrowid is not None
            if written.lastrowid % COUNT_EVERY == 0:
                count_changes(self.connection)
            self.news.append(news)


def count_changes(connection: Connection) -> None:
    """Add the latest changes to the counts."""
    connection.execute(
        "INSERT INTO counts SELECT name, status, sum(number) FROM uncounted GROUP BY name, status"
        " HAVING sum(number) != 0 ON CONFLICT DO UPDATE SET number = number + excluded.number"
    )
    connection.execute("UPDATE counted SET change = (SELECT max(number) FROM changes)")


def add_to_counts(connection: Connection, numbers: Mapping[tuple[str, str], int]) -> None:
    """Add to the counts what no change tells."""
    connection.executemany(
        "INSERT INTO counts VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET number = number + excluded.number",
        [(name, status, number) for (name, status), number in numbers.items()],
    )


def create_all(log: Log, records: Sequence[TaskRecord]) -> tuple[list[TaskRecord], list[News]]:
    """Keep new tasks."""
    return [create(log, record) for record in records], log.news


def create(log: Log, record: TaskRecord) -> TaskRecord:
    """Keep a new task, unless it is there."""
    connection, key = log.connection, record.idempotency_key
    if key is not None:
        # It may be that of a task whose time is over.
        forget(connection, "idempotency_key = ? AND expires_at <= ?", [key, record.created_at])
    due = due_at(record)
    rank = record.priority if due is not None and due <= record.created_at else None
    made = connection.execute(
        "INSERT INTO tasks (id, name, status, priority, due_at, rank, expires_at, idempotency_key, record)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
        [
            record.id,
            record.name,
            record.status.value,
            record.priority,
            due,
            rank,
            record.expires_at,
            key,
            msgspec.msgpack.encode(record),
        ],
    )
    if made.rowcount:
        log.add(None, record)
        return record
    query = "SELECT id, record FROM tasks WHERE id = ? OR idempotency_key = ? ORDER BY id = ? DESC"
    there = log.decode(*connection.execute(query, [record.id, key, record.id]).fetchone())
    if there is None:
        msg = f"the task with the idempotency key {key!r} can't be read"
        raise StorageError(msg)
    return there


def change_one(log: Log, task_id: str, change: Change) -> TaskRecord | None:
    """Change a task."""
    rows = log.connection.execute("SELECT number, record FROM tasks WHERE id = ?", [task_id]).fetchall()
    for number, encoded in rows:
        record = log.decode(task_id, encoded)
        changed = None if record is None else change(record)
        if record is not None and changed is not None and changed != record:
            replace(log, number, record, changed)
        return changed
    return None


def replace(log: Log, number: int, record: TaskRecord, changed: TaskRecord) -> None:
    """Put a task in the place of what it was."""
    log.connection.execute(
        "UPDATE tasks SET status = ?, due_at = ?, rank = NULL, expires_at = ?, record = ? WHERE number = ?",
        [changed.status.value, due_at(changed), changed.expires_at, msgspec.msgpack.encode(changed), number],
    )
    log.add(record, changed)


# What is due


def look(connection: Connection, names: Iterable[str], now: float) -> float | None:
    """Tell when there may be something to claim."""
    query = "SELECT 1 FROM tasks WHERE name = ? AND rank IS NOT NULL LIMIT 1"
    if any(connection.execute(query, [name]).fetchone() for name in names):
        return now
    return next_later(connection)


def next_later(connection: Connection) -> float | None:
    """Tell when the next task is due that has no rank yet."""
    query = "SELECT min(due_at) FROM tasks WHERE rank IS NULL AND due_at IS NOT NULL"
    due: float | None = connection.execute(query).fetchone()[0]
    return due


def promote(connection: Connection, now: float) -> float | None:
    """Give a rank to what has become due, and tell when the next one is."""
    next_at = next_later(connection)
    if next_at is not None and next_at <= now:
        connection.execute(
            "UPDATE tasks SET rank = iif(status = 'running', ?, priority) WHERE number IN"
            " (SELECT number FROM tasks WHERE rank IS NULL AND due_at <= ? ORDER BY due_at LIMIT ?)",
            [LOST, now, PART],
        )
        next_at = next_later(connection)
    return next_at


COLUMNS = "number, id, name, status, record"


def choose(connection: Connection, names: Mapping[str, int | None], limit: int) -> list[Chosen]:
    """Choose the tasks that come first."""
    found: list[tuple[Any, ...]] = []
    query = (
        f"SELECT -rank, due_at, {COLUMNS} FROM tasks WHERE name = ? AND rank {{}} ?"  # noqa: S608 -- no one else's words
        " ORDER BY rank DESC, due_at, number LIMIT ?"
    )
    for name, most in names.items():
        if most is None:
            found += connection.execute(query.format("<="), [name, LOST, limit])
            continue
        # Those that are lost count already.
        found += connection.execute(query.format("="), [name, LOST, limit])
        room = min(limit, most - running(connection, name))
        if room > 0:
            found += connection.execute(query.format("<"), [name, LOST, room])
    # No two have the same number, so that nothing behind it is compared.
    return [each[2:] for each in (nsmallest(limit, found) if len(names) > 1 else found[:limit])]


def choose_one(connection: Connection, names: Mapping[str, int | None], task_id: str) -> list[Chosen]:
    """Choose a task, if it is wanted."""
    query = f"SELECT {COLUMNS} FROM tasks WHERE id = ?"  # noqa: S608 -- as above
    for chosen in connection.execute(query, [task_id]).fetchall():
        name, status = chosen[2], chosen[3]
        most = names.get(name, 0)
        if most is None or status == TaskStatus.RUNNING.value or running(connection, name) < most:
            return [chosen] if name in names else []
    return []


def running(connection: Connection, name: str) -> int:
    """Tell how many tasks of a handler run."""
    query = "SELECT sum(number) FROM totals WHERE name = ? AND status = 'running'"
    return connection.execute(query, [name]).fetchone()[0] or 0


def begin_run(log: Log, chosen: Chosen, worker: str, now: float, lease_until: float) -> TaskRecord | None:
    """Claim a task; one that can't be read is set aside."""
    number, task_id, name, status, encoded = chosen
    record = log.decode(task_id, encoded)
    if record is None:
        query = "UPDATE tasks SET status = ?, due_at = NULL, rank = NULL WHERE number = ?"
        log.connection.execute(query, [UNREADABLE, number])
        add_to_counts(log.connection, {(name, status): -1, (name, UNREADABLE): 1})
        return None
    run = claim(record, worker=worker, now=now, lease_until=lease_until)
    if run is not None:
        replace(log, number, record, run)
    return run


def anything_expired(connection: Connection, now: float) -> bool:
    """Tell whether there is something to forget."""
    return connection.execute("SELECT 1 FROM tasks WHERE expires_at <= ? LIMIT 1", [now]).fetchone() is not None


def forget(connection: Connection, which: str, arguments: list[Any]) -> int:
    """Let go of some tasks, and tell how many they were."""
    gone: Counter[tuple[str, str]] = Counter()
    gone.subtract(connection.execute(f"DELETE FROM tasks WHERE {which} RETURNING name, status", arguments))  # noqa: S608
    add_to_counts(connection, gone)
    return -gone.total()


# The file


def set_up(connection: Connection) -> Callable[[], float]:
    """Make what is missing in a file, and tell its clock."""
    columns = {row[1] for row in connection.execute("PRAGMA table_info(tasks)")}
    before = bool(columns) and "due_at" not in columns
    if before:
        for index in ("tasks_by_key", "tasks_by_status", "tasks_looked_for", "tasks_expiring"):
            connection.execute(f"DROP INDEX IF EXISTS {index}")
        connection.execute("ALTER TABLE tasks RENAME TO tasks_before")
    for statement in SCHEMA.split(";"):
        connection.execute(statement)
    if before:
        # A file of the time when the workers were told of tasks by a bus.
        log = Log(connection, "", Decoder())
        for row in connection.execute("SELECT id, record FROM tasks_before ORDER BY number").fetchall():
            record = log.decode(*row)
            if record is not None:
                create(log, record)
        connection.execute("DROP TABLE tasks_before")
    return clock_of(connection)


def clock_of(connection: Connection) -> Callable[[], float]:
    """Give the clock that the file's processes share: the time since the machine's start, which doesn't jump.

    It is set by the wall clock once for each start of the machine. Where the machine has no such clock, it is the wall
    clock itself.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        since_boot = time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):
        return time.time
    row = connection.execute("SELECT moved_by FROM clock WHERE boot = ?", [boot]).fetchone()
    if row is None:
        row = (time.time() - since_boot,)
        connection.execute("DELETE FROM clock")
        connection.execute("INSERT INTO clock VALUES (?, ?)", [boot, *row])
    moved_by: float = row[0]
    return lambda: moved_by + time.clock_gettime(time.CLOCK_BOOTTIME)
