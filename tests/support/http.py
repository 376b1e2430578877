"""The time of the HTTP app."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import anyio
import httpx
import pytest
import trio
from anyio import Event, create_task_group, fail_after, wait_all_tasks_blocked
from starlette.routing import Route

from chanflow.tasks import TaskService
from chanflow.tasks.http import _app, _live
from chanflow.tasks.http._problem import Kind
from tests.support.tasks import serving


@pytest.fixture(autouse=True)
def virtual_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the app tell the time by the event loop, whose time is virtual."""
    clock = SimpleNamespace(monotonic=anyio.current_time, time=time.time)
    for module in (_app, _live):
        monkeypatch.setattr(module, "time", clock)


@asynccontextmanager
async def served(
    *handlers: Any, options: dict[str, Any] | None = None, **how: Any
) -> AsyncIterator[tuple[TaskService, httpx.AsyncClient]]:
    """Run a service and ask its app."""
    async with serving(*handlers, **how) as service, asking(service.asgi(**options or {})) as client:
        yield service, client


@asynccontextmanager
async def asking(app: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://test") as client:
        yield client


class Visit:
    """A request by hand: its body comes in pieces, each piece of the answer is seen at once, and the client may go.

    Args:
        chunks: the body; `more` tells that it is not all, and that the rest never comes.
        on_send: is awaited in the app's `send`.
    """

    def __init__(
        self,
        app: Any,
        method: str,
        path: str,
        *,
        headers: dict[str, str] | None = None,
        chunks: Sequence[bytes] = (),
        more: bool = False,
        query: bytes = b"",
        version: str = "1.1",
        on_send: Callable[[dict[str, Any]], Any] | None = None,
    ) -> None:
        self.app = app
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": version,
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query,
            "root_path": "",
            "headers": [(name.lower().encode(), value.encode()) for name, value in (headers or {}).items()],
        }
        self.chunks = list(chunks)
        self.more = more
        self.on_send = on_send
        self.taken = 0
        self.sent: list[dict[str, Any]] = []
        self.gone = Event()
        self.done = Event()

    async def run(self) -> None:
        try:
            await self.app(self.scope, self.receive, self.send)
        finally:
            self.done.set()

    async def receive(self) -> dict[str, Any]:
        if self.taken < max(len(self.chunks), 1):
            body = self.chunks[self.taken] if self.chunks else b""
            self.taken += 1
            last = self.taken >= len(self.chunks)
            return {"type": "http.request", "body": body, "more_body": not last or self.more}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        if self.on_send is not None:
            await self.on_send(message)
        self.sent.append(message)

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.sent[1:])

    @property
    def events(self) -> list[tuple[str, Any]]:
        """The messages of a stream, without comments."""
        return list(parse_events(self.body.decode()))

    @property
    def ended(self) -> bool:
        """Whether the whole answer was sent."""
        return len(self.sent) > 1 and not self.sent[-1].get("more_body", False)


def parse_events(text: str) -> Iterator[tuple[str, Any]]:
    assert text.endswith("\n\n")
    for message in text.removesuffix("\n\n").split("\n\n"):
        if not message.startswith(":"):
            fields = dict(line.split(": ", 1) for line in message.split("\n"))
            assert list(fields) in (["event", "data"], ["event", "id", "data"])
            yield fields["event"], json.loads(fields["data"])


@asynccontextmanager
async def visiting(app: Any, method: str, path: str, **options: Any) -> AsyncIterator[Visit]:
    """Begin a request; leaving the block, the client goes away, and the app has to be done with it."""
    visit = Visit(app, method, path, **options)
    async with create_task_group() as tasks:
        tasks.start_soon(visit.run)
        await wait_all_tasks_blocked()
        yield visit
        visit.gone.set()
        with fail_after(1.0):
            await visit.done.wait()


async def living(backend: str) -> int:
    """Count the tasks of the event loop, once all that was begun is at rest."""
    await wait_all_tasks_blocked()
    if backend == "trio":
        return trio.lowlevel.current_statistics().tasks_living
    return len(asyncio.all_tasks())


def assert_problem(response: Any, status: int, detail: str, kind: Kind | None = None) -> None:
    """See that an answer is this problem and no other; without a kind, one that has the status."""
    told = response.json()
    kind = next(each for each in Kind if each.uri == told["type"]) if kind is None else kind
    assert (response.status_code, told) == (
        status,
        {"type": kind.uri, "title": kind.title, "status": kind.status, "detail": detail},
    )
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["cache-control"] == "no-store"


async def result_of(service: TaskService, response: httpx.Response) -> Any:
    return await service.result(response.json()["task_id"])


def references(value: Any) -> Iterator[str]:
    """Find all that a description refers to."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for each in value.values():
            yield from references(each)
    elif isinstance(value, list):
        for each in value:
            yield from references(each)


def routed(service: TaskService) -> set[tuple[str, str]]:
    """Give the routes of the app that are no files of the page; one of each handler in place of any name."""
    app = service.asgi()
    routes: list[Route] = app._app.routes  # type: ignore[attr-defined]
    pairs = {(route.path, method) for route in routes for method in route.app.methods.keys() - {"HEAD"}}  # type: ignore[attr-defined]
    pairs -= {(path, "GET") for path in ("/", "/dashboard.js", "/dashboard.css")}
    pairs = {(path.replace("{task}", "{task_id}"), method) for path, method in pairs}
    pairs.remove(("/tasks/{task_id}", "POST"))
    return pairs | {(f"/tasks/{name}", "POST") for name in service.handlers}


OPEN = {"/", "/dashboard.js", "/dashboard.css", "/health"}


JSON = {"Content-Type": "application/json"}
