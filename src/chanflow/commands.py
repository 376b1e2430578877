"""The commands for tasks: `chanflow tasks` looks into a store, and `chanflow worker` runs what is in it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing, nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import anyio
import click
from anyio import CancelScope
from rich.cells import set_cell_size

from chanflow._visible import visible
from chanflow.bus import StorageError
from chanflow.ending import Ending
from chanflow.tasks import (
    JsonFormatter,
    TaskFilter,
    TaskRecord,
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


PART = 1000
"""Tasks to look at in one step for one whose id is given in part."""


class CommandError(click.ClickException):
    """An error of one line."""


@click.group()
@click.option(
    "--store", required=True, envvar="CHANFLOW_STORE", metavar="URL", help="Where the tasks are; or $CHANFLOW_STORE."
)
@click.pass_context
def tasks(context: click.Context, store: str) -> None:
    """List, show, cancel and retry tasks.

    The store is `sqlite:///file.db` or `redis://host`. A task is named by its id, or by so much of its beginning as
    no other task has.
    """
    if store == "memory://":
        msg = "memory:// is the memory of another process; --store must be sqlite:///PATH or redis://HOST"
        raise CommandError(msg)
    if store.startswith("sqlite:///"):
        check_file(Path(store.removeprefix("sqlite:///")))
    context.obj = store


def check_file(path: Path) -> None:
    """Refuse a file that is no store of tasks: whoever looks into one doesn't want it to be made."""
    if not path.is_file():
        msg = f"{path}: no such file"
        raise CommandError(msg)
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'tasks'").fetchone()
    except sqlite3.Error as error:
        msg = f"{path}: {error}"
        raise CommandError(msg) from None
    if found is None:
        msg = f"{path}: there are no tasks in this file"
        raise CommandError(msg)


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
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)


async def find(service: TaskService, task_id: str) -> TaskRecord:
    """Find a task by its id, or by the beginning of it."""
    try:
        return await service.get(task_id)
    except UnknownTaskError:
        found: list[TaskRecord] = []
        after = None
        while page := await service.page(after=after, limit=PART):
            found += [record for record in page if task_id and record.id.startswith(task_id)]
            after = page[-1].id
        if not found:
            raise
    if len(found) > 1:
        msg = f"{len(found)} tasks have an id that begins with {task_id!r}: give more of it"
        raise UnknownTaskError(msg)
    return found[0]


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
    width = max([len(visible(record.name)) for record in records], default=0)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for record in records:
        what = record.error_message if record.status is TaskStatus.FAILED else None
        name = visible(record.name)
        line = f"{record.id}  {record.status.value:9}  {name:{width}}  {moment(record.created_at)}  {what or ''}"
        # A line each, whatever an error says.
        line = visible(" ".join(line.split("\n")))
        click.echo((line if columns is None else set_cell_size(line, columns)).rstrip())


@tasks.command()
@click.argument("task_id")
@click.pass_context
def show(context: click.Context, task_id: str) -> None:
    """Show all that is known of a task, as JSON."""
    click.echo(json.dumps(to_json(ask(context, lambda service: find(service, task_id))), indent=2))


@tasks.command()
@click.argument("task_id")
@click.pass_context
def cancel(context: click.Context, task_id: str) -> None:
    """Cancel a task: at once if it waits, else where it runs."""

    async def cancel(service: TaskService) -> TaskRecord:
        return await service.cancel((await find(service, task_id)).id)

    record = ask(context, cancel)
    if record.status in {TaskStatus.SUCCESS, TaskStatus.FAILED}:
        msg = f"only a task that has not ended can be cancelled; the status of this one is {record.status.value}"
        raise CommandError(msg)
    click.echo("cancelling" if record.status is TaskStatus.RUNNING else record.status.value)


@tasks.command()
@click.argument("task_id")
@click.pass_context
def retry(context: click.Context, task_id: str) -> None:
    """Run a task again that failed or was cancelled."""

    async def retry(service: TaskService) -> TaskRecord:
        return await service.retry((await find(service, task_id)).id)

    click.echo(ask(context, retry).status.value)


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


async def work(service: TaskService, drain: float, serving: Serving | None) -> int | None:
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
        async with service, nullcontext() if serving is None else serving:
            ready = True
            click.echo("ready" if serving is None else f"serving on {serving.url}", err=True)
            await stopping.wait()
            await service.shutdown(drain)
    return ending.number
