"""Who may come in: hosts, bearer tokens, and no pages of other sites but those that are allowed."""

from __future__ import annotations

import re
from collections.abc import Sequence
from ipaddress import AddressValueError, IPv6Address

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from chanflow._check import show
from chanflow.tasks._token import Token, Tokens
from chanflow.tasks.http._problem import Kind, Problem
from chanflow.tasks.http._request import Waits, declared_length, header
from chanflow.tasks.http._upload import Upload

__all__ = ["SAFE_METHODS", "TOKEN", "Guard"]

TOKEN = "chanflow.token"  # noqa: S105 -- a name
"""Where in the scope of a request its token is; it isn't there where none is needed."""
OPEN = {"", "/", "/dashboard.js", "/dashboard.css", "/health"}
"""What needs no token: the page has no data in it."""
SAFE_METHODS = {"GET", "HEAD", "OPTIONS"}
HOST = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\[\]/@\s]+))(?::[0-9]*)?")
"""A host with or without a port, as the header has it."""
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")
ASKED = ("Authorization", "Idempotency-Key", "Last-Event-ID", "Prefer")
"""The headers that another site's page may send, beside those that any may."""
TOLD = ("Location", "Preference-Applied", "Retry-After")
"""The headers that it may see."""


class Guard:
    """Lets pass what has a host and a token that are known.

    Args:
        app: what it guards.
        waits: the requests that wait for something.
        max_body: bytes.
        tokens: any of them will do; None for no need of one.
        hosts: names, one of which a request must be for; None for any.
        cors: origins of other sites whose pages may do what any client may.
    """

    def __init__(
        self,
        app: ASGIApp,
        waits: Waits,
        max_body: int,
        *,
        tokens: Sequence[str | Token] | None,
        hosts: Sequence[str] | None,
        cors: Sequence[str],
    ) -> None:
        self._app = app
        self.waits: Waits = waits
        self._max_body = max_body
        self._tokens = None if tokens is None else Tokens(tokens)
        self._hosts = None if hosts is None else to_hosts(hosts)
        self._origins = to_origins(cors)
        self._inner: ASGIApp = self._pass
        if self._origins:
            self._inner = CORSMiddleware(
                self._pass,
                allow_origins=sorted(self._origins),
                allow_methods=("GET", "POST", "DELETE"),
                allow_headers=ASKED,
                expose_headers=TOLD,
            )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if declared_length(scope) and scope["http_version"] < "2":
            upload = Upload(scope, receive, send, self._max_body)
            receive, send = upload.receive, upload.send
        problem = self._judge_host(scope)
        await (self._inner if problem is None else problem.response())(scope, receive, send)

    def _judge_host(self, scope: Scope) -> Problem | None:
        """Refuse a request by a name that anybody may have given to this machine: see DNS rebinding."""
        if self._hosts is None:
            return None
        shown = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if shown and all(host_of(each) in self._hosts for each in shown):
            return None
        return Problem(Kind.WRONG_HOST, f"this service does not answer for the host {', '.join(shown) or 'of none'!r}")

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        problem = self._judge(scope)
        await (self._app if problem is None else problem.response())(scope, receive, send)

    def _judge(self, scope: Scope) -> Problem | None:
        if self._tokens is None:
            # Any page in a browser could otherwise act on a service of this machine.
            strange = scope["method"] not in SAFE_METHODS and self._is_foreign(scope)
            return Problem(Kind.FOREIGN_PAGE, "another site's page must not change anything here") if strange else None
        if path_of(scope) in OPEN:
            return None
        kind, _, secret = (header(scope, b"authorization") or "").partition(" ")
        token = self._tokens.find(secret.strip())
        if token is None or kind.lower() != "bearer":
            return Problem(Kind.TOKEN_REQUIRED, "this needs a valid bearer token", {"WWW-Authenticate": "Bearer"})
        scope[TOKEN] = token
        return None

    def _is_foreign(self, scope: Scope) -> bool:
        """Tell whether another site's page asks: browsers say so in one of two ways, and nothing else does."""
        origin, site = header(scope, b"origin"), header(scope, b"sec-fetch-site")
        if origin in self._origins:
            return False
        if site is not None:
            return site not in {"same-origin", "none"}
        return origin is not None and origin.partition("://")[2] != header(scope, b"host")


def host_of(value: str) -> str | None:
    """Give the name of a host without its port, in the one way in which it can be compared; None if it is none."""
    found = HOST.fullmatch(value)
    if found is None:
        return None
    if found[1] is None:
        return found[2].lower().removesuffix(".")
    try:
        return str(IPv6Address(found[1]))
    except AddressValueError:
        return None


def to_hosts(hosts: Sequence[str]) -> set[str]:
    """Check the names of hosts."""
    known: set[str] = set()
    for each in [None] if isinstance(hosts, str) or not hosts else hosts:
        bare = each if isinstance(each, str) and each.isascii() else ""
        try:
            known.add(str(IPv6Address(bare.removeprefix("[").removesuffix("]"))))
        except AddressValueError:
            name = host_of(bare)
            if name is None or ":" in bare or "*" in bare:
                msg = (
                    "hosts must be a sequence of names or addresses, one or more, in ASCII and without a port, or None,"
                    f" got {show(hosts)}"
                )
                raise ValueError(msg) from None
            known.add(name)
    return known


def to_origins(origins: Sequence[str]) -> set[str]:
    """Check the origins of pages."""
    if isinstance(origins, str) or not all(
        isinstance(each, str) and ORIGIN.fullmatch(each) and each.isascii() and each == each.lower() and "*" not in each
        for each in origins
    ):
        msg = (
            "cors must be a sequence of origins as browsers send them, such as https://app.example, "
            f"got {show(origins)}"
        )
        raise ValueError(msg)
    return set(origins)


def path_of(scope: Scope) -> str:
    """Give the path below where the app is mounted."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))
