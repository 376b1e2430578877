"""The ASGI app of a task service: its routes."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from functools import partial
from hashlib import blake2b
from importlib import resources
from typing import Any, TypeAlias
from urllib.parse import quote

import msgspec
from anyio import ClosedResourceError, move_on_after
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from chanflow._errors import StorageError
from chanflow.tasks._errors import UnknownTaskError
from chanflow.tasks._handler import ArgumentError, Handler
from chanflow.tasks._schema import describe as schema_of
from chanflow.tasks._service import ServiceCore
from chanflow.tasks._token import Token
from chanflow.tasks.http._guard import SAFE_METHODS, TOKEN, Guard
from chanflow.tasks.http._live import Live
from chanflow.tasks.http._metrics import render
from chanflow.tasks.http._openapi import describe
from chanflow.tasks.http._problem import SAFE, Kind, Problem, json_response, to_problem
from chanflow.tasks.http._request import (
    Waits,
    cursor,
    header,
    idempotency_key,
    number,
    parse,
    preferred_wait,
    read_json,
    status,
    whole_number,
)
from chanflow.tasks.http._stream import EventStream, event
from chanflow.tasks.record import TaskRecord, TaskStatus
from chanflow.tasks.wire import moment, to_json

__all__ = ["App", "make_app"]

logger = logging.getLogger("chanflow.tasks")

Endpoint: TypeAlias = Callable[[Request], Awaitable[Response]]

PATH_SAFE = "/:@!$&'()*+,;=~"
"""What need not be quoted in a path."""
RETRY_AFTER = "1"
"""Seconds after which to ask again."""
MAX_DELAY = 31_536_000.0
"""Seconds: a year."""
MAX_PAGE = 1000
MAX_PRIORITY = 1000
COUNT_INTERVAL = 0.25
"""Seconds for which a count of the pending tasks is good enough; what is accepted meanwhile is added to it."""
FULL_INTERVAL = 0.02
"""The same while tasks are refused."""
DEAD_LETTERS = 100
"""How many of a topic are listed."""
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
PAGE_TYPES = {"index.html": "text/html", "dashboard.js": "text/javascript", "dashboard.css": "text/css"}


class Replay(msgspec.Struct, forbid_unknown_fields=True):
    """Which dead letters to replay; None for all."""

    ids: list[str] | None = None


class App:
    """The routes.

    Args:
        service: whose tasks they are.
        max_pending: how many tasks may be pending before more are refused.
        max_body: bytes.
        max_wait: seconds that a request may wait for a task's end.
        dead_letters: topics of the service's bus to show.
    """

    def __init__(
        self, service: ServiceCore, *, max_pending: int, max_body: int, max_wait: float, dead_letters: Sequence[str]
    ) -> None:
        self._service = service
        self._max_pending = max_pending
        self._max_body = max_body
        self._max_wait = max_wait
        self._dead_letters = tuple(dead_letters)
        self._live = Live(service)
        self.waits: Waits = Waits()
        self._pending = 0
        self._counted_at = -math.inf

    def routes(self) -> list[Route]:
        """Give all routes."""
        pages = {
            "/" if name == "index.html" else f"/{name}": page_file(name, kind) for name, kind in PAGE_TYPES.items()
        }
        # Those that are asked for most come first: they are looked through in this order. One for each path, so that
        # a method that it hasn't is answered with all that it has.
        return [
            Route(
                "/tasks/{task}",
                Methods(GET=("read", self.get), POST=("submit", self.submit), DELETE=("admin", self.cancel)),
            ),
            Route("/tasks", Methods(GET=("read", self.page))),
            Route("/tasks/{task}/events", Methods(GET=("read", self.watch))),
            Route("/tasks/{task}/retry", Methods(POST=("admin", self.retry))),
            Route("/health", Methods(GET=(None, self.health))),
            Route("/metrics", Methods(GET=("read", self.metrics))),
            Route("/events", Methods(GET=("read", self.events))),
            Route("/handlers", Methods(GET=(None, self.handlers))),
            Route("/dead-letters", Methods(GET=("admin", self.dead_letters))),
            Route("/dead-letters/{topic}/replay", Methods(POST=("admin", self.replay))),
            Route("/openapi.json", Methods(GET=(None, self.openapi))),
            *(Route(path, Methods(GET=(None, file))) for path, file in pages.items()),
        ]

    # Tasks

    async def submit(self, request: Request) -> Response:
        """Accept a task."""
        service, name = self._service, request.path_params["task"]
        handler = service.handlers.get(name)
        if handler is None:
            raise Problem(Kind.UNKNOWN_HANDLER, f"there is no task {name!r}")
        await self._check_room()
        key, delay = idempotency_key(request), number(request, "delay", 0.0, 0.0, MAX_DELAY)
        priority = whole_number(request, "priority", 0, -MAX_PRIORITY, MAX_PRIORITY)
        wait = preferred_wait(request, self._max_wait)
        body = await read_json(request, self._max_body)
        try:
            encoded = handler.encode_json(body)
        except ArgumentError:
            raise
        except (ValueError, RecursionError) as error:
            # No JSON, no UTF-8, or deeper than any reader goes.
            raise Problem(Kind.NOT_JSON, f"the body is not JSON: {error}") from None
        # Others may have come while it was read.
        self._refuse_when_full()
        self._pending += 1
        task_id = await service.submit_encoded(name, encoded, idempotency_key=key, delay=delay, priority=priority)
        url = f"{quote(request.scope.get('root_path', ''), safe=PATH_SAFE)}/tasks/{task_id}"
        headers = {"Location": url, "Retry-After": RETRY_AFTER}
        record: TaskRecord | None = None
        if wait is not None:
            record = await self._wait(request, task_id, wait)
            headers["Preference-Applied"] = f"wait={wait:g}"
            if record.status.is_end:
                del headers["Retry-After"]
                return json_response(to_json(record), 200, headers)
        elif key is not None:
            record = await service.get(task_id)
        state = TaskStatus.PENDING if record is None else record.status
        return json_response({"task_id": task_id, "status": state.value, "status_url": url}, 202, headers)

    async def _check_room(self) -> None:
        """Refuse a task where too many are pending, or that nobody here would run."""
        if self._service.is_draining:
            raise Problem(Kind.NOT_RUNNING, "the service is stopping, or was not started", {"Retry-After": "5"})
        now, full = time.monotonic(), self._pending >= self._max_pending
        if now - self._counted_at > (FULL_INTERVAL if full else COUNT_INTERVAL):
            self._counted_at = now
            self._pending = (await self._service.count())[TaskStatus.PENDING]
        self._refuse_when_full()

    def _refuse_when_full(self) -> None:
        if self._pending >= self._max_pending:
            detail = f"{self._max_pending} tasks or more are pending"
            raise Problem(Kind.QUEUE_FULL, detail, {"Retry-After": RETRY_AFTER})

    async def _wait(self, request: Request, task_id: str, seconds: float) -> TaskRecord:
        """Wait for a task's end, for so long at most and while the client is there."""
        async with self.waits.waiting(request.receive):
            # What fails here fails below as well.
            with move_on_after(seconds), suppress(UnknownTaskError, StorageError, ClosedResourceError):
                await self._service.wait(task_id)
        return await self._service.get(task_id)

    async def get(self, request: Request) -> Response:
        """Tell of a task, at once or when it has ended."""
        task_id, wait = request.path_params["task"], preferred_wait(request, self._max_wait)
        record = await self._service.get(task_id)
        headers: dict[str, str] = {}
        if wait is not None:
            headers["Preference-Applied"] = f"wait={wait:g}"
            if not record.status.is_end:
                record = await self._wait(request, task_id, wait)
        if not record.status.is_end:
            headers["Retry-After"] = RETRY_AFTER
        return json_response(to_json(record), 200, headers)

    async def cancel(self, request: Request) -> Response:
        """Cancel a task."""
        record = await self._service.cancel(request.path_params["task"])
        return json_response(to_json(record), 200 if record.status.is_end else 202)

    async def retry(self, request: Request) -> Response:
        """Run a task again."""
        return json_response(to_json(await self._service.retry(request.path_params["task"])), 202)

    async def watch(self, request: Request) -> Response:
        """Tell of a task after each change that the client has not seen."""
        task_id, seen = request.path_params["task"], header(request.scope, b"last-event-id")
        # An unknown one is told before the stream begins.
        record = await self._service.get(task_id)
        if record.status.is_end and seen == encode(record)[1]:
            # A browser connects again whenever a stream ends, and this is what stops it.
            return Response(status_code=204, headers=SAFE)
        return EventStream(changes(self._service, task_id, seen), self.waits)

    async def page(self, request: Request) -> Response:
        """List tasks."""
        query = request.query_params
        name, limit = query.get("name"), int(number(request, "limit", 100, 1, MAX_PAGE))
        # The store knows no names: so many are looked at, and what is left is for the next page.
        look = MAX_PAGE if name else limit
        chosen, after = status(request), cursor(request)
        try:
            records = await self._service.page(status=chosen, after=after, limit=look)
        except UnknownTaskError:
            detail = "the task at which the page before ended has expired, or never was: begin with the first page"
            raise Problem(Kind.CURSOR_EXPIRED, detail) from None
        found = [record for record in records if not name or record.name == name]
        following = None
        if len(records) == look or len(found) > limit:
            following = (found[limit - 1] if len(found) >= limit else records[-1]).id
        return json_response({"tasks": [to_json(record, whole=False) for record in found[:limit]], "next": following})

    # The service

    async def health(self, _request: Request) -> Response:
        """Tell whether tasks are accepted."""
        if not self._service.is_draining:
            return json_response({"status": "ok"})
        return json_response({"status": "draining"}, 503, {"Retry-After": "5"})

    async def metrics(self, _request: Request) -> Response:
        """Give figures to Prometheus."""
        text = render(await self._service.count(), self._service.statistics())
        return Response(text, headers=SAFE | {"Content-Type": CONTENT_TYPE_LATEST})

    async def openapi(self, _request: Request) -> Response:
        """Describe all this."""
        return json_response(describe(self._service.handlers))

    async def handlers(self, _request: Request) -> Response:
        """Say what can be submitted."""
        handlers = [
            {
                "name": name,
                "description": handler.__doc__,
                "arguments": whole_schema(handler),
            }
            for name, handler in self._service.handlers.items()
        ]
        return json_response({"handlers": handlers})

    async def events(self, _request: Request) -> Response:
        """Tell of the service each second."""
        await self._service.count()
        return EventStream(self._live.stream(), self.waits)

    async def dead_letters(self, _request: Request) -> Response:
        """List dead letters."""
        bus = self._service.bus
        topics = [
            {"topic": topic, "messages": [letter(dead) for dead in await bus.dead_letters(topic, DEAD_LETTERS)]}
            for topic in self._dead_letters
        ]
        return json_response({"topics": topics})

    async def replay(self, request: Request) -> Response:
        """Replay dead letters."""
        topic = request.path_params["topic"]
        if topic not in self._dead_letters:
            raise Problem(Kind.NOT_FOUND, f"{topic!r} is none of the dead-letter topics that are shown")
        which = parse(await read_json(request, self._max_body), Replay)
        return json_response({"replayed": await self._service.bus.replay(topic, which.ids)})


def make_app(
    service: ServiceCore,
    *,
    tokens: Sequence[str | Token] | None,
    hosts: Sequence[str] | None,
    cors: Sequence[str],
    max_body: int,
    **options: Any,
) -> Guard:
    """Make the app; on its own, it enters the service's block unless that was done already."""

    @asynccontextmanager
    async def lifespan(_app: object) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            if not service.is_open:
                await stack.enter_async_context(service)
            yield

    app = App(service, max_body=max_body, **options)
    router = Router(app.routes(), default=not_found, redirect_slashes=False, lifespan=lifespan)
    return Guard(router, app.waits, max_body, tokens=tokens, hosts=hosts, cors=cors)


class Methods:
    """The endpoints of a path, each for a method and the scope that a token needs for it: an ASGI app.

    It makes a problem of an error. Starlette's own layers for that, and for each request, take a third of the time of a
    short one.
    """

    def __init__(self, **methods: tuple[str | None, Endpoint]) -> None:
        if "GET" in methods:
            methods["HEAD"] = methods["GET"]
        self.methods: dict[str, tuple[str | None, Endpoint]] = methods

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        needed, endpoint = self.methods.get(scope["method"], (None, self._refuse))
        token: Token | None = scope.get(TOKEN)
        if token is not None and needed is not None and needed not in token.scopes:
            endpoint = partial(refuse_scope, needed)
        try:
            response = await endpoint(Request(scope, receive))
        except Exception as error:  # noqa: BLE001 -- whatever it is, the client gets an answer
            response = to_problem(error).response()
        if token is not None and token.name is not None and scope["method"] not in SAFE_METHODS:
            log_change(token.name, scope, response)
        await response(scope, receive, send)

    async def _refuse(self, request: Request) -> Response:
        allowed = ", ".join(sorted(self.methods))
        detail = f"this path has {allowed}, got {request.method}"
        raise Problem(Kind.METHOD_NOT_ALLOWED, detail, {"Allow": allowed})


async def refuse_scope(needed: str, _request: Request) -> Response:
    """Answer where the token does not do."""
    raise Problem(Kind.SCOPE_REQUIRED, f"this needs a token with the scope {needed!r}")


def log_change(name: str, scope: Scope, response: Response) -> None:
    """Log who would change something, and what came of it; where a task was made, which."""
    done = f"{scope['method']} {quote(scope['path'], safe=PATH_SAFE)}"
    outcome = " ".join([str(response.status_code), response.headers.get("location", "")]).rstrip()
    logger.info("%s: %s: %s", name, done, outcome, extra={"token_name": name})


async def not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer where there is nothing."""
    if scope["type"] == "websocket":
        await send({"type": "websocket.close"})
    else:
        await Problem(Kind.NOT_FOUND, f"there is no {scope['path']}").response()(scope, receive, send)


async def changes(service: ServiceCore, task_id: str, seen: str | None) -> AsyncGenerator[bytes, None]:
    """Give what becomes of a task as messages, from what the client has seen on."""
    # Closed with this one, and not when it is collected.
    async with aclosing(service.watch(task_id)) as records:
        async for record in records:
            data, version = encode(record)
            if version != seen:
                yield event("record", data, version)
            seen = version


def encode(record: TaskRecord) -> tuple[bytes, str]:
    """Give a task as JSON, and an id of it as it is: the same in every process that answers."""
    data = msgspec.json.encode(to_json(record))
    return data, blake2b(data, digest_size=8).hexdigest()


def whole_schema(handler: Handler[..., Any]) -> dict[str, Any]:
    """Describe the arguments of a handler in one schema."""
    schema, parts = schema_of(handler.arguments)
    return schema | {"$defs": parts}


def letter(dead: Any) -> dict[str, Any]:
    """Say what is known of a dead letter."""
    return {
        "id": dead.id,
        "topic": dead.topic,
        "group": dead.group,
        "reason": dead.reason,
        "attempts": dead.attempts,
        "body": dead.body.decode("utf-8", "replace"),
        "key": dead.key,
        "headers": dict(dead.headers),
        "died_at": moment(dead.died_at),
    }


def page_file(name: str, kind: str) -> Endpoint:
    """Make the route of a file of the dashboard."""
    text = (resources.files("chanflow.tasks.http") / "dashboard" / name).read_bytes()

    async def answer(_request: Request) -> Response:
        headers = SAFE | {
            "Cache-Control": "no-cache",
            "Content-Security-Policy": PAGE_POLICY,
            "Referrer-Policy": "no-referrer",
        }
        return Response(text, headers=headers, media_type=kind)

    return answer
