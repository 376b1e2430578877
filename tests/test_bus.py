"""The bus beyond what every backend must do: arguments, errors, and what its own backends do when things go wrong."""

from __future__ import annotations

import asyncio
import logging
import math
import tracemalloc
from collections.abc import Callable
from functools import partial
from typing import Any

import anyio.lowlevel
import pytest
from anyio import (
    CancelScope,
    ClosedResourceError,
    Event,
    create_task_group,
    current_time,
    fail_after,
    move_on_after,
    sleep,
    wait_all_tasks_blocked,
)

from chanflow import Retry
from chanflow._check import show
from chanflow.bus import Bus, Delivery, LeaseLostError, Message, StorageError, connect
from chanflow.bus.backends.memory import MemoryBackend, MemoryMember
from tests.support.faulty_bus import Faulty, fail
from tests.support.messages import whole

pytestmark = pytest.mark.anyio


def memory(**options: Any) -> Bus:
    return connect("memory://", **options)


# Arguments


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"url": "redis"}, ValueError, "url must be memory:// or sqlite:///PATH, got 'redis'"),
        ({"url": "memory://name"}, ValueError, "url must be memory:// or sqlite:///PATH, got 'memory://name'"),
        ({"url": "sqlite://"}, ValueError, "url must be memory:// or sqlite:///PATH, got 'sqlite://'"),
        ({"url": "sqlite:///"}, ValueError, "url must be memory:// or sqlite:///PATH, got 'sqlite:///'"),
        ({"url": "sqlite://file.db"}, ValueError, "url must be memory:// or sqlite:///PATH, got 'sqlite://file.db'"),
        ({"url": 5}, TypeError, "url must be a str or a Backend, got a int"),
        ({"url": "memory://", "max_pending": 0}, ValueError, "max_pending must be >= 1, got 0"),
        ({"url": "memory://", "max_pending": 1.5}, TypeError, "max_pending must be an int or math.inf, got 1.5"),
        ({"url": "memory://", "retention": -1}, ValueError, "retention must be >= 0, got -1"),
        ({"url": "memory://", "retention": "1"}, TypeError, "retention must be a number, got '1'"),
    ],
)
def test_connect_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """A wrong URL or option is named."""
    with pytest.raises(error, match=whole(message)):
        connect(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"topic": ""}, ValueError, "topic must have 1 to 255 characters, got ''"),
        ({"topic": "x" * 256}, ValueError, f"topic must have 1 to 255 characters, got {show('x' * 256)}"),
        ({"topic": b"topic"}, TypeError, "topic must be a str, got b'topic'"),
        ({"body": "body"}, TypeError, "body must be bytes, got 'body'"),
        ({"body": 5}, TypeError, "body must be bytes, got 5"),
        ({"key": 5}, TypeError, "key must be a str or None, got 5"),
        ({"headers": {"a": 1}}, TypeError, "headers must be of str by str, got 'a': 1"),
        ({"headers": {1: "a"}}, TypeError, "headers must be of str by str, got 1: 'a'"),
        ({"topic": "\udcff"}, ValueError, "topic must be text that UTF-8 can encode, got '\\udcff'"),
        ({"key": "\udcff"}, ValueError, "key must be text that UTF-8 can encode, got '\\udcff'"),
        ({"headers": {"a": "\udcff"}}, ValueError, "headers must be text that UTF-8 can encode, got '\\udcff'"),
    ],
)
async def test_publish_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """What can't be published is named, and nothing is."""
    async with memory(max_pending=1) as bus:
        with pytest.raises(error, match=whole(message)):
            await bus.publish(**{"topic": "topic", "body": b"", **arguments})
        await bus.publish("topic", b"")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"topic": ""}, ValueError, "topic must have 1 to 255 characters, got ''"),
        ({"group": None}, TypeError, "group must be a str, got None"),
        ({"dead_letter": ""}, ValueError, "dead_letter must have 1 to 255 characters, got ''"),
        ({"max_in_flight": 0}, ValueError, "max_in_flight must be >= 1, got 0"),
        ({"ack_deadline": 0}, ValueError, "ack_deadline must be > 0, got 0"),
        ({"ack_deadline": "1"}, TypeError, "ack_deadline must be a number, got '1'"),
    ],
)
async def test_subscribe_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """A wrong argument is named before anything is subscribed to."""
    async with memory() as bus:
        with pytest.raises(error, match=whole(message)):
            bus.subscribe(**{"topic": "topic", "group": "group", **arguments})


async def nothing(message: Message) -> None:
    """Handle."""


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"handler": 5}, TypeError, "handler must be callable, got 5"),
        ({"workers": 0}, ValueError, "workers must be >= 1, got 0"),
        ({"retry": 3}, TypeError, "retry must be a Retry, got 3"),
        ({"timeout": 0}, ValueError, "timeout must be > 0, got 0"),
        ({"topic": ""}, ValueError, "topic must have 1 to 255 characters, got ''"),
    ],
)
async def test_consume_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """A wrong argument is named before anything is consumed."""
    async with memory() as bus:
        with pytest.raises(error, match=whole(message)):
            await bus.consume(**{"topic": "topic", "handler": nothing, "group": "group", **arguments})


async def test_only_inside_of_its_block() -> None:
    """A bus that was not entered, or is closed, says so."""
    bus = memory()
    message = whole("the bus is closed, or its block was not entered")
    for _ in range(2):
        with pytest.raises(ClosedResourceError, match=message):
            await bus.publish("topic", b"")
        with pytest.raises(ClosedResourceError, match=message):
            async with bus.subscribe("topic", group="group"):
                pass
        async with bus:
            pass


# Messages


async def test_a_message_is_settled_once() -> None:
    """Settling again is refused, and says how it was settled."""
    async with memory() as bus, bus.subscribe("topic", group="group") as messages:
        settle: list[tuple[Callable[[Message], Any], str]] = [
            (lambda message: message.ack(), "acknowledged"),
            (lambda message: message.reject("reason"), "rejected"),
            (lambda message: message.nack(math.inf), "given back"),
        ]
        for first, how in settle:
            await bus.publish("topic", b"")
            message = await anext(messages)
            assert not message.settled
            await first(message)
            assert message.settled
            again = whole(f"message {message.id} of topic 'topic' was {how} already")
            for second in *[call for call, _ in settle], lambda message: message.extend():
                with pytest.raises(RuntimeError, match=again):
                    await second(message)


async def test_a_negative_delay_is_refused() -> None:
    """It is named, and the message is still held."""
    async with memory() as bus, bus.subscribe("topic", group="group") as messages:
        await bus.publish("topic", b"")
        message = await anext(messages)
        with pytest.raises(ValueError, match=whole("delay must be >= 0, got -1")):
            await message.nack(-1)
        assert not message.settled
        assert repr(message) == f"<Message {message.id} of 'topic', attempt 1>"
        await message.ack()


async def test_a_lost_lease_is_told() -> None:
    """Whoever comes too late is told which message, and what the deadline was."""
    async with memory() as bus, bus.subscribe("topic", group="group", ack_deadline=2.0) as messages:
        await bus.publish("topic", b"")
        late = await anext(messages)
        again = await anext(messages)
        text = whole(f"message {late.id} of topic 'topic' was not settled within 2.0 s, and given to another")
        for call in late.extend, late.ack:
            with pytest.raises(LeaseLostError, match=text):
                await call()
        await again.ack()


async def test_messages_fetched_ahead_are_renewed_or_left_to_others() -> None:
    """A message that waits long for its consumer comes with a whole lease, unless another was given it meanwhile."""
    async with memory() as bus:
        for number in range(3):
            await bus.publish("topic", b"%d" % number)
        async with bus.subscribe("topic", group="group", ack_deadline=10.0) as messages:
            first = await anext(messages)
            await sleep(8.0)
            second = await anext(messages)
            assert second.body == b"1"
            await sleep(8.0)
            # The third is lost by now, and so is the first.
            async with bus.subscribe("topic", group="group") as others:
                taken = {(await anext(others)).body for _ in range(2)}
                assert taken == {b"0", b"2"}
                await second.ack()
                with CancelScope() as scope:
                    scope.deadline = -math.inf
                    await anext(messages)
                    pytest.fail("there is nothing left for this one")
            assert not first.settled


async def test_several_tasks_iterate_over_one_subscription() -> None:
    """Each message is with one of them, the bound holds for all, and all end with the bus."""
    handled: list[bytes] = []
    held = most = 0
    bus = memory()
    async with bus, create_task_group() as tasks:

        async def iterate(messages: Any) -> None:
            nonlocal held, most
            async for message in messages:
                held += 1
                most = max(most, held)
                await sleep(0.01)
                held -= 1
                handled.append(message.body)
                await message.ack()

        async def subscribe() -> None:
            async with bus.subscribe("topic", group="group", max_in_flight=3) as messages, create_task_group() as all_:
                for _ in range(5):
                    all_.start_soon(iterate, messages)

        tasks.start_soon(subscribe)
        for number in range(50):
            await bus.publish("topic", b"%d" % number)
        await sleep(10.0)
        assert sorted(map(int, handled)) == list(range(50))
        assert most == 3
        await bus.aclose()


# Handlers


async def test_failures_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Each failed attempt is in the log with its traceback, and the last one as an error."""

    async def handler(message: Message) -> None:
        msg = "broken"
        raise ValueError(msg)

    async with memory() as bus, create_task_group() as tasks:
        await bus.publish("topic", b"")
        tasks.start_soon(partial(bus.consume, "topic", handler, group="group", retry=Retry(2, delay=1.0, jitter=0)))
        await sleep(10.0)
        await bus.aclose()
    assert [(record.levelno, record.message) for record in caplog.records] == [
        (logging.WARNING, "<Message 1 of 'topic', attempt 1> failed, and comes again in 1 s"),
        (logging.ERROR, "<Message 1 of 'topic', attempt 2> failed, and becomes a dead letter"),
    ]
    assert all(record.exc_info is not None and record.exc_info[0] is ValueError for record in caplog.records)


async def test_an_error_in_the_retry_is_a_failure_too(caplog: pytest.LogCaptureFixture) -> None:
    """A function that should tell whether an error is worth a retry, and fails, ends the attempts."""

    async def handler(message: Message) -> None:
        raise KeyError(message.id)

    def on(error: Exception) -> bool:
        msg = "second"
        raise ValueError(msg)

    async with memory() as bus, create_task_group() as tasks:
        await bus.publish("topic", b"")
        tasks.start_soon(partial(bus.consume, "topic", handler, group="group", retry=Retry(5, on=on)))
        await sleep(10.0)
        [letter] = await bus.dead_letters("topic.dead")
        assert (letter.reason, letter.attempts) == ("ValueError: second", 1)
        await bus.aclose()
    assert "KeyError" in caplog.text


async def test_a_coroutine_that_nobody_awaits_is_a_failure() -> None:
    """A plain function that gives a coroutine has not handled anything; its message says so as a dead letter."""
    handler = lambda _message: anyio.lowlevel.checkpoint()  # noqa: E731 -- not an async function, that is the point
    async with memory() as bus, create_task_group() as tasks:
        await bus.publish("topic", b"")
        tasks.start_soon(partial(bus.consume, "topic", handler, group="group", retry=Retry(1)))
        while not (dead := await bus.dead_letters("topic.dead")):  # noqa: ASYNC110 -- a thread takes real time
            await sleep(0.01)
        [letter] = dead
        assert letter.reason.startswith("TypeError: the handler returned <coroutine object")
        assert letter.reason.endswith("which nobody awaits; make it an async function")
        await bus.aclose()


async def test_a_handler_may_settle_its_message(caplog: pytest.LogCaptureFixture) -> None:
    """What a handler settled is left alone, also if it fails after that."""

    async def handler(message: Message) -> None:
        if message.body == b"reject":
            await message.reject("of its own")
        elif message.attempt == 1:
            await message.nack(1.0)
        else:
            await message.ack()
            msg = "too late"
            raise ValueError(msg)

    async with memory() as bus, create_task_group() as tasks:
        await bus.publish("topic", b"reject")
        await bus.publish("topic", b"nack")
        tasks.start_soon(partial(bus.consume, "topic", handler, group="group"))
        await sleep(10.0)
        assert [letter.reason for letter in await bus.dead_letters("topic.dead")] == ["of its own"]
        await bus.aclose()
    assert [record.message for record in caplog.records] == [
        "the handler of <Message 2 of 'topic', attempt 2> failed after it had settled it"
    ]


async def test_a_handler_that_waits_for_what_somebody_cancelled(backend: str) -> None:
    """On asyncio it gets a cancellation from there, which nobody asked for: it is a failure like others."""
    if backend != "asyncio":
        pytest.skip("trio has no futures")

    async def handler(_message: Message) -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future

    async with memory() as bus:
        await bus.publish("topic", b"")
        async with create_task_group() as tasks:
            tasks.start_soon(partial(bus.consume, "topic", handler, group="group", retry=Retry(2, delay=0.1)))
            await sleep(1.0)
            [dead] = await bus.dead_letters("topic.dead")
            tasks.cancel_scope.cancel()
        text = "RuntimeError: the task awaited something that was cancelled, but was not cancelled itself"
        assert (dead.attempts, dead.reason) == (2, text)


async def test_a_handler_that_lost_its_message_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """When a handler has kept the event loop busy for too long, its message may be with another; that is told."""

    class Busy(MemoryBackend):
        async def join(self, membership: Any) -> Any:
            ours: Any = await super().join(membership)
            return BusyMember(self, ours._topic, ours._group, membership)

    class BusyMember(MemoryMember):
        async def extend(self, delivery: Delivery) -> bool:
            return False

    async def handler(message: Message) -> None:
        await sleep(20.0)

    async with connect(Busy(max_pending=math.inf, retention=0.0)) as bus, create_task_group() as tasks:
        await bus.publish("topic", b"")
        tasks.start_soon(partial(bus.consume, "topic", handler, group="group", ack_deadline=15.0))
        await sleep(10.0)
        await bus.aclose()
    assert "was not settled within 15.0 s, and given to another" in caplog.text


async def test_handled_too_late_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A handler whose message was given to another before it returned can't acknowledge it; the log tells."""

    async def pretend(_extend: Any, _delivery: Delivery) -> bool:
        return True

    async def handler(message: Message) -> None:
        await sleep(10.0)

    async with connect(Faulty(extend=pretend)) as bus, create_task_group() as tasks:
        await bus.publish("topic", b"")
        tasks.start_soon(partial(bus.consume, "topic", handler, group="group", workers=1, ack_deadline=3.0))
        await sleep(1.0)
        async with bus.subscribe("topic", group="group", ack_deadline=100.0) as other:
            await (await anext(other)).ack()
        await sleep(20.0)
        await bus.aclose()
    [record] = caplog.records
    assert record.message == (
        "<Message 1 of 'topic', attempt 1> was handled, but could not be settled:"
        " message 1 of topic 'topic' was not settled within 3.0 s, and given to another"
    )


async def test_an_error_of_the_backend_ends_consuming() -> None:
    """It is raised as it is, after the handlers that ran have ended."""
    ended: list[bytes] = []

    class Failing(MemoryBackend):
        async def join(self, membership: Any) -> Any:
            ours: Any = await super().join(membership)
            return FailingMember(self, ours._topic, ours._group, membership)

    class FailingMember(MemoryMember):
        fetches = 0

        async def fetch(self, max_items: int) -> list[Delivery]:
            self.fetches += 1
            if self.fetches == 2:
                msg = "the disk is gone"
                raise StorageError(msg)
            return await super().fetch(max_items)

    async def handler(message: Message) -> None:
        await sleep(1.0)
        ended.append(message.body)

    async with connect(Failing(max_pending=math.inf, retention=0.0)) as bus:
        await bus.publish("topic", b"body")
        with pytest.raises(StorageError, match=whole("the disk is gone")):
            await bus.consume("topic", handler, group="group")
    assert ended == [b"body"]


async def test_cancelling_consume_gives_back() -> None:
    """A cancelled consumer's messages are there at once for the next, with one attempt more."""

    async def endless(message: Message) -> None:
        await sleep(math.inf)

    async with memory() as bus:
        await bus.publish("topic", b"")
        async with create_task_group() as tasks:
            tasks.start_soon(partial(bus.consume, "topic", endless, group="group"))
            await wait_all_tasks_blocked()
            tasks.cancel_scope.cancel()
        async with bus.subscribe("topic", group="group") as messages:
            with fail_after(1.0):
                assert (await anext(messages)).attempt == 2


# What goes wrong in a backend


async def test_a_subscription_that_cannot_begin() -> None:
    """Its error is told, and the bus can be closed."""
    async with connect(Faulty(join=fail)) as bus:
        with pytest.raises(StorageError, match=whole("the disk is gone")):
            async with bus.subscribe("topic", group="group"):
                pass
        with fail_after(1.0):
            await bus.aclose()


async def test_what_cannot_be_given_back_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A backend that fails or hangs when a consumer leaves is in the log; leaving is not held up for long."""

    async def hang(*_arguments: Any, **_options: Any) -> None:
        await sleep(math.inf)

    for nack, told in (
        (fail, "1 message(s) of 'topic' could not be given back: the disk is gone"),
        (hang, "1 message(s) of 'topic' could not be given back in time"),
    ):
        caplog.clear()
        async with connect(Faulty(nack=nack)) as bus:
            for _ in range(2):
                await bus.publish("topic", b"")
            with fail_after(6.0):
                async with bus.subscribe("topic", group="group") as messages:
                    await anext(messages)
        assert [record.message for record in caplog.records] == [told]


async def test_a_message_is_settled_while_its_lease_is_renewed() -> None:
    """Renewing a lease that is not needed any more is no error."""
    held: list[bool] = []

    async def slow(extend: Any, delivery: Delivery) -> bool:
        await sleep(1.0)
        held.append(await extend(delivery))
        return held[-1]

    async with connect(Faulty(extend=slow)) as bus, bus.subscribe("topic", group="group") as messages:
        await bus.publish("topic", b"")
        message = await anext(messages)
        async with create_task_group() as tasks:
            tasks.start_soon(message.extend)
            await wait_all_tasks_blocked()
            await message.ack()
    assert held == [False]


@pytest.mark.parametrize("end", ["cancelled", "closed"])
async def test_a_message_fetched_ahead_is_given_back(end: str) -> None:
    """Whoever is cancelled or closed while a message fetched ahead is renewed leaves it for the next."""

    async def slow(extend: Any, delivery: Delivery) -> bool:
        extending.set()
        await sleep(1.0)
        return bool(await extend(delivery))

    extending = Event()
    bus = connect(Faulty(extend=slow))
    async with bus:
        for _ in range(2):
            await bus.publish("topic", b"")

        async def iterate(messages: Any) -> None:
            async for message in messages:
                pytest.fail(f"{message!r} should have been left")

        async with bus.subscribe("topic", group="group", ack_deadline=10.0) as messages:
            await (await anext(messages)).ack()
            await sleep(6.0)
            async with create_task_group() as tasks:
                tasks.start_soon(iterate, messages)
                await extending.wait()
                if end == "closed":
                    messages.stop()
                else:
                    tasks.cancel_scope.cancel()
        async with bus.subscribe("topic", group="group") as messages:
            assert (await anext(messages)).attempt == 1


async def test_leases_that_cannot_be_renewed_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """A backend that fails while a handler runs is in the log; what was settled meanwhile is left alone."""
    second = Event()

    async def slow_then_fail(_extend: Any, delivery: Delivery) -> bool:
        second.set()
        await sleep(1.0)
        return bool(await fail())

    async def handler(message: Message) -> None:
        await (sleep(15.0) if message.body == b"0" else second.wait())

    async with connect(Faulty(extend=slow_then_fail)) as bus, create_task_group() as tasks:
        for number in range(2):
            await bus.publish("topic", b"%d" % number)
        tasks.start_soon(partial(bus.consume, "topic", handler, group="group"))
        await sleep(20.0)
        await bus.aclose()
    assert {record.message for record in caplog.records} == {
        "the lease of <Message 1 of 'topic', attempt 1> could not be renewed: the disk is gone"
    }


async def test_all_that_is_held_is_extended(caplog: pytest.LogCaptureFixture) -> None:
    """Each message that is held has the whole deadline again; one that another was given is held no longer."""
    async with memory() as bus, bus.subscribe("topic", group="group", ack_deadline=10.0, max_in_flight=2) as messages:
        for number in range(3):
            await bus.publish("topic", b"%d" % number)
        lost = await anext(messages)
        await sleep(8.0)
        kept = await anext(messages)
        await sleep(4.0)
        async with bus.subscribe("topic", group="group") as others:
            assert (await anext(others)).body == b"0"
            for _ in range(3):
                await messages.extend()
                await sleep(8.0)
            with move_on_after(1.0):
                while (await anext(others)).body != b"1":
                    pass
                pytest.fail("it was extended")
            await kept.ack()
    text = f"message {lost.id} of topic 'topic' was not settled within 10.0 s, and given to another"
    assert [record.message for record in caplog.records] == [text]


# Memory


async def test_times_of_settled_messages_are_forgotten() -> None:
    """A lease that would have gone on for long takes no memory once its message is settled; others still end."""
    async with memory() as bus, bus.subscribe("topic", group="group", ack_deadline=100.0) as messages:
        await bus.publish("topic", b"held")
        await anext(messages)
        tracemalloc.start()
        try:
            for _ in range(5000):
                await bus.publish("topic", b"")
                await (await anext(messages)).ack()
            left, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert left < 100_000
        began = current_time()
        with fail_after(101.0):
            assert (await anext(messages)).body == b"held"
        assert current_time() - began == pytest.approx(100.0)


async def test_retention_ends_but_not_for_who_still_needs_it() -> None:
    """A settled message is forgotten after its time, unless a group that came meanwhile has not settled it."""
    async with memory(retention=10.0) as bus:
        async with bus.subscribe("topic", group="first") as first:
            for number in range(2):
                await bus.publish("topic", b"%d" % number)
                await (await anext(first)).ack()
        async with bus.subscribe("topic", group="second") as second:
            await (await anext(second)).ack()
            await sleep(11.0)
            async with bus.subscribe("topic", group="third") as third:
                assert (await anext(third)).body == b"1"
            assert (await anext(second)).body == b"1"


def test_one_event_loop_after_the_other() -> None:
    """A backend that is opened again goes by the clock of the event loop that runs then."""
    backend = MemoryBackend(max_pending=math.inf, retention=60.0)
    received: list[bytes] = []

    async def use(body: bytes) -> None:
        async with connect(backend) as bus:
            await bus.publish("topic", body)
            async with bus.subscribe("topic", group="group") as messages:
                with fail_after(10.0):
                    message = await anext(messages)
                received.append(message.body)
                await message.ack()

    anyio.run(use, b"on trio", backend="trio")
    anyio.run(use, b"on asyncio", backend="asyncio")
    assert received == [b"on trio", b"on asyncio"]


async def test_settled_late_after_it_was_ready_again() -> None:
    """A message whose lease ran out, and which was acknowledged before another was given it, comes to nobody."""
    async with memory() as bus:
        for number in range(2):
            await bus.publish("topic", b"%d" % number)
        async with bus.subscribe("topic", group="group", ack_deadline=10.0) as slow:
            await anext(slow)
            late = await anext(slow)
            await sleep(11.0)
            async with bus.subscribe("topic", group="group", max_in_flight=1) as other:
                again = await anext(other)
                assert again.body == b"0"
                await late.ack()
                await again.ack()
                with move_on_after(100.0):
                    pytest.fail(f"{await anext(other)!r} was settled")


async def test_replaying_what_somebody_holds() -> None:
    """A dead letter that is replayed is taken from whoever consumes the dead letters; its key goes on."""
    async with memory() as bus, bus.subscribe("topic", group="group", dead_letter="dead") as messages:
        for number in range(3):
            await bus.publish("topic", b"%d" % number, key="key")
            await (await anext(messages)).reject("reason")
        async with bus.subscribe("dead", group="undertaker") as dead, bus.subscribe("dead", group="other") as other:
            held = await anext(dead)
            await (await anext(other)).ack()
            letters = await bus.dead_letters("dead")
            assert await bus.replay("dead", [letters[1].id, letters[0].id]) == 2
            with pytest.raises(LeaseLostError):
                await held.ack()
            assert (await anext(dead)).body == b"2"
            for body in (b"1", b"0"):
                message = await anext(messages)
                assert message.body == body
                await message.ack()


@pytest.mark.parametrize("operation", ["publish", "fetch"])
async def test_whoever_never_waits_lets_others_run(operation: str) -> None:
    """A loop over what is there at once does not keep the event loop to itself, and can be cancelled."""
    async with memory() as bus:
        if operation == "fetch":
            for _ in range(5000):
                await bus.publish("topic", b"")
        taken = 0

        async def publish() -> None:
            nonlocal taken
            while True:
                await bus.publish("topic", b"")
                taken += 1

        async def fetch() -> None:
            nonlocal taken
            async with bus.subscribe("topic", group="group") as messages:
                async for message in messages:
                    await message.ack()
                    taken += 1

        async with create_task_group() as tasks:
            tasks.start_soon({"publish": publish, "fetch": fetch}[operation])
            for _ in range(5):
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
        assert 0 < taken < 5000


async def test_what_a_bus_and_a_subscription_look_like() -> None:
    """They say where they stand; a subscription that was not entered says what is missing."""
    bus = connect("memory://")
    assert repr(bus) == "<Bus on MemoryBackend: not open>"
    async with bus:
        await bus.publish("topic", b"")
        subscription = bus.subscribe("topic", group="group", from_start=True)
        assert repr(subscription) == "<Subscription of group 'group' to 'topic': not entered>"
        message = "the subscription was not entered; iterate inside of `async with bus.subscribe(...) as messages:`"
        with pytest.raises(RuntimeError, match=whole(message)):
            async for _ in subscription:
                pass
        async with subscription as messages:
            assert repr(bus) == "<Bus on MemoryBackend: 1 subscription(s)>"
            async for _ in messages:
                assert repr(messages) == "<Subscription of group 'group' to 'topic': 1 held>"
                break
        assert repr(messages) == "<Subscription of group 'group' to 'topic': ended>"
