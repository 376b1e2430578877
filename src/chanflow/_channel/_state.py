"""The state of a channel, and every transition, as plain methods that never wait.

The items live in the deque of an anyio memory object stream whose own waiting and closing are not used:
waiting tasks are in two waiting rooms here, which `select` shares. A waiter is woken with None when
it may complete its operation, or with the class of the error that ends it.
"""

# Invariants:
# 1. An accepted item is in exactly one place: in the buffer, with the receiver that took it, or counted as dropped.
#    So sent == received + dropped + len(buffer).
# 2. At least one of the two waiting rooms has no live waiter, except when a select both sends and receives here.
# 3. 0 <= reserved <= len(buffer): one reservation for each receiver that was woken and has not run yet. A newcomer
#    takes only items that are not reserved.
# 4. A receiver waits only while every item is reserved, and once the channel is closed, only while some are; a sender
#    waits only while there is no room.
# 5. len(buffer) - reserved <= capacity, except for items that were put back when their receiver was cancelled.
# 6. Items leave in the order in which they were accepted; waiters are served in the order in which they began to wait.

from __future__ import annotations

import math
import sys
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any, Final, Generic, Literal, NamedTuple, NoReturn, Protocol, TypeAlias, TypeVar, cast
from weakref import finalize

from anyio import (
    BrokenResourceError,
    ClosedResourceError,
    EndOfStream,
    create_memory_object_stream,
)
from anyio.streams.memory import MemoryObjectReceiveStream, MemoryObjectSendStream

from chanflow._channel._ledger import Ledger
from chanflow._check import check_count, show
from chanflow._loop._home import NOWHERE, Home, Nowhere, TaskWaiter, Waiter, current_home, withdraw
from chanflow._loop._wait import Outcome, WaitingRoom

__all__ = [
    "NOTHING",
    "SENT",
    "Answer",
    "ChannelState",
    "ChannelStatistics",
    "ClosedEnd",
    "EagerWaiter",
    "HandedItem",
    "Overflow",
]

T = TypeVar("T")
Stream: TypeAlias = tuple[MemoryObjectSendStream[T], MemoryObjectReceiveStream[T]]
Overflow: TypeAlias = Literal["block", "drop_newest", "drop_oldest"]

OVERFLOWS: Final = ("block", "drop_newest", "drop_oldest")
# So low that room made by threads, before it is accounted for, can't raise it above zero.
NO_ROOM: Final = -sys.maxsize
NOBODY: Final[WaitingRoom[Any]] = WaitingRoom()
BARE: Final = 2
"""The length of the entry of a receiver without a partial batch."""

CAUSES: Final[dict[type[Exception], str]] = {
    EndOfStream: "is closed and drained",
    ClosedResourceError: "is closed",
    BrokenResourceError: "has no receiver left",
}


class Answer:
    """Outcome of a case other than an item: not ready, sent, or failed.

    The `error` is the one that the task of a `Result` ended with. Errors of the operation itself, such as EndOfStream
    for a closed and drained channel, are raised instead.
    """

    __slots__ = ("error",)

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


NOTHING = Answer()
SENT = Answer()


class ChannelStatistics(NamedTuple):
    """A snapshot of a channel: the six fields of anyio's statistics, and three totals.

    `sent == received + dropped + current_buffer_used` always holds.
    """

    current_buffer_used: int
    """Items in the channel, including those reserved for receivers that were woken but have not run yet."""
    max_buffer_size: float
    """The capacity."""
    open_send_streams: int
    """Sending ends that are not closed. If none was created, the channel itself counts as one."""
    open_receive_streams: int
    """Receiving ends that are not closed. If none was created, the channel itself counts as one."""
    tasks_waiting_send: int
    tasks_waiting_receive: int
    sent: int
    """Items accepted since the channel was created."""
    received: int
    dropped: int
    """Items dropped by the overflow policy."""


class Buffer(Protocol[T]):
    """The methods used of the deque in the anyio stream."""

    def append(self, item: T, /) -> None: ...
    def extend(self, items: Iterable[T], /) -> None: ...
    def extendleft(self, items: Iterable[T], /) -> None: ...
    def popleft(self) -> T: ...
    def pop(self) -> T: ...
    def __len__(self) -> int: ...


class PublicBuffer(Generic[T]):
    """The buffer of an anyio stream, accessed only through the public methods of the stream."""

    def __init__(self, send: MemoryObjectSendStream[T], receive: MemoryObjectReceiveStream[T]) -> None:
        # The stream stays open as long as this object lives. One that is garbage collected while open warns.
        finalize(self, send.close)
        finalize(self, receive.close)
        self.append = send.send_nowait
        self.popleft = receive.receive_nowait
        self._statistics = receive.statistics

    def extend(self, items: Iterable[T]) -> None:
        for item in items:
            self.append(item)

    def extendleft(self, items: Iterable[T]) -> None:
        later = [self.popleft() for _ in range(len(self))]
        self.extend([*reversed([*items]), *later])

    def pop(self) -> T:
        *others, item = [self.popleft() for _ in range(len(self))]
        self.extend(others)
        return item

    def __len__(self) -> int:
        return self._statistics().current_buffer_used


def reach_buffer(send: MemoryObjectSendStream[T], receive: MemoryObjectReceiveStream[T]) -> Buffer[T]:
    """Return the deque in an anyio stream, or if it can't be found, a `PublicBuffer`.

    The stream's own waiting and closing are not used, so no task needs to be woken when its deque changes. Direct
    access to the deque is what makes a channel faster than `asyncio.Queue`.
    """
    buffer = getattr(getattr(receive, "_state", None), "buffer", None)
    if type(buffer) is not deque:
        return PublicBuffer(send, receive)
    # Only the deque is needed, and a stream that is garbage collected while open warns.
    send.close()
    receive.close()
    return buffer


class HandedItem:
    """The outcome of a waiter that took its item when it was woken."""

    __slots__ = ("item",)

    def __init__(self, item: Any) -> None:
        self.item: Any = item


class EagerWaiter:
    """A waiter whose item is taken when it is woken, not when its task runs.

    On trio, tasks that are woken in one tick run in random order, and would take each other's items. But there, a task
    that was woken can't be cancelled before it runs, so its item may leave the buffer immediately.
    """

    __slots__ = ("_state", "_waiter", "done")

    def __init__(self, state: ChannelState[Any], waiter: Waiter) -> None:
        self._state = state
        self._waiter = waiter
        self.done = waiter.done

    def set_result(self, outcome: Outcome) -> None:
        self._waiter.set_result(HandedItem(self._state.redeem_at_once()) if outcome is None else outcome)


class Bridge(Protocol):
    """The side of a channel that threads use, as its state sees it."""

    def sender_parked(self) -> None:
        """Make sure that a sender that has just parked sees room that threads made."""
        ...

    def closed(self) -> None:
        """Refuse further calls from threads, since one side of the channel was closed."""
        ...

    def end(self) -> None:
        """Wake all waiting threads with an error, since the event loop has ended."""
        ...


class ChannelState(Generic[T]):
    """The state that a channel shares with all its ends."""

    __slots__ = (
        "__weakref__",
        "bridge",
        "broken",
        "buffer",
        "capacity",
        "closed",
        "dropped",
        "held",
        "home",
        "ledger",
        "limit",
        "name",
        "open_receivers",
        "open_senders",
        "overflow",
        "passing",
        "receivers",
        "reserved",
        "room",
        "senders",
        "sent",
        "special",
        "takers",
    )

    buffer: Buffer[T]
    capacity: float
    name: str | None
    overflow: Overflow
    home: Home
    limit: int
    """The capacity as an int."""
    room: int
    """One more item fits while fewer than this many items in the buffer are unreserved."""
    reserved: int
    held: int
    receivers: WaitingRoom[tuple[Waiter, object] | tuple[Waiter, object, object]]
    takers: WaitingRoom[tuple[Waiter, object] | tuple[Waiter, object, object]]
    """The receivers, as senders see them: empty once the channel is closed."""
    senders: WaitingRoom[tuple[Waiter, object, T]]
    passing: bool
    sent: int
    dropped: int
    open_senders: int
    open_receivers: int
    closed: bool
    broken: bool
    ledger: Ledger[T] | None
    """The room and items lent to threads, once they use this channel; and the object to notify of changes."""
    bridge: Bridge | None
    special: bool
    """Whether an operation must check more than items and waiters: threads, closed ends, the overflow policy."""

    def __init__(self, capacity: float, name: str | None, overflow: Overflow) -> None:
        check_count("capacity", capacity, 0, infinite=True)
        if overflow not in OVERFLOWS:
            msg = f"overflow must be one of {', '.join(map(repr, OVERFLOWS))}, got {show(overflow)}"
            raise ValueError(msg)
        if overflow == "drop_oldest" and capacity == 0:
            msg = "capacity must be >= 1 with overflow='drop_oldest', got 0"
            raise ValueError(msg)
        # A subscript, `create_memory_object_stream[T]`, would make this take twice as long.
        stream: Stream[T] = create_memory_object_stream(math.inf)
        self.buffer = reach_buffer(*stream)
        self.capacity = capacity
        self.name = name
        self.overflow = overflow
        self.home = NOWHERE
        self.limit = sys.maxsize if capacity == math.inf else int(capacity)
        # Equal to the limit until a side is closed or threads borrow room.
        self.room = self.limit
        self.reserved = 0
        # Items in partial batches, which are put back if their receivers are cancelled.
        self.held = 0
        # An entry is the waiter and the end it uses; a sender's also has the item, and a receiver's its partial batch
        # if it has one.
        self.receivers = self.takers = WaitingRoom()
        self.senders = WaitingRoom()
        # Whether the receiver that is being woken gets the first reserved item, passed on to it, instead of the last.
        self.passing = False
        self.sent = 0
        self.dropped = 0
        # The channel itself counts as the first end of each side until that end is created.
        self.open_senders = 1
        self.open_receivers = 1
        self.closed = False
        self.broken = False
        self.ledger = None
        self.bridge = None
        self.special = overflow != "block"

    def __str__(self) -> str:
        return f"channel {show(self.name)}" if self.name is not None else f"channel at {id(self):#x}"

    # The event loop it belongs to

    def check(self) -> None:
        """Raise an error if the caller is not in the channel's event loop.

        Raises:
            RuntimeError: the channel belongs to another event loop.
        """
        home = self.home
        if home is NOWHERE or home.here():
            return
        if home.ended():
            self.evict()
        elif home.thread != threading.get_ident() or current_home() is not None:
            msg = (
                f"{self} belongs to another event loop; call channel.from_thread() there, and use here what it returns"
            )
            raise RuntimeError(msg)

    def evict(self) -> None:
        """Forget a home whose event loop has ended, and the tasks that were waiting there."""
        self.home = NOWHERE
        self.special = True
        bridge, self.bridge = self.bridge, None
        self.ledger = None
        for room in (self.receivers, self.senders):
            room.forget(lambda entry: entry[1] is not bridge or bridge is None)
        self.reserved = 0
        if bridge is not None:
            bridge.end()

    def enter(self) -> Home:
        """Return the caller's home, for an operation that may wait."""
        home = self.home
        if home.running() is home.loop:
            return home
        self.check()
        here = current_home()
        if here is None:
            msg = f"{self} was used outside of asyncio and trio"
            raise RuntimeError(msg)
        return here

    async def arrive(self) -> Home:
        """Return the caller's home, for an operation that may wait. `ClosedEnd` overrides this to yield first."""
        return self.enter()

    async def spend(self, home: Home) -> None:
        """Take an operation that need not wait from the budget; if it is used up, yield to the event loop first.

        It must yield before the operation: a cancellation after it would lose or duplicate the item.
        """
        if next(home.turns, None) is None:
            # The task waits for the event loop here, so from now on the channel belongs to it.
            self.home = home
            await home.checkpoint()

    def settle(self, home: Home) -> None:
        """Record that the caller is about to wait, which takes nothing from the budget."""
        self.home = home
        home.rest()

    def place(self, waiter: Waiter) -> Waiter:
        """Return the waiter to put into the waiting room for a receiver."""
        return EagerWaiter(self, waiter) if self.home.shuffles else waiter

    # Sending

    def can_put(self) -> bool:
        """Return whether `put` would accept an item, drop it or raise an error."""
        if (self.takers and self.takers.any_live()) or len(self.buffer) - self.reserved < self.room:
            return True
        if self.ledger is not None:
            self.ledger.recall_room()
        return self.overflow != "block" or self.closed or self.broken or len(self.buffer) - self.reserved < self.room

    def put(self, item: T) -> bool:
        """Accept an item if there is room, a waiting receiver, or an overflow policy; otherwise return False.

        Raises:
            ClosedResourceError: the channel was closed.
            BrokenResourceError: all receivers are closed.
        """
        receivers = self.takers
        while receivers:
            waiter = receivers.popleft()[0]
            if not waiter.done():
                self.buffer.append(item)
                self.sent += 1
                self.reserved += 1
                waiter.set_result(None)
                return True
        if len(self.buffer) - self.reserved < self.room or self._make_room():
            self.buffer.append(item)
            self.sent += 1
            return True
        if self.overflow == "drop_newest":
            self.sent += 1
            self.dropped += 1
            return True
        return False

    def _make_room(self) -> bool:
        """Return whether there is room after recalling what was lent to threads, or dropping the oldest item."""
        self.check_sending()
        if self.ledger is not None:
            self.ledger.recall_room()
            if len(self.buffer) - self.reserved < self.room:
                return True
        if self.overflow != "drop_oldest":
            return False
        if self.ledger is not None:
            # Items reserved for threads must not be dropped.
            self.ledger.recall_items()
        self.buffer.popleft()
        self.dropped += 1
        return True

    def accept(self, items: deque[T]) -> None:
        """Accept items that threads sent into room lent to them, even if there is no other room."""
        while items:
            if self.receivers.any_live():
                self.put(items.popleft())
            else:
                self.sent += len(items)
                self.buffer.extend(items)
                items.clear()

    def put_many(self, items: deque[T]) -> None:
        """Remove items from the left and accept them, as long as there is room or a waiting receiver."""
        while items:
            room = self.room - len(self.buffer) + self.reserved
            if self.takers or room <= 0:
                if not self.put(items[0]):
                    return
                items.popleft()
            elif room < len(items):
                for _ in range(room):
                    self.buffer.append(items.popleft())
                self.sent += room
            else:
                self.buffer.extend(items)
                self.sent += len(items)
                items.clear()

    def check_sending(self) -> None:
        """Raise the error of a sender if the channel is closed or broken."""
        if self.closed:
            raise self.error(ClosedResourceError)
        if self.broken:
            raise self.error(BrokenResourceError)

    def leave_senders(self, waiter: TaskWaiter, home: Home, exc: BaseException) -> bool:
        """Withdraw an interrupted sender; return whether its item had already been taken."""
        taken = withdraw(waiter, home, exc)
        if not taken:
            self.senders.leave()
        return taken

    # Receiving

    def can_take(self) -> bool:
        """Return whether there is an item for a newcomer: in the buffer, or with a parked sender."""
        if self.ledger is not None:
            # From here on, threads don't take items either.
            self.ledger.recall_items()
        return len(self.buffer) > self.reserved or self.senders.any_live()

    def take(self) -> T:
        """Take the next item; call this only after `can_take` returned True."""
        if len(self.buffer) > self.reserved:
            item = self.buffer.popleft()
            if self.senders:
                self.refill()
        else:
            # A rendezvous. The item goes through the buffer, which may contain reserved items that come before it.
            self._admit()
            item = self.buffer.popleft()
        return item

    def take_many(self, max_items: int) -> list[T]:
        """Take up to `max_items` unreserved items, including those of parked senders."""
        batch: list[T] = []
        while (wanted := max_items - len(batch)) and self.can_take():
            if len(self.buffer) == self.reserved:
                self._admit()
            batch += [self.buffer.popleft() for _ in range(min(len(self.buffer) - self.reserved, wanted))]
            self.refill()
        return batch

    def take_behind(self) -> T:
        """Take the first unreserved item, leaving the items before it for the receivers that were woken for them."""
        if len(self.buffer) == self.reserved:
            self._admit()
        reserved = [self.buffer.popleft() for _ in range(self.reserved)]
        item = self.buffer.popleft()
        later = [self.buffer.popleft() for _ in range(len(self.buffer))]
        self.buffer.extend([*reserved, *later])
        self.refill()
        return item

    def set_room(self, lent: int) -> None:
        """Set the room to the capacity less what is lent to threads."""
        self.room = NO_ROOM if self.closed or self.broken else self.limit - lent

    def restore(self, items: list[T]) -> None:
        """Put items back at the head of the buffer, and wake the next receivers for them."""
        if self.home is not NOWHERE and self.home.ended():
            # A task is garbage collected after its event loop was closed; all other waiters there are gone, too.
            self.evict()
        if self.ledger is not None:
            self.ledger.recall_items()
        self.put_back(items)

    def put_back(self, items: list[T]) -> None:
        """Put items back as `restore` does, while the ledger has nothing lent to threads."""
        self.buffer.extendleft(reversed(items))
        self.reserved += len(items)
        self.release(len(items))

    def redeem_outcome(self, outcome: Outcome | HandedItem) -> T:
        """Return the item for which a receiver was woken, or raise the error it was woken with."""
        if isinstance(outcome, HandedItem):
            return cast("T", outcome.item)
        if outcome is not None:
            raise self.error(outcome)
        return self.redeem()

    def redeem(self) -> T:
        """Take the item that is reserved for the caller."""
        self.reserved -= 1
        item = self.buffer.popleft()
        if self.closed:
            self.end_if_over()
        return item

    def end_if_over(self) -> None:
        """Wake the remaining receivers with EndOfStream if the channel is closed and no item can be put back."""
        if self.closed and self.over():
            self.receivers.dismiss(EndOfStream)

    def redeem_at_once(self) -> T:
        """Take the item for a receiver that is being woken, on behalf of its `EagerWaiter` or thread."""
        if self.passing:
            return self.redeem()
        self.reserved -= 1
        return self.buffer.pop()

    def release(self, count: int = 1) -> None:
        """Pass unused reservations on to the next receivers, or cancel them if none is waiting."""
        for _ in range(count):
            while self.receivers:
                waiter = self.receivers.popleft()[0]
                if not waiter.done():
                    self.passing = True
                    waiter.set_result(None)
                    self.passing = False
                    break
            else:
                self.reserved -= 1

    def leave_receivers(self, waiter: TaskWaiter, home: Home, exc: BaseException) -> None:
        """Withdraw an interrupted receiver; if it had been woken for an item, pass that on to the next receiver."""
        if withdraw(waiter, home, exc):
            self.release()
        else:
            self.receivers.leave()

    def refill(self) -> None:
        """Accept the items of parked senders as long as there is room."""
        while self.senders and len(self.buffer) - self.reserved < self.room and self.senders.any_live():
            self._admit()

    def _admit(self) -> None:
        """Accept the item of the first parked sender, and wake the sender."""
        waiter, _end, item = self.senders.popleft()
        self.buffer.append(item)
        self.sent += 1
        waiter.set_result(None)

    def over(self) -> bool:
        """Return whether no more items can arrive; reserved and held ones may be put back by a cancelled receiver."""
        return self.broken or (self.closed and not self.reserved and not self.held)

    def check_receiving(self) -> None:
        """Raise the error of a receiver if no more items can arrive."""
        if self.over():
            raise self.error(ClosedResourceError if self.broken else EndOfStream)

    def drain(self) -> list[T]:
        """Take all unreserved items from the buffer."""
        if self.ledger is not None:
            self.ledger.recall_items()
        items = [self.buffer.popleft() for _ in range(len(self.buffer) - self.reserved)]
        self.refill()
        return items

    # Closing

    def close_sender(self, waiters: Iterable[Waiter]) -> None:
        """Close one sending end, waking the given waiters of it; the last one closes the channel."""
        if self.closed:
            return
        self.senders.dismiss_some(waiters, ClosedResourceError)
        self.open_senders -= 1
        if not self.open_senders:
            self.close()

    def close_receiver(self, waiters: Iterable[Waiter]) -> None:
        """Close one receiving end, waking the given waiters of it; the last one breaks the channel."""
        self.special = True
        self.receivers.dismiss_some(waiters, ClosedResourceError)
        self.open_receivers -= 1
        if not self.open_receivers:
            self.break_off()

    def close(self) -> None:
        """Close the channel for sending. Items in it can still be received."""
        if self.closed:
            return
        if self.ledger is not None:
            # Items that threads sent earlier come before the end.
            self.ledger.recall_room()
            self.ledger.recall_items()
        self.closed = self.special = True
        self.set_room(0)
        # Receivers that go on waiting may get items that are put back, but no new ones.
        self.takers = NOBODY
        self.open_senders = 0
        self.senders.dismiss(ClosedResourceError)
        if self.over():
            self.receivers.dismiss(EndOfStream)
        else:
            # Partial batches are complete now. The other receivers wait for items that may still be put back.
            self.receivers.dismiss(EndOfStream, lambda entry: len(entry) > BARE)
        if self.bridge is not None:
            self.bridge.closed()

    def break_off(self) -> None:
        """Close the channel for receiving: sending raises BrokenResourceError, and items stay for `drain`."""
        if self.ledger is not None:
            self.ledger.recall_room()
            self.ledger.recall_items()
        self.broken = self.special = True
        self.set_room(0)
        unread = len(self.buffer) - self.reserved
        if unread:
            import logging  # noqa: PLC0415 -- imported only when there is something to log

            logging.getLogger("chanflow").warning(
                "%s was closed by its last receiver with %d unread item(s)", self, unread
            )
        self.senders.dismiss(BrokenResourceError)
        self.receivers.dismiss(ClosedResourceError)
        if self.bridge is not None:
            self.bridge.closed()

    def error(self, kind: type[Exception]) -> Exception:
        """Return an error of this class that names the channel and the cause."""
        return kind(f"{self} {CAUSES[kind]}")

    def count_free(self) -> int:
        """Return the number of unreserved items in the buffer."""
        if self.ledger is not None and self.home.here():
            self.ledger.recall_items()
        # Called from another thread, items that threads took may not be accounted for yet.
        return max(0, len(self.buffer) - self.reserved)

    def statistics(self) -> ChannelStatistics:
        """Return the numbers of items, ends and waiting tasks, and the totals."""
        self.count_free()
        used = len(self.buffer)
        return ChannelStatistics(
            current_buffer_used=used,
            max_buffer_size=self.capacity,
            open_send_streams=self.open_senders,
            open_receive_streams=self.open_receivers,
            tasks_waiting_send=self.senders.count_live(),
            tasks_waiting_receive=self.receivers.count_live(),
            sent=self.sent,
            received=self.sent - self.dropped - used,
            dropped=self.dropped,
        )


class ClosedEnd:
    """Takes the place of the state in an end that was closed: every operation raises ClosedResourceError."""

    __slots__ = ("_state",)
    # Not `NOWHERE`, with which an operation that need not wait could skip the check.
    home = Nowhere()
    # No items and no waiters.
    buffer = receivers = takers = senders = ()
    reserved = room = 0
    special = True

    def __init__(self, state: ChannelState[Any]) -> None:
        self._state = state

    def check(self) -> NoReturn:
        """Raise ClosedResourceError."""
        msg = f"this end of {self._state} is closed"
        raise ClosedResourceError(msg)

    enter = check

    async def arrive(self) -> NoReturn:
        """Raise ClosedResourceError, after taking an operation from the budget like any that need not wait."""
        home = current_home()
        if home is not None:
            await home.operate()
        self.check()
