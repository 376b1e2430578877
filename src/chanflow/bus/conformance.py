"""The promises of the bus as tests for any backend: subclass `BusConformance` in a test module, and run pytest.

```python
class TestMine(BusConformance):
    @pytest.fixture
    def open_bus(self, tmp_path):
        return lambda **options: connect(MyBackend(tmp_path, **options))
```

They run on the event loops of the fixture `anyio_backend`. Their clock may be virtual if the backend's is anyio's.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from anyio import (
    CancelScope,
    ClosedResourceError,
    Event,
    create_task_group,
    current_time,
    fail_after,
    from_thread,
    move_on_after,
    sleep,
)

from chanflow._work._retry import Retry
from chanflow.bus._bus import Bus, DeadMessage
from chanflow.bus._subscription import LeaseLostError, Message, Subscription

__all__ = ["BusConformance"]

OpenBus = Callable[..., Bus]

PATIENCE = 20.0
"""Seconds to wait for something that must happen."""
MOMENT = 0.3
"""Seconds to wait for something that must not happen."""
QUICK = Retry(3, delay=0.01, jitter=0)


async def receive(subscription: Subscription) -> Message:
    """Receive the next message, which must arrive within `PATIENCE`."""
    with fail_after(PATIENCE):
        return await anext(subscription)


async def receive_bodies(subscription: Subscription, count: int) -> list[bytes]:
    """Receive and acknowledge a number of messages; return their bodies."""
    bodies = []
    for _ in range(count):
        message = await receive(subscription)
        await message.ack()
        bodies.append(message.body)
    return bodies


async def expect_nothing(subscription: Subscription) -> None:
    """Fail if a message arrives within `MOMENT`."""
    with move_on_after(MOMENT):
        message = await anext(subscription)
        pytest.fail(f"nothing should have come, but {message!r} did")


async def wait_until(condition: Callable[[], object]) -> None:
    """Wait until a condition is true, at most for `PATIENCE`."""
    with fail_after(PATIENCE):
        while not condition():
            await sleep(0.01)


async def wait_for_dead_letters(bus: Bus, topic: str, count: int) -> list[DeadMessage]:
    """Wait until a topic has a number of dead letters; return them."""
    with fail_after(PATIENCE):
        while len(dead := await bus.dead_letters(topic)) < count:
            await sleep(0.01)
    return dead


@asynccontextmanager
async def consuming(bus: Bus, topic: str, handler: Any, **options: Any) -> AsyncIterator[CancelScope]:
    """Consume in the background; leaving the block cancels it."""
    async with create_task_group() as tasks:

        async def consume() -> None:
            await bus.consume(topic, handler, **{"group": "group", "retry": QUICK, **options})

        tasks.start_soon(consume)
        yield tasks.cancel_scope
        tasks.cancel_scope.cancel()


def numbered(count: int) -> list[bytes]:
    """Return a number of different bodies."""
    return [b"%d" % number for number in range(count)]


async def publish_all(bus: Bus, topic: str, bodies: list[bytes], key: str | None = None) -> None:
    """Publish messages in order."""
    for body in bodies:
        await bus.publish(topic, body, key=key)


class BusConformance:
    """The tests that every backend has to pass."""

    pytestmark: pytest.MarkDecorator = pytest.mark.anyio

    ack_deadline: float = 0.5
    """Seconds. Short, but long enough for the backend to settle a message in time."""

    @pytest.fixture
    def open_bus(self) -> OpenBus:
        """Return a function that opens a bus, each time on the same storage, which is empty at first.

        It takes the options of `connect`.
        """
        raise NotImplementedError

    # Publishing and receiving

    async def test_body_key_and_headers_arrive_intact(self, open_bus: OpenBus) -> None:
        """Bodies, keys and headers are received as they were published, and in order."""
        bodies = [b"", bytes(range(256)), "grüße".encode(), b"x" * 1_000_000]
        async with open_bus() as bus:
            for number, body in enumerate(bodies):
                headers = {"number": str(number), "": "empty", "ключ": "значение\n"}
                await bus.publish("topic", body, key=f"key {number} ü", headers=headers)
            await bus.publish("topic", bytearray(b"plain"))
            async with bus.subscribe("topic", group="group") as messages:
                for number, body in enumerate(bodies):
                    message = await receive(messages)
                    assert (message.body, message.key) == (body, f"key {number} ü")
                    assert message.headers == {"number": str(number), "": "empty", "ключ": "значение\n"}
                    assert (message.topic, message.attempt) == ("topic", 1)
                    assert abs(message.published_at - time.time()) < 60
                    await message.ack()
                message = await receive(messages)
                assert (message.body, message.key, message.headers) == (b"plain", None, {})
                assert type(message.body) is bytes
                await message.ack()

    async def test_ids_are_unique_and_those_that_publish_gave(self, open_bus: OpenBus) -> None:
        """Concurrent publishing loses no message, and each has a unique id."""
        published: dict[str, bytes] = {}
        async with open_bus() as bus, bus.subscribe("topic", group="group") as messages:

            async def publish(body: bytes) -> None:
                published[await bus.publish("topic", body)] = body

            async with create_task_group() as tasks:
                for body in numbered(100):
                    tasks.start_soon(publish, body)
            assert len(published) == 100
            received = {}
            for _ in published:
                message = await receive(messages)
                received[message.id] = message.body
                await message.ack()
            assert received == published

    async def test_topics_are_apart(self, open_bus: OpenBus) -> None:
        """A message of one topic is never received from another, however similar their names."""
        topics = ["a", "A", "a.b", "a/b", "a b", "ä", "a%", "a*", "x" * 255]
        async with open_bus() as bus:
            for topic in topics:
                await bus.publish(topic, topic.encode())
            for topic in topics:
                async with bus.subscribe(topic, group="group") as messages:
                    assert await receive_bodies(messages, 1) == [topic.encode()]
                    await expect_nothing(messages)

    # Groups

    async def test_each_group_gets_everything(self, open_bus: OpenBus) -> None:
        """A message acknowledged by one group is still delivered to the others."""
        async with (
            open_bus() as bus,
            bus.subscribe("topic", group="first") as first,
            bus.subscribe("topic", group="second") as second,
        ):
            await publish_all(bus, "topic", numbered(20))
            assert await receive_bodies(first, 20) == numbered(20)
            assert await receive_bodies(second, 20) == numbered(20)
            await expect_nothing(first)
            await expect_nothing(second)

    async def test_members_of_a_group_share(self, open_bus: OpenBus) -> None:
        """Each message is delivered to one of several members: none is lost, none delivered twice."""
        received: Counter[bytes] = Counter()
        members: set[int] = set()
        async with open_bus() as bus:

            async def take_part(number: int) -> None:
                async with bus.subscribe("topic", group="group", max_in_flight=2) as messages:
                    async for message in messages:
                        received[message.body] += 1
                        members.add(number)
                        await sleep(0.001)
                        await message.ack()

            async with create_task_group() as tasks:
                for number in range(4):
                    tasks.start_soon(take_part, number)
                await publish_all(bus, "topic", numbered(100))
                await wait_until(lambda: len(received) == 100)
                await sleep(MOMENT)
                tasks.cancel_scope.cancel()
        assert received == Counter(numbered(100))
        assert members == {0, 1, 2, 3}

    async def test_new_group_reads_from_the_start_or_from_now(self, open_bus: OpenBus) -> None:
        """A new group gets the messages the topic has, or only new ones; an existing group continues where it was."""
        async with open_bus(retention=math.inf) as bus:
            await publish_all(bus, "topic", numbered(3))
            async with bus.subscribe("topic", group="start") as messages:
                assert await receive_bodies(messages, 2) == numbered(2)
            async with bus.subscribe("topic", group="now", from_start=False) as messages:
                await expect_nothing(messages)
                await bus.publish("topic", b"new")
                assert await receive_bodies(messages, 1) == [b"new"]
            # Neither group starts again from the beginning.
            async with bus.subscribe("topic", group="start", from_start=False) as messages:
                assert await receive_bodies(messages, 2) == [b"2", b"new"]
            async with bus.subscribe("topic", group="now", from_start=True) as messages:
                await expect_nothing(messages)
            async with bus.subscribe("topic", group="late") as messages:
                assert await receive_bodies(messages, 4) == [*numbered(3), b"new"]

    async def test_settled_messages_are_forgotten(self, open_bus: OpenBus) -> None:
        """Without retention, a group created later gets only messages that others have not settled."""
        async with open_bus() as bus:
            await publish_all(bus, "topic", numbered(3))
            async with bus.subscribe("topic", group="first") as messages:
                await receive_bodies(messages, 2)
            async with bus.subscribe("topic", group="second") as messages:
                assert await receive_bodies(messages, 1) == [b"2"]
                await expect_nothing(messages)

    async def test_messages_wait_for_the_first_group(self, open_bus: OpenBus) -> None:
        """Messages published before there is a group are not lost; a first group without `from_start` discards them."""
        async with open_bus() as bus:
            await publish_all(bus, "topic", numbered(3))
            async with bus.subscribe("topic", group="now", from_start=False) as messages:
                await expect_nothing(messages)
            async with bus.subscribe("topic", group="late") as messages:
                await expect_nothing(messages)

    # Delivered again

    async def test_nack_delivers_again(self, open_bus: OpenBus) -> None:
        """A message that was given back is delivered again after its delay, as the next attempt."""
        async with open_bus() as bus, bus.subscribe("topic", group="group") as messages:
            await bus.publish("topic", b"body", headers={"a": "b"})
            first = await receive(messages)
            await first.nack()
            second = await receive(messages)
            assert (second.id, second.attempt, second.headers) == (first.id, 2, {"a": "b"})
            started = current_time()
            await second.nack(delay=MOMENT)
            third = await receive(messages)
            assert (third.id, third.attempt) == (first.id, 3)
            assert current_time() - started >= MOMENT * 0.9
            await third.ack()
            await expect_nothing(messages)

    async def test_others_pass_a_delayed_message(self, open_bus: OpenBus) -> None:
        """A delayed message does not block messages without its key."""
        async with open_bus() as bus, bus.subscribe("topic", group="group") as messages:
            await publish_all(bus, "topic", numbered(2))
            await (await receive(messages)).nack(delay=MOMENT)
            assert await receive_bodies(messages, 2) == [b"1", b"0"]

    async def test_missed_deadline_delivers_again(self, open_bus: OpenBus) -> None:
        """A message that is not settled in time is delivered to another member; settling it late raises an error."""
        settle: list[Callable[[Message], Awaitable[None]]] = [
            lambda message: message.ack(),
            lambda message: message.nack(),
            lambda message: message.reject("late"),
            lambda message: message.extend(),
        ]
        async with open_bus() as bus:
            for call in settle:
                await bus.publish("topic", b"body")
                async with bus.subscribe("topic", group="group", ack_deadline=self.ack_deadline) as slow:
                    late = await receive(slow)
                    async with bus.subscribe("topic", group="group") as other:
                        again = await receive(other)
                        assert (again.id, again.attempt) == (late.id, 2)
                        with pytest.raises(LeaseLostError, match=f"message {late.id} of topic 'topic' was not settled"):
                            await call(late)
                        await again.ack()
                        await expect_nothing(other)
            assert await bus.dead_letters("topic.dead") == []

    async def test_late_settling_counts_while_nobody_else_has_it(self, open_bus: OpenBus) -> None:
        """After the deadline, a message can still be acknowledged unless it was delivered again."""
        async with open_bus() as bus:
            await bus.publish("topic", b"body")
            async with bus.subscribe("topic", group="group", ack_deadline=self.ack_deadline) as messages:
                message = await receive(messages)
                await sleep(self.ack_deadline * 1.5)
                await message.ack()
                await expect_nothing(messages)

    async def test_extending_keeps_a_message(self, open_bus: OpenBus) -> None:
        """A lease that is renewed in time does not expire."""
        async with open_bus() as bus:
            await bus.publish("topic", b"body")
            async with (
                bus.subscribe("topic", group="group", ack_deadline=self.ack_deadline) as slow,
                bus.subscribe("topic", group="group") as other,
            ):
                message = await receive(slow)
                for _ in range(4):
                    with move_on_after(self.ack_deadline / 2):
                        pytest.fail(f"{await anext(other)!r} was still held")
                    await message.extend()
                await message.ack()
                await expect_nothing(other)

    async def test_leaving_gives_back(self, open_bus: OpenBus) -> None:
        """Messages held by a consumer that leaves are delivered again; those it never saw don't count as attempts."""
        async with open_bus() as bus:
            await publish_all(bus, "topic", numbered(5))
            async with bus.subscribe("topic", group="group") as messages:
                await receive(messages)
            async with bus.subscribe("topic", group="group") as messages:
                attempts = []
                for _ in range(5):
                    message = await receive(messages)
                    attempts.append((message.body, message.attempt))
                    await message.ack()
            assert attempts == [(b"0", 2), (b"1", 1), (b"2", 1), (b"3", 1), (b"4", 1)]

    async def test_cancelled_receives_lose_nothing(self, open_bus: OpenBus) -> None:
        """However often waiting for a message is cancelled, each message is received once."""
        received: list[bytes] = []
        async with open_bus() as bus, bus.subscribe("topic", group="group", max_in_flight=1) as messages:

            async def publish() -> None:
                for body in numbered(30):
                    await bus.publish("topic", body)
                    await sleep(0.003)

            async with create_task_group() as tasks:
                tasks.start_soon(publish)
                with fail_after(PATIENCE):
                    while len(received) < 30:
                        message = None
                        with move_on_after(0.002):
                            message = await anext(messages)
                        if message is not None:
                            received.append(message.body)
                            await message.ack()
            # A message whose lease had to be given back may be delivered after a later one.
            assert sorted(received, key=int) == numbered(30)
            await expect_nothing(messages)

    # Order

    async def test_order_of_a_key(self, open_bus: OpenBus) -> None:
        """Messages with the same key are handled one after the other, in order, even if some are retried."""
        handled: dict[str, list[bytes]] = {"a": [], "b": [], "c": []}
        running: Counter[str] = Counter()

        async def handler(message: Message) -> None:
            assert message.key is not None
            running[message.key] += 1
            assert running[message.key] == 1
            await sleep(0.001)
            running[message.key] -= 1
            if int(message.body) % 4 == 1 and message.attempt == 1:
                msg = "come again"
                raise ValueError(msg)
            handled[message.key].append(message.body)

        async with open_bus() as bus:
            async with consuming(bus, "topic", handler, workers=4), consuming(bus, "topic", handler, workers=4):
                for body in numbered(12):
                    for key in handled:
                        await bus.publish("topic", body, key=key)
                await wait_until(lambda: all(len(bodies) == 12 for bodies in handled.values()))
            assert handled == dict.fromkeys(handled, numbered(12))

    async def test_a_key_waits_for_what_was_given_back(self, open_bus: OpenBus) -> None:
        """While the oldest message with a key is delayed or held, the later ones wait."""
        async with open_bus() as bus, bus.subscribe("topic", group="group") as messages:
            await publish_all(bus, "topic", numbered(3), key="key")
            first = await receive(messages)
            await expect_nothing(messages)
            await first.nack(delay=MOMENT)
            assert await receive_bodies(messages, 3) == numbered(3)

    # Limits

    async def test_max_in_flight(self, open_bus: OpenBus) -> None:
        """A consumer holds at most `max_in_flight` messages, and continues when it settles one."""
        async with open_bus() as bus, bus.subscribe("topic", group="group", max_in_flight=3) as messages:
            await publish_all(bus, "topic", numbered(5))
            held = [await receive(messages) for _ in range(3)]
            await expect_nothing(messages)
            await held[1].ack()
            held.append(await receive(messages))
            await expect_nothing(messages)
            await held[0].nack()
            assert (await receive(messages)).id == held[0].id

    async def test_what_was_lost_to_another_makes_room(self, open_bus: OpenBus) -> None:
        """A message whose lease ran out no longer counts as held."""
        async with open_bus() as bus:
            await bus.publish("topic", b"0")
            async with bus.subscribe(
                "topic", group="group", max_in_flight=1, ack_deadline=self.ack_deadline
            ) as forgetful:
                lost = await receive(forgetful)
                again = await receive(forgetful)
                assert (again.id, again.attempt) == (lost.id, 2)
                await again.ack()

    async def test_publish_waits_for_room(self, open_bus: OpenBus) -> None:
        """Publishing to a topic with `max_pending` unsettled messages waits until one is settled."""
        published: list[bytes] = []
        async with open_bus(max_pending=2) as bus:

            async def publish() -> None:
                for body in numbered(5):
                    await bus.publish("topic", body)
                    published.append(body)

            async with create_task_group() as tasks:
                tasks.start_soon(publish)
                await sleep(MOMENT)
                assert published == numbered(2)
                async with bus.subscribe("topic", group="group") as messages:
                    message = await receive(messages)
                    await sleep(MOMENT)
                    assert published == numbered(2)
                    await message.ack()
                    await wait_until(lambda: published == numbered(3))
                    await sleep(MOMENT)
                    assert published == numbered(3)
                    assert await receive_bodies(messages, 4) == numbered(5)[1:]
            # Another topic has its own room.
            await publish_all(bus, "other", numbered(2))

    async def test_closing_ends_a_publish_that_waits(self, open_bus: OpenBus) -> None:
        """A publish that waits for room when the bus is closed raises ClosedResourceError."""
        async with open_bus(max_pending=1) as bus:
            await bus.publish("topic", b"0")

            async def publish() -> None:
                with pytest.raises(ClosedResourceError):
                    await bus.publish("topic", b"1")

            async with create_task_group() as tasks:
                tasks.start_soon(publish)
                await sleep(MOMENT)
                await bus.aclose()

    # Handlers

    async def test_acknowledged_only_after_the_handler(self, open_bus: OpenBus) -> None:
        """A message whose handler was cancelled is delivered again; one whose handler returned is not."""
        started, finished = Event(), Event()

        async def endless(message: Message) -> None:
            if message.body == b"0":
                finished.set()
                return
            started.set()
            await sleep(math.inf)

        async with open_bus() as bus:
            await publish_all(bus, "topic", numbered(2))
            async with consuming(bus, "topic", endless):
                with fail_after(PATIENCE):
                    await started.wait()
                    await finished.wait()
                await sleep(MOMENT)
            async with bus.subscribe("topic", group="group") as messages:
                message = await receive(messages)
                assert (message.body, message.attempt) == (b"1", 2)
                await message.ack()
                await expect_nothing(messages)

    async def test_long_handlers_keep_their_message(self, open_bus: OpenBus) -> None:
        """While a handler runs, its message is not delivered again, however long that takes."""
        handled: list[int] = []
        started = Event()

        async def slow(message: Message) -> None:
            started.set()
            await sleep(self.ack_deadline * 3)
            handled.append(message.attempt)

        async with open_bus() as bus:
            await bus.publish("topic", b"body")
            async with consuming(bus, "topic", slow, ack_deadline=self.ack_deadline):
                await started.wait()
                async with bus.subscribe("topic", group="group") as other:
                    with move_on_after(self.ack_deadline * 4):
                        pytest.fail(f"{await anext(other)!r} was still handled")
            assert handled == [1]

    async def test_errors_are_retried_and_hold_up_nobody(self, open_bus: OpenBus) -> None:
        """A message that fails is attempted again; the others are handled in the meantime."""
        handled: list[tuple[bytes, int]] = []

        async def handler(message: Message) -> None:
            if message.body == b"1" and message.attempt < QUICK.attempts:
                msg = "not yet"
                raise ValueError(msg)
            handled.append((message.body, message.attempt))

        async with open_bus() as bus:
            await publish_all(bus, "topic", numbered(4))
            async with consuming(bus, "topic", handler, workers=1):
                await wait_until(lambda: len(handled) == 4)
            assert sorted(handled) == [(b"0", 1), (b"1", 3), (b"2", 1), (b"3", 1)]
            assert handled[-1] == (b"1", 3)
            assert await bus.dead_letters("topic.dead") == []

    async def test_plain_functions_run_in_threads(self, open_bus: OpenBus) -> None:
        """A sync handler is retried, and its messages are acknowledged, like those of an async one."""
        handled: list[tuple[bytes, int]] = []
        twice = Event()

        def handler(message: Message) -> None:
            handled.append((message.body, message.attempt))
            if message.attempt == 1:
                msg = "once more"
                raise ValueError(msg)
            from_thread.run_sync(twice.set)

        async with open_bus() as bus:
            await bus.publish("topic", b"body")
            async with consuming(bus, "topic", handler):
                # Without a time limit, which a virtual clock would reach while the thread runs.
                await twice.wait()
            assert handled == [(b"body", 1), (b"body", 2)]

    async def test_timeout_fails_an_attempt(self, open_bus: OpenBus) -> None:
        """A handler that exceeds the timeout is cancelled, and counts as failed."""

        async def endless(_message: Message) -> None:
            await sleep(math.inf)

        async with open_bus() as bus:
            await bus.publish("topic", b"body")
            async with consuming(bus, "topic", endless, timeout=0.05):
                [letter] = await wait_for_dead_letters(bus, "topic.dead", 1)
            assert (letter.reason, letter.attempts) == ("TimeoutError: the handler took longer than 0.05 s", 3)

    # Dead letters

    async def test_dead_letters_are_listed_and_replayed(self, open_bus: OpenBus) -> None:
        """Dead letters can be listed, and replayed to the group that rejected them alone, with key and headers."""
        broken = True

        async def handler(message: Message) -> None:
            if broken and message.body != b"2":
                msg = "broken"
                raise ValueError(msg)
            handled.append((message.body, message.attempt, message.key, dict(message.headers)))

        handled: list[Any] = []
        async with open_bus() as bus:
            # So that both groups exist from the start.
            async with bus.subscribe("topic", group="other") as other, bus.subscribe("topic", group="group"):
                for body in numbered(3):
                    await bus.publish("topic", body, key=f"key {body.decode()}", headers={"h": body.decode()})
                ids = {(await receive_one(other)).id for _ in range(3)}
                async with consuming(bus, "topic", handler, dead_letter="dead"):
                    dead = sorted(await wait_for_dead_letters(bus, "dead", 2), key=lambda letter: letter.body)
                    assert [(letter.body, letter.key, letter.headers) for letter in dead] == [
                        (b"0", "key 0", {"h": "0"}),
                        (b"1", "key 1", {"h": "1"}),
                    ]
                    for letter in dead:
                        assert (letter.topic, letter.group, letter.attempts) == ("topic", "group", 3)
                        assert letter.reason == "ValueError: broken"
                    assert len(await bus.dead_letters("dead", limit=1)) == 1
                    broken = False
                    assert await bus.replay("dead", ["no such id", dead[1].id, "999999"]) == 1
                    await wait_until(lambda: len(handled) == 2)
                    assert [letter.id for letter in await bus.dead_letters("dead")] == [dead[0].id]
                    assert await bus.replay("dead") == 1
                    await wait_until(lambda: len(handled) == 3)
                    assert await bus.dead_letters("dead") == []
                    assert await bus.replay("dead") == 0
                assert len(ids) == 3
                await expect_nothing(other)
            # A group created now doesn't get it either.
            async with bus.subscribe("topic", group="late") as late:
                await expect_nothing(late)
        assert handled == [(b"%d" % n, 1, f"key {n}", {"h": str(n)}) for n in (2, 1, 0)]

    async def test_rejected_messages_are_dead_at_once(self, open_bus: OpenBus) -> None:
        """A rejected message is not attempted again; its dead letter has the reason, and can be consumed, too."""
        async with open_bus() as bus, bus.subscribe("topic", group="group", dead_letter="dead") as messages:
            published = await bus.publish("topic", b"body", key="key")
            await (await receive(messages)).reject("for a reason")
            await expect_nothing(messages)
            [letter] = await bus.dead_letters("dead")
            assert (letter.reason, letter.topic, letter.group) == ("for a reason", "topic", "group")
            async with bus.subscribe("dead", group="undertaker") as dead:
                message = await receive(dead)
                assert (message.body, message.key, message.topic) == (b"body", "key", "dead")
                await message.ack()
            assert await bus.dead_letters("dead") == []
            assert published

    async def test_dead_letters_need_no_room(self, open_bus: OpenBus) -> None:
        """A full dead-letter topic still accepts dead letters."""
        async with open_bus(max_pending=1) as bus, bus.subscribe("topic", group="group") as messages:
            for _ in range(3):
                await bus.publish("topic", b"body")
                with fail_after(PATIENCE):
                    await (await receive(messages)).reject("reason")
            assert len(await bus.dead_letters("topic.dead")) == 3
            await bus.publish("topic", b"alive")
            assert await bus.dead_letters("topic") == []

    async def test_a_message_that_kills_its_consumers_becomes_a_dead_letter(self, open_bus: OpenBus) -> None:
        """Deliveries that ended without being settled count as attempts."""

        async def handler(_message: Message) -> None:
            pytest.fail("it has had its attempts")

        async with open_bus() as bus:
            await bus.publish("topic", b"body")
            for _ in range(QUICK.attempts):
                async with bus.subscribe("topic", group="group") as messages:
                    await receive(messages)
            async with consuming(bus, "topic", handler):
                [letter] = await wait_for_dead_letters(bus, "topic.dead", 1)
            assert letter.reason == "delivered 3 times, and never acknowledged"

    # Closing

    async def test_closing_while_busy_loses_nothing(self, open_bus: OpenBus) -> None:
        """Closing waits for running handlers; messages that they had not reached are still there afterwards."""
        handled: list[bytes] = []
        ended: list[str] = []

        async def handler(message: Message) -> None:
            await sleep(0.05)
            handled.append(message.body)

        bus = open_bus()
        async with bus:

            async def consume() -> None:
                await bus.consume("topic", handler, group="group", workers=3)
                ended.append("consume")

            async def iterate() -> None:
                async with bus.subscribe("other", group="group") as messages:
                    async for _ in messages:
                        pytest.fail("nothing was published there")
                ended.append("iteration")

            await publish_all(bus, "topic", numbered(20))
            async with create_task_group() as tasks:
                tasks.start_soon(consume)
                tasks.start_soon(iterate)
                await wait_until(lambda: len(handled) >= 3)
                with fail_after(PATIENCE):
                    await bus.aclose()
                assert sorted(ended) == ["consume", "iteration"]
            done = len(handled)
            assert done < 20
            await bus.aclose()
            for call in (
                lambda: bus.publish("topic", b""),
                lambda: bus.dead_letters("dead"),
                lambda: bus.replay("dead"),
                lambda: bus.consume("topic", handler, group="group"),
            ):
                with pytest.raises(ClosedResourceError):
                    await call()
        if bus.capabilities.durable:
            async with open_bus() as bus, bus.subscribe("topic", group="group") as messages:
                assert await receive_bodies(messages, 20 - done) == numbered(20)[done:]
                await expect_nothing(messages)

    # Durable and shared backends

    async def test_another_connection_goes_on(self, open_bus: OpenBus) -> None:
        """A durable backend has all messages after it was closed and opened again."""
        async with open_bus() as bus:
            if not bus.capabilities.durable:
                pytest.skip("this backend keeps nothing")
            await publish_all(bus, "topic", numbered(4), key="key")
            async with bus.subscribe("topic", group="group") as messages:
                assert await receive_bodies(messages, 1) == [b"0"]
                await (await receive(messages)).reject("reason")
                await (await receive(messages)).nack()
        async with open_bus() as bus, bus.subscribe("topic", group="group") as messages:
            message = await receive(messages)
            assert (message.body, message.key, message.attempt) == (b"2", "key", 2)
            await message.ack()
            assert await bus.replay("topic.dead") == 1
            assert await receive_bodies(messages, 2) == [b"3", b"1"]

    async def test_two_connections_share_a_group(self, open_bus: OpenBus) -> None:
        """A shared backend delivers each message to one member, on whichever connection."""
        received: Counter[bytes] = Counter()
        async with open_bus() as first:
            if not first.capabilities.shared:
                pytest.skip("this backend has one connection")

            async def take_part(bus: Bus) -> None:
                async with bus.subscribe("topic", group="group", max_in_flight=2) as messages:
                    async for message in messages:
                        received[message.body] += 1
                        await message.ack()

            async with open_bus() as second, create_task_group() as tasks:
                tasks.start_soon(take_part, first)
                tasks.start_soon(take_part, second)
                await publish_all(first, "topic", numbered(50)[:25])
                await publish_all(second, "topic", numbered(50)[25:])
                await wait_until(lambda: len(received) == 50)
                await sleep(MOMENT)
                tasks.cancel_scope.cancel()
        assert received == Counter(numbered(50))


async def receive_one(subscription: Subscription) -> Message:
    """Receive the next message, and acknowledge it."""
    message = await receive(subscription)
    await message.ack()
    return message
