"""Topics in an SQLite file, which several processes may share and which outlives them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attrs import asdict, evolve

from chanflow._loop._home import Home, running_home
from chanflow._loop._signal import Signal
from chanflow._sqlite import Connection, Database
from chanflow.bus.backend import Backend, Capabilities, Content, Delivery, Member, Membership, Origin

__all__ = ["SqliteBackend"]

POLL = 0.1
"""Seconds between checks for changes made by other processes."""

SCHEMA = """
CREATE TABLE IF NOT EXISTS bus_messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    topic TEXT NOT NULL,
    key TEXT,
    body BLOB NOT NULL,
    headers TEXT NOT NULL,
    origin TEXT,
    only_group TEXT,
    published_at REAL NOT NULL,
    settled_at REAL
);
CREATE INDEX IF NOT EXISTS bus_messages_of_topic ON bus_messages (topic, id);
CREATE INDEX IF NOT EXISTS bus_messages_settled ON bus_messages (settled_at) WHERE settled_at IS NOT NULL;
CREATE TABLE IF NOT EXISTS bus_groups (
    id INTEGER PRIMARY KEY,
    topic TEXT NOT NULL,
    name TEXT NOT NULL,
    pending INTEGER NOT NULL DEFAULT 0,
    UNIQUE (topic, name)
);
CREATE TABLE IF NOT EXISTS bus_deliveries (
    group_id INTEGER NOT NULL,
    message_id INTEGER NOT NULL,
    key TEXT,
    attempt INTEGER NOT NULL DEFAULT 0,
    receipt INTEGER NOT NULL DEFAULT 0,
    due REAL NOT NULL DEFAULT 0,
    PRIMARY KEY (group_id, message_id)
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS bus_deliveries_of_message ON bus_deliveries (message_id);
CREATE INDEX IF NOT EXISTS bus_deliveries_of_key ON bus_deliveries (group_id, key, message_id) WHERE key IS NOT NULL;
"""
# A delivery is ready if it is due (never leased, or its delay or lease has expired) and no older one has the same key.
READY = """
SELECT d.message_id, d.attempt + 1, d.receipt + 1, m.topic, m.key, m.body, m.headers, m.origin, m.published_at
FROM bus_deliveries AS d JOIN bus_messages AS m ON m.id = d.message_id
WHERE d.group_id = ? AND d.due <= ? AND (d.key IS NULL OR NOT EXISTS (
    SELECT 1 FROM bus_deliveries AS e WHERE e.group_id = d.group_id AND e.key = d.key AND e.message_id < d.message_id))
ORDER BY d.message_id LIMIT ?
"""
HELD = "group_id = ? AND message_id = ? AND receipt = ?"


class SqliteBackend(Backend):
    """Topics in an SQLite file.

    Times are those of the system clock, which all processes of the machine share.
    """

    capabilities: Capabilities = Capabilities(durable=True, shared=True)

    def __init__(self, path: Path, *, max_pending: float, retention: float) -> None:
        self._path = path
        self._database: Database
        self._max_pending = max_pending
        self._retention = retention
        # The signals of tasks in this process that wait for messages of a topic, or for room in it.
        self._listeners: dict[str, set[Signal]] = {}
        self.home: Home

    async def open(self) -> None:
        self.home = running_home()
        self._database = await Database.open(self._path, SCHEMA)

    async def aclose(self) -> None:
        await self._database.aclose()

    def notify(self, topic: str) -> None:
        """Wake the tasks in this process that wait for a change in a topic."""
        for listener in self._listeners.get(topic, ()):
            listener.send()

    def listen(self, topic: str, listener: Signal) -> None:
        """Register a signal to send when something changes in a topic."""
        self._listeners.setdefault(topic, set()).add(listener)

    def leave(self, topic: str, listener: Signal) -> None:
        """Unregister a signal."""
        listeners = self._listeners[topic]
        listeners.discard(listener)
        if not listeners:
            del self._listeners[topic]

    async def publish(self, content: Content) -> str:
        def publish(connection: Connection) -> int | None:
            return None if self._is_full(connection, content.topic) else insert(connection, content)

        number = await self._database.run(publish)
        if number is None:
            room = Signal()
            self.listen(content.topic, room)
            try:
                while number is None:
                    await room.wait(self.home, self.home.time() + POLL)
                    number = await self._database.run(publish)
            finally:
                self.leave(content.topic, room)
        self.notify(content.topic)
        return str(number)

    def _is_full(self, connection: Connection, topic: str) -> bool:
        [(most,)] = connection.execute("SELECT max(pending) FROM bus_groups WHERE topic = ?", [topic])
        if most is None and self._max_pending < float("inf"):
            # The topic has no group yet, so all its messages are pending.
            unread = "SELECT count(*) FROM (SELECT 1 FROM bus_messages WHERE topic = ? LIMIT ?)"
            [(most,)] = connection.execute(unread, [topic, self._max_pending])
        return most is not None and most >= self._max_pending

    async def join(self, membership: Membership) -> Member:
        def join(connection: Connection) -> int:
            return join_group(connection, membership.topic, membership.group, from_start=membership.from_start)

        return SqliteMember(self, self._database, membership, await self._database.run(join))

    async def browse(self, topic: str, limit: int) -> list[Delivery]:
        def browse(connection: Connection) -> list[Delivery]:
            return [
                read((number, 0, None, topic, *row))
                for number, *row in connection.execute(
                    "SELECT id, key, body, headers, origin, published_at FROM bus_messages"
                    " WHERE topic = ? AND settled_at IS NULL ORDER BY id LIMIT ?",
                    [topic, limit],
                )
            ]

        return await self._database.run(browse)

    async def replay(self, topic: str, ids: Sequence[str] | None) -> int:
        chosen = None if ids is None else {int(each) for each in ids if each.isdecimal()}

        def replay(connection: Connection) -> list[str]:
            rows = connection.execute(
                "SELECT id, 0, 0, topic, key, body, headers, origin, published_at FROM bus_messages"
                " WHERE topic = ? AND origin IS NOT NULL AND settled_at IS NULL ORDER BY id",
                [topic],
            ).fetchall()
            topics = []
            for row in rows:
                content = read(row).content
                if content.origin is not None and (chosen is None or row[0] in chosen):
                    origin = content.origin
                    remove(connection, row[0])
                    join_group(connection, origin.topic, origin.group, from_start=True)
                    insert(connection, evolve(content, topic=origin.topic, origin=None), origin.group)
                    topics.append(origin.topic)
            return topics

        topics = await self._database.run(replay)
        for each in {topic, *topics}:
            self.notify(each)
        return len(topics)

    def settle(self, connection: Connection, group: int, number: int) -> None:
        """Settle a message for one group."""
        connection.execute("DELETE FROM bus_deliveries WHERE group_id = ? AND message_id = ?", [group, number])
        connection.execute("UPDATE bus_groups SET pending = pending - 1 WHERE id = ?", [group])
        forget(connection, "id = ?", number, self._retention)


def insert(connection: Connection, content: Content, only_group: str | None = None) -> int:
    """Add a message for all groups of its topic, or for one; return its number."""
    origin = None if content.origin is None else json.dumps(asdict(content.origin))
    headers = json.dumps(dict(content.headers))
    row = [content.topic, content.key, content.body, headers, origin, only_group, time.time()]
    cursor = connection.execute(
        "INSERT INTO bus_messages (topic, key, body, headers, origin, only_group, published_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        row,
    )
    number = cursor.lastrowid
    assert number is not None
    groups = "topic = ? AND (name = ? OR ? IS NULL)"
    connection.execute(
        f"INSERT INTO bus_deliveries (group_id, message_id, key) SELECT id, ?, ? FROM bus_groups WHERE {groups}",  # noqa: S608 -- no one else's words
        [number, content.key, content.topic, only_group, only_group],
    )
    connection.execute(
        f"UPDATE bus_groups SET pending = pending + 1 WHERE {groups}",  # noqa: S608 -- the same
        [content.topic, only_group, only_group],
    )
    return number


def join_group(connection: Connection, topic: str, name: str, *, from_start: bool) -> int:
    """Return the number of a group, creating the group if it doesn't exist."""
    made = connection.execute("INSERT OR IGNORE INTO bus_groups (topic, name) VALUES (?, ?)", [topic, name]).rowcount
    [(group,)] = connection.execute("SELECT id FROM bus_groups WHERE topic = ? AND name = ?", [topic, name])
    if made and from_start:
        connection.execute(
            "INSERT INTO bus_deliveries (group_id, message_id, key)"
            " SELECT ?, id, key FROM bus_messages WHERE topic = ? AND only_group IS NULL",
            [group, topic],
        )
        connection.execute(
            "UPDATE bus_groups SET pending = (SELECT count(*) FROM bus_deliveries WHERE group_id = ?) WHERE id = ?",
            [group, group],
        )
        connection.execute(
            "UPDATE bus_messages SET settled_at = NULL WHERE topic = ? AND only_group IS NULL",
            [topic],
        )
    elif made:
        # Messages that were waiting for a first group are not needed.
        forget(connection, "topic = ? AND settled_at IS NULL", topic, 0.0)
    return int(group)


def forget(connection: Connection, which: str, argument: object, retention: float) -> None:
    """Delete matching messages that every group has settled, after the retention, and all whose retention has ended."""
    unneeded = f"{which} AND NOT EXISTS (SELECT 1 FROM bus_deliveries WHERE message_id = bus_messages.id)"  # noqa: S608 -- no one else's words
    if retention:
        now = time.time()
        connection.execute(
            f"UPDATE bus_messages SET settled_at = ? WHERE {unneeded}",  # noqa: S608 -- no one else's words
            [now, argument],
        )
        connection.execute("DELETE FROM bus_messages WHERE settled_at <= ?", [now - retention])
    else:
        connection.execute(f"DELETE FROM bus_messages WHERE {unneeded}", [argument])  # noqa: S608 -- the same


def remove(connection: Connection, number: int) -> None:
    """Delete a message, even if it is leased."""
    connection.execute(
        "UPDATE bus_groups SET pending = pending - 1"
        " WHERE id IN (SELECT group_id FROM bus_deliveries WHERE message_id = ?)",
        [number],
    )
    connection.execute("DELETE FROM bus_deliveries WHERE message_id = ?", [number])
    connection.execute("DELETE FROM bus_messages WHERE id = ?", [number])


def read(row: Sequence[Any]) -> Delivery:
    """Return a row as a delivery."""
    number, attempt, receipt, topic, key, body, headers, origin, published_at = row
    content = Content(
        topic=topic,
        body=body,
        key=key,
        headers=json.loads(headers),
        origin=None if origin is None else Origin(**json.loads(origin)),
    )
    return Delivery(id=str(number), content=content, published_at=published_at, attempt=attempt, receipt=receipt)


class SqliteMember(Member):
    """A member of a group of the SQLite backend."""

    def __init__(self, backend: SqliteBackend, database: Database, membership: Membership, group: int) -> None:
        self._backend = backend
        self._database = database
        self._topic = membership.topic
        self._lease = membership.ack_deadline
        self._group = group

    async def fetch(self, max_items: int) -> list[Delivery]:
        def lease(connection: Connection) -> tuple[list[Delivery], float | None]:
            now = time.time()
            deliveries = [read(row) for row in connection.execute(READY, [self._group, now, max_items])]
            connection.executemany(
                "UPDATE bus_deliveries SET attempt = ?, receipt = ?, due = ? WHERE group_id = ? AND message_id = ?",
                [(each.attempt, each.receipt, now + self._lease, self._group, int(each.id)) for each in deliveries],
            )
            if deliveries:
                return deliveries, None
            [(due,)] = connection.execute(
                "SELECT min(due) FROM bus_deliveries WHERE group_id = ? AND due > ?", [self._group, now]
            )
            return [], due

        def give_back(leased: tuple[list[Delivery], float | None]) -> Any:
            return lambda connection: [self._postpone(connection, each, 0.0, -1) for each in leased[0]]

        home, news = self._backend.home, Signal()
        self._backend.listen(self._topic, news)
        try:
            while True:
                deliveries, due = await self._database.run(lease, give_back)
                if deliveries:
                    return deliveries
                wait = POLL if due is None else min(max(due - time.time(), 0.0), POLL)
                await news.wait(home, home.time() + wait)
        finally:
            self._backend.leave(self._topic, news)

    async def ack(self, delivery: Delivery) -> bool:
        def ack(connection: Connection) -> bool:
            held = self._holds(connection, delivery)
            if held:
                self._backend.settle(connection, self._group, int(delivery.id))
            return held

        return await self._change(ack)

    async def nack(self, delivery: Delivery, delay: float, *, attempted: bool = True) -> bool:
        return await self._change(
            lambda connection: self._postpone(connection, delivery, delay, 0 if attempted else -1)
        )

    async def extend(self, delivery: Delivery) -> bool:
        def extend(connection: Connection) -> bool:
            changed = connection.execute(
                f"UPDATE bus_deliveries SET due = ? WHERE {HELD}",  # noqa: S608 -- no one else's words
                [time.time() + self._lease, *self._arguments(delivery)],
            )
            return changed.rowcount > 0

        return await self._database.run(extend)

    async def bury(self, delivery: Delivery, dead: Content) -> bool:
        def bury(connection: Connection) -> bool:
            held = self._holds(connection, delivery)
            if held:
                self._backend.settle(connection, self._group, int(delivery.id))
                insert(connection, dead)
            return held

        held = await self._change(bury)
        self._backend.notify(dead.topic)
        return held

    async def _change(self, operation: Any) -> bool:
        """Run an operation on the file, and wake the tasks that it may allow to continue."""
        held: bool = await self._database.run(operation)
        self._backend.notify(self._topic)
        return held

    def _arguments(self, delivery: Delivery) -> list[Any]:
        return [self._group, int(delivery.id), delivery.receipt]

    def _holds(self, connection: Connection, delivery: Delivery) -> bool:
        query = f"SELECT 1 FROM bus_deliveries WHERE {HELD}"  # noqa: S608 -- no one else's words
        return connection.execute(query, self._arguments(delivery)).fetchone() is not None

    def _postpone(self, connection: Connection, delivery: Delivery, delay: float, attempts: int) -> bool:
        due = time.time() + delay if delay else 0.0
        changed = connection.execute(
            f"UPDATE bus_deliveries SET due = ?, receipt = receipt + 1, attempt = attempt + ? WHERE {HELD}",  # noqa: S608 -- the same
            [due, attempts, *self._arguments(delivery)],
        )
        return changed.rowcount > 0
