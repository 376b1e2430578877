"""Channels and their two kinds of ends: Go's `chan`, `chan<-` and `<-chan`."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self, TypeVar, cast

from anyio import EndOfStream, WouldBlock
from anyio.abc import ObjectReceiveStream, ObjectSendStream

from chanflow._channel._state import NOTHING, Answer, ChannelState, ChannelStatistics, ClosedEnd, HandedItem, Overflow
from chanflow._channel._threads import ThreadChannel, open_from_thread
from chanflow._check import check_count, check_seconds, show
from chanflow._loop._home import NOWHERE, TIMED_OUT, Home, Waiter
from chanflow._loop._wait import Outcome

__all__ = ["Channel", "ReceiveChannel", "SendChannel"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)


class Waiters(list[Waiter]):
    """The waiters of one end, possibly with some that are done."""

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
    """The common base of channels and their ends."""

    _state: ChannelState[Any]
    # What operations act on: the state, or once this end is closed, a `ClosedEnd` that refuses them.
    _open: ChannelState[Any]
    # The waiters to wake when this end is closed; None for a channel, whose closing wakes all waiters anyway.
    _waiters: Waiters | None = None

    def __init__(self, state: ChannelState[Any]) -> None:
        self._state = self._open = state

    @property
    def name(self) -> str | None:
        """The name of the channel, as used in its errors and log messages."""
        return self._state.name

    @property
    def capacity(self) -> float:
        """How many items the channel buffers: 0 for a rendezvous, `math.inf` for an unbounded buffer."""
        return self._state.capacity

    def __len__(self) -> int:
        """Return how many items can be received from the buffer without waiting."""
        return self._state.count_free()

    def __bool__(self) -> bool:
        """Return True even if the channel is empty, so that `if channel:` tests for None."""
        return True

    def __repr__(self) -> str:
        state = self._state
        named = "" if state.name is None else f" {show(state.name)}"
        closed = " closed" if state.closed else " broken" if state.broken else ""
        return f"<{type(self).__name__}{named} {len(self)}/{state.capacity}{closed} at {id(self):#x}>"

    def statistics(self) -> ChannelStatistics:
        """Return the numbers of items, ends and waiting tasks, and totals since the channel was created."""
        return self._state.statistics()


class Sending(Side, ObjectSendStream[T_contra]):
    """The sending half of a channel."""

    _open: ChannelState[T_contra]

    async def send(self, item: T_contra) -> None:  # noqa: C901, PLR0911 -- saves a frame for each item
        """Send one item, waiting for room.

        Args:
            item: any object; passed by reference, never copied.

        Raises:
            ClosedResourceError: this end or the channel was closed, before or while waiting.
            BrokenResourceError: all receivers were closed, before or while waiting.
            RuntimeError: the channel belongs to another event loop.

        Cancellation:
            Atomic: if the call is cancelled, the item was not delivered. Once the item has been taken, the
            call returns normally, and a cancellation that came too late is delivered at the next checkpoint.
            A send that does not have to wait is only occasionally a checkpoint,
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
            # `put` inlined: a call would cost a tenth of the time of a rendezvous.
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
        """Try to send, for the cases that `send` doesn't handle itself: threads, closed ends and a used-up budget.

        Returns False if the caller has to wait.
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
        """Send one item if that is possible without waiting.

        Args:
            item: any object; passed by reference, never copied.

        Raises:
            WouldBlock: there is no room, and no receiver is waiting.
            ClosedResourceError: this end or the channel is closed.
            BrokenResourceError: all receivers are closed.
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
        """Send items in order, waiting for room as often as needed.

        Args:
            items: any iterable, which is exhausted before the first item is sent. A `collections.deque` is used
                directly, and each item is removed from its left end when it is delivered: however the call ends,
                the deque then contains exactly the items that were not delivered.

        Raises:
            ClosedResourceError: this end or the channel was closed, before or while waiting.
            BrokenResourceError: all receivers were closed, before or while waiting.
            RuntimeError: the channel belongs to another event loop.

        Cancellation:
            Not atomic: if the call is cancelled, some of the first items may have been delivered. Pass a deque to find
            out which were not.
        """
        state = self._open
        pending = items if isinstance(items, deque) else deque(items)
        home = await state.arrive()
        if not pending or state.can_put():
            await state.spend(home)
        while True:
            # This end may have been closed in the meantime.
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

    async def receive(self) -> T_co:  # noqa: C901 -- saves a frame for each item
        """Receive the next item, waiting for one.

        Returns:
            The oldest item in the channel.

        Raises:
            EndOfStream: the channel is closed, and no items are left in it.
            ClosedResourceError: this end was closed, before or while waiting.
            RuntimeError: the channel belongs to another event loop.

        Cancellation:
            Atomic: if the call is cancelled, no item was taken. The item is still in the channel, or goes to the next
            receiver. A receive that does not have to wait is only occasionally a checkpoint,
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
            # `take` inlined: a call would cost a tenth of the time of a rendezvous.
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
        """Try to receive, for the cases that `receive` doesn't handle itself: threads, closed ends, a used-up budget.

        Returns `NOTHING` if the caller has to wait.
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
        # The fast path of `receive`, inlined: another coroutine for each item would make iteration the slower way.
        state = self._open
        home = state.home
        if len(state.buffer) > state.reserved and not state.senders and next(home.turns, None) is home.loop:
            return state.buffer.popleft()
        try:
            return await self.receive()
        except EndOfStream:
            raise StopAsyncIteration from None

    def receive_nowait(self) -> T_co:
        """Receive the next item if that is possible without waiting.

        Returns:
            The oldest item in the channel.

        Raises:
            WouldBlock: there is no item to receive.
            EndOfStream: the channel is closed, and no items are left in it.
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
        """Receive a batch: wait for the first item, then take what is available.

        Args:
            max_items: the maximum size of the batch, at least 1.
            max_wait: None to return as soon as the batch has an item; otherwise the number of seconds to continue
                collecting after the first item, unless the batch is full sooner. At least 0.

        Returns:
            Between 1 and `max_items` items, in order.

        Raises:
            EndOfStream: the channel is closed, and no items are left in it.
            ClosedResourceError: this end was closed, before or while waiting for the first item.
            ValueError: `max_items` is less than 1, or `max_wait` less than 0.
            TypeError: `max_items` is not an int.
            RuntimeError: the channel belongs to another event loop.

        Cancellation:
            Atomic: if the call is cancelled, no items were taken. Those already collected return to the head of the
            channel, or go to the next receivers.
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
                # No more items will be added to this batch.
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
            if outcome is None or type(outcome) is HandedItem:
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

    # The `Selectable` protocol, which is documented in `_select`.

    def _ready(self, home: Home) -> bool:
        state = self._open
        if state.home is not home:
            state.check()
        return state.can_take() or state.over()

    def _try(self, home: Home | None) -> T_co | Answer:
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

    def _redeem(self, outcome: Outcome | HandedItem) -> T_co:
        return cast("T_co", self._state.redeem_outcome(outcome))

    def _release(self, outcome: Outcome) -> bool:
        if outcome is None:
            self._state.release()
        return True


class Channel(Sending[T], Receiving[T]):
    """A queue between tasks that can be closed and used in `select`: Go's channel.

    Any number of tasks may send and receive. Items are received in the order in which they were sent, and
    waiting tasks are served in the order in which they began to wait. A channel belongs to the event loop in which a
    task first waited on it; threads and other loops use it through `from_thread`.

    The channel has the methods of both of its ends. Pass `sender` or `receiver` to a task that
    should only send or only receive. As in Go, closing is for the sending side: items in the channel can still be
    received. Items that are never received stay in the channel for `drain`; if the last receiver
    leaves some behind, a warning is logged.

    Args:
        capacity: how many items may wait in the channel: 0 for a rendezvous, where a send waits for its
            receiver; n for a buffer of n items; `math.inf` for an unbounded buffer. At least 0.
        name: for error and log messages.
        overflow: what sending to a full channel does: "block" waits for room, "drop_newest" drops the item
            that is being sent, "drop_oldest" drops the oldest item in the channel. The statistics
            count dropped items.

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
        """Whether the channel is closed for sending. There may still be items to receive."""
        return self._state.closed

    def close(self) -> None:
        """Close the channel for sending, together with all its sending ends; Go's `close`.

        Items in the channel can still be received; after them, receivers get EndOfStream. Waiting senders get
        ClosedResourceError. Closing again has no effect.

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
        """Take all buffered items, without waiting.

        This works on an open, a closed and a broken channel. It makes room for waiting senders.

        Returns:
            The items in order; the list may be empty.

        Raises:
            RuntimeError: the channel belongs to another event loop.
        """
        self._state.check()
        return self._state.drain()

    def from_thread(self) -> ThreadChannel[T]:
        """Return an object through which threads use this channel, with the same capacity and order.

        Call it in the event loop in which the channel is used, then pass the result to the threads.

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
    """The common base of the two kinds of ends. Each clone is closed separately."""

    def __init__(self, state: ChannelState[Any]) -> None:
        super().__init__(state)
        self._waiters = Waiters()

    def clone(self) -> Self:
        """Create another end of the same kind. A side of the channel is closed when its last end is closed.

        Raises:
            ClosedResourceError: this end is closed.
            RuntimeError: the channel belongs to another event loop.
        """
        self._open.check()
        self._count_clone()
        return type(self)(self._state)

    def close(self) -> None:
        """Close this end. Operations that wait on it get ClosedResourceError. Closing again has no effect.

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
    """The sending end of a channel, Go's `chan<-`; the counterpart of anyio's `MemoryObjectSendStream`.

    Close each clone, preferably with `with`: the channel is closed when the last one is. An end that is
    garbage collected without being closed issues a ResourceWarning, unless the channel as a whole was closed.
    """

    def _count_clone(self) -> None:
        self._state.open_senders += not self._state.closed

    def _close_side(self) -> None:
        self._state.close_sender(self._waiters or ())

    def __del__(self) -> None:
        if self._open is self._state and not self._state.closed:
            self._warn_unclosed()


class ReceiveChannel(End, Receiving[T_co]):
    """The receiving end of a channel, Go's `<-chan`; the counterpart of anyio's `MemoryObjectReceiveStream`.

    Close each clone, preferably with `with`: senders get BrokenResourceError when the last one is closed.
    An end that is garbage collected without being closed issues a ResourceWarning, unless the channel was closed and
    drained. Items that were not received stay in the channel for `Channel.drain`, and their number is logged.
    """

    def _count_clone(self) -> None:
        self._state.open_receivers += 1

    def _close_side(self) -> None:
        self._state.close_receiver(self._waiters or ())

    def __del__(self) -> None:
        state = self._state
        # Nothing is missed if the channel was closed and everything received.
        if self._open is state and not state.broken and not (state.closed and not len(state.buffer)):
            self._warn_unclosed()
