"""A wake-up call that is never lost and never piles up."""

from __future__ import annotations

from chanflow._loop._home import TIMED_OUT, Home, Waiter, give_up
from chanflow._loop._wait import WaitingRoom

__all__ = ["Signal"]


class Signal:
    """Wakes one who waits, or else the next who comes to wait; whoever has nothing to do with it passes it on.

    Who is woken looks at what it waits for, and waits again if that isn't there. It is much less than a channel, and
    so takes a fraction of its time.
    """

    __slots__ = ("_sent", "_waiters")

    def __init__(self) -> None:
        self._waiters: WaitingRoom[tuple[Waiter]] = WaitingRoom()
        self._sent = False

    def send(self) -> None:
        """Wake the one who has waited for the longest time."""
        while self._waiters:
            [waiter] = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self._sent = True

    def send_all(self) -> None:
        """Wake all who wait."""
        self._waiters.dismiss(None)

    async def wait(self, home: Home, deadline: float | None = None) -> None:
        """Wait until woken, or until a time.

        Args:
            home: the caller's event loop.
            deadline: on the event loop's clock; None to wait without bound.

        Cancellation:
            A wake-up that the caller was given goes to the next one.
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
            if give_up(waiter, home, exc):
                self.send()
            else:
                self._waiters.leave()
            raise
