"""Stopping in the very tick in which something else happens; cancellations that nobody asked for."""

# ruff: noqa: SIM117, PT012, BLE001 -- which block is left first is the point; groups raise at their end; so may tasks

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import ClosedResourceError, Event, wait_all_tasks_blocked

from chanflow import Channel, DeadLetter, Group, Result, ResultCancelledError, Retry, WorkerGroup
from chanflow.bus import Message, connect
from chanflow.tasks import TaskService
from tests.support.messages import whole
from tests.support.virtual_time import VirtualTimeLoop
from tests.support.worker_groups import assert_nothing_left

pytestmark = pytest.mark.anyio

STRAY = "the task awaited something that was cancelled, but was not cancelled itself"
on_asyncio = pytest.mark.parametrize("anyio_backend", [("asyncio", {"loop_factory": VirtualTimeLoop})])


def cancelled_future() -> asyncio.Future[None]:
    future = asyncio.get_running_loop().create_future()
    future.cancel()
    return future


async def fail(job: Any) -> None:
    msg = f"job {job}"
    raise ValueError(msg)


def assert_accounted(group: WorkerGroup[Any, Any], results: list[Result[Any]]) -> None:
    """Check that each job is done, failed, cancelled or left over: once."""
    figures = group.statistics()
    assert figures.succeeded + figures.failed + figures.cancelled + len(group.leftover) == len(results)
    assert all(result.done for result in results)
    assert_nothing_left(group)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("buffer", [0, 1, 100])
async def test_regression_a_stop_in_the_tick_in_which_the_wait_for_a_retry_ends(*, buffer: int, before: bool) -> None:
    """The job that wakes then is left over, and starts no worker that nobody would stop."""
    attempts = []

    async def handle(job: int) -> None:
        attempts.append((job, anyio.current_time()))
        await fail(job)

    with anyio.fail_after(100):
        async with WorkerGroup(handle, workers=5, buffer=buffer, retry=Retry(5, delay=1, jitter=0)) as group:
            results = [await group.submit(job) for job in range(5)]
            if not before:
                # Else the deadline's timer is set before those of the waits.
                await wait_all_tasks_blocked()
            left = await group.shutdown(1)
            assert {result.attempts for result in results} <= {1, 2}
    assert sorted(left) == list(range(5))
    assert_accounted(group, results)


@pytest.mark.parametrize("buffer", [0, 100])
async def test_regression_the_block_raises_in_that_tick(buffer: int) -> None:
    """The error comes out, and nothing goes on."""
    with anyio.fail_after(100):
        with pytest.raises(KeyError):
            async with WorkerGroup(fail, workers=9, buffer=buffer, retry=Retry(5, delay=1, jitter=0)) as group:
                results = [await group.submit(job) for job in range(5)]
                await anyio.sleep(1)
                raise KeyError
    assert_accounted(group, results)


async def test_nothing_is_attempted_after_the_stop() -> None:
    """Neither by a worker that waits out a retry with its job, nor by one that waits for its turn."""
    attempts: list[int] = []

    async def handle(job: int) -> None:
        attempts.append(job)
        await fail(job)

    async with WorkerGroup(handle, workers=1, buffer=0, retry=Retry(3, delay=1, jitter=0)) as group:
        result = group.submit_nowait(1)
        await wait_all_tasks_blocked()
        [worker] = group._workers
        # The wake-up of its wait and the stop come in one tick.
        await anyio.sleep(1)
        group._stop()
        assert worker.spent
    assert len(attempts) <= 2
    assert_accounted(group, [result])


@on_asyncio
async def test_a_job_that_is_cancelled_as_its_worker_gets_its_turn_is_not_attempted() -> None:
    """The worker was woken, so that the cancellation can't reach it before it would call the handler."""
    started: list[int] = []
    gate = Event()

    async def handle(job: int) -> None:
        started.append(job)
        await gate.wait()

    async def cancel() -> None:
        await results[0]
        results[1].cancel()

    async with anyio.create_task_group() as tasks, WorkerGroup(handle, workers=2, buffer=10) as group:
        for result in [group.submit_nowait(0), group.submit_nowait(0)]:
            gate.set()
            await result
        gate = Event()
        started.clear()
        # Two idle workers are handed a job each, and only one of them may begin.
        results = [group.submit_nowait(1), group.submit_nowait(2)]
        group.resize(1)
        await wait_all_tasks_blocked()
        if started == [2]:
            results.reverse()
        tasks.start_soon(cancel)
        await wait_all_tasks_blocked()
        assert len(started) == 1
        gate.set()
    assert len(started) == 1
    assert results[0].exception() is None
    assert group.statistics().cancelled == 1
    assert_nothing_left(group)


async def test_a_map_reads_no_job_after_the_stop() -> None:
    """What its source would give has no place any more."""
    read: list[int] = []
    gate = Event()

    def source() -> Any:
        for job in range(100):
            read.append(job)
            yield job

    async def handle(job: int) -> int:
        await gate.wait()
        return job

    async def iterate() -> None:
        with pytest.raises((ClosedResourceError, ResultCancelledError)):
            async for _ in group.map(source()):
                """None comes."""

    async with anyio.create_task_group() as tasks:
        async with WorkerGroup(handle, workers=1, buffer=1) as group:
            tasks.start_soon(iterate)
            await wait_all_tasks_blocked()
            seen = len(read)
            [feed] = group._feeds
            feed.window.receive_nowait()
            group._stop()
    assert len(read) == seen


class Polite:
    """A sync handler that asks whether it is cancelled."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)

    def __call__(self, job: int) -> int:
        self.begun.release()
        for _ in range(30_000):
            anyio.from_thread.check_cancelled()
            threading.Event().wait(0.001)
        return job


@pytest.mark.parametrize("timeout", [None, 1e6])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("through", ["thread", "to_thread"])
def test_regression_jobs_of_threads_that_ask_are_left_over(backend: str, through: str, timeout: float | None) -> None:
    """`check_cancelled` raises the cancellation in the thread, and it is the job's stop, not its end."""
    polite = Polite()

    async def asynchronous(job: int) -> int:
        return await anyio.to_thread.run_sync(polite, job)

    async def main() -> None:
        handler: Callable[[int], Any] = polite if through == "thread" else asynchronous
        async with WorkerGroup(handler, workers=2, timeout=timeout) as group:
            results = [group.submit_nowait(job) for job in range(3)]
            for _ in range(2):
                await anyio.to_thread.run_sync(polite.begun.acquire)
            assert sorted(await group.shutdown(0)) == [0, 1, 2]
        assert_accounted(group, results)

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
@pytest.mark.parametrize("timeout", [None, 1e6])
def test_regression_a_cancelled_job_of_a_thread_that_asks_counts_once(backend: str, timeout: float | None) -> None:
    """It is cancelled, and its worker goes on."""
    polite = Polite()

    async def main() -> None:
        async with WorkerGroup(polite, workers=1, timeout=timeout) as group:
            results = [group.submit_nowait(job) for job in range(3)]
            for result in results:
                await anyio.to_thread.run_sync(polite.begun.acquire)
                result.cancel()
        assert group.statistics().cancelled == 3
        assert_accounted(group, results)

    anyio.run(main, backend=backend)


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_thread_that_asks_is_told_of_its_timeout(backend: str) -> None:
    """It need not go on for nothing."""
    polite = Polite()

    async def main() -> None:
        async with WorkerGroup(polite, workers=1, timeout=0.05) as group:
            with pytest.raises(TimeoutError, match=whole("the call took longer than 0.05 s")):
                await group.submit_nowait(1)

    anyio.run(main, backend=backend)


# Cancellations that no scope asked for


@on_asyncio
@pytest.mark.parametrize("timeout", [None, 10])
async def test_a_stray_cancellation_fails_its_job(timeout: float | None) -> None:
    """It may be attempted again, as after any failure."""

    async def handle(job: int) -> int:
        if job < 0 and result.attempts == 1:
            await cancelled_future()
        return job

    async with WorkerGroup(handle, workers=1, timeout=timeout, retry=Retry(2, delay=1)) as group:
        result = group.submit_nowait(-1)
        assert await result == -1
        assert result.attempts == 2


@on_asyncio
async def test_a_stray_cancellation_is_its_tasks_error() -> None:
    """The group raises it, and the others are cancelled as by any error."""
    with pytest.raises(ExceptionGroup) as caught:
        async with Group() as group:
            other = group.go(anyio.sleep, 1000)
            stray = group.go(cancelled_future)
    [error] = caught.value.exceptions
    assert type(error) is RuntimeError
    assert str(error) == STRAY
    assert isinstance(error.__cause__, asyncio.CancelledError)
    assert stray.exception() is error
    assert isinstance(other.exception(), ResultCancelledError)


@on_asyncio
async def test_cancelling_the_asyncio_task_of_a_job_ends_that_job() -> None:
    """Its worker, and those after it, go on."""
    tasks: dict[int, asyncio.Task[Any] | None] = {}

    async def handle(job: int) -> int:
        tasks[job] = asyncio.current_task()
        await anyio.sleep(1)
        return job

    async with WorkerGroup(handle, workers=1) as group:
        results = [group.submit_nowait(job) for job in range(3)]
        await wait_all_tasks_blocked()
        task = tasks[0]
        assert task is not None
        task.cancel()
        assert await results[1] == 1
        assert task.cancelling() == 0
        assert await results[2] == 2
        assert isinstance(results[0].exception(), ResultCancelledError)
        await wait_all_tasks_blocked()
        # Nor does it matter to a worker that has nothing to do.
        task.cancel()
        await wait_all_tasks_blocked()
        assert await group.submit_nowait(3) == 3
    assert group.statistics().cancelled == 1
    assert_nothing_left(group)


@on_asyncio
async def test_cancelling_the_asyncio_task_of_a_group_ends_that_task() -> None:
    """As in asyncio's own groups, where it is no failure."""
    tasks: list[asyncio.Task[Any] | None] = []

    async def run() -> None:
        tasks.append(asyncio.current_task())
        await anyio.sleep_forever()

    async with Group() as group:
        result = group.go(run)
        other = group.go(anyio.sleep, 10)
        await wait_all_tasks_blocked()
        assert tasks[0] is not None
        tasks[0].cancel()
    assert isinstance(result.exception(), ResultCancelledError)
    assert other.exception() is None


@on_asyncio
async def test_a_stray_cancellation_in_the_source_of_a_map() -> None:
    """The map raises it, after the results of the jobs before."""

    async def source() -> AsyncIterator[int]:
        yield 1
        await cancelled_future()

    async def handle(job: int) -> int:
        return job

    seen = []
    async with WorkerGroup(handle) as group:
        with pytest.raises(RuntimeError, match=whole(STRAY)):
            async for value in group.map(source()):
                seen.append(value)  # noqa: PERF401 -- what was seen before an error is kept
    assert seen == [1]


@on_asyncio
async def test_cancelling_the_asyncio_task_that_feeds_a_map() -> None:
    """The map ends with an error, the group goes on."""

    async def source() -> AsyncIterator[int]:
        yield 1
        await anyio.sleep_forever()

    async def handle(job: int) -> int:
        return job

    async with WorkerGroup(handle) as group:
        iteration = group.map(source())
        assert await anext(iteration) == 1
        [feeding] = [task for task in asyncio.all_tasks() if task.get_name().endswith("(map)")]
        feeding.cancel()
        with pytest.raises(ClosedResourceError):
            await anext(iteration)
        assert await group.submit_nowait(2) == 2


@on_asyncio
def test_a_task_that_never_began_leaves_its_job_over(anyio_backend: Any) -> None:
    """Asyncio doesn't start a task that is cancelled before: what it was to do is not lost."""

    async def handle(job: int) -> None:
        raise AssertionError

    async def main() -> tuple[WorkerGroup[int, None], Result[None], Result[None]]:
        ready = asyncio.get_running_loop().create_future()

        async def block() -> None:
            async with WorkerGroup(handle) as workers, Group() as group:
                ready.set_result((workers, workers.submit_nowait(1), group.go(handle, 2)))
                for task in asyncio.all_tasks():
                    if "handle" in task.get_name():
                        task.cancel()
                await anyio.sleep(1)

        await asyncio.gather(block(), return_exceptions=True)
        return await ready

    with warnings.catch_warnings():
        # Python tells of coroutines that never began.
        warnings.simplefilter("ignore", RuntimeWarning)
        workers, job, task = asyncio.run(main())
        gc.collect()
    assert workers.leftover == (1,)
    assert isinstance(job.exception(), ResultCancelledError)
    assert isinstance(task.exception(), ResultCancelledError)


async def test_regression_an_error_of_the_block_is_not_lost_to_a_cancellation() -> None:
    """Another task fails while the group stops, for one because the group is gone."""
    gate = Event()

    async def submit() -> None:
        await group.submit(3)

    async def handle(job: int) -> None:
        try:
            await anyio.sleep_forever()
        finally:
            with anyio.CancelScope(shield=True):
                await anyio.sleep(1)

    with pytest.raises(ExceptionGroup) as caught:
        async with anyio.create_task_group() as tasks, WorkerGroup(handle, workers=1, buffer=1) as group:
            group.submit_nowait(1)
            group.submit_nowait(2)
            tasks.start_soon(submit)
            await wait_all_tasks_blocked()
            gate.set()
            raise KeyError
    assert {type(error) for error in caught.value.exceptions} == {KeyError, ClosedResourceError}


async def test_a_cancellation_in_which_a_group_ends_goes_on() -> None:
    """Though there was nothing left to do."""
    with anyio.CancelScope() as scope:
        async with WorkerGroup(anyio.sleep) as group:
            await group.submit_nowait(0)
            # An idle worker has to be waited for.
            scope.cancel()
    assert scope.cancelled_caught


@on_asyncio
async def test_several_requests_to_cancel_a_task_are_withdrawn_together(caplog: pytest.LogCaptureFixture) -> None:
    """Its worker goes on as if there had been none."""

    async def handle(job: int) -> int:
        if job == 0:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            task.cancel()
            await anyio.sleep(1)
        return job

    async with WorkerGroup(handle, workers=1) as group:
        results = [group.submit_nowait(job) for job in range(3)]
    assert group.statistics().cancelled == 1
    assert_accounted(group, results)
    assert not caplog.records


async def test_regression_a_cancelled_task_with_a_nursery_of_its_own() -> None:
    """On trio, what it raises then is a group of cancellations."""

    async def run() -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(anyio.sleep_forever)
            tasks.start_soon(anyio.sleep_forever)

    async def run_raw() -> None:
        try:
            await anyio.sleep_forever()
        except BaseException as error:
            msg = "as trio's nurseries may"
            raise BaseExceptionGroup(msg, [error]) from None

    for cancel in True, False:
        async with Group() as group:
            results = [group.go(run), group.go(run_raw)]
            await wait_all_tasks_blocked()
            if cancel:
                group.cancel()
            else:
                for result in results:
                    result.cancel()
        for result in results:
            assert type(result.exception()) is ResultCancelledError


async def test_what_a_cancelled_task_fails_with_is_its_error() -> None:
    """Whatever cancellations come along."""

    async def run(_job: object = None) -> None:
        try:
            await anyio.sleep_forever()
        except BaseException as error:
            msg = "both"
            raise BaseExceptionGroup(msg, [error, ValueError("own")]) from None

    with pytest.raises(ExceptionGroup):
        async with Group() as group:
            result = group.go(run)
            await wait_all_tasks_blocked()
            group.cancel()
    error = result.exception()
    assert isinstance(error, ExceptionGroup)
    assert [str(each) for each in error.exceptions] == ["own"]

    async with WorkerGroup(run, workers=1) as workers:
        job = workers.submit_nowait(None)
        await wait_all_tasks_blocked()
        job.cancel()
        with pytest.raises(ExceptionGroup):
            await job
    assert_nothing_left(workers)


# From elsewhere


async def test_what_cancels_is_refused_in_another_thread_before_it_did_anything() -> None:
    """After that it works where it belongs."""

    async def elsewhere(call: Callable[[], object], message: str) -> None:
        def refused() -> None:
            with pytest.raises(RuntimeError, match=whole(message)):
                call()

        await anyio.to_thread.run_sync(refused)

    async def handle(_job: object) -> None:
        await anyio.sleep_forever()

    of_result = "this result belongs to another event loop; use it there, as with anyio.from_thread.run"
    of_workers = "this WorkerGroup belongs to another event loop; use it there, as with anyio.from_thread.run"
    of_group = "this Group belongs to another event loop; cancel it there, as with anyio.from_thread.run_sync"
    async with WorkerGroup(handle, workers=1, buffer=1) as workers, Group() as group:
        running, queued = workers.submit_nowait(1), workers.submit_nowait(2)
        task = group.go(anyio.sleep_forever)
        await wait_all_tasks_blocked()
        for result in running, queued, task:
            await elsewhere(result.cancel, of_result)
            assert not result.done
            result.cancel()
        await elsewhere(group.cancel, of_group)
        await elsewhere(lambda: workers.resize(2), of_workers)
    assert workers.statistics().workers == 1
    assert workers.statistics().cancelled == 2
    for result in running, queued, task:
        assert isinstance(result.exception(), ResultCancelledError)


@on_asyncio
@pytest.mark.parametrize("buffer", [0, 10])
async def test_cancelling_the_asyncio_task_of_a_job_that_waits_for_its_retry(buffer: int) -> None:
    """It is that job's end, whether it waits aside or with its worker; the group goes on."""
    async with WorkerGroup(fail, workers=1, buffer=buffer, retry=Retry(2, delay=10, jitter=0)) as group:
        result = group.submit_nowait(1)
        await wait_all_tasks_blocked()
        own = [task for task in asyncio.all_tasks() if "fail" in task.get_name()]
        for task in own:
            task.cancel()
        await wait_all_tasks_blocked()
        assert isinstance(result.exception(), ResultCancelledError)
        other = group.submit_nowait(2)
        await wait_all_tasks_blocked()
    assert isinstance(other.exception(), ValueError)
    assert group.statistics().cancelled == 1
    assert group.leftover == ()
    assert_accounted(group, [result, other])


@on_asyncio
@pytest.mark.parametrize("kind", [WorkerGroup, Group])
async def test_a_group_of_which_a_task_never_began_says_so(kind: Any) -> None:
    """Asyncio doesn't even start it, and the group would end without a word."""

    async def begin(group: Any) -> None:
        if kind is Group:
            group.go(anyio.sleep, 0)
        else:
            group.submit_nowait(0)
        [task] = [task for task in asyncio.all_tasks() if "sleep" in task.get_name()]
        task.cancel()
        await anyio.sleep(1)

    message = whole("a task of this group was cancelled before it began, which ends the group")
    with warnings.catch_warnings():
        # Python tells of coroutines that never began.
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(RuntimeError, match=message):
            async with kind(*[anyio.sleep] * (kind is WorkerGroup)) as group:
                await begin(group)
        gc.collect()


@pytest.mark.parametrize("timeout", [None, 1e6])
@pytest.mark.parametrize("requests", [1, 3])
def test_no_more_threads_than_workers_after_a_task_was_cancelled(timeout: float | None, requests: int) -> None:
    """Asyncio's own cancellation comes at once, and the thread goes on: its worker waits for it."""
    gates = [threading.Event() for _ in range(3)]
    begun = threading.Semaphore(0)
    running = most = 0
    lock = threading.Lock()

    def handle(job: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        begun.release()
        gates[job].wait(30)
        with lock:
            running -= 1
        return job

    async def main() -> None:
        async with WorkerGroup(handle, workers=1, timeout=timeout) as group:
            results = [group.submit_nowait(job) for job in range(3)]
            await anyio.to_thread.run_sync(begun.acquire)
            [task] = [task for task in asyncio.all_tasks() if "handle" in task.get_name()]
            for _ in range(requests):
                task.cancel()
                await asyncio.sleep(0.01)
            assert not results[0].done
            for gate in gates:
                gate.set()
            assert await results[1] == 1
            assert isinstance(results[0].exception(), ResultCancelledError)
        assert_accounted(group, results)

    asyncio.run(main())
    assert most == 1


async def test_regression_a_retry_that_keeps_its_worker_waits_for_its_turn_after_a_resize() -> None:
    """Never more handlers run than the group is for."""
    running = most = 0

    async def handle(job: int) -> int:
        nonlocal running, most
        running += 1
        most = max(most, running)
        try:
            await anyio.sleep(2)
            if job < 2 and results[job].attempts == 1:
                await fail(job)
        finally:
            running -= 1
        return job

    async with WorkerGroup(handle, workers=2, buffer=0, retry=Retry(2, delay=1, jitter=0)) as group:
        results = [await group.submit(job) for job in range(2)]
        await anyio.sleep(2.5)
        group.resize(1)
        most = 0
        results.append(await group.submit(2))
    assert most == 1
    assert [await result for result in results] == [0, 1, 2]
    assert_accounted(group, results)


async def test_regression_a_map_that_is_closed_while_a_result_comes() -> None:
    """What came is given, and nothing more."""

    async def handle(job: int) -> int:
        if job == 1:
            await results.aclose()
        return job

    async with WorkerGroup(handle, workers=1) as group:
        results = group.map(range(3))
        seen = [value async for value in results]
    assert seen in ([0], [])
    assert_nothing_left(group)


async def test_a_map_is_closed_where_it_belongs() -> None:
    """Elsewhere it is refused, and goes on."""

    async def close() -> None:
        await results.aclose()

    async def handle(job: int) -> int:
        return job

    message = whole("this WorkerGroup belongs to another event loop; use it there, as with anyio.from_thread.run")
    async with WorkerGroup(handle, workers=1) as group:
        results = group.map(range(3))
        assert await anext(results) == 0
        with pytest.raises(RuntimeError, match=message):
            await anyio.to_thread.run_sync(anyio.run, close)
        assert [value async for value in results] == [1, 2]


async def test_dead_letters_of_another_event_loop_fail_the_job_only(caplog: pytest.LogCaptureFixture) -> None:
    """The log tells why they did not get it."""
    letters = Channel[DeadLetter[int]](1)

    async def wait_there() -> None:
        with anyio.move_on_after(0):
            await letters.receive()
        begun.set()
        await anyio.to_thread.run_sync(over.wait)

    begun, over = threading.Event(), threading.Event()
    elsewhere = threading.Thread(target=anyio.run, args=[wait_there])
    elsewhere.start()
    await anyio.to_thread.run_sync(begun.wait)
    async with WorkerGroup(fail, dead_letters=letters) as group:
        result = group.submit_nowait(1)
        with pytest.raises(ValueError, match=whole("job 1")):
            await result
    over.set()
    await anyio.to_thread.run_sync(elsewhere.join)
    assert_nothing_left(group)
    [record] = caplog.records
    assert record.message.startswith("job 1 could not be sent to the dead letters: channel at ")


@on_asyncio
async def test_cancelling_the_asyncio_task_of_a_message_gives_it_back(caplog: pytest.LogCaptureFixture) -> None:
    """And the consumer goes on."""
    handled: list[tuple[bytes, int]] = []

    async def handle(message: Message) -> None:
        handled.append((message.body, message.attempt))
        if message.body == b"3":
            await message.ack()
        if message.attempt == 1 and message.body != b"2":
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        await anyio.sleep(1)

    async with connect("memory://") as bus, anyio.create_task_group() as tasks:
        tasks.start_soon(partial(bus.consume, "topic", handle, group="group"))
        await wait_all_tasks_blocked()
        for body in b"1", b"2", b"3":
            await bus.publish("topic", body)
        await anyio.sleep(10)
        tasks.cancel_scope.cancel()
    # The third was acknowledged before that.
    assert sorted(handled) == [(b"1", 1), (b"1", 2), (b"2", 1), (b"3", 1)]
    assert "was cancelled, and the message comes again" in caplog.text


@on_asyncio
async def test_cancelling_the_asyncio_task_of_a_run_puts_it_back() -> None:
    """And the service goes on."""
    begun: list[int] = []

    async def work(number: int) -> int:
        begun.append(number)
        if begun == [1]:
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
        await anyio.sleep(1)
        return number

    service = TaskService(workers=1)
    service.task(work)
    async with service:
        ids = [await service.submit("work", number=number) for number in (1, 2)]
        with anyio.fail_after(100):
            assert [await service.result(task_id) for task_id in ids] == [1, 2]
    assert sorted(begun) == [1, 1, 2]


@on_asyncio
async def test_a_retry_of_which_the_task_never_began_leaves_its_job_over() -> None:
    """As a worker does."""

    async def handle(job: int) -> None:
        asyncio.get_running_loop().call_soon(cancel)
        await fail(job)

    def cancel() -> None:
        for task in asyncio.all_tasks():
            if "(retry)" in task.get_name():
                task.cancel()

    with warnings.catch_warnings():
        # Python tells of coroutines that never began.
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(RuntimeError, match="was cancelled before it began"):
            async with WorkerGroup(handle, workers=1, retry=Retry(2, delay=1)) as group:
                result = group.submit_nowait(1)
                await anyio.sleep(10)
        gc.collect()
    assert group.leftover == (1,)
    assert isinstance(result.exception(), ResultCancelledError)
