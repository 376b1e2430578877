"""The commands that serve tasks over HTTP: `chanflow serve`, and `chanflow demo-service` to see how that is."""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import anyio
import click
from anyio.abc import TaskGroup

from chanflow.cli import server
from chanflow.cli.connections import MAX_CONNECTIONS
from chanflow.cli.errors import CommandError
from chanflow.cli.worker import Option, backend_option, drain_option, find_service, log_option, run, start_logging
from chanflow.tasks import TaskService, Token
from chanflow.tasks._token import parse_tokens

__all__ = ["Serving", "demo_service", "serve"]

LOCAL = ("127.0.0.1", "::1", "localhost")
ANY = {"", "0.0.0.0", "::"}  # noqa: S104 -- they are no names
"""Where to listen at all addresses of the machine."""
host_option: Option = click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen.")
port_option: Option = click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 for any that is free."
)


def check_root_path(_context: click.Context, _parameter: click.Parameter, root_path: str) -> str:
    """Refuse a path that can't stand before others."""
    if root_path and not server.is_root_path(root_path):
        msg = f"must begin with a slash, and not end with one, in letters, digits and -._~/%, got {root_path!r}"
        raise click.BadParameter(msg)
    return root_path


class Serving:
    """The app of a service, served while the block lasts."""

    def __init__(
        self,
        service: TaskService,
        host: str,
        port: int,
        backend: str,
        *,
        uds: Path | None = None,
        root_path: str = "",
        max_connections: int = MAX_CONNECTIONS,
        **options: Any,
    ) -> None:
        try:
            self._app: Any = service.asgi(**options)
        except (ModuleNotFoundError, ValueError) as error:
            raise CommandError(str(error)) from None
        place = f"{host} port {port}" if uds is None else str(uds)
        try:
            self._socket: socket.socket = server.listen(host, port) if uds is None else server.listen_on_path(uds)
        except OSError as error:
            # Without what Python adds in brackets.
            reason, _, _ = str(error.strerror or error).partition(" (")
            msg = f"can't listen on {place}: {reason}"
            raise CommandError(msg) from None
        shown = f"[{host}]" if ":" in host else host
        self.url: str = f"unix:{uds}" if uds is not None else f"http://{shown}:{self._socket.getsockname()[1]}/"
        self._uds: Path | None = uds
        self._root_path: str = root_path
        self._backend: str = backend
        self._max_connections: int = max_connections
        self._stop: anyio.Event
        self._tasks: TaskGroup

    async def __aenter__(self) -> Self:
        for name in ("uvicorn", "hypercorn"):
            # What they say of their own coming and going is said here, and what they say of each request that makes no
            # sense would be for any client to fill the log with.
            logging.getLogger(name).setLevel(logging.ERROR)
        self._stop = anyio.Event()
        self._tasks = await anyio.create_task_group().__aenter__()
        app = server.below(self._app, self._root_path)
        serve = partial(server.serve, max_connections=self._max_connections)
        await self._tasks.start(serve, app, self._socket, self._backend, self._stop)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        # So that they don't hold the server up.
        self._app.waits.end()
        self._stop.set()
        try:
            await self._tasks.__aexit__(exc_type, exc, tb)
        finally:
            if self._uds is not None:
                self._uds.unlink(missing_ok=True)


@click.command()
@click.argument("service", metavar="MODULE:SERVICE")
@host_option
@port_option
@click.option(
    "--uds", type=click.Path(path_type=Path), metavar="PATH", help="Listen on this Unix socket, and on no port."
)
@click.option(
    "--root-path",
    default="",
    callback=check_root_path,
    metavar="/PATH",
    help="Where a proxy, which takes it off, shows the app.",
)
@backend_option
@click.option(
    "--workers", type=click.IntRange(0), help="How many tasks may run here, instead of what the service says."
)
@click.option(
    "--token-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Bearer tokens, one a line, as `secret`, `name: secret` or `name[read,submit,admin]: secret`: a request "
    "needs one of them.",
)
@click.option(
    "--host-name",
    "host_names",
    multiple=True,
    metavar="NAME",
    help="A name or address by which the service is called; can be repeated. Without tokens, and with any of these, "
    "requests by other names than these and the machine's own are refused.",
)
@click.option(
    "--cors",
    multiple=True,
    metavar="ORIGIN",
    help="An origin, such as https://app.example, whose pages may use the service; can be repeated.",
)
@click.option(
    "--max-connections",
    type=click.IntRange(1),
    default=MAX_CONNECTIONS,
    show_default=True,
    help="With so many, others wait; fewer where the process may not have so many files.",
)
@click.option(
    "--max-pending", type=click.IntRange(1), default=1000, show_default=True, help="With so many, more are refused."
)
@click.option(
    "--max-body", type=click.IntRange(1), default=1_000_000, show_default=True, metavar="BYTES", help="Of a request."
)
@click.option(
    "--max-wait",
    type=click.FloatRange(0),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long a request may wait for the end of a task.",
)
@click.option("--dead-letters", multiple=True, metavar="TOPIC", help="A dead-letter topic to show; can be repeated.")
@drain_option
@log_option
def serve(
    *,
    service: str,
    host: str,
    port: int,
    uds: Path | None,
    root_path: str,
    backend: str,
    workers: int | None,
    token_file: Path | None,
    host_names: tuple[str, ...],
    cors: tuple[str, ...],
    max_connections: int,
    max_pending: int,
    max_body: int,
    max_wait: float,
    dead_letters: tuple[str, ...],
    drain: float,
    log_format: str,
) -> None:
    """Serve the tasks of a service over HTTP, with a dashboard, and run them, until SIGTERM or Ctrl-C.

    MODULE:SERVICE names a TaskService, such as app.tasks:service. While tasks drain, new ones are refused with 503. A
    second signal stops at once.
    """
    start_logging(log_format)
    found = find_service(service)
    if workers is not None:
        found.workers = workers
    tokens = None if token_file is None else read_tokens(token_file)
    if tokens is None and uds is None and host not in LOCAL:
        click.echo(f"anybody who reaches {host} can submit tasks, and read them: see --token-file", err=True)
        if host in ANY and not host_names:
            click.echo("requests by another name than localhost are refused: see --host-name", err=True)
    serving = Serving(
        found,
        host,
        port,
        backend,
        uds=uds,
        root_path=root_path,
        max_connections=max_connections,
        tokens=tokens,
        hosts=hosts_of(host, host_names) if tokens is None or host_names else None,
        cors=cors,
        max_pending=max_pending,
        max_body=max_body,
        max_wait=max_wait,
        dead_letters=dead_letters,
    )
    run(found, drain, backend, serving)


def hosts_of(host: str, names: Iterable[str] = ()) -> list[str]:
    """Give the names for which to answer: a page could make up any other one for this machine, and read the tasks."""
    return [*LOCAL, *names, *([] if host in ANY else [host])]


def read_tokens(path: Path) -> list[Token]:
    """Read the tokens of a file."""
    try:
        return parse_tokens(path.read_bytes())
    except ValueError as error:
        msg = f"{path}: {error}"
        raise CommandError(msg) from None
    except OSError as error:
        msg = f"can't read {path}: {error.strerror}"
        raise CommandError(msg) from None


@click.command()
@host_option
@port_option
@backend_option
def demo_service(host: str, port: int, backend: str) -> None:
    """Serve a small report service with its dashboard, until Ctrl-C.

    Open the page that it names, submit a report, and watch it.
    """
    from chanflow.cli.demos.service import make_service  # noqa: PLC0415 -- only this command needs it

    start_logging("text")
    service = make_service()
    run(service, 0.0, backend, Serving(service, host, port, backend, hosts=hosts_of(host)))
