"""The bus: topics to publish to, and groups of consumers that share what is in them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

from anyio import CapacityLimiter, ClosedResourceError, Event
from attrs import frozen

from chanflow._check import check_count, check_seconds, show
from chanflow._work._call import Attempt, check_handler
from chanflow._work._retry import Retry
from chanflow.bus._consume import Handler, consume
from chanflow.bus._subscription import Subscription
from chanflow.bus.backend import Backend, Capabilities, Content, Delivery, Membership

__all__ = ["Bus", "DeadMessage"]

MAX_NAME = 255
DEFAULT_RETRY = Retry(5)


@frozen(kw_only=True)
class DeadMessage:
    """A message that a group gave up on."""

    id: str
    """One of a kind within the dead-letter topic; what `Bus.replay` takes."""
    topic: str
    """Where it comes from."""
    group: str
    """Who gave up on it."""
    reason: str
    attempts: int
    """How often it was delivered."""
    body: bytes
    key: str | None
    headers: Mapping[str, str]
    died_at: float
    """Seconds since the epoch."""


class Bus:
    """Topics, and groups of consumers that share what is published in them; made by `connect`.

    Every group gets every message, and the members of a group share them. A message is delivered at least once: it is
    gone only after it was acknowledged or rejected. Messages with the same key are delivered to a group in
    their order, one after the other. Those without a key start in their order, and are handled side by side.

    Use it as a context manager. Leaving the block closes it, as `aclose` does.
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
        """What the backend can do."""
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
        """Close the bus: end all iterations, wait until the subscriptions are left, and let go of the backend.

        So `consume` lets its handlers finish, and then returns. A call of `publish` that waits for room gets
        ClosedResourceError. Closing again does nothing. Within a subscription or a handler it would wait for itself.

        Cancellation:
            The subscriptions are not waited for any longer; the rest is done.
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
        """Publish a message, waiting while the topic has `max_pending` messages that a group has not settled.

        Args:
            topic: where to, from 1 to 255 characters; a topic is made by its first use.
            body: what the message carries; it is copied where it could still change.
            key: messages with the same key keep their order; None for none.
            headers: names and values to go with it.

        Returns:
            The message's id, one of a kind within the topic. Once this has returned, the message is not lost.

        Raises:
            ClosedResourceError: the bus is closed, before or while waiting.
            StorageError: the backend failed.
            TypeError: an argument has the wrong type.
            ValueError: `topic` is empty or too long.

        Cancellation:
            The message may have been published nevertheless.
        """
        self._check_open()
        check_name("topic", topic)
        if not isinstance(body, (bytes, bytearray, memoryview)):
            msg = f"body must be bytes, got {show(body)}"
            raise TypeError(msg)
        if key is not None and not isinstance(key, str):
            msg = f"key must be a str or None, got {show(key)}"
            raise TypeError(msg)
        headers = {} if headers is None else dict(headers)
        for pair in headers.items():
            if not all(isinstance(part, str) for part in pair):
                msg = f"headers must be of str by str, got {show(pair[0])}: {show(pair[1])}"
                raise TypeError(msg)
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
        """Take part in a group: `async with` it, and iterate over its messages.

        Args:
            topic: what to read, from 1 to 255 characters.
            group: whose member to be, from 1 to 255 characters; a group is made by its first member, and stays.
            max_in_flight: the most messages to hold unsettled, at least 1.
            ack_deadline: seconds after which a message that is not settled is given to another, greater than 0.
            dead_letter: the topic for rejected messages; None for the topic's name with ".dead".
            from_start: whether a group that is new gets what the topic still keeps; else it gets what comes from now
                on.

        Returns:
            The subscription, which begins with its `async with`.

        Raises:
            TypeError, ValueError: an argument is not as said above.
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
        handler: Handler,
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

        A message is acknowledged after its handler returned. If it raised, the message comes again after the retry's
        backoff; after the last attempt, it is moved to the dead-letter topic. A delivery whose consumer was killed
        counts as an attempt. While a handler runs, its message's lease is renewed. A handler may settle its
        message itself.

        Args:
            topic: what to read, as for `subscribe`.
            handler: called with the `Message`; a plain function runs in a thread.
            group: as for `subscribe`.
            workers: how many handlers may run at the same time, at least 1.
            retry: how often to attempt a message and how long to wait in between; 5 attempts by default.
            timeout: seconds for one attempt, greater than 0; None for no bound. A thread can't be stopped, and keeps
                its worker until it returns.
            dead_letter: as for `subscribe`.
            ack_deadline: after how many seconds a message is given to another when its consumer was killed.
            from_start: as for `subscribe`.

        Raises:
            ClosedResourceError: the bus is closed already.
            StorageError: the backend failed; the handlers that ran have ended.
            TypeError, ValueError: an argument is not as said above.

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
        """List the oldest messages of a dead-letter topic, without taking them.

        Args:
            topic: the dead-letter topic.
            limit: the most to list, at least 1.

        Raises:
            ClosedResourceError: the bus is closed.
            StorageError: the backend failed.
        """
        self._check_open()
        check_name("topic", topic)
        check_count("limit", limit, 1)
        return [dead for delivery in await self._backend.browse(topic, limit) if (dead := exhume(delivery)) is not None]

    async def replay(self, topic: str, ids: Iterable[str] | None = None) -> int:
        """Move dead letters back to where they come from, for the group that gave up on them.

        Args:
            topic: the dead-letter topic.
            ids: of the dead letters, as `dead_letters` gives them; None for all. Those that are not there are passed
                over.

        Returns:
            How many were moved. Their attempts count from 1 again.

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
    """Refuse what is no name of a topic or group."""
    if not isinstance(name, str):
        msg = f"{argument} must be a str, got {show(name)}"
        raise TypeError(msg)
    if not 1 <= len(name) <= MAX_NAME:
        msg = f"{argument} must have 1 to {MAX_NAME} characters, got {show(name)}"
        raise ValueError(msg)


def exhume(delivery: Delivery) -> DeadMessage | None:
    """Tell what is known of a dead letter; None for a message that is none."""
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
