"""Worker groups in seeded random runs, in which every job is accounted for."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from random import Random
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, WouldBlock

from chanflow import Channel, DeadLetter, Result, ResultCancelledError, Retry, WorkerGroup
from tests.support.worker_groups import assert_nothing_left

pytestmark = pytest.mark.anyio


class Chaos:
    """One seeded run: random jobs, failures, resizes, cancellations, and a random end."""

    def __init__(self, seed: int) -> None:
        self.random = random = Random(seed)
        self.endings = ["leave", "error", "cancel", "shutdown", "shutdown and leave"]
        self.retry = Retry(random.randint(1, 3), delay=random.choice([0, 0.5]), on=ValueError)
        self.letters = Channel[DeadLetter[int]](math.inf)
        self.group = WorkerGroup(
            self.handle,
            workers=random.randint(1, 4),
            buffer=random.choice([0, 1, 3, math.inf]),
            retry=random.choice([None, self.retry]),
            timeout=random.choice([None, 1.0]),
            dead_letters=random.choice([None, self.letters]),
        )
        self.accepted: dict[int, Result[int]] = {}
        self.finished: Counter[int] = Counter()
        self.running = 0
        self.violations: list[Any] = []
        self.seen: set[int] = set()
        self.nested = 1000

    async def handle(self, job: int) -> int:
        self.running += 1
        # A worker that holds its job between two attempts counts as running, and keeps its place in a smaller group.
        first = job not in self.seen
        self.seen.add(job)
        running = self.group.statistics().running
        if self.running > running or (first and running > self.group._limit):
            self.violations.append((self.running, self.group.statistics()))
        try:
            what = self.random.random()
            if what < 0.6:
                await anyio.sleep(self.random.choice([0, 0.1, 0.1, 0.5, 2]))
            if what < 0.2:
                raise self.random.choice([ValueError, KeyError])(job)
            if what > 0.9:
                self.nested += 1
                with contextlib.suppress(WouldBlock, ClosedResourceError):
                    self.accepted[self.nested] = self.group.submit_nowait(self.nested)
        finally:
            self.running -= 1
        self.finished[job] += 1
        return job

    async def submit(self, start: int, count: int) -> None:
        for job in range(start, start + count):
            with contextlib.suppress(ClosedResourceError, WouldBlock):
                if self.random.random() < 0.5:
                    self.accepted[job] = self.group.submit_nowait(job)
                else:
                    self.accepted[job] = await self.group.submit(job)
            if self.random.random() < 0.3:
                await anyio.sleep(self.random.choice([0, 0.1]))
            if self.random.random() < 0.1 and self.accepted:
                self.random.choice(list(self.accepted.values())).cancel()
            if self.random.random() < 0.1:
                self.group.resize(self.random.randint(1, 4))

    async def run(self) -> None:
        ending = self.random.choice(self.endings)
        returned: list[int] = []

        async def shut_down() -> None:
            await anyio.sleep(self.random.choice([0, 0.3, 1]))
            with contextlib.suppress(RuntimeError):
                returned.extend(await self.group.shutdown(self.random.choice([0, 0.5, None])))

        async with anyio.create_task_group() as tasks:
            with anyio.CancelScope() as scope, contextlib.suppress(ZeroDivisionError):
                async with self.group as group:
                    for number in range(3):
                        tasks.start_soon(self.submit, number * 100, 20)
                    await anyio.sleep(self.random.choice([0, 0.1, 0.5, 2]))
                    if ending == "error":
                        raise ZeroDivisionError
                    if ending == "cancel":
                        scope.cancel()
                        await anyio.sleep(1)
                    if ending == "shutdown":
                        await shut_down()
                    if ending == "shutdown and leave":
                        tasks.start_soon(shut_down)
        self.check(ending, returned, group)

    def check(self, ending: str, returned: list[int], group: WorkerGroup[int, int]) -> None:
        leftover = Counter(group.leftover)
        assert set(leftover.values()) <= {1}
        if ending == "leave":
            assert leftover == Counter()
        if ending == "shutdown":
            assert returned == list(group.leftover)
        letters = Counter(letter.job for letter in self.letters.drain())
        figures = group.statistics()
        succeeded = failed = 0
        for job, result in self.accepted.items():
            assert result.done, job
            error = result.exception()
            if job in leftover:
                assert isinstance(error, ResultCancelledError)
            elif error is None:
                succeeded += 1
                assert self.finished[job] == 1
            elif not isinstance(error, ResultCancelledError):
                failed += 1
                if group._dead_letters is not None:
                    assert letters[job] == 1
        assert set(leftover) <= set(self.accepted)
        assert (figures.succeeded, figures.failed) == (succeeded, failed)
        # Whatever is neither done nor left over was cancelled on purpose.
        assert succeeded + failed + figures.cancelled + len(leftover) == len(self.accepted)
        assert self.violations == []
        assert self.running == 0
        assert_nothing_left(group)


async def test_no_job_is_lost_in_random_runs(caplog: pytest.LogCaptureFixture) -> None:
    """Two hundred seeds: each accepted job is done or left over, exactly once, and the bound holds at each start."""
    caplog.set_level(logging.CRITICAL, "chanflow")
    for seed in range(200):
        try:
            with anyio.fail_after(10_000):
                await Chaos(seed).run()
        except BaseException as error:
            error.add_note(f"seed {seed}")
            raise
        caplog.clear()
