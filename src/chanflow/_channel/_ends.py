"""Channels and their two kinds of ends: Go's `chan`, `chan<-` and `<-chan`."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from anyio import EndOfStream, WouldBlock
from anyio.abc import ObjectReceiveStream, ObjectSendStream

from chanflow._channel._state import NOTHING, Answer, ChannelState, ChannelStatistics, ClosedEnd, Delivery, Overflow
from chanflow._channel._threads import ThreadChannel, open_from_thread
from chanflow._check import check_count, check_seconds, show
from chanflow._loop._home import NOWHERE, TIMED_OUT, Home, Waiter
from chanflow._loop._wait import Outcome

__all__ = ["Channel", "ReceiveChannel", "SendChannel"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)


class Waiters(list[Waiter]):
    """Those who wait, and some who have done so."""

    __slots__ = ("_most",)

    def __init__(self) -> None:
        super().__init__()
        self._most = 8

    def append(self, waiter: Waiter) -> None:
        if len(self) >= self._most:
            self[:] = [other for other in self if not other.done()]
            self._most = 2 * len(self) + 8
        super().append(waiter)


class Side:
    """What channels and their ends have in common."""

    _state: ChannelState[Any]
    # What operations go to: the state, or from this end's closing on something that refuses them.
    _open: ChannelState[Any]
    # Those who wait on this end, for its closing; a channel as such ends their waiting all at once.
    _waiters: Waiters | None = None

    def __init__(self, state: ChannelState[Any]) -> None:
        self._state = self._open = state

    @property
    def name(self) -> str | None:
        """The name given to the channel, which its errors use."""
        return self._state.name

    @property
    def capacity(self) -> float:
        """How many items the channel buffers: 0 for a rendezvous, `math.inf` for no bound."""
        return self._state.capacity

    def __len__(self) -> int:
        """Count the items that could be received at once from the buffer."""
        return self._state.count_free()

    def __bool__(self) -> bool:
        """Be true even when empty: `if channel:` asks whether there is one."""
        return True

    def __repr__(self) -> str:
        state = self._state
        named = "" if state.name is None else f" {show(state.name)}"
        closed = " closed" if state.closed else " broken" if state.broken else ""
        return f"<{type(self).__name__}{named} {len(self)}/{state.capacity}{closed} at {id(self):#x}>"

    def statistics(self) -> ChannelStatistics:
        """Count items, ends and waiting tasks, and totals since the channel was made."""
        return self._state.statistics()


class Sending(Side, ObjectSendStream[T_contra]):
    """The sending half of a channel."""

    _open: ChannelState[T_contra]

    async def send(self, item: T_contra) -> None:  # noqa: C901, PLR0911 -- one frame less for each item is worth it
        """Send one item, waiting for room.

        Args:
            item: any object; handed over by reference, never copied.

        Raises:
            ClosedResourceError: this end or the channel was closed, before or while waiting.
            BrokenResourceError: every receiver is closed, before or while waiting.
            RuntimeError: the channel belongs to another event loop.

        Cancellation:
            Atomic: if the call is cancelled, the item was not delivered. Once the item was taken, the
            call returns normally, and a cancellation that came too late arrives at the next checkpoint.
            A send that need not wait is a checkpoint only every so often,
            see :func:`set_checkpoint_interval`.

        Source:
            Go, runtime/chan.go, chansend.
        """
        state = self._open
        home = state.home
        receivers = state.takers
        if len(state.buffer) - state.reserved < state.room:
            if next(home.turns, None) is home.loop:
                if receivers:
                    state.put(item)
                    return
                state.buffer.append(item)
                state.sent += 1
                return
            if await self._send_at_once(item):
                return
            home = state.home
        elif receivers:
            # As `put` does, in line: a tenth of the time of a rendezvous.
            if next(home.turns, None) is home.loop:
                while receivers:
                    receiver = receivers.popleft()[0]
                    if not receiver.done():
                        state.buffer.append(item)
                        state.sent += 1
                        state.reserved += 1
                        receiver.set_result(None)
                        return
            if await self._send_at_once(item):
                return
            home = state.home
        elif state.special or home.running() is not home.loop:
            if await self._send_at_once(item):
                return
            home = state.home
        home.rest()
        waiter = home.waiter()
        state.senders.append((waiter, self, item))
        if self._waiters is not None:
            self._waiters.append(waiter)
        if state.bridge is not None:
            state.bridge.sender_parked()
        try:
            outcome = await waiter
        except BaseException as exc:
            if state.leave_senders(waiter, home, exc) and home.defer_cancellation(exc):
                return
            raise
        if outcome is not None:
            raise state.error(outcome)

    async def _send_at_once(self, item: T_contra) -> bool:
        """Send where more has to be looked at than room and receivers, or it is time to yield.

        False means that it must wait.
        """
        state = self._open
        home = await state.arrive()
        if state.can_put():
            await state.spend(home)
            self._open.enter()
            if state.put(item):
                return True
        state.settle(home)
        return False

    def send_nowait(self, item: T_contra) -> None:
        """Send one item if that needs no waiting.

        Args:
            item: any object; handed over by reference, never copied.

        Raises:
            WouldBlock: there is no room, and no receiver is waiting.
            ClosedResourceError: this end or the channel is closed.
            BrokenResourceError: every receiver is closed.
            RuntimeError: the channel belongs to another event loop.
        """
        state = self._open
        home = state.home
        if home is not NOWHERE and home.running() is not home.loop:
            state.check()
        if len(state.buffer) - state.reserved < state.room and not state.takers:
            state.buffer.append(item)
            state.sent += 1
        elif not state.put(item):
            raise WouldBlock

    async def send_many(self, items: Iterable[T_contra]) -> None:
        """Send items in their order, waiting for room as often as needed.

        Args:
            items: any iterable, which is read to its end first. A `collections.deque` is used as it is, and
                loses from its left each item that was delivered: whatever ends the call,
                it then holds just those that were not.

        Raises:
            ClosedResourceError: this end or the channel was closed, before or while waiting.
            BrokenResourceError: every receiver is closed, before or while waiting.
            RuntimeError: the channel belongs to another event loop.

        Cancellation:
            If the call is cancelled, a first part of the items, maybe none, was delivered. Pass a deque to know which.
        """
        state = self._open
        pending = items if isinstance(items, deque) else deque(items)
        home = await state.arrive()
        if not pending or state.can_put():
            await state.spend(home)
        while True:
            # This end may have been closed meanwhile.
            self._open.enter()
            state.check_sending()
            count = len(pending)
            state.put_many(pending)
            home.charge(count - len(pending))
            if not pending:
                return
            state.settle(home)
            waiter = home.waiter()
            state.senders.append((waiter, self, pending[0]))
            if self._waiters is not None:
                self._waiters.append(waiter)
            if state.bridge is not None:
                state.bridge.sender_parked()
            try:
                outcome = await waiter
            except BaseException as exc:
                if state.leave_senders(waiter, home, exc):
                    pending.popleft()
                    if not pending and home.defer_cancellation(exc):
                        return
                raise
            if outcome is not None:
                raise state.error(outcome)
            pending.popleft()
            if not pending:
                return


class Receiving(Side, ObjectReceiveStream[T_co]):
    """The receiving half of a channel."""

    _open: ChannelState[T_co]

    async def receive(self) -> T_co:  # noqa: C901 -- one frame less for each item is worth it
        """Receive the next item, waiting for one.

        Returns:
            The item that has been in the channel for the longest time.

        Raises:
            EndOfStream: the channel is closed, and nothing is left in it.
            ClosedResourceError: this end was closed, before or while waiting.
            RuntimeError: the channel belongs to another event loop.

        Cancellation:
            Atomic: if the call is cancelled, it took nothing. The item is still in the channel, or with the next
            receiver. A receive that need not wait is a checkpoint only every so often,
            see :func:`set_checkpoint_interval`.

        Source:
            Go, runtime/chan.go, chanrecv.
        """
        state = self._open
        home = state.home
        senders = state.senders
        received: T_co | Answer
        if len(state.buffer) > state.reserved:
            if next(home.turns, None) is home.loop:
                item = state.buffer.popleft()
                if senders:
                    state.refill()
                return item
            received = await self._receive_at_once()
        elif senders:
            # As `take` does, in line: a tenth of the time of a rendezvous.
            if next(home.turns, None) is home.loop:
                while senders:
                    sender, _end, item = senders.popleft()
                    if not sender.done():
                        if state.buffer:
                            state.buffer.append(item)
                            item = state.buffer.popleft()
                        state.sent += 1
                        sender.set_result(None)
                        return item
            received = await self._receive_at_once()
        elif state.special or home.running() is not home.loop:
            received = await self._receive_at_once()
        else:
            received = NOTHING
        if received is not NOTHING:
            return cast("T_co", received)
        home = state.home
        home.rest()
        waiter: Any = home.waiter()
        place = state.place(waiter) if home.shuffles else waiter
        state.receivers.append((place, self))
        if self._waiters is not None:
            self._waiters.append(place)
        try:
            outcome = await waiter
        except BaseException as exc:
            state.leave_receivers(waiter, home, exc)
            raise
        if outcome is not None or state.special:
            return state.redeem_outcome(outcome)
        state.reserved -= 1
        return state.buffer.popleft()

    async def _receive_at_once(self) -> T_co | Answer:
        """Receive where more has to be looked at than items and senders, or it is time to yield.

        `NOTHING` means that it must wait.
        """
        state = self._open
        home = await state.arrive()
        if state.can_take() or state.over():
            await state.spend(home)
            self._open.enter()
            if state.can_take():
                return state.take()
            state.check_receiving()
        state.settle(home)
        return NOTHING

    async def __anext__(self) -> T_co:
        # The quick path of `receive`, again: one more coroutine for each item would make iteration the slower way.
        state = self._open
        home = state.home
        if len(state.buffer) > state.reserved and not state.senders and next(home.turns, None) is home.loop:
            return state.buffer.popleft()
        try:
            return await self.receive()
        except EndOfStream:
            raise StopAsyncIteration from None

    def receive_nowait(self) -> T_co:
        """Receive the next item if that needs no waiting.

        Returns:
            The item that has been in the channel for the longest time.

        Raises:
            WouldBlock: there is nothing to receive now.
            EndOfStream: the channel is closed, and nothing is left in it.
            ClosedResourceError: this end is closed.
            RuntimeError: the channel belongs to another event loop.
        """
        state = self._open
        home = state.home
        if home is not NOWHERE and home.running() is not home.loop:
            state.check()
        if state.can_take():
            return state.take()
        state.check_receiving()
        raise WouldBlock

    async def receive_many(self, max_items: int, *, max_wait: float | None = None) -> list[T_co]:
        """Receive a batch: wait for one item, then take what is there.

        Args:
            max_items: the most items to receive, at least 1.
            max_wait: None to return what there is as soon as there is anything; else for how many seconds, from the
                first item on, to go on collecting until the batch is full. At least 0.

        Returns:
            From 1 to `max_items` items, in their order.

        Raises:
            EndOfStream: the channel is closed, and nothing is left in it.
            ClosedResourceError: this end was closed, before or while waiting for the first item.
            ValueError: `max_items` is less than 1, or `max_wait` less than 0.
            TypeError: `max_items` is not an int.
            RuntimeError: the channel belongs to another event loop.

        Cancellation:
            Atomic: if the call is cancelled, it took nothing. What it collected is back at the head of the channel, or
            with the next receivers.
        """
        check_count("max_items", max_items, 1)
        if max_wait is not None:
            check_seconds("max_wait", max_wait)
        state = self._open
        home = await state.arrive()
        if state.can_take() or state.over():
            await state.spend(home)
            self._open.enter()
        batch = state.take_many(max_items)
        deadline = None
        while len(batch) < max_items:
            if not batch:
                state.check_receiving()
            elif max_wait is None or state.closed or state.broken or self._open is not state:
                # What it has is all that it gets.
                break
            elif deadline is None:
                deadline = home.time() + max_wait
            state.settle(home)
            waiter = home.waiter()
            place = state.place(waiter)
            state.receivers.append((place, self, batch) if batch else (place, self))
            if self._waiters is not None:
                self._waiters.append(place)
            held = len(batch)
            state.held += held
            try:
                outcome = await home.wait(waiter, deadline)
            except BaseException as exc:
                state.held -= held
                state.restore(batch)
                state.leave_receivers(waiter, home, exc)
                raise
            state.held -= held
            if outcome is None or type(outcome) is Delivery:
                batch.append(state.redeem() if outcome is None else outcome.item)
                if self._open is state:
                    batch += state.take_many(max_items - len(batch))
            elif outcome is TIMED_OUT:
                state.receivers.leave()
                break
            elif not batch:
                raise state.error(outcome)
            else:
                break
        home.charge(len(batch) - 1)
        state.end_if_over()
        return batch

    # How `select` does it: see `Selectable` there.

    def _ready(self, home: Home) -> bool:
        state = self._open
        if state.home is not home:
            state.check()
        return state.can_take() or state.over()

    def _attempt(self, home: Home | None) -> T_co | Answer:
        state = self._open
        if state.home is not home:
            state.check()
        if len(state.buffer) > state.reserved and state.ledger is None:
            item = state.buffer.popleft()
            if state.senders:
                state.refill()
            return item
        if state.can_take():
            return state.take()
        state.check_receiving()
        return NOTHING

    def _join(self, waiter: Waiter, home: Home) -> None:
        state = self._open
        state.home = home
        place = state.place(waiter)
        state.receivers.append((place, self))
        if self._waiters is not None:
            self._waiters.append(place)

    def _leave(self) -> None:
        self._state.receivers.leave()

    def _redeem(self, outcome: Outcome | Delivery) -> T_co:
        return cast("T_co", self._state.redeem_outcome(outcome))

    def _release(self, outcome: Outcome) -> bool:
        if outcome is None:
            self._state.release()
        return True


class Channel(Sending[T], Receiving[T]):
    """A queue between tasks that can be waited on, closed and selected on: Go's channel.

    Any number of tasks may send and receive. Items come out in the order in which they went in, and
    tasks are served in the order in which they came to wait. A channel belongs to the event loop that first waited on
    it; threads and other loops reach it through `from_thread`.

    The channel itself can do all that its two ends can. Hand out `sender` or `receiver` where a task
    should only send or only receive. Closing is for the sending side, as in Go: what is in the channel is still
    received. Items that nobody receives stay in the channel for `drain`; the log tells when the last receiver
    leaves some behind.

    Args:
        capacity: how many items may wait in the channel: 0 for a rendezvous, where a send waits for its
            receiver; n for a buffer of n; `math.inf` for no bound. At least 0.
        name: for errors and logs.
        overflow: what sending into a full channel does: "block" waits for room, "drop_newest" drops the item
            that is being sent, "drop_oldest" the one that has waited for longest. The statistics
            count what was dropped.

    Raises:
        ValueError: `capacity` is negative, or 0 with "drop_oldest"; `overflow` is unknown.
        TypeError: `capacity` is neither an int nor `math.inf`.

    Source:
        Go, runtime/chan.go.
    """

    def __init__(self, capacity: float = 0, name: str | None = None, *, overflow: Overflow = "block") -> None:
        super().__init__(ChannelState(capacity, name, overflow))
        self._sender: SendChannel[T] | None = None
        self._receiver: ReceiveChannel[T] | None = None

    @property
    def sender(self) -> SendChannel[T]:
        """The sending end, Go's `chan<-`; the same object each time."""
        if self._sender is None:
            self._sender = SendChannel(self._state)
        return self._sender

    @property
    def receiver(self) -> ReceiveChannel[T]:
        """The receiving end, Go's `<-chan`; the same object each time."""
        if self._receiver is None:
            self._receiver = ReceiveChannel(self._state)
        return self._receiver

    @property
    def closed(self) -> bool:
        """Whether it is closed for sending; there may still be items to receive."""
        return self._state.closed

    def close(self) -> None:
        """Close the channel for sending, for all its ends; Go's `close`.

        What is in the channel can still be received, then receivers get EndOfStream. Parked senders get
        ClosedResourceError. Closing again does nothing.

        Raises:
            RuntimeError: the channel belongs to another event loop.
        """
        self._state.check()
        self._state.close()

    async def aclose(self) -> None:
        """Do as `close`.

        Cancellation:
            Not a checkpoint: it always closes.
        """
        self.close()

    def drain(self) -> list[T]:
        """Take what is buffered, without waiting.

        It works on an open, a closed and a broken channel. Parked senders then move into the room that this made.

        Returns:
            The items in their order, maybe none.

        Raises:
            RuntimeError: the channel belongs to another event loop.
        """
        self._state.check()
        return self._state.drain()

    def from_thread(self) -> ThreadChannel[T]:
        """Give access to this channel from threads, with the same capacity and order.

        Call it in the event loop that the channel is used in, then hand the result to the threads.

        Raises:
            RuntimeError: called outside of asyncio and trio, or the channel belongs to another event loop.
        """
        return open_from_thread(self._state)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


class End(Side):
    """What the two kinds of ends have in common: each clone is closed for itself."""

    def __init__(self, state: ChannelState[Any]) -> None:
        super().__init__(state)
        self._waiters = Waiters()

    def clone(self) -> Self:
        """Make another end of the same kind; the channel's side closes when its last end is closed.

        Raises:
            ClosedResourceError: this end is closed.
            RuntimeError: the channel belongs to another event loop.
        """
        self._open.check()
        self._count_clone()
        return type(self)(self._state)

    def close(self) -> None:
        """Close this end; operations waiting on it get ClosedResourceError. Closing again does nothing.

        Raises:
            RuntimeError: the channel belongs to another event loop.
        """
        if self._open is self._state:
            self._state.check()
            self._open = cast("ChannelState[Any]", ClosedEnd(self._state))
            self._close_side()

    async def aclose(self) -> None:
        """Do as `close`.

        Cancellation:
            Not a checkpoint: it always closes.
        """
        self.close()

    def _count_clone(self) -> None:
        raise NotImplementedError

    def _close_side(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _warn_unclosed(self) -> None:
        message = f"Unclosed <{type(self).__name__} of {self._state} at {id(self):#x}>"
        warnings.warn(message, ResourceWarning, stacklevel=2, source=self)


class SendChannel(End, Sending[T_contra]):
    """The sending end of a channel, Go's `chan<-`; takes the place of anyio's `MemoryObjectSendStream`.

    Close each clone, best with `with`: the channel closes when the last one is closed. One that is
    forgotten open gives a ResourceWarning, unless the channel was closed as a whole.
    """

    def _count_clone(self) -> None:
        self._state.open_senders += not self._state.closed

    def _close_side(self) -> None:
        self._state.close_sender(self._waiters or ())

    def __del__(self) -> None:
        if self._open is self._state and not self._state.closed:
            self._warn_unclosed()


class ReceiveChannel(End, Receiving[T_co]):
    """The receiving end of a channel, Go's `<-chan`; takes the place of anyio's `MemoryObjectReceiveStream`.

    Close each clone, best with `with`: senders get BrokenResourceError when the last one is closed.
    One that is forgotten open gives a ResourceWarning, unless the channel was closed and drained. What was not
    received stays in the channel for `Channel.drain`, and the log tells how much that is.
    """

    def _count_clone(self) -> None:
        self._state.open_receivers += 1

    def _close_side(self) -> None:
        self._state.close_receiver(self._waiters or ())

    def __del__(self) -> None:
        state = self._state
        # Where everything was sent and received, nobody misses anything.
        if self._open is state and not state.broken and not (state.closed and not len(state.buffer)):
            self._warn_unclosed()
