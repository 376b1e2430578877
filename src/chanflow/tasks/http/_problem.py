"""What went wrong, told as a problem: RFC 9457."""

from __future__ import annotations

import logging
from enum import Enum

import msgspec
from anyio import ClosedResourceError
from starlette.responses import Response

from chanflow._errors import StorageError
from chanflow.tasks._errors import IdempotencyError, TaskStateError, UnknownTaskError
from chanflow.tasks._handler import ArgumentError
from chanflow.tasks.wire import PROBLEM

__all__ = ["SAFE", "Kind", "Problem", "json_response", "to_problem"]

logger = logging.getLogger("chanflow.tasks")

SAFE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
STORAGE_RETRY = "5"
"""Seconds after which to try again when the store or the bus failed."""


class Kind(Enum):
    """The kinds of problems: the status and the title of each. The page "Problems" explains them."""

    NOT_JSON = 400, "The body is not JSON"
    TOKEN_REQUIRED = 401, "A valid token is required"
    FOREIGN_PAGE = 403, "A page of another site may change nothing"
    SCOPE_REQUIRED = 403, "The token does not allow this"
    NOT_FOUND = 404, "There is nothing at this address"
    UNKNOWN_HANDLER = 404, "There is no such handler"
    UNKNOWN_TASK = 404, "There is no such task"
    METHOD_NOT_ALLOWED = 405, "The address has no such method"
    TASK_STATE = 409, "The task is not in a state for this"
    CURSOR_EXPIRED = 410, "The cursor has expired"
    BODY_TOO_LONG = 413, "The body is too long"
    BODY_TYPE = 415, "The body is not application/json"
    WRONG_HOST = 421, "The service does not answer for this host"
    IDEMPOTENCY_KEY_REUSED = 422, "The idempotency key was used for another task"
    INVALID_ARGUMENTS = 422, "The arguments do not fit"
    INVALID_PARAMETER = 422, "A parameter is not as it must be"
    INTERNAL_ERROR = 500, "The service failed"
    NOT_RUNNING = 503, "The service is stopping, or was not started"
    QUEUE_FULL = 503, "Too many tasks are pending"
    STORE_UNAVAILABLE = 503, "The store cannot be reached"

    def __init__(self, status: int, title: str) -> None:
        self.status: int = status
        self.title: str = title

    @property
    def uri(self) -> str:
        """What tells it from the others."""
        return PROBLEM + self.name.lower().replace("_", "-")


KINDS: dict[type[Exception], Kind] = {
    UnknownTaskError: Kind.UNKNOWN_TASK,
    TaskStateError: Kind.TASK_STATE,
    ArgumentError: Kind.INVALID_ARGUMENTS,
    IdempotencyError: Kind.IDEMPOTENCY_KEY_REUSED,
}


class Problem(Exception):  # noqa: N818 -- the word of the RFC
    """An answer that is no success."""

    def __init__(self, kind: Kind, detail: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.kind: Kind = kind
        self.headers: dict[str, str] = headers or {}

    def response(self) -> Response:
        """Make the answer."""
        kind = self.kind
        body = {"type": kind.uri, "title": kind.title, "status": kind.status, "detail": str(self)}
        return json_response(body, kind.status, self.headers, media_type="application/problem+json")


def json_response(
    body: object, status: int = 200, headers: dict[str, str] | None = None, media_type: str = "application/json"
) -> Response:
    """Answer with JSON."""
    # Each header costs its share of a short answer; and JSON is nothing that a browser runs.
    headers = {"Cache-Control": "no-store"} if headers is None else {"Cache-Control": "no-store", **headers}
    return Response(msgspec.json.encode(body), status, headers=headers, media_type=media_type)


def to_problem(error: Exception) -> Problem:
    """Say of an error what it means to the client."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, ClosedResourceError):
        return Problem(Kind.NOT_RUNNING, "the service is stopping, or was not started", {"Retry-After": STORAGE_RETRY})
    if isinstance(error, StorageError):
        # Where the store is, and what is wrong with it, is none of the client's business.
        logger.error("a request failed: %s", error)
        detail = "the store cannot be reached, or failed; the service's log tells how"
        return Problem(Kind.STORE_UNAVAILABLE, detail, {"Retry-After": STORAGE_RETRY})
    for cause, kind in KINDS.items():
        if isinstance(error, cause):
            return Problem(kind, str(error))
    # As above.
    logger.error("a request failed", exc_info=error)
    return Problem(Kind.INTERNAL_ERROR, "the service failed; its log tells how")
