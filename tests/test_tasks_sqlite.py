"""The task service on an SQLite file: shared by processes, and killed at any moment."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from functools import partial
from pathlib import Path

import anyio
import pytest
from anyio import create_task_group, fail_after, sleep

from chanflow import Retry
from chanflow.tasks import TaskRecord, TaskService, TaskStatus
from chanflow.tasks.record import finish
from chanflow.tasks.stores.sqlite import SqliteStore
from tests.support.paths import another_way

pytestmark = [pytest.mark.anyio, pytest.mark.real_time]

KILLS = 50
# Submits and runs tasks until it is killed. It notes each id after `submit` returned it, and each run.
SERVICE = """
import os, sys
import anyio, chanflow
from chanflow.tasks import TaskService

directory, backend = sys.argv[1:]
url = f"sqlite:///{directory}/tasks.db"
service = TaskService(bus=url, store=url, workers=5, lease=1.0)

def note(name, line):
    with open(f"{directory}/{name}", "a") as file:
        file.write(line + "\\n")

@service.task(retry=chanflow.Retry(100))
async def work(number: int) -> int:
    note("runs", str(number))
    await anyio.sleep(0.005)
    return number + 1

async def submit(place):
    for number in range(1_000_000):
        unique = int(f"{os.getpid()}{place}{number:06}")
        note("accepted", f"{await service.submit(work, number=unique)} {unique}")
        await anyio.sleep(0.005)

async def main():
    async with service, anyio.create_task_group() as tasks:
        for place in range(3):
            tasks.start_soon(submit, place)
        print("ready", flush=True)

anyio.run(main, backend=backend)
"""


def service_at(path: Path, **options: float) -> TaskService:
    # A connection of its own, as another process has it.
    url = f"sqlite:///{another_way(path)}"
    return TaskService(bus=url, store=url, **options)  # type: ignore[arg-type]


def check(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_tasks_outlive_the_service(tmp_path: Path) -> None:
    """What one service was given and another runs has its result in the file."""
    path = tmp_path / "tasks.db"

    async def double(number: int) -> int:
        return number * 2

    front, back, later = (service_at(path, workers=workers) for workers in (0, 5, 0))
    for service in front, back, later:
        service.task(double)
    async with front:
        ids = [await front.submit("double", number=number) for number in range(20)]
        key = await front.submit("double", number=7, idempotency_key="key")
        waiting = await front.submit("double", number=8, delay=3600.0)
    async with back:
        with fail_after(30.0):
            assert [await back.result(task_id) for task_id in ids] == [number * 2 for number in range(20)]
            await back.wait(key)
    async with later:
        assert await later.result(ids[3]) == 6
        assert await later.submit("double", number=7, idempotency_key="key") == key
        assert (await later.get(waiting)).status is TaskStatus.PENDING
        counts = await later.count()
        assert (counts[TaskStatus.SUCCESS], counts[TaskStatus.PENDING]) == (21, 1)
    check(path)


async def test_two_services_share_a_file(tmp_path: Path) -> None:
    """Each task is run once, by one of them, and either tells its result; a cancellation reaches the other."""
    path = tmp_path / "tasks.db"
    runs: Counter[int] = Counter()
    ran_by: Counter[str] = Counter()
    services = {"first": service_at(path, workers=2), "second": service_at(path, workers=2)}

    def register(name: str, service: TaskService) -> None:
        @service.task
        async def work(number: int) -> str:
            runs[number] += 1
            ran_by[name] += 1
            await sleep(0.01)
            return name

        @service.task
        async def endless() -> None:
            await sleep(3600.0)

    for name, service in services.items():
        register(name, service)
    first, second = services.values()
    async with first, second:
        ids = [await first.submit("work", number=number) for number in range(60)]
        with fail_after(60.0):
            results = Counter([await second.result(task_id) for task_id in ids])
        assert results == ran_by
        assert set(runs.values()) == {1}
        endless = [await first.submit("endless") for _ in range(4)]
        async with create_task_group() as tasks:
            for task_id in endless:
                tasks.start_soon(wait_until_running, first, task_id)
        with fail_after(30.0):
            for task_id in endless:
                await second.cancel(task_id)
            assert {(await first.wait(task_id)).status for task_id in endless} == {TaskStatus.CANCELLED}
    check(path)


@pytest.mark.parametrize("number", [99, 100, 101, 250])
async def test_counts_are_right_however_many_changes_there_were(tmp_path: Path, number: int) -> None:
    """The changes are added to the counts now and then: none is forgotten, and none counts twice."""

    async def numbers(store: SqliteStore) -> list[int]:
        counts = await store.count(3000.0)
        rows = await store._reader.run(
            lambda connection: connection.execute("SELECT status, count(*) FROM tasks GROUP BY status").fetchall()
        )
        by_status = dict(rows)
        assert {status.value: count for status, count in counts.items() if count} == by_status
        return [counts[status] for status in TaskStatus]

    def record(task: int) -> TaskRecord:
        return TaskRecord(id=str(task), name="work", arguments=b"", created_at=1000.0, run_at=1000.0)

    store = SqliteStore(tmp_path / "tasks.db")
    await store.open()
    for task in range(number):
        await store.create(record(task))
        assert (await numbers(store))[0] == task + 1
    claimed = await store.claim({"work": number}, worker="w", now=2000.0, lease_until=2030.0, limit=number)
    assert len(claimed.records) == number
    await store.create(record(number))
    limited = await store.claim({"work": number}, worker="v", now=2000.0, lease_until=2030.0, limit=1)
    assert limited.records == []
    end = partial(finish, worker="w", status=TaskStatus.SUCCESS, now=2001.0, ttl=3600.0, result=b"")
    await store.change_many([(str(task), end) for task in range(number)])
    await store.aclose()
    await store.open()
    assert await numbers(store) == [1, 0, number, 0, 0]
    await store.forget(9000.0)
    assert await numbers(store) == [1, 0, 0, 0, 0]
    await store.aclose()


async def wait_until_running(service: TaskService, task_id: str) -> None:
    with fail_after(30.0):
        while (await service.get(task_id)).status is not TaskStatus.RUNNING:  # noqa: ASYNC110 -- of another process
            await sleep(0.01)


@pytest.mark.slow
def test_killed_at_any_moment_loses_no_accepted_task(tmp_path: Path) -> None:
    """After `kill -9`, 50 times under load, each accepted task is run, has its own result, and the file is whole."""
    dice = random.Random(50)
    for number in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-c", SERVICE, str(tmp_path), ("asyncio", "trio")[number % 2]], stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        with process.stdout:
            assert process.stdout.readline() == b"ready\n"
            # Anywhere from its first steps on.
            try:
                process.wait(dice.uniform(0.0, 0.3))
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
            assert process.wait(30) == -signal.SIGKILL
    accepted = dict(line.split() for line in (tmp_path / "accepted").read_text().splitlines() if line.count(" ") == 1)
    assert len(accepted) > KILLS
    service = service_at(tmp_path / "tasks.db", workers=20, lease=1.0)

    @service.task(retry=Retry(100))
    async def work(number: int) -> int:
        return number + 1

    async def finish() -> dict[str, int]:
        async with service:
            with fail_after(120.0):
                return {task_id: await service.result(task_id) for task_id in accepted}

    results = anyio.run(finish)
    assert results == {task_id: int(number) + 1 for task_id, number in accepted.items()}
    check(tmp_path / "tasks.db")
