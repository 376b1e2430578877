"""The room and items that a channel has lent to threads, and what they have done with them.

Only the event loop's own thread changes the state of a channel, without a lock. Threads exchange items with it in
batches: items they send go into an inbox, for which the channel has lent them room in advance, and items they may
receive are reserved for them in the buffer, from which they take them directly. The loop's side recalls what it has
lent whenever it finds no room, or no item, for itself.
"""

# The rule: a thread accesses only this ledger and, while it has a claim, the head of the buffer; both under the
# lock. Without the lock, the loop's side may append to the buffer, and take one unreserved item from it; before
# anything else that it does to the buffer, it recalls the claims. Only the loop's side makes new ones.
#
# Invariants, while the channel is open:
# 1. The buffer holds an item for each claim, so taking one in a thread can't fail.
# 2. state.room + claims + taken + credits + len(inbox) == the capacity: what is lent is not available to others.
# 3. state.reserved counts the claims, and the items taken since the last settlement.

from __future__ import annotations

import threading
from collections import deque
from contextlib import AbstractContextManager
from typing import Generic, Protocol, TypeVar

__all__ = ["PREFETCH", "Ledger"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

PREFETCH = 128
"""The maximum number of items reserved for threads that receive."""


class Items(Protocol[T_co]):
    """The buffer of a channel, as its ledger sees it."""

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
    """The room and items that a channel has lent to threads."""

    __slots__ = ("_claims", "_credits", "_inbox", "_returned", "_state", "_taken", "lock")

    def __init__(self, state: Lender[T]) -> None:
        self._state = state
        # Reentrant, because the loop's side calls `settle` while it holds the lock.
        self.lock: AbstractContextManager[object] = threading.RLock()
        # Room that threads may fill, and the items they have sent.
        self._credits = 0
        self._inbox: deque[T] = deque()
        # Items that threads may take, and how many they have taken.
        self._claims = 0
        self._taken = 0
        # Items of threads that were interrupted after taking them.
        self._returned: deque[T] = deque()

    # From threads, under the lock

    def send(self, item: T) -> bool:
        """Send an item if there is lent room for it; return whether there was."""
        if not self._credits:
            return False
        self._credits -= 1
        self._inbox.append(item)
        return True

    def can_take(self) -> bool:
        """Return whether there is an item for a thread."""
        return self._claims > 0

    def take(self) -> T:
        """Take the next item; call this only after `can_take` returned True."""
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
        """Reserve up to `PREFETCH` items in the buffer for threads; there must be no other reservations."""
        with self.lock:
            self._claims = min(len(self._state.buffer), PREFETCH)
            self._state.reserved += self._claims
            self._balance()

    def lend_room(self) -> None:
        """Lend all room to threads, so that they can send without waiting."""
        with self.lock:
            self._credits = max(0, self._state.room - len(self._state.buffer) + self._state.reserved)
            self._balance()

    def settle(self) -> None:
        """Accept the items that threads have sent, and account for those they have taken."""
        state = self._state
        with self.lock:
            state.reserved -= self._taken
            self._taken = 0
            if self._returned:
                # They go back to the head, even if later items have been taken in the meantime.
                returned = list(self._returned)
                self._returned.clear()
                state.put_back(returned)
            sent = self._inbox
            self._inbox = deque()
            self._balance()
            state.accept(sent)
            state.refill()

    def recall_room(self) -> None:
        """Recall the lent room, and accept the items that threads have sent."""
        with self.lock:
            self._credits = 0
            self.settle()

    def recall_items(self) -> None:
        """Recall the items reserved for threads, and accept those they have sent."""
        with self.lock:
            self.settle()
            claims, self._claims = self._claims, 0
            self._balance()
            self._state.release(claims)

    def forget_reservations(self) -> None:
        """Reset the reservations to those of threads, after all others were forgotten."""
        self._state.reserved = self._claims + self._taken

    def _balance(self) -> None:
        self._state.set_room(self._claims + self._taken + self._credits + len(self._inbox))
