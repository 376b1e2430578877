"""One SQLite file in a thread: what is requested together is done together, and each for itself."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, create_task_group, wait_all_tasks_blocked

from chanflow import _sqlite
from chanflow._errors import StorageError
from chanflow._sqlite import Connection, Database
from tests.support.messages import whole

pytestmark = [pytest.mark.anyio, pytest.mark.real_time]

SCHEMA = "CREATE TABLE IF NOT EXISTS items (number INTEGER UNIQUE)"


def insert(number: int, connection: Connection) -> int:
    connection.execute("INSERT INTO items VALUES (?)", [number])
    return number


def delete(number: int, connection: Connection) -> None:
    connection.execute("DELETE FROM items WHERE number = ?", [number])


def read(connection: Connection) -> list[int]:
    return [number for (number,) in connection.execute("SELECT number FROM items ORDER BY number")]


async def give_up_inserting(database: Database, undo: Any) -> threading.Event:
    """Cancel the caller of a request that is being carried out, and goes on when the event is set."""
    started, go_on = threading.Event(), threading.Event()

    def slow(connection: Connection) -> int:
        started.set()
        go_on.wait(10)
        return insert(1, connection)

    async with create_task_group() as tasks:
        tasks.start_soon(database.run, slow, undo)
        await anyio.to_thread.run_sync(started.wait)
        tasks.cancel_scope.cancel()
    return go_on


def held_by_another(path: Path) -> Connection:
    """Keep the file to ourselves, so that requests pile up."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    return other


async def test_requests_that_wait_together_share_a_transaction(tmp_path: Path) -> None:
    """They are carried out in their order, and one that fails takes none of the others back."""
    database = await Database.open(tmp_path / "file.db", SCHEMA)
    begun: list[str] = []
    await database.run(lambda connection: connection.set_trace_callback(begun.append))
    outcomes: dict[int, Any] = {}

    async def request(place: int, number: int) -> None:
        try:
            outcomes[place] = await database.run(partial(insert, number))
        except StorageError as error:
            outcomes[place] = str(error)

    other = held_by_another(tmp_path / "file.db")
    async with create_task_group() as tasks:
        for place, number in enumerate([1, 2, 2, 3]):
            tasks.start_soon(request, place, number)
            await wait_all_tasks_blocked()
        other.execute("COMMIT")
    other.close()
    refused = f"{tmp_path / 'file.db'}: UNIQUE constraint failed: items.number"
    assert outcomes == {0: 1, 1: 2, 2: refused, 3: 3}
    # The first may have begun alone.
    assert begun.count("BEGIN IMMEDIATE") <= 2
    assert await database.run(read) == [1, 2, 3]
    await database.aclose()


async def test_a_transaction_that_ends_in_the_middle(tmp_path: Path) -> None:
    """SQLite may give up the whole of it, as on a full disk: then all who share it are told, and nothing was done."""
    database = await Database.open(tmp_path / "file.db", SCHEMA)
    told: list[str] = []

    def give_up(connection: Connection) -> None:
        connection.execute("ROLLBACK")
        msg = "database or disk is full"
        raise sqlite3.OperationalError(msg)

    async def request(operation: Any) -> None:
        with pytest.raises(StorageError) as caught:
            await database.run(operation)
        told.append(str(caught.value))

    gate, go_on = threading.Event(), threading.Event()

    def block(_connection: Connection) -> None:
        gate.set()
        go_on.wait(10)

    async with create_task_group() as tasks:
        tasks.start_soon(database.run, block)
        await anyio.to_thread.run_sync(gate.wait)
        for operation in partial(insert, 1), give_up, partial(insert, 2):
            tasks.start_soon(request, operation)
        await wait_all_tasks_blocked()
        go_on.set()
    assert told == [f"{tmp_path / 'file.db'}: database or disk is full"] * 3
    assert await database.run(read) == []
    await database.aclose()


@pytest.mark.parametrize("how", ["deleted", "replaced"])
@pytest.mark.parametrize("reads", [False, True])
async def test_regression_a_file_that_is_gone(*, how: str, reads: bool, tmp_path: Path) -> None:
    """What is written there would be lost, and what is read is not what others see: each request says so."""
    path = tmp_path / "items.db"
    writer = await Database.open(path, SCHEMA)
    reader = await Database.open(path, "", reads=True)
    await writer.run(partial(insert, 1))
    assert await reader.run(read) == [1]
    path.unlink()
    if how == "replaced":
        path.touch()
    with pytest.raises(
        StorageError,
        match=whole(f"{path}: the file was moved or deleted while it was open: restart whoever has it open"),
    ):
        await (reader.run(read) if reads else writer.run(partial(insert, 2)))
    await writer.aclose()
    await reader.aclose()


@pytest.mark.parametrize("ends", [True, False])
async def test_another_process_begins_with_the_same_file(
    *, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite refuses at once to change the mode of a file that another one writes into: that one is waited for."""
    path = tmp_path / "file.db"
    other = held_by_another(path)
    looks = 0

    def wait(seconds: float) -> None:
        nonlocal looks
        looks += 1
        if ends and looks == 3:
            other.execute("ROLLBACK")

    # Each look is 7 seconds after the one before.
    monkeypatch.setattr(_sqlite, "time", SimpleNamespace(sleep=wait, monotonic=lambda: looks * 7.0))
    if ends:
        database = await Database.open(path, SCHEMA)
        assert looks == 3
        assert await database.run(partial(insert, 1)) == 1
        await database.aclose()
    else:
        with pytest.raises(StorageError, match=whole(f"{path}: database is locked")):
            await Database.open(path, SCHEMA)
        assert looks == 5
    other.close()


async def test_errors_of_the_operation_itself_go_through(tmp_path: Path) -> None:
    """An error that is not SQLite's is raised as it is, and nothing was done."""

    def broken(connection: Connection) -> None:
        insert(1, connection)
        raise KeyError(1)

    database = await Database.open(tmp_path / "file.db", SCHEMA)
    with pytest.raises(KeyError):
        await database.run(broken)
    assert await database.run(read) == []
    await database.aclose()


async def test_a_commit_that_fails_fails_all(tmp_path: Path) -> None:
    """When the transaction can't be committed, nothing was done, everybody is told, and it goes on after that."""
    denials = iter([sqlite3.SQLITE_DENY])

    def authorize(action: int, statement: str | None, *_: object) -> int:
        commits = action == sqlite3.SQLITE_TRANSACTION and statement == "COMMIT"
        return next(denials, sqlite3.SQLITE_OK) if commits else sqlite3.SQLITE_OK

    def refuse_commit(connection: Connection) -> None:
        connection.set_authorizer(authorize)
        insert(1, connection)

    path = tmp_path / "file.db"
    database = await Database.open(path, SCHEMA)
    with pytest.raises(StorageError, match=whole(f"{path}: not authorized")):
        await database.run(refuse_commit)
    assert await database.run(read) == []
    await database.aclose()


@pytest.mark.parametrize("undo", [True, False])
async def test_a_cancelled_request_is_undone(*, undo: bool, tmp_path: Path) -> None:
    """A caller that is cancelled while its request is carried out has it undone, where it can be."""
    database = await Database.open(tmp_path / "file.db", SCHEMA)
    go_on = await give_up_inserting(database, (lambda number: partial(delete, number)) if undo else None)
    go_on.set()
    # This one is carried out after the first, and the undoing after this one was asked for.
    await database.run(read)
    assert await database.run(read) == ([] if undo else [1])
    await database.aclose()


async def test_what_was_cancelled_is_undone_before_the_end(tmp_path: Path) -> None:
    """Closing waits for a request that its caller gave up, to undo it: else nobody would."""
    path = tmp_path / "file.db"
    database = await Database.open(path, SCHEMA)
    go_on = await give_up_inserting(database, lambda number: partial(delete, number))
    async with create_task_group() as tasks:
        tasks.start_soon(database.aclose)
        await wait_all_tasks_blocked()
        go_on.set()
    with sqlite3.connect(path) as connection:
        assert read(connection) == []
    connection.close()


async def test_a_request_given_up_in_the_tick_of_its_end_is_undone_before_the_end(backend: str, tmp_path: Path) -> None:
    """On asyncio, a task may be cancelled after its request was done and before its turn."""
    if backend != "asyncio":
        pytest.skip("trio cancels no task that was woken")
    path = tmp_path / "file.db"
    database = await Database.open(path, SCHEMA)
    held = held_by_another(path)

    async def cancel_and_close() -> None:
        # In one transaction with the other, whose task comes after this one.
        await database.run(read)
        inserting.cancel()
        await database.aclose()

    closing = asyncio.create_task(cancel_and_close())
    inserting = asyncio.create_task(database.run(partial(insert, 1), lambda number: partial(delete, number)))
    await wait_all_tasks_blocked()
    held.execute("ROLLBACK")
    held.close()
    await closing
    assert inserting.cancelled()
    with sqlite3.connect(path) as connection:
        assert read(connection) == []
    connection.close()


async def test_closing_refuses_whoever_goes_on_asking(tmp_path: Path) -> None:
    """From the beginning of the end on nothing is taken in, or there would be no end and the time would run out."""
    database = await Database.open(tmp_path / "file.db", SCHEMA)
    begun, refused = anyio.Event(), anyio.Event()

    async def ask() -> None:
        with suppress(ClosedResourceError):
            while True:
                await database.run(read)
                begun.set()
        refused.set()

    with anyio.fail_after(10):
        async with create_task_group() as tasks:
            tasks.start_soon(ask)
            await begun.wait()
            await database.aclose()
            await refused.wait()
    with pytest.raises(ClosedResourceError):
        await database.run(read)


async def test_closing_carries_out_what_was_requested(tmp_path: Path) -> None:
    """What waits when the database is closed is still done; what comes later is refused."""
    database = await Database.open(tmp_path / "file.db", SCHEMA)
    async with create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(database.run, partial(insert, number))
        await wait_all_tasks_blocked()
        await database.aclose()
    with pytest.raises(ClosedResourceError):
        await database.run(read)
    with sqlite3.connect(tmp_path / "file.db") as connection:
        assert read(connection) == [0, 1, 2]
    connection.close()


async def test_one_connection_for_all_in_an_event_loop(tmp_path: Path) -> None:
    """Whoever opens the same file shares the thread, and the last one closes it."""
    path = tmp_path / "file.db"
    first = await Database.open(path, SCHEMA)
    second = await Database.open(path, SCHEMA)
    assert first is second
    await first.aclose()
    assert await second.run(partial(insert, 1)) == 1
    await second.aclose()
    with pytest.raises(ClosedResourceError, match=whole(f"{path} is closed")):
        await second.run(read)
    third = await Database.open(path, SCHEMA)
    assert third is not second
    assert await third.run(read) == [1]
    await third.aclose()


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_the_thread_ends_with_its_event_loop(backend: str, tmp_path: Path) -> None:
    """A database that nobody closed keeps no program from ending."""

    async def main() -> None:
        database = await Database.open(tmp_path / "file.db", SCHEMA)
        await database.run(partial(insert, 1))

    before = set(threading.enumerate())
    anyio.run(main, backend=backend)
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("chanflow"):
            thread.join(10)
            assert not thread.is_alive()
