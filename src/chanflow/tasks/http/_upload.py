"""A request's body that an answer need not wait for, but its connection must."""

from __future__ import annotations

import math

from anyio import move_on_after
from starlette.types import Message, Receive, Scope, Send

from chanflow.tasks.http._request import declared_length

__all__ = ["Upload"]

PATIENCE = 5.0
"""Seconds for the rest of a body that nobody needs."""


class Upload:
    """The two ends of a request with a body: what is left of that is read before an answer begins.

    An answer to half a body leaves an HTTP/1 connection that no further request can use. Servers close it, some without
    a word, and what a client had sent there meanwhile is lost. So a body that is not too long is read and dropped, and
    the answer to another one says that the connection ends with it.

    Args:
        scope: of the request.
        receive: from the server.
        send: to the server.
        limit: the bytes that a body may have.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send, limit: int) -> None:
        self._receive = receive
        self._send = send
        self._more = True
        self._left = -1 if limit < declared_length(scope) < math.inf else limit

    async def receive(self) -> Message:
        """Receive the next piece."""
        message = await self._receive()
        self._left -= len(message.get("body", b""))
        self._more = message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Send a piece of the answer."""
        if self._more and message["type"] == "http.response.start":
            with move_on_after(PATIENCE):
                while self._more and self._left >= 0:
                    await self.receive()
            if self._more:
                message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
        await self._send(message)
