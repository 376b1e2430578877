"""Workloads of task services: submit, run, and ask for each result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.plan import ASYNCIO, BOTH, LOOPLESS, Entry, Workload

__all__ = ["workloads"]

WORKERS = 10
POLL = 0.001
"""Seconds after which a peer that has to ask for results asks again."""


def do_nothing(number: int) -> int:
    return number


@contextmanager
def sqlite_file() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory) / "tasks.db"


async def chanflow_tasks(url: str, count: int) -> None:
    from chanflow.tasks import TaskService

    service = TaskService(bus=url, store=url, workers=WORKERS)

    @service.task
    async def work(number: int) -> int:
        return number

    async with service:
        ids = [await service.submit(work, number=number) for number in range(count)]
        assert [await service.result(task_id) for task_id in ids] == list(range(count))


async def chanflow_sqlite(count: int) -> None:
    with sqlite_file() as path:
        await chanflow_tasks(f"sqlite:///{path}", count)


async def taskiq_memory(count: int) -> None:
    from taskiq import InMemoryBroker

    async def work(number: int) -> int:
        return number

    broker: Any = InMemoryBroker(max_stored_results=count + 1)
    registered = broker.task(work)
    await broker.startup()
    tasks = [await registered.kiq(number) for number in range(count)]
    results = [await task.wait_result(check_interval=POLL) for task in tasks]
    assert [result.return_value for result in results] == list(range(count))
    await broker.shutdown()


def huey_tasks(path: str | None, count: int) -> None:
    from huey import MemoryHuey, SqliteHuey

    huey = MemoryHuey(immediate=False) if path is None else SqliteHuey(filename=path, fsync=True)
    work = huey.task()(do_nothing)
    consumer = huey.create_consumer(workers=WORKERS, initial_delay=POLL, max_delay=POLL, periodic=False)
    consumer.start()
    results = [work(number) for number in range(count)]
    values = [result.get(blocking=True, backoff=1.0, max_delay=POLL) for result in results]
    assert values == list(range(count))
    consumer.stop(graceful=True)


def huey_sqlite(count: int) -> None:
    with sqlite_file() as path:
        huey_tasks(str(path), count)


def workloads() -> Iterator[Workload]:
    workload = partial(Workload, unit="task", group="task")
    yield workload(
        "tasks-memory",
        "Tasks submitted, run and asked for, in memory",
        count=5000,
        entries={
            "chanflow": Entry(partial(chanflow_tasks, "memory://"), BOTH),
            "taskiq": Entry(taskiq_memory, ASYNCIO, note="InMemoryBroker"),
            "huey": Entry(partial(huey_tasks, None), LOOPLESS, note="MemoryHuey, a consumer in threads"),
        },
    )
    yield workload(
        "tasks-sqlite",
        "Tasks submitted, run and asked for, in an SQLite file",
        count=500,
        entries={
            "chanflow": Entry(chanflow_sqlite, BOTH),
            "huey": Entry(huey_sqlite, LOOPLESS, note="SqliteHuey with fsync, a consumer in threads"),
        },
    )
