"""The race of a hand-over with a cancellation, constructed in both orders.

The task that hands over and then cancels, or the other way round, does both without a checkpoint between, so that the
parked task sees both at once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Coroutine
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import CancelScope, ClosedResourceError, EndOfStream, WouldBlock, wait_all_tasks_blocked

from chanflow import Channel, Send, select
from tests.support.channels import assert_at_rest
from tests.support.virtual_time import VirtualTimeLoop


@pytest.fixture(params=["cancel", "timeout", "wait_for", "task group"])
def how(request: pytest.FixtureRequest) -> str:
    return request.param


class Victim:
    """An asyncio task with an operation, and the way in which it is going to be cancelled."""

    def __init__(self, how: str, operation: Coroutine[Any, Any, Any]) -> None:
        self.how = how
        self.loop = asyncio.get_running_loop()
        self.outcome: Any = None
        # How many requests are left over when the operation has returned, and after its surroundings are left.
        self.cancelling_after = -1
        self.interrupted_later = False
        self.task = self.loop.create_task(self.main(operation))

    async def main(self, operation: Coroutine[Any, Any, Any]) -> None:
        try:
            if self.how == "timeout":
                async with asyncio.timeout(None) as self.timeout:
                    self.outcome = await operation
            elif self.how == "wait_for":
                self.outcome = await asyncio.wait_for(operation, 1)
            elif self.how == "task group":
                async with asyncio.TaskGroup() as group:
                    self.failing = self.loop.create_future()
                    group.create_task(self.fail())
                    self.outcome = await operation
            else:
                self.outcome = await operation
        except (asyncio.CancelledError, TimeoutError, ExceptionGroup) as error:
            self.outcome = error
        me = asyncio.current_task()
        assert me is not None
        self.cancelling_after = me.cancelling()
        try:
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        except asyncio.CancelledError:
            self.interrupted_later = True

    async def fail(self) -> None:
        await self.failing

    def interrupt(self) -> None:
        """Cancel the operation before the loop gets to do anything else."""
        if self.how == "timeout":
            me = self.task
            self.timeout._state = type(self.timeout._state).EXPIRING  # type: ignore[attr-defined] # as its timer does
            me.cancel()
        else:
            self.task.cancel()


async def park(how: str, operation: Coroutine[Any, Any, Any]) -> Victim:
    victim = Victim(how, operation)
    for _ in range(3):
        await asyncio.sleep(0)
    return victim


def run(program: Coroutine[Any, Any, None]) -> None:
    asyncio.run(program)


def test_receive_woken_then_cancelled_leaves_the_item() -> None:
    """Native: the item that a cancelled receiver was woken for is still in the channel."""

    async def main() -> None:
        channel = Channel[int]()
        victim = await park("cancel", channel.receive())
        channel.send_nowait(1)
        victim.interrupt()
        with pytest.raises(WouldBlock):
            channel.receive_nowait()
        await victim.task
        assert isinstance(victim.outcome, asyncio.CancelledError)
        assert channel.receive_nowait() == 1
        assert_at_rest(channel)

    run(main())


def test_receive_woken_then_cancelled_passes_the_item_on() -> None:
    """Native: it goes to the receiver that waits next, not to one that comes later."""

    async def main() -> None:
        channel = Channel[int]()
        victim = await park("cancel", channel.receive())
        heir = await park("cancel", channel.receive())
        channel.send_nowait(1)
        victim.interrupt()
        late = await park("cancel", channel.receive())
        await victim.task
        channel.send_nowait(2)
        await heir.task
        await late.task
        assert (heir.outcome, late.outcome) == (1, 2)
        assert_at_rest(channel)

    run(main())


def test_send_taken_then_cancelled_returns() -> None:
    """Native: a send whose item was taken returns normally, and the cancellation arrives at the next checkpoint."""

    async def main() -> None:
        channel = Channel[int]()
        victim = await park("cancel", channel.send(1))
        assert channel.receive_nowait() == 1
        victim.interrupt()
        await victim.task
        assert victim.outcome is None
        assert victim.cancelling_after == 1
        assert victim.interrupted_later
        assert_at_rest(channel)

    run(main())


def test_send_taken_then_timed_out_raises_nothing() -> None:
    """`asyncio.timeout` that expires in the tick of the hand-over neither raises nor leaves a request behind."""

    async def main() -> None:
        channel = Channel[int]()
        victim = await park("timeout", channel.send(1))
        assert channel.receive_nowait() == 1
        victim.interrupt()
        await victim.task
        assert victim.outcome is None
        assert victim.cancelling_after == 0
        assert not victim.interrupted_later

    run(main())


def test_timeout_is_not_lost_when_the_block_goes_on() -> None:
    """When more is awaited in the block, the timeout that came during a completed send does fire there."""

    async def main() -> None:
        channel = Channel[int]()

        async def send_and_wait() -> None:
            await channel.send(1)
            await asyncio.Event().wait()

        victim = await park("timeout", send_and_wait())
        assert channel.receive_nowait() == 1
        victim.interrupt()
        await victim.task
        assert isinstance(victim.outcome, TimeoutError)
        assert victim.cancelling_after == 0

    run(main())


def test_real_timeouts_around_completed_sends() -> None:
    """A timer that expires in the very iteration in which a receiver takes the item: 200 times nothing is raised."""

    async def main() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(200):
            channel = Channel[int]()

            async def send(channel: Channel[int] = channel) -> int:
                when = loop.time() + 1
                async with asyncio.timeout_at(when):
                    # Nearer to each other than the clock can tell, so that both run in one iteration, in this order.
                    loop.call_at(when - 1e-7, channel.receive_nowait)
                    await channel.send(1)
                me = asyncio.current_task()
                assert me is not None
                return me.cancelling()

            assert await loop.create_task(send()) == 0
            assert channel.statistics().received == 1

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(main())


def test_wait_for_around_a_completed_send() -> None:
    """`wait_for` whose task is cancelled in the tick of the hand-over: the send is done, whatever is raised."""

    async def main() -> None:
        channel = Channel[int]()
        victim = await park("wait_for", channel.send(1))
        assert channel.receive_nowait() == 1
        victim.interrupt()
        await victim.task
        assert victim.outcome is None or isinstance(victim.outcome, asyncio.CancelledError)
        assert channel.statistics().received == 1
        assert_at_rest(channel)

    run(main())


def test_wait_for_around_a_woken_receive() -> None:
    """`wait_for` that is cancelled in the tick of the hand-over lost nothing: the item came out, or is still there."""

    async def main() -> None:
        channel = Channel[int]()
        victim = await park("wait_for", channel.receive())
        channel.send_nowait(1)
        victim.interrupt()
        await victim.task
        left = channel.drain()
        assert (victim.outcome, left) == (1, []) or left == [1]
        assert_at_rest(channel)

    run(main())


def test_task_group_abort_around_a_completed_send() -> None:
    """A TaskGroup that aborts in the tick of the hand-over: the send is done, and the group's error is raised."""

    async def main() -> None:
        channel = Channel[int]()
        sent = []

        async def send() -> None:
            await channel.send(1)
            sent.append(1)
            await asyncio.Event().wait()

        victim = await park("task group", send())
        assert channel.receive_nowait() == 1
        victim.failing.set_exception(ValueError("abort"))
        await victim.task
        assert sent == [1]
        assert isinstance(victim.outcome, ExceptionGroup)
        assert victim.cancelling_after == 0
        assert not victim.interrupted_later

    run(main())


def test_send_cancelled_then_taken_is_not_taken() -> None:
    """Native: a sender whose cancellation came first is no sender any more."""

    async def main() -> None:
        channel = Channel[int]()
        victim = await park("cancel", channel.send(1))
        victim.interrupt()
        with pytest.raises(WouldBlock):
            channel.receive_nowait()
        await victim.task
        assert isinstance(victim.outcome, asyncio.CancelledError)
        assert_at_rest(channel)

    run(main())


def test_batch_taken_then_cancelled_says_what_is_left() -> None:
    """Native: a cancelled `send_many` leaves in its deque just what was not delivered."""

    async def main() -> None:
        channel = Channel[int]()
        items = deque([1, 2, 3])
        victim = await park("cancel", channel.send_many(items))
        assert channel.receive_nowait() == 1
        victim.interrupt()
        await victim.task
        assert isinstance(victim.outcome, asyncio.CancelledError)
        assert list(items) == [2, 3]
        assert_at_rest(channel)

    run(main())


def test_last_of_a_batch_taken_then_cancelled_returns() -> None:
    """Native: with its last item taken, a `send_many` is complete, and returns."""

    async def main() -> None:
        channel = Channel[int]()
        victim = await park("cancel", channel.send_many([1]))
        assert channel.receive_nowait() == 1
        victim.interrupt()
        await victim.task
        assert victim.outcome is None
        assert victim.interrupted_later

    run(main())


@pytest.mark.anyio
async def test_scope_cancelled_then_sent() -> None:
    """With a scope cancelled first, the receiver is passed over, and the item stays."""
    channel = Channel[int](1)
    received = []
    with CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def receive() -> None:
                received.append(await channel.receive())

            tasks.start_soon(receive)
            await wait_all_tasks_blocked()
            scope.cancel()
            channel.send_nowait(1)
    assert received == []
    assert channel.drain() == [1]
    assert_at_rest(channel)


@pytest.mark.anyio
async def test_sent_then_scope_cancelled() -> None:
    """With the item handed over first, it is received, or still there: never lost."""
    channel = Channel[int]()
    received = []
    with CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def receive() -> None:
                received.append(await channel.receive())

            tasks.start_soon(receive)
            await wait_all_tasks_blocked()
            channel.send_nowait(1)
            scope.cancel()
    assert received + channel.drain() == [1]
    assert_at_rest(channel)


@pytest.mark.anyio
async def test_scope_of_a_send_cancelled_then_received() -> None:
    """A sender whose scope is cancelled delivers nothing, even to a receiver of the same tick."""
    channel = Channel[int]()
    with CancelScope() as scope:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(channel.send, 1)
            await wait_all_tasks_blocked()
            scope.cancel()
            with pytest.raises(WouldBlock):
                channel.receive_nowait()
    assert channel.statistics().sent == 0
    assert_at_rest(channel)


@pytest.mark.anyio
async def test_received_then_scope_of_the_send_cancelled() -> None:
    """A sender whose item was taken returns normally, and is cancelled at its next checkpoint."""
    channel = Channel[int]()
    steps = []
    with CancelScope() as scope:
        async with anyio.create_task_group() as tasks:

            async def send() -> None:
                await channel.send(1)
                steps.append("sent")
                await anyio.lowlevel.checkpoint()
                steps.append("went on")

            tasks.start_soon(send)
            await wait_all_tasks_blocked()
            assert channel.receive_nowait() == 1
            scope.cancel()
    assert steps == ["sent"]
    assert_at_rest(channel)


@pytest.mark.anyio
async def test_cancelled_batch_gives_back_what_it_collected() -> None:
    """A `receive_many` that is cancelled while it collects took nothing, and the order stays."""
    channel = Channel[int](10)
    await channel.send_many([1, 2, 3])
    with anyio.move_on_after(1):
        await channel.receive_many(10, max_wait=5)
    assert channel.drain() == [1, 2, 3]
    assert_at_rest(channel)


@pytest.mark.anyio
async def test_cancelled_batch_passes_on_what_it_collected() -> None:
    """What a cancelled batch collected goes to the receivers that came after it."""
    channel = Channel[int](10)
    received = []
    async with anyio.create_task_group() as tasks:
        scope = CancelScope()

        async def collect() -> None:
            with scope:
                await channel.receive_many(10, max_wait=5)

        async def receive() -> None:
            received.append(await channel.receive())

        await channel.send_many([1, 2])
        tasks.start_soon(collect)
        await wait_all_tasks_blocked()
        tasks.start_soon(receive)
        tasks.start_soon(receive)
        await wait_all_tasks_blocked()
        assert received == []
        scope.cancel()
    assert sorted(received) == [1, 2]
    assert_at_rest(channel)


@pytest.mark.anyio
async def test_regression_nothing_is_sent_after_close_to_those_who_wait_on() -> None:
    """Task 1 was handed an item, which may come back to task 2; the channel is closed before either has run."""
    channel = Channel[int]()
    received: list[int | None] = []

    async def receive() -> None:
        try:
            received.append(await channel.receive())
        except EndOfStream:
            received.append(None)

    async with anyio.create_task_group() as tasks:
        for _ in range(2):
            tasks.start_soon(receive)
        await anyio.wait_all_tasks_blocked()
        channel.send_nowait(1)
        channel.close()
        with pytest.raises(ClosedResourceError):
            channel.send_nowait(2)
        with pytest.raises(ClosedResourceError):
            await channel.send(3)
        with pytest.raises(ClosedResourceError):
            await channel.send_many([4])
        with pytest.raises(ClosedResourceError):
            await select(Send(channel, 5))
    assert sorted(received, key=str) == [1, None]


async def pass_over() -> None:
    """Its task has not run since, and no other sender is there: the receiver waits."""
    channel = Channel[int]()
    sending = asyncio.ensure_future(channel.send(1))
    await asyncio.sleep(0)
    sending.cancel()
    receiving = asyncio.ensure_future(channel.receive())
    # In the same tick: before the task that was cancelled has run.
    operation = channel.receive()
    parked = operation.send(None)
    assert asyncio.isfuture(parked)
    operation.close()
    await asyncio.sleep(0)
    await channel.send(2)
    assert await receiving == 2
    assert sending.cancelled()
    assert_at_rest(channel)


def test_regression_a_sender_that_was_just_cancelled_is_passed_over() -> None:
    """Under asyncio only, where a cancelled task is still in the waiting room."""
    asyncio.run(pass_over())
