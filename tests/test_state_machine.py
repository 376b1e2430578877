"""Channels against a model of thirty lines, on a stand-in for the event loop.

Each task is a public operation, whose coroutine is stepped by hand: so each interleaving of starting, waking,
cancelling and running is a sequence of steps, and each way of sending and receiving is tried against all others.
"""

from __future__ import annotations

import inspect
import math
import textwrap
from collections import deque
from collections.abc import Callable, Generator
from types import coroutine
from typing import Any

import pytest
from anyio import BrokenResourceError, ClosedResourceError, EndOfStream, WouldBlock
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

from chanflow import Channel, Send, select, select_nowait
from chanflow._channel import _ends, _select, _state
from chanflow._channel._ends import Receiving, Sending
from chanflow._channel._state import ChannelState
from chanflow._loop._home import Home
from tests.support.fake_waiter import FakeWaiter


@coroutine
def pause() -> Generator[str, None, None]:
    yield "checkpoint"


class StandIn(Home):
    """An event loop that runs nothing by itself."""

    __slots__ = ()

    def __init__(self) -> None:
        loop = object()
        super().__init__(lambda: loop, FakeWaiter, lambda: 0.0)

    async def checkpoint(self) -> None:
        self.refresh()
        await pause()

    async def wait(self, waiter: Any, deadline: float | None) -> Any:
        del deadline
        return await waiter

    def ended(self) -> bool:
        return False

    def call_soon(self, callback: Callable[[], object]) -> None:
        raise NotImplementedError

    def defer_cancellation(self, exc: BaseException) -> bool:
        """As on asyncio, where a cancellation may come when the item was taken already."""
        return True


class Cancelled(BaseException):
    """What a task is cancelled with."""


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

    def can_put(self) -> bool:
        return bool(self.receivers) or self.free() < self.capacity or self.overflow != "block"

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


class Task:
    """A public operation that is under way."""

    def __init__(self, way: str, steps: Any, items: list[int]) -> None:
        self.way = way
        self.steps = steps
        # Of a sender, what it has not sent yet.
        self.items = items
        self.waiter: FakeWaiter | None = None


SENDING: dict[str, Callable[[Any, Channel[int], list[int]], Any]] = {
    "send": lambda channel, _idle, items: channel.send(items[0]),
    "send_many": lambda channel, _idle, items: channel.send_many(deque(items)),
    "select": lambda channel, idle, items: select(Send(channel, items[0]), idle),
    "select, the first": lambda channel, idle, items: select(Send(channel, items[0]), idle, priority=True),
}
RECEIVING: dict[str, Callable[[Any, Channel[int]], Any]] = {
    "receive": lambda channel, _idle: channel.receive(),
    "async for": lambda channel, _idle: anext(channel),
    "receive_many": lambda channel, _idle: channel.receive_many(3),
    "select": lambda channel, idle: select(channel, idle),  # noqa: PLW0108 -- it may be a mutant by then
    "select alone": lambda channel, _idle: select(channel),
    "select, the first": lambda channel, idle: select(idle, channel, priority=True),
}
NOWAIT_SENDING: dict[str, Callable[[Any, int], object]] = {
    "send_nowait": lambda channel, item: channel.send_nowait(item),
    "select_nowait": lambda channel, item: select_nowait(Send(channel, item)),
}
NOWAIT_RECEIVING: dict[str, Callable[[Any], Any]] = {
    "receive_nowait": Channel.receive_nowait,
    "select_nowait": lambda channel: select_nowait(channel).item,
}


class ChannelMachine(RuleBasedStateMachine):
    """Tasks that send, receive, are cancelled and close, in every order."""

    def __init__(self) -> None:
        super().__init__()
        self.home = StandIn()
        self.patch = pytest.MonkeyPatch()
        for module in _state, _select:
            self.patch.setattr(module, "current_home", lambda: self.home)

    def teardown(self) -> None:
        try:
            if hasattr(self, "parked"):
                for task in self.parked + self.yielded:
                    task.steps.close()
                self.channel.drain()
                if self.sender is not self.channel:
                    self.sender.close()
                    self.receiver.close()
        finally:
            # Also where a mutant fails even here.
            self.patch.undo()

    @initialize(
        capacity=st.sampled_from([0, 1, 2, 10, math.inf]),
        overflow=st.sampled_from(["block", "block", "drop_newest", "drop_oldest"]),
        settled=st.booleans(),
        ends=st.booleans(),
    )
    def make(self, capacity: float, overflow: Any, *, settled: bool, ends: bool) -> None:
        if overflow == "drop_oldest" and capacity == 0:
            overflow = "block"
        self.channel = Channel[int](capacity, "model", overflow=overflow)
        self.state: ChannelState[int] = self.channel._state
        self.sender: Any = self.channel.sender if ends else self.channel
        self.receiver: Any = self.channel.receiver if ends else self.channel
        self.idle = Channel[int]()
        if settled:
            self.state.home = self.idle._state.home = self.home
        self.model = Model(capacity, overflow)
        self.next_item = 0
        self.out: list[int] = []
        self.parked: list[Task] = []
        self.yielded: list[Task] = []
        self.over = False

    def new_items(self, count: int) -> list[int]:
        self.next_item += count
        return list(range(self.next_item - count + 1, self.next_item + 1))

    # Starting, and going on after a checkpoint

    # One rule for both sides, since Hypothesis leaves out some rules in each run.
    @rule(
        sends=st.booleans(),
        sending=st.sampled_from(sorted(SENDING)),
        receiving=st.sampled_from(sorted(RECEIVING)),
        count=st.integers(1, 4),
    )
    def start_tasks(self, *, sends: bool, sending: str, receiving: str, count: int) -> None:
        self.start(sends=sends, sending=sending, receiving=receiving, count=count)

    def start(self, *, sends: bool, sending: str, receiving: str, count: int) -> None:
        for _ in range(count):
            if sends:
                items = self.new_items(3 if sending == "send_many" else 1)
                self.advance(Task(sending, SENDING[sending](self.sender, self.idle, items), items))
            else:
                self.advance(Task(receiving, RECEIVING[receiving](self.receiver, self.idle), []))

    @precondition(lambda self: self.yielded)
    @rule(data=st.data(), cancel=st.booleans())
    def resume(self, data: st.DataObject, *, cancel: bool) -> None:
        """Let a task go on, or cancel it, that let others run first: it has done nothing yet."""
        task = data.draw(st.sampled_from(self.yielded))
        self.yielded.remove(task)
        if cancel:
            with pytest.raises(Cancelled):
                task.steps.throw(Cancelled())
        else:
            self.advance(task)

    @rule(left=st.sampled_from([0, 100]))
    def budget(self, left: int) -> None:
        """Leave so much of the budget."""
        self.home.renew(left)

    def advance(self, task: Task, happened: list[int] | None = None) -> None:
        """Step a task, and the model with it; some may have happened to it already."""
        try:
            given = task.steps.send(None)
        except StopIteration as end:
            self.finish(task, happened, end.value, None)
        except (EndOfStream, StopAsyncIteration, ClosedResourceError, BrokenResourceError) as error:
            self.finish(task, happened, None, error)
        else:
            if given == "checkpoint":
                # Who has to wait parks at once, and who went on has done nothing yet.
                assert happened is None
                if task.items:
                    assert self.over or self.model.can_put()
                else:
                    free, ended = self.model.free() or self.model.senders, self.over and not self.model.handed
                    assert free or ended or self.state.broken
                self.yielded.append(task)
            else:
                task.waiter = given
                self.park(task, happened)

    def finish(self, task: Task, happened: list[int] | None, value: Any, error: Exception | None) -> None:
        """Compare what a task came to with what should have."""
        if task.items:
            if self.over:
                assert type(error) is (BrokenResourceError if self.state.broken else ClosedResourceError)
                return
            while task.items and self.model.put(task.items[0]):
                task.items.pop(0)
            assert not task.items
            assert error is None
            return
        if happened == []:
            # A sender, of which everything was taken while it waited.
            assert error is None
            return
        taken = list(happened or [])
        closed = error is not None
        if task.way.startswith("select") and value is not None:
            closed = value.closed
            value = value.item
        while not (taken and task.way != "receive_many") and len(taken) < 3 and (item := self.model.take()) is not None:
            taken.append(item)
            if task.way != "receive_many":
                break
        if taken:
            assert not closed
            assert (value if task.way == "receive_many" else [value]) == taken
            self.out += taken
        else:
            assert closed
            assert self.over
            assert self.state.broken or not self.model.handed

    def park(self, task: Task, happened: list[int] | None) -> None:
        """Let the model wait, too."""
        self.parked.append(task)
        if task.items:
            assert not self.over
            while self.model.put(task.items[0]):
                task.items.pop(0)
                assert task.items, "it had nothing to wait for"
            self.model.senders.append((task, task.items[0]))
        else:
            assert not happened
            assert self.model.take() is None
            assert not (self.over and (self.state.broken or not self.model.handed))
            self.model.receivers.append(task)

    # Without waiting

    @rule(way=st.sampled_from(sorted(NOWAIT_SENDING)))
    def send_nowait(self, way: str) -> None:
        [item] = self.new_items(1)
        if self.over:
            with pytest.raises(
                BrokenResourceError if self.state.broken and not self.state.closed else ClosedResourceError
            ):
                NOWAIT_SENDING[way](self.sender, item)
            return
        accepted = self.model.put(item)
        try:
            NOWAIT_SENDING[way](self.sender, item)
        except WouldBlock:
            assert not accepted
        else:
            assert accepted

    @rule(way=st.sampled_from(sorted(NOWAIT_RECEIVING)))
    def receive_nowait(self, way: str) -> None:
        expected = self.model.take()
        ended = self.over and (self.state.broken or not self.model.handed)
        try:
            item = NOWAIT_RECEIVING[way](self.receiver)
        except WouldBlock:
            assert expected is None
            assert not ended
        except (EndOfStream, ClosedResourceError):
            assert expected is None
            assert ended
        else:
            # A select tells of the end by its case.
            assert item == expected
            if item is None:
                assert ended
            else:
                self.out.append(item)

    @rule(chance=st.integers(0, 3))
    def drain(self, chance: int) -> None:
        if chance:
            return
        expected = [self.model.items.popleft() for _ in range(self.model.free())]
        self.model.refill()
        assert self.channel.drain() == expected
        self.out += expected

    # Those who wait

    @precondition(lambda self: self.parked)
    @rule(data=st.data())
    def run_task(self, data: st.DataObject) -> None:
        """Let a parked task that was woken run."""
        woken = [task for task in self.parked if task.waiter is not None and task.waiter.done()]
        if not woken:
            return
        task = data.draw(st.sampled_from(woken))
        self.parked.remove(task)
        if error_of(task) is not None:
            self.advance(task, None)
        elif task.items:
            task.items.pop(0)
            self.advance(task, None if task.items else [])
        else:
            self.advance(task, [self.model.redeem(task)])

    @precondition(lambda self: self.parked)
    @rule(data=st.data(), later=st.booleans())
    def cancel_task(self, data: st.DataObject, *, later: bool) -> None:
        """Cancel a parked task: before it was woken, or in the tick in which it was."""
        self.cancel(data.draw(st.sampled_from(self.parked)), later=later)

    @rule(sends=st.booleans(), count=st.integers(2, 4))
    def leave_dead_entries(self, *, sends: bool, count: int) -> None:
        """Let several wait, and cancel all but the last."""
        before = list(self.parked)
        self.start(sends=sends, sending="send", receiving="receive", count=count)
        for task in [task for task in self.parked if task not in before][:-1]:
            self.cancel(task, later=False)

    def cancel(self, task: Task, *, later: bool) -> None:
        assert task.waiter is not None
        self.parked.remove(task)
        woken = task.waiter.done()
        if not woken:
            self.model.receivers = [other for other in self.model.receivers if other is not task]
            self.model.senders = [other for other in self.model.senders if other[0] is not task]
            task.waiter.cancel()
            if later:
                # Others come first, and clear the dead entry away or not.
                (self.state.senders if task.items else self.state.receivers).any_live()
        elif task in self.model.handed:
            self.model.release(task)
        try:
            task.steps.throw(Cancelled())
        except Cancelled:
            # The last item of a sender was not taken.
            assert not (woken and task.items and error_of(task) is None and len(task.items) == 1)
        except StopIteration:
            assert woken
            assert len(task.items) == 1

    @precondition(lambda self: not self.over)
    @rule(broken=st.booleans(), chance=st.integers(0, 20))
    def close(self, *, broken: bool, chance: int) -> None:
        """Close either side: all who wait are told."""
        if chance:
            return
        if broken:
            self.state.close_receiver(())
        else:
            self.channel.close()
        self.over = True
        self.model.capacity = -1
        self.model.overflow = "block"
        if broken or not self.model.handed:
            for task in self.model.receivers:
                assert error_of(task) is (ClosedResourceError if broken else EndOfStream)
            self.model.receivers.clear()
        for task, _item in self.model.senders:
            assert error_of(task) is (BrokenResourceError if broken else ClosedResourceError)
        self.model.senders.clear()

    @invariant()
    def agrees(self) -> None:
        """Check the invariants at the head of the state's module, in their order."""
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
        assert all(error_of(task) is None for task in model.handed if isinstance(task, Task))


def error_of(task: Task) -> Any:
    """Give what a task was woken with: None for success."""
    assert task.waiter is not None
    outcome = task.waiter.outcome
    return outcome[1] if isinstance(outcome, tuple) else outcome


ChannelMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=40)
TestChannelMachine = ChannelMachine.TestCase

REFILL = "if state.senders:\n                            state.refill()"

# Where a transition stands in line, for speed: each copy, with what would break it.
MUTANTS: list[tuple[Any, Any, str, str, str]] = [
    (_ends, Receiving, "__anext__", " and not state.senders", ""),
    (_ends, Receiving, "receive", "if senders:\n                    state.refill()", "pass"),
    (_ends, Receiving, "receive", "if state.buffer:", "if False:"),
    (_ends, Receiving, "receive", "if not sender.done():", "if True:"),
    (_ends, Receiving, "receive", "    state.reserved -= 1", "    pass"),
    (_ends, Receiving, "_try", "if state.senders:\n                state.refill()", "pass"),
    (_ends, Receiving, "_try", "len(state.buffer) > state.reserved", "len(state.buffer)"),
    (_ends, Receiving, "_receive_at_once", "if state.can_take() or state.over():", "if True:"),
    (
        _ends,
        Sending,
        "send",
        "if receivers:\n                    state.put(item)\n                    return",
        "pass",
    ),
    (_ends, Sending, "send", "if not receiver.done():", "if True:"),
    (_ends, Sending, "send", "state.reserved += 1", "pass"),
    (_ends, Sending, "send", "len(state.buffer) - state.reserved < state.room", "len(state.buffer) < state.room"),
    (_ends, Sending, "send_nowait", " and not state.takers", ""),
    (_select, _select, "select", REFILL, "pass"),
    (_select, _select, "select", "len(state.buffer) > state.reserved and", "len(state.buffer) and"),
    (_state, ChannelState, "take", "if self.senders:\n                self.refill()", "pass"),
    (_state, ChannelState, "refill", "< self.room", "<= self.room"),
    (_state, ChannelState, "release", "self.reserved -= 1", "pass"),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "owner", "name", "old", "new"), MUTANTS, ids=[f"{row[2]}-{number}" for number, row in enumerate(MUTANTS)]
)
def test_the_machine_finds_each_mutant(
    module: Any, owner: Any, name: str, old: str, new: str, *, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newcomer that overtakes, an item that is lost, a waiter that is forgotten: a check that can't fail is none."""
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    old, new = (
        "\n".join(textwrap.dedent(line) if number == 0 else line for number, line in enumerate(text.split("\n")))
        for text in (old, new)
    )
    if owner is not module:
        old = old.replace("\n    ", "\n")
    assert source.count(old) == 1
    namespace = dict(vars(module))
    exec(compile(source.replace(old, new), f"<mutant of {name}>", "exec"), namespace)  # noqa: S102 -- of our own source
    mutant = namespace[name]
    monkeypatch.setattr(owner, name, mutant)
    if owner is _select:
        monkeypatch.setitem(globals(), name, mutant)
    with pytest.raises(Exception):  # noqa: B017, PT011 -- whatever goes wrong first
        run_state_machine_as_test(
            ChannelMachine, settings=settings(max_examples=4000, stateful_step_count=60, phases=[Phase.generate])
        )
