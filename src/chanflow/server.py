"""Serve an ASGI app until told to stop: by uvicorn on asyncio, by hypercorn on trio."""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeAlias
from urllib.parse import unquote

from anyio import TASK_STATUS_IGNORED, Event, create_task_group, sleep
from anyio.abc import TaskStatus

__all__ = ["below", "is_root_path", "listen", "listen_on_path", "serve"]

ASGIApp: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]

BACKLOG = 2048
GRACE = 1.0
"""Seconds for answers that are on their way when the server stops."""
KEEP_ALIVE = 20.0
"""Seconds for which a connection may be idle."""


def listen(host: str, port: int) -> socket.socket:
    """Take a port; OSError if that can't be.

    Args:
        host: a name or an address.
        port: 0 for any that is free.
    """
    # The first address that the name has.
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    # With the protocol said, as `create_server` doesn't: asyncio looks at it before it turns Nagle's algorithm off, and
    # with that on, an answer may wait 40 ms for an acknowledgement.
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
    app: Any, taken: socket.socket, backend: str, stop: Event, *, task_status: TaskStatus[Any] = TASK_STATUS_IGNORED
) -> None:
    """Serve an app, whose lifespan is somebody else's business.

    Args:
        app: the ASGI app.
        taken: where to listen.
        backend: "asyncio" or "trio".
        stop: when it is set, connections are closed and the call returns.
        task_status: is told when it listens.
    """
    if backend == "trio":
        await serve_on_trio(app, taken, stop, task_status)
    else:
        await serve_on_asyncio(app, taken, stop, task_status)


async def serve_on_trio(app: Any, taken: socket.socket, stop: Event, task_status: Any) -> None:
    """Serve by hypercorn."""
    from hypercorn import trio as hypercorn_trio  # noqa: PLC0415 -- it takes long, and may be missing
    from hypercorn.config import Config  # noqa: PLC0415

    config = Config()
    config.bind = [f"fd://{taken.fileno()}"]
    config.errorlog = logging.getLogger("hypercorn.error")
    config.graceful_timeout = GRACE
    # It counts from the connection on: by default, with many at once, some would be cut off before they are heard.
    config.keep_alive_timeout = KEEP_ALIVE
    # By default it closes a connection after 1,000 requests, maybe while the next one is on its way.
    config.keep_alive_max_requests = sys.maxsize
    await hypercorn_trio.serve(app, config, shutdown_trigger=stop.wait, task_status=task_status)


async def serve_on_asyncio(app: Any, taken: socket.socket, stop: Event, task_status: Any) -> None:
    """Serve by uvicorn."""
    import uvicorn  # noqa: PLC0415 -- as above

    class Server(uvicorn.Server):
        def capture_signals(self) -> AbstractContextManager[None]:  # type: ignore[override]
            # They are ours.
            return nullcontext()

    server = Server(
        uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            # Nobody needs who a proxy says has asked; what is asked by, is needed.
            proxy_headers=False,
            timeout_graceful_shutdown=int(GRACE),
        )
    )
    async with create_task_group() as tasks:
        tasks.start_soon(server.serve, [taken])
        while not server.started:  # noqa: ASYNC110 -- it has no event for that
            await sleep(0.005)
        task_status.started()
        await stop.wait()
        server.should_exit = True
