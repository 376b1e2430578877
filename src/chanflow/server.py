"""Serve an ASGI app until told to stop: by uvicorn on asyncio, by hypercorn on trio."""

from __future__ import annotations

import os
import socket
from typing import Any

from anyio import TASK_STATUS_IGNORED, Event
from anyio.abc import TaskStatus

from chanflow.connections import BACKLOG, MAX_CONNECTIONS, Connections, bound_by_files

__all__ = ["listen", "serve"]


def listen(host: str, port: int) -> socket.socket:
    """Take a port; OSError if that can't be.

    Args:
        host: a name or an address.
        port: 0 for any that is free.
    """
    # The first address that the name has.
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    taken = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
        taken.listen(BACKLOG)
    except BaseException:
        taken.close()
        raise
    return taken


async def serve(
    app: Any,
    taken: socket.socket,
    backend: str,
    stop: Event,
    *,
    max_connections: int = MAX_CONNECTIONS,
    task_status: TaskStatus[Any] = TASK_STATUS_IGNORED,
) -> None:
    """Serve an app, whose lifespan is somebody else's business.

    Args:
        app: the ASGI app.
        taken: where to listen; it is closed in the end.
        backend: "asyncio" or "trio".
        stop: when it is set, no connection is accepted any more, and the call returns once answers that are on their
            way are sent, or after a second.
        max_connections: how many may be open, at least 1; fewer where the process may not have so many files.
        task_status: is told when it listens.
    """
    # Each takes long to import, and may be missing.
    if backend == "trio":
        from chanflow.server_hypercorn import serve as serve_by  # noqa: PLC0415
    else:
        from chanflow.server_uvicorn import serve as serve_by  # noqa: PLC0415
    connections = Connections(bound_by_files(max_connections))
    await serve_by(app, taken, connections, stop, task_status.started)
