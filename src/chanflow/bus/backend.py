"""What a backend of the bus implements, and what passes between the two.

The bus keeps the rules that are the same everywhere: who may acknowledge what, retries, dead letters, the
limits of a subscription. A backend keeps the messages. It promises three things, which the conformance suite checks:

1. What `publish` returned for is kept until every group acknowledged it, or moved it to a dead-letter topic.
2. A message that was fetched is with one member of its group, until that one settles it, gives it back, or lets its
   lease run out. Then it is fetched again, with the next attempt number.
3. Of the messages with one key, a group has only the oldest at hand; the others come after it is settled.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from attrs import define, field, frozen

__all__ = ["Backend", "Capabilities", "Content", "Delivery", "Member", "Membership", "Origin"]


@frozen(kw_only=True)
class Capabilities:
    """What a backend can do beyond the promises that all keep."""

    durable: bool
    """Whether messages outlive the process."""
    shared: bool
    """Whether several processes can use the same topics."""


@frozen(kw_only=True)
class Origin:
    """Where a dead letter comes from."""

    topic: str
    group: str
    id: str
    """The message's id there."""
    attempts: int
    """How often it was delivered there."""
    reason: str


# To make a frozen one takes four times as long, and of these two there is one for each message.


@define(kw_only=True)
class Content:
    """What is published; it is not to be changed."""

    topic: str
    body: bytes
    key: str | None = None
    headers: Mapping[str, str] = field(factory=dict)
    origin: Origin | None = None
    """Where it comes from, if it is a dead letter."""


@define(kw_only=True)
class Delivery:
    """A message as a backend gives it out; it is not to be changed."""

    id: str
    """One of a kind within the topic."""
    content: Content
    published_at: float
    """Seconds since the epoch."""
    attempt: int
    """How often the group has been given it, from 1; 0 where it is only looked at."""
    receipt: Any
    """The backend's own: what tells this delivery from the others of the message."""


@frozen(kw_only=True)
class Membership:
    """How a member takes part in a group."""

    topic: str
    group: str
    from_start: bool
    """Whether a group that is new gets what is in the topic already, or only what comes from now on."""
    ack_deadline: float
    """Seconds that a lease lasts."""


class Member(ABC):
    """One member of a group. What it was given and has not settled is leased to it."""

    @abstractmethod
    async def fetch(self, max_items: int) -> list[Delivery]:
        """Lease messages, waiting for the first one.

        Args:
            max_items: the most to give, at least 1.

        Cancellation:
            A cancelled call leased nothing, or gives back at once what it did.
        """

    @abstractmethod
    async def ack(self, delivery: Delivery) -> bool:
        """Have done with a message; False if it was given to another member meanwhile."""

    @abstractmethod
    async def nack(self, delivery: Delivery, delay: float, *, attempted: bool = True) -> bool:
        """Give a message back, to be fetched again after so many seconds; False as for `ack`.

        Args:
            delivery: the message.
            delay: seconds, at least 0.
            attempted: whether this delivery counts as an attempt.
        """

    @abstractmethod
    async def extend(self, delivery: Delivery) -> bool:
        """Let the lease last for `ack_deadline` seconds from now; False as for `ack`."""

    @abstractmethod
    async def bury(self, delivery: Delivery, dead: Content) -> bool:
        """Have done with a message and publish its dead letter, in one step; False as for `ack`."""


class Backend(ABC):
    """Where the messages are."""

    capabilities: Capabilities

    @abstractmethod
    async def open(self) -> None:
        """Get ready.

        Raises:
            StorageError: the place can't be used.
        """

    @abstractmethod
    async def publish(self, content: Content) -> str:
        """Keep a message for every group of its topic, waiting while too many are unsettled, and give its id.

        Cancellation:
            The message may have been published nevertheless.
        """

    @abstractmethod
    async def join(self, membership: Membership) -> Member:
        """Become a member of a group, which is made if it is new."""

    @abstractmethod
    async def browse(self, topic: str, limit: int) -> list[Delivery]:
        """Look at the oldest messages that the topic still keeps, without leasing them."""

    @abstractmethod
    async def replay(self, topic: str, ids: Sequence[str] | None) -> int:
        """Move dead letters back to where they come from, for the group that gave up on them; count them.

        Args:
            topic: the dead-letter topic.
            ids: of the messages; those that are not there are passed over. None for all.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of everything, also when cancelled. Leases that are still held run out."""
