"""The commands that look into a store: `chanflow tasks`."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import anyio
import click
from rich.cells import set_cell_size

from chanflow.bus import StorageError
from chanflow.cli.errors import INTERRUPTED, CommandError
from chanflow.cli.visible import visible
from chanflow.tasks import TaskRecord, TaskService, TaskStateError, TaskStatus, UnknownTaskError
from chanflow.tasks.wire import moment, to_json

__all__ = ["tasks"]

T = TypeVar("T")

PART = 1000
"""Tasks to look at in one step for one whose id is given in part."""


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
