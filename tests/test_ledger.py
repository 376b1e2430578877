"""What threads have from a channel, with one that steps in between any two accesses of the buffer.

Threads touch the ledger and the buffer under the lock only, so that each of their steps is one here; and wherever the
event loop's side holds no lock, one may come.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from chanflow._channel._ledger import Ledger
from chanflow._channel._state import ChannelState
from chanflow._loop._home import NOWHERE
from tests.support.fake_waiter import FakeWaiter


class Hostile(deque[int]):
    """The deque of a channel, that lets a thread step in before each access outside of the lock."""

    step_in: Callable[[], None]

    def append(self, item: int) -> None:
        self.step_in()
        super().append(item)

    def extend(self, items: Iterable[int]) -> None:
        self.step_in()
        super().extend(items)

    def extendleft(self, items: Iterable[int]) -> None:
        self.step_in()
        super().extendleft(items)

    def popleft(self) -> int:
        self.step_in()
        return super().popleft()

    def pop(self, _index: SupportsIndex = -1) -> int:
        self.step_in()
        return super().pop()

    def __len__(self) -> int:
        self.step_in()
        return super().__len__()


class Silent:
    """A bridge that has nobody to tell."""

    def sender_parked(self) -> None:
        """Wake nobody."""

    closed = end = sender_parked


class LedgerMachine(RuleBasedStateMachine):
    """Tasks and threads that send, receive, change their minds, and close."""

    @initialize(
        capacity=st.sampled_from([0, 1, 2, 10, math.inf]),
        overflow=st.sampled_from(["block", "block", "drop_newest", "drop_oldest"]),
        steps=st.lists(st.sampled_from(["take", "send", "return", None, None]), min_size=1, max_size=60),
    )
    def make(self, capacity: float, overflow: Any, steps: list[str | None]) -> None:
        if overflow == "drop_oldest" and capacity == 0:
            overflow = "block"
        self.state: ChannelState[int] = ChannelState(capacity, "model", overflow)
        self.buffer = Hostile()
        self.buffer.step_in = lambda: None
        self.state.buffer = self.buffer
        self.ledger = self.state.ledger = Ledger(self.state)
        self.state.bridge = Silent()
        self.state.special = True
        # What a thread does at each moment that it may.
        self.steps, self.next_step = steps, 0
        self.buffer.step_in = self.step_in
        self.stepping = False
        self.next_item = 0
        self.accepted: list[int] = []
        self.out: list[int] = []
        self.by_thread: list[int] = []
        self.waiting: list[tuple[str, FakeWaiter, int | None]] = []
        self.held: list[int] = []
        self.over = False

    def new_item(self) -> int:
        self.next_item += 1
        return self.next_item

    def step_in(self) -> None:
        if self.stepping or self.ledger.lock._is_owned():  # type: ignore[attr-defined] # pyright: ignore[reportAttributeAccessIssue] # RLocks have it
            return
        self.next_step += 1
        self.step(self.steps[self.next_step % len(self.steps)])

    def step(self, what: str | None) -> None:
        """Take a step of a thread."""
        self.stepping = True
        try:
            with self.ledger.lock:
                if what == "take" and self.ledger.can_take():
                    item = self.ledger.take()
                    self.by_thread.append(item)
                    self.out.append(item)
                elif what == "send" and not self.over:
                    item = self.new_item()
                    if self.ledger.send(item):
                        self.accepted.append(item)
                elif what == "return" and self.by_thread and not self.over:
                    item = self.by_thread.pop()
                    self.out.remove(item)
                    self.ledger.give_back(item)
        finally:
            self.stepping = False

    @rule(what=st.sampled_from(["take", "send", "return"]))
    def thread(self, what: str) -> None:
        self.step(what)

    @precondition(lambda self: not self.over)
    @rule()
    def pump(self) -> None:
        """Lend to the threads, as each pump does in the end."""
        with self.ledger.lock:
            self.ledger.recall_room()
            if not self.state.reserved:
                self.ledger.lend_items()
            if not self.state.senders.any_live():
                self.ledger.lend_room()

    @precondition(lambda self: not self.over)
    @rule(count=st.integers(1, 4))
    def send(self, count: int) -> None:
        for _ in range(count):
            item = self.new_item()
            if self.state.put(item):
                self.accepted.append(item)
            else:
                waiter = FakeWaiter()
                self.state.senders.append((waiter, None, item))
                self.waiting.append(("send", waiter, item))
                break

    @rule()
    def receive(self) -> None:
        if self.state.can_take():
            self.out.append(self.state.take())
        elif not self.state.over():
            waiter = FakeWaiter()
            self.state.receivers.append((waiter, None))
            self.waiting.append(("receive", waiter, None))

    @rule(count=st.integers(1, 6))
    def receive_batch(self, count: int) -> None:
        """Hold what there is, as a batch does that goes on collecting."""
        batch = self.state.take_many(count)
        self.held += batch
        self.state.held += len(batch)

    @precondition(lambda self: self.held)
    @rule(keep=st.booleans())
    def end_batch(self, *, keep: bool) -> None:
        self.state.held -= len(self.held)
        batch, self.held = self.held, []
        if keep:
            self.out += batch
        else:
            self.state.restore(batch)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), cancel=st.booleans())
    def run_task(self, data: st.DataObject, *, cancel: bool) -> None:
        """Let a parked task run that was woken, or cancel it, woken or not."""
        kind, waiter, item = entry = data.draw(st.sampled_from(self.waiting))
        if not waiter.done():
            if not cancel:
                return
            waiter.outcome = "cancelled"
        self.waiting.remove(entry)
        if kind == "send":
            if waiter.outcome is None:
                assert item is not None
                self.accepted.append(item)
            else:
                self.state.senders.leave()
        elif cancel:
            self.state.leave_receivers(waiter, NOWHERE, Exception())  # pyright: ignore[reportArgumentType] # what it needs of one
        elif waiter.outcome is None:
            self.out.append(self.state.redeem())

    @rule()
    def drain(self) -> None:
        self.out += self.state.drain()

    @precondition(lambda self: not self.over)
    @rule(broken=st.booleans())
    def close(self, *, broken: bool) -> None:
        self.over = True
        if broken:
            self.state.close_receiver(())
        else:
            self.state.close()

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        """Each accepted item is in one place; what is lent, with the room, is the capacity."""
        if not hasattr(self, "state"):
            return
        ledger, state = self.ledger, self.state
        woken = [item or 0 for kind, waiter, item in self.waiting if kind == "send" and waiter.outcome is None]
        places = Counter([*self.out, *self.held, *deque.__iter__(self.buffer), *ledger._inbox, *ledger._returned])
        expected = Counter([*self.accepted, *woken])
        assert all(count == 1 for count in places.values())
        assert not places - expected
        # What is missing was dropped, as the policy says.
        assert (expected - places).total() == state.dropped
        assert deque.__len__(self.buffer) >= ledger._claims
        assert state.reserved >= ledger._claims + ledger._taken
        if not self.over:
            lent = ledger._claims + ledger._taken + ledger._credits + len(ledger._inbox)
            assert state.room + lent == state.limit


LedgerMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
TestLedgerMachine = LedgerMachine.TestCase


def restore_by_hand(state: ChannelState[int], items: list[int]) -> None:
    """Empty and refill the buffer while threads may take from it."""
    later = [state.buffer.popleft() for _ in range(len(state.buffer))]
    state.buffer.extend([*items, *later])
    state.reserved += len(items)
    state.release(len(items))


def drain_all(state: ChannelState[int]) -> list[int]:
    """Take what is reserved for threads, too."""
    return [state.buffer.popleft() for _ in range(len(state.buffer))]


def settle_without_room(ledger: Ledger[int]) -> None:
    ledger._state.reserved -= ledger._taken
    ledger._taken = 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "mutant"),
    [
        (ChannelState, "restore", restore_by_hand),
        (ChannelState, "drain", drain_all),
        (Ledger, "settle", settle_without_room),
        (Ledger, "_balance", lambda _ledger: None),
    ],
)
def test_the_machine_finds_what_breaks_the_rule(
    owner: type, name: str, mutant: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check that can't fail is none."""
    monkeypatch.setattr(owner, name, mutant)
    with pytest.raises(Exception):  # noqa: B017, PT011 -- whatever goes wrong first
        run_state_machine_as_test(
            LedgerMachine, settings=settings(max_examples=3000, stateful_step_count=40, phases=[Phase.generate])
        )
