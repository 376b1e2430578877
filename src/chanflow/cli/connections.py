"""The connections of a server: so many at a time, and none whose client is silent or does not read."""

# Invariants:
# 1. A place is taken for each connection before it is accepted, and given back once when it has ended; and so it is for
#    each request that shares one. A connection that finds no place waits in the listening socket's backlog.
# 2. No loop of this module turns without a wait: not where the process has no descriptors left, either.

from __future__ import annotations

import errno
import logging
import socket
import struct
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from anyio import Semaphore, WouldBlock, current_time, sleep, wait_readable

__all__ = [
    "BACKLOG",
    "BODY_SECONDS",
    "GRACE",
    "HEAD_SECONDS",
    "MAX_CONNECTIONS",
    "STALL_SECONDS",
    "Connection",
    "Connections",
    "bound_by_files",
    "drop_unread",
]

logger: logging.Logger = logging.getLogger("chanflow.server")

MAX_CONNECTIONS = 2000
BACKLOG = 1024
"""How many may wait to be accepted: those of a burst, or when there is no place."""
HEAD_SECONDS = 20.0
"""Seconds for the head of a request: from the connection's begin, or the end of the last answer, to its last byte."""
BODY_SECONDS = 60.0
"""Seconds for the body of a request that is waited for."""
STALL_SECONDS = 60.0
"""Seconds after which a client that has taken nothing of its answer is taken for gone."""
GRACE = 1.0
"""Seconds for answers that are on their way when the server stops."""
LOOK_INTERVAL = 1.0
SPARE_FILES = 100
"""Descriptors for all that is no connection: stores, processes, logs."""
RETRY_SECONDS = 0.5
"""Seconds to wait where the machine can't give another connection now."""
TELL_INTERVAL = 60.0
"""Seconds from one line of the log that tells of a bound to the next."""
AT_ONCE = struct.pack("ii", 1, 0)
"""Of SO_LINGER."""
GONE = {errno.ECONNABORTED, errno.EPROTO, errno.EPERM, errno.EINTR, errno.EAGAIN}
"""Of accepting: the client went away, or was kept out, before it was."""


class Connection(Protocol):
    """A connection, as a server has it."""

    def overdue(self, now: float) -> bool:
        """Tell whether its client has been waited for long enough; asked every now and then."""
        ...

    def abort(self) -> None:
        """Close it; where not all of an answer is sent, at once, and what the client has not read is dropped."""
        ...


class Connections(set[Connection]):
    """Those that are open.

    Args:
        most: how many may be.
    """

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most
        self._places = Semaphore(most)
        self._told_at: dict[str, float] = {}

    async def accept(self, taken: socket.socket, begin: Callable[[socket.socket], Awaitable[None]]) -> None:
        """Accept connections for ever.

        Args:
            taken: where to listen.
            begin: is given each, and has to see to it that its place is given back in the end.
        """
        taken.settimeout(0.0)
        while True:
            if self._places.value == 0:
                self.tell("%d connections are open, and others have to wait", self._most)
            await self._places.acquire()
            await begin(await self._next(taken))

    async def _next(self, taken: socket.socket) -> socket.socket:
        while True:
            await wait_readable(taken)
            try:
                connection, _ = taken.accept()
            except OSError as error:
                if error.errno not in GONE:
                    self.tell("connections can't be accepted, which is tried again: %s", error.strerror)
                    await sleep(RETRY_SECONDS)
            else:
                connection.settimeout(0.0)
                if taken.family in {socket.AF_INET, socket.AF_INET6}:
                    # Or an answer may wait 40 ms for an acknowledgement.
                    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return connection

    def take(self) -> bool:
        """Take a place for a request that shares its connection with others; tell whether there was one."""
        try:
            self._places.acquire_nowait()
        except WouldBlock:
            return False
        return True

    def leave(self) -> None:
        """Give a place back."""
        self._places.release()

    async def watch(self) -> None:
        """Abort connections that are overdue, for ever."""
        while True:
            await sleep(LOOK_INTERVAL)
            now = current_time()
            for connection in list(self):
                if connection.overdue(now):
                    connection.abort()

    def abort(self) -> None:
        """Abort all."""
        for connection in list(self):
            connection.abort()

    def tell(self, text: str, value: object) -> None:
        """Log what would otherwise be logged for each connection."""
        now = current_time()
        if now - self._told_at.get(text, float("-inf")) > TELL_INTERVAL:
            self._told_at[text] = now
            logger.warning(text, value)


def drop_unread(connection: Any) -> None:
    """Let a socket that is closed next drop what its client has not read: the system would keep it for minutes."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)


def bound_by_files(most: int) -> int:
    """Give how many connections there may be at most: fewer where the process may not have as many files.

    Its own limit is raised as far as that takes and the machine lets it be.
    """
    try:
        import resource  # noqa: PLC0415 -- Windows has none
    except ModuleNotFoundError:
        return most
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return most
    needed = most + SPARE_FILES
    if soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return max(min(most, soft - SPARE_FILES), 1)
