"""Workloads of bounded workers."""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import anyio

from benchmarks.plan import ASYNCIO, BOTH, LOOPLESS, Entry, Workload

__all__ = ["workloads"]

Job = Callable[[int], Coroutine[Any, Any, int]]

MILLISECOND = 0.001


async def do_nothing(number: int) -> int:
    return number


async def sleep(number: int) -> int:
    await anyio.sleep(MILLISECOND)
    return number


def do_nothing_in_thread(number: int) -> int:
    return number


def sleep_in_thread(number: int) -> int:
    time.sleep(MILLISECOND)
    return number


def expected(count: int) -> int:
    return count * (count - 1) // 2


async def chanflow_group(job: Callable[[int], Any], workers: int, count: int) -> None:
    from chanflow import WorkerGroup

    async with WorkerGroup(job, workers=workers) as group:
        results = [await group.submit(number) for number in range(count)]
        assert sum([await result for result in results]) == expected(count)


async def chanflow_map(job: Callable[[int], Any], workers: int, count: int) -> None:
    from chanflow import WorkerGroup

    total = 0
    async with WorkerGroup(job, workers=workers) as group:
        async for value in group.map(range(count)):
            total += value
    assert total == expected(count)


async def task_group(job: Job, workers: int, count: int) -> None:
    from asyncio import Semaphore, TaskGroup

    semaphore = Semaphore(workers)

    async def bounded(number: int) -> int:
        async with semaphore:
            return await job(number)

    async with TaskGroup() as tasks:
        results = [tasks.create_task(bounded(number)) for number in range(count)]
    assert sum(result.result() for result in results) == expected(count)


async def queue_workers(job: Job, workers: int, count: int) -> None:
    from asyncio import Future, Queue, get_running_loop

    queue: Queue[tuple[int, Future[int]]] = Queue(100)
    new_future = get_running_loop().create_future

    async def work() -> None:
        while True:
            number, future = await queue.get()
            future.set_result(await job(number))

    async with anyio.create_task_group() as tasks:
        for _ in range(workers):
            tasks.start_soon(work)
        results = []
        for number in range(count):
            future = new_future()
            await queue.put((number, future))
            results.append(future)
        assert sum([await result for result in results]) == expected(count)
        tasks.cancel_scope.cancel()


async def anyio_amap(job: Job, count: int) -> None:
    from anyio import amap

    assert sum(await amap(job, range(count))) == expected(count)


async def aiometer_amap(job: Job, workers: int, count: int) -> None:
    from aiometer import amap

    total = 0
    async with amap(job, list(range(count)), max_at_once=workers) as values:
        async for value in values:
            total += value
    assert total == expected(count)


async def aiojobs_scheduler(job: Job, workers: int, count: int) -> None:
    from aiojobs import Scheduler

    async with Scheduler(limit=workers, pending_limit=100) as scheduler:
        jobs: list[Any] = [await scheduler.spawn(job(number)) for number in range(count)]
        assert sum([await job.wait() for job in jobs]) == expected(count)


def thread_pool(job: Callable[[int], int], workers: int, count: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(job, number) for number in range(count)]
        assert sum(future.result() for future in futures) == expected(count)


async def to_thread_limited(workers: int, count: int) -> None:
    from anyio import CapacityLimiter, amap, to_thread

    limiter = CapacityLimiter(workers)

    async def call(number: int) -> int:
        return await to_thread.run_sync(do_nothing_in_thread, number, limiter=limiter)

    assert sum(await amap(call, range(count))) == expected(count)


def async_entries(job: Job, in_thread: Callable[[int], int], workers: int, thread_scale: float) -> dict[str, Entry]:
    return {
        "chanflow": Entry(partial(chanflow_group, job, workers), BOTH, note="submit, then await"),
        "chanflow, map": Entry(partial(chanflow_map, job, workers), BOTH),
        "TaskGroup + Semaphore": Entry(partial(task_group, job, workers), ASYNCIO, note="all tasks at once"),
        "hand-written": Entry(partial(queue_workers, job, workers), ASYNCIO, note="asyncio.Queue and futures"),
        "anyio.amap": Entry(partial(anyio_amap, job), BOTH, note="no limit: all tasks at once"),
        "aiometer": Entry(partial(aiometer_amap, job, workers), BOTH),
        "aiojobs": Entry(partial(aiojobs_scheduler, job, workers), ASYNCIO),
        "ThreadPoolExecutor": Entry(
            partial(thread_pool, in_thread, workers), LOOPLESS, thread_scale, note="threads, a plain function"
        ),
    }


def workloads() -> Iterator[Workload]:
    yield Workload(
        "workers-no-op",
        "10 workers, 100,000 jobs that do nothing, results awaited",
        "job",
        100_000,
        async_entries(do_nothing, do_nothing_in_thread, 10, 0.2),
        "worker",
        go_scale=5.0,
    )
    yield Workload(
        "workers-sleep",
        "1,000 workers, 10,000 jobs that sleep 1 ms, results awaited",
        "job",
        10_000,
        async_entries(sleep, sleep_in_thread, 1000, 1),
        "worker",
        go_scale=1.0,
    )
    yield Workload(
        "workers-thread",
        "10 threads, jobs that do nothing, results awaited",
        "job",
        5000,
        {
            "chanflow": Entry(partial(chanflow_group, do_nothing_in_thread, 10), note="a plain function as handler"),
            "anyio.to_thread": Entry(partial(to_thread_limited, 10), note="with a CapacityLimiter, under amap"),
            "ThreadPoolExecutor": Entry(partial(thread_pool, do_nothing_in_thread, 10), LOOPLESS),
        },
        "worker",
    )
