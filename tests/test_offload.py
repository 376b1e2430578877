"""Sync callables off the event loop, and worker groups of them."""

# ruff: noqa: FBT001 -- flags come from parametrize

from __future__ import annotations

import contextlib
import functools
import gc
import math
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import CapacityLimiter, EndOfStream, Event, wait_all_tasks_blocked

from chanflow import Channel, DeadLetter, ResultCancelledError, Retry, WorkerGroup
from chanflow._work._call import is_async
from chanflow._work._offload import run_in_thread
from tests.support.messages import whole
from tests.support.worker_groups import assert_nothing_left

pytestmark = pytest.mark.anyio


class Gated:
    """A sync handler that says when it has begun, and returns when it may."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.begun: list[Any] = []
        self.finished: list[Any] = []
        self._begun = threading.Condition()

    def __call__(self, job: Any) -> Any:
        with self._begun:
            self.begun.append(job)
            self._begun.notify_all()
        assert self.gate.wait(30)
        self.finished.append(job)
        if isinstance(job, Exception):
            raise job
        return job

    async def wait_begun(self, count: int = 1) -> None:
        """Wait in a thread of our own, so that no timer decides."""

        def wait() -> None:
            with self._begun:
                assert self._begun.wait_for(lambda: len(self.begun) >= count, 30)

        await anyio.to_thread.run_sync(wait, limiter=CapacityLimiter(1))


@pytest.fixture
def gated() -> Iterator[Gated]:
    handler = Gated()
    yield handler
    # However the test ended, no thread is left waiting.
    handler.gate.set()


async def coroutine_function(job: Any) -> None: ...


class AsyncCallable:
    async def __call__(self, job: Any) -> None: ...

    async def method(self, job: Any) -> None: ...


class SyncCallable:
    def __call__(self, job: Any) -> None: ...


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (coroutine_function, True),
        (functools.partial(coroutine_function, 1), True),
        (functools.partial(functools.partial(coroutine_function), 1), True),
        (AsyncCallable(), True),
        (functools.partial(AsyncCallable()), True),
        (AsyncCallable().method, True),
        (lambda _: None, False),
        (SyncCallable(), False),
        (functools.partial(SyncCallable()), False),
        (len, False),
        (lambda job: coroutine_function(job), False),  # noqa: PLW0108 -- a lambda is what is tried
    ],
)
def test_async_callables_are_told_from_sync_ones(fn: Callable[..., Any], expected: bool) -> None:
    """Looking into partials and callable objects."""
    assert is_async(fn) is expected


class TestRunInThread:
    async def test_it_returns_what_the_function_returns(self) -> None:
        """From another thread, with and without a timeout."""
        here = threading.get_ident()
        expired: list[TimeoutError] = []
        for timeout in None, math.inf:
            there, job = await run_in_thread(
                lambda: (threading.get_ident(), 7),
                CapacityLimiter(1),
                timeout=timeout,
                expired=expired.append,
            )
            assert there != here
            assert job == 7
        assert expired == []

    async def test_it_raises_what_the_function_raises(self) -> None:
        """The very error, not in a group."""
        error = ValueError("bad")

        def fail() -> None:
            raise error

        for timeout in None, math.inf:
            with pytest.raises(ValueError, match=whole("bad")) as caught:
                await run_in_thread(fail, CapacityLimiter(1), timeout=timeout, expired=lambda _: None)
            assert caught.value is error

    @pytest.mark.parametrize("job", [7, ValueError("bad")])
    async def test_it_tells_of_the_timeout_at_once_and_raises_it_later(self, gated: Gated, job: Any) -> None:
        """When the thread has returned, whatever it returned or raised then."""
        expired: list[TimeoutError] = []

        def expire(error: TimeoutError) -> None:
            assert not gated.finished
            expired.append(error)
            gated.gate.set()

        with pytest.raises(TimeoutError, match=whole("the call took longer than 5 s")) as caught:
            await run_in_thread(partial(gated, job), CapacityLimiter(1), timeout=5, expired=expire)
        assert expired == [caught.value]
        assert caught.value.__cause__ is (job if isinstance(job, Exception) else None)
        assert gated.finished == [job]

    @pytest.mark.parametrize("timeout", [None, math.inf])
    async def test_a_cancellation_waits_for_the_thread(self, gated: Gated, timeout: float | None) -> None:
        """And what the thread returns by then is not lost."""
        returned = []

        async def call() -> None:
            with anyio.CancelScope() as scope:
                scopes.append(scope)
                returned.append(
                    await run_in_thread(partial(gated, 7), CapacityLimiter(1), timeout=timeout, expired=lambda _: None)
                )

        scopes: list[anyio.CancelScope] = []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(call)
            await gated.wait_begun()
            scopes[0].cancel()
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            assert not gated.finished
            gated.gate.set()
        assert gated.finished == [7]
        assert returned == [7]

    @pytest.mark.parametrize("timeout", [None, math.inf])
    async def test_in_a_cancelled_scope_it_does_not_start(self, gated: Gated, timeout: float | None) -> None:
        """A cancellation that came before wins."""
        with anyio.CancelScope() as scope:
            scope.cancel()
            await run_in_thread(partial(gated, 7), CapacityLimiter(1), timeout=timeout, expired=lambda _: None)
        assert scope.cancelled_caught
        assert gated.begun == []


async def test_a_sync_handler_runs_off_the_loop() -> None:
    """The loop goes on, and never more than `workers` threads are at it."""
    here = threading.get_ident()
    lock = threading.Lock()
    barrier = threading.Barrier(3)
    running = most = 0

    def handle(job: int) -> int:
        nonlocal running, most
        assert threading.get_ident() != here
        with lock:
            running += 1
            most = max(most, running)
        barrier.wait(30)
        with lock:
            running -= 1
        return job * 2

    async with WorkerGroup(handle, workers=3, offload="thread") as workers:
        results = [await workers.submit(number) for number in range(9)]
        assert [await result for result in results] == [number * 2 for number in range(9)]
    assert most == 3
    assert workers.statistics().succeeded == 9
    assert_nothing_left(workers)


async def test_a_sync_failure_is_its_results() -> None:
    """Raised as it is; the next job is not harmed."""
    async with WorkerGroup(int, workers=1) as workers:
        bad, good = workers.submit_nowait("x"), workers.submit_nowait("7")
        with pytest.raises(ValueError, match=whole("invalid literal for int() with base 10: 'x'")):
            await bad
        assert await good == 7
    assert_nothing_left(workers)


async def test_sync_retries() -> None:
    """In threads as elsewhere."""
    attempts = []

    def flaky(job: int) -> int:
        attempts.append(job)
        if len(attempts) < 3:
            raise ValueError
        return job

    async with WorkerGroup(flaky, retry=Retry(3)) as workers:
        result = workers.submit_nowait(7)
        assert await result == 7
        assert result.attempts == 3
    assert workers.statistics().retries == 2
    assert_nothing_left(workers)


async def test_a_timeout_fails_the_result_at_once_though_its_worker_stays_busy() -> None:
    """The thread can't be stopped, so the next job waits for it."""
    slow_handler, behind_handler = Gated(), Gated()
    letters = Channel[DeadLetter[Any]](10)

    def handle(job: str) -> Any:
        return (slow_handler if job == "slow" else behind_handler)(job)

    async with WorkerGroup(handle, workers=1, buffer=1, timeout=5, dead_letters=letters) as workers:
        slow, behind = workers.submit_nowait("slow"), workers.submit_nowait("behind")
        with pytest.raises(TimeoutError, match=whole("the call took longer than 5 s")):
            await slow
        assert slow.done
        await slow_handler.wait_begun()
        assert workers.statistics()[:3] == (1, 1, 1)
        assert workers.statistics().failed == 1
        assert (behind.done, behind.attempts) == (False, 0)
        slow_handler.gate.set()
        # Its own thread is held until the clock has jumped to its timeout too.
        with pytest.raises(TimeoutError):
            await behind
        assert behind.attempts == 1
        behind_handler.gate.set()
    assert workers.statistics().failed == 2
    assert letters.drain() == [("slow", slow.exception(), 1), ("behind", behind.exception(), 1)]
    assert_nothing_left(workers)


async def test_a_timeout_is_an_attempt() -> None:
    """It is attempted again only when its thread has returned, and fails at once after the last attempt."""
    handlers = [Gated(), Gated()]
    attempts = iter(handlers)

    def handle(job: str) -> Any:
        return next(attempts)(job)

    async with WorkerGroup(handle, workers=1, timeout=5, retry=Retry(2, delay=0, jitter=0)) as workers:
        result = workers.submit_nowait("slow")
        await anyio.sleep(20)
        assert not result.done
        assert result.attempts == 1
        handlers[0].gate.set()
        with pytest.raises(TimeoutError):
            await result
        assert result.attempts == 2
        handlers[1].gate.set()
    assert [handler.finished for handler in handlers] == [["slow"], ["slow"]]
    assert workers.statistics()[5:] == (0, 1, 0, 1)
    assert_nothing_left(workers)


async def test_regression_a_timeout_that_is_not_worth_a_retry_fails_at_once(gated: Gated) -> None:
    """Though attempts are left, for errors of other kinds."""
    async with WorkerGroup(gated, timeout=5, retry=Retry(3, on=ValueError)) as workers:
        result = workers.submit_nowait("slow")
        with anyio.move_on_after(10):
            while not result.done:  # noqa: ASYNC110 -- without looking at the result, which would wait
                await anyio.sleep(1)
        done_in_time = result.done
        gated.gate.set()
        with pytest.raises(TimeoutError):
            await result
    assert done_in_time
    assert result.attempts == 1


async def test_a_predicate_that_raises_on_a_timeout(gated: Gated) -> None:
    """There is no other attempt, so the job fails at once, as without any."""

    def predicate(_error: Exception) -> bool:
        raise KeyError

    async with WorkerGroup(gated, timeout=5, retry=Retry(3, on=predicate)) as workers:
        result = workers.submit_nowait("slow")
        with pytest.raises(TimeoutError, match=whole("the call took longer than 5 s")):
            await result
        gated.gate.set()
    assert result.attempts == 1
    assert_nothing_left(workers)


async def test_cancelling_a_running_job_is_done_at_once(gated: Gated) -> None:
    """Its worker stays busy until the thread returns, and is as good as new then."""
    for timeout in None, math.inf:
        gated.gate.clear()
        gated.begun.clear()
        async with WorkerGroup(gated, workers=1, timeout=timeout) as workers:
            running, behind = workers.submit_nowait(1), workers.submit_nowait(2)
            await gated.wait_begun()
            running.cancel()
            assert running.done
            running.cancel()
            with pytest.raises(ResultCancelledError, match=whole("the task was cancelled")):
                await running
            assert workers.statistics().running == 1
            assert gated.begun == [1]
            gated.gate.set()
            assert await behind == 2
        assert workers.statistics()[5:8] == (1, 0, 1)
        assert workers.leftover == ()
        assert_nothing_left(workers)


@pytest.mark.parametrize("timeout", [None, math.inf])
async def test_shutdown_waits_for_threads(gated: Gated, timeout: float | None) -> None:
    """A job that its thread finished meanwhile is done, not left over; those that wait are."""
    leftover: list[list[Any]] = []

    async def shut_down() -> None:
        leftover.append(await workers.shutdown(0))

    async with WorkerGroup(gated, workers=1, timeout=timeout) as workers:
        running, waiting = workers.submit_nowait("running"), workers.submit_nowait("waiting")
        await gated.wait_begun()
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(shut_down)
            for _ in range(10):
                await anyio.lowlevel.checkpoint()
            assert leftover == []
            gated.gate.set()
        assert leftover == [["waiting"]]
        assert await running == "running"
        with pytest.raises(ResultCancelledError):
            await waiting
    assert gated.begun == ["running"]
    assert_nothing_left(workers)


async def test_what_returns_an_awaitable_is_no_sync_handler() -> None:
    """It fails the job, naming what came back."""

    class Awaitable:
        def __repr__(self) -> str:
            return "an awaitable"

        def __await__(self) -> Iterator[Any]:
            yield

    value = Awaitable()
    async with WorkerGroup[Any, Any](lambda _: value) as workers:
        message = f"the handler returned {value!r}, which nobody awaits; make it an async function"
        with pytest.raises(TypeError, match=whole(message)):
            await workers.submit_nowait(1)
    assert_nothing_left(workers)


async def test_regression_a_lambda_that_returns_a_coroutine_warns_of_nothing(backend: str) -> None:
    """The coroutine that can't be awaited is closed, so that Python doesn't complain about it as well."""

    async def handle(job: int) -> int:
        return job

    async with WorkerGroup[int, Any](lambda job: handle(job)) as workers:  # noqa: PLW0108 -- the mistake that is tried
        result = workers.submit_nowait(1)
        with pytest.raises(TypeError) as caught:
            await result
        # trio finds out by itself, and says it in its own words.
        if backend == "asyncio":
            assert str(caught.value).startswith("the handler returned <coroutine object")
    del result, caught
    gc.collect()


async def test_a_sync_handler_can_not_submit_by_itself() -> None:
    """It is in another thread."""
    group: WorkerGroup[int, Any]

    def handle(job: int) -> None:
        group.submit_nowait(job)

    async with WorkerGroup(handle) as group:
        with pytest.raises(
            RuntimeError,
            match=whole("this WorkerGroup belongs to another event loop; use it there, as with anyio.from_thread.run"),
        ):
            await group.submit_nowait(1)
    assert_nothing_left(group)


async def test_a_sync_handler_submits_through_anyio() -> None:
    """`anyio.from_thread` takes it to the loop, also while the group is being left."""
    done = []

    def handle(job: int) -> None:
        done.append(job)
        if job:
            anyio.from_thread.run(group.submit, job - 1)

    group: WorkerGroup[int, None]
    async with WorkerGroup(handle, workers=2) as group:
        group.submit_nowait(3)
    assert done == [3, 2, 1, 0]
    assert_nothing_left(group)


async def test_threads_use_no_token_of_the_default_limiter(gated: Gated) -> None:
    """So that a large group doesn't block what else the program does in threads."""
    limiter = anyio.to_thread.current_default_thread_limiter()
    count = int(limiter.total_tokens) + 1
    async with WorkerGroup(gated, workers=count) as workers:
        for number in range(count):
            workers.submit_nowait(number)
        await gated.wait_begun(count)
        assert limiter.borrowed_tokens == 0
        gated.gate.set()
    assert len(gated.finished) == count
    assert_nothing_left(workers)


async def test_a_handler_that_raises_end_of_stream_fails_its_job_only() -> None:
    """What ends a worker internally is no word for handlers."""

    def handle(job: int) -> int:
        if job:
            raise EndOfStream
        return job

    async with WorkerGroup(handle, workers=1) as workers:
        bad, good = workers.submit_nowait(1), workers.submit_nowait(0)
        with pytest.raises(EndOfStream):
            await bad
        assert await good == 0
    assert_nothing_left(workers)


async def test_an_error_in_the_block_waits_for_threads(gated: Gated) -> None:
    """No thread outlives its group."""
    open_gate = Event()

    async def opener() -> None:
        await open_gate.wait()
        for _ in range(10):
            await anyio.lowlevel.checkpoint()
        gated.gate.set()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(opener)
        with contextlib.suppress(KeyError):
            async with WorkerGroup(gated, workers=1) as workers:
                result = workers.submit_nowait(1)
                await gated.wait_begun()
                open_gate.set()
                raise KeyError
        assert gated.finished == [1]
    assert result.done
    assert_nothing_left(workers)


async def test_a_thread_sees_the_context_of_its_worker() -> None:
    """As `anyio.to_thread` does it."""
    variable: ContextVar[str] = ContextVar("variable", default="none")
    variable.set("here")
    async with WorkerGroup[Any, Any](lambda _: variable.get()) as workers:
        assert await workers.submit_nowait(1) == "here"
    await wait_all_tasks_blocked()
