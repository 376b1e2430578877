"""A wake-up that is never lost and never accumulates."""

from __future__ import annotations

from chanflow._loop._home import TIMED_OUT, Home, Waiter, withdraw
from chanflow._loop._wait import WaitingRoom

__all__ = ["Signal"]


class Signal:
    """Wakes one waiting task; if none is waiting, the next task that waits returns immediately.

    A woken task must check its condition, and wait again if it does not hold. A task that was woken but has no use for
    the signal passes it on. A signal does much less than a channel, and takes a fraction of its time.
    """

    __slots__ = ("_sent", "_waiters")

    def __init__(self) -> None:
        self._waiters: WaitingRoom[tuple[Waiter]] = WaitingRoom()
        self._sent = False

    def send(self) -> None:
        """Wake the task that has waited longest, or let the next one pass."""
        while self._waiters:
            [waiter] = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._sent = True

    def send_all(self) -> None:
        """Wake all waiting tasks."""
        self._waiters.dismiss(None)

    async def wait(self, home: Home, deadline: float | None = None) -> None:
        """Wait until woken or until the deadline.

        Args:
            home: the caller's event loop.
            deadline: on the event loop's clock, in seconds; None for no deadline.

        Cancellation:
            If the caller was already woken, the next waiting task is woken in its place.
        """
        if self._sent:
            self._sent = False
            return
        waiter = home.waiter()
        self._waiters.append((waiter,))
        try:
            if await home.wait(waiter, deadline) is TIMED_OUT:
                self._waiters.leave()
        except BaseException as exc:
            if withdraw(waiter, home, exc):
                self.send()
            else:
                self._waiters.leave()
            raise
