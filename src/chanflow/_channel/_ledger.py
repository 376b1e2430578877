"""What a channel has lent to threads, and what they did with it.

Only the event loop's own thread changes the state of a channel, without a lock. Threads exchange items with it in
batches: what they send goes into an inbox, for which the channel has lent them room beforehand, and what they may
receive is reserved for them in the buffer, from which they take it themselves. The loop's side takes back what was
lent whenever it finds no room, or no item, for itself.
"""

# The rule: a thread touches nothing but this ledger, and the head of the buffer while it has a claim; both under the
# lock. The loop's side appends to the buffer, and takes from it one item that is not reserved, without the lock; before
# anything else that it does to the buffer, it recalls the claims. Nobody but the loop's side makes new ones.
#
# Invariants, while the channel is open:
# 1. The buffer holds an item for each claim, so that taking one in a thread can't fail.
# 2. state.room + claims + taken + credits + len(inbox) == the capacity: what is lent is nobody else's.
# 3. state.reserved counts the claims, and what was taken since the last settlement.

from __future__ import annotations

import threading
from collections import deque
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

__all__ = ["PREFETCH", "Ledger"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

PREFETCH = 128
"""How many items at most are reserved for threads that receive."""


class Items(Protocol[T_co]):
    """The buffer of a channel, as threads see it."""

    def popleft(self) -> T_co: ...
    def __len__(self) -> int: ...


class Lender(Protocol[T]):
    """The state of a channel, as its ledger sees it."""

    reserved: int
    room: int

    @property
    def buffer(self) -> Items[T]: ...
    def set_room(self, lent: int) -> None: ...
    def accept(self, items: deque[T]) -> None: ...
    def put_back(self, items: list[T]) -> None: ...
    def refill(self) -> None: ...
    def release(self, count: int) -> None: ...


class Ledger(Generic[T]):
    """Room and items that threads have from a channel."""

    __slots__ = ("_claims", "_credits", "_inbox", "_returned", "_state", "_taken", "lock")

    def __init__(self, state: Lender[T]) -> None:
        self._state = state
        # Reentrant, because the loop's side settles in the middle of what it does under the lock.
        self.lock: AbstractContextManager[object] = threading.RLock()
        # Room that threads may fill, and what they have filled it with.
        self._credits = 0
        self._inbox: deque[T] = deque()
        # Items that threads may take, and how many they have taken.
        self._claims = 0
        self._taken = 0
        # Items of threads that were interrupted after they had them.
        self._returned: deque[T] = deque()

    # From threads, under the lock

    def send(self, item: T) -> bool:
        """Send an item if there is room for it."""
        if not self._credits:
            return False
        self._credits -= 1
        self._inbox.append(item)
        return True

    def can_take(self) -> bool:
        """Tell whether there is an item for a thread."""
        return self._claims > 0

    def take(self) -> T:
        """Take the next item; only after `can_take`."""
        self._claims -= 1
        self._taken += 1
        return self._state.buffer.popleft()

    def give_back(self, item: T) -> None:
        """Return an item of a thread that was interrupted."""
        self._returned.append(item)

    # From the event loop's side

    @property
    def made_room(self) -> bool:
        """Whether threads have taken items that are not accounted for yet."""
        return self._taken > 0

    def lend_items(self) -> None:
        """Reserve what is in the buffer for threads, of which nobody else may have reserved anything."""
        with self.lock:
            self._claims = min(len(self._state.buffer), PREFETCH)
            self._state.reserved += self._claims
            self._balance()

    def lend_room(self) -> None:
        """Let threads send without waiting as much as there is room for."""
        with self.lock:
            self._credits = max(0, self._state.room - len(self._state.buffer) + self._state.reserved)
            self._balance()

    def settle(self) -> None:
        """Let in what threads have sent, and account for what they took."""
        state = self._state
        with self.lock:
            state.reserved -= self._taken
            self._taken = 0
            if self._returned:
                # Others have taken later items meanwhile, maybe: it goes back to the head all the same.
                returned = list(self._returned)
                self._returned.clear()
                state.put_back(returned)
            sent = self._inbox
            self._inbox = deque()
            self._balance()
            state.accept(sent)
            state.refill()

    def recall_room(self) -> None:
        """Take the room back that was lent, and let in what threads have sent."""
        with self.lock:
            self._credits = 0
            self.settle()

    def recall_items(self) -> None:
        """Take the items back that are reserved for threads, and let in what they have sent."""
        with self.lock:
            self.settle()
            claims, self._claims = self._claims, 0
            self._balance()
            self._state.release(claims)

    def forget_reservations(self) -> None:
        """Begin anew with what is reserved, after all other reservations were forgotten."""
        self._state.reserved = self._claims + self._taken

    def _balance(self) -> None:
        self._state.set_room(self._claims + self._taken + self._credits + len(self._inbox))
