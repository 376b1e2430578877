"""Waiting rooms: who waits on one side of a channel, first come first served."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias, TypeVar

from chanflow._loop._home import Waiter

__all__ = ["Outcome", "WaitingRoom"]

Outcome: TypeAlias = type[Exception] | None
"""What a waiter is woken with: None to finish its operation, or the class of the error that ends it."""

Entry = TypeVar("Entry", bound=tuple[Any, ...])


class WaitingRoom(deque[Entry]):
    """The waiters of one side, first come first served; each entry begins with the waiter and its end.

    A waiter that is cancelled, or loses a select, stays as a dead entry until it reaches the head, or until half of
    the entries may be dead. An ordered dict could remove it at once, but would make every parking cost more.
    """

    # Of the class until somebody leaves, as most rooms see nobody leave: to make a room is most of making a channel.
    _left = 0

    def leave(self) -> None:
        """Take note that a waiter of this room is done without having been woken from here."""
        # One that was skipped meanwhile is counted too; the room is then swept earlier than needed.
        self._left += 1
        if self._left * 2 > len(self):
            self._keep([entry for entry in self if not entry[0].done()])

    def forget(self, which: Callable[[Entry], bool]) -> None:
        """Let some go without a word."""
        self._keep([entry for entry in self if not which(entry)])

    def _keep(self, entries: list[Entry]) -> None:
        self.clear()
        self.extend(entries)
        self._left = 0

    def any_live(self) -> bool:
        """Tell whether anybody waits, clearing away the dead at the head."""
        while self:
            if not self[0][0].done():
                return True
            self.popleft()
        return False

    def count_live(self) -> int:
        """Count those who wait."""
        return sum(not entry[0].done() for entry in self)

    def dismiss_some(self, waiters: Iterable[Waiter], outcome: Outcome) -> None:
        """End the waiting of some, which stay as dead entries: looking for them would take as long as for all."""
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(outcome)
                self.leave()

    def dismiss(self, outcome: Outcome, which: Callable[[Entry], bool] | None = None) -> None:
        """End the waiting, for all or for some."""
        dismissed = [entry for entry in self if which is None or which(entry)]
        self._keep([] if which is None else [entry for entry in self if not which(entry)])
        for entry in dismissed:
            if not entry[0].done():
                entry[0].set_result(outcome)
