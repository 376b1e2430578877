"""Serve an ASGI app on asyncio, by uvicorn."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import uvicorn
from anyio import Event, create_task_group, current_time, sleep

from chanflow.cli.connections import BODY_SECONDS, GRACE, HEAD_SECONDS, STALL_SECONDS, Connections, drop_unread

__all__ = ["serve"]


class Server(uvicorn.Server):
    """Its signals are ours."""

    def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
        """Leave signals alone."""
        return nullcontext()


def protocol_of(config: uvicorn.Config, connections: Connections) -> type[asyncio.Protocol]:
    """Make a protocol of uvicorn's that is one of the connections, and knows for how long it waits for its client."""
    config.load()
    base: Any = config.http_protocol_class

    class Timed(base):  # type: ignore[misc]
        def connection_made(self, transport: Any) -> None:
            self._transport = transport
            self._seen: Any = None
            self._waits_since = self._read_at = current_time()
            self._unread = 0
            connections.add(self)
            super().connection_made(transport)

        def connection_lost(self, exc: Exception | None) -> None:
            connections.discard(self)
            connections.leave()
            super().connection_lost(exc)

        def overdue(self, now: float) -> bool:
            unread = self._transport.get_write_buffer_size()
            cycle: Any = self.cycle
            if not unread or unread < self._unread:
                self._read_at = now
            self._unread = unread
            # A new cycle is a request whose head is there.
            answering = cycle is not None and not cycle.response_complete
            if cycle is not self._seen or unread or (cycle is not None and answering and not cycle.more_body):
                self._seen, self._waits_since = cycle, now
            patience = BODY_SECONDS if answering else HEAD_SECONDS
            return now - self._waits_since > patience or now - self._read_at > STALL_SECONDS

        def abort(self) -> None:
            if self._transport.get_write_buffer_size():
                drop_unread(self._transport.get_extra_info("socket"))
            self._transport.abort()

    return Timed


async def serve(
    app: Any, taken: socket.socket, connections: Connections, stop: Event, started: Callable[[], None]
) -> None:
    """Serve an app until told to stop; see `server.serve`."""
    config = uvicorn.Config(
        app,
        lifespan="off",
        ws="none",
        log_config=None,
        access_log=False,
        # Nobody needs who a proxy says has asked; who is connected is needed.
        proxy_headers=False,
        timeout_keep_alive=int(HEAD_SECONDS),
        timeout_graceful_shutdown=int(GRACE),
    )
    protocol: Any = protocol_of(config, connections)
    server = Server(config)
    loop = asyncio.get_running_loop()

    def make() -> asyncio.Protocol:
        made: asyncio.Protocol = protocol(
            config=config, server_state=server.server_state, app_state=server.lifespan.state, _loop=loop
        )
        return made

    async def begin(connection: socket.socket) -> None:
        await loop.connect_accepted_socket(make, connection)

    async with create_task_group() as tasks:
        # It is given no socket to listen at: how it accepts connections knows no bound, and where descriptors run out,
        # asyncio logs each of its vain attempts.
        tasks.start_soon(server.serve, [])
        while not server.started:  # noqa: ASYNC110 -- it has no event for that
            await sleep(0.005)
        async with create_task_group() as accepting:
            accepting.start_soon(connections.accept, taken, begin)
            accepting.start_soon(connections.watch)
            started()
            await stop.wait()
            accepting.cancel_scope.cancel()
        taken.close()
        server.should_exit = True
    connections.abort()
