"""Workloads of task services: submit, run, and ask for each result."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from anyio import create_task_group, to_thread

from benchmarks.plan import ASYNCIO, BOTH, LOOPLESS, Entry, UnsupportedError, Workload
from benchmarks.redis_server import MISSING, running_redis

__all__ = ["workloads"]

WORKERS = 10
POLL = 0.001
"""Seconds after which a peer that has to ask for results asks again."""


def do_nothing(number: int) -> int:
    return number


async def do_nothing_async(number: int) -> int:
    return number


class Place:
    """Where the tasks are, made before anything is timed."""

    path: Path
    redis: str


place = Place()


@contextmanager
def sqlite_file() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as directory:
        place.path = Path(directory) / "tasks.db"
        yield


@contextmanager
def redis_server() -> Iterator[None]:
    try:
        with running_redis() as place.redis:
            yield
    except FileNotFoundError:
        raise UnsupportedError(MISSING) from None


async def chanflow_tasks(bus: str, store: str, count: int, *, workers: int = WORKERS, submitters: int = 1) -> None:
    from chanflow.tasks import TaskService

    service = TaskService(bus=bus, store=store, workers=workers)
    work = service.task(do_nothing_async)

    async def submit(numbers: range) -> None:
        for number in numbers:
            await service.submit(work, number=number)

    async with service:
        if submitters > 1:
            async with create_task_group() as tasks:
                for first in range(submitters):
                    tasks.start_soon(submit, range(first, count, submitters))
            return
        ids = [await service.submit(work, number=number) for number in range(count)]
        if workers:
            assert [await service.result(task_id) for task_id in ids] == list(range(count))


async def chanflow_sqlite(count: int, **options: int) -> None:
    await chanflow_tasks("memory://", f"sqlite:///{place.path}", count, **options)


async def chanflow_all_sqlite(count: int, **options: int) -> None:
    url = f"sqlite:///{place.path}"
    await chanflow_tasks(url, url, count, **options)


async def chanflow_redis(count: int) -> None:
    await chanflow_tasks("memory://", place.redis, count)


async def taskiq_memory(count: int, *, workers: bool = True) -> None:
    from taskiq import InMemoryBroker

    broker: Any = InMemoryBroker(max_stored_results=count + 1)
    registered = broker.task(do_nothing_async)
    await broker.startup()
    tasks = [await registered.kiq(number) for number in range(count)]
    if workers:
        results = [await task.wait_result(check_interval=POLL) for task in tasks]
        assert [result.return_value for result in results] == list(range(count))
        await broker.shutdown()


def huey_tasks(huey: Any, count: int, *, workers: int = WORKERS) -> None:
    work = huey.task()(do_nothing)
    results = [work(number) for number in range(count)]
    if workers:
        consumer = huey.create_consumer(workers=workers, initial_delay=POLL, max_delay=POLL, periodic=False)
        consumer.start()
        values = [result.get(blocking=True, backoff=1.0, max_delay=POLL) for result in results]
        assert values == list(range(count))
        consumer.stop(graceful=True)


def huey_memory(count: int, *, workers: int = WORKERS) -> None:
    from huey import MemoryHuey

    huey_tasks(MemoryHuey(immediate=False), count, workers=workers)


def huey_sqlite(count: int, *, workers: int = WORKERS) -> None:
    huey_tasks(make_sqlite_huey(), count, workers=workers)


async def huey_sqlite_in_thread(count: int) -> None:
    work = make_sqlite_huey().task()(do_nothing)
    for number in range(count):
        await to_thread.run_sync(work, number)


def huey_sqlite_submitters(count: int, *, submitters: int) -> None:
    work = make_sqlite_huey().task()(do_nothing)
    with ThreadPoolExecutor(submitters) as threads:
        list(threads.map(work, range(count)))


def make_sqlite_huey() -> Any:
    from huey import SqliteHuey

    return SqliteHuey(filename=str(place.path), fsync=True)


async def streaq_redis(count: int) -> None:
    from streaq import Worker

    worker: Any = Worker(redis_url=place.redis, concurrency=WORKERS, handle_signals=False)
    work = worker.task(do_nothing_async)
    results: list[int] = []

    async def ask(submitted: list[Any]) -> None:
        results.extend([(await task.result()).result for task in submitted])

    async with create_task_group() as tasks:
        await tasks.start(worker.run_async)
        submitted = [await work.enqueue(number) for number in range(count)]
        async with create_task_group() as asking:
            for first in range(WORKERS):
                asking.start_soon(ask, submitted[first::WORKERS])
        assert sorted(results) == list(range(count))
        tasks.cancel_scope.cancel()


async def arq_redis(count: int) -> None:
    from arq import create_pool, func
    from arq.connections import RedisSettings
    from arq.worker import Worker

    async def run(_context: dict[Any, Any], number: int) -> int:
        return number

    work: Any = run
    pool = await create_pool(RedisSettings.from_dsn(place.redis))
    worker = Worker([func(work, name="work")], redis_pool=pool, max_jobs=WORKERS, poll_delay=POLL, handle_signals=False)
    async with create_task_group() as tasks:
        tasks.start_soon(worker.main)
        jobs = [await pool.enqueue_job("work", number) for number in range(count)]
        assert [await job.result(poll_delay=POLL) for job in jobs if job is not None] == list(range(count))
        tasks.cancel_scope.cancel()
    await pool.aclose()


def workloads() -> Iterator[Workload]:
    workload = partial(Workload, unit="task", group="task")
    huey_threads = "a consumer in threads"
    for count in (1000, 10_000):
        yield workload(
            f"tasks-memory-{count}",
            f"{count:,} tasks submitted, run and asked for, in memory",
            count=count,
            entries={
                "chanflow": Entry(partial(chanflow_tasks, "memory://", "memory://"), BOTH),
                "taskiq": Entry(taskiq_memory, ASYNCIO, note="InMemoryBroker"),
                "huey": Entry(huey_memory, LOOPLESS, note=f"MemoryHuey, {huey_threads}"),
            },
        )
    yield workload(
        "tasks-sqlite",
        "Tasks submitted, run and asked for, in an SQLite file",
        count=500,
        around=sqlite_file,
        entries={
            "chanflow": Entry(chanflow_sqlite, BOTH),
            "chanflow, bus in the file, too": Entry(chanflow_all_sqlite, BOTH),
            "huey": Entry(huey_sqlite, LOOPLESS, note=f"SqliteHuey with fsync, {huey_threads}"),
        },
    )
    yield workload(
        "tasks-redis",
        "Tasks submitted, run and asked for, in one Redis",
        count=1000,
        around=redis_server,
        entries={
            "chanflow": Entry(chanflow_redis, BOTH),
            "streaq": Entry(streaq_redis, BOTH, scale=0.2, note="asked for 10 results at the same time"),
            "arq": Entry(arq_redis, ASYNCIO, note="asked for every millisecond"),
        },
    )
    yield workload(
        "submit-memory",
        "Submitting alone, in memory",
        unit="submission",
        count=5000,
        entries={
            "chanflow": Entry(partial(chanflow_tasks, "memory://", "memory://", workers=0), BOTH),
            "taskiq": Entry(partial(taskiq_memory, workers=False), ASYNCIO, note="InMemoryBroker"),
            "huey": Entry(partial(huey_memory, workers=0), LOOPLESS, note="MemoryHuey"),
        },
    )
    yield workload(
        "submit-sqlite",
        "Submitting alone, one after the other, in an SQLite file",
        unit="submission",
        count=500,
        around=sqlite_file,
        entries={
            "chanflow": Entry(partial(chanflow_sqlite, workers=0), BOTH),
            "chanflow, bus in the file, too": Entry(partial(chanflow_all_sqlite, workers=0), BOTH),
            "huey": Entry(
                partial(huey_sqlite, workers=0), LOOPLESS, note="SqliteHuey with fsync: its caller's thread is blocked"
            ),
            "huey, in a thread": Entry(
                huey_sqlite_in_thread, BOTH, note="so that the event loop goes on, as chanflow's"
            ),
        },
    )
    together = partial(partial, workers=0, submitters=10)
    yield workload(
        "submit-sqlite-10",
        "Submitting alone, 10 at the same time, in an SQLite file",
        unit="submission",
        count=1000,
        around=sqlite_file,
        entries={
            "chanflow": Entry(together(chanflow_sqlite), BOTH),
            "chanflow, bus in the file, too": Entry(together(chanflow_all_sqlite), BOTH),
            "huey": Entry(
                partial(huey_sqlite_submitters, submitters=10), LOOPLESS, note="SqliteHuey with fsync, 10 threads"
            ),
        },
    )
