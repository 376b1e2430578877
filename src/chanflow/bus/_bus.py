"""The bus: topics to publish to, and groups of consumers that share their messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

from anyio import CapacityLimiter, ClosedResourceError, Event
from attrs import frozen

from chanflow._check import check_count, check_seconds, check_text, show
from chanflow._work._call import Attempt, check_handler
from chanflow._work._retry import Retry
from chanflow.bus._consume import MessageHandler, consume
from chanflow.bus._subscription import Subscription
from chanflow.bus.backend import Backend, Capabilities, Content, Delivery, Membership

__all__ = ["Bus", "DeadMessage"]

MAX_NAME = 255
DEFAULT_RETRY = Retry(5)


@frozen(kw_only=True)
class DeadMessage:
    """A dead letter: a message that a group rejected, in a dead-letter topic."""

    id: str
    """The id for `Bus.replay`, unique within the dead-letter topic."""
    topic: str
    """The topic to which it was published."""
    group: str
    """The group that rejected it."""
    reason: str
    attempts: int
    """How often it was delivered to the group."""
    body: bytes
    key: str | None
    headers: Mapping[str, str]
    died_at: float
    """Seconds since the epoch."""


class Bus:
    """Topics, and groups of consumers that share the messages published to them; created by `connect`.

    Every group receives every message, and its members share the messages between them. A message is delivered at least
    once: it is removed only after it was acknowledged or rejected. Messages with the same key are delivered to a group
    in order, one after the other. Messages without a key are started in order, and handled concurrently.

    Use the bus as a context manager. Leaving the block closes it, as `aclose` does.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend: Backend = backend
        self._open: bool = False
        self._subscriptions: set[Subscription] = set()
        self._left: Event | None = None

    def __repr__(self) -> str:
        state = f"{len(self._subscriptions)} subscription(s)" if self._open else "not open"
        return f"<Bus on {type(self._backend).__name__}: {state}>"

    @property
    def capabilities(self) -> Capabilities:
        """The capabilities of the backend."""
        return self._backend.capabilities

    async def __aenter__(self) -> Self:
        await self._backend.open()
        self._open = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the bus: end all iterations, wait until all subscriptions are left, and close the backend.

        `consume` waits for its running handlers, then returns. A call of `publish` that waits for room gets
        ClosedResourceError. Closing again has no effect. Don't call this within a subscription or a handler, as it
        would wait for itself.

        Cancellation:
            It stops waiting for the subscriptions, and still closes the backend.
        """
        if not self._open:
            return
        self._open = False
        for subscription in self._subscriptions:
            subscription.stop()
        try:
            if self._subscriptions:
                self._left = Event()
                await self._left.wait()
        finally:
            await self._backend.aclose()

    async def publish(
        self,
        topic: str,
        body: bytes | bytearray | memoryview,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """Publish a message, waiting while a group has `max_pending` unsettled messages of the topic.

        Args:
            topic: the topic, from 1 to 255 characters. A topic is created on first use.
            body: the content; it is copied if it is mutable.
            key: messages with the same key are delivered in order; None for no key.
            headers: names and values to send with the body.

        Returns:
            The message's id, unique within the topic. Once this call has returned, the message is not lost.

        Raises:
            ClosedResourceError: the bus was closed, before or while waiting.
            StorageError: the backend failed.
            TypeError: an argument has the wrong type.
            ValueError: `topic` is empty or too long, or a name, key or header is no text that UTF-8 can encode.

        Cancellation:
            The message may have been published.
        """
        self._check_open()
        check_name("topic", topic)
        if not isinstance(body, (bytes, bytearray, memoryview)):
            msg = f"body must be bytes, got {show(body)}"
            raise TypeError(msg)
        if key is not None and not isinstance(key, str):
            msg = f"key must be a str or None, got {show(key)}"
            raise TypeError(msg)
        if key is not None:
            check_text("key", key)
        headers = {} if headers is None else dict(headers)
        for pair in headers.items():
            if not all(isinstance(part, str) for part in pair):
                msg = f"headers must be of str by str, got {show(pair[0])}: {show(pair[1])}"
                raise TypeError(msg)
            for part in pair:
                check_text("headers", part)
        return await self._backend.publish(Content(topic=topic, body=bytes(body), key=key, headers=headers))

    def subscribe(
        self,
        topic: str,
        *,
        group: str,
        max_in_flight: int = 100,
        ack_deadline: float = 30.0,
        dead_letter: str | None = None,
        from_start: bool = True,
    ) -> Subscription:
        """Return a subscription: a member of a group, to enter with `async with` and iterate over.

        Args:
            topic: the topic to receive from, from 1 to 255 characters.
            group: the group to join, from 1 to 255 characters. It is created by its first member, and never removed.
            max_in_flight: the maximum number of unsettled messages to hold, at least 1.
            ack_deadline: seconds after which an unsettled message is delivered again, to any member of the group;
                greater than 0.
            dead_letter: the topic for rejected messages; None for the topic's name followed by ".dead".
            from_start: whether a new group begins with the messages that the topic still has; otherwise it receives
                only those published from now on.

        Returns:
            The subscription, which joins the group when its block is entered.

        Raises:
            TypeError, ValueError: an argument is not as described above.
        """
        check_name("topic", topic)
        check_name("group", group)
        check_count("max_in_flight", max_in_flight, 1)
        check_seconds("ack_deadline", ack_deadline, positive=True)
        if dead_letter is None:
            dead_letter = f"{topic}.dead"
        else:
            check_name("dead_letter", dead_letter)
        membership = Membership(topic=topic, group=group, from_start=from_start, ack_deadline=float(ack_deadline))
        return Subscription(
            self._backend, membership, max_in_flight, dead_letter, opened=self._enter, closed=self._leave
        )

    async def consume(
        self,
        topic: str,
        handler: MessageHandler,
        *,
        group: str,
        workers: int = 10,
        retry: Retry = DEFAULT_RETRY,
        timeout: float | None = None,
        dead_letter: str | None = None,
        ack_deadline: float = 30.0,
        from_start: bool = True,
    ) -> None:
        """Call a handler for each message, until the bus is closed or the call is cancelled.

        A message is acknowledged after its handler returns. If the handler raises, the message is delivered again after
        the backoff; after the last attempt, it is moved to the dead-letter topic. A delivery whose consumer was killed
        counts as an attempt. While a handler runs, the lease of its message is renewed. A handler may settle its
        message itself.

        Args:
            topic: the topic to receive from, as for `subscribe`.
            handler: called with the `Message`. A sync function runs in a thread.
            group: as for `subscribe`.
            workers: how many handlers may run at the same time, at least 1.
            retry: how often to attempt a message, and how long to wait between attempts; 5 attempts by default.
            timeout: seconds that an attempt may take, greater than 0; None for no time limit. A thread can't be
                stopped, and occupies its worker until it returns.
            dead_letter: as for `subscribe`.
            ack_deadline: seconds after which a message whose consumer was killed is delivered again.
            from_start: as for `subscribe`.

        Raises:
            ClosedResourceError: the bus is already closed.
            StorageError: the backend failed; all handlers have ended.
            TypeError, ValueError: an argument is not as described above.

        Cancellation:
            Handlers are cancelled, and their messages given back.
        """
        check_handler("handler", handler)
        check_count("workers", workers, 1)
        if not isinstance(retry, Retry):
            msg = f"retry must be a Retry, got {show(retry)}"
            raise TypeError(msg)
        if timeout is not None:
            check_seconds("timeout", timeout, positive=True)
        subscription = self.subscribe(
            topic,
            group=group,
            max_in_flight=workers,
            ack_deadline=ack_deadline,
            dead_letter=dead_letter,
            from_start=from_start,
        )
        await consume(subscription, Attempt(handler, CapacityLimiter(workers), timeout), retry)

    async def dead_letters(self, topic: str, limit: int = 100) -> list[DeadMessage]:
        """Return the oldest messages of a dead-letter topic, without removing them.

        Args:
            topic: the dead-letter topic.
            limit: the maximum number of messages, at least 1.

        Raises:
            ClosedResourceError: the bus is closed.
            StorageError: the backend failed.
        """
        self._check_open()
        check_name("topic", topic)
        check_count("limit", limit, 1)
        return [dead for delivery in await self._backend.browse(topic, limit) if (dead := exhume(delivery)) is not None]

    async def replay(self, topic: str, ids: Iterable[str] | None = None) -> int:
        """Move dead letters back to their original topics, for the group that rejected them.

        Args:
            topic: the dead-letter topic.
            ids: the ids of the dead letters, as returned by `dead_letters`; None for all. Ids that don't exist are
                ignored.

        Returns:
            The number of messages moved. Their attempts are counted from 1 again.

        Raises:
            ClosedResourceError: the bus is closed.
            StorageError: the backend failed.
        """
        self._check_open()
        check_name("topic", topic)
        return await self._backend.replay(topic, None if ids is None else list(ids))

    def _check_open(self) -> None:
        if not self._open:
            msg = "the bus is closed, or its block was not entered"
            raise ClosedResourceError(msg)

    def _enter(self, subscription: Subscription) -> None:
        self._check_open()
        self._subscriptions.add(subscription)

    def _leave(self, subscription: Subscription) -> None:
        self._subscriptions.discard(subscription)
        if self._left is not None and not self._subscriptions:
            self._left.set()


def check_name(argument: str, name: object) -> None:
    """Raise an error that names the argument unless the name is a valid name of a topic or group."""
    if not isinstance(name, str):
        msg = f"{argument} must be a str, got {show(name)}"
        raise TypeError(msg)
    if not 1 <= len(name) <= MAX_NAME:
        msg = f"{argument} must have 1 to {MAX_NAME} characters, got {show(name)}"
        raise ValueError(msg)
    check_text(argument, name)


def exhume(delivery: Delivery) -> DeadMessage | None:
    """Return a delivery as a dead letter, or None if it is not one."""
    content, origin = delivery.content, delivery.content.origin
    if origin is None:
        return None
    return DeadMessage(
        id=delivery.id,
        topic=origin.topic,
        group=origin.group,
        reason=origin.reason,
        attempts=origin.attempts,
        body=content.body,
        key=content.key,
        headers=content.headers,
        died_at=delivery.published_at,
    )
