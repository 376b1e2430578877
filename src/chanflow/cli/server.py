"""Serve an ASGI app until told to stop: by uvicorn on asyncio, by hypercorn on trio."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

from anyio import TASK_STATUS_IGNORED, Event
from anyio.abc import TaskStatus

from chanflow.cli.connections import BACKLOG, MAX_CONNECTIONS, Connections, bound_by_files

__all__ = ["below", "is_root_path", "listen", "listen_on_path", "serve"]

ASGIApp: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]


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


def listen_on_path(path: Path) -> socket.socket:
    """Make a Unix socket; OSError if that can't be.

    Args:
        path: where; a socket of a server that is gone is in nobody's way.
    """
    taken = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if path.is_socket():
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
                try:
                    other.connect(str(path))
                except ConnectionRefusedError:
                    path.unlink()
        taken.bind(str(path))
        taken.listen(BACKLOG)
    except BaseException:
        taken.close()
        raise
    return taken


ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~%-]+)+")


def is_root_path(path: str) -> bool:
    """Tell whether a path may stand before those of an app."""
    return ROOT_PATH.fullmatch(path) is not None and not {".", ".."} & set(path.split("/"))


def below(app: ASGIApp, root_path: str) -> ASGIApp:
    """Let an app know that a proxy shows it below a path, which it takes off.

    Args:
        app: the ASGI app.
        root_path: the path. What a proxy on this machine says by `X-Forwarded-Prefix` takes its place.
    """

    async def prefixed(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            # Percent-encoded in the header, as in the option.
            path = unquote(forwarded_prefix(scope) or root_path)
            scope = {**scope, "root_path": path, "path": path + scope["path"]}
        await app(scope, receive, send)

    return prefixed


def forwarded_prefix(scope: Any) -> str | None:
    """Give the path that a proxy on this machine says; None where there is none."""
    client = scope.get("client")
    if client and client[0] not in {"127.0.0.1", "::1"}:
        return None
    said = [value for name, value in scope["headers"] if name == b"x-forwarded-prefix"]
    path = said[0].decode("latin-1").rstrip("/") if len(said) == 1 else ""
    return path if is_root_path(path) else None


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
        from chanflow.cli.server_hypercorn import serve as serve_by  # noqa: PLC0415
    else:
        from chanflow.cli.server_uvicorn import serve as serve_by  # noqa: PLC0415
    connections = Connections(bound_by_files(max_connections))
    await serve_by(app, taken, connections, stop, task_status.started)
