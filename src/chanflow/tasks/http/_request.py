"""What a request says: its body, its preferences and its parameters, each checked."""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

import msgspec
from anyio import CancelScope, create_task_group
from starlette.requests import Request
from starlette.types import Receive, Scope

from chanflow.tasks._idempotency import check_key
from chanflow.tasks.http._problem import Kind, Problem
from chanflow.tasks.record import TaskStatus

__all__ = [
    "Waits",
    "cursor",
    "declared_length",
    "header",
    "idempotency_key",
    "number",
    "parse",
    "preferred_wait",
    "read_json",
    "status",
    "whole_number",
]

T = TypeVar("T")

WAIT = re.compile(r"(?:^|[,;\s])wait\s*=\s*\"?([0-9]{1,9})\"?\s*(?:$|[,;])", re.IGNORECASE)
QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')
ESCAPED = re.compile(r'\\(["\\])')
TASK_ID = re.compile("[0-9a-f]{32}")
MAX_DIGITS = 18


def header(scope: Scope, name: bytes) -> str | None:
    """Give a header of a request, which is named in small letters; None where there is none."""
    for each, value in scope["headers"]:
        if each == name:
            text: str = value.decode("latin-1")
            return text
    return None


def declared_length(scope: Scope) -> float:
    """Give the bytes that a body has as its request says, in HTTP/1; infinity where there is one of unknown length."""
    length = header(scope, b"content-length")
    if length is None:
        return 0 if header(scope, b"transfer-encoding") is None else math.inf
    return int(length[:MAX_DIGITS]) if length.isdecimal() else math.inf


async def read_json(request: Request, limit: int) -> bytes:
    """Read a body of JSON; one that is left out is an empty object.

    Raises:
        Problem: it is no JSON by its type, or too long: then the rest of it is not read.
    """
    body = await read(request, limit)
    kind = (header(request.scope, b"content-type") or "").partition(";")[0].strip().lower()
    if not body and not kind:
        return b"{}"
    if kind != "application/json":
        raise Problem(Kind.BODY_TYPE, f"the body must be application/json, got {kind or 'no content type'}")
    return body


async def read(request: Request, limit: int) -> bytes:
    """Read a body of so many bytes at most."""
    too_long = Problem(Kind.BODY_TOO_LONG, f"the body must have at most {limit} bytes")
    if limit < declared_length(request.scope) < math.inf:
        raise too_long
    body, more = bytearray(), True
    while more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            # Nobody is left to be told.
            raise Problem(Kind.NOT_JSON, "the client went away")
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_long
        more = message.get("more_body", False)
    return bytes(body)


class Waits(set[CancelScope]):
    """The requests that wait for something."""

    @asynccontextmanager
    async def waiting(self, receive: Receive) -> AsyncIterator[CancelScope]:
        """Cancel the block when the client goes away, or when nobody is to wait any longer.

        The block may raise nothing, since the task group would wrap it.
        """

        async def until_gone() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            tasks.cancel_scope.cancel()

        async with create_task_group() as tasks:
            tasks.start_soon(until_gone)
            self.add(tasks.cancel_scope)
            try:
                yield tasks.cancel_scope
            finally:
                self.discard(tasks.cancel_scope)
            tasks.cancel_scope.cancel()

    def end(self) -> None:
        """Let nobody wait any longer."""
        for scope in list(self):
            scope.cancel()


def parse(body: bytes, kind: type[T]) -> T:
    """Read JSON of a known form."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Problem(Kind.INVALID_ARGUMENTS, str(error)) from None
    except ValueError as error:
        raise Problem(Kind.NOT_JSON, f"the body is not JSON: {error}") from None


def preferred_wait(request: Request, most: float) -> float | None:
    """Give the seconds that the client would wait: `Prefer: wait=N`, RFC 7240; None if it says nothing of that."""
    if header(request.scope, b"prefer") is None:
        return None
    found = WAIT.search(", ".join(request.headers.getlist("prefer")))
    return None if found is None else min(float(found[1]), most)


def idempotency_key(request: Request) -> str | None:
    """Give the key of a submission that may come twice; None where there is none."""
    key = header(request.scope, b"idempotency-key")
    if key is None:
        return None
    quoted = QUOTED.fullmatch(key)
    if quoted is not None:
        # A string of RFC 9651, as the draft wants it; it means the same as without its quotes.
        key = ESCAPED.sub(r"\1", quoted[1])
    try:
        check_key(key)
    except ValueError as error:
        raise Problem(Kind.INVALID_PARAMETER, str(error)) from None
    return key


def number(request: Request, name: str, default: float, least: float, most: float) -> float:
    """Give a number of the query."""
    text = request.query_params.get(name) if request.scope["query_string"] else None
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not least <= value <= most:
        raise Problem(Kind.INVALID_PARAMETER, f"{name} must be a number from {least:g} to {most:g}, got {text!r}")
    return value


def whole_number(request: Request, name: str, default: int, least: int, most: int) -> int:
    """Give a whole number of the query."""
    value = number(request, name, default, least, most)
    if value != int(value):
        raise Problem(Kind.INVALID_PARAMETER, f"{name} must be a whole number, got {value:g}")
    return int(value)


def cursor(request: Request) -> str | None:
    """Give the id of the task after which a page begins; None for the first page."""
    text = request.query_params.get("after")
    if text is not None and not TASK_ID.fullmatch(text):
        raise Problem(Kind.INVALID_PARAMETER, f"after must be the `next` of the page before, got {text!r}")
    return text


def status(request: Request) -> TaskStatus | None:
    """Give the status of the query; None for any."""
    text = request.query_params.get("status")
    if text is None:
        return None
    if text not in set(TaskStatus):
        raise Problem(Kind.INVALID_PARAMETER, f"status must be one of {', '.join(TaskStatus)}, got {text!r}")
    return TaskStatus(text)
