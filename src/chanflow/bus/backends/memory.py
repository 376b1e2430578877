"""Topics in the memory of one process."""

# Invariants, for each group:
# 1. A message that the group has not settled has one entry. It is ready, or leased or delayed (it has a time at which
#    it becomes ready), or blocked: an older message with the same key has an entry.
# 2. So of the entries with the same key, only the oldest is ever ready or leased.

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from itertools import count

from anyio import ClosedResourceError
from attrs import define, evolve

from chanflow._loop._home import Home, running_home
from chanflow._loop._signal import Signal
from chanflow.bus.backend import Backend, Capabilities, Content, Delivery, Member, Membership

__all__ = ["MemoryBackend"]

SPARE = 100
"""How many obsolete times may be stored, besides one for each entry."""


@define(eq=False)
class Stored:
    """A message in the log of a topic."""

    number: int
    content: Content
    published_at: float
    group: str | None
    """The only group that receives it; None for all groups."""


@define(eq=False)
class Entry:
    """The state of a message in one group."""

    stored: Stored
    attempt: int = 0
    due: float | None = None
    """The time at which it becomes ready, if it is leased or delayed."""
    receipt: object = None
    """The receipt of the last delivery."""


class GroupQueue:
    """The messages that a group has not settled yet."""

    def __init__(self) -> None:
        self.entries: dict[int, Entry] = {}
        self.news: Signal = Signal()
        self._ready: list[int] = []
        # Times and the entries that become ready then. A time is obsolete if its entry has a different one by now.
        self._times: list[tuple[float, int]] = []
        self._keys: dict[str, deque[int]] = {}

    def add(self, stored: Stored) -> None:
        """Add a message."""
        self.entries[stored.number] = Entry(stored)
        key = stored.content.key
        if key is not None:
            line = self._keys.setdefault(key, deque())
            line.append(stored.number)
            if len(line) > 1:
                return
        self._make_ready(stored.number)

    def take(self, max_items: int, lease: float, now: float) -> list[Delivery]:
        """Lease ready messages, the oldest first."""
        while self._times and self._times[0][0] <= now:
            due, number = heappop(self._times)
            entry = self.entries.get(number)
            if entry is not None and entry.due == due:
                entry.due = None
                heappush(self._ready, number)
        taken: list[Delivery] = []
        while self._ready and len(taken) < max_items:
            number = heappop(self._ready)
            # The entry is missing if the message was removed, or settled after its lease expired.
            entry = self.entries.get(number)
            if entry is not None and entry.due is None:
                entry.attempt += 1
                entry.receipt = object()
                self._set_due(entry, now + lease)
                taken.append(deliver(entry.stored, entry.attempt, entry.receipt))
        if taken:
            # Another member has to fetch the remaining messages, and wait until leases expire.
            self.news.send()
        return taken

    def next_time(self) -> float | None:
        """Return the time at which the next entry may become ready by itself, or None."""
        return self._times[0][0] if self._times else None

    def find(self, delivery: Delivery) -> Entry | None:
        """Return the entry of a delivery; None if the message was settled or delivered again."""
        entry = self.entries.get(int(delivery.id))
        return entry if entry is not None and entry.receipt is delivery.receipt else None

    def settle(self, number: int) -> None:
        """Remove a message, and make the next one with its key ready."""
        key = self.entries.pop(number).stored.content.key
        if key is not None:
            line = self._keys[key]
            oldest = line[0] == number
            line.remove(number)
            if not line:
                del self._keys[key]
            elif oldest:
                self._make_ready(line[0])

    def postpone(self, entry: Entry, due: float | None) -> None:
        """Make a message ready at the given time, or now."""
        if due is None:
            entry.due = None
            self._make_ready(entry.stored.number)
        else:
            self._set_due(entry, due)
            self.news.send()

    def _set_due(self, entry: Entry, due: float) -> None:
        entry.due = due
        if len(self._times) > 2 * len(self.entries) + SPARE:
            # Most belong to messages that were settled long before their leases would have expired.
            self._times = [(each.due, number) for number, each in self.entries.items() if each.due is not None]
            heapify(self._times)
        else:
            heappush(self._times, (due, entry.stored.number))

    def _make_ready(self, number: int) -> None:
        heappush(self._ready, number)
        self.news.send()


class Topic:
    """A topic: its messages, oldest first, and its groups.

    Args:
        retention: seconds to keep a message after every group has settled it.
        clock: returns the current time in seconds.
    """

    def __init__(self, retention: float, clock: Callable[[], float]) -> None:
        self._retention = retention
        self._clock = clock
        self.log: dict[int, Stored] = {}
        self.groups: dict[str, GroupQueue] = {}
        self.room: Signal = Signal()
        # Messages that every group has settled, each with the time at which it may be deleted.
        self._settled: deque[tuple[float, int]] = deque()

    def is_full(self, most: float) -> bool:
        """Return whether a group has this many unsettled messages; without groups, whether the topic has."""
        for group in self.groups.values():
            if len(group.entries) >= most:
                return True
        return not self.groups and len(self.log) >= most

    def add(self, stored: Stored) -> None:
        """Add a message, for all groups or for the one that it names."""
        self.log[stored.number] = stored
        for name, queue in self.groups.items():
            if stored.group in {None, name}:
                queue.add(stored)

    def settle(self, number: int, group: GroupQueue) -> None:
        """Settle a message for one group."""
        group.settle(number)
        self.room.send()
        self.discard_unneeded(number)

    def discard_unneeded(self, number: int) -> None:
        """Delete a message after the retention if no group needs it any more."""
        if not self.needs(number):
            if self._retention:
                self._settled.append((self._clock() + self._retention, number))
            else:
                del self.log[number]

    def forget(self) -> None:
        """Delete messages whose retention has ended."""
        while self._settled and self._settled[0][0] <= self._clock():
            _, number = self._settled.popleft()
            # A group that was created later may still need it.
            if not self.needs(number):
                self.log.pop(number, None)

    def needs(self, number: int) -> bool:
        """Return whether any group has not settled a message."""
        for group in self.groups.values():  # noqa: SIM110 -- runs for each message, and a generator is slower
            if number in group.entries:
                return True
        return False

    def remove(self, number: int) -> None:
        """Delete a message, even if it is leased."""
        del self.log[number]
        for group in self.groups.values():
            if number in group.entries:
                group.settle(number)
        self.room.send()


class MemoryBackend(Backend):
    """Topics in the memory of this process."""

    capabilities: Capabilities = Capabilities(durable=False, shared=False)
    queue_type: type[GroupQueue] = GroupQueue

    def __init__(self, *, max_pending: float, retention: float) -> None:
        self._max_pending = max_pending
        self._retention = retention
        self._topics: dict[str, Topic] = {}
        self._numbers = count(1)
        self._open = False
        self.home: Home

    async def open(self) -> None:
        self.home = running_home()
        self._open = True

    async def aclose(self) -> None:
        # The messages stay in this object, but waiting publishers must end.
        self._open = False
        for topic in self._topics.values():
            topic.room.send_all()

    def time(self) -> float:
        """Return the time of the current event loop, as the backend may be reopened in another one."""
        return self.home.time()

    def topic(self, name: str) -> Topic:
        """Return a topic, creating it on first use."""
        topic = self._topics.get(name)
        if topic is None:
            topic = self._topics[name] = Topic(self._retention, self.time)
        else:
            topic.forget()
        return topic

    def add(self, topic: Topic, content: Content, group: str | None = None) -> str:
        """Add a message for all groups of its topic, or for one; return its id."""
        number = next(self._numbers)
        topic.add(Stored(number, content, time.time(), group))
        return str(number)

    async def publish(self, content: Content) -> str:
        await self.home.operate()
        topic = self.topic(content.topic)
        if not topic.is_full(self._max_pending):
            return self.add(topic, content)
        while topic.is_full(self._max_pending):
            await topic.room.wait(self.home)
            if not self._open:
                msg = "the bus was closed while waiting for room"
                raise ClosedResourceError(msg)
        published = self.add(topic, content)
        if not topic.is_full(self._max_pending):
            topic.room.send()
        return published

    async def join(self, membership: Membership) -> Member:
        topic = self.topic(membership.topic)
        group = topic.groups.get(membership.group)
        if group is None:
            group = topic.groups[membership.group] = self.queue_type()
            for number, stored in list(topic.log.items()):
                if membership.from_start and stored.group is None:
                    group.add(stored)
                else:
                    topic.discard_unneeded(number)
        return MemoryMember(self, topic, group, membership)

    async def browse(self, topic: str, limit: int) -> list[Delivery]:
        stored = list(self.topic(topic).log.values())[:limit]
        return [deliver(each, 0, None) for each in stored]

    async def replay(self, topic: str, ids: Sequence[str] | None) -> int:
        source = self.topic(topic)
        replayed = 0
        for number in list(source.log) if ids is None else numbers(ids):
            stored = source.log.get(number)
            if stored is not None and stored.content.origin is not None:
                origin = stored.content.origin
                source.remove(number)
                target = self.topic(origin.topic)
                target.groups.setdefault(origin.group, self.queue_type())
                self.add(target, evolve(stored.content, topic=origin.topic, origin=None), origin.group)
                replayed += 1
        return replayed


def numbers(ids: Sequence[str]) -> Iterator[int]:
    """Yield the ids as numbers, ignoring those that this backend can't have returned."""
    for each in ids:
        if each.isdecimal():
            yield int(each)


def deliver(stored: Stored, attempt: int, receipt: object) -> Delivery:
    """Return a delivery of a message."""
    return Delivery(
        id=str(stored.number),
        content=stored.content,
        published_at=stored.published_at,
        attempt=attempt,
        receipt=receipt,
    )


class MemoryMember(Member):
    """A member of a group of the memory backend."""

    def __init__(self, backend: MemoryBackend, topic: Topic, group: GroupQueue, membership: Membership) -> None:
        self._backend = backend
        self._topic = topic
        self._group = group
        self._lease = membership.ack_deadline

    async def fetch(self, max_items: int) -> list[Delivery]:
        home, group = self._backend.home, self._group
        while not (taken := group.take(max_items, self._lease, home.time())):
            try:
                await group.news.wait(home, group.next_time())
            except BaseException:
                # Another member has to watch the time instead.
                group.news.send()
                raise
        return taken

    async def ack(self, delivery: Delivery) -> bool:
        entry = self._group.find(delivery)
        if entry is not None:
            self._topic.settle(entry.stored.number, self._group)
            self._topic.forget()
        return entry is not None

    async def nack(self, delivery: Delivery, delay: float, *, attempted: bool = True) -> bool:
        entry = self._group.find(delivery)
        if entry is not None:
            entry.receipt = None
            entry.attempt -= not attempted
            self._group.postpone(entry, self._backend.time() + delay if delay else None)
        return entry is not None

    async def extend(self, delivery: Delivery) -> bool:
        entry = self._group.find(delivery)
        if entry is not None:
            self._group.postpone(entry, self._backend.time() + self._lease)
        return entry is not None

    async def bury(self, delivery: Delivery, dead: Content) -> bool:
        buried = await self.ack(delivery)
        if buried:
            self._backend.add(self._backend.topic(dead.topic), dead)
        return buried
