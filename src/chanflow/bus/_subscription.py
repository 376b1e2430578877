"""The consumer's side of a topic: a subscription, and the messages that it holds."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from anyio import CancelScope, move_on_after, sleep

from chanflow._check import storable
from chanflow._errors import StorageError
from chanflow._loop._home import Home, running_home
from chanflow._loop._signal import Signal
from chanflow.bus.backend import Backend, Content, Delivery, Member, Membership, Origin

__all__ = ["LeaseLostError", "Message", "Subscription"]

logger = logging.getLogger("chanflow.bus")

BATCH = 10
"""The maximum number of messages to fetch at once. Those that wait here are not available to other members."""
GRACE = 5.0
"""Seconds to spend on giving back held messages when the subscription ends; the leases of the others expire."""


class LeaseLostError(Exception):
    """A message was not settled within the ack deadline, and has been delivered again in the meantime."""


class Message:
    """A message that this consumer holds until it acknowledges it, gives it back or rejects it."""

    __slots__ = ("_delivery", "_settled", "_subscription")

    def __init__(self, subscription: Subscription, delivery: Delivery) -> None:
        self._subscription: Subscription = subscription
        self._delivery: Delivery = delivery
        self._settled: str | None = None

    @property
    def id(self) -> str:
        """The id, unique within the topic."""
        return self._delivery.id

    @property
    def topic(self) -> str:
        """The topic to which it was published."""
        return self._delivery.content.topic

    @property
    def body(self) -> bytes:
        """The content that was published."""
        return self._delivery.content.body

    @property
    def key(self) -> str | None:
        """The key: messages with the same key are delivered in order. None for no key."""
        return self._delivery.content.key

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers that were published with the body."""
        return self._delivery.content.headers

    @property
    def attempt(self) -> int:
        """How often this message has been delivered to the group, from 1."""
        return self._delivery.attempt

    @property
    def published_at(self) -> float:
        """The time at which it was published, in seconds since the epoch."""
        return self._delivery.published_at

    @property
    def settled(self) -> bool:
        """Whether it was acknowledged, given back or rejected through this object."""
        return self._settled is not None

    def __repr__(self) -> str:
        return f"<Message {self.id} of {self.topic!r}, attempt {self.attempt}>"

    async def ack(self) -> None:
        """Acknowledge the message: it is not delivered to the group again.

        Raises:
            LeaseLostError: the ack deadline has passed, and the message has been delivered again.
            RuntimeError: it was already settled.
            StorageError: the backend failed.

        Cancellation:
            It may have been acknowledged.
        """
        self._settle("acknowledged")
        self._check_held(await self._subscription._member.ack(self._delivery))

    async def nack(self, delay: float = 0.0) -> None:
        """Give the message back, to be delivered again.

        Args:
            delay: seconds before it is delivered again, at least 0. Later messages with the same key wait, too.

        Raises:
            LeaseLostError: the ack deadline has passed, and the message has been delivered again.
            RuntimeError: it was already settled.
            ValueError: `delay` is negative.
            StorageError: the backend failed.

        Cancellation:
            It may have been given back.
        """
        if not delay >= 0:
            msg = f"delay must be >= 0, got {delay}"
            raise ValueError(msg)
        self._settle("given back")
        self._check_held(await self._subscription._member.nack(self._delivery, delay))

    async def reject(self, reason: str) -> None:
        """Settle the message by moving it to the dead-letter topic.

        Args:
            reason: the reason to record in the dead letter.

        Raises:
            LeaseLostError: the ack deadline has passed, and the message has been delivered again.
            RuntimeError: it was already settled.
            StorageError: the backend failed.

        Cancellation:
            It may have been moved.
        """
        self._settle("rejected")
        content = self._delivery.content
        group, dead_letter = self._subscription.group, self._subscription.dead_letter
        origin = Origin(topic=content.topic, group=group, id=self.id, attempts=self.attempt, reason=storable(reason))
        dead = Content(topic=dead_letter, body=content.body, key=content.key, headers=content.headers, origin=origin)
        self._check_held(await self._subscription._member.bury(self._delivery, dead))

    async def extend(self) -> None:
        """Renew the lease: the ack deadline starts again from now.

        Raises:
            LeaseLostError: the ack deadline has passed, and the message has been delivered again.
            RuntimeError: it was already settled.
            StorageError: the backend failed.
        """
        self._check_unsettled()
        held = await self._subscription._member.extend(self._delivery)
        # Another task may have settled it in the meantime.
        if self._settled is None:
            self._check_held(held)
            self._subscription._hold(self)

    def _settle(self, how: str) -> None:
        self._check_unsettled()
        self._settled = how
        self._subscription._drop(self)

    def _check_unsettled(self) -> None:
        if self._settled is not None:
            msg = f"message {self.id} of topic {self.topic!r} was {self._settled} already"
            raise RuntimeError(msg)

    def _check_held(self, held: bool) -> None:  # noqa: FBT001 -- the backend's answer
        if not held:
            deadline = self._subscription.ack_deadline
            msg = f"message {self.id} of topic {self.topic!r} was not settled within {deadline} s, and given to another"
            raise LeaseLostError(msg)


class Subscription:
    """A member of a group: a context manager, and an asynchronous iterator over messages.

    It holds at most `max_in_flight` unsettled messages; the iteration waits until one is settled. A message that is not
    settled within the ack deadline is delivered again, to any member, and no longer counts. Any number of tasks may
    iterate over one subscription. Leaving the block gives unsettled messages back. When the bus is closed, the
    iteration ends.
    """

    def __init__(
        self,
        backend: Backend,
        membership: Membership,
        max_in_flight: int,
        dead_letter: str,
        *,
        opened: Callable[[Subscription], object],
        closed: Callable[[Subscription], object],
    ) -> None:
        self.topic: str = membership.topic
        self.group: str = membership.group
        self.dead_letter: str = dead_letter
        self.ack_deadline: float = membership.ack_deadline
        self._backend: Backend = backend
        self._membership: Membership = membership
        self._max_in_flight: int = max_in_flight
        self._opened: Callable[[Subscription], object] = opened
        self._closed: Callable[[Subscription], object] = closed
        self._member: Member
        self._home: Home
        self._entered: bool = False
        self._ended: bool = False
        self._scopes: set[CancelScope] = set()
        # Messages fetched but not yet returned, each with the time from which its lease must be renewed first.
        self._ahead: deque[tuple[Delivery, float]] = deque()
        # Messages returned and not settled, each with the time at which its lease expires.
        self._held: dict[Message, float] = {}
        self._room: Signal = Signal()

    async def __aenter__(self) -> Self:
        self._home = running_home()
        self._opened(self)
        try:
            self._member = await self._backend.join(self._membership)
        except BaseException:
            self._closed(self)
            raise
        self._entered = True
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.stop()
        try:
            with move_on_after(GRACE, shield=True) as scope:
                await self._give_back()
            if scope.cancelled_caught:
                logger.warning("%d message(s) of %r could not be given back in time", self._count(), self.topic)
        except StorageError as error:
            logger.warning("%d message(s) of %r could not be given back: %s", self._count(), self.topic, error)
        finally:
            self._closed(self)

    def __repr__(self) -> str:
        state = "ended" if self._ended else f"{len(self._held)} held" if self._entered else "not entered"
        return f"<Subscription of group {self.group!r} to {self.topic!r}: {state}>"

    def __aiter__(self) -> Self:
        if not self._entered:
            msg = "the subscription was not entered; iterate inside of `async with bus.subscribe(...) as messages:`"
            raise RuntimeError(msg)
        return self

    async def __anext__(self) -> Message:
        """Return the next message, waiting for one and until fewer than `max_in_flight` are held.

        Raises:
            StopAsyncIteration: the subscription or the bus was closed.
            StorageError: the backend failed.

        Cancellation:
            Atomic: a cancelled call holds no message.
        """
        await self._home.operate()
        while True:
            if len(self._held) >= self._max_in_flight:
                await self._wait_for_room()
            if self._ended:
                raise StopAsyncIteration
            if not self._ahead:
                await self._fetch()
                continue
            delivery, renew_at = self._ahead.popleft()
            now = self._home.time()
            if now >= renew_at:
                # It has waited here for so long that its consumer would have too little time left.
                try:
                    if not await self._member.extend(delivery):
                        continue
                except BaseException:
                    self._ahead.appendleft((delivery, renew_at))
                    raise
                if self._ended:
                    self._ahead.appendleft((delivery, renew_at))
                    continue
                now = self._home.time()
            message = Message(self, delivery)
            self._held[message] = now + self.ack_deadline
            return message

    def _count(self) -> int:
        return len(self._ahead) + len(self._held)

    def _hold(self, message: Message) -> None:
        # Added at the end, so that the messages stay in the order of their times.
        self._held.pop(message, None)
        self._held[message] = self._home.time() + self.ack_deadline

    def _drop(self, message: Message) -> None:
        if self._held.pop(message, None) is not None:
            self._room.send()

    async def _wait_for_room(self) -> None:
        while len(self._held) >= self._max_in_flight and not self._ended:
            message, until = next(iter(self._held.items()))
            await self._room.wait(self._home, until)
            # If it was neither settled nor extended by then, its lease has expired.
            if self._held.get(message) == until <= self._home.time():
                self._drop(message)
        if len(self._held) < self._max_in_flight:
            # Another task may wait for room, too.
            self._room.send()

    async def _fetch(self) -> None:
        """Fetch messages up to the number that may be held, unless the subscription is stopped."""
        room = self._max_in_flight - len(self._held)
        with CancelScope() as scope:
            self._scopes.add(scope)
            try:
                fetched = await self._member.fetch(min(room, BATCH))
                renew_at = self._home.time() + self.ack_deadline / 2
                self._ahead.extend((delivery, renew_at) for delivery in fetched)
            finally:
                self._scopes.discard(scope)

    def stop(self) -> None:
        """End the iteration for all tasks that wait in it. Held messages can still be settled."""
        self._ended = True
        self._room.send_all()
        for scope in self._scopes:
            scope.cancel()

    async def _give_back(self) -> None:
        while self._ahead:
            delivery, _ = self._ahead.popleft()
            await self._member.nack(delivery, 0.0, attempted=False)
        while self._held:
            message = next(iter(self._held))
            message._settled = "given back"
            del self._held[message]
            await self._member.nack(message._delivery, 0.0)

    async def _renew_leases(self) -> None:
        """Renew the leases of all held messages regularly, until cancelled."""
        while True:
            await sleep(self.ack_deadline / 3)
            await self.extend()

    async def extend(self) -> None:
        """Renew the leases of all held messages: the ack deadline starts again from now.

        A message that has been delivered again in the meantime is no longer held. That, and any failure to renew a
        lease, is logged.
        """
        for message in list(self._held):
            if message in self._held:
                try:
                    await message.extend()
                except LeaseLostError as error:
                    self._drop(message)
                    logger.warning("%s", error)
                except StorageError as error:
                    logger.warning("the lease of %r could not be renewed: %s", message, error)
