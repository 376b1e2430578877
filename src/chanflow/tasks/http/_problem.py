"""What went wrong, told as a problem: RFC 9457."""

from __future__ import annotations

import logging
from http import HTTPStatus

import msgspec
from anyio import ClosedResourceError
from starlette.responses import Response

from chanflow._errors import StorageError
from chanflow.tasks._errors import IdempotencyError, TaskStateError, UnknownTaskError
from chanflow.tasks._handler import ArgumentError
from chanflow.tasks.wire import KEY_REUSED

__all__ = ["SAFE", "Problem", "json_response", "to_problem"]

logger = logging.getLogger("chanflow.tasks")

SAFE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
TITLES = {413: "Content Too Large", 422: "Unprocessable Content"}
"""Those that Python calls by their names of before RFC 9110, depending on its version."""
STATUSES: dict[type[Exception], int] = {UnknownTaskError: 404, TaskStateError: 409, ArgumentError: 422}
STORAGE_RETRY = "5"
"""Seconds after which to try again when the store or the bus failed."""


class Problem(Exception):  # noqa: N818 -- the word of the RFC
    """An answer that is no success."""

    def __init__(
        self, status: int, detail: str, headers: dict[str, str] | None = None, *, kind: str = "about:blank"
    ) -> None:
        super().__init__(detail)
        self.status: int = status
        self.headers: dict[str, str] = headers or {}
        self.kind: str = kind

    def response(self) -> Response:
        """Make the answer."""
        body = {
            "type": self.kind,
            "title": TITLES.get(self.status) or HTTPStatus(self.status).phrase,
            "status": self.status,
            "detail": str(self),
        }
        return json_response(body, self.status, self.headers, media_type="application/problem+json")


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
    if isinstance(error, StorageError | ClosedResourceError):
        return Problem(503, str(error), {"Retry-After": STORAGE_RETRY})
    if isinstance(error, IdempotencyError):
        return Problem(422, str(error), kind=KEY_REUSED)
    for kind, status in STATUSES.items():
        if isinstance(error, kind):
            return Problem(status, str(error))
    # What is wrong is in the log, and none of the client's business.
    logger.error("a request failed", exc_info=error)
    return Problem(500, "the service failed; its log tells how")
