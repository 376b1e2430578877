"""The channel's state against a model of thirty lines, driven without an event loop.

Every step is one that a task could take: the waiters are plain objects, so that each interleaving of waking,
cancelling and running is a sequence of steps.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Any

from anyio import BrokenResourceError, ClosedResourceError, EndOfStream
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from chanflow._park import NOWHERE
from chanflow._state import ChannelState


class FakeWaiter:
    """A waiter whose task runs when the test says so."""

    def __init__(self) -> None:
        self.outcome: Any = "pending"

    def done(self) -> bool:
        return self.outcome != "pending"

    def cancelled(self) -> bool:
        return self.outcome == "cancelled"

    def cancel(self) -> None:
        raise AssertionError

    def result(self) -> Any:
        return self.outcome

    def set_result(self, outcome: Any) -> None:
        assert not self.done(), "woken twice"
        self.outcome = outcome


class Model:
    """What a channel is: items in order, and who waits for them in order."""

    def __init__(self, capacity: float, overflow: str) -> None:
        self.capacity, self.overflow = capacity, overflow
        self.items: deque[int] = deque()
        self.handed: list[Any] = []  # receivers that were woken and have not run
        self.receivers: list[Any] = []
        self.senders: list[tuple[Any, int]] = []
        self.returned = 0  # hand-offs that came back beyond the capacity

    def free(self) -> int:
        return len(self.items) - len(self.handed)

    def put(self, item: int) -> bool:
        if self.receivers:
            self.handed.append(self.receivers.pop(0))
        elif self.free() >= self.capacity:
            if self.overflow == "drop_oldest":
                self.items.popleft()
            else:
                return self.overflow == "drop_newest"
        self.items.append(item)
        return True

    def take(self) -> int | None:
        if not self.free() and self.senders:
            self.items.append(self.senders.pop(0)[1])
        if not self.free():
            return None
        item = self.items.popleft()
        self.refill()
        return item

    def refill(self) -> None:
        while self.senders and self.free() < self.capacity:
            self.items.append(self.senders.pop(0)[1])

    def release(self, waiter: Any) -> None:
        self.handed.remove(waiter)
        if self.receivers:
            self.handed.append(self.receivers.pop(0))

    def redeem(self, waiter: Any) -> int:
        self.handed.remove(waiter)
        if self.capacity < 0 and not self.handed:
            # Closed, and nothing can come back any more.
            self.receivers.clear()
        return self.items.popleft()


class ChannelMachine(RuleBasedStateMachine):
    """Tasks that send, receive, are cancelled and close, in every order."""

    @initialize(
        capacity=st.sampled_from([0, 1, 2, 10, math.inf]),
        overflow=st.sampled_from(["block", "block", "drop_newest", "drop_oldest"]),
    )
    def make(self, capacity: float, overflow: Any) -> None:
        if overflow == "drop_oldest" and capacity == 0:
            overflow = "block"
        self.state: ChannelState[int] = ChannelState(capacity, "model", overflow)
        self.model = Model(capacity, overflow)
        self.next_item = 0
        self.out: list[int] = []
        self.expected: list[int] = []
        self.waiting: list[tuple[str, FakeWaiter]] = []
        self.over = False

    def new_item(self) -> int:
        self.next_item += 1
        return self.next_item

    @precondition(lambda self: not self.over)
    @rule(count=st.integers(1, 4))
    def send(self, count: int) -> None:
        """Send one by one, parking the first that finds no room."""
        for _ in range(count):
            item = self.new_item()
            accepted = self.model.put(item)
            assert self.state.put(item) == accepted
            if not accepted:
                waiter = FakeWaiter()
                self.state.senders.append((waiter, None, item))
                self.model.senders.append((waiter, item))
                self.waiting.append(("send", waiter))
                break

    @precondition(lambda self: not self.over)
    @rule(count=st.integers(0, 6))
    def send_batch(self, count: int) -> None:
        items = deque(self.new_item() for _ in range(count))
        batch = list(items)
        self.state.put_many(items)
        while batch and self.model.put(batch[0]):
            batch.pop(0)
        assert list(items) == batch

    @rule()
    def receive(self) -> None:
        item = self.model.take()
        assert self.state.can_take() == (item is not None)
        if item is not None:
            assert self.state.take() == item
            self.out.append(item)
        else:
            assert self.state.over() == (self.over and (self.state.broken or not self.model.handed))
            if self.state.over():
                return
            waiter = FakeWaiter()
            self.state.receivers.append((waiter, None))
            self.model.receivers.append(waiter)
            self.waiting.append(("receive", waiter))

    @rule(count=st.integers(1, 6), keep=st.booleans())
    def receive_batch(self, count: int, *, keep: bool) -> None:
        """Take a batch; a cancelled one goes back."""
        expected: list[int] = []
        while len(expected) < count and (item := self.model.take()) is not None:
            expected.append(item)
        batch = self.state.take_many(count)
        assert batch == expected
        if keep:
            self.out += batch
        else:
            self.state.restore(batch)
            self.model.items.extendleft(reversed(batch))
            for _ in batch:
                token = object()
                self.model.handed.append(token)
                self.model.release(token)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def run_task(self, data: st.DataObject) -> None:
        """Let a parked task that was woken run."""
        woken = [entry for entry in self.waiting if entry[1].done()]
        if not woken:
            return
        kind, waiter = entry = data.draw(st.sampled_from(woken))
        self.waiting.remove(entry)
        if kind == "receive" and waiter.outcome is None:
            item = self.model.redeem(waiter)
            assert self.state.redeem() == item
            self.out.append(item)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), later=st.booleans())
    def cancel_task(self, data: st.DataObject, *, later: bool) -> None:
        """Cancel a parked task: before it was woken, or in the tick in which it was."""
        kind, waiter = entry = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(entry)
        room = self.state.receivers if kind == "receive" else self.state.senders
        if not waiter.done():
            waiter.outcome = "cancelled"
            self.model.receivers = [other for other in self.model.receivers if other is not waiter]
            self.model.senders = [other for other in self.model.senders if other[0] is not waiter]
            if later:
                # Others come first, and clear the dead entry away or not.
                room.any_live()
        # Nobody awaits it here.
        as_parked: Any = waiter
        if kind == "send":
            assert self.state.leave_senders(as_parked, NOWHERE, Exception()) == (waiter.outcome is None)
        else:
            if waiter.outcome is None:
                self.model.release(waiter)
            self.state.leave_receivers(as_parked, NOWHERE, Exception())

    @rule()
    def drain(self) -> None:
        expected = [self.model.items.popleft() for _ in range(self.model.free())]
        self.model.refill()
        assert self.state.drain() == expected
        self.out += expected

    @precondition(lambda self: not self.over)
    @rule(broken=st.booleans())
    def close(self, *, broken: bool) -> None:
        """Close either side: all who wait are told."""
        if broken:
            self.state.close_receiver(None)
        else:
            self.state.close()
        self.over = True
        self.model.capacity = -1
        self.model.overflow = "block"
        if broken or not self.model.handed:
            for waiter in self.model.receivers:
                assert waiter.outcome is (ClosedResourceError if broken else EndOfStream)
            self.model.receivers.clear()
        for waiter, _item in self.model.senders:
            assert waiter.outcome is (BrokenResourceError if broken else ClosedResourceError)
        self.model.senders.clear()

    @invariant()
    def agrees(self) -> None:
        """Check the invariants at the head of the module, in their order."""
        if not hasattr(self, "state"):
            return
        state, model = self.state, self.model
        figures = state.statistics()
        assert figures.sent == figures.received + figures.dropped + figures.current_buffer_used
        assert figures.received == len(self.out)
        assert not (state.receivers.any_live() and state.senders.any_live())
        assert 0 <= state.reserved == len(model.handed) <= len(state.buffer) == len(model.items)
        if state.receivers.any_live():
            assert state.count_free() == 0
        if state.senders.any_live():
            assert state.count_free() >= state.room
        assert state.receivers.count_live() == len(model.receivers)
        assert state.senders.count_live() == len(model.senders)
        assert all(waiter.outcome is None for waiter in model.handed if isinstance(waiter, FakeWaiter))
        # Items leave in the order in which they came.
        assert self.out == sorted(self.out)


ChannelMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestChannelMachine = ChannelMachine.TestCase
