"""The bell of an SQLite file: a thread that looks whether another process has written, and tells of what."""

from __future__ import annotations

import logging
import sqlite3
import threading
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Self

from anyio import CancelScope, Event

from chanflow._loop._home import running_home
from chanflow.tasks.record import TaskStatus
from chanflow.tasks.store import News, Tell

__all__ = ["Bell"]

logger = logging.getLogger("chanflow.tasks")

INTERVAL = 0.001, 0.008
"""The least and the most seconds from one look to the next."""
SHARE = 0.02
"""In between, it is this part of the time since something was found."""
LOOK_INTERVAL = 1.0
"""Seconds from one look whether the event loop is still there to the next."""
AGAIN = 1.0
"""Seconds to wait for a file that can't be read."""
STATUSES = {status.value: status for status in TaskStatus}


class Bell:
    """Tells of changes that others make in a file, while the block lasts.

    SQLite has a number that changes with each commit of another connection; to ask for it takes some microseconds,
    and no lock. What was written is in a table of changes.

    Args:
        path: the file.
        writer: who writes here; their own changes are not told.
        tell: is called in the event loop.
    """

    def __init__(self, path: Path, writer: str, tell: Tell) -> None:
        self._path = path
        self._writer = writer
        self._tell = tell
        self._home = running_home()
        self._stop = threading.Event()
        self._listening = Event()
        self._ended = Event()
        # The last row of the changes that was read; None for none.
        self._last: int | None = None

    async def __aenter__(self) -> Self:
        threading.Thread(target=self._serve, name=f"chanflow {self._path.name} bell", daemon=True).start()
        with CancelScope(shield=True):
            await self._listening.wait()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._stop.set()
        with CancelScope(shield=True):
            await self._ended.wait()

    def _hand_over(self, news: list[News | None]) -> None:
        for each in news:
            self._tell(each)

    # What runs in the thread.

    def _serve(self) -> None:
        # Where the event loop has ended, nobody is left to be told.
        with suppress(RuntimeError):
            while not self._stop.is_set():
                try:
                    with closing(sqlite3.connect(self._path, isolation_level=None)) as connection:
                        self._watch(connection)
                except sqlite3.Error as error:
                    logger.warning("%s can't be watched, which is tried again: %s", self._path, error)
                    self._home.call_soon(self._listening.set)
                    self._stop.wait(AGAIN)
            self._home.call_soon(self._ended.set)

    def _watch(self, connection: sqlite3.Connection) -> None:
        ask = partial(connection.execute, "PRAGMA data_version")
        missed = self._last is not None
        version = ask().fetchone()
        self._last = connection.execute("SELECT max(number) FROM changes").fetchone()[0] or 0
        self._home.call_soon(self._listening.set)
        if missed:
            self._home.call_soon(partial(self._hand_over, [None]))
        least, most = INTERVAL
        changed_at = seen_at = monotonic()
        while not self._stop.wait(min(max((monotonic() - changed_at) * SHARE, least), most)):
            latest = ask().fetchone()
            if latest != version:
                version = latest
                if news := self._read(connection):
                    changed_at = monotonic()
                    self._home.call_soon(partial(self._hand_over, news))
            if monotonic() - seen_at > LOOK_INTERVAL:
                seen_at = monotonic()
                if self._home.ended():
                    self._stop.set()

    def _read(self, connection: sqlite3.Connection) -> list[News | None]:
        """Read what others have written since the last time."""
        assert self._last is not None
        # In one transaction, or what is written in between would be passed over.
        connection.execute("BEGIN")
        first, last = connection.execute("SELECT min(number), max(number) FROM changes").fetchone()
        query = "SELECT id, name, status, cancelling FROM changes WHERE number > ? AND writer != ? ORDER BY number"
        rows: list[Any] = connection.execute(query, [self._last, self._writer]).fetchall()
        connection.execute("COMMIT")
        # Some may have been deleted before they were read.
        missed = first is not None and first > self._last + 1
        self._last = last or 0
        told = [News(task_id, name, STATUSES[status], bool(cancelling)) for task_id, name, status, cancelling in rows]
        return [None, *told] if missed else [*told]
