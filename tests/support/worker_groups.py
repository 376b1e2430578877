"""Worker groups: what their errors say, handlers, and what is true of every group when its block is left."""

from __future__ import annotations

from typing import Any

import anyio
from anyio import Event

from chanflow import WorkerGroup
from tests.support.channels import assert_at_rest

DEADLOCK = (
    "the worker group is full, and every one of its handlers waits to submit to it, which could never end; "
    "use a larger buffer, submit_nowait, or another group for the jobs of jobs"
)
SHUTTING_DOWN = "the worker group is shutting down"
OUTSIDE = "a WorkerGroup accepts jobs only inside of its `async with` block"
ELSEWHERE = "this WorkerGroup belongs to another event loop; use it there, as with anyio.from_thread.run"
BAD_SHUTDOWN = "shutdown must be called inside of the group's block, and not by one of its handlers"


def assert_nothing_left(group: WorkerGroup[Any, Any]) -> None:
    """Check that nothing of a group is left, once its block is."""
    figures = group.statistics()
    assert figures.running == figures.queued == figures.delayed == figures.submitters_waiting == 0
    assert not group._workers
    assert not group._delayed
    assert not group._turns.any_live()
    assert_at_rest(group._queue)


class Handler:
    """A handler that measures itself, and holds each job until it may go on."""

    def __init__(self, *, held: bool = False) -> None:
        self.started: list[Any] = []
        self.times: dict[Any, float] = {}
        self.finished: list[Any] = []
        self.running = 0
        self.most = 0
        self.gates: dict[Any, Event] = {}
        self.held = held

    async def __call__(self, job: Any) -> Any:
        self.started.append(job)
        self.times[job] = anyio.current_time()
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.held:
                await self.gates.setdefault(job, Event()).wait()
            else:
                await anyio.sleep(1)
        finally:
            self.running -= 1
        self.finished.append(job)
        return job

    def in_order(self) -> list[Any]:
        """Give the jobs in the order in which they started, those of one moment sorted."""
        return sorted(self.started, key=lambda job: (self.times[job], job))

    def release(self, *jobs: Any) -> None:
        """Let jobs finish."""
        for job in jobs:
            self.gates.setdefault(job, Event()).set()

    def release_all(self) -> None:
        self.held = False
        for gate in self.gates.values():
            gate.set()


async def echo(job: Any) -> Any:
    return job


async def sleepy(job: Any) -> Any:
    await anyio.sleep(1)
    return job


async def fail(job: Any) -> Any:
    raise job
