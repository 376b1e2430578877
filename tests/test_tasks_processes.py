"""Several processes share the tasks of one place: each task runs once while leases hold."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from anyio import fail_after

from chanflow.tasks import TaskService
from tests.support.redis import running_redis

pytestmark = [pytest.mark.anyio, pytest.mark.real_time]

TASKS = 200
# Runs tasks until its input ends, and notes each run with its process.
WORKER = """
import os, sys
import anyio
from chanflow.tasks import TaskService

notes, bus, store = sys.argv[1:]
service = TaskService(bus=bus, store=store, workers=3)

@service.task
async def work(number: int) -> int:
    with open(notes, "a") as file:
        file.write(f"{number} {os.getpid()}\\n")
    await anyio.sleep(0.002)
    return number * 2

async def main():
    async with service:
        print("ready", flush=True)
        await anyio.to_thread.run_sync(sys.stdin.read)

anyio.run(main)
"""


@pytest.fixture(params=["a file for both", "a file for the tasks", "redis"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str]]:
    """Give the URLs of a bus and a store that processes share."""
    if request.param == "redis":
        with running_redis() as url:
            yield "memory://", url
    else:
        url = f"sqlite:///{tmp_path}/tasks.db"
        yield url if request.param == "a file for both" else "memory://", url


async def test_two_processes_share_the_tasks(place: tuple[str, str], tmp_path: Path) -> None:
    """What a third one submits, both run, and none of it twice."""
    bus, store = place
    front = TaskService(bus=bus, store=store, workers=0)

    @front.task
    async def work(number: int) -> int:
        raise AssertionError(number)

    notes = tmp_path / "runs"
    with ExitStack() as stack:
        workers = [
            stack.enter_context(
                subprocess.Popen(  # noqa: ASYNC220 -- it only takes a moment
                    [sys.executable, "-c", WORKER, notes, bus, store],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
            for _ in range(2)
        ]
        for worker in workers:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "ready\n"
        with fail_after(60.0):
            async with front:
                ids = [await front.submit(work, number=number) for number in range(TASKS)]
                assert [await front.result(task_id) for task_id in ids] == [number * 2 for number in range(TASKS)]
        for worker in workers:
            worker.communicate()
            assert worker.returncode == 0
    runs = [line.split() for line in notes.read_text().splitlines()]
    assert Counter(int(number) for number, _ in runs) == Counter(range(TASKS))
    assert {int(process) for _, process in runs} == {worker.pid for worker in workers}
