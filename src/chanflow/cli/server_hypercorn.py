"""Serve an ASGI app on trio, by hypercorn."""

from __future__ import annotations

import logging
import socket
import sys
from collections.abc import Callable
from typing import Any, cast

import trio
from anyio import Event, create_task_group, current_time, move_on_after
from hypercorn.config import Config
from hypercorn.events import Closed, RawData
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from chanflow.cli.connections import BODY_SECONDS, GRACE, HEAD_SECONDS, STALL_SECONDS, Connections, drop_unread

__all__ = ["serve"]

STREAMS = 100
"""How many requests a connection may have at the same time, with HTTP/2."""


class Connection(TCPServer):
    """A connection of hypercorn's, which knows for how long it waits for its client.

    hypercorn's own timer is a task of its own for each request, and its sending takes a lock, a scope and a system call
    for each part of an answer: a third of the time of a short request.
    """

    def __init__(
        self, app: Any, config: Config, context: WorkerContext, connections: Connections, taken: socket.socket
    ) -> None:
        stream: Any = trio.SocketStream(trio.socket.from_stdlib_socket(taken))
        super().__init__(cast("Any", self.answer), config, context, ConnectionState({}), stream)
        self._asgi = app
        self._connections = connections
        self._socket = taken
        self._held: bytearray | None = None
        self._requests = 0
        self._idle_since = current_time()
        self._bodies: dict[object, float] = {}
        self._sends: dict[object, float] = {}
        self._moved_at = 0.0
        self.idle_task: Any = self

    # What hypercorn asks of its timer, which need not be told: it forgets to when a connection turns to HTTP/2.

    async def restart(self, _task_group: object, _action: object) -> None:
        """Do nothing."""

    async def stop(self) -> None:
        """Do nothing."""

    # What it asks of an app, and of a connection.

    async def answer(self, scope: Any, receive: Any, send: Any, _spawn: object, _call_soon: object) -> None:
        """Call the app."""
        self._requests += 1
        try:
            if scope["http_version"] < "2":
                await self._asgi(scope, self._bodily(receive), self._together(send))
            elif self._connections.take():
                try:
                    await self._asgi(scope, self._bodily(receive), self._timed(send))
                finally:
                    self._connections.leave()
            else:
                self.abort()
        finally:
            self._requests -= 1
            self._idle_since = current_time()

    def _bodily(self, receive: Any) -> Any:
        """Take note of a body that an app waits for."""
        begun, more = current_time(), True

        async def receive_on() -> Any:
            nonlocal more
            if not more:
                return await receive()
            self._bodies[receive_on] = begun
            try:
                message = await receive()
            finally:
                del self._bodies[receive_on]
            more = message.get("more_body", False)
            return message

        return receive_on

    def _timed(self, send: Any) -> Any:
        """Take note of when an app began to send something."""

        async def send_on(message: Any) -> None:
            self._sends[send_on] = current_time()
            try:
                await send(message)
            finally:
                del self._sends[send_on]

        return send_on

    def _together(self, send: Any) -> Any:
        """Send the head of the only answer together with the first part of its body."""
        start: Any = None

        async def send_all(message: Any) -> None:
            nonlocal start
            if start is not None:
                head, start, self._held = start, None, bytearray()
                await send(head)
            await send(message)
            await self._let_go()

        timed = self._timed(send_all)

        async def send_on(message: Any) -> None:
            nonlocal start
            if message["type"] == "http.response.start":
                start = message
            else:
                await timed(message)

        return send_on

    async def protocol_send(self, event: Any) -> None:
        """Send to the client."""
        if isinstance(event, RawData):
            await self._send(event.data)
            return
        # The last part of an answer comes before its end.
        await self._let_go()
        await super().protocol_send(event)

    async def _let_go(self) -> None:
        """Send what was held back."""
        held, self._held = self._held, None
        if held:
            await self._send(bytes(held))

    async def _send(self, data: bytes) -> None:
        if self._held is not None:
            self._held += data
            return
        if not self.send_lock.locked():
            # Most answers go out at once, and need no more than this.
            try:
                data = data[self._socket.send(data) :] if data else data
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:
                data = b""  # The reader finds out, too.
        if data:
            # Whole, or what comes after it makes no sense.
            with trio.CancelScope(shield=True):
                async with self.send_lock:
                    await self._send_slowly(data)

    async def _send_slowly(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[await self.stream.socket.send(rest) :]
                self._moved_at = current_time()
        except (OSError, trio.ClosedResourceError):
            await self.protocol.handle(Closed())

    # What the server asks of it.

    @property
    def is_idle(self) -> bool:
        """Whether there is no request."""
        return not self._requests

    def overdue(self, now: float) -> bool:
        """Tell whether its client has been waited for long enough."""
        if self.is_idle:
            return now - self._idle_since > HEAD_SECONDS
        if any(now - since > BODY_SECONDS for since in self._bodies.values()):
            return True
        return any(now - max(since, self._moved_at) > STALL_SECONDS for since in self._sends.values())

    def abort(self) -> None:
        """Close it; where not all of an answer is sent, at once, and what the client has not read is dropped."""
        if self._socket.fileno() >= 0:
            if self._sends:
                drop_unread(self._socket)
            # This one wakes whoever waits for it.
            self.stream.socket.close()


async def serve(
    app: Any, taken: socket.socket, connections: Connections, stop: Event, started: Callable[[], None]
) -> None:
    """Serve an app until told to stop; see `server.serve`."""
    config = Config()
    config.errorlog = logging.getLogger("hypercorn.error")
    config.h2_max_concurrent_streams = STREAMS
    # By default it closes a connection after 1,000 requests, maybe while the next one is on its way.
    config.keep_alive_max_requests = sys.maxsize
    context = WorkerContext(None)
    ended = trio.Event()

    async def handle(connection: Connection) -> None:
        connections.add(connection)
        try:
            await connection.run()
        except* Exception as group:  # noqa: BLE001 -- of one client, and none of the others' business
            connections.tell("connections fail, and are closed, the last one by %r", group.exceptions[0])
        finally:
            connection.abort()
            connections.discard(connection)
            connections.leave()
            if not connections and stop.is_set():
                ended.set()

    async def begin(accepted: socket.socket) -> None:
        open_ones.start_soon(handle, Connection(app, config, context, connections, accepted))

    async with create_task_group() as open_ones:
        async with create_task_group() as accepting:
            accepting.start_soon(connections.accept, taken, begin)
            accepting.start_soon(connections.watch)
            started()
            await stop.wait()
            accepting.cancel_scope.cancel()
        taken.close()
        await context.terminated.set()
        for connection in list(connections):
            if isinstance(connection, Connection) and connection.is_idle:
                connection.abort()
        if connections:
            with move_on_after(GRACE):
                await ended.wait()
        connections.abort()
        open_ones.cancel_scope.cancel()
