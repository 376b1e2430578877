"""The commands for tasks: `chanflow tasks` looks into a store, and `chanflow worker` runs what is in it."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import anyio
import click
from anyio import CancelScope, create_task_group, open_signal_receiver

from chanflow.bus import StorageError
from chanflow.tasks import (
    JsonFormatter,
    TaskFilter,
    TaskService,
    TaskStateError,
    TaskStatus,
    UnknownTaskError,
)
from chanflow.tasks.wire import moment, to_json

if TYPE_CHECKING:
    from chanflow.serve import Serving

__all__ = [
    "CommandError",
    "Option",
    "backend_option",
    "drain_option",
    "find_service",
    "log_option",
    "run",
    "start_logging",
    "tasks",
    "worker",
]

T = TypeVar("T")
Option: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]

INTERRUPTED = 130
"""The exit status that shells give to a command that Ctrl-C ended."""


class CommandError(click.ClickException):
    """An error of one line."""


@click.group()
@click.option(
    "--store", required=True, envvar="CHANFLOW_STORE", metavar="URL", help="Where the tasks are; or $CHANFLOW_STORE."
)
@click.pass_context
def tasks(context: click.Context, store: str) -> None:
    """List, show, cancel and retry tasks.

    The store is `sqlite:///file.db` or `redis://host`.
    """
    if store == "memory://":
        msg = "memory:// is the memory of another process; --store must be sqlite:///PATH or redis://HOST"
        raise CommandError(msg)
    context.obj = store


def ask(context: click.Context, question: Callable[[TaskService], Awaitable[T]]) -> T:
    """Ask something of the store."""
    store: str = context.obj

    async def main() -> T:
        # Without handlers and workers, it runs nothing.
        async with TaskService(store=store, workers=0) as service:
            return await question(service)

    try:
        return anyio.run(main)
    except (StorageError, TaskStateError, UnknownTaskError, ValueError, ModuleNotFoundError) as error:
        raise CommandError(str(error)) from None


@tasks.command("list")
@click.option("--status", type=click.Choice([status.value for status in TaskStatus]), help="Only those.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="The most to list.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each line.")
@click.pass_context
def list_tasks(context: click.Context, status: str | None, limit: int, *, as_json: bool) -> None:
    """List tasks, the newest first."""
    chosen = None if status is None else TaskStatus(status)
    records = ask(context, lambda service: service.page(status=chosen, limit=limit))
    if as_json:
        for record in records:
            click.echo(json.dumps(to_json(record)))
        return
    width = max([len(record.name) for record in records], default=0)
    for record in records:
        what = record.error_message if record.status is TaskStatus.FAILED else ""
        line = f"{record.id}  {record.status.value:9}  {record.name:{width}}  {moment(record.created_at)}  {what or ''}"
        # A line each, whatever an error says.
        click.echo(" ".join(line.split("\n")).rstrip())


@tasks.command()
@click.argument("task_id")
@click.pass_context
def show(context: click.Context, task_id: str) -> None:
    """Show all that is known of a task, as JSON."""
    click.echo(json.dumps(to_json(ask(context, lambda service: service.get(task_id))), indent=2))


@tasks.command()
@click.argument("task_id")
@click.pass_context
def cancel(context: click.Context, task_id: str) -> None:
    """Cancel a task: at once if it waits, else where it runs."""
    record = ask(context, lambda service: service.cancel(task_id))
    click.echo("cancelling" if record.status is TaskStatus.RUNNING else record.status.value)


@tasks.command()
@click.argument("task_id")
@click.pass_context
def retry(context: click.Context, task_id: str) -> None:
    """Run a task again that failed or was cancelled."""
    click.echo(ask(context, lambda service: service.retry(task_id)).status.value)


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
@drain_option
@log_option
def worker(service: str, backend: str, drain: float, log_format: str) -> None:
    """Run the tasks of a service until SIGTERM or Ctrl-C.

    MODULE:SERVICE names a TaskService, such as app.tasks:service. A second signal stops at once.
    """
    start_logging(log_format)
    run(find_service(service), drain, backend)


def start_logging(log_format: str) -> None:
    """Write the log to stderr."""
    handler = logging.StreamHandler()
    handler.addFilter(TaskFilter())
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if log_format == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler])


def run(service: TaskService, drain: float, backend: str, serving: Serving | None = None) -> None:
    """Run a service until a signal comes, and exit as a shell expects."""
    try:
        ended_by = anyio.run(work, service, drain, serving, backend=backend)
    except StorageError as error:
        raise CommandError(str(error)) from None
    except KeyboardInterrupt:
        ended_by = signal.SIGINT
    if ended_by == signal.SIGINT:
        sys.exit(INTERRUPTED)


def find_service(name: str) -> TaskService:
    """Import a service."""
    module_name, separator, attribute = name.partition(":")
    if not (module_name and separator and attribute):
        msg = f"MODULE:SERVICE must be like app.tasks:service, got {name!r}"
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
        msg = f"{attribute!r} of module {module_name!r} must be a TaskService, got {found!r}"
        raise CommandError(msg)
    return found


async def work(service: TaskService, drain: float, serving: Serving | None) -> int | None:
    """Run a service until a signal comes, and give that."""
    ended_by: int | None = None

    async def watch(scope: CancelScope) -> None:
        nonlocal ended_by
        with open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            click.echo("ready" if serving is None else f"serving on {serving.url}", err=True)
            async for number in signals:
                if ended_by is not None:
                    click.echo("stopping at once", err=True)
                    scope.cancel()
                    return
                ended_by = number
                click.echo(f"draining, for up to {drain:g} s", err=True)
                stopping.set()

    stopping = anyio.Event()
    async with service:
        async with create_task_group() as watching:
            async with nullcontext() if serving is None else serving:
                watching.start_soon(watch, watching.cancel_scope)
                await stopping.wait()
                await service.shutdown(drain)
            watching.cancel_scope.cancel()
        # There is something left to stop only after a second signal.
        await service.shutdown(0)
    return ended_by
