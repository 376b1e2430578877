"""Server-sent events: a stream of messages that ends when either side has had enough."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from anyio import CancelScope, ClosedResourceError, Lock, create_task_group, sleep
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chanflow._errors import StorageError
from chanflow.tasks._errors import UnknownTaskError
from chanflow.tasks.http._problem import SAFE
from chanflow.tasks.http._request import Waits

__all__ = ["EventStream", "event"]

KEEP_ALIVE = 5.0
"""Seconds after which something is sent: nothing in between may take the connection for dead, and some servers notice
only by this that the client is gone."""


def event(name: str, data: bytes, event_id: str | None = None) -> bytes:
    """Make a message of JSON; a client that connects again tells the id of the last one that it has seen."""
    told = f"event: {name}\n" if event_id is None else f"event: {name}\nid: {event_id}\n"
    return b"%sdata: %s\n\n" % (told.encode(), data)


class EventStream(Response):
    """Sends messages as they come, until there are no more, the service closes, or the client goes away."""

    def __init__(self, messages: AsyncGenerator[bytes, None], waits: Waits) -> None:
        # A proxy may hold nothing back.
        super().__init__(headers=SAFE | {"X-Accel-Buffering": "no"}, media_type="text/event-stream")
        del self.headers["content-length"]
        self._messages = messages
        self._waits = waits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        if scope["method"] == "HEAD":
            await self._messages.aclose()
        else:
            # Some servers tell of a client that went away, others raise.
            async with aclosing(self._messages), self._waits.waiting(receive) as still_there:
                await self._send_all(Sender(send, still_there))
        with suppress(OSError):
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_all(self, sender: Sender) -> None:
        async with create_task_group() as tasks:
            tasks.start_soon(sender.keep_alive)
            # Servers may wait for a part of the body before they send the head, and the first message may take long.
            await sender.send(b"")
            # When they can't be told any more, the end of the stream is all that can be said.
            with suppress(ClosedResourceError, StorageError, UnknownTaskError):
                async for message in self._messages:
                    await sender.send(message)
            tasks.cancel_scope.cancel()


class Sender:
    """Sends one message at a time, until that fails."""

    def __init__(self, send: Send, scope: CancelScope) -> None:
        self._send = send
        self._scope = scope
        self._turn = Lock()

    async def send(self, body: bytes) -> None:
        """Send a message."""
        async with self._turn:
            try:
                await self._send({"type": "http.response.body", "body": body, "more_body": True})
            except OSError:
                self._scope.cancel()

    async def keep_alive(self) -> None:
        """Send what means nothing, every now and then."""
        while True:
            await sleep(KEEP_ALIVE)
            await self.send(b": keep-alive\n\n")
