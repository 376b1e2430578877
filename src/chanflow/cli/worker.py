"""The command that runs tasks, `chanflow worker`, and what others that run a service have in common with it."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from types import TracebackType
from typing import Any, Protocol, TypeAlias

import anyio
import click
from anyio import CancelScope

from chanflow.bus import StorageError
from chanflow.cli.ending import Ending
from chanflow.cli.errors import INTERRUPTED, CommandError
from chanflow.cli.visible import visible
from chanflow.tasks import JsonFormatter, TaskFilter, TaskService

__all__ = [
    "Front",
    "Option",
    "backend_option",
    "drain_option",
    "find_service",
    "log_option",
    "run",
    "start_logging",
    "worker",
]

Option: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]

backend_option: Option = click.option(
    "--backend", type=click.Choice(["asyncio", "trio"]), default="asyncio", show_default=True
)
drain_option: Option = click.option(
    "--drain",
    type=click.FloatRange(0),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="How long tasks may still run after SIGTERM or Ctrl-C; then they are put back.",
)
log_option: Option = click.option(
    "--log-format",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="Lines of text, or a JSON object a line, with the task that it is about.",
)


@click.command()
@click.argument("service", metavar="MODULE:SERVICE")
@backend_option
@click.option(
    "--workers", type=click.IntRange(1), help="How many tasks may run here, instead of what the service says."
)
@drain_option
@log_option
def worker(service: str, backend: str, workers: int | None, drain: float, log_format: str) -> None:
    """Run the tasks of a service until SIGTERM or Ctrl-C.

    MODULE:SERVICE names a TaskService, such as app.tasks:service. A second signal stops at once.
    """
    start_logging(log_format)
    found = find_service(service)
    if workers is not None:
        found.workers = workers
    if not found.store.shared:
        msg = f"{service} keeps its tasks in its own memory, where no other process can put any: use `chanflow serve`"
        raise CommandError(msg)
    if not found.workers:
        msg = f"{service} has no workers: see --workers"
        raise CommandError(msg)
    if not found.handlers:
        msg = f"{service} has no tasks: the module that registers them must be imported with it"
        raise CommandError(msg)
    run(found, drain, backend)


def start_logging(log_format: str) -> None:
    """Write the log to stderr."""
    handler = logging.StreamHandler()
    handler.addFilter(TaskFilter())
    text = VisibleFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # That a connection failed is said by the store.
    logging.getLogger("coredis").setLevel(logging.CRITICAL)


class VisibleFormatter(logging.Formatter):
    """Lines that may be shown on a terminal, whatever a handler's error says."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line, and those of its traceback."""
        return visible(super().format(record))


class Front(Protocol):
    """What serves a service while that runs, as `chanflow serve` does."""

    url: str

    async def __aenter__(self) -> object: ...
    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None, /
    ) -> object: ...


def run(service: TaskService, drain: float, backend: str, front: Front | None = None) -> None:
    """Run a service until a signal comes, and exit as a shell expects."""
    try:
        ended_by = anyio.run(work, service, drain, front, backend=backend)
    except StorageError as error:
        raise CommandError(str(error)) from None
    except KeyboardInterrupt:
        ended_by = signal.SIGINT
    if ended_by == signal.SIGINT:
        sys.exit(INTERRUPTED)


def find_service(name: str) -> TaskService:
    """Import a service."""
    module_name, _, attribute = name.partition(":")
    if not (attribute and all(part.isidentifier() for part in module_name.split("."))) or module_name.endswith(".py"):
        msg = f"MODULE:SERVICE must be like app.tasks:service, which is in app/tasks.py or installed, got {name!r}"
        raise CommandError(msg)
    # As `python -m` does.
    sys.path.insert(0, os.getcwd())
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        msg = f"there is no module {module_name!r} here or on the path"
        raise CommandError(msg) from None
    found = getattr(module, attribute, None)
    if not isinstance(found, TaskService):
        # Not the value, which may be a secret.
        kind = "nothing" if not hasattr(module, attribute) else f"{type(found).__name__}"
        msg = f"{attribute!r} of module {module_name!r} must be a TaskService, got {kind}"
        raise CommandError(msg)
    return found


async def work(service: TaskService, drain: float, front: Front | None) -> int | None:
    """Run a service until a signal comes, and give that."""
    stopping = anyio.Event()
    ready = False

    def stop() -> None:
        stopping.set()
        if not ready:
            # Nothing runs yet, and the store may take its time.
            at_once.cancel()

    at_once = CancelScope()
    ending = Ending(stop, at_once.cancel, f"draining, for up to {drain:g} s")
    ending.listen()
    with at_once:
        async with service, nullcontext() if front is None else front:
            ready = True
            click.echo("ready" if front is None else f"serving on {front.url}", err=True)
            await stopping.wait()
            await service.shutdown(drain)
    return ending.number
