"""The interface of a backend of the bus, and the data passed between the two.

The bus implements the rules that are the same for all backends: who may acknowledge a message, retries, dead letters
and the limits of a subscription. A backend stores the messages. It makes three promises, which the conformance suite
checks:

1. Once `publish` has returned, the message is kept until every group has acknowledged it or moved it to a dead-letter
   topic.
2. A fetched message is leased to one member of its group, until that member settles it, gives it back, or lets the
   lease expire. In the last two cases it can be fetched again, with the next attempt number.
3. Of the messages with the same key, only the oldest unsettled one can be fetched by a group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import define, field, frozen

__all__ = ["Backend", "Capabilities", "Content", "Delivery", "Member", "Membership", "Origin"]


@frozen(kw_only=True)
class Capabilities:
    """What a backend can do beyond the promises that all backends make."""

    durable: bool
    """Whether messages survive the end of the process."""
    shared: bool
    """Whether several processes can use the same topics."""


@frozen(kw_only=True)
class Origin:
    """The origin of a dead letter."""

    topic: str
    group: str
    id: str
    """The message's id in its original topic."""
    attempts: int
    """How often it was delivered to the group."""
    reason: str


# The next two are not frozen, because each message needs one of each, and creating a frozen one takes four times as
# long.


@define(kw_only=True)
class Content:
    """The content of a message. It must not be modified."""

    topic: str
    body: bytes
    key: str | None = None
    headers: Mapping[str, str] = field(factory=dict)
    origin: Origin | None = None
    """The origin, if the message is a dead letter."""


@define(kw_only=True)
class Delivery:
    """A message as returned by a backend. It must not be modified."""

    id: str
    """Unique within the topic."""
    content: Content
    published_at: float
    """Seconds since the epoch."""
    attempt: int
    """How often it has been delivered to the group, from 1; 0 if it was returned by `browse`."""
    receipt: Any
    """A value that distinguishes this delivery from others of the same message, for use by the backend only."""


@frozen(kw_only=True)
class Membership:
    """The parameters with which a member joins a group."""

    topic: str
    group: str
    from_start: bool
    """Whether a new group begins with the messages already in the topic, or only with those published from now on."""
    ack_deadline: float
    """Seconds that a lease lasts."""


class Member(ABC):
    """A member of a group. Messages that it has fetched and not settled are leased to it."""

    @abstractmethod
    async def fetch(self, max_items: int) -> list[Delivery]:
        """Lease messages, waiting for the first one.

        Args:
            max_items: the maximum number of messages, at least 1.

        Cancellation:
            A cancelled call leases no messages, or gives them back immediately.
        """

    @abstractmethod
    async def ack(self, delivery: Delivery) -> bool:
        """Acknowledge a message: it is settled for the group.

        Returns:
            False if the message was leased again in the meantime, so the delivery is no longer valid.
        """

    @abstractmethod
    async def nack(self, delivery: Delivery, delay: float, *, attempted: bool = True) -> bool:
        """Give a message back, to be fetched again after a delay.

        Args:
            delivery: the message.
            delay: seconds, at least 0.
            attempted: whether this delivery counts as an attempt.

        Returns:
            False as for `ack`.
        """

    @abstractmethod
    async def extend(self, delivery: Delivery) -> bool:
        """Renew the lease for `ack_deadline` seconds from now.

        Returns:
            False as for `ack`.
        """

    @abstractmethod
    async def bury(self, delivery: Delivery, dead: Content) -> bool:
        """Settle a message and publish its dead letter, in one atomic step.

        Returns:
            False as for `ack`; then no dead letter is published.
        """


class Backend(ABC):
    """A place that stores messages."""

    capabilities: Capabilities

    @abstractmethod
    async def open(self) -> None:
        """Open the storage; called before any other method.

        Raises:
            StorageError: the storage can't be used.
        """

    @abstractmethod
    async def publish(self, content: Content) -> str:
        """Store a message for every group of its topic, waiting while too many are unsettled.

        Returns:
            The message's id.

        Cancellation:
            The message may have been published.
        """

    @abstractmethod
    async def join(self, membership: Membership) -> Member:
        """Return a new member of a group, which is created if it doesn't exist."""

    @abstractmethod
    async def browse(self, topic: str, limit: int) -> list[Delivery]:
        """Return the oldest messages that the topic still has, without leasing them."""

    @abstractmethod
    async def replay(self, topic: str, ids: Sequence[str] | None) -> int:
        """Move dead letters back to their original topics, for the group that rejected them.

        Args:
            topic: the dead-letter topic.
            ids: the ids of the messages; None for all. Ids that don't exist are ignored.

        Returns:
            The number of messages moved.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close the storage, even if cancelled. Leases that are still held expire."""
