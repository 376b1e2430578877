"""The task service over HTTP: every route, header and error, and streams that leave nothing behind."""

from __future__ import annotations

import hmac
import json
import logging
import math
import re
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import anyio
import httpx
import msgspec
import pytest
from anyio import Event, create_task_group, fail_after, sleep, wait_all_tasks_blocked
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.routing import Mount

from chanflow import Retry
from chanflow.tasks import ArgumentError, Progress, TaskService, TaskStatus, UnknownTaskError, _token
from chanflow.tasks import wire as wire_module
from chanflow.tasks.http import TaskClient, _app
from chanflow.tasks.http._problem import Kind
from chanflow.tasks.stores.memory import MemoryStore
from tests.support.faulty_bus import fail
from tests.support.http import (
    JSON,
    OPEN,
    Visit,
    asking,
    assert_problem,
    living,
    parse_events,
    references,
    result_of,
    routed,
    served,
    virtual_clock,  # noqa: F401 -- a fixture
    visiting,
)
from tests.support.messages import whole
from tests.support.tasks import broken, count_up, double, echo, endless, serving, slow

pytestmark = pytest.mark.anyio


# What asks the app


# Submitting


async def test_submit() -> None:
    """A task is accepted at once, and the answer says where to ask for it."""
    async with served(double) as (service, client):
        response = await client.post("/tasks/double", json={"number": 4})
        task_id = response.json()["task_id"]
        assert response.status_code == 202
        assert response.json() == {"task_id": task_id, "status": "pending", "status_url": f"/tasks/{task_id}"}
        assert response.headers["location"] == f"/tasks/{task_id}"
        assert response.headers["retry-after"] == "1"
        assert response.headers["content-type"] == "application/json"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["cache-control"] == "no-store"
        assert "preference-applied" not in response.headers
        assert await service.result(task_id) == 8


async def test_a_body_may_be_left_out() -> None:
    """No body and no content type is an object without arguments."""
    async with served(double) as (service, client):
        assert await result_of(service, await client.post("/tasks/double")) == 2
        assert await result_of(service, await client.post("/tasks/double", content=b"{}", headers=JSON)) == 2
        assert_problem(
            await client.post("/tasks/double", content=b"", headers=JSON),
            400,
            "the body is not JSON: Input data was truncated",
        )


@pytest.mark.parametrize(
    "prefer",
    [
        ["wait=5"],
        ["WAIT=5"],
        ['wait="5"'],
        ["wait = 5"],
        ["respond-async, wait=5"],
        ["respond-async,wait=5;x=1, foo=bar"],
        ["handling=lenient; wait=5"],
        ["return=minimal", "wait=5"],
        ["wait=5, wait=1"],
    ],
)
async def test_prefer_wait(prefer: list[str]) -> None:
    """With `Prefer: wait`, a task that ends in time is told with its result."""
    async with served(slow) as (_, client):
        response = await client.post(
            "/tasks/slow", json={"seconds": 4.5}, headers=[("Prefer", each) for each in prefer]
        )
        assert response.status_code == 200
        record = response.json()
        assert (record["status"], record["result"], record["arguments"]) == ("success", "done", {"seconds": 4.5})
        assert response.headers["preference-applied"] == "wait=5"
        assert response.headers["location"] == f"/tasks/{record['id']}"
        assert "retry-after" not in response.headers


@pytest.mark.parametrize(
    "prefer",
    [
        "",
        "wait",
        "wait=",
        "wait=-5",
        "wait=abc",
        "wait=1.5",
        "await=5",
        "wait=5x",
        "wait=9999999999",
        "nowait=5",
        "\xff",
    ],
)
async def test_a_preference_that_is_none(prefer: str) -> None:
    """What makes no sense is ignored, as if it were not there."""
    async with served(slow) as (service, client):
        response = await client.post("/tasks/slow", headers={b"Prefer": prefer.encode("latin-1")})
        assert (response.status_code, response.json()["status"]) == (202, "pending")
        assert "preference-applied" not in response.headers
        await result_of(service, response)


async def test_prefer_wait_is_clipped() -> None:
    """Nobody waits for longer than `max_wait`, and the answer says for how long it was."""
    async with served(slow, options={"max_wait": 2.5}) as (service, client):
        began = anyio.current_time()
        response = await client.post("/tasks/slow", headers={"Prefer": "wait=999999999"})
        assert anyio.current_time() - began == pytest.approx(2.5, abs=0.1)
        assert (response.status_code, response.json()["status"]) == (202, "running")
        assert response.headers["preference-applied"] == "wait=2.5"
        assert response.headers["retry-after"] == "1"
        task_id = response.json()["task_id"]
        response = await client.get(f"/tasks/{task_id}", headers={"Prefer": "wait=100"})
        assert anyio.current_time() - began == pytest.approx(5.0, abs=0.1)
        assert (response.status_code, response.json()["status"]) == (200, "running")
        assert response.headers["preference-applied"] == "wait=2.5"
        assert response.headers["retry-after"] == "1"
        await service.result(task_id)
    async with served(slow, options={"max_wait": 0}) as (service, client):
        began = anyio.current_time()
        response = await client.post("/tasks/slow", headers={"Prefer": "wait=10"})
        assert anyio.current_time() == began
        assert (response.status_code, response.headers["preference-applied"]) == (202, "wait=0")


async def test_idempotency_key() -> None:
    """The same key is the same task, whatever has become of it; with other arguments it is refused."""
    async with served(double) as (service, client):
        headers = {"Idempotency-Key": "key"}
        first = await client.post("/tasks/double", json={"number": 1}, headers=headers)
        assert (first.status_code, first.json()["status"]) == (202, "pending")
        task_id = first.json()["task_id"]
        await service.result(task_id)
        again = await client.post("/tasks/double", content=b'{ "number" : 1 }', headers=headers | JSON)
        assert (again.status_code, again.json()) == (202, first.json() | {"status": "success"})
        again = await client.post("/tasks/double", json={"number": 1}, headers=headers | {"Prefer": "wait=1"})
        assert (again.status_code, again.json()["id"], again.json()["idempotency_key"]) == (200, task_id, "key")
        assert_problem(
            await client.post("/tasks/double", json={"number": 2}, headers=headers),
            422,
            f"idempotency key 'key' was used for another task: double {task_id}",
            kind=Kind.IDEMPOTENCY_KEY_REUSED,
        )
        assert (await service.count())[TaskStatus.SUCCESS] == 1
        for key in ("", "k" * 256, "caf\xe9"):
            assert_problem(
                await client.post("/tasks/double", headers={b"Idempotency-Key": key.encode("latin-1")}),
                422,
                "idempotency_key must be 1 to 255 printable ASCII characters without a space at either end, "
                f"got {key!r}",
            )
        assert (await client.post("/tasks/double", headers={"Idempotency-Key": "k" * 255})).status_code == 202


async def test_delay() -> None:
    """A task is not begun before its delay is over."""
    async with served(double) as (service, client):
        response = await client.post("/tasks/double?delay=99.5", headers={"Prefer": "wait=60"})
        assert (response.status_code, response.json()["status"]) == (202, "pending")
        task_id = response.json()["task_id"]
        await sleep(39.0)
        assert (await service.get(task_id)).status is TaskStatus.PENDING
        await sleep(1.0)
        assert (await service.get(task_id)).status is TaskStatus.SUCCESS


@pytest.mark.parametrize("delay", ["-1", "nan", "inf", "31536001", "", "soon", "1,5"])
async def test_a_delay_that_is_none(delay: str) -> None:
    """It is named, and nothing is submitted."""
    async with served(double) as (service, client):
        assert_problem(
            await client.post("/tasks/double", params={"delay": delay}),
            422,
            f"delay must be a number from 0 to 3.1536e+07, got {delay!r}",
        )
        assert sum((await service.count()).values()) == 0


async def test_priority() -> None:
    """It is a whole number within its bounds, and the client can say it."""
    async with served(double) as (service, client):
        response = await client.post("/tasks/double?priority=-7&delay=60")
        assert (await service.get(response.json()["task_id"])).priority == -7
        assert_problem(await client.post("/tasks/double?priority=1.5"), 422, "priority must be a whole number, got 1.5")
        assert_problem(
            await client.post("/tasks/double?priority=1001"),
            422,
            "priority must be a number from -1000 to 1000, got '1001'",
        )
        async with TaskClient("http://test", http=client) as tasks:
            task_id = await tasks.submit("double", priority=5, delay=60.0)
            assert (await tasks.get(task_id)).priority == 5
        assert len(await service.page()) == 2


async def test_arguments_that_do_not_fit() -> None:
    """The answer names what is wrong, and where."""

    async def draw(points: list[dict[str, int]], label: str = "") -> None: ...

    async with served(draw) as (service, client):
        for body, detail in (
            (b"{}", "arguments of draw: Object missing required field `points`"),
            (b'{"points": [], "color": 1}', "arguments of draw: Object contains unknown field `color`"),
            (
                b'{"points": [{"x": 1}, {"x": "1"}]}',
                "arguments of draw: Expected `int`, got `str` - at `$.points[1][...]`",
            ),
            (b"[]", "arguments of draw: Expected `object`, got `array`"),
            (b'{"points": [], "label": null}', "arguments of draw: Expected `str`, got `null` - at `$.label`"),
        ):
            assert_problem(await client.post("/tasks/draw", content=body, headers=JSON), 422, detail)
        assert sum((await service.count()).values()) == 0


@pytest.mark.parametrize("body", [b"", b"{", b"{'a': 1}", b'{"value": NaN}', b'{"value": "\\ud800"}', b"{}}", b"\0"])
async def test_a_body_that_is_no_json(body: bytes) -> None:
    """It is refused, and nothing is submitted."""
    async with served(echo) as (service, client):
        response = await client.post("/tasks/echo", content=body, headers=JSON)
        assert response.json()["detail"].startswith("the body is not JSON: ")
        assert_problem(response, 400, response.json()["detail"])
        assert sum((await service.count()).values()) == 0


@pytest.mark.parametrize("body", [b'{"value": "\xff"}', b'{"value": ' + b"[" * 100_000, b'{"\xff": 1}'])
async def test_a_body_that_nothing_can_be_made_of(body: bytes) -> None:
    """What is no UTF-8, or too deep for any reader, is the client's mistake, too, and no error of the app's."""
    async with served(echo) as (service, client):
        response = await client.post("/tasks/echo", content=body, headers=JSON)
        assert response.headers["content-type"] == "application/problem+json"
        assert response.status_code in {400, 422}
        assert sum((await service.count()).values()) == 0


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("text/plain", "text/plain"),
        ("application/jsonp", "application/jsonp"),
        ("application/x-www-form-urlencoded", "application/x-www-form-urlencoded"),
        ("", "no content type"),
    ],
)
async def test_a_body_of_another_kind(kind: str, told: str) -> None:
    """Only JSON is taken: a page of another site can't send that without asking."""
    async with served(echo) as (_, client):
        headers = {"Content-Type": kind} if kind else {}
        assert_problem(
            await client.post("/tasks/echo", content=b"{}", headers=headers),
            415,
            f"the body must be application/json, got {told}",
        )


async def test_a_charset_is_no_matter() -> None:
    """The content type may have parameters and capitals."""
    async with served(echo) as (_, client):
        headers = {"Content-Type": "Application/JSON; charset=utf-8"}
        assert (await client.post("/tasks/echo", content=b"{}", headers=headers)).status_code == 202


async def test_a_body_that_is_too_long_by_its_length() -> None:
    """It is refused before any of it is read."""
    async with serving(echo) as service:
        app = service.asgi(max_body=35)
        headers = JSON | {"Content-Length": "36"}
        async with visiting(app, "POST", "/tasks/echo", headers=headers, chunks=[b" " * 36]) as visit:
            assert (visit.status, visit.taken) == (413, 0)
            assert json.loads(visit.body)["detail"] == "the body must have at most 35 bytes"
            assert visit.headers["connection"] == "close"


@pytest.mark.parametrize("headers", [JSON, JSON | {"Content-Length": "1"}, JSON | {"Content-Length": "many"}])
async def test_a_body_that_is_too_long_as_it_comes(headers: dict[str, str]) -> None:
    """Reading stops with the piece that is too much, whatever length was told."""
    async with serving(echo) as service:
        app = service.asgi(max_body=35)
        async with visiting(app, "POST", "/tasks/echo", headers=headers, chunks=[b" " * 10] * 100) as visit:
            assert (visit.status, visit.taken) == (413, 4)
            assert visit.ended


REFUSED = [
    ("POST", "/tasks/echo", {}, 401),
    ("POST", "/tasks/none", {"Authorization": "Bearer secret"}, 404),
    ("POST", "/none", {"Authorization": "Bearer secret"}, 404),
    ("PUT", "/tasks/echo", {"Authorization": "Bearer secret"}, 405),
    ("POST", "/tasks/echo?delay=-1", {"Authorization": "Bearer secret"}, 422),
    ("POST", "/tasks/echo", {"Authorization": "Bearer secret"}, 503),
]
LENGTHS = [{"Content-Length": "30"}, {"Transfer-Encoding": "chunked"}]


@pytest.mark.parametrize(("method", "path", "headers", "status"), REFUSED)
@pytest.mark.parametrize("length", LENGTHS)
async def test_a_body_that_nobody_needs(
    method: str, path: str, headers: dict[str, str], status: int, length: dict[str, str]
) -> None:
    """It is read before the answer: else servers would close the connection, and lose the next request on it."""
    path, _, query = path.partition("?")
    async with serving(echo, workers=0) as service:
        app = service.asgi(max_body=35, max_pending=1, tokens=["secret"])
        if status == 503:
            await service.submit("echo")
        async with visiting(
            app, method, path, headers=headers | length, query=query.encode(), chunks=[b" " * 10] * 3
        ) as visit:
            assert (visit.status, visit.taken) == (status, 3)
            assert "connection" not in visit.headers


@pytest.mark.parametrize("headers", LENGTHS)
async def test_a_body_that_nobody_needs_and_does_not_end(headers: dict[str, str]) -> None:
    """After 5 seconds the answer comes without the rest, or where that is too long: and the connection ends with it."""
    async with serving(echo) as service:
        app = service.asgi(max_body=35, tokens=["secret"])
        began = anyio.current_time()
        async with visiting(app, "POST", "/tasks/echo", headers=headers, chunks=[b" "] * 3, more=True) as visit:
            assert not visit.sent
            await visit.done.wait()
            assert (visit.status, visit.taken, visit.headers["connection"]) == (401, 3, "close")
            assert anyio.current_time() - began == pytest.approx(5.0)
        async with visiting(app, "POST", "/tasks/echo", headers=headers, chunks=[b" " * 10] * 100) as visit:
            assert (visit.status, visit.taken, visit.headers["connection"]) == (401, 4, "close")


async def test_streams_of_one_connection_do_not_wait() -> None:
    """In HTTP/2 each request stands for itself: nothing is read for nobody, and no answer speaks of the connection."""
    async with serving(echo) as service:
        app = service.asgi(max_body=35, tokens=["secret"])
        headers = {"Content-Length": "36"}
        async with visiting(app, "POST", "/tasks/echo", headers=headers, chunks=[b" "], version="2") as visit:
            assert (visit.status, visit.taken) == (401, 0)
        headers |= JSON | {"Authorization": "Bearer secret"}
        async with visiting(app, "POST", "/tasks/echo", headers=headers, chunks=[b" "], version="2") as visit:
            assert (visit.status, visit.taken) == (413, 0)
            assert "connection" not in visit.headers


async def test_a_body_in_pieces() -> None:
    """A body of exactly the most bytes is taken, however it comes."""
    body = b'{"value": "' + b"x" * 22 + b'"}'
    async with serving(echo) as service:
        app = service.asgi(max_body=len(body))
        async with visiting(app, "POST", "/tasks/echo", headers=JSON, chunks=[bytes([each]) for each in body]) as visit:
            assert (visit.status, visit.taken) == (202, len(body))
            assert await service.result(json.loads(visit.body)["task_id"]) == "x" * 22


async def test_a_client_that_goes_away_while_it_sends(backend: str) -> None:
    """Nothing is submitted, and nothing is left."""
    async with serving(echo) as service:
        before = await living(backend)
        async with visiting(
            service.asgi(), "POST", "/tasks/echo", headers=JSON, chunks=[b'{"value":'], more=True
        ) as visit:
            assert not visit.sent
        assert await living(backend) == before
        assert sum((await service.count()).values()) == 0


async def test_unknown_paths_and_methods() -> None:
    """What isn't there is told as a problem, as is a method that a path doesn't have."""
    async with served(double) as (_, client):
        nothing = "there is no task 'no such', or it has expired"
        assert_problem(await client.post("/tasks/no%20such"), 404, "there is no task 'no such'")
        assert_problem(await client.get("/tasks/no%20such"), 404, nothing)
        assert_problem(await client.get("/tasks/no%20such", headers={"Prefer": "wait=5"}), 404, nothing)
        assert_problem(await client.delete("/tasks/no%20such"), 404, nothing)
        assert_problem(await client.post("/tasks/no%20such/retry"), 404, nothing)
        assert_problem(await client.get("/tasks/no%20such/events"), 404, nothing)
        assert_problem(await client.get("/nowhere"), 404, "there is no /nowhere")
        for method, path, allowed in (
            ("PUT", "/tasks/double", "DELETE, GET, HEAD, POST"),
            ("POST", "/tasks", "GET, HEAD"),
            ("GET", "/tasks/x/retry", "POST"),
            ("POST", "/", "GET, HEAD"),
        ):
            response = await client.request(method, path)
            assert_problem(response, 405, f"this path has {allowed}, got {method}")
            assert response.headers["allow"] == allowed


async def test_a_bug_is_told_in_the_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client gets an answer that tells nothing of it."""
    async with served(double) as (service, client):
        monkeypatch.setattr(service, "count", AsyncMock(side_effect=ZeroDivisionError("a secret")))
        response = await client.get("/metrics")
        assert_problem(response, 500, "the service failed; its log tells how")
    assert "ZeroDivisionError: a secret" in caplog.text


async def test_a_web_socket_is_closed() -> None:
    """There are none here."""
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    async with serving(double) as service:
        scope = {"type": "websocket", "path": "/tasks", "headers": [], "query_string": b"", "root_path": ""}
        await service.asgi()(scope, anyio.sleep_forever, send)
    assert sent == [{"type": "websocket.close"}]


# Room


async def test_too_many_are_pending() -> None:
    """Tasks are refused while so many are pending, and accepted again once there is room."""
    async with served(slow, workers=1, options={"max_pending": 2}) as (service, client):
        ids = []
        for _ in range(3):
            ids.append((await client.post("/tasks/slow")).json()["task_id"])
            await sleep(1.0)
        for _ in range(2):
            response = await client.post("/tasks/slow")
            assert_problem(response, 503, "2 tasks or more are pending")
            assert response.headers["retry-after"] == "1"
        await service.result(ids[0])
        await sleep(0.1)
        ids.append((await client.post("/tasks/slow")).json()["task_id"])
        assert_problem(await client.post("/tasks/slow"), 503, "2 tasks or more are pending")
        assert [await service.result(task_id) for task_id in ids] == ["done"] * 4


async def test_what_is_accepted_at_once_counts() -> None:
    """A burst is not accepted beyond the bound just because the count is a moment old; and not each is counted."""
    async with served(endless, workers=1, options={"max_pending": 5}) as (service, client):
        counted = 0
        count = service.count

        async def count_calls() -> Any:
            nonlocal counted
            counted += 1
            return await count()

        service.count = count_calls  # type: ignore[method-assign]
        statuses = [(await client.post("/tasks/endless?delay=5")).status_code for _ in range(100)]
        assert statuses == [202] * 5 + [503] * 95
        assert counted == 1
        await sleep(0.3)
        assert (await client.post("/tasks/endless")).status_code == 503
        assert counted == 2
        for record in await service.page():
            await service.cancel(record.id)
        await sleep(0.3)
        assert (await client.post("/tasks/endless?delay=5")).status_code == 202


async def test_a_service_that_is_not_there() -> None:
    """One that was not entered, is stopping or over is not available; only its health is told."""
    service = TaskService()
    service.task(double)
    closed = "the service is stopping, or was not started"
    async with asking(service.asgi(dead_letters=["orders.dead"])) as client:

        async def look() -> None:
            response = await client.get("/health")
            assert (response.status_code, response.json()) == (503, {"status": "draining"})
            assert response.headers["retry-after"] == "5"
            response = await client.post("/tasks/double")
            assert_problem(response, 503, "the service is stopping, or was not started")
            assert response.headers["retry-after"] == "5"

        for _ in range(2):
            await look()
            for path in ("/tasks", "/tasks/id", "/tasks/id/events", "/events", "/metrics"):
                response = await client.get(path)
                assert_problem(response, 503, closed)
                assert response.headers["retry-after"] == "5"
            assert_problem(await client.delete("/tasks/id"), 503, closed)
            assert_problem(await client.post("/tasks/id/retry"), 503, closed)
            assert_problem(await client.get("/dead-letters"), 503, closed)
            assert_problem(await client.post("/dead-letters/orders.dead/replay"), 503, closed)
            for path in ("/", "/handlers", "/openapi.json"):
                assert (await client.get(path)).status_code == 200
            async with service:
                assert (await client.get("/health")).json() == {"status": "ok"}
                task_id = (await client.post("/tasks/double")).json()["task_id"]
                await service.result(task_id)
                await service.shutdown()
                await look()
                assert (await client.get(f"/tasks/{task_id}")).json()["result"] == 2


async def test_a_store_that_fails(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The answer says that it may work later; where the store is, and what is wrong, is told in the log only."""
    away_detail = "the store cannot be reached, or failed; the service's log tells how"
    store = MemoryStore()
    async with served(double, store=store) as (service, client):
        task_id = (await client.post("/tasks/double", headers={"Prefer": "wait=1"})).json()["id"]
        await sleep(1.0)
        with monkeypatch.context() as away:
            for call in ("create", "get", "change", "page", "count"):
                away.setattr(store, call, fail)
            for method, path in (
                ("POST", "/tasks/double"),
                ("GET", "/tasks"),
                ("GET", f"/tasks/{task_id}"),
                ("GET", f"/tasks/{task_id}/events"),
                ("DELETE", f"/tasks/{task_id}"),
                ("POST", f"/tasks/{task_id}/retry"),
                ("GET", "/metrics"),
                ("GET", "/events"),
            ):
                response = await client.request(method, path)
                assert_problem(response, 503, away_detail, Kind.STORE_UNAVAILABLE)
                assert response.headers["retry-after"] == "5"
            assert caplog.text.count("a request failed: ") == caplog.text.count("the disk is gone") == 8
        with monkeypatch.context() as away:
            away.setattr(store, "create", fail)
            assert_problem(await client.post("/tasks/double"), 503, away_detail)
        assert await result_of(service, await client.post("/tasks/double")) == 2


# Asking


async def test_get() -> None:
    """A record has all of the contract; while it isn't at its end, the answer says when to ask again."""
    async with served(slow) as (service, client):
        task_id = (await client.post("/tasks/slow?delay=5", headers={"Idempotency-Key": "key"})).json()["task_id"]
        await sleep(6.0)
        response = await client.get(f"/tasks/{task_id}")
        assert (response.status_code, response.headers["retry-after"]) == (200, "1")
        running = response.json()
        assert running["worker"] == (await service.get(task_id)).worker
        assert running | dict.fromkeys((*wire_module.TIMES, "worker")) == {
            "id": task_id,
            "name": "slow",
            "status": "running",
            "attempts": 1,
            "error_type": None,
            "error_message": None,
            "progress": None,
            "priority": 0,
            "idempotency_key": "key",
            "worker": None,
            "cancel_requested": False,
            "created_at": None,
            "run_at": None,
            "started_at": None,
            "finished_at": None,
            "expires_at": None,
            "arguments": {},
            "result": None,
        }
        assert (running["finished_at"], running["expires_at"]) == (None, None)
        response = await client.get(f"/tasks/{task_id}", headers={"Prefer": "wait=60"})
        ended = response.json()
        assert (ended["status"], ended["result"], ended["worker"]) == ("success", "done", None)
        assert response.headers["preference-applied"] == "wait=60"
        assert "retry-after" not in response.headers
        created, run, started, finished, expires = (datetime.fromisoformat(ended[name]) for name in wire_module.TIMES)
        assert all(ended[name].endswith("Z") and len(ended[name]) == 24 for name in wire_module.TIMES)
        assert (run - created).total_seconds() == pytest.approx(5.0, abs=0.1)
        assert (started - run).total_seconds() == pytest.approx(0.0, abs=0.1)
        assert (finished - started).total_seconds() == pytest.approx(10.0, abs=0.1)
        assert (expires - finished).total_seconds() == pytest.approx(3600.0, abs=0.1)
        # At its end, there is nothing to wait for.
        began = anyio.current_time()
        response = await client.get(f"/tasks/{task_id}", headers={"Prefer": "wait=60"})
        assert (response.json(), anyio.current_time()) == (ended, began)
        assert response.headers["preference-applied"] == "wait=60"


async def test_a_failure_is_told() -> None:
    """The record has the error's class and message; its progress is the last that was reported."""

    async def stuck(progress: Progress) -> None:
        await progress.update(2, 5, "almost")
        msg = "stuck"
        raise KeyError(msg)

    async with served(stuck) as (_, client):
        record = (await client.post("/tasks/stuck", headers={"Prefer": "wait=1"})).json()
        assert (record["status"], record["error_type"], record["error_message"], record["result"]) == (
            "failed",
            "KeyError",
            "'stuck'",
            None,
        )
        assert record["progress"] == {"done": 2, "total": 5, "message": "almost"}


async def test_a_long_message_is_cut_in_lists() -> None:
    """Only the record itself has all of it."""
    async with served(broken) as (service, client):
        message = "x" * 999 + "äöü"
        record = (await client.post("/tasks/broken", json={"message": message}, headers={"Prefer": "wait=1"})).json()
        assert record["error_message"] == message
        [listed] = (await client.get("/tasks")).json()["tasks"]
        assert listed["error_message"] == message[:1000]
        async with visiting(service.asgi(), "GET", "/events") as visit:
            assert visit.events[0][1]["recent"] == [listed]


async def test_hostile_data_comes_back_as_it_was() -> None:
    """What could be taken for markup, paths or the end of a message is data."""
    hostile = [
        "<script>alert(1)</script>",
        "\r\n\r\nevent: x\ndata: y\n\n",
        "'; DROP TABLE tasks; --",
        "\u2028\u2029\0\x7f",
        "\U0001f600 ünï",
        {"__proto__": {"x": 1}, "constructor": None, "": []},
        2**63,
        -0.5,
        1e300,
        [True, None],
    ]
    async with served(echo) as (service, client):
        body = json.dumps({"value": hostile}).encode()
        response = await client.post("/tasks/echo", content=body, headers=JSON | {"Prefer": "wait=1"})
        record = response.json()
        assert (record["arguments"], record["result"]) == ({"value": hostile}, hostile)
        async with visiting(service.asgi(), "GET", f"/tasks/{record['id']}/events") as visit:
            [(_, told)] = visit.events
            assert told == record


async def test_results_that_json_cannot_say() -> None:
    """They are told in what JSON has."""

    async def odd() -> Any:
        return {
            "bytes": b"\xff\xfe",
            "nan": math.nan,
            "infinite": -math.inf,
            "when": datetime(2026, 11, 23, 16, tzinfo=UTC),
            1: {2.5: (b"x", {"deep": b""})},
            None: "none",
            (1, 2): "pair",
            b"key": 0,
        }

    async with served(odd) as (_, client):
        record = (await client.post("/tasks/odd", headers={"Prefer": "wait=1"})).json()
        assert record["result"] == {
            "bytes": "//4=",
            "nan": None,
            "infinite": None,
            "when": "2026-11-23T16:00:00Z",
            "1": {"2.5": ["eA==", {"deep": ""}]},
            "None": "none",
            "(1, 2)": "pair",
            "b'key'": 0,
        }


def test_what_msgspec_does_not_know_is_told_in_words() -> None:
    """An extension type of another program's is shown as Python shows it."""
    assert wire_module.plain([msgspec.msgpack.Ext(5, b"x")])[0].startswith("<msgspec.msgpack.Ext")
    assert wire_module.moment(None) is None


@pytest.mark.parametrize("how", ["error", "progress"])
async def test_text_that_is_no_unicode(how: str, caplog: pytest.LogCaptureFixture) -> None:
    """A message with half of a surrogate pair, as of an odd file name, keeps no task from being told."""
    # xdist can't pass it on, either.
    caplog.set_level(logging.CRITICAL, "chanflow.tasks")

    async def odd(progress: Progress) -> None:
        if how == "progress":
            await progress.update(1, 1, "\udcff")
        else:
            msg = "\udcff"
            raise ValueError(msg)

    async with served(odd) as (_, client):
        response = await client.post("/tasks/odd", headers={"Prefer": "wait=1"})
        assert response.status_code == 200
        assert (await client.get("/tasks")).status_code == 200


def test_data_that_is_nested_too_deeply() -> None:
    """It is said to be so, in place of a server error."""
    nested: list[Any] = []
    for _ in range(100_000):
        nested = [nested]
    assert wire_module.plain(nested) == "nested too deeply to be shown"


async def test_room_for_those_whose_bodies_take_long() -> None:
    """Room is looked for again after the body was read: others may have taken it meanwhile."""
    async with served(slow, options={"max_pending": 2}, workers=0) as (_, client):
        go_on = Event()
        answers: list[int] = []

        async def body() -> AsyncIterator[bytes]:
            await go_on.wait()
            yield b"{}"

        async def submit() -> None:
            headers = {"Content-Type": "application/json"}
            answers.append((await client.post("/tasks/slow", content=body(), headers=headers)).status_code)

        async with create_task_group() as tasks:
            for _ in range(5):
                tasks.start_soon(submit)
            await wait_all_tasks_blocked()
            go_on.set()
        assert sorted(answers) == [202, 202, 503, 503, 503]


async def test_cancel() -> None:
    """A pending task is at its end at once, a running one a moment later; an end is left alone."""

    async def stubborn() -> None:
        with anyio.CancelScope(shield=True):
            await sleep(5.0)

    async with served(stubborn) as (service, client):
        pending = (await client.post("/tasks/stubborn?delay=5")).json()["task_id"]
        response = await client.delete(f"/tasks/{pending}")
        assert (response.status_code, response.json()["status"]) == (200, "cancelled")
        running = (await client.post("/tasks/stubborn")).json()["task_id"]
        await sleep(1.0)
        response = await client.delete(f"/tasks/{running}")
        told = response.json()
        assert (response.status_code, told["status"], told["cancel_requested"]) == (202, "running", True)
        ended = wire_module.to_json(await service.wait(running))
        response = await client.delete(f"/tasks/{running}")
        assert (response.status_code, response.json()) == (200, ended)


async def test_retry() -> None:
    """A task that failed or was cancelled is run again; any other is left alone."""
    works = False

    async def flaky() -> str:
        if works:
            return "done"
        msg = "not yet"
        raise ValueError(msg)

    async with served(flaky) as (service, client):
        task_id = (await client.post("/tasks/flaky", headers={"Prefer": "wait=1"})).json()["id"]
        works = True
        response = await client.post(f"/tasks/{task_id}/retry")
        told = response.json()
        assert (response.status_code, told["status"], told["attempts"], told["error_type"]) == (202, "pending", 0, None)
        assert await service.result(task_id) == "done"
        assert_problem(
            await client.post(f"/tasks/{task_id}/retry"),
            409,
            "only a task that failed or was cancelled can be retried; this one is success",
        )
        task_id = (await client.post("/tasks/flaky?delay=5")).json()["task_id"]
        assert_problem(
            await client.post(f"/tasks/{task_id}/retry"),
            409,
            "only a task that failed or was cancelled can be retried; this one is pending",
        )
        await client.delete(f"/tasks/{task_id}")
        assert (await client.post(f"/tasks/{task_id}/retry")).status_code == 202
        assert await service.result(task_id) == "done"


# Listing


async def pages(client: httpx.AsyncClient, **query: Any) -> list[list[str]]:
    """Follow a listing to its end."""
    found: list[list[str]] = []
    following: str | None = None
    while following is not None or not found:
        response = await client.get("/tasks", params=query | ({"after": following} if following else {}))
        assert response.status_code == 200
        found.append([task["id"] for task in response.json()["tasks"]])
        following = response.json()["next"]
    return found


async def test_pages() -> None:
    """Tasks are listed from the newest on, a page at a time, without what may be long."""
    async with served(double, echo) as (service, client):
        assert (await client.get("/tasks")).json() == {"tasks": [], "next": None}
        ids = [await service.submit("double", delay=number % 2 * 1000.0) for number in range(7)][::-1]
        await sleep(1.0)
        assert await pages(client) == [ids]
        assert await pages(client, limit=3) == [ids[:3], ids[3:6], ids[6:]]
        assert await pages(client, limit=7) == [ids, []]
        assert await pages(client, status="pending", limit=2) == [[ids[1], ids[3]], [ids[5]]]
        assert await pages(client, status="failed") == [[]]
        [newest] = (await client.get("/tasks?limit=1")).json()["tasks"]
        assert newest == wire_module.to_json(await service.get(ids[0]), whole=False)
        assert not {"arguments", "result"} & set(newest)


async def test_pages_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each task of the name is listed once, however many others are in between."""
    monkeypatch.setattr(_app, "MAX_PAGE", 5)
    async with served(double, echo) as (service, client):
        names = ["double"] * 3 + ["echo"] * 12 + ["double"] * 4 + ["echo"]
        ids = [await service.submit(name) for name in names]
        wanted = [task_id for task_id, name in zip(ids, names, strict=True) if name == "double"][::-1]
        for limit in range(1, 6):
            found = await pages(client, name="double", limit=limit)
            assert [task_id for page in found for task_id in page] == wanted
            assert all(len(page) <= limit for page in found)
        assert not any(await pages(client, name="none"))
        assert [task_id for page in await pages(client, name="", limit=5) for task_id in page] == ids[::-1]


@pytest.mark.parametrize(
    ("query", "detail"),
    [
        ("limit=0", "limit must be a number from 1 to 1000, got '0'"),
        ("limit=1001", "limit must be a number from 1 to 1000, got '1001'"),
        ("limit=all", "limit must be a number from 1 to 1000, got 'all'"),
        ("status=done", "status must be one of pending, running, success, failed, cancelled, got 'done'"),
        ("status=", "status must be one of pending, running, success, failed, cancelled, got ''"),
        ("status=PENDING", "status must be one of pending, running, success, failed, cancelled, got 'PENDING'"),
    ],
)
async def test_a_listing_that_is_none(query: str, detail: str) -> None:
    """A wrong parameter is named."""
    async with served() as (_, client):
        assert_problem(await client.get(f"/tasks?{query}"), 422, detail)


async def test_handlers() -> None:
    """What can be submitted is told, with its description and what it takes."""
    async with served(double, broken) as (_, client):
        first, second = (await client.get("/handlers")).json()["handlers"]
        assert (first["name"], first["description"]) == ("double", "Double.")
        assert (second["name"], second["description"]) == ("broken", None)
        arguments = first["arguments"]
        name = arguments["$ref"].removeprefix("#/$defs/")
        assert arguments["$defs"][name]["properties"]["number"]["type"] == "integer"


async def test_a_cursor_that_has_expired() -> None:
    """A listing does not end early, as if there were no more: it says to begin again."""
    async with served(double, ttl=5.0) as (service, client):
        kept = await service.submit("double", delay=1000.0)
        gone = await service.submit("double")
        await service.result(gone)
        cursor = (await client.get("/tasks?limit=1")).json()["next"]
        assert cursor == gone
        assert [task["id"] for task in (await client.get(f"/tasks?after={cursor}")).json()["tasks"]] == [kept]
        await sleep(40.0)
        expired = "the task at which the page before ended has expired, or never was: begin with the first page"
        for after in (cursor, "0" * 32):
            assert_problem(await client.get(f"/tasks?after={after}"), 410, expired, Kind.CURSOR_EXPIRED)
            told = f"after must be the id of a task that is there; {after!r} has expired, or never was"
            with pytest.raises(UnknownTaskError, match=whole(told)):
                await service.page(after=after)
        for after in ("", "0", "next", "0" * 31 + "g", "0" * 32 + "\n", "\0"):
            assert_problem(
                await client.get("/tasks", params={"after": after}),
                422,
                f"after must be the `next` of the page before, got {after!r}",
                Kind.INVALID_PARAMETER,
            )
        await service.cancel(kept)


# Dead letters


async def test_dead_letters() -> None:
    """Those of the topics that are shown are listed, and replayed one by one or all."""
    options = {"dead_letters": ["orders.dead", "empty.dead"]}
    async with served(options=options) as (service, client):
        bus = service.bus
        for number, body in enumerate((b"first", b"\xff<b>", b"third")):
            await bus.publish("orders", body, key=str(number) if number else None, headers={"a": "b"})
        async with bus.subscribe("orders", group="shop") as messages:
            for _ in range(3):
                await (await anext(messages)).reject("no such thing")
        orders, empty = (await client.get("/dead-letters")).json()["topics"]
        assert empty == {"topic": "empty.dead", "messages": []}
        assert orders["topic"] == "orders.dead"
        dead = await bus.dead_letters("orders.dead")
        assert orders["messages"] == [
            {
                "id": letter.id,
                "topic": "orders",
                "group": "shop",
                "reason": "no such thing",
                "attempts": 1,
                "body": body,
                "key": letter.key,
                "headers": {"a": "b"},
                "died_at": wire_module.moment(letter.died_at),
            }
            for letter, body in zip(dead, ("first", "\ufffd<b>", "third"), strict=True)
        ]
        replay = partial(client.post, "/dead-letters/orders.dead/replay")
        assert (await replay(json={"ids": [dead[1].id, "unknown"]})).json() == {"replayed": 1}
        assert (await replay(json={"ids": []})).json() == {"replayed": 0}
        assert (await replay(json={})).json() == {"replayed": 2}
        assert (await replay()).json() == {"replayed": 0}
        assert (await replay(json={"ids": None})).status_code == 200
        async with bus.subscribe("orders", group="shop") as messages:
            assert {(await anext(messages)).body for _ in range(3)} == {b"first", b"\xff<b>", b"third"}


async def test_a_dead_letter_with_text_that_is_no_unicode() -> None:
    """Its reason, as of an odd file name, is told with what is no Unicode escaped."""
    async with served(options={"dead_letters": ["orders.dead"]}) as (service, client):
        await service.bus.publish("orders", b"")
        async with service.bus.subscribe("orders", group="shop") as messages:
            await (await anext(messages)).reject("no file '\udcff'")
        [letter] = await service.bus.dead_letters("orders.dead")
        assert letter.reason == "no file '\\udcff'"
        [topic] = (await client.get("/dead-letters")).json()["topics"]
        assert [message["reason"] for message in topic["messages"]] == ["no file '\\udcff'"]


async def test_replaying_refuses() -> None:
    """Only what is shown can be replayed, and only a body of the known form is taken."""
    async with served(options={"dead_letters": ["orders.dead"], "max_body": 20}) as (_, client):
        assert_problem(
            await client.post("/dead-letters/others.dead/replay"),
            404,
            "'others.dead' is none of the dead-letter topics that are shown",
        )
        replay = partial(client.post, "/dead-letters/orders.dead/replay")
        for body, status, detail in (
            (b'{"ids": 1}', 422, "Expected `array | null`, got `int` - at `$.ids`"),
            (b'{"ids": [1]}', 422, "Expected `str`, got `int` - at `$.ids[0]`"),
            (b'{"id": "1"}', 422, "Object contains unknown field `id`"),
            (b"[]", 422, "Expected `object`, got `array`"),
            (b"{", 400, "the body is not JSON: Input data was truncated"),
            (b'{"ids": ["\xff"]}', 400, None),
            (b" " * 21, 413, "the body must have at most 20 bytes"),
        ):
            response = await replay(content=body, headers=JSON)
            assert_problem(response, status, detail or response.json()["detail"])
        assert_problem(
            await replay(content=b"{}", headers={"Content-Type": "text/plain"}),
            415,
            "the body must be application/json, got text/plain",
        )
    async with served() as (_, client):
        assert (await client.get("/dead-letters")).json() == {"topics": []}


# The description


async def test_openapi() -> None:
    """Each route is described and nothing else is; what is referred to is there, and no name is used twice."""
    async with served(double, slow, echo, count_up) as (service, client):
        description = (await client.get("/openapi.json")).json()
        assert description["openapi"] == "3.1.0"
        paths = description["paths"]
        described = {
            (path, method.upper()) for path, item in paths.items() for method in item if method != "parameters"
        }
        assert described == routed(service)
        found = list(references(description))
        assert found
        for reference in found:
            place = description
            assert reference.startswith("#/")
            for part in reference.removeprefix("#/").split("/"):
                place = place[part.replace("~1", "/").replace("~0", "~")]
        operations = [item[method] for item in paths.values() for method in item if method != "parameters"]
        names = [operation["operationId"] for operation in operations]
        assert len(set(names)) == len(names)
        for path, item in paths.items():
            parameters = {each["name"] for each in item.get("parameters", []) if each["in"] == "path"}
            assert all(f"{{{name}}}" in path for name in parameters)
            assert path.count("{") == len(parameters)
        assert "progress" not in json.dumps(paths["/tasks/count_up"])


async def test_answers_are_as_described() -> None:
    """Each answer has the members that its description says, and a status that it says."""
    async with served(double) as (_, client):
        description = (await client.get("/openapi.json")).json()
        schemas, paths = description["components"]["schemas"], description["paths"]

        def see(response: httpx.Response, path: str, method: str) -> Any:
            answer = paths[path][method]["responses"][str(response.status_code)]
            kind = response.headers["content-type"]
            schema = answer["content"][kind]["schema"]
            schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
            assert set(response.json()) == set(schema["required"]) == set(schema["properties"])
            assert all(name.lower() in response.headers for name in answer.get("headers", {}))
            return response.json()

        accepted = see(await client.post("/tasks/double"), "/tasks/double", "post")
        see(await client.post("/tasks/double", headers={"Prefer": "wait=1"}), "/tasks/double", "post")
        see(await client.post("/tasks/double", json=[]), "/tasks/double", "post")
        task = f"/tasks/{accepted['task_id']}"
        see(await client.get(task), "/tasks/{task_id}", "get")
        see(await client.delete(task), "/tasks/{task_id}", "delete")
        see(await client.post(f"{task}/retry"), "/tasks/{task_id}/retry", "post")
        see(await client.get("/tasks/none"), "/tasks/{task_id}", "get")
        listed = see(await client.get("/tasks"), "/tasks", "get")
        assert set(listed["tasks"][0]) == set(schemas["chanflow.TaskSummary"]["properties"])
        see(await client.get("/handlers"), "/handlers", "get")
        see(await client.get("/dead-letters"), "/dead-letters", "get")
        see(await client.get("/health"), "/health", "get")


async def test_metrics() -> None:
    """The figures are those of what was done, in a form that Prometheus reads."""
    service = TaskService(workers=3)
    service.task(slow)
    service.task(name='odd "name"\\')(double)

    @service.task(retry=Retry(3, delay=1.0, jitter=0))
    async def flaky() -> None:
        msg = "not yet"
        raise ValueError(msg)

    async with service, asking(service.asgi()) as client:
        for seconds in (0.2, 2.0, 20.0, 100.0):
            await client.post("/tasks/slow", json={"seconds": seconds})
        await client.post("/tasks/flaky")
        await client.post('/tasks/odd%20"name"%5C?delay=1000')
        await sleep(50.0)
        response = await client.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=")
        samples = {
            (sample.name, *sorted(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(response.text)
            for sample in family.samples
        }
        for key, value in {
            ("chanflow_tasks", "pending"): 1,
            ("chanflow_tasks", "running"): 1,
            ("chanflow_tasks", "success"): 3,
            ("chanflow_tasks", "failed"): 1,
            ("chanflow_tasks", "cancelled"): 0,
            ("chanflow_workers",): 3,
            ("chanflow_tasks_running", "slow"): 1,
            ("chanflow_tasks_running", "flaky"): 0,
            ("chanflow_tasks_submitted_total", "slow"): 4,
            ("chanflow_tasks_submitted_total", "flaky"): 1,
            ("chanflow_tasks_submitted_total", 'odd "name"\\'): 1,
            ("chanflow_tasks_ended_total", "slow", "success"): 3,
            ("chanflow_tasks_ended_total", "slow", "failed"): 0,
            ("chanflow_tasks_ended_total", "flaky", "failed"): 1,
            ("chanflow_tasks_retried_total", "flaky"): 2,
            ("chanflow_tasks_retried_total", "slow"): 0,
            ("chanflow_task_run_seconds_bucket", "slow", "0.1"): 0,
            ("chanflow_task_run_seconds_bucket", "slow", "0.25"): 1,
            ("chanflow_task_run_seconds_bucket", "slow", "1.0"): 1,
            ("chanflow_task_run_seconds_bucket", "slow", "2.5"): 2,
            ("chanflow_task_run_seconds_bucket", "slow", "30.0"): 3,
            ("chanflow_task_run_seconds_bucket", "slow", "+Inf"): 3,
            ("chanflow_task_run_seconds_count", "slow"): 3,
            ("chanflow_task_run_seconds_sum", "slow"): 22.2,
            ("chanflow_task_wait_seconds_count", "slow"): 4,
            ("chanflow_task_wait_seconds_count", "flaky"): 3,
        }.items():
            assert samples[(key[0], *sorted(key[1:]))] == pytest.approx(value, abs=0.05), key
        for record in await service.page():
            await service.cancel(record.id)


# Who may come in


async def test_another_sites_page() -> None:
    """It can't change anything, and a page of this one, or no page at all, can."""
    async with served(double) as (service, client):
        own, other = str(client.base_url).rstrip("/"), "http://localhost:9999"
        for headers, status in (
            ({}, 202),
            ({"Sec-Fetch-Site": "same-origin"}, 202),
            ({"Sec-Fetch-Site": "none"}, 202),
            ({"Sec-Fetch-Site": "same-site"}, 403),
            ({"Sec-Fetch-Site": "cross-site"}, 403),
            # A browser that says nothing of that says where its page is from.
            ({"Origin": own}, 202),
            ({"Origin": other}, 403),
            ({"Origin": "null"}, 403),
        ):
            response = await client.post("/tasks/double", headers=headers)
            assert response.status_code == status, headers
        headers = {"Sec-Fetch-Site": "cross-site"}
        for method, path in (("DELETE", "/tasks/x"), ("POST", "/tasks/x/retry"), ("POST", "/dead-letters/x/replay")):
            assert_problem(
                await client.request(method, path, headers=headers),
                403,
                "another site's page must not change anything here",
            )
        assert (await client.get("/tasks", headers=headers)).status_code == 200
        assert (await client.head("/tasks", headers=headers)).status_code == 200
        assert sum((await service.count()).values()) == 4


async def test_tokens() -> None:
    """Without a valid token, only the page's files and the health are there."""
    async with served(double, options={"tokens": ["first", "second"]}) as (service, client):
        routes = [("GET", path) for path in OPEN] + [(method, path) for path, method in routed(service)]
        assert len(routes) > 10
        for method, path in routes:
            for shown in (
                None,
                "",
                "Bearer",
                "Bearer ",
                "Bearer third",
                "Bearer first second",
                "Bearer firs",
                "Bearer FIRST",
                "Basic first",
                "first",
                "Bearerfirst",
                "Bearer \xff",
            ):
                headers = {} if shown is None else {b"Authorization": shown.encode("latin-1")}
                response = await client.request(method, path, headers=headers)
                if path in OPEN:
                    assert response.status_code == 200
                else:
                    assert_problem(response, 401, "this needs a valid bearer token")
                    assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/nowhere", "/tasks/", "//", "/health/", "/dashboard.js/x", "/./health/../metrics"):
            async with visiting(service.asgi(tokens=["first"]), "GET", path) as visit:
                assert visit.status == 401
        for token in ("Bearer first", "Bearer second", "bearer first", "BEARER  second ", "Bearer first "):
            headers = {b"Authorization": token.encode()}
            assert (await client.get("/tasks", headers=headers)).status_code == 200
            assert (await client.post("/tasks/double", headers=headers)).status_code == 202
        assert (await client.post("/health")).status_code == 405


async def test_all_tokens_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """How long an answer takes doesn't tell which token was close: digests, of all of them, in constant time."""
    compared: list[tuple[bytes, bytes]] = []
    compare_digest = hmac.compare_digest

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return compare_digest(one, other)

    monkeypatch.setattr(_token, "compare_digest", compare)
    async with served(options={"tokens": ["first", "second", "third"]}) as (_, client):
        for token, status in (("first", 200), ("third", 200), ("", 401), ("x" * 1000, 401)):
            compared.clear()
            response = await client.get("/tasks", headers={"Authorization": f"Bearer {token}"})
            assert response.status_code == status
            assert len({known for known, _ in compared}) == len(compared) == 3
            assert {len(each) for pair in compared for each in pair} == {32}
        compared.clear()
        # A right token in another scheme is compared, too.
        assert (await client.get("/tasks", headers={"Authorization": "Basic first"})).status_code == 401
        assert len(compared) == 3


async def test_below_a_prefix() -> None:
    """Mounted in another app, what is open stays open, and places are told with the prefix."""
    service = TaskService()
    service.task(double)
    token = {"Authorization": "Bearer secret"}
    app = Starlette(routes=[Mount("/a/b", app=service.asgi(tokens=["secret"]))])
    async with service, asking(app) as client:
        for path in OPEN:
            assert (await client.get(f"/a/b{path}")).status_code == 200
        assert (await client.get("/a/b/metrics")).status_code == 401
        assert (await client.get("/a/b/a/b/health")).status_code == 401
        response = await client.post("/a/b/tasks/double", headers=token | {"Prefer": "wait=1"})
        assert response.headers["location"] == f"/a/b/tasks/{response.json()['id']}"
        response = await client.post("/a/b/tasks/double", headers=token)
        assert response.json()["status_url"] == response.headers["location"]
        assert (await client.get(response.headers["location"], headers=token)).status_code == 200
        assert (await client.get("/health")).status_code == 404


async def test_the_page() -> None:
    """Its files are told by their kinds, refer to one another relatively, and may load nothing from elsewhere."""
    async with served() as (_, client):
        for path, kind, begin in (
            ("/", "text/html; charset=utf-8", "<!doctype html>"),
            ("/dashboard.js", "text/javascript; charset=utf-8", ""),
            ("/dashboard.css", "text/css; charset=utf-8", ""),
        ):
            response = await client.get(path)
            assert response.status_code == 200
            assert response.headers["content-type"] == kind
            assert response.text.lower().startswith(begin)
            assert response.headers["x-content-type-options"] == "nosniff"
            assert response.headers["referrer-policy"] == "no-referrer"
            assert response.headers["cache-control"] == "no-cache"
            policy = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
            assert policy["default-src"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
            assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
            head = await client.head(path)
            assert (head.status_code, head.content) == (200, b"")
        page = (await client.get("/")).text
        assert 'src="dashboard.js"' in page
        assert 'href="dashboard.css"' in page
        # The policy would keep them from working.
        assert "<style" not in page
        assert " style=" not in page
        assert " onclick=" not in page


# Its life


@asynccontextmanager
async def living_app(app: Any) -> AsyncIterator[list[str]]:
    """Start and stop an app as a server does."""
    stop, told = Event(), []
    started = Event()
    begun = False

    async def receive() -> dict[str, str]:
        nonlocal begun
        if not begun:
            begun = True
            return {"type": "lifespan.startup"}
        await stop.wait()
        return {"type": "lifespan.shutdown"}

    async def send(message: dict[str, str]) -> None:
        told.append(message["type"])
        started.set()

    async with create_task_group() as tasks:
        tasks.start_soon(app, {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}, receive, send)
        await started.wait()
        yield told
        stop.set()


async def test_lifespan() -> None:
    """The app enters the service's block, and leaves it, which waits for what runs."""
    service = TaskService()
    service.task(slow)
    app = service.asgi()
    for _ in range(2):
        async with living_app(app) as told, asking(app) as client:
            assert service.is_open
            assert told == ["lifespan.startup.complete"]
            assert (await client.post("/tasks/slow")).status_code == 202
            await sleep(1.0)
            began = anyio.current_time()
        assert anyio.current_time() - began == pytest.approx(9.0, abs=0.1)
        assert told == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
        assert not service.is_open


async def test_lifespan_of_a_service_that_was_entered() -> None:
    """It is left alone."""
    async with serving(double) as service:
        async with living_app(service.asgi(tokens=["secret"])):
            assert service.is_open
        assert service.is_open
        assert not service.is_draining
        assert await service.result(await service.submit("double")) == 2


# Streams


def statuses(visit: Visit) -> list[str]:
    return [record["status"] for _, record in visit.events]


async def test_task_events() -> None:
    """Each change is told as it comes, and the stream ends with the task."""
    async with serving(count_up) as service:
        task_id = await service.submit("count_up", upto=3, delay=5.0)
        async with visiting(service.asgi(), "GET", f"/tasks/{task_id}/events") as visit:
            assert visit.status == 200
            assert visit.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert visit.headers["cache-control"] == "no-store"
            assert visit.headers["x-accel-buffering"] == "no"
            assert "content-length" not in visit.headers
            assert statuses(visit) == ["pending"]
            await sleep(5.5)
            assert statuses(visit)[-1] == "running"
            await visit.done.wait()
            assert visit.ended
            assert {name for name, _ in visit.events} == {"record"}
            records = [record for _, record in visit.events]
            assert [record["progress"]["done"] for record in records if record["progress"]][-3:] == [1, 2, 2]
            assert records[-1] == wire_module.to_json(await service.get(task_id))
            assert (records[-1]["status"], records[-1]["result"]) == ("success", 3)
        assert not service._watches


def ids(visit: Visit) -> list[str]:
    """Give the ids of the messages of a stream."""
    return [line.removeprefix("id: ") for line in visit.body.decode().split("\n") if line.startswith("id: ")]


async def test_a_browser_connects_again() -> None:
    """It gets what it has missed and nothing twice, and after the end it is told not to come any more."""
    async with serving(count_up) as service:
        app = service.asgi()
        task_id = await service.submit("count_up", upto=3, delay=5.0)
        path = f"/tasks/{task_id}/events"
        async with visiting(app, "GET", path) as visit:
            assert statuses(visit) == ["pending"]
        [last] = ids(visit)
        # Nothing has changed meanwhile; then something does.
        async with visiting(app, "GET", path, headers={"Last-Event-ID": last}) as visit:
            assert (visit.status, visit.body) == (200, b"")
            await sleep(6.5)
            assert {record["status"] for _, record in visit.events} == {"running"}
        last = ids(visit)[-1]
        # It ends while nobody watches.
        record = wire_module.to_json(await service.wait(task_id))
        async with visiting(app, "GET", path, headers={"Last-Event-ID": last}) as visit:
            assert [told for _, told in visit.events] == [record]
            assert visit.ended
        [last] = ids(visit)
        # In another process, it has the same id.
        async with visiting(service.asgi(), "GET", path, headers={"Last-Event-ID": last}) as visit:
            assert (visit.status, visit.body) == (204, b"")
            assert visit.ended
        for other in (None, "", "unknown", "\xff"):
            async with visiting(
                app, "GET", path, headers={"Last-Event-ID": other} if other is not None else {}
            ) as visit:
                assert (visit.status, ids(visit)) == (200, [last])
    assert not service._watches


async def test_events_of_a_task_at_its_end() -> None:
    """It is told once."""
    async with served(double) as (service, client):
        task_id = await service.submit("double")
        await service.result(task_id)
        response = await client.get(f"/tasks/{task_id}/events")
        assert [record["status"] for _, record in parse_events(response.text)] == ["success"]


async def test_keep_alive() -> None:
    """Every 5 seconds something is sent where nothing happens."""
    async with serving(double) as service:
        task_id = await service.submit("double", delay=1000.0)
        async with visiting(service.asgi(), "GET", f"/tasks/{task_id}/events") as visit:
            for number in range(3):
                assert visit.body.count(b": keep-alive\n\n") == number
                assert statuses(visit) == ["pending"]
                await sleep(4.9)
                assert visit.body.count(b": keep-alive\n\n") == number
                await sleep(0.1)
                await wait_all_tasks_blocked()
        await service.cancel(task_id)


async def test_a_stream_ends_with_the_service() -> None:
    """Whoever watches a task that will not end any more, or the service, is not left waiting."""
    service = TaskService()
    service.task(double)
    app = service.asgi()
    visits = []
    async with create_task_group() as tasks:
        async with service:
            task_id = await service.submit("double", delay=1000.0)
            for path in (f"/tasks/{task_id}/events", "/events"):
                visits.append(Visit(app, "GET", path))
                tasks.start_soon(visits[-1].run)
            await wait_all_tasks_blocked()
        with fail_after(1.5):
            for visit in visits:
                await visit.done.wait()
                assert visit.ended
                assert len(visit.events) == 1
    assert not service._watches


@pytest.mark.parametrize("how", ["expired", "failed"])
async def test_a_stream_of_a_task_that_cannot_be_asked_for(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends where its task is forgotten, or the store fails."""
    store = MemoryStore()
    store.shared = True
    async with serving(double, store=store, workers=0) as service:
        task_id = await service.submit("double")
        async with visiting(service.asgi(), "GET", f"/tasks/{task_id}/events") as visit:
            await sleep(1.0)
            assert not visit.done.is_set()
            if how == "expired":
                del store._records[task_id]
            else:
                monkeypatch.setattr(store, "get", fail)
            with fail_after(6.0):
                await visit.done.wait()
            assert visit.ended
            assert statuses(visit) == ["pending"]
        assert not service._watches


@pytest.mark.parametrize("how", ["expired", "failed", "closed"])
async def test_waiting_for_a_task_that_cannot_be_asked_for(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request that waits gets the same answer as one that asks."""
    store = MemoryStore()
    store.shared = True
    service = TaskService(store=store, workers=0)
    service.task(double)
    visit: Visit
    async with create_task_group() as tasks:
        async with service:
            task_id = await service.submit("double")
            visit = Visit(service.asgi(), "GET", f"/tasks/{task_id}", headers={"Prefer": "wait=30"})
            tasks.start_soon(visit.run)
            await sleep(5.0)
            assert not visit.sent
            with monkeypatch.context() as patch:
                if how == "expired":
                    del store._records[task_id]
                elif how == "failed":
                    patch.setattr(store, "get", fail)
                await sleep(6.0 if how != "closed" else 0.0)
        with fail_after(1.0):
            await visit.done.wait()
        assert visit.status == (404 if how == "expired" else 503)
        assert visit.headers["content-type"] == "application/problem+json"
    assert not service._watches


async def test_nobody_is_to_wait_any_longer(backend: str) -> None:
    """A server that stops answers all who wait: with the task as it is, and with the end of the stream."""
    async with serving(double) as service:
        app: Any = service.asgi()
        task_id = await service.submit("double", delay=1000.0)
        before = await living(backend)
        prefer = {"Prefer": "wait=60"}
        async with create_task_group() as tasks:
            visits = [
                Visit(app, method, path, headers=headers)
                for method, path, headers in (
                    ("GET", f"/tasks/{task_id}", prefer),
                    ("POST", "/tasks/double", prefer),
                    ("GET", f"/tasks/{task_id}/events", {}),
                    ("GET", "/events", {}),
                )
            ]
            visits[1].scope["query_string"] = b"delay=5"
            for visit in visits:
                tasks.start_soon(visit.run)
            await wait_all_tasks_blocked()
            assert not any(visit.done.is_set() for visit in visits)
            assert len(app.waits) == 4
            app.waits.end()
            with fail_after(0.1):
                for visit in visits:
                    await visit.done.wait()
        assert [visit.status for visit in visits] == [200, 202, 200, 200]
        assert all(visit.ended for visit in visits)
        assert json.loads(visits[0].body)["status"] == json.loads(visits[1].body)["status"] == "pending"
        assert not app.waits
        assert not service._watches
        assert await living(backend) == before


@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_a_client_that_goes_away_while_it_waits(method: str, backend: str) -> None:
    """Nobody waits for it any longer; its task goes on."""
    async with serving(slow) as service:
        task_id = await service.submit("slow", idempotency_key="key")
        await wait_all_tasks_blocked()
        before = await living(backend)
        headers = {"Prefer": "wait=60"} | ({"Idempotency-Key": "key"} if method == "POST" else {})
        path = f"/tasks/{task_id}" if method == "GET" else "/tasks/slow"
        async with visiting(service.asgi(), method, path, headers=headers) as visit:
            await sleep(5.0)
            assert not visit.sent
            assert len(service._watches) == 1
        assert not service._watches
        assert await living(backend) == before
        assert await service.result(task_id) == "done"


@pytest.mark.parametrize("what", ["task", "service"])
async def test_a_client_that_goes_away_from_a_stream(what: str, backend: str) -> None:
    """Nothing is left of it."""
    async with serving(double) as service:
        task_id = await service.submit("double", delay=1000.0)
        before = await living(backend)
        path = f"/tasks/{task_id}/events" if what == "task" else "/events"
        async with visiting(service.asgi(), "GET", path) as visit:
            await sleep(5.0)
            assert visit.events
        assert not service._watches
        assert await living(backend) == before
        await service.cancel(task_id)


@pytest.mark.parametrize("what", ["task", "service"])
async def test_a_client_that_takes_nothing_and_goes_away(what: str, backend: str) -> None:
    """Nothing is left of it, although it goes in the middle of a message; nothing is piled up for it meanwhile."""
    sends = 0

    async def stuck(message: dict[str, Any]) -> None:
        nonlocal sends
        sends += 1
        if message.get("more_body"):
            await sleep(math.inf)

    async with serving(count_up) as service:
        task_id = await service.submit("count_up", upto=100)
        await wait_all_tasks_blocked()
        before = await living(backend)
        path = f"/tasks/{task_id}/events" if what == "task" else "/events"
        async with visiting(service.asgi(), "GET", path, on_send=stuck) as visit:
            await sleep(50.0)
            assert sends == 2
            assert len(visit.sent) == 1
        assert not service._watches
        assert await living(backend) == before
        await service.cancel(task_id)


@pytest.mark.parametrize("what", ["task", "service"])
async def test_a_server_that_raises_where_the_client_is_gone(what: str, backend: str) -> None:
    """A `send` that raises OSError ends the stream, without an error."""

    async def gone(message: dict[str, Any]) -> None:
        if anyio.current_time() > began + 2.0:
            raise OSError

    async with serving(count_up) as service:
        task_id = await service.submit("count_up", upto=100)
        await wait_all_tasks_blocked()
        before = await living(backend)
        path = f"/tasks/{task_id}/events" if what == "task" else "/events"
        began = anyio.current_time()
        async with create_task_group() as tasks:
            visit = Visit(service.asgi(), "GET", path, on_send=gone)
            tasks.start_soon(visit.run)
            with fail_after(5.0):
                await visit.done.wait()
        assert not service._watches
        assert await living(backend) == before
        await service.cancel(task_id)


async def test_head_of_a_stream(backend: str) -> None:
    """It has the headers, and ends."""
    async with served(double) as (service, client):
        task_id = await service.submit("double", delay=1000.0)
        before = await living(backend)
        for path in (f"/tasks/{task_id}/events", "/events"):
            response = await client.head(path)
            assert (response.status_code, response.content) == (200, b"")
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert not service._watches
        assert await living(backend) == before
        await service.cancel(task_id)


# Snapshots


async def test_snapshots() -> None:
    """Each second, all who watch are told of the same snapshot."""
    async with serving(slow, broken) as service:
        app = service.asgi()
        counted = 0
        count = service.count

        async def count_calls() -> Any:
            nonlocal counted
            counted += 1
            return await count()

        async with visiting(app, "GET", "/events") as first, visiting(app, "GET", "/events") as second:
            async with visiting(app, "GET", "/events") as third:
                service.count = count_calls  # type: ignore[method-assign]
                await sleep(10.5)
                assert counted == 10
                assert len(first.events) == 11
                assert first.events == second.events == third.events
            await sleep(5.0)
            assert counted == 15
            assert len(first.events) == 16
            assert {name for name, _ in first.events} == {"snapshot"}
        await sleep(10.0)
        assert counted == 15


async def test_what_is_in_a_snapshot() -> None:
    """It has all of the contract, and its figures are those of what was done."""
    service = TaskService(workers=4)
    service.task(slow)
    service.task(broken)

    @service.task(retry=Retry(2, delay=0.1, jitter=0))
    async def flaky() -> None:
        msg = "not yet"
        raise ValueError(msg)

    async with service, visiting(service.asgi(), "GET", "/events") as visit:
        [(_, snapshot)] = visit.events
        assert snapshot == {
            "at": snapshot["at"],
            "workers": {"total": 4, "busy": 0},
            "draining": False,
            "counts": {"pending": 0, "running": 0, "success": 0, "failed": 0, "cancelled": 0},
            "queues": [
                {
                    "name": name,
                    "submitted": 0,
                    "success": 0,
                    "failed": 0,
                    "cancelled": 0,
                    "retried": 0,
                    "running": 0,
                }
                for name in ("slow", "broken", "flaky")
            ],
            "throughput": 0,
            "latency": {"wait_p50": None, "wait_p95": None, "run_p50": None, "run_p95": None},
            "recent": [],
        }
        assert abs(datetime.fromisoformat(snapshot["at"]).timestamp() - time.time()) < 60
        ids = [await service.submit("slow", seconds=seconds) for seconds in (0.1, 0.4, 100.0)]
        ids += [await service.submit(name) for name in ("broken", "flaky")]
        cancelled = await service.submit("slow", delay=100.0)
        await service.cancel(cancelled)
        await sleep(1.5)
        _, snapshot = visit.events[-1]
        queues = {queue.pop("name"): queue for queue in snapshot["queues"]}
        none = {"submitted": 1, "success": 0, "failed": 1, "cancelled": 0, "retried": 0, "running": 0}
        assert queues == {
            "slow": none | {"submitted": 4, "success": 2, "failed": 0, "running": 1},
            "broken": none,
            "flaky": none | {"retried": 1},
        }
        assert snapshot["counts"] == {"pending": 0, "running": 1, "success": 2, "failed": 2, "cancelled": 1}
        assert snapshot["workers"] == {"total": 4, "busy": 1}
        assert snapshot["throughput"] == pytest.approx(4.0, abs=0.1)
        assert [record["id"] for record in snapshot["recent"]] == [cancelled, *reversed(ids)]
        assert snapshot["recent"][1] == wire_module.to_json(await service.get(ids[-1]), whole=False)
        await sleep(1.0)
        assert visit.events[-1][1]["throughput"] == 0
        for _ in range(20):
            cancelled = await service.submit("slow", delay=100.0)
            await service.cancel(cancelled)
        await service.cancel(ids[2])
        await service.shutdown()
        await sleep(1.0)
        _, snapshot = visit.events[-1]
        assert snapshot["draining"]
        assert len(snapshot["recent"]) == 20


async def test_throughput_of_a_while_without_watchers() -> None:
    """What ended while nobody watched is not taken for the work of the last second."""
    async with serving(double) as service:
        app = service.asgi()
        async with visiting(app, "GET", "/events"):
            pass
        for _ in range(50):
            await service.result(await service.submit("double"))
        await sleep(10.0)
        async with visiting(app, "GET", "/events") as visit:
            assert visit.events[-1][1]["throughput"] == 0
            for _ in range(3):
                await service.result(await service.submit("double"))
            await sleep(1.1)
            assert visit.events[-1][1]["throughput"] == pytest.approx(3.0)


async def test_a_watcher_that_goes_away_while_a_snapshot_is_made() -> None:
    """What ended counts for the next snapshot."""

    async def stuck() -> Any:
        await sleep(math.inf)

    async with serving(double) as service:
        app = service.asgi()
        async with visiting(app, "GET", "/events"):
            for _ in range(3):
                await service.result(await service.submit("double"))
            service.count = stuck  # type: ignore[method-assign]
            await sleep(1.5)
        del service.count
        await sleep(0.5)
        async with visiting(app, "GET", "/events") as visit:
            assert visit.events[0][1]["throughput"] == pytest.approx(1.5, abs=0.2)


async def test_latency() -> None:
    """Percentiles of the times that the last tasks waited and ran."""
    async with serving(slow, workers=1) as service:
        for seconds in (3.0, 1.0, 2.0):
            await service.submit("slow", seconds=seconds)
        await sleep(10.0)
        async with visiting(service.asgi(), "GET", "/events") as visit:
            assert visit.events[-1][1]["latency"] == {
                "run_p50": pytest.approx(2.0, abs=0.05),
                "run_p95": pytest.approx(3.0, abs=0.05),
                "wait_p50": pytest.approx(3.0, abs=0.05),
                "wait_p95": pytest.approx(4.0, abs=0.05),
            }


# Arguments


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_pending": 0}, ValueError, "max_pending must be >= 1, got 0"),
        ({"max_body": 0}, ValueError, "max_body must be >= 1, got 0"),
        ({"max_wait": -1}, ValueError, "max_wait must be >= 0, got -1"),
        ({"max_wait": "1"}, TypeError, "max_wait must be a number, got '1'"),
        ({"dead_letters": "orders"}, TypeError, "dead_letters must be a sequence of topics, got 'orders'"),
    ],
)
def test_asgi_refuses(options: dict[str, Any], error: type[Exception], message: str) -> None:
    """A wrong argument is named, but no token is told."""
    with pytest.raises(error, match=whole(message)):
        TaskService().asgi(**options)


def test_a_name_with_a_slash() -> None:
    """It could not be asked for by its path."""
    with pytest.raises(
        ValueError, match=whole("name must be a str of 1 to 200 printable characters without a slash, got 'a/b'")
    ):
        TaskService().task(name="a/b")


@pytest.mark.parametrize("missing", ["starlette", "httpx", "prometheus_client"])
def test_without_what_it_needs(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is missing, and how to install it, is said."""
    for module in [name for name in sys.modules if name.startswith("chanflow.tasks.http")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    message = whole(f"chanflow.tasks.http needs {missing}: pip install 'chanflow[http]'")
    for call in (lambda: import_module("chanflow.tasks.http"), TaskService().asgi):
        with pytest.raises(ModuleNotFoundError, match=message):
            call()


def test_encode_json() -> None:
    """A JSON body is checked and stored as the arguments would be."""
    handler = TaskService().task(double)
    assert handler.encode_json(b'{"number": 3}') == handler.encode({"number": 3})
    assert handler.encode_json(bytearray(b"{}")) == handler.encode({})
    with pytest.raises(ArgumentError, match=whole("arguments of double: Expected `int`, got `str` - at `$.number`")):
        handler.encode_json(b'{"number": "3"}')
    with pytest.raises(ValueError, match=whole("Input data was truncated")):
        handler.encode_json(b"{")
    big = TaskService().task(echo)
    with pytest.raises(ArgumentError, match=r"^arguments of echo can't be stored: "):
        big.encode_json(b'{"value": 123456789012345678901234567890}')


def test_each_kind_of_problem_is_explained() -> None:
    """The page has a section for each type, with its status, and for no other."""
    page = (Path(__file__).parent.parent / "docs" / "problems.md").read_text("utf-8")
    sections = re.findall(r"^## (\S+)\n\n\*\*(\d+)\.\*\* ", page, re.MULTILINE)
    assert sections == [(kind.uri.removeprefix(wire_module.PROBLEM), str(kind.status)) for kind in Kind]
