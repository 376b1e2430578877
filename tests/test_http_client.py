"""The client of a task service over HTTP: what it asks for, and how it goes on where the service is away."""

from __future__ import annotations

import base64
import gc
import json
import logging
import math
import traceback
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, nullcontext
from email.utils import formatdate
from itertools import pairwise
from typing import Any

import anyio
import httpx
import pytest
from anyio import ClosedResourceError, create_task_group, fail_after, move_on_after, sleep, to_thread
from starlette.applications import Starlette
from starlette.routing import Mount

from chanflow import Retry
from chanflow.tasks import (
    ArgumentError,
    IdempotencyError,
    TaskCancelledError,
    TaskFailedError,
    TaskRecord,
    TaskService,
    TaskStatus,
    UnknownTaskError,
)
from chanflow.tasks import wire as wire_module
from chanflow.tasks.http import ServiceError, TaskClient, Watch
from chanflow.tasks.stores.memory import MemoryStore
from tests.support.http import virtual_clock  # noqa: F401 -- a fixture
from tests.support.messages import whole
from tests.support.tasks import broken, count_up, double, serving, slow

pytestmark = pytest.mark.anyio

Answer = Callable[[httpx.Request], httpx.Response]

RECORD = TaskRecord(id="id", name="double", arguments=b"\x80", created_at=1e9, run_at=1e9)
STEADY = Retry(5, delay=1.0, factor=2.0, jitter=0)


@asynccontextmanager
async def asking(app: Any, url: str = "http://test", **options: Any) -> AsyncIterator[TaskClient]:
    """Ask an app."""
    async with (
        httpx.AsyncClient(transport=httpx.ASGITransport(app=app)) as http,
        TaskClient(url, http=http, **options) as client,
    ):
        yield client


@asynccontextmanager
async def served(*handlers: Any, **how: Any) -> AsyncIterator[tuple[TaskService, TaskClient]]:
    """Run a service and ask it."""
    async with serving(*handlers, **how) as service, asking(service.asgi()) as client:
        yield service, client


@asynccontextmanager
async def mocked(answer: Answer, url: str = "http://test", **options: Any) -> AsyncIterator[TaskClient]:
    """Ask what answers as a test says."""
    async with (
        httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http,
        TaskClient(url, http=http, **options) as client,
    ):
        yield client


def in_turn(*answers: Any) -> tuple[Answer, list[httpx.Request]]:
    """Give these answers or errors one after the other, and note what was asked."""
    asked: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(request)
        each = answers[len(asked) - 1]
        if isinstance(each, Exception):
            raise each
        return each

    return answer, asked


def told(record: TaskRecord = RECORD) -> httpx.Response:
    return httpx.Response(200, json=wire_module.to_json(record))


def changed(**changes: Any) -> TaskRecord:
    return wire_module.from_json(wire_module.to_json(RECORD) | changes)


def message(record: TaskRecord) -> bytes:
    return b"event: record\ndata: " + json.dumps(wire_module.to_json(record)).encode() + b"\n\n"


ACCEPTED = httpx.Response(202, json={"task_id": "id", "status": "pending", "status_url": "/tasks/id"})


class Endless(httpx.AsyncByteStream):
    """A stream without an end, as httpx gives it: generators within generators."""

    def __init__(self, part: bytes, more: bytes = b": keep-alive\n\n") -> None:
        self.part = part
        self.more = more
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while True:
            yield self.part
            # At hand without waiting.
            yield self.more
            await sleep(1.0)

    async def aclose(self) -> None:
        self.closed = True


# What it asks for


async def test_submit_and_result() -> None:
    """A task is submitted, waited for, and its result is plain data."""
    async with served(double, slow) as (service, client):
        task_id = await client.submit("double", number=4)
        assert await client.result(task_id) == 8
        record = await client.get(task_id)
        assert record.status is TaskStatus.SUCCESS
        assert (record.decode_arguments(), record.decode_result()) == ({"number": 4}, 8)
        assert len(record.idempotency_key or "") == 32
        same = [await client.submit("double", idempotency_key="key") for _ in range(2)]
        assert same[0] == same[1]
        assert (await service.get(same[0])).idempotency_key == "key"
        began = anyio.current_time()
        task_id = await client.submit("double", delay=2.5, number=1)
        assert (await client.wait(task_id)).decode_result() == 2
        assert anyio.current_time() - began == pytest.approx(2.5, abs=0.1)
        # Longer than any request waits.
        assert await client.result(await client.submit("slow", seconds=75.0)) == "done"


async def test_get_gives_the_record() -> None:
    """It is the service's, but for what is of no use elsewhere, to the millisecond."""
    async with served(count_up) as (service, client):
        task_id = await client.submit("count_up", upto=3)
        await sleep(1.5)
        for _ in range(2):
            here, there = await service.get(task_id), await client.get(task_id)
            assert wire_module.to_json(there) == wire_module.to_json(here)
            assert there.progress == here.progress
            assert there.created_at == pytest.approx(here.created_at, abs=0.001)
            await client.wait(task_id)


async def test_failures_are_those_of_the_service() -> None:
    """Each error comes as the same class, with the service's message."""
    async with served(double, broken, slow) as (_, client):
        missing = whole("there is no task 'none', or it has expired")
        for call in (client.get, client.wait, client.result, client.cancel):
            with pytest.raises(UnknownTaskError, match=missing):
                await call("none")
        with pytest.raises(UnknownTaskError, match=missing):
            await anext(client.watch("none"))
        with pytest.raises(UnknownTaskError, match=whole("there is no task 'none'")):
            await client.submit("none")
        with pytest.raises(
            ArgumentError, match=whole("arguments of double: Expected `int`, got `str` - at `$.number`")
        ):
            await client.submit("double", number="4")
        task_id = await client.submit("double", idempotency_key="key")
        with pytest.raises(
            IdempotencyError, match=whole(f"idempotency key 'key' was used for another task: double {task_id}")
        ):
            await client.submit("double", number=5, idempotency_key="key")
        with pytest.raises(TaskFailedError, match=whole("broken failed: ValueError: out of order")) as caught:
            await client.result(await client.submit("broken"))
        assert caught.value.record.status is TaskStatus.FAILED
        task_id = await client.submit("slow")
        await sleep(1.0)
        assert (await client.cancel(task_id)).cancel_requested
        with pytest.raises(TaskCancelledError, match=whole("slow was cancelled")):
            await client.result(task_id)


async def test_a_token() -> None:
    """It is sent with everything; without it, the service refuses, and is not asked again."""
    async with serving(double) as service:
        app = service.asgi(tokens=["secret"])
        async with asking(app, token="secret") as client:  # noqa: S106 -- of the test
            task_id = await client.submit("double")
            assert await client.result(task_id) == 2
            assert [record.status async for record in client.watch(task_id)] == [TaskStatus.SUCCESS]
        async with asking(app, "http://test/", token=None) as client:
            with pytest.raises(ServiceError, match=whole("http://test: 401 this needs a valid bearer token")) as caught:
                await client.get(task_id)
            assert caught.value.status == 401


@pytest.mark.parametrize("prefix", ["/a/b", "/a/b/"])
async def test_below_a_prefix(prefix: str) -> None:
    """A service that is mounted in another app is asked there."""
    async with serving(double) as service:
        app = Starlette(routes=[Mount("/a/b", app=service.asgi())])
        async with asking(app, f"http://test{prefix}") as client:
            task_id = await client.submit("double")
            assert await client.result(task_id) == 2
            assert [record.status async for record in client.watch(task_id)] == [TaskStatus.SUCCESS]


@pytest.mark.parametrize("name", ["a b", "ä/ö".replace("/", "|"), "?x=1", "#x", "%2F", "a\\b", "a;b:c@d&e=f+g"])
async def test_odd_names(name: str) -> None:
    """What means something in a URL is escaped, in names and ids."""
    service = TaskService()
    service.task(name=name)(double)
    async with service, asking(service.asgi()) as client:
        task_id = await client.submit(name, number=2)
        assert (await client.get(task_id)).name == name
        assert await client.result(task_id) == 4
        with pytest.raises(UnknownTaskError, match=whole(f"there is no task {name!r}, or it has expired")):
            await client.get(name)


async def test_a_slash_is_no_part_of_a_name() -> None:
    """An id with a slash is asked for as one part of the path."""
    answer, asked = in_turn(told(), told(), ACCEPTED)
    async with mocked(answer) as client:
        await client.get("a/../b?c")
        await client.cancel("a/b")
        await client.submit("a/b")
    assert [request.url.raw_path for request in asked] == [
        b"/tasks/a%2F..%2Fb%3Fc",
        b"/tasks/a%2Fb",
        b"/tasks/a%2Fb",
    ]


async def test_what_is_sent() -> None:
    """A submission is JSON with a key of its own; a delay is told exactly."""
    answer, asked = in_turn(*[ACCEPTED] * 3, told())
    async with mocked(answer, timeout=7.0) as client:
        assert await client.submit("double", number=4, self="x", name="y") == "id"
        assert await client.submit("double", delay=0.1 + 0.2) == "id"
        assert await client.submit("double", idempotency_key="key") == "id"
        await client.get("id")
    assert [request.method for request in asked] == ["POST", "POST", "POST", "GET"]
    assert json.loads(asked[0].content) == {"number": 4, "self": "x", "name": "y"}
    assert asked[0].headers["content-type"] == "application/json"
    assert "authorization" not in asked[0].headers
    assert [dict(request.url.params) for request in asked[:3]] == [{}, {"delay": repr(0.1 + 0.2)}, {}]
    keys = [request.headers["idempotency-key"] for request in asked[:3]]
    assert len(keys[0]) == len(keys[1]) == 34
    assert keys[0] != keys[1]
    assert keys[2] == '"key"'
    assert all(request.extensions["timeout"]["read"] == 7.0 for request in asked)


async def test_wait_times_out() -> None:
    """What has not ended in time is told; the task goes on."""
    async with served(slow) as (_, client):
        for timeout in (0, 3, 25.0):
            task_id = await client.submit("slow", seconds=30.0)
            await sleep(0.1)
            for call in (client.wait, client.result):
                began = anyio.current_time()
                with pytest.raises(TimeoutError, match=whole(f"task {task_id} is running after {timeout} s")):
                    await call(task_id, timeout)
                assert anyio.current_time() - began == pytest.approx(timeout, abs=1.0)
                task_id = await client.submit("slow", seconds=30.0)
                await sleep(0.1)
        assert await client.result(task_id, 31.0) == "done"


async def test_wait_times_out_without_an_answer() -> None:
    """However long it would be tried again."""
    async with mocked(
        in_turn(*[httpx.Response(503)] * 9)[0], retry=Retry(9, delay=10.0, jitter=0), timeout=2.0
    ) as client:
        began = anyio.current_time()
        with pytest.raises(
            TimeoutError, match=whole("http://test: no answer to how task id is, after 30.0 s and 2.0 s more")
        ):
            await client.wait("id", 30.0)
        assert anyio.current_time() - began == pytest.approx(32.0, abs=0.1)


async def test_wait_lets_the_service_wait() -> None:
    """A request waits for 20 seconds at most, and is given that much longer for its answer."""
    end = changed(status="success", result=5)
    answer, asked = in_turn(told(), told(), told(end))
    async with mocked(answer, timeout=7.0, retry=STEADY) as client:
        assert await client.result("id") == 5
    assert [request.headers["prefer"] for request in asked] == ["wait=20"] * 3
    assert asked[0].extensions["timeout"]["read"] == 27.0


@pytest.mark.parametrize("max_wait", [0.0, 0.5])
async def test_a_service_that_does_not_wait(max_wait: float) -> None:
    """It is asked now and again, and not as fast as it answers."""
    async with serving(slow) as service:
        asked = 0
        app = service.asgi(max_wait=max_wait)

        async def count(scope: Any, receive: Any, send: Any) -> None:
            nonlocal asked
            asked += 1
            assert asked < 100
            await app(scope, receive, send)

        async with asking(count) as client:
            task_id = await client.submit("slow")
            with fail_after(12.0):
                assert await client.result(task_id) == "done"


async def test_cancelling_a_call() -> None:
    """Whoever stops waiting leaves nothing behind."""
    async with served(slow) as (service, client):
        task_id = await client.submit("slow")
        with move_on_after(1.0) as scope:
            await client.result(task_id)
        assert scope.cancelled_caught
        assert not service._watches
        assert await client.result(task_id) == "done"


# Watching


async def test_watch() -> None:
    """Each change is given once, and the last one is the end."""
    async with served(count_up) as (service, client):
        task_id = await client.submit("count_up", upto=3)
        # This transport gives a stream when it is over.
        records = [record async for record in client.watch(task_id)]
        assert records[-1].decode_result() == 3
        assert wire_module.to_json(records[-1]) == wire_module.to_json(await service.get(task_id))
        assert all(one != other for one, other in pairwise(records))
        assert [record.progress.done for record in records if record.progress][-3:] == [1, 2, 2]
        assert [record async for record in client.watch(task_id)] == records[-1:]
        assert not service._watches


async def test_watch_goes_on_after_a_broken_stream() -> None:
    """A connection that breaks is made again, and nothing is told twice."""
    first, second, third = (changed(attempts=number, status="running") for number in (1, 2, 3))
    end = changed(attempts=3, status="success", result=1)

    async def breaking() -> AsyncIterator[bytes]:
        yield message(first)
        yield b": keep-alive\n\n"
        yield message(second)[:40]
        yield message(second)[40:]
        yield message(third)[:60]
        raise httpx.ReadError("gone")  # noqa: EM101 -- it is only to be seen again

    answer, asked = in_turn(
        told(first),
        httpx.Response(200, content=breaking()),
        # It was already told of.
        told(second),
        httpx.Response(200, content=message(second) + message(third)),
        told(third),
        httpx.ConnectError("refused"),
        told(third),
        httpx.Response(503),
        told(third),
        httpx.Response(200, content=message(third) + message(end)[:60]),
        told(third),
        httpx.Response(200, content=b"data: []\n\ndata: {}\n\n"),
        told(third),
        httpx.Response(200, content=b"data: " + b"[" * 200_000 + b"\n\n"),
        told(third),
        httpx.Response(200, stream=Endless(b"x" * 40_000_000, b"x")),
        told(third),
        httpx.Response(200, content=message(third) + message(end)),
    )
    async with mocked(answer) as client:
        with fail_after(60.0):
            assert [record async for record in client.watch("id")] == [first, second, third, end]
    assert len(asked) == 18
    assert {request.url.path for request in asked[1::2]} == {"/tasks/id/events"}


async def test_watch_ends_with_a_task_that_is_gone() -> None:
    """A task that expires while its stream is broken is told of as unknown."""
    problem = {"content-type": "application/problem+json"}
    answer, _ = in_turn(
        told(),
        httpx.Response(200, content=message(RECORD)),
        httpx.Response(404, json={"detail": "there is no task 'id', or it has expired"}, headers=problem),
    )
    async with mocked(answer) as client, aclosing(client.watch("id")) as records:
        assert await anext(records) == RECORD
        with pytest.raises(UnknownTaskError, match=whole("there is no task 'id', or it has expired")):
            await anext(records)


async def test_watch_finds_the_end_without_a_stream() -> None:
    """It is asked for each time before the stream."""
    end = changed(status="failed", error_type="ValueError", error_message="no")
    answer, asked = in_turn(told(), httpx.Response(200, content=b""), told(end))
    async with mocked(answer) as client:
        assert [record async for record in client.watch("id")] == [RECORD, end]
    assert len(asked) == 3


@pytest.mark.parametrize("how", ["empty", "refused", "missing"])
async def test_watch_does_not_hammer_a_service_without_streams(how: str) -> None:
    """Where each stream is over at once, it is asked for again after a while, and not as fast as can be."""
    asked = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        # The event loop's time stands still for who never waits.
        assert asked < 200
        if not request.url.path.endswith("/events"):
            return told()
        if how == "refused":
            raise httpx.ConnectError("refused")  # noqa: EM101 -- as above
        return httpx.Response(200 if how == "empty" else 404)

    async with mocked(answer) as client:
        with move_on_after(10.0):
            async for record in client.watch("id"):
                assert record == RECORD
    assert asked > 2


async def test_leaving_a_watch() -> None:
    """An iteration that is given up closes its connection."""
    closed = False

    async def endless() -> AsyncGenerator[bytes, None]:
        nonlocal closed
        try:
            while True:
                yield message(changed(attempts=1))
                await sleep(1.0)
        finally:
            closed = True

    class Body(httpx.AsyncByteStream):
        def __init__(self) -> None:
            self.parts = endless()

        async def __aiter__(self) -> AsyncIterator[bytes]:
            async with aclosing(self.parts) as parts:
                async for part in parts:
                    yield part

        async def aclose(self) -> None:
            await self.parts.aclose()

    answer, _ = in_turn(told(), httpx.Response(200, stream=Body()))
    async with mocked(answer) as client:
        async with aclosing(client.watch("id")) as records:
            assert [await anext(records), await anext(records)] == [RECORD, changed(attempts=1)]
        assert closed


@pytest.mark.parametrize("how", ["dropped", "cancelled", "other thread", "client closed"])
async def test_a_watch_that_is_left_leaves_nothing_behind(how: str) -> None:
    """However it is left, its connection is closed, and the garbage collector finds no generator of anybody's."""
    stream = Endless(message(changed(attempts=1)))
    answer, _ = in_turn(told(), httpx.Response(200, stream=stream))
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
        async with TaskClient("http://test", http=http) as client:
            records: Watch | None = client.watch("id")
            assert records is not None
            assert [await anext(records), await anext(records)] == [RECORD, changed(attempts=1)]
            if how == "cancelled":
                with move_on_after(2.0) as scope:
                    await anext(records)
                assert scope.cancelled_caught
                # It can go on.
                stream.part = message(changed(attempts=2))
                assert await anext(records) == changed(attempts=2)
            if how == "other thread":
                dropped = [records]
                records = None
                await to_thread.run_sync(dropped.clear)
            if how != "client closed":
                del records
                await sleep(0.1)
                assert stream.closed
        assert stream.closed
        if how == "client closed":
            assert records is not None
            for closed in records, client.watch("id"):
                with pytest.raises(ClosedResourceError):
                    await anext(closed)
    gc.collect()


async def test_a_block_that_is_cancelled_or_fails() -> None:
    """Its streams end with it, and its error is its own."""
    for error in (None, ValueError("of the block")):
        stream = Endless(message(changed(attempts=1)))
        answer, _ = in_turn(told(), httpx.Response(200, stream=stream))
        caught = pytest.raises(ValueError, match=whole("of the block")) if error else nullcontext()
        with move_on_after(1.0) as scope, caught:
            async with mocked(answer) as client:
                records = client.watch("id")
                assert [await anext(records), await anext(records)] == [RECORD, changed(attempts=1)]
                if error:
                    raise error
                await sleep(10.0)
        assert stream.closed
        assert scope.cancelled_caught == (error is None)
    gc.collect()


async def test_leaving_a_loop() -> None:
    """A plain `break` will do."""
    stream = Endless(message(changed(attempts=1)))
    answer, _ = in_turn(told(), httpx.Response(200, stream=stream))
    async with mocked(answer) as client:
        # One that was not begun.
        await client.watch("id").aclose()
        async for record in client.watch("id"):
            if record.attempts == 1:
                break
        await sleep(0.1)
        assert stream.closed
    gc.collect()


# What goes wrong


@pytest.mark.parametrize(
    "error",
    [
        httpx.ConnectError("refused"),
        httpx.ReadTimeout("too slow"),
        httpx.RemoteProtocolError("no HTTP"),
        httpx.Response(429),
        httpx.Response(502),
        httpx.Response(503),
        httpx.Response(504),
        httpx.Response(503, headers={"Retry-After": "soon"}),
        httpx.Response(503, headers={"Retry-After": "-1"}),
        httpx.Response(503, headers={"Retry-After": "Wed, 99 Oct 2026 07:28:00 GMT"}),
    ],
)
async def test_what_fails_for_a_moment_is_tried_again(error: Any) -> None:
    """It takes the backoff of the retry in between, and a submission keeps its key and its body."""
    answer, asked = in_turn(error, error, ACCEPTED)
    async with mocked(answer, retry=STEADY) as client:
        began = anyio.current_time()
        assert await client.submit("double", number=4, delay=1.0) == "id"
        assert anyio.current_time() - began == pytest.approx(3.0, abs=0.01)
    assert len({request.headers["idempotency-key"] for request in asked}) == 1
    assert len({(request.method, request.url, request.content) for request in asked}) == 1
    assert len(asked) == 3


AT_SEVEN, AT_NINE = (f"Wed, 21 Oct 2026 07:00:0{second} GMT" for second in (7, 9))


@pytest.mark.parametrize("status", [429, 502, 503, 504])
@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": "0"}, 0.0),
        # By the service's clock, if it tells that.
        ({"Retry-After": AT_NINE, "Date": AT_SEVEN}, 2.0),
        ({"Retry-After": AT_SEVEN, "Date": AT_NINE}, 0.0),
        ({"Retry-After": formatdate(0.0, usegmt=True)}, 0.0),
        # No longer than the retry would wait.
        ({"Retry-After": "61"}, 60.0),
        ({"Retry-After": "9" * 400}, 60.0),
        ({"Retry-After": "Fri, 31 Dec 9999 23:59:59 GMT"}, 60.0),
    ],
)
async def test_a_service_says_when_to_try_again(status: int, headers: dict[str, str], seconds: float) -> None:
    """Retry-After takes the place of the backoff."""
    answer, asked = in_turn(httpx.Response(status, headers=headers), told())
    async with mocked(answer, retry=STEADY) as client:
        began = anyio.current_time()
        assert await client.get("id") == RECORD
        assert anyio.current_time() - began == pytest.approx(seconds, abs=0.01)
    assert len(asked) == 2


async def test_a_full_service_has_room_again() -> None:
    """A submission that is refused for want of room is accepted in the end, once."""
    store = MemoryStore()
    async with (
        serving(slow, workers=1, store=store) as service,
        asking(service.asgi(max_pending=1), retry=Retry(100)) as client,
    ):
        ids: list[str] = []

        async def submit() -> None:
            ids.append(await client.submit("slow"))

        with fail_after(60.0):
            async with create_task_group() as tasks:
                for _ in range(4):
                    tasks.start_soon(submit)
                    await sleep(1.0)
            for task_id in ids:
                assert await client.result(task_id) == "done"
        assert len(set(ids)) == len(store._records) == 4


@pytest.mark.parametrize(
    ("error", "told", "status"),
    [
        (httpx.ConnectError("refused"), "http://test: refused", None),
        (httpx.ConnectError(""), "http://test: ConnectError", None),
        (httpx.Response(503, json={"detail": "it is full"}), "http://test: 503 it is full", 503),
        (httpx.Response(503, text="<html>"), "http://test: 503 Service Unavailable", 503),
    ],
)
async def test_it_gives_up(error: Any, told: str, status: int | None) -> None:
    """After so many tries, the last failure is told."""
    answer, asked = in_turn(*[error] * 5)
    async with mocked(answer, retry=STEADY) as client:
        began = anyio.current_time()
        with pytest.raises(ServiceError, match=whole(told)) as caught:
            await client.get("id")
        assert caught.value.status == status
        assert caught.value.__cause__ is (error if isinstance(error, Exception) else None)
        assert anyio.current_time() - began == pytest.approx(1.0 + 2.0 + 4.0 + 8.0, abs=0.01)
    assert len(asked) == 5


async def test_the_retry_says_what_is_worth_another_try() -> None:
    """Its classes and functions are asked, as for any other retry."""
    answer, asked = in_turn(httpx.Response(503), httpx.ConnectError("refused"))
    retry = Retry(5, delay=0, on=lambda error: isinstance(error, ServiceError) and error.status is not None)
    async with mocked(answer, retry=retry) as client:
        with pytest.raises(ServiceError, match=whole("http://test: refused")):
            await client.get("id")
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("response", "told"),
    [
        (httpx.Response(401, json={"detail": "who are you?"}), "http://test: 401 who are you?"),
        (httpx.Response(403), "http://test: 403 Forbidden"),
        # Not the service's own: of something in between.
        (httpx.Response(404, text="nothing here"), "http://test: 404 Not Found"),
        (httpx.Response(404, json={"detail": "nothing here"}), "http://test: 404 nothing here"),
        (httpx.Response(500, json=["what?"]), "http://test: 500 Internal Server Error"),
        (httpx.Response(500, json={}), "http://test: 500 Internal Server Error"),
        (httpx.Response(500, content=b"\xff"), "http://test: 500 Internal Server Error"),
        (httpx.Response(302, headers={"Location": "/login"}), "http://test: 302 Found"),
        (httpx.Response(413), "http://test: 413 Request Entity Too Large"),
    ],
)
async def test_what_is_refused_is_not_tried_again(response: httpx.Response, told: str) -> None:
    """Any other answer is an error at once."""
    answer, asked = in_turn(response)
    async with mocked(answer) as client:
        with pytest.raises(ServiceError, match=whole(told)) as caught:
            await client.submit("double")
        assert caught.value.status == response.status_code
    assert len(asked) == 1


@pytest.mark.parametrize(
    "body", [b"<html>", b"", b"[]", b"{}", b'"text"', b"null", b"\xff", b'{"id": "id"}', b"[" * 200_000]
)
async def test_an_answer_that_is_none(body: bytes) -> None:
    """What says that all is well, and isn't the answer of a task service, is told of as such."""
    async with mocked(lambda _request: httpx.Response(200, content=body)) as client:
        for call in (client.get, client.wait, client.cancel, client.submit):
            with pytest.raises(ServiceError, match=r"^http://test: the answer is none of a task service's: ") as caught:
                await call("id")
            assert caught.value.status == 200


async def test_arguments_that_cannot_be_sent() -> None:
    """They are named before anything is sent."""
    answer, asked = in_turn()
    async with mocked(answer) as client:
        with pytest.raises(
            ArgumentError,
            match=whole("arguments of double can't be sent: Encoding objects of type object is unsupported"),
        ):
            await client.submit("double", number=object())
        deep: list[Any] = []
        for _ in range(100_000):
            deep = [deep]
        with pytest.raises(ArgumentError, match=r"^arguments of double can't be sent: "):
            await client.submit("double", number=deep)
        with pytest.raises(ValueError, match=whole("delay must be >= 0, got -1")):
            await client.submit("double", delay=-1)
        with pytest.raises(TypeError, match=whole("delay must be a number, got '1'")):
            await client.submit("double", delay="1")  # type: ignore[arg-type]
        for call in (client.wait, client.result):
            with pytest.raises(ValueError, match=whole("timeout must be >= 0, got -1")):
                await call("id", -1)
            with pytest.raises(ValueError, match=whole("timeout must be >= 0, got nan")):
                await call("id", math.nan)
    assert not asked


@pytest.mark.parametrize("key", ["", "k" * 256, "schlüssel"])
async def test_a_key_that_cannot_be_sent(key: str) -> None:
    """It is refused, and no other key is used in its place."""
    async with served(double) as (service, client):
        with pytest.raises((ValueError, ServiceError)):
            await client.submit("double", idempotency_key=key)
        assert sum((await service.count()).values()) == 0


@pytest.mark.parametrize("token", ["", " s3cret", "s3cret ", "s3crèt", "s3cret\r\nX: y", "s3cret\x7f", b"s3cret", 5])
def test_a_token_that_cannot_be_sent(token: Any) -> None:
    """It is refused, and not told."""
    with pytest.raises((ValueError, TypeError), match=r"^token must be ") as caught:
        TaskClient("http://test", token=token)
    assert "s3cr" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "rule"),
    [
        ("test", "url must be http://HOST[:PORT][/PATH] or https://..., got 'test'"),
        ("ftp://user:s3cret@test", "url must be http://HOST[:PORT][/PATH] or https://..., got 'ftp://test'"),
        ("http://", "url must be http://HOST[:PORT][/PATH] or https://..., got 'http://'"),
        ("http://:80", "url must be http://HOST[:PORT][/PATH] or https://..., got 'http://:80'"),
        ("http://user:s/s3cret@test", "url must be http://HOST[:PORT][/PATH] or https://..., got 'http://...'"),
        ("http://test/?key=s3cret", "url must have no query and no fragment: http://test/"),
        ("http://test/#s3cret", "url must have no query and no fragment: http://test/"),
    ],
)
def test_urls_that_are_refused(url: str, rule: str) -> None:
    """A clear error, without what may be secret."""
    with pytest.raises(ValueError, match=whole(rule)):
        TaskClient(url)


async def test_user_information_of_a_url(caplog: pytest.LogCaptureFixture) -> None:
    """It is sent, and neither told nor logged, not even by httpx."""
    caplog.set_level(logging.DEBUG)
    answer, asked = in_turn(told(), told(), httpx.Response(200, content=b""), httpx.ConnectError("refused"))
    async with mocked(answer, "http://us%40er:s3cr%2Fet@test/a/", retry=Retry(1)) as client:
        assert repr(client) == "<TaskClient http://test/a>"
        await client.get("id")
        records = client.watch("id")
        assert await anext(records) == RECORD
        with pytest.raises(ServiceError, match=whole("http://test/a: refused")) as caught:
            await anext(records)
    sent = "Basic " + base64.b64encode(b"us@er:s3cr/et").decode()
    assert [request.headers["Authorization"] for request in asked] == [sent] * 4
    assert "s3cr" not in "".join(traceback.format_exception(caught.value, limit=0)) + caplog.text
    with pytest.raises(
        ValueError,
        match=whole("url must have no user information where there is a token: a request has one or the other"),
    ):
        TaskClient("http://user:s3cret@test", token="token")  # noqa: S106 -- of the test


def test_a_client_refuses() -> None:
    """A wrong argument is named."""
    with pytest.raises(TypeError, match=whole("url must be a str, got a int")):
        TaskClient(5)  # type: ignore[arg-type]
    for timeout, error, text in (
        (0, ValueError, "timeout must be > 0, got 0"),
        ("1", TypeError, "timeout must be a number, got '1'"),
    ):
        with pytest.raises(error, match=whole(text)):
            TaskClient("http://test", timeout=timeout)  # type: ignore[arg-type]


async def test_it_closes_only_what_is_its_own() -> None:
    """A client of httpx that it was given is left open; one that it made is closed."""
    async with httpx.AsyncClient(transport=httpx.MockTransport(lambda _request: told())) as http:
        for _ in range(2):
            async with TaskClient("http://test", http=http) as client:
                await client.get("id")
        assert not http.is_closed
    client = TaskClient("http://test")
    async with client:
        own = client._http
        assert not own.is_closed
    assert own.is_closed


async def test_a_client_of_its_own_fails_without_a_server() -> None:
    """It is told which service can't be reached."""
    async with TaskClient("http://127.0.0.1:9", retry=Retry(1)) as client:
        client._http._transport = httpx.MockTransport(in_turn(httpx.ConnectError("refused"))[0])
        with pytest.raises(ServiceError, match=whole("http://127.0.0.1:9: refused")):
            await client.get("id")
