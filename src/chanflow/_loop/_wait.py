"""Waiting rooms: the queues of waiters, first come, first served."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

from chanflow._loop._home import Waiter

__all__ = ["Outcome", "WaitingRoom"]

Outcome: TypeAlias = type[Exception] | None
"""What a waiter is woken with: None to complete its operation, or the class of the error that ends it."""

Entry = TypeVar("Entry", bound=tuple[Any, ...])


class WaitingRoom(deque[Entry]):
    """The waiters on one side of a channel, first come, first served. An entry is a tuple that begins with the waiter.

    A waiter that is cancelled, or loses a `select`, stays as a dead entry until it reaches the head, or until half of
    the entries may be dead. An ordered dict could remove it at once, but would make every parking cost more.
    """

    # A class attribute until a waiter leaves: most rooms never need their own, and making a room is most of the cost of
    # making a channel.
    _left = 0

    def leave(self) -> None:
        """Record that a waiter of this room is done, although this room did not wake it."""
        # A waiter that was skipped in the meantime is counted too, so the room may be swept earlier than needed.
        self._left += 1
        if self._left * 2 > len(self):
            self._replace([entry for entry in self if not entry[0].done()])

    def forget(self, which: Callable[[Entry], bool]) -> None:
        """Remove the matching entries without waking their waiters."""
        self._replace([entry for entry in self if not which(entry)])

    def _replace(self, entries: list[Entry]) -> None:
        self.clear()
        self.extend(entries)
        self._left = 0

    def any_live(self) -> bool:
        """Return whether a waiter is live, removing dead entries at the head."""
        while self:
            if not self[0][0].done():
                return True
            self.popleft()
        return False

    def count_live(self) -> int:
        """Return the number of live waiters."""
        return sum(not entry[0].done() for entry in self)

    def dismiss_some(self, waiters: Iterable[Waiter], outcome: Outcome) -> None:
        """Wake the given waiters with an outcome.

        They stay as dead entries: finding each of them would take a pass over the whole room.
        """
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(outcome)
                self.leave()

    def dismiss(self, outcome: Outcome, which: Callable[[Entry], bool] | None = None) -> None:
        """Remove all entries, or those that match, and wake their waiters with an outcome."""
        dismissed = [entry for entry in self if which is None or which(entry)]
        self._replace([] if which is None else [entry for entry in self if not which(entry)])
        for entry in dismissed:
            if not entry[0].done():
                entry[0].set_result(outcome)
