"""The other process of a round trip: `python -m benchmarks.task_worker PEER URL` runs what is submitted elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import anyio
from anyio import create_task_group

__all__ = ["PEERS"]

WORKERS = 10
POLL = 0.001
"""Seconds after which a peer that has to ask for tasks asks again."""


def do_nothing(number: int) -> int:
    return number


async def do_nothing_async(number: int) -> int:
    return number


def ready() -> None:
    print("ready", flush=True)


def chanflow(url: str, workers: int) -> Any:
    from chanflow.tasks import TaskService

    service = TaskService(store=url, workers=workers)
    return service, service.task(do_nothing_async)


async def work_chanflow(url: str) -> None:
    service, _ = chanflow(url, WORKERS)
    async with service:
        ready()
        await anyio.sleep_forever()


def streaq(url: str) -> Any:
    from streaq import Worker

    worker: Any = Worker(redis_url=url, concurrency=WORKERS, handle_signals=False)
    return worker, worker.task(do_nothing_async)


async def work_streaq(url: str) -> None:
    worker, _ = streaq(url)
    async with create_task_group() as tasks:
        await tasks.start(worker.run_async)
        ready()


async def arq_pool(url: str) -> Any:
    from arq import create_pool
    from arq.connections import RedisSettings

    return await create_pool(RedisSettings.from_dsn(url))


async def work_arq(url: str) -> None:
    from arq import func
    from arq.worker import Worker

    async def run(_context: dict[Any, Any], number: int) -> int:
        return number

    work: Any = run
    pool = await arq_pool(url)
    worker = Worker([func(work, name="work")], redis_pool=pool, max_jobs=WORKERS, poll_delay=POLL, handle_signals=False)
    ready()
    await worker.main()


def taskiq(url: str) -> Any:
    from taskiq_redis import ListQueueBroker, RedisAsyncResultBackend

    broker = ListQueueBroker(url).with_result_backend(RedisAsyncResultBackend(url))
    return broker, broker.task(task_name="work")(do_nothing_async)


async def work_taskiq(url: str) -> None:
    from taskiq.api import run_receiver_task

    broker, _ = taskiq(url)
    ready()
    await run_receiver_task(broker, run_startup=True, max_async_tasks=WORKERS)


def huey(url: str) -> Any:
    import huey as module

    if url.startswith("sqlite:///"):
        queue: Any = module.SqliteHuey(filename=url.removeprefix("sqlite:///"), fsync=True)
    else:
        queue = module.RedisHuey("benchmark", url=url)
    return queue, queue.task(name="work")(do_nothing)


def work_huey(url: str) -> None:
    queue, _ = huey(url)
    consumer = queue.create_consumer(workers=WORKERS, initial_delay=POLL, max_delay=POLL, periodic=False)
    consumer.start()
    ready()
    sys.stdin.read()


PEERS: dict[str, Callable[[str], Any]] = {
    "chanflow": work_chanflow,
    "streaq": work_streaq,
    "arq": work_arq,
    "taskiq": work_taskiq,
    "huey": work_huey,
}


def main() -> None:
    peer, url, backend = sys.argv[1:]
    work = PEERS[peer]
    if peer == "huey":
        work(url)
    else:
        anyio.run(work, url, backend=backend)


if __name__ == "__main__":
    # Peers name a task by its module, which must be the same in both processes.
    import_module("benchmarks.task_worker").main()
