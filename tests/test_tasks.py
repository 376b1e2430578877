"""The task service: submit now, ask later."""

from __future__ import annotations

import asyncio
import logging
import math
import sys
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from itertools import pairwise
from typing import Any

import anyio
import anyio.lowlevel
import attrs
import pytest
from anyio import (
    CancelScope,
    ClosedResourceError,
    Event,
    create_task_group,
    fail_after,
    move_on_after,
    sleep,
    wait_all_tasks_blocked,
)
from msgspec.structs import replace

from chanflow import Retry, set_checkpoint_interval
from chanflow.bus import StorageError, connect
from chanflow.bus.backends.memory import MemoryBackend
from chanflow.tasks import (
    ArgumentError,
    IdempotencyError,
    Progress,
    ProgressReport,
    ResultError,
    Store,
    TaskCancelledError,
    TaskFailedError,
    TaskRecord,
    TaskService,
    TaskStateError,
    TaskStatus,
    UnknownTaskError,
)
from chanflow.tasks.store import Change
from chanflow.tasks.stores.memory import MemoryStore
from tests.support.faulty_bus import Faulty, fail
from tests.support.messages import whole
from tests.support.tasks import double, serving

pytestmark = pytest.mark.anyio


async def failed(service: TaskService, task_id: str) -> TaskFailedError:
    with pytest.raises(TaskFailedError) as caught:
        await service.result(task_id)
    return caught.value


# The life of a task


async def test_submit_poll_result() -> None:
    """A task is pending, then running, then a success with its result, and its record says when."""
    go_on = Event()

    async def wait(word: str) -> list[str]:
        await go_on.wait()
        return [word, word]

    async with serving(wait, workers=1) as service:
        first, second = [await service.submit("wait", word=word) for word in ("a", "b")]
        assert first != second
        await wait_all_tasks_blocked()
        running, pending = await service.get(first), await service.get(second)
        assert (running.status, running.attempts, running.name) == (TaskStatus.RUNNING, 1, "wait")
        assert (pending.status, pending.attempts, pending.started_at) == (TaskStatus.PENDING, 0, None)
        assert pending.decode_arguments() == {"word": "b"}
        assert pending.decode_result() is None
        await sleep(10.0)
        go_on.set()
        assert await service.result(first) == ["a", "a"]
        assert await service.result(second) == ["b", "b"]
        done = await service.get(first)
        assert done.status is TaskStatus.SUCCESS
        assert done.finished_at is not None
        assert done.started_at is not None
        assert done.finished_at - done.started_at == pytest.approx(10.0, abs=0.1)
        assert done.decode_result() == ["a", "a"]


async def test_handlers_are_called_as_before() -> None:
    """A registered function is still that function."""
    service = TaskService()
    handler = service.task(double)
    assert await handler(3) == 6
    assert handler.__doc__ == "Double."
    assert repr(handler) == "<task 'double'>"
    named = service.task(name="another", timeout=1.0)(double)
    async with service:
        assert await service.result(await service.submit(named, number=4)) == 8
        assert await service.result(await service.submit(handler)) == 2


@dataclass
class Point:
    x: int
    y: float


@attrs.frozen
class Line:
    start: Point
    end: Point


async def test_typed_arguments_and_results() -> None:
    """Dataclasses, attrs and containers go in and come out as what the hints say; bytes and NaN are kept."""

    async def mirror(line: Line, words: set[str], data: bytes, number: float) -> tuple[Line, set[str], bytes, float]:
        assert isinstance(line.start, Point)
        assert isinstance(words, set)
        return Line(line.end, line.start), words, data, number

    line = Line(Point(1, 2.5), Point(3, -1.0))
    async with serving(mirror) as service:
        task_id = await service.submit("mirror", line=line, words={"a"}, data=b"\xff", number=math.nan)
        mirrored, words, data, number = await service.result(task_id)
        assert (mirrored, words, data) == (Line(line.end, line.start), {"a"}, b"\xff")
        assert math.isnan(number)


async def test_plain_functions_run_in_threads() -> None:
    """A sync handler is offloaded, and its result kept like any other's."""

    def join(words: list[str]) -> str:
        return anyio.from_thread.run_sync(" ".join, words)

    async with serving(join) as service:
        assert await service.result(await service.submit("join", words=["a", "b"])) == "a b"


@pytest.mark.parametrize("timeout", [None, 10.0])
async def test_each_attempt_has_its_own_context(timeout: float | None) -> None:
    """What a handler sets in a context variable, the next task of the same worker doesn't see."""
    seen: ContextVar[int] = ContextVar("seen", default=0)

    async def look(number: int) -> int:
        before = seen.get()
        seen.set(number)
        await sleep(1.0)
        assert seen.get() == number
        return before

    service = TaskService(workers=1)
    handler = service.task(timeout=timeout)(look)
    seen.set(-1)
    async with service:
        ids = [await service.submit(handler, number=number) for number in (1, 2, 3)]
        assert [await service.result(task_id) for task_id in ids] == [-1, -1, -1]
    assert seen.get() == -1


async def test_progress() -> None:
    """What a handler reports is in its record."""
    go_on = Event()

    async def count(upto: int, progress: Progress) -> None:
        for number in range(upto):
            await progress.update(number, upto, f"number {number}")
            if number == 2:
                await go_on.wait()
        for done, total, message, error in (
            (-1, 1, "", "done must be from 0 to total, and total > 0, got -1 of 1"),
            (2, 1, "", "done must be from 0 to total, and total > 0, got 2 of 1"),
            (0, 0, "", "done must be from 0 to total, and total > 0, got 0 of 0"),
            ("1", 1, "", "done must be a number, got '1'"),
            (1, True, "", "total must be a number, got True"),
            (1, 1, 5, "message must be a str, got 5"),
        ):
            with pytest.raises((TypeError, ValueError), match=whole(error)):
                await progress.update(done, total, message)  # type: ignore[arg-type]

    async with serving(count) as service:
        task_id = await service.submit("count", upto=5)
        await wait_all_tasks_blocked()
        assert (await service.get(task_id)).progress == ProgressReport(2, 5, "number 2")
        go_on.set()
        await service.result(task_id)
        assert (await service.get(task_id)).progress == ProgressReport(4, 5, "number 4")


# Failure


async def test_a_failure_is_told_without_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """The record has the class and the message; the log has the traceback."""

    async def broken() -> None:
        msg = "out of order"
        raise ValueError(msg)

    async with serving(broken) as service:
        task_id = await service.submit("broken")
        error = await failed(service, task_id)
        assert str(error) == "broken failed: ValueError: out of order"
        record = await service.get(task_id)
        assert error.record == record
        assert (record.status, record.error_type, record.error_message) == (
            TaskStatus.FAILED,
            "ValueError",
            "out of order",
        )
    [entry] = caplog.records
    assert entry.message == f"broken, task {task_id}, failed"
    assert entry.exc_info is not None


async def test_retries(caplog: pytest.LogCaptureFixture) -> None:
    """A failed attempt is made again after its backoff, as often as said; attempts are counted."""
    service = TaskService()

    @service.task(retry=Retry(3, delay=10.0, factor=2.0, jitter=0))
    async def flaky(succeed_at: int) -> int:
        attempts.append(anyio.current_time())
        if len(attempts) < succeed_at:
            msg = "not yet"
            raise ValueError(msg)
        return len(attempts)

    for succeed_at, status in ((3, TaskStatus.SUCCESS), (4, TaskStatus.FAILED)):
        attempts: list[float] = []
        async with service:
            task_id = await service.submit(flaky, succeed_at=succeed_at)
            await sleep(5.0)
            waiting = await service.get(task_id)
            assert (waiting.status, waiting.attempts, waiting.error_type) == (TaskStatus.PENDING, 1, "ValueError")
            record = await service.wait(task_id)
            assert (record.status, record.attempts) == (status, 3)
            assert [after - before for before, after in pairwise(attempts)] == pytest.approx([10.0, 20.0], abs=0.1)
            assert (record.error_type is None) == (status is TaskStatus.SUCCESS)


async def test_an_error_in_the_retry_fails_the_task() -> None:
    """A function that should tell whether an error is worth a retry, and fails, ends the attempts."""
    service = TaskService()

    def on(error: Exception) -> bool:
        msg = "second"
        raise KeyError(msg)

    @service.task(retry=Retry(3, on=on))
    async def broken() -> None:
        msg = "first"
        raise ValueError(msg)

    async with service:
        error = await failed(service, await service.submit(broken))
        assert (error.record.error_type, error.record.attempts) == ("KeyError", 1)


async def test_timeout() -> None:
    """An attempt that takes too long is cancelled, and has failed."""
    service = TaskService()

    @service.task(timeout=5.0)
    async def slow(seconds: float) -> str:
        await sleep(seconds)
        return "done"

    async with service:
        assert await service.result(await service.submit(slow, seconds=4.9)) == "done"
        error = await failed(service, await service.submit(slow, seconds=5.1))
        assert str(error) == "slow failed: TimeoutError: the handler took longer than 5.0 s"


async def test_a_result_that_cannot_be_stored() -> None:
    """It fails the task, and says why."""

    async def strange() -> Any:
        return object()

    async with serving(strange) as service:
        error = await failed(service, await service.submit("strange"))
        assert str(error) == (
            "strange failed: ResultError: the result of strange can't be stored:"
            " Encoding objects of type object is unsupported"
        )
        assert issubclass(ResultError, TypeError)


# Cancelling


async def test_cancelling_a_pending_task() -> None:
    """It is cancelled at once, and never begun."""
    async with serving(double) as service:
        task_id = await service.submit("double", delay=10.0)
        waiting = Event()

        async def wait() -> None:
            with pytest.raises(TaskCancelledError, match=whole("double was cancelled")):
                await service.result(task_id)
            waiting.set()

        async with create_task_group() as tasks:
            tasks.start_soon(wait)
            await wait_all_tasks_blocked()
            assert (await service.cancel(task_id)).status is TaskStatus.CANCELLED
            with fail_after(1.0):
                await waiting.wait()
        await sleep(20.0)
        record = await service.get(task_id)
        assert (record.status, record.attempts) == (TaskStatus.CANCELLED, 0)
        assert await service.cancel(task_id) == record


async def test_cancelling_a_running_task() -> None:
    """Its handler is cancelled; what it does about that is its business."""
    cleaned: list[str] = []

    async def endless() -> None:
        try:
            await sleep(math.inf)
        finally:
            cleaned.append("cleaned")

    async def stubborn() -> str:
        with CancelScope(shield=True):
            await sleep(5.0)
        return "done all the same"

    async with serving(endless, stubborn) as service:
        ids = [await service.submit(name) for name in ("endless", "stubborn")]
        await wait_all_tasks_blocked()
        for task_id in ids:
            assert (await service.cancel(task_id)).status is TaskStatus.RUNNING
        assert (await service.wait(ids[0])).status is TaskStatus.CANCELLED
        assert cleaned == ["cleaned"]
        assert (await service.wait(ids[1])).status in {TaskStatus.CANCELLED, TaskStatus.SUCCESS}


async def test_a_cancellation_is_one_tasks() -> None:
    """The same worker runs the next task, after one that was cancelled and one that ended in spite of that."""
    others: list[str] = []
    begun: list[int] = []
    service = TaskService(workers=3)

    @service.task
    async def cancelled(progress: Progress) -> None:
        await progress.update(1)
        await sleep(math.inf)

    @service.task
    async def in_vain() -> str:
        # It ends without waiting for anything after its cancellation.
        await service.cancel(others[0])
        return "in vain"

    @service.task
    async def after(number: int) -> int:
        begun.append(number)
        await anyio.lowlevel.checkpoint()
        return number

    async with service:
        first = await service.submit(cancelled)
        others.append(await service.submit(in_vain))
        others += [await service.submit(after, number=number) for number in range(3)]
        async for record in service.watch(first):
            if record.progress is not None:
                await service.cancel(first)
        assert (await service.get(first)).status is TaskStatus.CANCELLED
        assert [await service.result(task_id) for task_id in others] == ["in vain", 0, 1, 2]
    assert begun == [0, 1, 2]


async def test_cancellation_asked_for_elsewhere() -> None:
    """A task hears within a heartbeat of a cancellation that another process asked for."""
    store = MemoryStore()

    async def endless() -> None:
        await sleep(math.inf)

    async with serving(endless, store=store) as service:
        task_id = await service.submit("endless")
        await wait_all_tasks_blocked()
        await store.change(task_id, lambda record: replace(record, cancel_requested=True))
        with fail_after(2.0):
            assert (await service.wait(task_id)).status is TaskStatus.CANCELLED


async def test_cancellation_asked_for_while_its_worker_died() -> None:
    """The next worker cancels it, without another attempt."""
    store = MemoryStore()
    async with serving(double, store=store, workers=0) as front:
        task_id = await front.submit("double")
        await store.change(
            task_id,
            lambda record: replace(
                record,
                status=TaskStatus.RUNNING,
                worker="dead",
                lease_until=record.created_at,
                attempts=1,
                cancel_requested=True,
            ),
        )
    async with serving(double, store=store) as service:
        with fail_after(1.0):
            record = await service.wait(task_id)
        assert (record.status, record.attempts) == (TaskStatus.CANCELLED, 1)


async def test_a_lost_task_that_ends_meanwhile_changes_nothing() -> None:
    """What a worker did with a task that another has by now does not become its result."""
    store, go_on = MemoryStore(), Event()

    async def wait() -> str:
        await go_on.wait()
        return "done"

    async with serving(wait, store=store) as service:
        task_id = await service.submit("wait")
        await wait_all_tasks_blocked()
        await store.change(task_id, lambda record: replace(record, worker="another"))
        go_on.set()
        await sleep(0.1)
        record = await service.get(task_id)
        assert (record.status, record.worker, record.result) == (TaskStatus.RUNNING, "another", None)
        await store.change(task_id, lambda record: replace(record, status=TaskStatus.FAILED))


async def test_a_task_that_ends_while_its_lease_is_renewed() -> None:
    """A renewal that comes too late is no error."""
    store = MemoryStore()
    change_many = store.change_many

    async def slow_change(changes: Any) -> Any:
        await sleep(1.0)
        return await change_many(changes)

    async def short() -> str:
        await sleep(1.5)
        return "done"

    store.change_many = slow_change  # type: ignore[method-assign]
    async with serving(short, store=store) as service:
        assert await service.result(await service.submit("short")) == "done"
        await sleep(5.0)


async def test_a_lost_task_is_left_to_the_other(caplog: pytest.LogCaptureFixture) -> None:
    """A worker whose lease ran out stops, and what it had done counts for nothing."""
    store = MemoryStore()

    async def endless() -> None:
        await sleep(math.inf)

    async with serving(endless, store=store) as service:
        task_id = await service.submit("endless")
        await wait_all_tasks_blocked()
        await store.change(task_id, lambda record: replace(record, worker="another"))
        await sleep(2.0)
        record = await service.get(task_id)
        assert (record.status, record.worker) == (TaskStatus.RUNNING, "another")
        assert "took its worker too long to renew its lease" in caplog.text
        await store.change(task_id, lambda record: replace(record, status=TaskStatus.FAILED))


async def test_running_a_failed_task_again() -> None:
    """`retry` starts over with a task that failed or was cancelled, and refuses others."""
    broken = True

    async def flaky() -> str:
        if broken:
            msg = "broken"
            raise ValueError(msg)
        return "done"

    async with serving(flaky) as service:
        task_id = await service.submit("flaky")
        await failed(service, task_id)
        broken = False
        again = await service.retry(task_id)
        assert (again.status, again.attempts, again.error_type) == (TaskStatus.PENDING, 0, None)
        assert await service.result(task_id) == "done"
        with pytest.raises(
            TaskStateError,
            match=whole("only a task that failed or was cancelled can be retried; this one is success"),
        ):
            await service.retry(task_id)
        with pytest.raises(UnknownTaskError):
            await service.retry("no such task")


# Delay, expiry, keys


async def test_delay() -> None:
    """A task is not begun before its delay is over."""
    async with serving(double) as service:
        task_id = await service.submit("double", number=2, delay=100.0)
        await sleep(99.0)
        assert (await service.get(task_id)).status is TaskStatus.PENDING
        with fail_after(2.0):
            assert await service.result(task_id) == 4


async def test_expiry() -> None:
    """A finished task is gone after `ttl` seconds, and leaves no memory behind; a pending one stays."""
    store = MemoryStore()
    async with serving(double, store=store, ttl=100.0) as service:
        ids = [await service.submit("double") for _ in range(10)]
        waiting = await service.submit("double", delay=1000.0)
        for task_id in ids:
            await service.result(task_id)
        await sleep(99.0)
        assert (await service.get(ids[0])).status is TaskStatus.SUCCESS
        await sleep(2.0)
        for call in service.get, service.result, service.cancel, service.wait, service.retry:
            with pytest.raises(UnknownTaskError, match=whole(f"there is no task {ids[0]!r}, or it has expired")):
                await call(ids[0])
        await sleep(60.0)
        assert list(store._records) == [waiting]
        await service.cancel(waiting)


async def test_memory_goes_down_after_expiry() -> None:
    """Neither store nor bus keeps anything of tasks that have expired."""

    async def echo(text: str) -> str:
        return text

    async def run_many(service: TaskService) -> None:
        for number in range(1000):
            await service.result(await service.submit("echo", text=f"{number:01000}", idempotency_key=str(number)))

    async with serving(echo, ttl=100.0) as service:
        # What the first round leaves behind is made once.
        await run_many(service)
        await sleep(200.0)
        tracemalloc.start()
        try:
            await run_many(service)
            full, _ = tracemalloc.get_traced_memory()
            await sleep(200.0)
            left, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        # The arguments and results alone were 2 MB.
        assert full > 2_000_000
        assert left < 150_000


async def test_idempotency_key() -> None:
    """A second submission with a key is the first one's task; for anything else, the key is refused."""
    async with serving(double, ttl=100.0) as service:
        first = await service.submit("double", number=1, idempotency_key="key")
        assert await service.submit("double", number=1, idempotency_key="key") == first
        message = whole(f"idempotency key 'key' was used for another task: double {first}")
        with pytest.raises(IdempotencyError, match=message):
            await service.submit("double", number=2, idempotency_key="key")
        await service.result(first)
        assert await service.submit("double", number=1, idempotency_key="key") == first
        await sleep(101.0)
        second = await service.submit("double", number=2, idempotency_key="key")
        assert second != first
        assert await service.result(second) == 4


# Looking around


async def test_pages_and_counts() -> None:
    """Tasks are listed from the newest on, page by page, and by status, and counted."""
    async with serving(double) as service:
        ids = [await service.submit("double") for _ in range(5)]
        for task_id in ids:
            await service.result(task_id)
        waiting = await service.submit("double", delay=100.0)
        first = await service.page(limit=4)
        assert [record.id for record in first] == [waiting, *reversed(ids[2:])]
        rest = await service.page(limit=4, after=first[-1].id)
        assert [record.id for record in rest] == [ids[1], ids[0]]
        assert [record.id for record in await service.page(status=TaskStatus.PENDING)] == [waiting]
        counts = await service.count()
        assert (counts[TaskStatus.SUCCESS], counts[TaskStatus.PENDING]) == (5, 1)
        with pytest.raises(ValueError, match=whole("limit must be >= 1, got 0")):
            await service.page(limit=0)
        await service.cancel(waiting)


# Beginning and end


async def test_leaving_waits_for_what_runs(caplog: pytest.LogCaptureFixture) -> None:
    """What runs comes to its end; what is pending is told of if it ends with the memory it is in."""
    done: list[int] = []

    async def slow(number: int) -> None:
        await sleep(10.0)
        done.append(number)

    async with serving(slow, workers=2) as service:
        for number in range(5):
            await service.submit("slow", number=number)
        await wait_all_tasks_blocked()
    assert sorted(done) == [0, 1]
    assert [record.message for record in caplog.records] == [
        "3 task(s) were not at their end, and end with the memory that they were in"
    ]


async def test_shutdown_puts_back_what_takes_longer() -> None:
    """After its timeout, what runs is cancelled and pending again, without having lost an attempt."""

    async def endless() -> None:
        await sleep(math.inf)

    async with serving(endless, double) as service:
        task_id = await service.submit("endless")
        await wait_all_tasks_blocked()
        with fail_after(6.0):
            await service.shutdown(5.0)
        record = await service.get(task_id)
        assert (record.status, record.attempts, record.worker) == (TaskStatus.PENDING, 0, None)
        # It still takes what is submitted, for others to run.
        assert (await service.get(await service.submit("double"))).status is TaskStatus.PENDING
        with pytest.raises(ValueError, match=whole("timeout must be >= 0, got -1")):
            await service.shutdown(-1)


@pytest.mark.parametrize("how", ["error", "cancelled"])
async def test_an_error_or_a_cancellation_stops_at_once(how: str) -> None:
    """What runs is put back; an error leaves the block as it is."""
    store = MemoryStore()

    async def endless() -> None:
        await sleep(math.inf)

    async def run_and_fail() -> None:
        async with serving(endless, store=store) as service:
            await service.submit("endless")
            await wait_all_tasks_blocked()
            raise KeyError("boom")  # noqa: EM101 -- it is only to be seen again

    with fail_after(10.0):
        if how == "error":
            with pytest.raises(KeyError, match="boom"):
                await run_and_fail()
        else:
            with move_on_after(5.0) as scope:
                async with serving(endless, store=store) as service:
                    await service.submit("endless")
                    await sleep(math.inf)
            assert scope.cancelled_caught
    [record] = store._records.values()
    assert (record.status, record.attempts) == (TaskStatus.PENDING, 0)


async def test_putting_back_takes_a_while() -> None:
    """A service that is cut off waits until what ran is put back."""
    store = MemoryStore()
    change_many = store.change_many

    async def slow_change(changes: Any) -> Any:
        await sleep(1.0)
        return await change_many(changes)

    async def endless() -> None:
        await sleep(math.inf)

    with move_on_after(0.5):
        async with serving(endless, store=store) as service:
            await service.submit("endless")
            await wait_all_tasks_blocked()
            store.change_many = slow_change  # type: ignore[method-assign]
            await sleep(math.inf)
    [record] = store._records.values()
    assert (record.status, record.attempts) == (TaskStatus.PENDING, 0)


@pytest.mark.parametrize("away", [False, True])
async def test_regression_cut_off_while_a_task_is_settled(*, away: bool) -> None:
    """What came of it is kept, though its worker is cancelled before the store has answered, or while it is away."""
    store = MemoryStore()
    real_change = store.change

    async def slow_change(task_id: str, change: Change) -> TaskRecord | None:
        del task_id, change
        store.change = real_change  # type: ignore[method-assign]
        if away:
            msg = "the store is away"
            raise StorageError(msg)
        await sleep(math.inf)
        raise AssertionError

    with move_on_after(0.5):
        async with serving(double, store=store) as service:
            store.change = slow_change  # type: ignore[method-assign]
            await service.submit("double")
            await sleep(math.inf)
    [record] = store._records.values()
    assert (record.status, record.attempts) == (TaskStatus.SUCCESS, 1)


async def test_cut_off_while_a_task_waits_for_a_worker() -> None:
    """What no worker had taken yet is given back as it came."""
    store, backend = MemoryStore(), MemoryBackend(max_pending=math.inf, retention=0.0)

    async def endless() -> None:
        await sleep(math.inf)

    with move_on_after(5.0):
        async with serving(endless, double, store=store, bus=connect(backend), workers=1) as service:
            await service.submit("endless")
            await wait_all_tasks_blocked()
            await service.submit("double")
            await sleep(math.inf)
    assert [(record.status, record.attempts) for record in store._records.values()] == [(TaskStatus.PENDING, 0)] * 2
    [entry] = backend.topic("tasks.double").groups["workers"].entries.values()
    assert entry.due is None


async def test_what_a_lost_task_says_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Neither its progress nor its failure counts once another worker has the task."""
    store = MemoryStore()
    go_on = Event()

    async def lost(progress: Progress) -> None:
        await go_on.wait()
        await progress.update(1, 2)
        msg = "too late"
        raise ValueError(msg)

    service = TaskService(store=store)
    handler = service.task(retry=Retry(3))(lost)
    async with service:
        task_id = await service.submit(handler)
        await wait_all_tasks_blocked()
        taken = await store.change(task_id, lambda record: replace(record, worker="another"))
        go_on.set()
        await wait_all_tasks_blocked()
        assert await service.get(task_id) == taken
        await service.shutdown(0)
    assert "too late" in caplog.text


def test_a_record_shows_neither_arguments_nor_result() -> None:
    """They may be long, or a secret."""
    record = TaskRecord(id="1", name="work", arguments=b"secret", result=b"secret", created_at=1.0, run_at=2.0)
    assert repr(record) == (
        "TaskRecord(id='1', name='work', status=<TaskStatus.PENDING: 'pending'>, attempts=0, created_at=1.0, "
        "run_at=2.0, priority=0, cancel_requested=False)"
    )


async def test_a_service_that_only_submits() -> None:
    """Without workers, tasks wait in the store for another service on the same bus and store."""
    backend, store = MemoryBackend(max_pending=math.inf, retention=0.0), MemoryStore()
    async with serving(double, bus=connect(backend), store=store, workers=0) as front:
        task_id = await front.submit("double", number=5)
        await sleep(100.0)
        assert (await front.get(task_id)).status is TaskStatus.PENDING
    async with serving(double, bus=connect(backend), store=store) as back:
        with fail_after(1.0):
            assert await back.result(task_id) == 10


async def test_a_handler_that_another_service_has() -> None:
    """A worker is not told of tasks that it doesn't know, and one that does has them at once."""
    backend, store = MemoryBackend(max_pending=math.inf, retention=0.0), MemoryStore()

    async def other() -> str:
        return "done"

    async with serving(double, bus=connect(backend), store=store) as unknowing:
        async with serving(other, bus=connect(backend), store=store, workers=0) as front:
            task_id = await front.submit("other")
            await sleep(10.0)
            assert (await front.get(task_id)).attempts == 0
        async with serving(other, bus=connect(backend), store=store) as knowing:
            with fail_after(1.0):
                assert await knowing.result(task_id) == "done"
            assert (await unknowing.get(task_id)).attempts == 1


async def test_workers_are_shared_by_all_handlers() -> None:
    """No more tasks run than there are workers, whatever their handlers; and each handler gets its turn."""
    running = most = 0
    done: list[str] = []

    async def run(name: str) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await sleep(10.0)
        running -= 1
        done.append(name)

    service = TaskService(workers=2, lease=30.0)
    names = [f"handler {number}" for number in range(4)]
    for name in names:
        service.task(name=name)(partial(run, name))
    async with service:
        ids = [await service.submit(name) for _ in range(5) for name in names]
        for task_id in ids:
            assert (await service.wait(task_id)).attempts == 1
        assert most == 2
        assert sorted(done) == sorted(names * 5)
        assert set(done[:8]) == set(names)


async def test_a_busy_service_holds_nothing_that_others_could_run() -> None:
    """While its workers run another handler's tasks, an idle service that shares the store runs the rest at once."""

    async def slow() -> None:
        await sleep(1000.0)

    store = MemoryStore()
    async with serving(slow, double, store=store, workers=4) as busy:
        for _ in range(4):
            await busy.submit("slow")
        await sleep(1.0)
        ids = [await busy.submit("double", number=number) for number in range(4)]
        async with serving(double, store=store) as idle:
            with fail_after(1.0):
                assert [await idle.result(task_id) for task_id in ids] == [0, 2, 4, 6]
        await busy.shutdown(0.0)


async def test_what_waits_for_a_worker_goes_to_others_at_the_stop() -> None:
    """A service that stops keeps its running tasks, but none that waits for a worker behind them."""

    async def slow() -> None:
        await sleep(100.0)

    async def quick() -> str:
        return "done"

    backend, store = MemoryBackend(max_pending=math.inf, retention=0.0), MemoryStore()
    async with serving(slow, quick, bus=connect(backend), store=store, workers=1) as stopping:
        await stopping.submit("slow")
        await sleep(1.0)
        task_id = await stopping.submit("quick")
        await sleep(1.0)
        async with create_task_group() as tasks, serving(quick, bus=connect(backend), store=store) as other:
            await sleep(1.0)
            assert (await other.get(task_id)).status is TaskStatus.PENDING
            tasks.start_soon(stopping.shutdown)
            with fail_after(2.0):
                assert await other.result(task_id) == "done"


async def test_stopping_in_the_moment_in_which_a_task_ended() -> None:
    """A worker that has just yielded to the event loop hears of the stop, too."""
    set_checkpoint_interval(1)
    try:
        with fail_after(5.0):
            for _ in range(3):
                async with serving(double, workers=3) as service:
                    assert await service.result(await service.submit("double", number=1)) == 2
    finally:
        set_checkpoint_interval()


async def test_what_is_just_being_taken_up_is_put_back_at_the_cut() -> None:
    """A shutdown does not wait for a task that was claimed after its time was over."""

    class Slow(MemoryStore):
        async def change(self, task_id: str, change: Any) -> Any:
            await sleep(1.0)
            return await super().change(task_id, change)

    async def endless() -> None:
        await sleep(math.inf)

    async with serving(endless, store=Slow()) as service:
        task_id = await service.submit("endless")
        await wait_all_tasks_blocked()
        with fail_after(3.0):
            await service.shutdown(0.5)
        record = await service.get(task_id)
        assert (record.status, record.attempts) == (TaskStatus.PENDING, 0)


@pytest.mark.parametrize("end", ["error", "cancelled"])
async def test_a_shutdown_elsewhere_ends_with_the_block(end: str) -> None:
    """Whoever waits for the tasks that run is not left waiting when the block is left at once."""

    async def endless() -> None:
        await sleep(math.inf)

    with fail_after(5.0):
        async with create_task_group() as tasks:
            with CancelScope() as scope, suppress(ValueError):
                async with serving(endless) as service:
                    await service.submit("endless")
                    await wait_all_tasks_blocked()
                    tasks.start_soon(service.shutdown)
                    await wait_all_tasks_blocked()
                    if end == "error":
                        raise ValueError
                    scope.cancel()
                    await sleep(math.inf)


async def test_a_handler_that_waits_for_what_somebody_cancelled(backend: str) -> None:
    """On asyncio it gets a cancellation from there, which nobody asked for: the task fails, and its worker goes on."""
    if backend != "asyncio":
        pytest.skip("trio has no futures")

    async def stray() -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    async with serving(stray, double, workers=1) as service:
        error = await failed(service, await service.submit("stray"))
        assert error.record.error_type == "RuntimeError"
        with fail_after(1.0):
            assert await service.result(await service.submit("double", number=1)) == 2


async def test_stopping_while_it_begins() -> None:
    """A service that is left while it is still subscribing comes to its end."""

    async def slow() -> None:
        await sleep(5.0)

    with fail_after(10.0):
        async with serving(double, bus=connect(Faulty(join=slow))):
            await wait_all_tasks_blocked()


@pytest.mark.parametrize("store", ["memory", "shared memory"])
async def test_waiting_for_a_task_while_the_service_closes(store: str) -> None:
    """Whoever waits for the end of a task that won't come any more is told so."""
    kept = MemoryStore()
    kept.shared = store == "shared memory"
    service = TaskService(store=kept)
    service.task(double)

    async def wait(task_id: str) -> None:
        with pytest.raises(
            ClosedResourceError, match=whole("the task service is closed, or its block was not entered")
        ):
            await service.result(task_id)

    with fail_after(10.0):
        async with create_task_group() as tasks, service:
            task_id = await service.submit("double", delay=100.0)
            tasks.start_soon(wait, task_id)
            tasks.start_soon(wait, task_id)
            await wait_all_tasks_blocked()
    assert not service._watches


async def test_stopping_while_a_task_waits_for_its_turn() -> None:
    """A task that was not begun when the service stopped is still pending."""

    async def slow() -> None:
        await sleep(10.0)

    async with serving(slow, double, workers=1) as service:
        first = await service.submit("slow")
        await wait_all_tasks_blocked()
        second = await service.submit("double")
        await wait_all_tasks_blocked()
        await service.shutdown()
        assert (await service.get(first)).status is TaskStatus.SUCCESS
        record = await service.get(second)
        assert (record.status, record.attempts) == (TaskStatus.PENDING, 0)
        with pytest.raises(RuntimeError, match=whole("tasks must be registered before the service's block is entered")):
            service.task(slow)


async def test_a_bus_that_is_away_when_a_task_is_submitted(caplog: pytest.LogCaptureFixture) -> None:
    """The task is in the store, and is published once the bus is there again."""
    store, backend = MemoryStore(), MemoryBackend(max_pending=math.inf, retention=0.0)
    publish = backend.publish

    async def cut_off(_content: Any) -> str:
        msg = "the bus is away"
        raise StorageError(msg)

    async with serving(double, bus=connect(backend), store=store) as service:
        backend.publish = cut_off  # type: ignore[method-assign, assignment]
        task_id = await service.submit("double", number=3)
        await sleep(10.0)
        assert (await service.get(task_id)).status is TaskStatus.PENDING
        backend.publish = publish  # type: ignore[method-assign]
        with fail_after(2.0):
            assert await service.result(task_id) == 6
    assert "publishing failed, and is tried again in 1 s: the bus is away" in caplog.text


async def test_a_full_bus_holds_up_nobody() -> None:
    """Submitting does not wait for the bus, and what is over takes no room in it for good."""
    store, bus = MemoryStore(), connect("memory://", max_pending=5)
    async with serving(double, bus=bus, store=store, workers=0) as front:
        with fail_after(1.0):
            ids = [await front.submit("double", number=number) for number in range(50)]
            for task_id in ids[:25]:
                await front.cancel(task_id)
    async with serving(double, bus=connect("memory://", max_pending=5), store=store, workers=2) as service:
        with fail_after(400.0):
            assert [await service.result(task_id) for task_id in ids[25:]] == [number * 2 for number in range(25, 50)]


@pytest.mark.parametrize(
    ("bus", "store", "is_named"),
    [
        ("memory://", "memory://", False),
        ("memory://", "sqlite:///tasks.db", False),
        ("sqlite:///tasks.db", "sqlite:///tasks.db", False),
        ("sqlite:///./directory/../tasks.db", "sqlite:///tasks.db", False),
        ("redis://127.0.0.1:1", "redis://127.0.0.1:1", False),
        ("sqlite:///messages.db", "sqlite:///tasks.db", True),
        ("sqlite:///tasks.db", "redis://127.0.0.1:1", True),
        ("sqlite:///tasks.db", MemoryStore(), True),
        (connect("memory://"), "memory://", True),
    ],
)
def test_who_names_a_bus(bus: Any, store: Any, is_named: bool) -> None:  # noqa: FBT001 -- a parameter
    """Tasks travel through a bus if one is named that is not the store itself."""
    service = TaskService(bus=bus, store=store)
    assert service._uses_bus is is_named
    # There is one for other messages in any case.
    assert service.bus.capabilities.durable == (isinstance(bus, str) and bus.startswith("sqlite:"))


async def test_many_tasks_through_a_bus() -> None:
    """They are published a part at a time."""
    service = TaskService(bus=connect(MemoryBackend(max_pending=math.inf, retention=0.0)), workers=3)
    service.task(double)
    async with service:
        ids = await service.submit_many("double", [{"number": number} for number in range(250)])
        with fail_after(10.0):
            assert [await service.result(task_id) for task_id in ids] == [number * 2 for number in range(250)]


async def test_a_store_that_does_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    """A claim is given up after a while, and made again."""
    store = MemoryStore()
    claim = store.claim

    async def never(*_arguments: Any, **_options: Any) -> Any:
        await sleep(math.inf)

    store.claim = never  # type: ignore[method-assign]
    async with serving(double, store=store) as service:
        task_id = await service.submit("double")
        await sleep(20.0)
        store.claim = claim  # type: ignore[method-assign]
        with fail_after(20.0):
            assert await service.result(task_id) == 2
    assert "the store failed, and is tried again in 1 s: the store has not answered for 30 s" in caplog.text


async def test_what_cannot_be_put_back_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A store that fails when the service is cut off leaves the task to its lease, with or without a result."""
    store = MemoryStore()
    change, change_many = store.change, store.change_many

    async def endless() -> None:
        await sleep(math.inf)

    async with serving(endless, store=store) as service:
        await service.submit("endless")
        await wait_all_tasks_blocked()
        store.change_many = fail  # type: ignore[method-assign]
        await service.shutdown(0.0)
        store.change_many = change_many  # type: ignore[method-assign]
    assert "1 task(s) could not be put back: the disk is gone" in caplog.text

    async def stubborn() -> str:
        with CancelScope(shield=True):
            await sleep(5.0)
        return "done"

    async with serving(stubborn) as service:
        task_id = await service.submit("stubborn")
        await wait_all_tasks_blocked()
        service._store.change = fail  # type: ignore[method-assign]
        await service.shutdown(1.0)
    assert f"task {task_id} could not be settled: the disk is gone" in caplog.text
    store.change = change  # type: ignore[method-assign]


async def test_a_store_whose_news_cannot_be_heard() -> None:
    """A service is not entered then, and closes what it has opened; it can be entered later."""

    class Deaf(MemoryStore):
        deaf = True

        async def news(self, *arguments: Any, **options: Any) -> None:
            if self.deaf:
                await fail()
            await super().news(*arguments, **options)

    store = Deaf()
    service = TaskService(store=store)
    service.task(double)
    with pytest.raises(StorageError, match="the disk is gone"):
        await service.__aenter__()
    store.deaf = False
    async with service:
        assert await service.result(await service.submit("double")) == 2


def test_the_clock_of_a_store_that_has_none_of_its_own() -> None:
    """It is the machine's."""
    assert Store.now(MemoryStore()) == pytest.approx(time.time(), abs=10.0)


async def test_a_full_topic_holds_up_no_other_handler() -> None:
    """While one handler's messages wait for somebody, another's are published."""

    async def nobodys() -> None: ...

    store = MemoryStore()
    bus = connect("memory://", max_pending=2)
    async with serving(double, nobodys, bus=bus, store=store, workers=0) as front:
        await front.submit_many("nobodys", [{}] * 10)
        await sleep(10.0)
        task_id = await front.submit("double")
        await sleep(1.0)
        assert (await store.get(task_id, store.now())).published_at is not None  # type: ignore[union-attr]


async def test_a_delayed_task_is_published_when_it_is_due() -> None:
    """Until then, and after a failed attempt until the next one, it is in the store alone."""
    backend = MemoryBackend(max_pending=math.inf, retention=0.0)
    published: list[tuple[float, bytes]] = []
    publish = backend.publish

    async def note(content: Any) -> str:
        published.append((anyio.current_time(), content.body))
        return await publish(content)

    backend.publish = note  # type: ignore[method-assign]
    service = TaskService(bus=connect(backend))

    @service.task(retry=Retry(2, delay=50.0, jitter=0))
    async def flaky() -> str:
        if len(published) == 1:
            raise ValueError
        return "done"

    async with service:
        task_id = await service.submit(flaky, delay=100.0)
        assert await service.result(task_id) == "done"
        assert [body for _, body in published] == [task_id.encode()] * 2
        assert [at for at, _ in published] == pytest.approx([100.0, 150.0], abs=1.0)


async def test_a_message_whose_task_is_elsewhere() -> None:
    """It is acknowledged and forgotten: its task runs, is over or has another time, or there is none."""
    backend, store = MemoryBackend(max_pending=math.inf, retention=0.0), MemoryStore()
    bus = connect(backend)

    async def endless() -> None:
        await sleep(math.inf)

    async with serving(endless, double, bus=bus, store=store) as service:
        running = await service.submit("endless")
        over = await service.submit("double")
        await service.result(over)
        later = await service.submit("double", delay=100.0)
        for topic, task_id in ("endless", running), ("double", over), ("double", later), ("double", "unknown"):
            await bus.publish(f"tasks.{topic}", task_id.encode())
        await bus.publish("tasks.double", b"\xff")
        await sleep(1.0)
        assert [len(backend.topic(f"tasks.{name}").groups["workers"].entries) for name in ("endless", "double")] == [
            0,
            0,
        ]
        assert (await service.get(later)).status is TaskStatus.PENDING
        await service.shutdown(0.0)


@pytest.mark.parametrize("bus", ["no bus", "bus"])
async def test_a_limit_for_a_handler(bus: str) -> None:
    """No more of its tasks run at the same time, in all services together; those of others are not held up."""
    store, backend = MemoryStore(), MemoryBackend(max_pending=math.inf, retention=0.0)
    running = most = 0

    async def scarce() -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await sleep(10.0)
        running -= 1

    def make() -> TaskService:
        service = TaskService(store=store, workers=5, bus="memory://" if bus == "no bus" else connect(backend))
        service.task(limit=2)(scarce)
        service.task(double)
        return service

    first, second = make(), make()
    async with first, second:
        ids = [await first.submit("scarce") for _ in range(6)]
        with fail_after(1.0):
            assert await second.result(await first.submit("double")) == 2
        with fail_after(35.0):
            for task_id in ids:
                await second.result(task_id)
        assert most == 2
    with pytest.raises(ValueError, match=whole("limit must be >= 1, got 0")):
        TaskService().task(limit=0)


async def test_priority() -> None:
    """Of the tasks that wait, those with a higher priority come first."""
    order: list[int] = []

    async def work(number: int) -> None:
        order.append(number)
        await sleep(1.0)

    service = TaskService(workers=1)
    service.task(work)
    async with service:
        await service.submit("work", number=-1)
        await wait_all_tasks_blocked()
        ids = [await service.submit("work", number=number, priority=number % 3) for number in range(6)]
        for task_id in ids:
            await service.result(task_id)
        assert (await service.get(ids[2])).priority == 2
        for priority, error, message in (
            (1001, ValueError, "priority must be from -1000 to 1000, got 1001"),
            (1.5, TypeError, "priority must be an int, got 1.5"),
            (True, TypeError, "priority must be an int, got True"),
        ):
            with pytest.raises(error, match=whole(message)):
                await service.submit("work", number=1, priority=priority)  # type: ignore[arg-type]
    assert order == [-1, 2, 5, 1, 4, 0, 3]


async def test_submitting_many() -> None:
    """They are there in one step: all of them, or none if one of them is wrong."""
    store = MemoryStore()
    async with serving(double, store=store, workers=2) as service:
        with pytest.raises(ArgumentError):
            await service.submit_many("double", [{"number": 1}, {"number": "2"}])
        assert not store._records
        ids = await service.submit_many("double", ({"number": number} for number in range(1000)))
        assert [await service.result(task_id) for task_id in ids] == [number * 2 for number in range(1000)]
        assert service.statistics().handlers["double"].submitted == 1000
        assert await service.submit_many("double", []) == []
        [late] = await service.submit_many("double", [{}], delay=10.0, priority=3)
        record = await service.get(late)
        assert record.run_at - record.created_at == pytest.approx(10.0)
        assert record.priority == 3
        await service.cancel(late)


async def test_tasks_from_before_are_run_at_the_start() -> None:
    """What is in the store when a service is entered is in its queue."""
    store = MemoryStore()
    async with serving(double, store=store, workers=0) as before:
        ids = [await before.submit("double", number=3) for _ in range(5)]
    async with serving(double, store=store) as after:
        with fail_after(1.0):
            assert [await after.result(task_id) for task_id in ids] == [6] * 5


async def test_a_store_that_fails_for_a_while(caplog: pytest.LogCaptureFixture) -> None:
    """The service goes on once it works again, and settles what has ended meanwhile; the log tells."""
    store = MemoryStore()
    claim, change, forget = store.claim, store.change, store.forget

    async def fail(*_arguments: Any, **_options: Any) -> Any:
        msg = "it is away"
        raise StorageError(msg)

    async def slow() -> str:
        runs.append("run")
        await sleep(1.0)
        return "done"

    runs: list[str] = []
    store.claim = store.forget = fail  # type: ignore[method-assign]
    async with serving(double, slow, store=store) as service:
        task_id = await service.submit("double", number=3)
        await sleep(2.5)
        store.claim, store.forget = claim, forget  # type: ignore[method-assign]
        with fail_after(1.0):
            assert await service.result(task_id) == 6
        task_id = await service.submit("slow")
        await sleep(0.5)
        store.change = fail  # type: ignore[method-assign]
        await sleep(5.0)
        store.change = change  # type: ignore[method-assign]
        with fail_after(1.0):
            assert await service.result(task_id) == "done"
        assert len(runs) == 1
    assert "the store failed, and is tried again in 1 s: it is away" in caplog.text
    assert "looking for expired tasks failed, and is tried again: it is away" in caplog.text
    assert f"task {task_id} could not be settled, which is tried again in 1 s: it is away" in caplog.text


async def test_a_store_that_fails_for_longer_than_a_lease(caplog: pytest.LogCaptureFixture) -> None:
    """What has ended is not settled then, and the task runs again once its lease has run out."""
    store = MemoryStore()
    change, change_many = store.change, store.change_many
    runs: list[str] = []

    async def fail(*_arguments: Any) -> Any:
        msg = "it is away"
        raise StorageError(msg)

    async def quick() -> str:
        runs.append("run")
        if len(runs) == 1:
            store.change = store.change_many = fail  # type: ignore[assignment]
        return "done"

    async with serving(quick, store=store, lease=5.0) as service:
        task_id = await service.submit("quick")
        await sleep(4.9)
        store.change, store.change_many = change, change_many  # type: ignore[method-assign]
        with fail_after(5.0):
            assert await service.result(task_id) == "done"
    assert len(runs) in {1, 2}
    assert f"task {task_id} could not be settled" in caplog.text


async def test_a_bus_that_fails_while_waiting_for_tasks(caplog: pytest.LogCaptureFixture) -> None:
    """The service subscribes once more, after the tasks that ran have ended, and then has all its workers again."""

    class Failing(MemoryBackend):
        fetches = 0

        async def join(self, membership: Any) -> Any:
            member: Any = await super().join(membership)
            member.fetch = partial(self.fetch, member.fetch)
            return member

        async def fetch(self, fetch: Any, max_items: int) -> Any:
            self.fetches += 1
            if self.fetches in {2, 4, 6}:
                msg = "it is away"
                raise StorageError(msg)
            return await fetch(max_items)

    async with serving(double, bus=connect(Failing(max_pending=math.inf, retention=0.0)), workers=2) as service:
        for _ in range(6):
            with fail_after(60.0):
                assert await service.result(await service.submit("double")) == 2
    assert "the bus failed, and is tried again in 1 s: it is away" in caplog.text


async def test_a_task_that_is_taken_up_twice_in_one_service(caplog: pytest.LogCaptureFixture) -> None:
    """If its lease could not be renewed, a task may run again here: then the first run is cancelled."""
    begun: list[str] = []
    ended: list[str] = []
    store = MemoryStore()
    change_many = store.change_many

    async def slow() -> str:
        name = f"run {len(begun)}"
        begun.append(name)
        try:
            await sleep(8.0)
        finally:
            ended.append(name)
        return name

    store.change_many = fail  # type: ignore[method-assign]
    async with serving(slow, double, store=store, workers=2, lease=5.0) as service:
        task_id = await service.submit("slow")
        await sleep(5.5)
        assert begun == ["run 0", "run 1"]
        store.change_many = change_many  # type: ignore[method-assign]
        await sleep(1.0)
        assert ended == ["run 0"]
        assert await service.result(task_id) == "run 1"
        assert (await service.get(task_id)).attempts == 2
        assert await service.result(await service.submit("double", number=1)) == 2
    assert f"task {task_id} took its worker too long to renew its lease, and is with another" in caplog.text


async def test_an_acknowledgement_that_fails_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """The task runs all the same, and its message is left to the bus."""

    async def fail_to_ack(_ack: Any, _delivery: Any) -> Any:
        await fail()

    async with serving(double, bus=connect(Faulty(ack=fail_to_ack))) as service:
        task_id = await service.submit("double", number=1)
        assert await service.result(task_id) == 2
        await sleep(10.0)
    assert {record.message for record in caplog.records} == {
        "the bus failed, and is tried again in 1 s: the disk is gone"
    }


async def test_a_lease_that_cannot_be_renewed_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A store that fails while a task runs is in the log; the task goes on."""
    store = MemoryStore()
    change_many = store.change_many

    async def slow() -> str:
        await sleep(2.5)
        store.change_many = change_many  # type: ignore[method-assign]
        return "done"

    async def fail(*_arguments: Any) -> Any:
        msg = "it is away"
        raise StorageError(msg)

    async with serving(slow, store=store) as service:
        task_id = await service.submit("slow")
        await wait_all_tasks_blocked()
        store.change_many = fail  # type: ignore[method-assign, assignment]
        assert await service.result(task_id) == "done"
    assert {record.message for record in caplog.records if record.levelno == logging.WARNING} == {
        "the leases of 1 task(s) could not be renewed: it is away"
    }


async def test_a_store_that_cannot_be_opened() -> None:
    """Its error is told, and nothing is left open."""

    class Missing(MemoryStore):
        async def open(self) -> None:
            msg = "there is none"
            raise StorageError(msg)

    class NoBus(MemoryBackend):
        async def open(self) -> None:
            msg = "there is no bus"
            raise StorageError(msg)

    closed: list[str] = []

    class Kept(MemoryStore):
        async def aclose(self) -> None:
            closed.append("closed")

    with pytest.raises(StorageError, match=whole("there is none")):
        await TaskService(store=Missing()).__aenter__()
    bus = connect(NoBus(max_pending=math.inf, retention=0.0))
    with pytest.raises(StorageError, match=whole("there is no bus")):
        await TaskService(bus=bus, store=Kept()).__aenter__()
    assert closed == ["closed"]


# Arguments


def test_without_msgspec(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, and how to install it, is said."""
    monkeypatch.delitem(sys.modules, "chanflow.tasks")
    monkeypatch.setitem(sys.modules, "msgspec", None)
    with pytest.raises(ModuleNotFoundError, match=whole("chanflow.tasks needs msgspec: pip install 'chanflow[tasks]'")):
        import_module("chanflow.tasks")


async def test_only_inside_of_its_block() -> None:
    """A service that was not entered, or is over, says so."""
    service = TaskService()
    handler = service.task(double)
    calls = [
        lambda: service.submit(handler),
        lambda: service.get("id"),
        lambda: service.result("id"),
        lambda: service.cancel("id"),
        lambda: service.retry("id"),
        service.page,
        service.count,
        service.shutdown,
    ]
    for _ in range(2):
        for call in calls:
            with pytest.raises(
                ClosedResourceError, match=whole("the task service is closed, or its block was not entered")
            ):
                await call()
        async with service:
            assert await service.result(await service.submit(handler)) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"workers": -1}, ValueError, "workers must be >= 0, got -1"),
        ({"ttl": -1}, ValueError, "ttl must be >= 0, got -1"),
        ({"lease": 0}, ValueError, "lease must be > 0, got 0"),
        ({"store": "redis"}, ValueError, "store must be memory://, sqlite:///PATH or redis://HOST, got 'redis'"),
        (
            {"store": "sqlite:///"},
            ValueError,
            "store must be memory://, sqlite:///PATH or redis://HOST, got 'sqlite:///'",
        ),
        ({"store": 5}, TypeError, "store must be a str or a Store, got a int"),
        ({"bus": "nats://"}, ValueError, "url must be memory:// or sqlite:///PATH, got 'nats://'"),
    ],
)
def test_a_service_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """A wrong argument is named."""
    with pytest.raises(error, match=whole(message)):
        TaskService(**options)


def test_registering_refuses() -> None:
    """What can't be a task is named, and not registered."""
    service = TaskService()
    service.task(double)

    def positional(a: int, /) -> None: ...

    def any_number(*numbers: int) -> None: ...

    call: Callable[[], object]

    def odd(a: dict[list[int], int] | complex) -> None: ...

    def slashed() -> None: ...

    slashed.__name__ = "a/b"
    printable = "name must be a str of 1 to 200 printable characters without a slash"
    register: Any = service.task
    for call, error, message in (
        (lambda: register(double), ValueError, "there is a task 'double' already"),
        (lambda: register(5), TypeError, "a task must be a function, got 5"),
        (lambda: register(retry=3), TypeError, "retry must be a Retry, got 3"),
        (lambda: register(timeout=0), ValueError, "timeout must be > 0, got 0"),
        (
            lambda: register(name=""),
            ValueError,
            "name must be a str of 1 to 200 printable characters without a slash, got ''",
        ),
        (
            lambda: register(partial(double)),
            TypeError,
            f"a task that is no plain function needs a name: {partial(double)!r}",
        ),
        (lambda: register(name="a\0b"), ValueError, f"{printable}, got 'a\\x00b'"),
        (lambda: register(name="two\nlines"), ValueError, f"{printable}, got 'two\\nlines'"),
        (lambda: register(name="\ud800"), ValueError, f"{printable}, got '\\ud800'"),
        (lambda: register(slashed), ValueError, f"{printable}, got 'a/b'"),
        (
            lambda: register(name=5),
            ValueError,
            "name must be a str of 1 to 200 printable characters without a slash, got 5",
        ),
        (
            lambda: register(positional),
            TypeError,
            "a task takes its arguments by name: positional can't have a",
        ),
        (
            lambda: register(any_number),
            TypeError,
            "a task takes its arguments by name: any_number can't have *numbers",
        ),
    ):
        with pytest.raises(error, match=whole(message)):
            call()
    with pytest.raises(TypeError, match=r"^the type hints of odd are not for plain data: "):
        register(odd)
    assert list(service._handlers) == ["double"]


@pytest.mark.parametrize("name", ["idempotency_key", "delay", "priority"])
def test_names_that_submit_has_itself_are_refused(name: str) -> None:
    """A parameter that `submit` would take for its own can't be passed, so it can't be registered."""
    namespace: dict[str, Any] = {}
    exec(f"def taken({name}: int): ...", namespace)  # noqa: S102 -- only the name changes
    with pytest.raises(TypeError, match=whole(f"{name} is an argument of submit itself: taken can't have it")):
        TaskService().task(namespace["taken"])


async def test_submit_refuses() -> None:
    """Wrong arguments are named before anything is stored."""

    async def draw(point: Point, label: str = "") -> None: ...

    store = MemoryStore()
    submit: Any
    async with serving(draw, store=store) as service:
        stranger = TaskService().task(double)
        submit = service.submit
        point = {"x": 1, "y": 2.0}
        for call, error, message in (
            (partial(submit, "unknown"), UnknownTaskError, "no task 'unknown' is registered with this service"),
            (partial(submit, stranger), UnknownTaskError, "no task 'double' is registered with this service"),
            (partial(submit, 5), UnknownTaskError, "no task 5 is registered with this service"),
            (partial(submit, "draw"), ArgumentError, "arguments of draw: Object missing required field `point`"),
            (
                partial(submit, "draw", point=point, color=1),
                ArgumentError,
                "arguments of draw: Object contains unknown field `color`",
            ),
            (
                partial(submit, "draw", point={"x": "1", "y": 2}),
                ArgumentError,
                "arguments of draw: Expected `int`, got `str` - at `$.point.x`",
            ),
            (
                partial(submit, "draw", point=object()),
                ArgumentError,
                "arguments of draw can't be stored: Encoding objects of type object is unsupported",
            ),
            (partial(submit, "draw", point=point, delay=-1), ValueError, "delay must be >= 0, got -1"),
            (
                partial(submit, "draw", point=point, idempotency_key=5),
                TypeError,
                "idempotency_key must be a str or None, got 5",
            ),
        ):
            with pytest.raises(error, match=whole(message)):
                await call()
        assert not store._records
        await service.result(await service.submit("draw", point=Point(1, 2)))


def test_where_the_tasks_are() -> None:
    """The service tells which store it has."""
    store = MemoryStore()
    assert TaskService(store=store).store is store
    assert isinstance(TaskService().store, MemoryStore)
