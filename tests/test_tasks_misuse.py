"""What is asked for wrongly is one clear error, or works."""

from __future__ import annotations

import asyncio
import math
import sys
import threading
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio import create_task_group, fail_after

from chanflow import Retry
from chanflow._check import show
from chanflow.tasks import (
    ArgumentError,
    Progress,
    ProgressReport,
    TaskFailedError,
    TaskService,
    TaskStatus,
    UnknownTaskError,
)
from tests.support.messages import whole
from tests.support.redis import running_redis
from tests.support.tasks import double

pytestmark = [pytest.mark.anyio, pytest.mark.real_time]


@pytest.fixture(params=["memory", "sqlite", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "redis":
        with running_redis() as url:
            yield url
    else:
        yield "memory://" if request.param == "memory" else f"sqlite:///{tmp_path}/tasks.db"


async def test_entering_twice(store: str) -> None:
    """The second time is refused, and the first one's block goes on; afterwards it can be entered again."""
    service = TaskService(store=store)
    service.task(double)
    message = whole("the service's block was entered already: a service has one at a time")
    async with service:
        with pytest.raises(RuntimeError, match=message):
            await service.__aenter__()
        with fail_after(10.0):
            assert await service.result(await service.submit("double", number=2)) == 4
    async with service:
        assert await service.result(await service.submit("double", number=3)) == 6


async def test_entering_twice_at_the_same_time(store: str) -> None:
    """Also while the first one is still opening."""
    service = TaskService(store=store)
    outcomes: list[str] = []

    async def enter() -> None:
        try:
            async with service:
                await anyio.sleep(0.2)
                outcomes.append("entered")
        except RuntimeError:
            outcomes.append("refused")

    async with create_task_group() as tasks:
        tasks.start_soon(enter)
        tasks.start_soon(enter)
    assert outcomes == ["refused", "entered"]


async def test_another_event_loop(store: str) -> None:
    """A call from there is refused at once, instead of waiting for ever."""
    service = TaskService(store=store)
    service.task(double)
    told: list[str] = []

    async def call() -> None:
        try:
            await service.submit("double")
        except RuntimeError as error:
            told.append(str(error))

    async with service:
        thread = threading.Thread(target=asyncio.run, args=[call()])
        thread.start()
        await anyio.to_thread.run_sync(thread.join, 10.0)
    [message] = told
    assert message == (
        "the task service belongs to the event loop in which its block was entered, and this is another one"
    )


async def test_regression_ids_that_no_task_has(store: str) -> None:
    """They are unknown, whatever a client of the store could make of them, and the service goes on."""
    service = TaskService(store=store)
    service.task(double)
    async with service:
        task_id = await service.submit("double")
        for unknown in ("", "\ud800", "a\0b", "two\nlines", "9" * 100_000):
            for call in service.get, service.result, service.cancel, service.wait, service.retry:
                with pytest.raises(
                    UnknownTaskError, match=whole(f"there is no task {show(unknown)}, or it has expired")
                ):
                    await call(unknown)
            message = f"after must be the id of a task that is there; {show(unknown)} has expired, or never was"
            with pytest.raises(UnknownTaskError, match=whole(message)):
                await service.page(after=unknown)
        wrong: Any
        after: Any = 5
        for wrong in (None, 5, b"x", ["x"]):
            with pytest.raises(TypeError, match=whole(f"task_id must be a str, got {wrong!r}")):
                await service.get(wrong)
        with pytest.raises(TypeError, match=whole("after must be a str, got 5")):
            await service.page(after=after)
        with fail_after(10.0):
            assert await service.result(task_id) == 2


async def test_regression_arguments_too_deep_for_an_idempotency_key() -> None:
    """They are refused, as others that don't fit."""
    deep: list[Any] = []
    # Before 3.12, Python's own limit is msgspec's, too, and the arguments can be stored only if they are below it.
    for _ in range(500 if sys.version_info < (3, 12) else 1200):
        deep = [deep]

    async def keep(value: Any) -> None: ...

    service = TaskService()
    service.task(keep)
    async with service:
        with pytest.raises(
            ArgumentError, match=whole("arguments of keep are nested too deeply to have an idempotency key")
        ):
            await service.submit("keep", value=deep, idempotency_key="key")
        assert not sum((await service.count()).values())


async def test_arguments_by_position() -> None:
    """They are told to be passed by name."""
    service = TaskService()
    handler = service.task(double)
    async with service:
        with pytest.raises(
            TypeError, match=whole("a task takes its arguments by name: submit(double, name=value), got 5")
        ):
            await service.submit(handler, 5)


async def test_a_result_that_does_not_fit_its_annotation(store: str) -> None:
    """It fails the task: nobody could read it."""
    service = TaskService(store=store)

    @service.task
    async def wrong() -> int:
        return "five"  # type: ignore[return-value]

    async with service:
        with fail_after(10.0), pytest.raises(TaskFailedError) as caught:
            await service.result(await service.submit(wrong))
        assert str(caught.value) == (
            "wrong failed: ResultError: the result of wrong does not fit its annotation: Expected `int`, got `str`"
        )


def test_an_annotation_that_is_not_plain_data() -> None:
    """A result of it could never be read, which is told when the task is registered."""

    async def strange() -> dict[list[int], int] | complex:
        raise AssertionError

    with pytest.raises(TypeError, match=r"^what strange is annotated to return is not plain data: "):
        TaskService().task(strange)


async def test_progress_in_a_plain_function(store: str) -> None:
    """It is reported by calling, and also by one that would await."""
    service = TaskService(store=store)
    seen: list[ProgressReport | None] = []
    go_on = threading.Event()

    @service.task
    def count(progress: Progress) -> str:
        for number in range(3):
            progress.update(number, 3)
        with pytest.raises(ValueError, match="done must be"):
            progress.update(5, 3)
        go_on.wait(10.0)
        return "done"

    async with service:
        task_id = await service.submit(count)
        with fail_after(10.0):
            async for record in service.watch(task_id):
                seen.append(record.progress)
                if record.progress == ProgressReport(2, 3):
                    go_on.set()
        assert ProgressReport(2, 3) in seen
    report = Progress(lambda _report: double(), in_thread=True)  # type: ignore[arg-type,return-value]
    assert await anyio.to_thread.run_sync(lambda: isinstance(report.update(1, 2).__await__(), object))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ttl": 1e12}, "ttl must be <= 3155760000, a hundred years, got 1000000000000.0"),
        ({"ttl": math.nan}, "ttl must be >= 0, got nan"),
        ({"lease": math.inf}, "lease must be <= 3155760000, a hundred years, got inf"),
    ],
)
def test_times_that_no_date_can_tell(options: Any, message: str) -> None:
    """They are refused when the service is made."""
    with pytest.raises(ValueError, match=whole(message)):
        TaskService(**options)


@pytest.mark.parametrize("delay", [1e12, math.inf])
async def test_a_delay_that_no_date_can_tell(delay: float) -> None:
    """It is refused before anything is stored."""
    service = TaskService()
    service.task(double)
    async with service:
        with pytest.raises(ValueError, match=whole(f"delay must be <= 3155760000, a hundred years, got {delay}")):
            await service.submit("double", delay=delay)
        assert sum((await service.count()).values()) == 0
        task_id = await service.submit("double", delay=3_155_760_000.0)
        await service.cancel(task_id)


async def test_a_ttl_without_end(store: str) -> None:
    """Finished tasks are kept for ever, and are told as any other."""
    service = TaskService(store=store, ttl=math.inf)
    service.task(double)
    async with service:
        with fail_after(10.0):
            task_id = await service.submit("double", idempotency_key="key")
            record = await service.wait(task_id)
            assert (record.status, record.expires_at) == (TaskStatus.SUCCESS, None)
            await service._store.forget(service._store.now() + 1e9)
            assert await service.submit("double", idempotency_key="key") == task_id
            assert [each.id for each in await service.page()] == [task_id]


async def test_a_backoff_that_no_date_can_tell() -> None:
    """It is as long as a delay may be."""
    service = TaskService()

    @service.task(retry=Retry(2, delay=1e300, max_delay=math.inf, jitter=0))
    async def broken() -> None:
        raise ValueError

    async with service:
        task_id = await service.submit(broken)
        with fail_after(10.0):
            async with aclosing(service.watch(task_id)) as records:
                async for record in records:
                    if record.error_type is not None:
                        break
        assert record.run_at - record.created_at == pytest.approx(3_155_760_000.0, abs=60)
        await service.cancel(task_id)
