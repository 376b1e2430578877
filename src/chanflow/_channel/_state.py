"""The state of a channel, and every change it can undergo, as plain methods that never wait.

All items live in the buffer of one anyio memory object stream. anyio's own waiting is never used:
the tasks that wait are in two waiting rooms here, which `select` shares. A waiter is woken with None when
its operation may be finished, or with the class of the error that ends it.
"""

# Invariants:
# 1. An accepted item is in exactly one place: the buffer, or with the receiver that took it, or counted as dropped.
#    So sent == received + dropped + len(buffer).
# 2. Of the two waiting rooms at least one has no live waiter, but for a select that both sends and receives here.
# 3. 0 <= reserved <= len(buffer): one reservation for each receiver that was woken and has not run yet. A newcomer
#    takes only what is not reserved.
# 4. A receiver waits only while every item is reserved, and not beyond the end unless some are; a sender waits only
#    while there is no room.
# 5. len(buffer) - reserved <= capacity, but for items that came back when their receiver was cancelled.
# 6. Items leave in the order in which they came; waiters are served in the order in which they came.

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
from chanflow._loop._home import NOWHERE, Home, Nowhere, TaskWaiter, Waiter, current_home, give_up
from chanflow._loop._wait import Outcome, WaitingRoom

__all__ = [
    "NOTHING",
    "SENT",
    "Answer",
    "ChannelState",
    "ChannelStatistics",
    "ClosedEnd",
    "Deliverer",
    "Delivery",
    "Overflow",
]

T = TypeVar("T")
Stream: TypeAlias = tuple[MemoryObjectSendStream[T], MemoryObjectReceiveStream[T]]
Overflow: TypeAlias = Literal["block", "drop_newest", "drop_oldest"]

OVERFLOWS: Final = ("block", "drop_newest", "drop_oldest")
# So low that no room which threads made, and which was not accounted for yet, makes up for it.
NO_ROOM: Final = -sys.maxsize
NOBODY: Final[WaitingRoom[Any]] = WaitingRoom()
BARE: Final = 2
"""The length of the entry of a receiver that has collected nothing yet."""

CAUSES: Final[dict[type[Exception], str]] = {
    EndOfStream: "is closed and drained",
    ClosedResourceError: "is closed",
    BrokenResourceError: "has no receiver left",
}


class Answer:
    """What a case of `select` gives that is no item: that it can't happen now, that it was sent, or its error.

    An error that is raised is the case's own: EndOfStream means closed and drained. As an answer, it is what a task
    ended with.
    """

    __slots__ = ("error",)

    def __init__(self, error: BaseException | None = None) -> None:
        self.error = error


NOTHING = Answer()
SENT = Answer()


class ChannelStatistics(NamedTuple):
    """A look at a channel: anyio's six figures, and three totals.

    At every moment `sent == received + dropped + current_buffer_used`.
    """

    current_buffer_used: int
    """Items in the channel, with those handed to receivers that were woken but have not run yet."""
    max_buffer_size: float
    """The capacity."""
    open_send_streams: int
    """Sending ends that are not closed; a channel none was asked of counts as one."""
    open_receive_streams: int
    """Receiving ends that are not closed; a channel none was asked of counts as one."""
    tasks_waiting_send: int
    tasks_waiting_receive: int
    sent: int
    """Items accepted since the channel was made."""
    received: int
    dropped: int
    """Items that the overflow policy threw away."""


class Buffer(Protocol[T]):
    """What is used of the deque in the anyio stream."""

    def append(self, item: T, /) -> None: ...
    def extend(self, items: Iterable[T], /) -> None: ...
    def extendleft(self, items: Iterable[T], /) -> None: ...
    def popleft(self) -> T: ...
    def pop(self) -> T: ...
    def __len__(self) -> int: ...


class PublicBuffer(Generic[T]):
    """The buffer of an anyio stream through its public calls only."""

    def __init__(self, send: MemoryObjectSendStream[T], receive: MemoryObjectReceiveStream[T]) -> None:
        # Open until nobody has this any more; a stream that is dropped open warns.
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
    """Give the deque in an anyio stream, else the way to it by the stream's public calls.

    The stream's own waiting and closing are not used, so nobody has to be told when its buffer changes. Going
    straight there is what makes a channel faster than `asyncio.Queue`.
    """
    buffer = getattr(getattr(receive, "_state", None), "buffer", None)
    if type(buffer) is not deque:
        return PublicBuffer(send, receive)
    # The deque is all that is needed, and a stream that is dropped open warns.
    send.close()
    receive.close()
    return buffer


class Delivery:
    """What a waiter is woken with that has its item already."""

    __slots__ = ("item",)

    def __init__(self, item: Any) -> None:
        self.item: Any = item


class Deliverer:
    """A waiter that takes its item in being woken.

    Where woken tasks run in another order than that of their waking, each would take another's item. There, on trio, a
    task that was woken can't be cancelled any more, so that its item may leave the buffer at once.
    """

    __slots__ = ("_state", "_waiter", "done")

    def __init__(self, state: ChannelState[Any], waiter: Waiter) -> None:
        self._state = state
        self._waiter = waiter
        self.done = waiter.done

    def set_result(self, outcome: Outcome) -> None:
        self._waiter.set_result(Delivery(self._state.redeem_at_once()) if outcome is None else outcome)


class Bridge(Protocol):
    """What a channel that threads use tells them."""

    def sender_parked(self) -> None:
        """Make sure that room which threads made is seen by a sender that has just come to wait."""
        ...

    def closed(self) -> None:
        """Tell the threads that one side of the channel was closed."""
        ...

    def end(self) -> None:
        """Let all threads go, as the event loop is over."""
        ...


class ChannelState(Generic[T]):
    """What a channel and all its ends share."""

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
    """How many unreserved items may be in the buffer for one more to be let in."""
    reserved: int
    held: int
    receivers: WaitingRoom[tuple[Waiter, object] | tuple[Waiter, object, object]]
    takers: WaitingRoom[tuple[Waiter, object] | tuple[Waiter, object, object]]
    """The receivers, as senders see them: nobody once the channel is closed."""
    senders: WaitingRoom[tuple[Waiter, object, T]]
    passing: bool
    sent: int
    dropped: int
    open_senders: int
    open_receivers: int
    closed: bool
    broken: bool
    ledger: Ledger[T] | None
    """What threads have from this channel, once they use it; and how they are told of what happens."""
    bridge: Bridge | None
    special: bool
    """Whether a receiver has to look at more than items and senders: at threads, at closed ends, or at trio's order."""

    def __init__(self, capacity: float, name: str | None, overflow: Overflow) -> None:
        check_count("capacity", capacity, 0, infinite=True)
        if overflow not in OVERFLOWS:
            msg = f"overflow must be one of {', '.join(map(repr, OVERFLOWS))}, got {show(overflow)}"
            raise ValueError(msg)
        if overflow == "drop_oldest" and capacity == 0:
            msg = "capacity must be >= 1 with overflow='drop_oldest', got 0"
            raise ValueError(msg)
        # With a subscript, `create_memory_object_stream[T]`, this would take twice as long.
        stream: Stream[T] = create_memory_object_stream(math.inf)
        self.buffer = reach_buffer(*stream)
        self.capacity = capacity
        self.name = name
        self.overflow = overflow
        self.home = NOWHERE
        self.limit = sys.maxsize if capacity == math.inf else int(capacity)
        # The same, until a side closes or threads borrow from it.
        self.room = self.limit
        self.reserved = 0
        # Items that batches have collected so far, and put back if they are cancelled.
        self.held = 0
        # Each waits with the end it came through, a sender also with its item, and a receiver with a mark if it has
        # collected something.
        self.receivers = self.takers = WaitingRoom()
        self.senders = WaitingRoom()
        # Whether the receiver that is being woken gets the first item, passed on to it, and not the last.
        self.passing = False
        self.sent = 0
        self.dropped = 0
        # The channel itself is the first end of each side, until that end is asked for.
        self.open_senders = 1
        self.open_receivers = 1
        self.closed = False
        self.broken = False
        self.ledger = None
        self.bridge = None
        self.special = overflow != "block"

    def __str__(self) -> str:
        return f"channel {show(self.name)}" if self.name is not None else f"channel at {id(self):#x}"

    # Where it may be used from

    def check(self) -> None:
        """Refuse a caller in another event loop or thread than the channel's.

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
        """Forget a home whose event loop has ended, and the tasks that were abandoned there."""
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
        """Give the caller's home, for an operation that may wait."""
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
        """Give the caller's home, for an operation that may wait; ends that are closed refuse."""
        return self.enter()

    async def spend(self, home: Home) -> None:
        """Take an operation that can finish at once from the budget; when it is used up, yield first.

        Yielding comes before the operation: after it, a cancellation there would lose or double the item.
        """
        if next(home.turns, None) is None:
            # Whoever waits for the loop has a home, and so has the channel.
            self.home = home
            await home.checkpoint()

    def settle(self, home: Home) -> None:
        """Take note that the caller is going to wait, which takes nothing from the budget."""
        self.home = home
        home.rest()

    def place(self, waiter: Waiter) -> Waiter:
        """Give what stands for a receiver in its waiting room."""
        return Deliverer(self, waiter) if self.home.shuffles else waiter

    # Sending

    def can_put(self) -> bool:
        """Tell whether `put` would accept an item, drop it or refuse it at once."""
        if (self.takers and self.takers.any_live()) or len(self.buffer) - self.reserved < self.room:
            return True
        if self.ledger is not None:
            self.ledger.recall_room()
        return self.overflow != "block" or self.closed or self.broken or len(self.buffer) - self.reserved < self.room

    def put(self, item: T) -> bool:
        """Accept an item if there is room or a receiver for it, or a policy to drop one.

        Raises:
            ClosedResourceError: the channel was closed.
            BrokenResourceError: every receiver is closed.
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
        """Look for room where there seems to be none: with the threads, or by dropping the oldest item."""
        self.check_sending()
        if self.ledger is not None:
            self.ledger.recall_room()
            if len(self.buffer) - self.reserved < self.room:
                return True
        if self.overflow != "drop_oldest":
            return False
        if self.ledger is not None:
            # What is reserved for threads is not to be dropped.
            self.ledger.recall_items()
        self.buffer.popleft()
        self.dropped += 1
        return True

    def accept(self, items: deque[T]) -> None:
        """Accept items that were promised room before, even if there is none left."""
        while items:
            if self.receivers.any_live():
                self.put(items.popleft())
            else:
                self.sent += len(items)
                self.buffer.extend(items)
                items.clear()

    def put_many(self, items: deque[T]) -> None:
        """Accept from the left what there is room or a receiver for."""
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
        """Raise what a sender gets on a closed or broken channel."""
        if self.closed:
            raise self.error(ClosedResourceError)
        if self.broken:
            raise self.error(BrokenResourceError)

    def leave_senders(self, waiter: TaskWaiter, home: Home, exc: BaseException) -> bool:
        """Withdraw a sender that was interrupted; True if its item was taken before that."""
        taken = give_up(waiter, home, exc)
        if not taken:
            self.senders.leave()
        return taken

    # Receiving

    def can_take(self) -> bool:
        """Tell whether there is an item for a newcomer: in the buffer, or with a parked sender."""
        if self.ledger is not None:
            # From here on no thread takes anything either.
            self.ledger.recall_items()
        return len(self.buffer) > self.reserved or self.senders.any_live()

    def take(self) -> T:
        """Take the next item; only after `can_take`."""
        if len(self.buffer) > self.reserved:
            item = self.buffer.popleft()
            if self.senders:
                self.refill()
        else:
            # A rendezvous. The item goes through the buffer, since others before it may be reserved there.
            self._admit()
            item = self.buffer.popleft()
        return item

    def take_many(self, max_items: int) -> list[T]:
        """Take what a newcomer may have, the items of parked senders too."""
        batch: list[T] = []
        while (wanted := max_items - len(batch)) and self.can_take():
            if len(self.buffer) == self.reserved:
                self._admit()
            batch += [self.buffer.popleft() for _ in range(min(len(self.buffer) - self.reserved, wanted))]
            self.refill()
        return batch

    def take_behind(self) -> T:
        """Take the first item that is not reserved, leaving those before it to the receivers woken for them."""
        if len(self.buffer) == self.reserved:
            self._admit()
        reserved = [self.buffer.popleft() for _ in range(self.reserved)]
        item = self.buffer.popleft()
        later = [self.buffer.popleft() for _ in range(len(self.buffer))]
        self.buffer.extend([*reserved, *later])
        self.refill()
        return item

    def set_room(self, lent: int) -> None:
        """Let in as much as the capacity allows, less what is lent to threads."""
        self.room = NO_ROOM if self.closed or self.broken else self.limit - lent

    def restore(self, items: list[T]) -> None:
        """Put items back that were taken before all that is in the buffer, and pass them on to the next receivers."""
        if self.home is not NOWHERE and self.home.ended():
            # The remains of a task are collected after its loop was closed, and with it all that waited there.
            self.evict()
        if self.ledger is not None:
            self.ledger.recall_items()
        self.put_back(items)

    def put_back(self, items: list[T]) -> None:
        """Do so while no thread may take anything."""
        self.buffer.extendleft(reversed(items))
        self.reserved += len(items)
        self.release(len(items))

    def redeem_outcome(self, outcome: Outcome | Delivery) -> T:
        """Give a receiver what it was woken with or for."""
        if isinstance(outcome, Delivery):
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
        """Tell the end to those who still waited for something to come back."""
        if self.closed and self.over():
            self.receivers.dismiss(EndOfStream)

    def redeem_at_once(self) -> T:
        """Take the item for a receiver that is just being woken."""
        if self.passing:
            return self.redeem()
        self.reserved -= 1
        return self.buffer.pop()

    def release(self, count: int = 1) -> None:
        """Pass reservations that are not going to be used on to the next receivers."""
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
        """Withdraw a receiver that was interrupted; what it was woken for goes to the next."""
        if give_up(waiter, home, exc):
            self.release()
        else:
            self.receivers.leave()

    def refill(self) -> None:
        """Move parked senders' items into the room there is."""
        while self.senders and len(self.buffer) - self.reserved < self.room and self.senders.any_live():
            self._admit()

    def _admit(self) -> None:
        """Accept the item of the first parked sender, and wake it."""
        waiter, _end, item = self.senders.popleft()
        self.buffer.append(item)
        self.sent += 1
        waiter.set_result(None)

    def over(self) -> bool:
        """Tell whether nothing can come any more; what is reserved or held may, should its receiver be cancelled."""
        return self.broken or (self.closed and not self.reserved and not self.held)

    def check_receiving(self) -> None:
        """Raise what a receiver gets when nothing is left and nothing can come."""
        if self.over():
            raise self.error(ClosedResourceError if self.broken else EndOfStream)

    def drain(self) -> list[T]:
        """Take what is in the buffer and not reserved."""
        if self.ledger is not None:
            self.ledger.recall_items()
        items = [self.buffer.popleft() for _ in range(len(self.buffer) - self.reserved)]
        self.refill()
        return items

    # Closing

    def close_sender(self, waiters: Iterable[Waiter]) -> None:
        """Close one sending end, on which these wait."""
        if self.closed:
            return
        self.senders.dismiss_some(waiters, ClosedResourceError)
        self.open_senders -= 1
        if not self.open_senders:
            self.close()

    def close_receiver(self, waiters: Iterable[Waiter]) -> None:
        """Close one receiving end, on which these wait."""
        self.special = True
        self.receivers.dismiss_some(waiters, ClosedResourceError)
        self.open_receivers -= 1
        if not self.open_receivers:
            self.break_off()

    def close(self) -> None:
        """Close for sending: what is in the channel can still be received."""
        if self.closed:
            return
        if self.ledger is not None:
            # What threads have sent before comes before the end.
            self.ledger.recall_room()
            self.ledger.recall_items()
        self.closed = self.special = True
        self.set_room(0)
        # Those who wait on may get what comes back, and nothing new.
        self.takers = NOBODY
        self.open_senders = 0
        self.senders.dismiss(ClosedResourceError)
        if self.over():
            self.receivers.dismiss(EndOfStream)
        else:
            # A batch that has something is complete now. The others wait for what may still come back.
            self.receivers.dismiss(EndOfStream, lambda entry: len(entry) > BARE)
        if self.bridge is not None:
            self.bridge.closed()

    def break_off(self) -> None:
        """Close for receiving: nobody is going to take what is in the channel."""
        if self.ledger is not None:
            self.ledger.recall_room()
            self.ledger.recall_items()
        self.broken = self.special = True
        self.set_room(0)
        unread = len(self.buffer) - self.reserved
        if unread:
            import logging  # noqa: PLC0415 -- only who has something to say waits for it

            logging.getLogger("chanflow").warning(
                "%s was closed by its last receiver with %d unread item(s)", self, unread
            )
        self.senders.dismiss(BrokenResourceError)
        self.receivers.dismiss(ClosedResourceError)
        if self.bridge is not None:
            self.bridge.closed()

    def error(self, kind: type[Exception]) -> Exception:
        """Make the error that ends an operation, naming the channel and the cause."""
        return kind(f"{self} {CAUSES[kind]}")

    def count_free(self) -> int:
        """Count the items that a newcomer may have from the buffer."""
        if self.ledger is not None and self.home.here():
            self.ledger.recall_items()
        # In another thread, what threads took may not be accounted for yet.
        return max(0, len(self.buffer) - self.reserved)

    def statistics(self) -> ChannelStatistics:
        """Count."""
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
    """What an end operates on once it is closed: everything is refused."""

    __slots__ = ("_state",)
    # Of its own, since an operation that need not wait may be carried out nowhere.
    home = Nowhere()
    # Nothing is there, and nobody.
    buffer = receivers = takers = senders = ()
    reserved = room = 0
    special = True

    def __init__(self, state: ChannelState[Any]) -> None:
        self._state = state

    def check(self) -> NoReturn:
        """Refuse."""
        msg = f"this end of {self._state} is closed"
        raise ClosedResourceError(msg)

    enter = check

    async def arrive(self) -> NoReturn:
        """Refuse, which takes from the budget as whatever finishes at once."""
        home = current_home()
        if home is not None:
            await home.operate()
        self.check()
