"""One SQLite file, owned by a thread: the event loop sends it requests, and it carries out many in one transaction."""

from __future__ import annotations

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
"""The most requests in one transaction: each waits for all."""
WATCH_INTERVAL = 1.0
"""Seconds after which an idle thread looks whether its event loop is still there."""
BUSY_TIMEOUT = 30.0
"""Seconds for which another process may keep the file to itself."""
BUSY_INTERVAL = 0.01
"""Seconds from one look whether it still does to the next, where SQLite itself doesn't wait."""


class Request(Generic[T]):
    """An operation, and what came of it."""

    __slots__ = ("abandoned", "done", "error", "operation", "undo", "value")

    def __init__(self, operation: Operation[T], undo: Callable[[T], Operation[object]] | None) -> None:
        self.operation = operation
        self.undo = undo
        self.done = Event()
        self.abandoned = False
        self.error: BaseException | None = None
        self.value: T | None = None


class Database:
    """An SQLite file that several processes may have open; in one event loop, all share one thread and connection.

    Requests that wait at the same time are carried out in one transaction, in their order, each as if it were
    alone: one that fails takes nothing of the others back. What has returned is on the disk.

    One that only reads has a thread and a connection of its own, and waits for nobody who writes.
    """

    def __init__(self, path: Path, home: Home, *, reads: bool) -> None:
        self._path = path
        self._home = home
        self._reads = reads
        self._users = 0
        # None is the end. A channel would take two more trips through the event loop for each request.
        self._requests: SimpleQueue[Request[Any] | None] = SimpleQueue()
        # Requests that their callers have not come back from, or that are undone for them.
        self._open = 0
        self._closed = False
        self._quiet = Event()
        self._ended = Event()

    @classmethod
    async def open(cls, path: Path, schema: str, *, reads: bool = False) -> Database:
        """Open a file, or share what has it open here; each one who does closes it.

        Args:
            path: the file, which is made if it is missing.
            schema: statements that make what is missing in it.
            reads: whether for reading only.

        Raises:
            StorageError: it can't be opened, or is no SQLite file.
        """
        home = running_home()
        database = databases.get((path, home, reads))
        if database is None:
            database = databases[path, home, reads] = cls(path, home, reads=reads)
            # Not a daemon, which would be cut off in the middle of a transaction.
            threading.Thread(target=database._serve, name=f"chanflow {path.name}").start()
        database._users += 1
        try:
            await database.run(partial(prepare, schema))
        except BaseException:
            await database.aclose()
            raise
        return database

    async def aclose(self) -> None:
        """Carry out what was requested before, and close the file once nobody here has it open any more."""
        self._users -= 1
        if not self._users:
            del databases[self._path, self._home, self._reads]
            self._closed = True
            with CancelScope(shield=True):
                if self._open:
                    await self._quiet.wait()
                self._requests.put(None)
                await self._ended.wait()

    async def run(self, operation: Operation[T], undo: Callable[[T], Operation[object]] | None = None) -> T:
        """Carry out an operation in the thread.

        Args:
            operation: called with the connection, in a transaction.
            undo: makes of its value the operation that undoes it, for a caller who is cancelled and never sees it.

        Raises:
            StorageError: SQLite reported an error; nothing was done.
            ClosedResourceError: the database is closed.

        Cancellation:
            The operation is carried out nevertheless, and then undone if `undo` is given.
        """
        if self._closed:
            msg = f"{self._path} is closed"
            raise ClosedResourceError(msg)
        request = self._request(operation, undo)
        try:
            await request.done.wait()
        except BaseException:
            request.abandoned = True
            if request.done.is_set():
                self._take_back(request)
            raise
        self._leave()
        if isinstance(request.error, sqlite3.Error):
            msg = f"{self._path}: {request.error}"
            raise StorageError(msg) from request.error
        if request.error is not None:
            raise request.error
        return cast("T", request.value)

    def _request(self, operation: Operation[T], undo: Callable[[T], Operation[object]] | None) -> Request[T]:
        request = Request(operation, undo)
        self._open += 1
        self._requests.put(request)
        return request

    def _leave(self) -> None:
        self._open -= 1
        if self._closed and not self._open:
            self._quiet.set()

    def _take_back(self, request: Request[Any]) -> None:
        """Undo what was done for a caller who was not there any more."""
        if request.undo is not None and request.error is None:
            self._request(request.undo(request.value), None).abandoned = True
        self._leave()

    def _finish(self, batch: list[Request[Any]]) -> None:
        for request in batch:
            request.done.set()
            if request.abandoned:
                self._take_back(request)

    # What runs in the thread.

    def _serve(self) -> None:
        connection: Connection | None = None
        try:
            while batch := self._next_batch():
                try:
                    connection = connection or self._connect()
                    transact(connection, batch, "BEGIN" if self._reads else "BEGIN IMMEDIATE")
                except BaseException as error:  # noqa: BLE001 -- goes to whoever waits
                    for request in batch:
                        request.error = request.error or error
                # Where the event loop has ended, nobody is left to be told.
                with suppress(RuntimeError):
                    self._home.call_soon(partial(self._finish, batch))
        finally:
            if connection is not None:
                connection.close()
            with suppress(RuntimeError):
                self._home.call_soon(self._ended.set)

    def _next_batch(self) -> list[Request[Any]]:
        """Wait for requests, and take all that are there; none where no more will come."""
        while True:
            try:
                request = self._requests.get(timeout=WATCH_INTERVAL)
                break
            except Empty:
                if self._home.ended():
                    # Left open.
                    return []
        batch: list[Request[Any]] = []
        # The end comes alone.
        while request is not None:
            batch.append(request)
            request = None if len(batch) == BATCH or self._requests.empty() else self._requests.get()
        return batch

    def _connect(self) -> Connection:
        # Transactions are begun by hand.
        connection = sqlite3.connect(self._path, timeout=BUSY_TIMEOUT, isolation_level=None)
        try:
            # Readers don't wait for writers, and a commit is one write; a crash at any moment leaves a whole file.
            execute_when_free(connection, "PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
        except BaseException:
            connection.close()
            raise
        return connection


databases: dict[tuple[Path, Home, bool], Database] = {}
"""Those that are open."""


def execute_when_free(connection: Connection, statement: str) -> None:
    """Carry out what SQLite refuses at once, in spite of its timeout, while another process begins with the file."""
    give_up_at = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute(statement).fetchone()
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() >= give_up_at:
                raise
            time.sleep(BUSY_INTERVAL)
        else:
            return


def prepare(schema: str, connection: Connection) -> None:
    """Make what is missing in a file."""
    for statement in schema.split(";"):
        connection.execute(statement)


def transact(connection: Connection, batch: list[Request[Any]], begin: str) -> None:
    """Carry out requests in one transaction."""
    connection.execute(begin)
    try:
        for request in batch:
            if len(batch) == 1:
                request.value = request.operation(connection)
                break
            connection.execute("SAVEPOINT request")
            try:
                request.value = request.operation(connection)
            except BaseException as error:
                request.error = error
                # A full disk may have ended the whole transaction.
                if not connection.in_transaction:
                    raise
                connection.execute("ROLLBACK TO request")
            connection.execute("RELEASE request")
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
