"""Who may come in: bearer tokens, and no other sites' pages."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from hmac import compare_digest

from starlette.types import ASGIApp, Receive, Scope, Send

from chanflow.tasks.http._problem import Kind, Problem
from chanflow.tasks.http._request import Waits, declared_length, header
from chanflow.tasks.http._upload import Upload

__all__ = ["Guard"]

OPEN = {"", "/", "/dashboard.js", "/dashboard.css", "/health"}
"""What needs no token: the page has no data in it."""
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}


class Guard:
    """Lets pass what has one of the tokens.

    Args:
        app: what it guards.
        tokens: any of them will do; None for no need of one.
        waits: the requests that wait for something.
        max_body: bytes.
    """

    def __init__(self, app: ASGIApp, tokens: Sequence[str] | None, waits: Waits, max_body: int) -> None:
        self._app = app
        self.waits: Waits = waits
        self._max_body = max_body
        # Digests are of one length, so that comparing takes the same time for all.
        self._digests = None if tokens is None else [digest(token) for token in tokens]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            if declared_length(scope) and scope["http_version"] < "2":
                upload = Upload(scope, receive, send, self._max_body)
                receive, send = upload.receive, upload.send
            problem = self._judge(scope)
            if problem is not None:
                await problem.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _judge(self, scope: Scope) -> Problem | None:
        if self._digests is None:
            # Any page in a browser could otherwise act on a service of this machine.
            strange = scope["method"] not in SAFE_METHODS and is_foreign(scope)
            return Problem(Kind.FOREIGN_PAGE, "another site's page must not change anything here") if strange else None
        if path_of(scope) in OPEN:
            return None
        kind, _, token = (header(scope, b"authorization") or "").partition(" ")
        shown, known = digest(token.strip()), False
        for each in self._digests:
            # All of them, so that the time doesn't tell which one was close.
            known |= compare_digest(each, shown)
        if known and kind.lower() == "bearer":
            return None
        return Problem(Kind.TOKEN_REQUIRED, "this needs a valid bearer token", {"WWW-Authenticate": "Bearer"})


def is_foreign(scope: Scope) -> bool:
    """Tell whether another site's page asks: browsers say so in one of two ways, and nothing else does."""
    site = header(scope, b"sec-fetch-site")
    if site is not None:
        return site not in {"same-origin", "none"}
    origin = header(scope, b"origin")
    return origin is not None and origin.partition("://")[2] != header(scope, b"host")


def path_of(scope: Scope) -> str:
    """Give the path below where the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def digest(token: str) -> bytes:
    """Give what is compared in place of a token."""
    return sha256(token.encode("utf-8", "surrogatepass")).digest()
