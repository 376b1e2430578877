"""Jobs, errors, handlers and tasks that do what nobody should do, and what must not come of it."""

# ruff: noqa: PT012, PLW0108 -- an iteration raises in the middle; a lambda hides what it calls

from __future__ import annotations

import dataclasses
import gc
import logging
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import wait_all_tasks_blocked

from chanflow import Channel, DeadLetter, Group, Result, Retry, Send, WorkerGroup, select, select_nowait, ticker
from chanflow._check import name_of, show, show_error
from tests.support.messages import whole
from tests.support.worker_groups import assert_nothing_left

pytestmark = pytest.mark.anyio


class Unspeakable:
    def __repr__(self) -> str:
        raise ValueError


class UnspeakableError(Exception):
    def __str__(self) -> str:
        raise ValueError

    __repr__ = __str__


async def fail(_job: object) -> None:
    raise UnspeakableError


JOBS = [(10**5000,), Unspeakable(), [Unspeakable()], {"key": Unspeakable()}]


@pytest.mark.parametrize("job", JOBS, ids=["digits", "object", "list", "dict"])
async def test_regression_a_job_that_can_not_be_shown(job: Any, caplog: pytest.LogCaptureFixture) -> None:
    """It fails as others do, is logged, and the group goes on."""
    closed = Channel[DeadLetter[Any]](1)
    closed.close()
    async with WorkerGroup(fail, workers=1, dead_letters=closed) as workers:
        results = [workers.submit_nowait(job) for _ in range(3)]
    assert all(type(result.exception()) is UnspeakableError for result in results)
    assert workers.statistics().failed == 3
    assert_nothing_left(workers)
    for record in caplog.records:
        assert logging.Formatter().format(record)
    assert len(caplog.records) == 6


async def test_results_of_what_can_not_be_shown() -> None:
    """Their own representation can be."""

    async def give(job: Any) -> Any:
        if job is None:
            await fail(job)
        return job

    async with WorkerGroup(give) as workers:
        good, bad = workers.submit_nowait(Unspeakable()), workers.submit_nowait(None)
        await wait_all_tasks_blocked()
        assert "Unspeakable" in repr(good)
        assert "UnspeakableError" in repr(bad)
        bad.exception()


def test_arguments_that_can_not_be_shown() -> None:
    """The error is still the one that names the argument and the rule."""
    bad: Any = Unspeakable()
    shown = "got <Unspeakable instance at"
    calls: list[tuple[str, Callable[[], object]]] = [
        ("capacity must be an int or math.inf, ", lambda: Channel(bad)),
        ("overflow must be one of 'block', 'drop_newest', 'drop_oldest', ", lambda: Channel(1, overflow=bad)),
        ("handler must be callable, ", lambda: WorkerGroup(bad)),
        ("workers must be an int, ", lambda: WorkerGroup(print, workers=bad)),
        ("retry must be a Retry or None, ", lambda: WorkerGroup(print, retry=bad)),
        ("attempts must be an int, ", lambda: Retry(bad)),
        ("channel must be a Channel or SendChannel, ", lambda: Send(bad, 1)),
        ("case 0 must be a Channel, ReceiveChannel, Send, Result, timer or None, ", lambda: select_nowait(bad)),
    ]
    for rule, call in calls:
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        assert str(caught.value).startswith(rule + shown)


def test_what_is_shown() -> None:
    """In one line, and not too long."""
    assert show("word") == "'word'"
    assert len(show("x" * 10**6)) <= 100
    assert show((10**5000,)) == "<tuple whose repr raises ValueError>"
    assert show_error(ValueError("bad")) == "ValueError: bad"
    assert show_error(ValueError()) == "ValueError"
    assert show_error(UnspeakableError()) == "UnspeakableError: <its str raises ValueError>"
    assert name_of(partial(partial(fail), 1)) == "fail"
    assert name_of(Unspeakable()) == "Unspeakable"


# What is no Exception, and what ends iterations


@pytest.mark.parametrize("offload", ["thread", None])
@pytest.mark.parametrize("timeout", [None, 1e6])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_regression_a_handler_that_exits(backend: str, offload: Any, timeout: float | None) -> None:
    """As argparse does: its job failed, the group and the program go on, and it may be attempted again."""

    class OwnError(BaseException):
        pass

    def exit_or_not(job: int) -> int:
        if job == 0:
            sys.exit(2)
        if job == 1:
            raise OwnError
        if job == 2:
            msg = "both"
            raise BaseExceptionGroup(msg, [ValueError(), SystemExit(3)])
        return job

    async def handle(job: int) -> int:
        return exit_or_not(job)

    letters = Channel[DeadLetter[int]](10)

    async def main() -> None:
        handler: Callable[[int], Any] = exit_or_not if offload else handle
        async with WorkerGroup(
            handler, workers=1, timeout=timeout, retry=Retry(2, delay=0), dead_letters=letters
        ) as workers:
            results = [workers.submit_nowait(job) for job in range(4)]
            assert await results[3] == 3
            with pytest.raises(RuntimeError, match=whole("the task raised SystemExit: 2")) as caught:
                await results[0]
            assert isinstance(caught.value.__cause__, SystemExit)
        assert_nothing_left(workers)
        assert workers.statistics().retries == 3
        assert [letter.attempts for letter in letters.drain()] == [2, 2, 2]
        messages = [str(result.exception()) for result in results[1:3]]
        assert messages == ["the task raised OwnError", "the task raised BaseExceptionGroup: both (2 sub-exceptions)"]

    anyio.run(main, backend=backend)


class Empty:
    def __aiter__(self) -> Empty:
        return self

    async def __anext__(self) -> int:
        raise StopAsyncIteration


async def take_next(_job: object = None) -> int:
    return await anext(Empty())


@pytest.mark.parametrize("ordered", [True, False])
async def test_regression_a_handler_that_raises_stop_async_iteration(*, ordered: bool) -> None:
    """It ends no iteration over results: they would be cut short without a word."""

    async def handle(job: int) -> int:
        return await take_next() if job == 2 else job

    seen = []
    async with WorkerGroup(handle, workers=1) as workers:
        with pytest.raises(RuntimeError, match=whole("the task raised StopAsyncIteration")) as caught:
            async for value in workers.map(range(5), ordered=ordered):
                seen.append(value)  # noqa: PERF401 -- what was seen before an error is kept
    assert seen == [0, 1]
    assert isinstance(caught.value.__cause__, StopAsyncIteration)


async def test_the_same_in_a_group() -> None:
    """A generator of results that awaits it would end."""
    with pytest.raises(ExceptionGroup) as caught:
        async with Group() as group:
            result = group.go(take_next)
    [error] = caught.value.exceptions
    assert type(error) is RuntimeError
    assert error is result.exception()


async def test_a_source_that_raises_what_ends_the_other_kind_of_iteration() -> None:
    """The map raises it, after the results of the jobs before."""

    def sync_source() -> Iterator[int]:
        yield 1
        raise StopAsyncIteration

    class AsyncSource:
        def __aiter__(self) -> AsyncSource:
            return self

        def __anext__(self) -> Any:
            raise StopIteration

    async def handle(job: int) -> int:
        return job

    async with WorkerGroup(handle) as workers:
        for source, expected in (sync_source(), [1]), (AsyncSource(), []):
            seen = []
            with pytest.raises(RuntimeError):
                async for value in workers.map(source):
                    seen.append(value)  # noqa: PERF401 -- as above
            assert seen == expected


def sync_generator(_job: object) -> Iterator[int]:
    yield 1


async def async_generator(_job: object) -> AsyncIterator[int]:
    yield 1


class Calls:
    async def __call__(self, _job: object) -> AsyncIterator[int]:
        yield 1


@pytest.mark.parametrize("handler", [sync_generator, async_generator, partial(async_generator), Calls()])
def test_regression_a_generator_is_no_handler(handler: Any) -> None:
    """Its body would never run."""
    message = f"handler must be a function without `yield`, as its body would never run, got {show(handler)}"
    with pytest.raises(TypeError, match=whole(message)):
        WorkerGroup(handler)


@pytest.mark.parametrize("generator", [sync_generator, async_generator])
async def test_neither_is_what_returns_a_generator(generator: Any) -> None:
    """That is seen only when it has returned."""
    async with WorkerGroup[Any, Any](lambda job: generator(job)) as workers:
        with pytest.raises(TypeError, match=r"^the handler returned <(async_)?generator object"):
            await workers.submit_nowait(1)


def test_regression_a_predicate_that_is_async_is_refused() -> None:
    """What it returns would always count as true."""

    async def predicate(_error: Exception) -> bool:
        return False

    with pytest.raises(TypeError) as caught:
        Retry(3, on=predicate)  # type: ignore[arg-type] # pyright: ignore[reportArgumentType] # the mistake
    assert str(caught.value).startswith("on must be an error class, a tuple of them or a function that is not async")


class Promise:
    def __await__(self) -> Iterator[Any]:
        yield


async def test_a_predicate_that_returns_an_awaitable_fails_the_job() -> None:
    """That is seen only when it is asked."""
    promise: Any = Promise()
    async with WorkerGroup(fail, retry=Retry(3, on=lambda _: promise)) as workers:
        with pytest.raises(TypeError, match=r"^on returned <tests.test_hostile.Promise object"):
            await workers.submit_nowait(1)

    async def wants(_error: Exception) -> bool:
        return False

    async with WorkerGroup(fail, retry=Retry(3, on=lambda error: wants(error))) as workers:  # type: ignore[arg-type,return-value] # pyright: ignore[reportArgumentType] # the mistake
        with pytest.raises(TypeError, match=r"^on returned <coroutine object"):
            await workers.submit_nowait(1)


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_regression_a_predicate_is_asked_once_about_each_timeout(backend: str, *, again: bool) -> None:
    """Not once more when the thread returns."""
    asked: list[Exception] = []

    def predicate(error: Exception) -> bool:
        asked.append(error)
        return again

    def handle(_job: int) -> None:
        while True:
            anyio.from_thread.check_cancelled()

    async def main() -> None:
        async with WorkerGroup(handle, timeout=0.02, retry=Retry(3, on=predicate, delay=0)) as workers:
            result = workers.submit_nowait(1)
            with pytest.raises(TimeoutError):
                await result
            assert result.attempts == (3 if again else 1)

    anyio.run(main, backend=backend)
    assert len(asked) == (2 if again else 1)


async def test_tasks_are_named_for_their_handlers() -> None:
    """By what a reader would look for."""
    names: list[str | None] = []

    async def handle(_job: object = None) -> None:
        names.append(anyio.get_current_task().name)

    async with WorkerGroup(partial(handle)) as workers, Group() as group:
        workers.submit_nowait(1)
        group.go(handle)
    assert names == [handle.__qualname__] * 2
    assert repr(workers).startswith(f"<WorkerGroup of {handle.__qualname__}: 0 of 10 running")


@dataclasses.dataclass(frozen=True)
class FrozenError(Exception):
    key: str


async def test_regression_an_error_whose_attributes_can_not_be_set() -> None:
    """It is its job's, and its task's, failure as any other."""
    error = FrozenError("x")

    async def handle(_job: object = None) -> None:
        raise error

    async with WorkerGroup(handle) as workers:
        result = workers.submit_nowait(1)
        with pytest.raises(type(error)):
            await result
    assert_nothing_left(workers)
    with pytest.raises(ExceptionGroup) as caught:
        async with Group() as group:
            group.go(handle)
    assert list(caught.value.exceptions) == [error]


async def test_a_predicate_that_exits_fails_the_job() -> None:
    """As one that raises anything else."""

    def predicate(_error: Exception) -> bool:
        sys.exit(3)

    async with WorkerGroup(fail, retry=Retry(3, on=predicate)) as workers:
        with pytest.raises(RuntimeError, match=whole("the task raised SystemExit: 3")):
            await workers.submit_nowait(1)
    assert_nothing_left(workers)


async def test_a_predicate_that_is_interrupted_ends_the_group() -> None:
    """It is no judgement of the job."""

    def predicate(_error: Exception) -> bool:
        raise GeneratorExit

    with pytest.raises(BaseExceptionGroup):
        async with WorkerGroup(fail, retry=Retry(3, on=predicate)) as workers:
            workers.submit_nowait(1)
            await anyio.sleep_forever()
    assert workers.leftover == (1,)


# Cycles


class PayloadError(Exception):
    """An error that can be watched."""


@pytest.fixture
def collector_off() -> Iterator[None]:
    """Leave it to reference counts to free everything."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def fail_payload(errors: list[weakref.ref[PayloadError]]) -> None:
    error = PayloadError()
    errors.append(weakref.ref(error))
    try:
        raise error
    finally:
        del error


async def await_it(result: Result[Any]) -> None:
    try:
        await result
    finally:
        del result


async def receive_it(result: Result[Any]) -> None:
    try:
        await result.receive()
    finally:
        del result


async def receive_it_at_once(result: Result[Any]) -> None:
    try:
        while not result.done:  # noqa: ASYNC110 -- without waiting for the result
            await anyio.sleep(1)
        result.receive_nowait()
    finally:
        del result


async def select_it(result: Result[Any]) -> None:
    try:
        await select(result, Channel[int]())
    finally:
        del result


async def select_it_at_once(result: Result[Any]) -> None:
    try:
        while not result.done:  # noqa: ASYNC110 -- as above
            await anyio.sleep(1)
        select_nowait(result)
    finally:
        del result


async def fail_in_time(errors: list[weakref.ref[PayloadError]]) -> None:
    await fail_payload(errors)


@pytest.mark.usefixtures("collector_off")
async def test_a_failure_within_a_timeout_is_freed_at_once() -> None:
    """What the attempt would tell at the end of its time does not keep it."""
    errors: list[weakref.ref[PayloadError]] = []
    async with WorkerGroup(fail_in_time, timeout=1e6) as workers:
        result = workers.submit_nowait(errors)
        try:
            await result
        except PayloadError:
            """As it should."""
        del result
        assert [error() for error in errors] == [None]


WAYS = [await_it, receive_it, receive_it_at_once, select_it, select_it_at_once]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("done_before", [True, False])
@pytest.mark.usefixtures("collector_off")
async def test_regression_a_failed_result_is_freed_at_once(way: Any, *, done_before: bool) -> None:
    """Its error, with all that its traceback holds, is gone with the last name for the result."""
    errors: list[weakref.ref[PayloadError]] = []
    async with WorkerGroup(fail_payload) as workers:
        result = workers.submit_nowait(errors)
        if done_before:
            await wait_all_tasks_blocked()
        try:
            await way(result)
        except PayloadError:
            """As it should."""
        else:
            raise AssertionError
        del result
        assert [error() for error in errors] == [None]
    assert len(errors) == 1


@pytest.mark.usefixtures("collector_off")
async def test_a_failed_job_of_a_map_is_freed_at_once() -> None:
    """With its error."""
    errors: list[weakref.ref[PayloadError]] = []
    async with WorkerGroup(fail_payload) as workers:
        try:
            async for _ in workers.map([errors]):
                raise AssertionError
        except PayloadError:
            """As it should."""
    del workers
    assert [error() for error in errors] == [None]


@pytest.mark.usefixtures("collector_off")
async def test_a_failed_group_is_freed_at_once() -> None:
    """With its errors."""
    errors: list[weakref.ref[PayloadError]] = []
    try:
        async with Group() as group:
            group.go(fail_payload, errors)
            await anyio.sleep_forever()
    except ExceptionGroup:
        """As it should."""
    del group
    # The event loop itself may keep the last task for another tick.
    await anyio.sleep(1)
    assert [error() for error in errors] == [None]


async def test_a_ticker_is_closed_where_it_belongs() -> None:
    """Another thread would wake its tasks behind the event loop's back."""
    with ticker(1) as ticks:

        def elsewhere() -> None:
            with pytest.raises(RuntimeError, match="was made in another event loop"):
                ticks.close()

        await anyio.to_thread.run_sync(elsewhere)
        assert await anext(ticks)
