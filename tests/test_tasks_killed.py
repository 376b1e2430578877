"""Processes that share a store, and are killed or stopped at any moment: no accepted task is lost."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

import anyio
import pytest
from anyio import fail_after

from chanflow import Retry
from chanflow.tasks import TaskRecord, TaskService, TaskStatus
from tests.support.redis import running_redis

ROUNDS = 12
LEASE = 1.0
# Submits tasks, or runs them, until it is killed.
PROCESS = """
import os, sys
import anyio, chanflow
from chanflow.tasks import TaskService

role, store, notes, backend = sys.argv[1:]
service = TaskService(store=store, workers=0 if role == "front" else 4, lease=1.0)

@service.task(retry=chanflow.Retry(1000))
async def work(number: int) -> int:
    await anyio.sleep(0.005)
    return number + 1

async def main():
    async with service:
        print("ready", flush=True)
        if role == "front":
            with open(notes, "a") as file:
                for number in range(1_000_000):
                    unique = os.getpid() * 1_000_000 + number
                    file.write(f"{await service.submit(work, number=unique)} {unique}\\n")
                    file.flush()
                    await anyio.sleep(0.003)
        await anyio.sleep_forever()

anyio.run(main, backend=backend)
"""


@pytest.fixture(params=["sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "redis":
        with running_redis() as url:
            yield url
    else:
        yield f"sqlite:///{tmp_path}/tasks.db"


@contextmanager
def running(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert read(process.stdout) == "ready\n"
            yield process
        finally:
            process.kill()


def read(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


@pytest.mark.slow
def test_two_fronts_and_three_workers_that_are_killed(store: str, tmp_path: Path) -> None:
    """Whichever is killed, each accepted task has its own result, and what is left is done within two leases."""
    dice = random.Random(13)
    notes = tmp_path / "accepted"
    with ExitStack() as stack:
        roles = ["front", "front", "worker", "worker", "worker"]

        def start(number: int) -> subprocess.Popen[str]:
            backend = ("asyncio", "trio")[number % 2]
            return stack.enter_context(running(PROCESS, roles[number], store, str(notes), backend))

        processes = [start(number) for number in range(5)]
        for _ in range(ROUNDS):
            time.sleep(dice.uniform(0.0, 0.2))
            number = dice.randrange(5)
            os.kill(processes[number].pid, signal.SIGKILL)
            assert processes[number].wait(30) == -signal.SIGKILL
            processes[number] = start(number)
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.wait(30)
    accepted = dict(line.split() for line in notes.read_text().splitlines() if line.count(" ") == 1)
    assert len(accepted) > ROUNDS
    service = TaskService(store=store, workers=50, lease=LEASE)

    @service.task(retry=Retry(1000))
    async def work(number: int) -> int:
        return number + 1

    async def finish() -> tuple[dict[str, int], float]:
        async with service:
            began = time.monotonic()
            with fail_after(60.0):
                results = {task_id: await service.result(task_id) for task_id in accepted}
            return results, time.monotonic() - began

    results, took = anyio.run(finish)
    assert results == {task_id: int(number) + 1 for task_id, number in accepted.items()}
    # Nothing waits for more than a lease, and the rest is work: this bounds it, generously.
    assert took < 2 * LEASE + 10.0


SLEEPER = """
import sys, time
import anyio, chanflow
from chanflow.tasks import TaskService

store, backend = sys.argv[1:]
service = TaskService(store=store, workers=1, lease=0.5)

@service.task(retry=chanflow.Retry(3))
async def work() -> str:
    print("ready", flush=True)
    await anyio.sleep(0.3)
    return "of the one that was stopped"

async def main():
    async with service:
        await anyio.to_thread.run_sync(sys.stdin.read)

anyio.run(main, backend=backend)
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_worker_that_was_stopped_for_longer_than_its_lease(store: str, backend: str) -> None:
    """SIGSTOP, and SIGCONT after another has run the task: what the first one makes of it changes nothing."""

    async def main() -> None:
        service = TaskService(store=store, workers=0)

        @service.task
        async def work() -> str:
            raise AssertionError

        async with service:
            task_id = await service.submit(work)
            with running(SLEEPER, store, backend) as sleeper:
                os.kill(sleeper.pid, signal.SIGSTOP)
                before = await service.get(task_id)
                assert before.status is TaskStatus.RUNNING
                ended = await run_elsewhere(store, task_id)
                assert (ended.decode_result(), ended.attempts) == ("of the other one", 2)
                os.kill(sleeper.pid, signal.SIGCONT)
                await anyio.sleep(1.5)
                # It was there, and went on: it ends in order when it is told to.
                assert sleeper.stdin is not None
                sleeper.stdin.close()
                assert await anyio.to_thread.run_sync(sleeper.wait, 30) == 0
            assert await service.get(task_id) == ended

    async def run_elsewhere(store: str, task_id: str) -> TaskRecord:
        other = TaskService(store=store, workers=1, lease=0.5)

        @other.task(retry=Retry(3))
        async def work() -> str:
            return "of the other one"

        async with other:
            with fail_after(20.0):
                return await other.wait(task_id)

    anyio.run(main)
