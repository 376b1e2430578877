"""Workloads that keep many things and count their bytes, with tracemalloc."""

from __future__ import annotations

import gc
import json
import os
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NoReturn

from anyio import create_task_group
from anyio.lowlevel import checkpoint

from benchmarks.peers import CHANNELS, Ends
from benchmarks.plan import ASYNCIO, LOOPLESS, Entry, Workload

__all__ = ["workloads"]

COUNTS = (1000, 10_000, 100_000)
# Some peers reach their place only after several trips through the event loop.
TRIPS = 5


class Weight:
    """How many bytes there are more than when it was made."""

    def __init__(self) -> None:
        gc.collect()
        tracemalloc.start()
        self.start, _ = tracemalloc.get_traced_memory()

    def read(self) -> int:
        gc.collect()
        now, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return now - self.start


def finish(weight: Weight) -> NoReturn:
    """Print the result and be gone: to cancel 100,000 waiters takes some peers, which search for each, minutes."""
    print(json.dumps({"bytes": weight.read()}), flush=True)
    os._exit(0)


async def idle_channels(open_channel: Callable[[int], Ends], count: int) -> int:
    # Only the channel is kept, not our record of its methods.
    open_channel(1)
    weight = Weight()
    channels = [open_channel(1).channel for _ in range(count)]
    size = weight.read()
    assert len(channels) == count
    return size


async def parked_receivers(open_channel: Callable[[int], Ends], count: int) -> None:
    """All wait on one channel; what counts is the task and the place in the waiting room."""
    ends = open_channel(1)
    parked = 0

    async def park() -> None:
        nonlocal parked
        parked += 1
        await ends.receive()
        parked -= 1

    async with create_task_group() as tasks:
        weight = Weight()
        for _ in range(count):
            tasks.start_soon(park)
        for _ in range(TRIPS):
            await checkpoint()
        assert parked == count
        finish(weight)


async def never(number: int) -> int:
    from anyio import sleep_forever

    await sleep_forever()
    return number


async def chanflow_jobs(count: int) -> None:
    from math import inf

    from anyio import CancelScope

    from chanflow import WorkerGroup

    with CancelScope():
        async with WorkerGroup[int, int](never, workers=1, buffer=inf) as group:
            await group.submit(0)
            weight = Weight()
            results: list[Any] = [await group.submit(number) for number in range(count)]
            assert len(results) == count
            finish(weight)


async def task_group_jobs(count: int) -> None:
    from asyncio import Semaphore

    semaphore = Semaphore(0)

    async def bounded(number: int) -> int:
        async with semaphore:
            return number

    async with create_task_group() as tasks:
        weight = Weight()
        for number in range(count):
            tasks.start_soon(bounded, number)
        for _ in range(TRIPS):
            await checkpoint()
        finish(weight)


async def aiojobs_jobs(count: int) -> int:
    from aiojobs import Scheduler

    scheduler = Scheduler(limit=1, pending_limit=0)
    await scheduler.spawn(never(0))
    weight = Weight()
    jobs = [await scheduler.spawn(never(number)) for number in range(count)]
    size = weight.read()
    assert len(jobs) == count
    await scheduler.close()
    return size


def thread_pool_jobs(count: int) -> int:
    from concurrent.futures import ThreadPoolExecutor
    from threading import Event

    event = Event()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(event.wait)
        weight = Weight()
        futures = [pool.submit(abs, number) for number in range(count)]
        size = weight.read()
        assert len(futures) == count
        event.set()
    return size


def workloads() -> Iterator[Workload]:
    job_entries = {
        "chanflow": Entry(chanflow_jobs, ASYNCIO, note="with its Result"),
        "TaskGroup + Semaphore": Entry(task_group_jobs, ASYNCIO, note="a task for each job"),
        "aiojobs": Entry(aiojobs_jobs, ASYNCIO),
        "ThreadPoolExecutor": Entry(thread_pool_jobs, LOOPLESS),
    }
    no_queue = {
        "aiometer": "takes all jobs in one call, and queues none",
        "anyio.amap": "takes all jobs in one call, and queues none",
    }
    whole = {
        name: (
            Entry(partial(idle_channels, peer.open), peer.backends[:1]),
            Entry(partial(parked_receivers, peer.open), peer.backends[:1]),
        )
        for name, peer in CHANNELS.items()
    }
    for count in COUNTS:
        for kind, title, unit, entries, missing in (
            ("channel", "idle channels of capacity 1", "channel", {name: pair[0] for name, pair in whole.items()}, {}),
            ("receiver", "receivers parked on one channel", "task", {n: pair[1] for n, pair in whole.items()}, {}),
            ("job", "queued jobs", "job", job_entries, no_queue),
        ):
            yield Workload(
                f"memory-{kind}-{count}",
                f"Memory of {count:,} {title}",
                unit,
                count,
                entries,
                "memory",
                missing=missing,
                memory=True,
                fixed=True,
                slow=count > COUNTS[0],
            )
