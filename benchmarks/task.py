"""Workloads of task services: submit, run, and ask for each result."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from anyio import create_task_group, sleep, to_thread
from sniffio import current_async_library

from benchmarks import task_worker
from benchmarks.plan import ASYNCIO, BOTH, LOOPLESS, Entry, UnsupportedError, Workload
from benchmarks.redis_server import MISSING, running_redis
from benchmarks.task_worker import POLL, WORKERS, do_nothing, do_nothing_async

__all__ = ["workloads"]

BULK = 1000
"""How many tasks to submit together."""
LOOK = 0.02
"""Seconds from one look whether anything is left to the next."""


class Place:
    """Where the tasks are, made before anything is timed."""

    path: Path
    redis: str
    worker: subprocess.Popen[str] | None = None
    """The other process of a round trip."""

    @property
    def sqlite(self) -> str:
        return f"sqlite:///{self.path}"

    def start_worker(self, peer: str, url: str, backend: str = "asyncio") -> None:
        """Start the other process, unless it is there: the operations that warm up have done so."""
        if self.worker is None:
            command = [sys.executable, "-m", "benchmarks.task_worker", peer, url, backend]
            self.worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            assert self.worker.stdout is not None
            if self.worker.stdout.readline() != "ready\n":
                message = "its worker did not start"
                raise UnsupportedError(message)

    def stop_worker(self) -> None:
        if self.worker is not None:
            self.worker.kill()
            self.worker.wait()


place = Place()


@contextmanager
def sqlite_file() -> Iterator[None]:
    with tempfile.TemporaryDirectory() as directory:
        place.path = Path(directory) / "tasks.db"
        try:
            yield
        finally:
            place.stop_worker()


@contextmanager
def redis_server() -> Iterator[None]:
    try:
        with running_redis() as place.redis:
            try:
                yield
            finally:
                place.stop_worker()
    except FileNotFoundError:
        raise UnsupportedError(MISSING) from None


async def chanflow_tasks(store: str, count: int, *, workers: int = WORKERS, submitters: int = 1) -> None:
    from chanflow.tasks import TaskService

    service = TaskService(store=store, workers=workers)
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
    await chanflow_tasks(place.sqlite, count, **options)


async def chanflow_redis(count: int) -> None:
    await chanflow_tasks(place.redis, count)


async def chanflow_bulk(store: str, count: int, *, workers: int = 0) -> None:
    """Submit tasks a thousand at a time; with workers, wait until none is left, and ask for none of them."""
    from chanflow.tasks import TaskService, TaskStatus

    service = TaskService(store=url_of(store), workers=workers)
    work = service.task(do_nothing_async)
    async with service:
        for first in range(0, count, BULK):
            await service.submit_many(work, [{"number": number} for number in range(first, min(first + BULK, count))])
        while workers:
            counts = await service.count()
            if counts[TaskStatus.PENDING] + counts[TaskStatus.RUNNING] == 0:
                break
            await sleep(LOOK)


def url_of(store: str) -> str:
    """Give the URL of the place that is there now."""
    return {"sqlite": lambda: place.sqlite, "redis": lambda: place.redis}.get(store, lambda: store)()


async def chanflow_round_trip(store: str, count: int) -> None:
    url = url_of(store)
    place.start_worker("chanflow", url, current_async_library())
    service, work = task_worker.chanflow(url, 0)
    async with service:
        for number in range(count):
            assert await service.result(await service.submit(work, number=number)) == number


async def streaq_round_trip(count: int) -> None:
    place.start_worker("streaq", place.redis, current_async_library())
    worker, work = task_worker.streaq(place.redis)
    async with worker:
        for number in range(count):
            task = await work.enqueue(number)
            assert (await task.result()).result == number


async def arq_round_trip(count: int) -> None:
    place.start_worker("arq", place.redis)
    pool = await task_worker.arq_pool(place.redis)
    for number in range(count):
        job = await pool.enqueue_job("work", number)
        assert await job.result(poll_delay=POLL) == number
    await pool.aclose()


async def taskiq_round_trip(count: int) -> None:
    # It needs another version of Redis's client than arq, and so an environment of its own.
    broker, work = task_worker.taskiq(place.redis)
    place.start_worker("taskiq", place.redis)
    await broker.startup()
    for number in range(count):
        task = await work.kiq(number)
        assert (await task.wait_result(check_interval=POLL)).return_value == number
    await broker.shutdown()


def huey_round_trip(store: str, count: int) -> None:
    url = url_of(store)
    place.start_worker("huey", url)
    _, work = task_worker.huey(url)
    for number in range(count):
        assert work(number).get(blocking=True, backoff=1.0, max_delay=POLL) == number


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


def huey_burn_down(store: str, count: int, *, workers: int = WORKERS) -> None:
    """Submit tasks one by one, for there is no other way; with workers, wait until none is left."""
    from huey import MemoryHuey

    huey = MemoryHuey(immediate=False, results=False) if store == "memory://" else task_worker.huey(url_of(store))[0]
    work = huey.task()(do_nothing)
    for number in range(count):
        work(number)
    if workers:
        consumer = huey.create_consumer(workers=workers, initial_delay=POLL, max_delay=POLL, periodic=False)
        consumer.start()
        while huey.pending_count():
            time.sleep(LOOK)
        consumer.stop(graceful=True)


async def streaq_bulk(count: int, *, workers: bool = False) -> None:
    worker, work = task_worker.streaq(place.redis)
    async with worker:
        for first in range(0, count, BULK):
            await worker.enqueue_many([work.enqueue(number) for number in range(first, min(first + BULK, count))])
    if workers:
        worker, _ = task_worker.streaq(place.redis)
        async with create_task_group() as tasks:
            await tasks.start(worker.run_async)
            while await worker.queue_size():  # noqa: ASYNC110 -- there is nothing else to ask
                await sleep(LOOK)
            tasks.cancel_scope.cancel()


async def arq_burn_down(count: int, *, workers: bool = False) -> None:
    from arq import func
    from arq.worker import Worker

    async def run(_context: dict[Any, Any], number: int) -> int:
        return number

    work: Any = run
    pool = await task_worker.arq_pool(place.redis)
    for number in range(count):
        await pool.enqueue_job("work", number)
    if workers:
        worker = Worker(
            [func(work, name="work", keep_result=0)],
            redis_pool=pool,
            max_jobs=WORKERS,
            poll_delay=POLL,
            handle_signals=False,
            burst=True,
        )
        await worker.main()
    await pool.aclose()


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
                "chanflow": Entry(partial(chanflow_tasks, "memory://"), BOTH),
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
            "chanflow": Entry(partial(chanflow_tasks, "memory://", workers=0), BOTH),
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
            "huey": Entry(
                partial(huey_sqlite_submitters, submitters=10), LOOPLESS, note="SqliteHuey with fsync, 10 threads"
            ),
        },
    )
    yield from bulk_workloads()
    yield from round_trips()


def bulk_workloads() -> Iterator[Workload]:
    workload = partial(Workload, unit="task", group="task", warm_up=200)
    one_by_one = "submitted one by one"
    burst = partial(partial, workers=True)
    yield workload(
        "burn-down-memory",
        "20,000 tasks submitted in bulk and run until none is left, in memory",
        count=20_000,
        entries={
            "chanflow": Entry(partial(chanflow_bulk, "memory://", workers=WORKERS), BOTH),
            "huey": Entry(partial(huey_burn_down, "memory://"), LOOPLESS, note=f"MemoryHuey, {one_by_one}"),
        },
    )
    yield workload(
        "burn-down-memory-1000000",
        "1,000,000 tasks submitted in bulk and run until none is left, in memory",
        count=1_000_000,
        slow=True,
        entries={
            "chanflow": Entry(partial(chanflow_bulk, "memory://", workers=WORKERS), BOTH),
            "huey": Entry(partial(huey_burn_down, "memory://"), LOOPLESS, note=f"MemoryHuey, {one_by_one}"),
        },
    )
    yield workload(
        "burn-down-sqlite",
        "20,000 tasks submitted in bulk and run until none is left, in an SQLite file",
        count=20_000,
        around=sqlite_file,
        entries={
            "chanflow": Entry(partial(chanflow_bulk, "sqlite", workers=WORKERS), BOTH),
            "huey": Entry(partial(huey_burn_down, "sqlite"), LOOPLESS, note=f"SqliteHuey with fsync, {one_by_one}"),
        },
    )
    yield workload(
        "burn-down-redis",
        "20,000 tasks submitted in bulk and run until none is left, in one Redis",
        count=20_000,
        around=redis_server,
        entries={
            "chanflow": Entry(partial(chanflow_bulk, "redis", workers=WORKERS), BOTH),
            "streaq": Entry(burst(streaq_bulk), BOTH, scale=0.2),
            "arq": Entry(burst(arq_burn_down), ASYNCIO, note=one_by_one),
            "huey": Entry(partial(huey_burn_down, "redis"), LOOPLESS, note=f"RedisHuey, {one_by_one}"),
        },
    )
    yield workload(
        "submit-many-memory",
        "Submitting alone, a thousand at a time, in memory",
        count=20_000,
        entries={
            "chanflow": Entry(partial(chanflow_bulk, "memory://"), BOTH),
            "huey": Entry(partial(huey_burn_down, "memory://", workers=0), LOOPLESS, note=f"MemoryHuey, {one_by_one}"),
        },
    )
    yield workload(
        "submit-many-sqlite",
        "Submitting alone, a thousand at a time, in an SQLite file",
        count=20_000,
        around=sqlite_file,
        entries={
            "chanflow": Entry(partial(chanflow_bulk, "sqlite"), BOTH),
            "huey": Entry(
                partial(huey_burn_down, "sqlite", workers=0), LOOPLESS, note=f"SqliteHuey with fsync, {one_by_one}"
            ),
        },
    )
    yield workload(
        "submit-many-redis",
        "Submitting alone, a thousand at a time, in one Redis",
        count=20_000,
        around=redis_server,
        entries={
            "chanflow": Entry(partial(chanflow_bulk, "redis"), BOTH),
            "streaq": Entry(streaq_bulk, BOTH),
            "arq": Entry(arq_burn_down, ASYNCIO, note=one_by_one),
        },
    )


def round_trips() -> Iterator[Workload]:
    workload = partial(Workload, unit="round trip", group="task", count=300, warm_up=20, fixed=True)
    asked = "asked for every millisecond"
    yield workload(
        "round-trip-sqlite",
        "One task after the other, submitted here, run in another process, and its result here, in an SQLite file",
        around=sqlite_file,
        entries={
            "chanflow": Entry(partial(chanflow_round_trip, "sqlite"), BOTH),
            "huey": Entry(partial(huey_round_trip, "sqlite"), LOOPLESS, note=f"SqliteHuey with fsync, {asked}"),
        },
    )
    yield workload(
        "round-trip-redis",
        "One task after the other, submitted here, run in another process, and its result here, in one Redis",
        around=redis_server,
        entries={
            "chanflow": Entry(partial(chanflow_round_trip, "redis"), BOTH),
            "streaq": Entry(streaq_round_trip, BOTH),
            "arq": Entry(arq_round_trip, ASYNCIO, note=asked),
            "taskiq": Entry(taskiq_round_trip, ASYNCIO, note=f"taskiq-redis, {asked}"),
            "huey": Entry(partial(huey_round_trip, "redis"), LOOPLESS, note=f"RedisHuey, {asked}"),
        },
    )
