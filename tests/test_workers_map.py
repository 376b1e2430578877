"""Worker groups: `map`."""

# ruff: noqa: FBT001, PT012 -- flags come from parametrize; a group raises when its block is left
# ruff: noqa: PERF401 -- what was seen before an error is kept

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing
from typing import Any

import anyio
import pytest
from anyio import ClosedResourceError, Event, wait_all_tasks_blocked

from chanflow import Channel, ResultCancelledError, Retry, WorkerGroup
from tests.support.channels import assert_at_rest
from tests.support.messages import whole
from tests.support.worker_groups import Handler, assert_nothing_left, echo, sleepy

pytestmark = pytest.mark.anyio


async def agen(jobs: Any) -> AsyncIterator[Any]:
    for job in jobs:
        await anyio.lowlevel.checkpoint()
        yield job


def sources(kind: str, count: int) -> Any:
    if kind == "list":
        return list(range(count))
    if kind == "generator":
        return (number for number in range(count))
    if kind == "async generator":
        return agen(range(count))
    channel = Channel[int](math.inf)
    for number in range(count):
        channel.send_nowait(number)
    channel.close()
    return channel if kind == "channel" else channel.receiver


class TestMap:
    @pytest.mark.parametrize("kind", ["list", "generator", "async generator", "channel", "receiver"])
    @pytest.mark.parametrize("ordered", [True, False])
    async def test_it_goes_over_any_source(self, kind: str, ordered: bool) -> None:
        """Each job gives one result."""
        async with WorkerGroup(sleepy, workers=3, buffer=2) as group:
            source = sources(kind, 20)
            seen = [value async for value in group.map(source, ordered=ordered)]
            if kind == "receiver":
                source.close()
        assert seen == list(range(20)) if ordered else sorted(seen) == list(range(20))
        assert_nothing_left(group)

    async def test_the_order_is_that_of_the_jobs_or_of_their_ends(self) -> None:
        """As asked for."""

        async def handle(job: int) -> int:
            await anyio.sleep(job)
            return job

        async with WorkerGroup(handle, workers=3) as group:
            assert [value async for value in group.map([3, 1, 2])] == [3, 1, 2]
            assert [value async for value in group.map([3, 1, 2], ordered=False)] == [1, 2, 3]
        assert_nothing_left(group)

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_an_empty_source(self, ordered: bool) -> None:
        """Gives nothing and ends."""
        async with WorkerGroup(echo) as group:
            assert [value async for value in group.map([], ordered=ordered)] == []
        assert_nothing_left(group)

    @pytest.mark.parametrize("ordered", [True, False])
    @pytest.mark.parametrize("asynchronous", [True, False])
    @pytest.mark.parametrize(("workers", "buffer"), [(1, 0), (1, 1), (3, 0), (3, 5)])
    async def test_the_source_is_read_no_further_than_the_window(
        self, ordered: bool, asynchronous: bool, workers: int, buffer: int
    ) -> None:
        """At most `workers + buffer` jobs ahead of what was iterated over, whoever is slow."""
        read = given = furthest = 0

        def source() -> Iterator[int]:
            nonlocal read, furthest
            for number in range(30):
                read += 1
                furthest = max(furthest, read - given)
                yield number

        for pause in 0, 0.1, 10:
            read = given = furthest = 0
            async with WorkerGroup(sleepy, workers=workers, buffer=buffer) as group:
                jobs = agen(source()) if asynchronous else source()
                async for _ in group.map(jobs, ordered=ordered):
                    given += 1
                    await anyio.sleep(pause)
            assert given == 30
            assert workers <= furthest <= workers + buffer
            assert_nothing_left(group)

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_leaving_early_cancels_the_rest(self, ordered: bool) -> None:
        """Of an endless source too; the group is free for other work."""
        handler = Handler()

        def endless() -> Iterator[int]:
            number = 0
            while True:
                yield number
                number += 1

        async with WorkerGroup(handler, workers=2, buffer=3) as group:
            async with aclosing(group.map(endless(), ordered=ordered)) as values:
                async for value in values:
                    if value >= 5:
                        break
            await wait_all_tasks_blocked()
            assert group.statistics()[:5] == (2, 0, 0, 0, 0)
            assert await group.submit_nowait(1000) == 1000
        assert len(handler.started) < 15
        assert group.statistics().cancelled > 0
        assert group.leftover == ()
        assert_nothing_left(group)

    async def test_closing_before_the_first_step(self) -> None:
        """No job is handled, and iterating is over."""
        handler = Handler()
        async with WorkerGroup(handler) as group:
            values = group.map(range(5))
            await values.aclose()
            await values.aclose()
            assert [value async for value in values] == []
        assert handler.finished == []
        assert_nothing_left(group)

    @pytest.mark.parametrize("ordered", [True, False])
    async def test_the_first_failure_is_raised_and_cancels_the_rest(self, ordered: bool) -> None:
        """After the results before it."""

        async def handle(job: int) -> int:
            await anyio.sleep(job)
            if job == 3:
                raise ValueError(job)
            return job

        seen = []
        async with WorkerGroup(handle, workers=10) as group:
            with pytest.raises(ValueError, match=whole("3")):
                async for value in group.map([1, 2, 3, 4, 5], ordered=ordered):
                    seen.append(value)
            await wait_all_tasks_blocked()
            assert group.statistics()[:5] == (10, 0, 0, 0, 0)
        assert seen == [1, 2]
        assert group.statistics()[5:] == (2, 1, 2, 0)
        assert_nothing_left(group)

    async def test_in_order_the_first_failure_is_the_first_of_the_jobs(self) -> None:
        """Though another failed earlier."""

        async def handle(job: int) -> None:
            await anyio.sleep(job)
            raise ValueError(job)

        async with WorkerGroup(handle, workers=10) as group:
            with pytest.raises(ValueError, match=whole("2")):
                async for _ in group.map([2, 1]):
                    pass
            with pytest.raises(ValueError, match=whole("1")):
                async for _ in group.map([2, 1], ordered=False):
                    pass

    @pytest.mark.parametrize("ordered", [True, False])
    @pytest.mark.parametrize("asynchronous", [True, False])
    async def test_an_error_of_the_source_comes_after_the_results(self, ordered: bool, asynchronous: bool) -> None:
        """Of the jobs before it."""

        def source() -> Iterator[int]:
            yield from range(3)
            msg = "source"
            raise KeyError(msg)

        seen = []
        async with WorkerGroup(sleepy, workers=2) as group:
            with pytest.raises(KeyError, match=whole("'source'")):
                async for value in group.map(agen(source()) if asynchronous else source(), ordered=ordered):
                    seen.append(value)
        assert sorted(seen) == [0, 1, 2]
        assert_nothing_left(group)

    async def test_retries_are_invisible(self) -> None:
        """But for their time."""
        failed = set()

        async def handle(job: int) -> int:
            if job not in failed:
                failed.add(job)
                raise ValueError
            return job

        async with WorkerGroup(handle, workers=2, buffer=1, retry=Retry(2)) as group:
            assert [value async for value in group.map(range(20))] == list(range(20))
        assert group.statistics().retries == 20
        assert_nothing_left(group)

    async def test_what_is_not_iterable_is_refused(self) -> None:
        """At once, not at the first step."""
        async with WorkerGroup(echo) as group:
            with pytest.raises(TypeError, match=whole("jobs must be an iterable or asynchronous iterable, got 7")):
                group.map(7)  # type: ignore[arg-type]

    async def test_several_at_once(self) -> None:
        """They share the workers."""
        handler = Handler()
        sums = []

        async def total(jobs: range) -> None:
            sums.append(sum([value async for value in group.map(jobs)]))

        async with WorkerGroup(handler, workers=3, buffer=0) as group, anyio.create_task_group() as tasks:
            for number in range(4):
                tasks.start_soon(total, range(number * 10, number * 10 + 10))
        assert sorted(sums) == [45, 145, 245, 345]
        assert handler.most == 3
        assert_nothing_left(group)

    async def test_a_cancelled_iteration_cancels_the_rest(self) -> None:
        """As leaving it does."""
        async with WorkerGroup(sleepy, workers=2) as group:
            with anyio.move_on_after(2.5) as scope:
                async for _ in group.map(range(100)):
                    pass
            assert scope.cancelled_caught
            await wait_all_tasks_blocked()
            assert group.statistics()[:5] == (2, 0, 0, 0, 0)
        assert group.statistics().succeeded == 4
        assert_nothing_left(group)

    async def test_during_a_shutdown_it_ends_with_an_error(self) -> None:
        """The jobs that were taken give their results first."""
        seen: list[Any] = []
        errors: list[Any] = []

        async def consume() -> None:
            try:
                async for value in group.map(range(100)):
                    seen.append(value)
            except ClosedResourceError as error:
                errors.append(str(error))

        async with anyio.create_task_group() as tasks, WorkerGroup(sleepy, workers=1, buffer=2) as group:
            tasks.start_soon(consume)
            await anyio.sleep(1.5)
            assert await group.shutdown(100) == []
        assert seen == list(range(len(seen)))
        assert len(seen) == group.statistics().succeeded
        assert len(errors) == 1
        assert_nothing_left(group)

    @pytest.mark.parametrize("ending", ["normal", "error"])
    @pytest.mark.parametrize("ordered", [True, False])
    async def test_regression_a_half_read_map_does_not_hold_up_the_end(self, ending: str, ordered: bool) -> None:
        """Its generator may still be referred to when the block is left."""
        with anyio.fail_after(1000):
            with contextlib.suppress(KeyError):
                async with WorkerGroup(echo, workers=1, buffer=1) as group:
                    values = group.map(range(1000), ordered=ordered)
                    async for _ in values:
                        await wait_all_tasks_blocked()
                        if ending == "error":
                            raise KeyError
                        break
        await values.aclose()
        assert_nothing_left(group)

    @pytest.mark.parametrize("ending", ["cancellation", "error"])
    async def test_regression_stopping_ends_a_map_that_waits_for_its_source(self, ending: str) -> None:
        """Both the task that reads the source and the one that iterates elsewhere."""
        idle_source = Channel[int]()
        errors: list[Any] = []

        async def consume() -> None:
            try:
                async for _ in group.map(idle_source):
                    pass
            except (ClosedResourceError, ResultCancelledError) as error:
                errors.append(error)

        with anyio.fail_after(1000):
            async with anyio.create_task_group() as tasks:
                with anyio.CancelScope() as scope, contextlib.suppress(KeyError):
                    async with WorkerGroup(echo) as group:
                        tasks.start_soon(consume)
                        await wait_all_tasks_blocked()
                        if ending == "error":
                            raise KeyError
                        scope.cancel()
                        await anyio.sleep(1)
        assert len(errors) == 1
        assert_nothing_left(group)
        assert_at_rest(idle_source)

    async def test_regression_a_job_submitted_in_the_tick_of_the_break_is_cancelled(self) -> None:
        """The feeding task's job was taken, and before it ran on, the iteration was left.

        It waits to submit; a worker takes the job before, which makes room for its; and in the same tick, the
        iterating task closes.
        """
        started = []
        go_on = Event()
        gates = {"first": Event(), "other": Event()}

        async def source() -> AsyncGenerator[int, None]:
            yield 0
            await go_on.wait()
            for number in range(1, 10):
                yield number

        async def handle(job: Any) -> Any:
            started.append(job)
            if job in gates:
                await gates[job].wait()
                return job
            if job == 1:
                await values.aclose()
            if job != 0:
                await anyio.sleep(1000)
            return job

        async with WorkerGroup(handle, workers=1, buffer=1) as group, aclosing(source()) as jobs:
            values = group.map(jobs)
            assert await anext(values) == 0
            for job in gates:
                group.submit_nowait(job)
            go_on.set()
            for gate in gates.values():
                await wait_all_tasks_blocked()
                assert group.statistics()[:5] == (1, 1, 1, 0, 1)
                gate.set()
            await wait_all_tasks_blocked()
            figures = group.statistics()
        assert started[:4] == [0, "first", "other", 1]
        assert 3 not in started
        assert figures[:5] == (1, 0, 0, 0, 0)
        assert group.statistics().succeeded == 3
        assert_nothing_left(group)


async def test_map_that_another_thread_collects_is_stopped_in_the_loop() -> None:
    """The garbage collector may run anywhere: the jobs are cancelled, in the event loop."""
    async with WorkerGroup(sleepy, workers=1) as group:
        values = group.map(range(100))
        await anext(values)
        await anyio.to_thread.run_sync(values.__del__)
        await wait_all_tasks_blocked()
        assert values._feed.stopped
        assert group.statistics()[:5] == (1, 0, 0, 0, 0)
    assert_nothing_left(group)


class Double:
    async def __call__(self, number: int) -> int:
        return 2 * number


async def test_what_a_map_looks_like() -> None:
    """It says where it stands, and in a plain `for` what is missing."""
    async with WorkerGroup[int, int](Double(), workers=1, buffer=1) as group:
        results = group.map(range(5))
        assert repr(results) == "<MapIterator of Double: not started>"
        message = "a map's results come as they are ready: use `async for`, not `for`"
        with pytest.raises(TypeError, match=whole(message)):
            iter(results)
        assert await anext(results) == 0
        assert repr(results) == "<MapIterator of Double: 1 unfinished>"
        await results.aclose()
        assert repr(results) == "<MapIterator of Double: stopped>"
