"""An SQLite file owned by a thread: the event loop queues operations, and the thread runs many in one transaction."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Generic, TypeVar, cast

from anyio import CancelScope, ClosedResourceError, Event

from chanflow._errors import StorageError
from chanflow._loop._home import Home, running_home

__all__ = ["Database"]

T = TypeVar("T")
Connection = sqlite3.Connection
Operation = Callable[[Connection], T]

BATCH = 256
"""The maximum number of operations in one transaction. Each caller waits until the whole batch is committed."""
WATCH_INTERVAL = 1.0
"""Seconds between an idle thread's checks that its event loop still exists."""
BUSY_TIMEOUT = 30.0
"""Seconds to wait for another process that has locked the file."""
BUSY_INTERVAL = 0.01
"""Seconds between attempts to get the lock, where SQLite itself doesn't wait for it."""


class QueuedOperation(Generic[T]):
    """An operation in the queue of the thread, and its outcome."""

    __slots__ = ("abandoned", "done", "error", "operation", "undo", "value")

    def __init__(self, operation: Operation[T], undo: Callable[[T], Operation[object]] | None) -> None:
        self.operation = operation
        self.undo = undo
        self.done = Event()
        self.abandoned = False
        self.error: BaseException | None = None
        self.value: T | None = None


class Database:
    """An SQLite file that several processes may have open; within an event loop, all users share one thread.

    Operations that are waiting at the same time run in one transaction, in the order in which they were queued.
    Each runs in a savepoint of its own: one that fails is rolled back alone. Once `run` has returned, the change is on
    the disk.

    A read-only database has its own thread and connection, and never waits for writers.
    """

    def __init__(self, path: Path, home: Home, *, reads: bool) -> None:
        self._path = path
        self._home = home
        self._reads = reads
        self._users = 0
        # None marks the end. A channel would cost two more trips through the event loop for each operation.
        self._queue: SimpleQueue[QueuedOperation[Any] | None] = SimpleQueue()
        # The number of operations that callers wait for, or that are abandoned and may still have to be undone.
        self._open = 0
        self._closed = False
        self._quiet = Event()
        self._ended = Event()

    @classmethod
    async def open(cls, path: Path, schema: str, *, reads: bool = False) -> Database:
        """Open a file, or share the database if this event loop has it open; every caller must close it.

        Args:
            path: the file, which is created if it doesn't exist.
            schema: SQL statements, separated by semicolons, that create missing tables and indexes.
            reads: whether the database is only read.

        Raises:
            StorageError: the file can't be opened, or is not an SQLite file.
        """
        home = running_home()
        database = databases.get((path, home, reads))
        if database is None:
            database = databases[path, home, reads] = cls(path, home, reads=reads)
            # Not a daemon thread: the interpreter would stop it in the middle of a transaction.
            threading.Thread(target=database._serve, name=f"chanflow {path.name}").start()
        database._users += 1
        try:
            await database.run(partial(prepare, schema))
        except BaseException:
            await database.aclose()
            raise
        return database

    async def aclose(self) -> None:
        """Run all queued operations, and close the file when its last user in this event loop closes it."""
        self._users -= 1
        if not self._users:
            del databases[self._path, self._home, self._reads]
            self._closed = True
            with CancelScope(shield=True):
                if self._open:
                    await self._quiet.wait()
                self._queue.put(None)
                await self._ended.wait()

    async def run(self, operation: Operation[T], undo: Callable[[T], Operation[object]] | None = None) -> T:
        """Run an operation in the thread and return its value.

        Args:
            operation: called with the connection, in a transaction.
            undo: called with the operation's value if the caller was cancelled; returns the operation that undoes it.

        Raises:
            StorageError: SQLite reported an error; the operation had no effect.
            ClosedResourceError: the database is closed.

        Cancellation:
            The operation still runs, and is then undone if `undo` is given.
        """
        if self._closed:
            msg = f"{self._path} is closed"
            raise ClosedResourceError(msg)
        queued = self._enqueue(operation, undo)
        try:
            await queued.done.wait()
        except BaseException:
            queued.abandoned = True
            if queued.done.is_set():
                self._take_back(queued)
            raise
        self._leave()
        if isinstance(queued.error, sqlite3.Error):
            msg = f"{self._path}: {queued.error}"
            raise StorageError(msg) from queued.error
        if queued.error is not None:
            raise queued.error
        return cast("T", queued.value)

    def _enqueue(self, operation: Operation[T], undo: Callable[[T], Operation[object]] | None) -> QueuedOperation[T]:
        queued = QueuedOperation(operation, undo)
        self._open += 1
        self._queue.put(queued)
        return queued

    def _leave(self) -> None:
        self._open -= 1
        if self._closed and not self._open:
            self._quiet.set()

    def _take_back(self, queued: QueuedOperation[Any]) -> None:
        """Undo the operation of a caller that was cancelled."""
        if queued.undo is not None and queued.error is None:
            self._enqueue(queued.undo(queued.value), None).abandoned = True
        self._leave()

    def _finish(self, batch: list[QueuedOperation[Any]]) -> None:
        for queued in batch:
            queued.done.set()
            if queued.abandoned:
                self._take_back(queued)

    # In the thread

    def _serve(self) -> None:
        connection: Connection | None = None
        opened: os.stat_result | None = None
        try:
            while batch := self._next_batch():
                try:
                    connection = connection or self._connect()
                    opened = still_there(self._path, opened)
                    transact(connection, batch, "BEGIN" if self._reads else "BEGIN IMMEDIATE")
                except BaseException as error:  # noqa: BLE001 -- raised in the callers
                    for queued in batch:
                        queued.error = queued.error or error
                # If the event loop has ended, no caller is left to wake.
                with suppress(RuntimeError):
                    self._home.call_soon(partial(self._finish, batch))
        finally:
            if connection is not None:
                connection.close()
            with suppress(RuntimeError):
                self._home.call_soon(self._ended.set)

    def _next_batch(self) -> list[QueuedOperation[Any]]:
        """Wait for an operation, and take all that are queued; return an empty list at the end."""
        while True:
            try:
                queued = self._queue.get(timeout=WATCH_INTERVAL)
                break
            except Empty:
                if self._home.ended():
                    # The event loop ended without closing the database.
                    return []
        batch: list[QueuedOperation[Any]] = []
        # The end is queued last, when nothing is open, so it never ends up inside a batch.
        while queued is not None:
            batch.append(queued)
            queued = None if len(batch) == BATCH or self._queue.empty() else self._queue.get()
        return batch

    def _connect(self) -> Connection:
        make_private(self._path)
        # No isolation level: `transact` begins the transactions itself.
        connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT, isolation_level=None)
        try:
            # With WAL, readers don't wait for writers, a commit is one write, and a crash never leaves a damaged file.
            execute_when_free(connection, "PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        except BaseException:
            connection.close()
            raise
        return connection


databases: dict[tuple[Path, Home, bool], Database] = {}
"""The open databases."""


def execute_when_free(connection: Connection, statement: str) -> None:
    """Execute a statement, retrying while the file is locked.

    While another process is switching the file to WAL, SQLite fails immediately instead of waiting for its timeout.
    """
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute(statement).fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= deadline:
                raise
            time.sleep(BUSY_INTERVAL)
        else:
            return


def still_there(path: Path, opened: os.stat_result | None) -> os.stat_result:
    """Refuse a path that names another file than was opened, or none: SQLite would write where nobody looks."""
    try:
        there = path.stat()
    except FileNotFoundError:
        there = None
    if there is None or not os.path.samestat(there, opened or there):
        msg = "the file was moved or deleted while it was open: restart whoever has it open"
        raise sqlite3.OperationalError(msg)
    return there


making = threading.Lock()


def make_private(path: Path) -> None:
    """Make a file that only its owner may read, unless it is there; why it can't be made, SQLite will say."""
    # One that is there is not opened: to close it would take away the locks that this process has on it. Nor is it
    # opened by another thread before it is closed here.
    with making, suppress(OSError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))


def prepare(schema: str, connection: Connection) -> None:
    """Execute the statements of a schema, which create what doesn't exist yet."""
    for statement in schema.split(";"):
        connection.execute(statement)


def transact(connection: Connection, batch: list[QueuedOperation[Any]], begin: str) -> None:
    """Run a batch of operations in one transaction, and record the outcome of each."""
    connection.execute(begin)
    try:
        for queued in batch:
            if len(batch) == 1:
                queued.value = queued.operation(connection)
                break
            connection.execute("SAVEPOINT operation")
            try:
                queued.value = queued.operation(connection)
            except BaseException as error:
                queued.error = error
                # A full disk may have ended the whole transaction.
                if not connection.in_transaction:
                    raise
                connection.execute("ROLLBACK TO operation")
            connection.execute("RELEASE operation")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
