"""What can be seen of tasks: changes, figures, the log and spans."""

from __future__ import annotations

import io
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import aclosing
from contextvars import copy_context
from datetime import datetime
from functools import partial
from itertools import pairwise
from typing import Any

import anyio
import pytest
from anyio import (
    ClosedResourceError,
    create_task_group,
    fail_after,
    move_on_after,
    sleep,
    wait_all_tasks_blocked,
)
from msgspec.structs import replace
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from chanflow import Retry
from chanflow.tasks import (
    ArgumentError,
    Handler,
    HandlerStatistics,
    Histogram,
    JsonFormatter,
    TaskFilter,
    TaskRecord,
    TaskService,
    TaskStatus,
    UnknownTaskError,
    current_task,
    wire,
)
from chanflow.tasks._log import current
from chanflow.tasks._statistics import BOUNDS
from chanflow.tasks.record import finish
from chanflow.tasks.store import News
from chanflow.tasks.stores.memory import MemoryStore
from tests.support.faulty_bus import fail
from tests.support.messages import whole
from tests.support.tasks import broken, count_up, double, serving, slow

pytestmark = pytest.mark.anyio


class Watcher:
    """Notes what it is told of a task."""

    def __init__(self, service: TaskService, task_id: str, pause: float = 0.0) -> None:
        self.service = service
        self.task_id = task_id
        self.pause = pause
        self.records: list[TaskRecord] = []
        self.times: list[float] = []

    async def watch(self) -> None:
        async with aclosing(self.service.watch(self.task_id)) as records:
            async for record in records:
                self.records.append(record)
                self.times.append(anyio.current_time())
                await sleep(self.pause)

    @property
    def statuses(self) -> list[str]:
        return [record.status.value for record in self.records]


# Watching


async def test_each_change_is_told() -> None:
    """From how it is now to its end: who watches sees it when it happens."""
    async with serving(count_up) as service:
        task_id = await service.submit("count_up", upto=3, delay=5.0)
        watchers = [Watcher(service, task_id) for _ in range(3)]
        async with create_task_group() as tasks:
            for watcher in watchers:
                tasks.start_soon(watcher.watch)
            await wait_all_tasks_blocked()
            assert len(service._watches) == 1
        assert not service._watches
        for watcher in watchers:
            records = watcher.records
            assert watcher.statuses[:2] == ["pending", "running"]
            assert watcher.statuses[-1] == "success"
            assert [record.progress.done for record in records if record.progress] == [0, 1, 2, 2]
            assert records[-1] == await service.get(task_id)
            assert all(one != other for one, other in pairwise(records))
            # What happens in one moment may be told as one change.
            assert sorted({round(at - watcher.times[0]) for at in watcher.times}) == [0, 5, 6, 7, 8]


async def test_regression_news_in_the_wrong_order() -> None:
    """What a task was before its end is told after it, by another caller who had to wait: the end counts."""
    store = MemoryStore()
    async with serving(double, store=store, workers=0) as service:
        task_id = await service.submit("double")
        now = store.now()
        await store.claim({"double": None}, worker="a", now=now, lease_until=now + 9.0, limit=1)
        watcher = Watcher(service, task_id)
        with fail_after(60.0):
            async with create_task_group() as tasks:
                tasks.start_soon(watcher.watch)
                await wait_all_tasks_blocked()
                cancelling = await service.cancel(task_id)
                await store.change(task_id, partial(finish, worker="a", status=TaskStatus.FAILED, now=now, ttl=99.0))
                service._hear(News(task_id, "double", cancelling.status, cancel_requested=True, record=cancelling))
        assert watcher.statuses == ["running", "failed"]


async def test_a_slow_watcher_is_told_of_the_last() -> None:
    """What comes faster than it is asked for is passed over, but not the end."""
    async with serving(count_up) as service:
        task_id = await service.submit("count_up", upto=20)
        watcher = Watcher(service, task_id, pause=7.0)
        with fail_after(60.0):
            await watcher.watch()
        assert len(watcher.records) <= 5
        assert watcher.records[-1] == await service.get(task_id)
        assert watcher.statuses[-1] == "success"
        # One that comes when all is over is told of the end alone.
        late = Watcher(service, task_id)
        await late.watch()
        assert late.records == watcher.records[-1:]


async def test_watching_what_is_retried_and_cancelled() -> None:
    """A failed attempt is told, and the cancellation of a pending task at once."""
    service = TaskService()

    @service.task(retry=Retry(2, delay=1000.0, jitter=0))
    async def flaky() -> None:
        await sleep(1.0)
        msg = "not yet"
        raise ValueError(msg)

    async with service:
        task_id = await service.submit(flaky)
        watcher = Watcher(service, task_id)
        async with create_task_group() as tasks:
            tasks.start_soon(watcher.watch)
            await sleep(5.0)
            assert watcher.statuses[-2:] == ["running", "pending"]
            assert watcher.records[-1].error_message == "not yet"
            await service.cancel(task_id)
        assert watcher.statuses[-2:] == ["pending", "cancelled"]
        again = await service.retry(task_id)
        assert again.status is TaskStatus.PENDING
        watcher = Watcher(service, task_id)
        async with create_task_group() as tasks:
            tasks.start_soon(watcher.watch)
            await sleep(0.5)
            running = await service.cancel(task_id)
            assert (running.status, running.cancel_requested) == (TaskStatus.RUNNING, True)
        assert watcher.statuses[-2:] == ["running", "cancelled"]


async def test_a_cancelled_watcher_leaves_nothing() -> None:
    """Those who stay are told as before."""
    async with serving(slow) as service:
        task_id = await service.submit("slow")
        stays, leaves = Watcher(service, task_id), Watcher(service, task_id)
        async with create_task_group() as tasks:
            tasks.start_soon(stays.watch)
            with move_on_after(5.0) as scope:
                await leaves.watch()
            assert scope.cancelled_caught
            assert service._watches[task_id].watchers == 1
        assert not service._watches
        assert stays.statuses[-1] == "success"
        assert leaves.statuses[-1] == "running"


async def test_watching_what_is_not_there() -> None:
    """An unknown task, and a service that is closed, are told at once, and leave nothing."""
    service = TaskService()
    with pytest.raises(ClosedResourceError, match=whole("the task service is closed, or its block was not entered")):
        await Watcher(service, "id").watch()
    async with service:
        with pytest.raises(UnknownTaskError, match=whole("there is no task 'id', or it has expired")):
            await Watcher(service, "id").watch()
    assert not service._watches


async def test_a_watch_ends_with_the_service() -> None:
    """Who watches a task that doesn't end any more is told so."""
    service = TaskService(workers=0)
    service.task(double)
    told: list[str] = []

    async def watch(task_id: str) -> None:
        with pytest.raises(
            ClosedResourceError, match=whole("the task service is closed, or its block was not entered")
        ):
            await Watcher(service, task_id).watch()
        told.append("closed")

    async with create_task_group() as tasks, service:
        task_id = await service.submit("double")
        for _ in range(2):
            tasks.start_soon(watch, task_id)
        await wait_all_tasks_blocked()
    assert told == ["closed"] * 2
    assert not service._watches


async def test_other_processes_changes_are_noticed() -> None:
    """Even if nobody tells: a shared store is asked now and again."""
    store = MemoryStore()
    store.shared = True
    asked: list[float] = []
    get = store.get

    async def note(task_id: str, now: float) -> TaskRecord | None:
        asked.append(anyio.current_time())
        return await get(task_id, now)

    async with serving(double, store=store, workers=0) as service:
        task_id = await service.submit("double")
        store.get = note  # type: ignore[method-assign]
        watcher = Watcher(service, task_id)
        async with create_task_group() as tasks:
            tasks.start_soon(watcher.watch)
            await sleep(59.95)
            assert watcher.statuses == ["pending"]
            pauses = [after - before for before, after in pairwise(asked)]
            assert pauses == pytest.approx([5.0] * 11)
            changed_at = anyio.current_time()
            store._listeners.clear()
            await store.change(
                task_id, lambda record: replace(record, status=TaskStatus.FAILED, error_type="E", error_message="e")
            )
            store._listeners.append(service._hear)
        assert watcher.statuses == ["pending", "failed"]
        assert watcher.times[-1] - changed_at <= 5.0


async def test_news_that_were_missed() -> None:
    """When some may have been, whoever waits looks again at once."""
    store = MemoryStore()
    store.shared = True
    async with serving(double, store=store, workers=0) as service:
        task_id = await service.submit("double")
        watcher = Watcher(service, task_id)
        async with create_task_group() as tasks:
            tasks.start_soon(watcher.watch)
            await wait_all_tasks_blocked()
            at = anyio.current_time()
            store._listeners.clear()
            await service.cancel(task_id)
            service._hear(None)
            store._listeners.append(service._hear)
        assert watcher.times[-1] == at


async def test_own_changes_in_a_shared_store_are_told_at_once() -> None:
    """They don't wait for the next look."""
    store = MemoryStore()
    store.shared = True
    async with serving(double, store=store, workers=0) as service:
        task_id = await service.submit("double")
        watcher = Watcher(service, task_id)
        async with create_task_group() as tasks:
            tasks.start_soon(watcher.watch)
            await sleep(50.05)
            at = anyio.current_time()
            await service.cancel(task_id)
        assert watcher.times[-1] == at
        assert watcher.statuses == ["pending", "cancelled"]


# Figures


async def test_statistics() -> None:
    """What was submitted, runs, ended and was attempted again is counted by handler."""
    service = TaskService(workers=2)
    service.task(slow)

    @service.task(retry=Retry(3, delay=1.0, jitter=0))
    async def flaky() -> None:
        msg = "not yet"
        raise ValueError(msg)

    empty = HandlerStatistics()
    assert service.statistics().handlers == {"slow": empty, "flaky": empty}
    assert (service.statistics().workers, service.statistics().running) == (2, 0)
    async with service:
        await service.submit(slow.__name__, seconds=0.2)
        for _ in range(2):
            assert await service.submit("slow", seconds=4.0, idempotency_key="once")
        cancelled = await service.submit("slow", delay=50.0)
        running = await service.submit("slow", seconds=100.0)
        await wait_all_tasks_blocked()
        before = service.statistics()
        assert before.running == before.handlers["slow"].running == 2
        await sleep(5.0)
        await service.cancel(cancelled)
        await service.wait(await service.submit(flaky))
        figures = service.statistics()
        assert figures.running == 1
        ours = figures.handlers["slow"]
        assert (ours.submitted, ours.running, ours.retried) == (4, 1, 0)
        assert ours.ended == {TaskStatus.SUCCESS: 2, TaskStatus.FAILED: 0, TaskStatus.CANCELLED: 0}
        assert sum(ours.waited.counts) == 3
        assert ours.waited.total == pytest.approx(0.2, abs=0.05)
        assert ours.ran.total == pytest.approx(4.2, abs=0.05)
        assert [ours.ran.counts[BOUNDS.index(bound)] for bound in (0.25, 5.0)] == [1, 1]
        flaky_figures = figures.handlers["flaky"]
        assert (flaky_figures.submitted, flaky_figures.retried, sum(flaky_figures.waited.counts)) == (1, 2, 3)
        assert flaky_figures.ended[TaskStatus.FAILED] == 1
        assert len(figures.recent) == 3
        assert figures.recent[1] == pytest.approx((0.0, 4.0), abs=0.05)
        # What was given stays as it is.
        assert before.handlers["slow"].ended[TaskStatus.SUCCESS] == 0
        assert sum(before.handlers["slow"].ran.counts) == 0
        await service.cancel(running)
        await service.wait(running)
        figures = service.statistics()
        assert figures.handlers["slow"].ended[TaskStatus.CANCELLED] == 1
        assert figures.running == figures.handlers["slow"].running == 0
    assert service.statistics() == figures


async def test_the_times_of_the_last_tasks_are_kept() -> None:
    """Of no more than 256 of them."""
    async with serving(double) as service:
        for _ in range(300):
            await service.result(await service.submit("double"))
        figures = service.statistics()
        assert len(figures.recent) == 256
        assert sum(figures.handlers["double"].ran.counts) == 300


def test_a_histogram() -> None:
    """A time on a bound is below it; one beyond all bounds is counted, too."""
    histogram = Histogram()
    for seconds in (0.0, 0.005, 0.0051, 1800.0, 1800.1):
        histogram.add(seconds)
    assert histogram.counts == [2, 1, *[0] * (len(BOUNDS) - 3), 1, 1]
    assert histogram.total == pytest.approx(3600.1101)


async def test_what_was_put_back_is_counted_as_left() -> None:
    """A service that is cut off has nothing running."""
    service = TaskService()
    service.task(slow)
    async with service:
        await service.submit("slow")
        await wait_all_tasks_blocked()
        await service.shutdown(1.0)
        figures = service.statistics().handlers["slow"]
        assert (figures.running, sum(figures.ended.values()), figures.retried) == (0, 0, 0)


async def test_what_a_service_says_of_itself() -> None:
    """Whether it is open, draining, and what is registered."""
    service = TaskService()
    handler = service.task(double)
    assert isinstance(handler, Handler)
    assert (service.is_open, service.is_draining) == (False, True)
    assert service.handlers == {"double": handler}
    with pytest.raises(TypeError):
        service.handlers["other"] = handler  # type: ignore[index]
    async with service:
        assert (service.is_open, service.is_draining) == (True, False)
        await service.bus.publish("topic", b"")
        await service.shutdown()
        assert (service.is_open, service.is_draining) == (True, True)
    assert (service.is_open, service.is_draining) == (False, True)


async def test_the_number_of_workers_can_be_set_before() -> None:
    """As long as none is there."""
    service = TaskService(workers=3)
    assert service.workers == 3
    service.workers = 1
    service.task(slow)
    with pytest.raises(ValueError, match=whole("workers must be >= 0, got -1")):
        service.workers = -1
    async with service:
        with pytest.raises(RuntimeError, match=whole("workers can't be set after the service's block was entered")):
            service.workers = 2
        first, second = [await service.submit("slow") for _ in range(2)]
        await sleep(1.0)
        assert [(await service.get(each)).status.value for each in (first, second)] == ["running", "pending"]
        await service.wait(second)
        assert service.statistics().workers == 1


async def test_submit_encoded() -> None:
    """Arguments that were checked already are taken as they are."""
    async with serving(double) as service:
        handler = service.handlers["double"]
        encoded = handler.encode_json(b'{"number": 4}')
        for which in (handler, "double"):
            assert await service.result(await service.submit_encoded(which, encoded)) == 8
        with pytest.raises(UnknownTaskError, match=whole("no task 'other' is registered with this service")):
            await service.submit_encoded("other", encoded)
        with pytest.raises(ValueError, match=whole("delay must be >= 0, got -1")):
            await service.submit_encoded("double", encoded, delay=-1)
    with pytest.raises(ClosedResourceError, match=whole("the task service is closed, or its block was not entered")):
        await service.submit_encoded("double", encoded)


async def test_a_record_as_json_and_back() -> None:
    """What a record says in JSON is read again as what it was, to the millisecond."""
    async with serving(double, count_up, broken) as service:
        ids = [
            await service.submit("double", number=4, idempotency_key="key"),
            await service.submit("count_up", upto=2),
            await service.submit("broken"),
            await service.submit("double", delay=1000.0),
        ]
        for task_id in ids[:3]:
            await service.wait(task_id)
        for task_id in ids:
            record = await service.get(task_id)
            again = wire.from_json(json.loads(json.dumps(wire.to_json(record))))
            assert wire.to_json(again) == wire.to_json(record)
            assert (again.decode_arguments(), again.decode_result()) == (
                record.decode_arguments(),
                record.decode_result(),
            )
            assert (again.result is None) == (record.result is None)
            short = wire.from_json(wire.to_json(record, whole=False))
            assert short.decode_arguments() == {}
        await service.cancel(ids[-1])


# The log


@pytest.fixture
def lines() -> Iterator[list[dict[str, Any]]]:
    """Give the lines of the log, as they are written."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.addFilter(TaskFilter())
    handler.setFormatter(JsonFormatter())
    root = logging.getLogger()
    root.addHandler(handler)
    level = root.level
    root.setLevel(logging.INFO)
    found: list[dict[str, Any]] = []

    class Lines(list[dict[str, Any]]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            found[:] = [json.loads(line) for line in written.getvalue().splitlines()]
            return iter(found)

    try:
        yield Lines()
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


async def test_lines_of_the_log_say_which_task(lines: list[dict[str, Any]]) -> None:
    """Both those that chanflow writes, and a handler's own, in a task of the event loop or a thread."""
    log = logging.getLogger("program")

    async def work(number: int) -> None:
        log.info("begin %d", number)
        await sleep(1.0)
        log.info("end %d", number)

    def work_in_thread() -> None:
        log.warning("in a thread\n%s", "second line")

    service = TaskService(workers=5)
    service.task(work)
    service.task(work_in_thread)
    service.task(broken)
    flaky = service.task(name="flaky", retry=Retry(2, delay=1.0, jitter=0))(broken)
    async with service:
        ids = [await service.submit("work", number=number) for number in range(3)]
        thread = await service.submit("work_in_thread")
        failing, retried = await service.submit("broken"), await service.submit(flaky)
        for task_id in (*ids, thread, failing, retried):
            await service.wait(task_id)
        log.info("outside")
    told = list(lines)
    ours = [line for line in told if line["logger"] == "program"]
    for number, task_id in enumerate(ids):
        about = {(line["message"], line["task_name"]) for line in ours if line.get("task_id") == task_id}
        assert about == {(f"begin {number}", "work"), (f"end {number}", "work")}
    [line] = [line for line in ours if line.get("task_name") == "work_in_thread"]
    assert (line["message"], line["level"], line["task_id"]) == ("in a thread\nsecond line", "WARNING", thread)
    [line] = [line for line in ours if "task_id" not in line]
    assert line["message"] == "outside"
    assert datetime.fromisoformat(line["time"]).tzinfo is not None
    chanflows = [line for line in told if line["logger"] == "chanflow.tasks"]
    assert [
        (line["task_id"], line["task_name"], line["level"]) for line in chanflows if line["task_id"] == failing
    ] == [(failing, "broken", "ERROR")]
    assert [(line["level"], line["task_name"]) for line in chanflows if line["task_id"] == retried] == [
        ("WARNING", "flaky"),
        ("ERROR", "flaky"),
    ]
    assert all(line["exception"].endswith("ValueError: out of order") for line in chanflows)
    assert all("exception" not in line for line in ours)


async def test_the_log_of_a_lost_task(lines: list[dict[str, Any]]) -> None:
    """It says which one it is."""
    store = MemoryStore()
    async with serving(slow, store=store) as service:
        task_id = await service.submit("slow", seconds=100.0)
        await wait_all_tasks_blocked()
        await store.change(task_id, lambda record: replace(record, worker="another"))
        await sleep(2.0)
        await store.change(task_id, lambda record: replace(record, status=TaskStatus.FAILED))
    [line] = lines
    assert (line["task_id"], line["task_name"]) == (task_id, "slow")


def test_a_line_that_says_itself_which_task() -> None:
    """A filter doesn't put another in its place, and lets every line pass."""
    task = TaskRecord(id="id", name="name", arguments=b"", created_at=0.0, run_at=0.0)
    for own, told in (({"task_id": "own"}, "own"), ({}, "id")):
        record = logging.LogRecord("name", logging.INFO, "file", 1, "message", (), None)
        vars(record).update(own)
        context = copy_context()
        context.run(current.set, task)
        assert context.run(TaskFilter().filter, record)
        assert json.loads(JsonFormatter().format(record))["task_id"] == told


async def test_current_task() -> None:
    """A handler is told which task it is, and nobody else is."""
    seen: list[TaskRecord | None] = []

    async def look() -> None:
        seen.append(current_task())
        await sleep(1.0)
        seen.append(current_task())

    def look_in_thread() -> None:
        seen.append(current_task())

    assert current_task() is None
    async with serving(look, look_in_thread, workers=1) as service:
        first, second = await service.submit("look"), await service.submit("look_in_thread")
        await service.wait(first)
        await service.wait(second)
        assert current_task() is None
        assert sorted(record.id for record in seen if record) == sorted([first, first, second])
        assert all(record and (record.status, record.attempts) == (TaskStatus.RUNNING, 1) for record in seen)


# Spans


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Collect the spans of a program that uses OpenTelemetry."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    # It can be set only once, officially.
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", provider)
    return exporter


def span_of(exporter: InMemorySpanExporter, name: str) -> ReadableSpan:
    [span] = [span for span in exporter.get_finished_spans() if span.name == name]
    return span


def context_of(span: ReadableSpan) -> trace.SpanContext:
    context = span.get_span_context()
    assert context is not None
    return context


async def test_spans(spans: InMemorySpanExporter) -> None:
    """The run of a task belongs to the trace in which it was submitted, and what its handler does to the run."""
    inside: list[Any] = []

    async def work() -> None:
        inside.append(trace.get_current_span().get_span_context())
        with trace.get_tracer("program").start_as_current_span("step"):
            await sleep(1.0)

    async with serving(work) as service:
        with trace.get_tracer("program").start_as_current_span("request") as request:
            task_id = await service.submit("work")
        await service.wait(task_id)
    send, process, step = [span_of(spans, name) for name in ("send tasks.work", "process tasks.work", "step")]
    context: Any = request.get_span_context()
    assert {span.context and span.context.trace_id for span in (send, process, step)} == {context.trace_id}
    assert send.parent is not None
    assert process.parent is not None
    assert step.parent is not None
    assert send.parent.span_id == context.span_id
    assert process.parent.span_id == context_of(send).span_id
    assert step.parent.span_id == context_of(process).span_id == inside[0].span_id
    assert (send.kind, process.kind) == (trace.SpanKind.PRODUCER, trace.SpanKind.CONSUMER)
    common = {
        "messaging.system": "chanflow",
        "messaging.destination.name": "tasks.work",
        "messaging.message.id": task_id,
    }
    assert dict(send.attributes or {}) == common | {
        "messaging.operation.name": "send",
        "messaging.operation.type": "send",
    }
    assert dict(process.attributes or {}) == common | {
        "messaging.operation.name": "process",
        "messaging.operation.type": "process",
        "chanflow.task.attempt": 1,
    }
    assert process.status.is_ok
    assert process.instrumentation_scope is not None
    assert process.instrumentation_scope.name == "chanflow"


async def test_spans_of_attempts_that_fail(spans: InMemorySpanExporter) -> None:
    """Each attempt has its own, and one that failed says with what."""
    service = TaskService()
    attempts = 0

    @service.task(retry=Retry(2, delay=1.0, jitter=0))
    async def flaky() -> None:
        nonlocal attempts
        attempts += 1
        if attempts == 1:
            msg = "not yet"
            raise ValueError(msg)

    async with service:
        await service.wait(await service.submit(flaky))
    send = span_of(spans, "send tasks.flaky")
    failed, succeeded = [span for span in spans.get_finished_spans() if span.name == "process tasks.flaky"]
    for number, span in enumerate((failed, succeeded), 1):
        assert (span.attributes or {})["chanflow.task.attempt"] == number
        assert span.parent is not None
        assert span.parent.span_id == context_of(send).span_id
    assert (failed.status.status_code, failed.status.description) == (trace.StatusCode.ERROR, "ValueError: not yet")
    assert (failed.attributes or {})["error.type"] == "ValueError"
    assert [event.name for event in failed.events] == ["exception"]
    assert succeeded.status.is_ok
    assert "error.type" not in (succeeded.attributes or {})


async def test_spans_of_what_is_cancelled_and_refused(spans: InMemorySpanExporter) -> None:
    """A cancelled run is no error; a submission that fails is one, and nothing is refused for the spans' sake."""
    store = MemoryStore()
    async with serving(slow, store=store) as service:
        task_id = await service.submit("slow", seconds=100.0)
        await sleep(1.0)
        await service.cancel(task_id)
        await service.wait(task_id)
        with pytest.raises(ArgumentError):
            await service.submit("slow", seconds="1")
        create = store.create
        store.create = fail  # type: ignore[method-assign]
        with pytest.raises(Exception, match=whole("the disk is gone")):
            await service.submit("slow")
        store.create = create  # type: ignore[method-assign]
        assert await service.result(await service.submit("slow", seconds=1.0)) == "done"
    cancelled, _ = [span for span in spans.get_finished_spans() if span.name == "process tasks.slow"]
    assert cancelled.status.status_code is not trace.StatusCode.ERROR
    sent = [span.status.is_ok for span in spans.get_finished_spans() if span.name == "send tasks.slow"]
    assert sent == [True, False, True]


async def test_a_trace_is_kept_with_its_task(spans: InMemorySpanExporter) -> None:
    """A service that finds a task in the store, of which no message tells it, runs it as part of its trace."""
    store = MemoryStore()
    async with serving(double, store=store, workers=0) as before:
        task_id = await before.submit("double")
    context = context_of(span_of(spans, "send tasks.double"))
    carried = (await store.get(task_id, 0.0) or pytest.fail("it is not there")).trace
    assert (carried or {})["traceparent"].startswith(f"00-{context.trace_id:032x}-{context.span_id:016x}-")
    async with serving(double, store=store) as service:
        await service.wait(task_id)
    parent = span_of(spans, "process tasks.double").parent
    assert parent is not None
    assert parent.span_id == context.span_id


async def test_a_task_that_nobody_traced(spans: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of a program that made no spans begins a trace where it runs."""
    store = MemoryStore()
    with monkeypatch.context() as without:
        without.delitem(sys.modules, "opentelemetry.trace")
        async with serving(double, store=store, workers=0) as before:
            task_id = await before.submit("double")
    async with serving(double, store=store) as service:
        assert (await service.get(task_id)).trace is None
        await service.wait(task_id)
    assert span_of(spans, "process tasks.double").parent is None


async def test_a_program_without_opentelemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of it is imported, and nothing is made."""
    for name in [name for name in sys.modules if name.split(".")[0] == "opentelemetry"]:
        monkeypatch.delitem(sys.modules, name)
    async with serving(double) as service:
        assert service._tracing is None
        task_id = await service.submit("double")
        assert await service.result(task_id) == 2
        assert (await service.get(task_id)).trace is None
    assert not [name for name in sys.modules if name.split(".")[0] == "opentelemetry"]
