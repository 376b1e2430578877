"""Channels: each operation ready, blocked, closed before and during, over every kind of capacity."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import sys
import warnings
from collections import deque
from types import SimpleNamespace
from typing import Any

import anyio
import pytest
from anyio import (
    BrokenResourceError,
    ClosedResourceError,
    EndOfStream,
    WouldBlock,
    create_memory_object_stream,
    wait_all_tasks_blocked,
)
from anyio.abc import ObjectReceiveStream, ObjectSendStream
from anyio.streams.memory import MemoryObjectStreamStatistics

from chanflow import Channel, ChannelStatistics
from chanflow._channel._state import PublicBuffer, reach_buffer
from tests.support.channels import assert_at_rest

pytestmark = pytest.mark.anyio


async def count_up(channel: Channel[int], count: int) -> None:
    for item in range(count):
        await channel.send(item)
    channel.close()


async def test_items_come_out_in_order(capacity: float) -> None:
    """Iteration gives every item in the order of sending, and ends when the channel is closed and drained."""
    channel = Channel[int](capacity)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count_up, channel, 1000)
        assert [item async for item in channel] == list(range(1000))
    assert_at_rest(channel)
    assert channel.statistics()[:4] == (0, capacity, 0, 1)


async def test_capacity_is_what_is_accepted_without_a_receiver(capacity: float) -> None:
    """Exactly so many items go in at once."""
    channel = Channel[int](capacity)
    most = 100 if capacity == math.inf else int(capacity)
    for item in range(most):
        channel.send_nowait(item)
    assert len(channel) == most
    if capacity != math.inf:
        with pytest.raises(WouldBlock):
            channel.send_nowait(0)
    assert channel.drain() == list(range(most))
    assert_at_rest(channel)


async def test_waiters_are_served_in_order(capacity: float) -> None:
    """Receivers and senders are woken in the order in which they came."""
    channel = Channel[int](capacity)
    served: list[tuple[int, int]] = []

    async def receive(number: int) -> None:
        served.append((number, await channel.receive()))

    async with anyio.create_task_group() as tasks:
        for number in range(5):
            tasks.start_soon(receive, number)
            await wait_all_tasks_blocked()
        # In one tick, in which trio may run them in another order.
        for item in range(5):
            channel.send_nowait(item)
    assert sorted(served) == [(number, number) for number in range(5)]

    async with anyio.create_task_group() as tasks:
        for item in range(15):
            tasks.start_soon(channel.send, item)
            await wait_all_tasks_blocked()
        assert [await channel.receive() for _ in range(15)] == list(range(15))
    assert_at_rest(channel)


async def test_a_newcomer_does_not_overtake_a_woken_receiver() -> None:
    """What a receiver was woken for is not for one that comes in the same tick."""
    channel = Channel[int]()
    async with anyio.create_task_group() as tasks:
        received: list[int] = []

        async def receive() -> None:
            received.append(await channel.receive())

        tasks.start_soon(receive)
        await wait_all_tasks_blocked()
        channel.send_nowait(1)
        assert len(channel) == 0
        with pytest.raises(WouldBlock):
            channel.receive_nowait()
    assert received == [1]
    assert_at_rest(channel)


async def test_a_newcomer_does_not_overtake_a_parked_sender() -> None:
    """The room that a receiver makes belongs to the sender that waits."""
    channel = Channel[int](1)
    channel.send_nowait(1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.send, 2)
        await wait_all_tasks_blocked()
        assert channel.receive_nowait() == 1
        with pytest.raises(WouldBlock):
            channel.send_nowait(3)
    assert channel.drain() == [2]


async def test_close_while_receiving(capacity: float) -> None:
    """Closing ends all that wait to receive, with EndOfStream, and then those who come later."""
    channel = Channel[int](capacity, name="jobs")

    async def receive() -> None:
        with pytest.raises(EndOfStream, match=r"^channel 'jobs' is closed and drained$"):
            await channel.receive()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(receive)
        tasks.start_soon(receive)
        await wait_all_tasks_blocked()
        channel.close()
    await receive()
    with pytest.raises(EndOfStream, match=r"^channel 'jobs' is closed and drained$"):
        channel.receive_nowait()
    assert channel.closed
    assert_at_rest(channel)


async def test_close_while_sending() -> None:
    """Closing refuses those that wait to send, and those who come later; what is inside is still received."""
    channel = Channel[int](1, name="jobs")
    channel.send_nowait(1)

    async def send() -> None:
        with pytest.raises(ClosedResourceError, match=r"^channel 'jobs' is closed$"):
            await channel.send(2)
        with pytest.raises(ClosedResourceError, match=r"^channel 'jobs' is closed$"):
            await channel.send_many([2])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        await wait_all_tasks_blocked()
        channel.close()
        channel.close()
    with pytest.raises(ClosedResourceError, match=r"^channel 'jobs' is closed$"):
        channel.send_nowait(2)
    assert await channel.receive() == 1
    assert [item async for item in channel] == []
    assert_at_rest(channel)


async def test_batch_sender_while_closed() -> None:
    """A batch that is refused half way keeps what was not delivered in its deque."""
    channel = Channel[int](2)
    items = deque(range(5))

    async def send() -> None:
        with pytest.raises(ClosedResourceError):
            await channel.send_many(items)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        await wait_all_tasks_blocked()
        channel.close()
    assert list(items) == [2, 3, 4]
    assert channel.drain() == [0, 1]


async def test_batches_keep_order(capacity: float) -> None:
    """Batches of any size arrive whole and in order, whatever their number of waits."""
    channel = Channel[int](capacity)
    received: list[int] = []

    async def send() -> None:
        await channel.send_many(range(57))
        await channel.send_many([])
        await channel.send_many(iter(range(57, 100)))
        channel.close()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        while len(received) < 100:
            batch = await channel.receive_many(7)
            assert 1 <= len(batch) <= 7
            received += batch
    with pytest.raises(EndOfStream):
        await channel.receive_many(7)
    assert received == list(range(100))
    assert_at_rest(channel)


async def test_receive_many_takes_what_is_there() -> None:
    """Without a wait it takes what is there, with the items of parked senders, and no more than asked for."""
    channel = Channel[int](2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.send_many, range(5))
        await wait_all_tasks_blocked()
        assert await channel.receive_many(4) == [0, 1, 2]
        await wait_all_tasks_blocked()
        assert await channel.receive_many(1) == [3]
    assert await channel.receive_many(4) == [4]


async def test_receive_many_collects_for_a_while() -> None:
    """With `max_wait` a batch is complete when it is full, or so long after its first item."""
    channel = Channel[int](10)

    async def produce() -> None:
        for item in range(8):
            await anyio.sleep(1)
            await channel.send(item)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(produce)
        start = anyio.current_time()
        assert await channel.receive_many(3, max_wait=10) == [0, 1, 2]
        assert anyio.current_time() - start == pytest.approx(3)
        assert await channel.receive_many(3, max_wait=1.5) == [3, 4]
        assert anyio.current_time() - start == pytest.approx(5.5)
        assert await channel.receive_many(3, max_wait=0) == [5]
        await wait_all_tasks_blocked()
        channel_len_while_collecting = len(channel)
        assert channel_len_while_collecting == 0
        await anyio.sleep(5)
    assert channel.drain() == [6, 7]
    assert_at_rest(channel)


async def test_collecting_ends_with_the_channel() -> None:
    """A channel that is closed while a batch is collected gives what there is, then EndOfStream."""
    channel = Channel[int](10)
    channel.send_nowait(1)
    async with anyio.create_task_group() as tasks:

        async def close() -> None:
            await wait_all_tasks_blocked()
            channel.close()

        tasks.start_soon(close)
        assert await channel.receive_many(5, max_wait=60) == [1]
    with pytest.raises(EndOfStream):
        await channel.receive_many(5, max_wait=60)
    channel = Channel[int](10)
    await channel.send_many([1, 2])
    channel.close()
    assert await channel.receive_many(5, max_wait=60) == [1, 2]
    assert_at_rest(channel)


async def test_what_is_collected_still_makes_room() -> None:
    """A batch that is being collected holds more than the capacity, so that it can become full."""
    channel = Channel[int](1)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.send_many, range(5))
        assert await channel.receive_many(5, max_wait=60) == [0, 1, 2, 3, 4]


async def test_overflow_drop_newest() -> None:
    """The item that finds no room is dropped, and counted."""
    channel = Channel[int](2, overflow="drop_newest")
    for item in range(5):
        await channel.send(item)
    await channel.send_many([5, 6])
    assert channel.drain() == [0, 1]
    assert channel.statistics()[-3:] == (7, 2, 5)
    assert_at_rest(channel)


async def test_overflow_drop_newest_without_a_buffer() -> None:
    """With capacity 0, an item is dropped unless a receiver waits."""
    channel = Channel[int](overflow="drop_newest")
    channel.send_nowait(1)
    async with anyio.create_task_group() as tasks:

        async def receive() -> None:
            assert await channel.receive() == 2

        tasks.start_soon(receive)
        await wait_all_tasks_blocked()
        channel.send_nowait(2)
    assert channel.statistics().dropped == 1


async def test_overflow_drop_oldest() -> None:
    """The item that waited for longest makes room, and is counted."""
    channel = Channel[int](2, overflow="drop_oldest")
    for item in range(5):
        await channel.send(item)
    await channel.send_many([5, 6])
    channel.send_nowait(7)
    assert channel.drain() == [6, 7]
    assert channel.statistics()[-3:] == (8, 2, 6)
    channel.close()
    with pytest.raises(ClosedResourceError):
        await channel.send(8)


async def test_drain_makes_room_for_senders() -> None:
    """Draining takes what is buffered, and the senders that wait move up."""
    channel = Channel[int](2)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.send_many, range(4))
        await wait_all_tasks_blocked()
        assert channel.drain() == [0, 1]
    assert channel.drain() == [2, 3]
    assert channel.drain() == []


async def test_last_receiver_leaves(caplog: pytest.LogCaptureFixture) -> None:
    """Senders get BrokenResourceError, before and while waiting; what is left is told, and can be drained."""
    channel = Channel[int](1, name="jobs")
    channel.send_nowait(1)
    receiver = channel.receiver
    clone = receiver.clone()

    async def send() -> None:
        with pytest.raises(BrokenResourceError, match=r"^channel 'jobs' has no receiver left$"):
            await channel.send(2)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(send)
        await wait_all_tasks_blocked()
        receiver.close()
        await wait_all_tasks_blocked()
        assert channel.statistics().tasks_waiting_send == 1
        with caplog.at_level(logging.WARNING, "chanflow"):
            clone.close()
    assert caplog.messages == ["channel 'jobs' was closed by its last receiver with 1 unread item(s)"]
    await send()
    with pytest.raises(BrokenResourceError):
        channel.send_nowait(2)
    assert channel.drain() == [1]
    with pytest.raises(ClosedResourceError, match=r"^channel 'jobs' is closed$"):
        channel.receive_nowait()
    assert_at_rest(channel)


async def test_receiver_that_leaves_while_others_wait() -> None:
    """Closing an end ends only what waits on that end."""
    channel = Channel[int](name="jobs")
    with channel.receiver as receiver, receiver.clone() as clone:

        async def refused() -> None:
            with pytest.raises(ClosedResourceError, match=r"^channel 'jobs' is closed$"):
                await clone.receive()

        async def served() -> None:
            assert await receiver.receive() == 1

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(refused)
            await wait_all_tasks_blocked()
            tasks.start_soon(served)
            await wait_all_tasks_blocked()
            clone.close()
            await wait_all_tasks_blocked()
            channel.send_nowait(1)
        with pytest.raises(ClosedResourceError, match=r"^this end of channel 'jobs' is closed$"):
            await clone.receive()
        with pytest.raises(ClosedResourceError, match=r"^this end of channel 'jobs' is closed$"):
            clone.receive_nowait()
        with pytest.raises(ClosedResourceError):
            await clone.receive_many(2)
        with pytest.raises(ClosedResourceError):
            clone.clone()
        assert clone.statistics().open_receive_streams == 1
    assert_at_rest(channel)


async def test_last_sender_clone_closes_the_channel() -> None:
    """Only when every clone is closed do receivers see the end."""
    channel = Channel[int](5)
    sender = channel.sender
    clone = sender.clone()
    assert channel.statistics().open_send_streams == 2
    await sender.send(1)
    async with sender:
        pass
    await sender.aclose()
    with pytest.raises(ClosedResourceError, match=r"^this end of channel at 0x[0-9a-f]+ is closed$"):
        await sender.send(2)
    with pytest.raises(ClosedResourceError):
        sender.send_nowait(2)
    with pytest.raises(ClosedResourceError):
        await sender.send_many([2])
    await clone.send_many([2, 3])
    assert not channel.closed
    with clone:
        clone.send_nowait(4)
    assert channel.closed
    assert [item async for item in channel] == [1, 2, 3, 4]


async def test_sender_that_leaves_while_it_waits() -> None:
    """Closing a sending end refuses what waits on it, and leaves the others waiting."""
    channel = Channel[int]()
    with channel.sender as sender, sender.clone() as clone:

        async def refused() -> None:
            with pytest.raises(ClosedResourceError):
                await clone.send(1)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(refused)
            tasks.start_soon(sender.send, 2)
            await wait_all_tasks_blocked()
            clone.close()
            await wait_all_tasks_blocked()
            assert await channel.receive() == 2
    assert_at_rest(channel)


async def test_close_wins_over_open_senders() -> None:
    """Closing the channel closes it for all ends; their own closing then does nothing."""
    channel = Channel[int](1)
    sender = channel.sender
    clone = sender.clone()
    async with channel:
        channel.send_nowait(1)
    assert channel.statistics().open_send_streams == 0
    with pytest.raises(ClosedResourceError):
        clone.send_nowait(1)
    sender.close()
    clone.close()
    late = sender = channel.sender
    assert late.statistics().open_send_streams == 0
    assert channel.drain() == [1]


async def test_end_closed_during_a_checkpoint() -> None:
    """An end that is closed while an operation yields to the loop refuses it, and nothing is sent or taken."""
    channel = Channel[int](10)
    await channel.send_many([1, 2])
    with channel.sender as sender, channel.receiver as receiver:
        for operation in (
            lambda end: end.send(1),
            lambda end: end.send_many([1]),
            lambda end: end.receive(),
            lambda end: end.receive_many(2),
        ):
            end: Any = sender.clone() if operation.__code__.co_names[0].startswith("send") else receiver.clone()

            async def refused(end: Any = end, operation: Any = operation) -> None:
                channel._state.home.renew(0)
                with pytest.raises(ClosedResourceError):
                    await operation(end)

            async with anyio.create_task_group() as tasks:
                # Someone has waited before, so that the channel has its home.
                with anyio.move_on_after(0):
                    await Channel[int]().receive()
                home = channel._state.enter()
                channel._state.home = home
                tasks.start_soon(refused)
                tasks.start_soon(end.aclose)
    assert channel.drain() == [1, 2]


async def test_ends_are_anyio_streams() -> None:
    """Code for anyio's memory object streams takes a channel and its ends."""
    channel = Channel[int](3)
    assert isinstance(channel.sender, ObjectSendStream)
    assert isinstance(channel.receiver, ObjectReceiveStream)
    assert isinstance(channel, ObjectSendStream)
    assert isinstance(channel, ObjectReceiveStream)
    assert channel.sender is channel.sender
    assert channel.receiver is channel.receiver
    anyio_names = MemoryObjectStreamStatistics._fields
    assert ChannelStatistics._fields[: len(anyio_names)] == anyio_names

    async with channel.sender as sender, channel.receiver as receiver:
        async with sender.clone() as other, receiver.clone() as another:
            await other.send(1)
            assert await another.receive() == 1
        await sender.send_many([1, 2, 3])
        assert await receiver.receive_many(5) == [1, 2, 3]
        assert receiver.capacity == 3
    await channel.aclose()


@pytest.mark.parametrize("side", ["sender", "receiver"])
async def test_forgotten_end_warns(side: str) -> None:
    """An end that is dropped open gives the warning that anyio's streams give."""
    channel = Channel[int](name="orders")
    end = getattr(channel, side).clone()
    kind = type(end).__name__
    with pytest.warns(ResourceWarning, match=rf"^Unclosed <{kind} of channel 'orders' at {id(end):#x}>$"):
        end = None
    channel.sender.close()
    channel.receiver.close()


async def test_dropped_channel_does_not_warn() -> None:
    """A channel of which no end was asked for has nothing to close, also as part of a cycle."""
    channel = Channel[int](5)
    channel.send_nowait(1)
    cycle: list[Any] = [channel]
    cycle.append(cycle)
    with warnings.catch_warnings(record=True, action="always") as caught:
        del channel, cycle
        gc.collect()
    assert caught == []


async def test_sender_of_a_closed_channel_does_not_warn() -> None:
    """Closing the whole channel is closing its senders."""
    channel = Channel[int]()
    clone = channel.sender.clone()
    channel.close()
    with warnings.catch_warnings(record=True, action="always") as caught:
        del clone, channel
        gc.collect()
    assert caught == []


async def test_a_channel_is_true_and_shows_itself() -> None:
    """An empty channel is still a channel; its repr has name, length, capacity and state."""
    channel = Channel[int](2, "jobs")
    assert channel
    assert repr(channel) == f"<Channel 'jobs' 0/2 at {id(channel):#x}>"
    assert channel.name == "jobs"
    channel.close()
    assert repr(channel) == f"<Channel 'jobs' 0/2 closed at {id(channel):#x}>"
    broken = Channel[int]()
    broken.receiver.close()
    assert repr(broken) == f"<Channel 0/0 broken at {id(broken):#x}>"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": -1}, ValueError, "capacity must be >= 0, got -1"),
        ({"capacity": -math.inf}, TypeError, "capacity must be an int or math.inf, got -inf"),
        ({"capacity": math.nan}, TypeError, "capacity must be an int or math.inf, got nan"),
        ({"capacity": 1.5}, TypeError, "capacity must be an int or math.inf, got 1.5"),
        ({"capacity": True}, TypeError, "capacity must be an int or math.inf, got True"),
        ({"capacity": "1"}, TypeError, "capacity must be an int or math.inf, got '1'"),
        (
            {"capacity": 1, "overflow": "drop"},
            ValueError,
            "overflow must be one of 'block', 'drop_newest', 'drop_oldest', got 'drop'",
        ),
        (
            {"overflow": "drop_oldest"},
            ValueError,
            "capacity must be >= 1 with overflow='drop_oldest', got 0",
        ),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    """Each bad argument gives one error that names it, the rule and the value."""
    with pytest.raises(error) as caught:
        Channel(**arguments)
    assert str(caught.value) == message


async def test_bad_batches() -> None:
    """So do those of `receive_many`."""
    channel = Channel[int]()
    with pytest.raises(ValueError, match=r"^max_items must be >= 1, got 0$"):
        await channel.receive_many(0)
    with pytest.raises(TypeError, match=r"^max_items must be an int, got 2.0$"):
        await channel.receive_many(2.0)  # type: ignore[arg-type] # that is the point
    with pytest.raises(ValueError, match=r"^max_wait must be >= 0, got -1$"):
        await channel.receive_many(1, max_wait=-1)
    with pytest.raises(ValueError, match=r"^max_wait must be >= 0, got nan$"):
        await channel.receive_many(1, max_wait=math.nan)


def test_a_channel_moves_on_when_its_loop_has_ended() -> None:
    """What one event loop left in a channel, the next may receive, after the first has ended."""
    channel = Channel[int](1)

    async def fill() -> None:
        await channel.send(1)
        with anyio.move_on_after(0):
            await channel.send(2)

    async def empty() -> None:
        assert await channel.receive() == 1
        assert_at_rest(channel)
        with anyio.move_on_after(0):
            await channel.receive()

    anyio.run(fill)
    anyio.run(empty, backend="trio")
    anyio.run(fill, backend="trio")
    anyio.run(empty)
    channel.send_nowait(3)
    assert channel.drain() == [3]
    channel.close()


def test_abandoned_waiters_are_forgotten_with_their_loop() -> None:
    """Tasks that never ran to their end in a loop that was closed hold nothing up in the next."""
    channel = Channel[int]()
    loop = asyncio.new_event_loop()
    task = loop.create_task(channel.receive())
    woken = loop.create_task(channel.receive())
    loop.run_until_complete(asyncio.sleep(0))
    channel.send_nowait(1)
    loop.close()
    del task, woken

    async def main() -> None:
        assert await channel.receive() == 1
        assert_at_rest(channel)

    logging.getLogger("asyncio").disabled = True
    try:
        anyio.run(main)
        gc.collect()
    finally:
        logging.getLogger("asyncio").disabled = False


def test_use_between_runs_of_one_loop() -> None:
    """In its own thread, with its loop at rest, a channel may be used by sync code."""
    channel = Channel[int](1)
    loop = asyncio.new_event_loop()
    task = loop.create_task(channel.receive())
    loop.run_until_complete(asyncio.sleep(0))
    channel.send_nowait(1)
    assert loop.run_until_complete(task) == 1
    loop.close()


async def test_use_in_another_loop() -> None:
    """An event loop that is not the channel's is refused, and told of the way in."""
    channel = Channel[int](1, "jobs")
    with anyio.move_on_after(1):
        await channel.receive()
    message = (
        r"^channel 'jobs' belongs to another event loop; "
        r"call channel.from_thread\(\) there, and use here what it returns$"
    )

    async def elsewhere() -> None:
        for operation in (
            lambda: channel.send(1),
            channel.receive,
            lambda: channel.send_many([1]),
            lambda: channel.receive_many(1),
            channel.aclose,
        ):
            with pytest.raises(RuntimeError, match=message):
                await operation()
        for function in (
            lambda: channel.send_nowait(1),
            channel.receive_nowait,
            channel.close,
            channel.drain,
            channel.from_thread,
        ):
            with pytest.raises(RuntimeError, match=message):
                function()

    def other_loop() -> None:
        for backend in ("asyncio", "trio"):
            anyio.run(elsewhere, backend=backend)
        with pytest.raises(RuntimeError, match=message):
            channel.send_nowait(1)

    await anyio.to_thread.run_sync(other_loop)
    assert_at_rest(channel)


def test_use_outside_of_any_loop() -> None:
    """Driven by hand, an operation that might wait is refused."""
    channel = Channel[int]()
    coroutine = channel.receive()
    with pytest.raises(RuntimeError, match=r"^channel at 0x[0-9a-f]+ was used outside of asyncio and trio$"):
        coroutine.send(None)


async def test_abandoned_operation_withdraws() -> None:
    """A coroutine that is thrown away while it waits leaves nothing behind."""
    channel = Channel[int]()
    if sys.modules["sniffio"].current_async_library() == "trio":
        pytest.skip(reason="trio's waits can't be driven by hand")
    for coroutine in (channel.send(1), channel.receive(), channel.send_many([1])):
        coroutine.send(None)
        coroutine.close()
        assert_at_rest(channel)
    sending = channel.send(1)
    sending.send(None)
    assert channel.receive_nowait() == 1
    sending.close()
    assert_at_rest(channel)


@pytest.mark.parametrize("sends", [True, False])
async def test_memory_of_an_idle_room_does_not_grow(*, sends: bool) -> None:
    """Waiters that were cancelled are swept from the middle of a room."""
    channel = Channel[int]()
    room: Any = channel._state.senders if sends else channel._state.receivers

    async def wait() -> None:
        await (channel.send(1) if sends else channel.receive())

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        await wait_all_tasks_blocked()
        for _ in range(100):
            async with anyio.create_task_group() as inner:
                inner.start_soon(wait)
                await wait_all_tasks_blocked()
                inner.cancel_scope.cancel()
        assert len(room) <= 3
        assert room.count_live() == 1
        if sends:
            channel.receive_nowait()
        else:
            channel.send_nowait(1)
    assert_at_rest(channel)


def test_batch_abandoned_with_its_loop_gives_back_what_it_collected() -> None:
    """What a batch had collected in a loop that was closed is at the head of the channel again."""
    channel = Channel[int](5)
    loop = asyncio.new_event_loop()
    channel.send_nowait(1)
    task = loop.create_task(channel.receive_many(3, max_wait=1000))
    loop.run_until_complete(asyncio.sleep(0))
    channel.send_nowait(2)
    loop.close()
    task._log_destroy_pending = False  # type: ignore[attr-defined] # it is left on purpose
    del task
    gc.collect()
    assert channel.drain() == [1, 2]
    assert_at_rest(channel)


@pytest.mark.parametrize("way", ["dropped", "in a cycle", "closed", "with an item"])
def test_a_channel_leaves_no_stream_open(way: str) -> None:
    """The anyio stream in it says nothing when the channel goes, whatever had become of it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        channel = Channel[Any](2)
        if way == "in a cycle":
            channel.send_nowait(channel)
        elif way == "closed":
            channel.close()
        elif way == "with an item":
            channel.send_nowait(1)
        del channel
        gc.collect()
    assert not [warning for warning in caught if "Unclosed" in str(warning.message)]


def test_an_anyio_whose_deque_is_out_of_reach() -> None:
    """A channel gets by with the stream's public calls."""
    send, receive = create_memory_object_stream[int](math.inf)
    public: Any = SimpleNamespace(
        receive_nowait=receive.receive_nowait, statistics=receive.statistics, close=receive.close
    )
    buffer = reach_buffer(send, public)
    assert type(buffer) is PublicBuffer
    buffer.append(1)
    assert (len(buffer), buffer.popleft()) == (1, 1)
