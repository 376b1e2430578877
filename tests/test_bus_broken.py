"""Backends that are broken on purpose, each in one way: the conformance suite finds every one out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from inspect import getmembers, isfunction
from pathlib import Path
from typing import Any

import pytest
from anyio import current_time, sleep
from attrs import evolve

from chanflow.bus import Bus, Content, Delivery, Member, Membership, connect
from chanflow.bus.backends.memory import Entry, GroupQueue, MemoryBackend, MemoryMember, Stored, Topic
from chanflow.bus.backends.sqlite import SqliteBackend
from chanflow.bus.conformance import BusConformance
from tests.support.virtual_time import passes

CONFORMANCE = [name for name, _ in getmembers(BusConformance, isfunction) if name.startswith("test_")]
BEYOND_ONE_PROCESS = {"test_another_connection_goes_on", "test_two_connections_share_a_group"}
# A virtual clock doesn't wait for threads.
IN_THREADS = "test_plain_functions_run_in_threads"
VIRTUAL = sorted({*CONFORMANCE} - BEYOND_ONE_PROCESS - {IN_THREADS})


class Loses(MemoryBackend):
    """Drops the fifth message."""

    published = 0

    async def publish(self, content: Content) -> str:
        self.published += 1
        return "0" if self.published == 5 else await super().publish(content)


class LosesTheSecond(MemoryBackend):
    published = 0

    async def publish(self, content: Content) -> str:
        self.published += 1
        return "0" if self.published == 2 else await super().publish(content)


class LosesTheFirst(MemoryBackend):
    published = 0

    async def publish(self, content: Content) -> str:
        self.published += 1
        return "0" if self.published == 1 else await super().publish(content)


class Doubles(MemoryMember):
    """Delivers once more what was acknowledged."""

    async def ack(self, delivery: Delivery) -> bool:
        entry = self._group.find(delivery)
        if entry is not None and entry.attempt == 1:
            return await self.nack(delivery, 0.0)
        return await super().ack(delivery)


class AcknowledgesEarly(MemoryMember):
    """Has done with a message as soon as it is fetched."""

    async def fetch(self, max_items: int) -> list[Delivery]:
        fetched = await super().fetch(max_items)
        for delivery in fetched:
            await self.ack(delivery)
        return fetched

    async def ack(self, delivery: Delivery) -> bool:
        await super().ack(delivery)
        return True


class NeverExpires(MemoryMember):
    """Its leases last for ever."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lease = math.inf


class NeverExtends(MemoryMember):
    """Says that it renewed a lease, and didn't."""

    async def extend(self, delivery: Delivery) -> bool:
        return True


class NoDelay(MemoryMember):
    """Delivers again at once."""

    async def nack(self, delivery: Delivery, delay: float, *, attempted: bool = True) -> bool:
        return await super().nack(delivery, 0.0, attempted=attempted)


class NeverAgain(MemoryMember):
    """Takes a message that is given back for settled."""

    async def nack(self, delivery: Delivery, delay: float, *, attempted: bool = True) -> bool:
        return await self.ack(delivery)


class CountsEverything(MemoryMember):
    """Counts what nobody saw as an attempt."""

    async def nack(self, delivery: Delivery, delay: float, *, attempted: bool = True) -> bool:
        return await super().nack(delivery, delay)


class CountsNothing(MemoryMember):
    """Every attempt is the first."""

    async def fetch(self, max_items: int) -> list[Delivery]:
        return [evolve(delivery, attempt=1) for delivery in await super().fetch(max_items)]


class BelievesEverybody(MemoryMember):
    """Lets a message be settled by whoever had it once."""

    async def ack(self, delivery: Delivery) -> bool:
        await super().ack(delivery)
        return True


class RefusesTheLate(MemoryMember):
    """Refuses what is late even if nobody else has the message."""

    async def ack(self, delivery: Delivery) -> bool:
        entry = self._group.find(delivery)
        late = entry is not None and entry.due is not None and entry.due < current_time()
        return not late and await super().ack(delivery)


class LosesTheDead(MemoryMember):
    """Has no dead letters."""

    async def bury(self, delivery: Delivery, dead: Content) -> bool:
        return await self.ack(delivery)


class WaitsForRoomForTheDead(MemoryMember):
    """Lets dead letters in only if there is room."""

    async def bury(self, delivery: Delivery, dead: Content) -> bool:
        await self._backend.publish(dead)
        return await self.ack(delivery)


class Hoards(MemoryMember):
    """Gives more than it is asked for."""

    async def fetch(self, max_items: int) -> list[Delivery]:
        return await super().fetch(1000)


class LeasesAndForgets(MemoryMember):
    """Leases something even if the fetch is cancelled."""

    async def fetch(self, max_items: int) -> list[Delivery]:
        fetched = await super().fetch(max_items)
        await sleep(0.005)
        return fetched


class ForgetsGroups(MemoryBackend):
    """Takes every group for a new one."""

    async def join(self, membership: Membership) -> Member:
        self.topic(membership.topic).groups.pop(membership.group, None)
        return await super().join(membership)


class OneGroup(MemoryBackend):
    """Takes all groups for one."""

    async def join(self, membership: Membership) -> Member:
        return await super().join(evolve(membership, group="group"))


class EachIsAGroup(MemoryBackend):
    """Gives everything to every member."""

    members = 0

    async def join(self, membership: Membership) -> Member:
        self.members += 1
        return await super().join(evolve(membership, group=f"{membership.group} {self.members}"))


class AlwaysFromTheStart(MemoryBackend):
    async def join(self, membership: Membership) -> Member:
        return await super().join(evolve(membership, from_start=True))


class NeverFromTheStart(MemoryBackend):
    async def join(self, membership: Membership) -> Member:
        return await super().join(evolve(membership, from_start=False))


class KeepsEverything(MemoryBackend):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "retention": math.inf})


class KeepsNothing(MemoryBackend):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "retention": 0.0})


class NoLimit(MemoryBackend):
    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "max_pending": math.inf})


class ClosesInSilence(MemoryBackend):
    """Does not end a publish that waits."""

    async def aclose(self) -> None:
        pass


class MixesTopics(MemoryBackend):
    """Doesn't tell upper from lower case."""

    async def publish(self, content: Content) -> str:
        return await super().publish(evolve(content, topic=content.topic.lower()))

    async def join(self, membership: Membership) -> Member:
        return await super().join(evolve(membership, topic=membership.topic.lower()))


class LosesHeaders(MemoryBackend):
    async def publish(self, content: Content) -> str:
        return await super().publish(evolve(content, headers={}))


class SameIds(MemoryBackend):
    async def publish(self, content: Content) -> str:
        await super().publish(content)
        return "1"


class ReplaysToAll(MemoryBackend):
    """Publishes what is replayed anew."""

    def add(self, topic: Topic, content: Content, group: str | None = None) -> str:
        return super().add(topic, content)


class NeverReplays(MemoryBackend):
    async def replay(self, topic: str, ids: Sequence[str] | None) -> int:
        return 0


class NoKeysQueue(GroupQueue):
    def add(self, stored: Stored) -> None:
        self.entries[stored.number] = Entry(stored)
        self._make_ready(stored.number)

    def settle(self, number: int) -> None:
        del self.entries[number]


class NoOrder(MemoryBackend):
    """Knows nothing of keys."""

    queue_type = NoKeysQueue


class OneKeyQueue(GroupQueue):
    def add(self, stored: Stored) -> None:
        super().add(evolve(stored, content=evolve(stored.content, key="key")))


class StrictOrder(MemoryBackend):
    """Takes all messages for one key's."""

    queue_type = OneKeyQueue


class MemberOf(MemoryBackend):
    """A backend with members of another kind."""

    member: type[MemoryMember]

    async def join(self, membership: Membership) -> Member:
        ours: Any = await super().join(membership)
        return self.member(self, ours._topic, ours._group, membership)


def broken() -> Iterator[type[MemoryBackend]]:
    """Give all of the above as backends."""
    for kind in MemoryBackend.__subclasses__():
        if kind.__module__ == __name__ and kind is not MemberOf:
            yield kind
    for member in MemoryMember.__subclasses__():
        if member.__module__ == __name__:
            yield type(member.__name__, (MemberOf,), {"member": member})


BROKEN = list(broken())


def conforms(name: str, open_bus: Callable[..., Bus], **how: Any) -> bool:
    """Run one conformance test."""
    return passes(getattr(BusConformance(), name)(open_bus), **how)


def opens(kind: Any) -> Callable[..., Bus]:
    """Make a bus on a backend of this kind."""
    return lambda **options: connect(kind(**{"max_pending": 10_000, "retention": 0.0, **options}))


@pytest.fixture(scope="module")
def verdicts() -> dict[str, set[str]]:
    """Give the tests that each broken backend fails."""
    kinds: list[type[MemoryBackend]] = [MemoryBackend, *BROKEN]
    return {kind.__name__: {name for name in VIRTUAL if not conforms(name, opens(kind))} for kind in kinds}


@pytest.mark.parametrize("kind", BROKEN, ids=lambda kind: kind.__name__)
def test_each_broken_backend_is_found_out(kind: type, verdicts: dict[str, set[str]]) -> None:
    """At least one conformance test fails on each of them, and none on the one that they are made of."""
    assert verdicts["MemoryBackend"] == set()
    assert verdicts[kind.__name__]


@pytest.mark.parametrize("name", VIRTUAL)
def test_each_conformance_test_finds_something(name: str, verdicts: dict[str, set[str]]) -> None:
    """No conformance test passes on all of the broken backends."""
    assert any(name in failed for failed in verdicts.values())


def test_a_handler_in_a_thread_that_gets_nothing_is_found_out() -> None:
    """The test with threads passes on a good backend, and not on one that loses its message."""
    assert conforms(IN_THREADS, opens(MemoryBackend), loop_factory=None)
    assert not conforms(IN_THREADS, opens(LosesTheFirst), loop_factory=None, seconds=0.5)


class Drowsy(SqliteBackend):
    """Two connections don't see that the other one has leased something."""

    async def join(self, membership: Membership) -> Member:
        return await super().join(evolve(membership, group=f"{membership.group} of {id(self)}"))


@pytest.mark.parametrize("name", sorted(BEYOND_ONE_PROCESS))
def test_what_goes_beyond_one_process_is_tested(name: str, tmp_path: Path) -> None:
    """A backend that forgets its file, or doesn't share its groups, is found out."""
    files = iter(range(100))
    new_file = lambda **_: connect(f"sqlite:///{tmp_path}/{next(files)}.db")  # noqa: E731 -- short
    own_groups = lambda **_: connect(Drowsy(tmp_path / "shared.db", max_pending=math.inf, retention=0.0))  # noqa: E731
    assert not conforms(
        name, new_file if name == "test_another_connection_goes_on" else own_groups, loop_factory=None, seconds=3.0
    )
    assert conforms(name, lambda **_: connect(f"sqlite:///{tmp_path}/good.db"), loop_factory=None)
