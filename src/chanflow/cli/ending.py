"""How a command ends: gently at the first signal, at once at the second, whatever it hangs in."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from attrs import define, field

from chanflow._loop._home import Home, running_home

__all__ = ["Ending"]

SIGNALS = signal.SIGTERM, signal.SIGINT
GRACE = 2.0
"""Seconds from the second signal, after which nothing is waited for any more."""


@define
class Ending:
    """Hears SIGTERM and Ctrl-C for as long as the process lasts.

    The handlers are Python's own and not the event loop's, so that a loop that a handler blocks doesn't keep them from
    being called.
    """

    gently: Callable[[], object]
    """Called in the event loop at the first signal."""
    at_once: Callable[[], object]
    """Called in the event loop at the second."""
    farewell: str
    """What to say at the first signal."""
    number: int | None = None
    """The first signal; None until then."""
    _home: Home = field(factory=running_home, init=False)

    def listen(self) -> None:
        """Begin to hear; to be called in the main thread."""
        for number in SIGNALS:
            signal.signal(number, self._hear)

    def _hear(self, number: int, _frame: FrameType | None) -> None:
        if self.number is None:
            self.number = number
            say(self.farewell)
            self._call(self.gently, number)
            return
        say("stopping at once")
        # The next one finds nobody to hear it.
        ignore_handlers()
        if self._call(self.at_once, number):
            threading.Thread(target=die_later, args=(number,), daemon=True).start()

    def _call(self, callback: Callable[[], object], number: int) -> bool:
        try:
            self._home.call_soon(callback)
        except RuntimeError:
            # The event loop has ended, and something else keeps the process.
            ignore_handlers()
            os.kill(os.getpid(), number)
            return False
        return True


def ignore_handlers() -> None:
    """Let the signals do what they do to a process without handlers."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


def say(text: str) -> None:
    """Tell the user, from a signal handler: no stream of Python's may be written to there."""
    with suppress(OSError):
        os.write(2, f"{text}\n".encode())


def die_later(number: int) -> None:
    """End the process as the signal would have, unless it ends by itself before."""
    time.sleep(GRACE)
    os.kill(os.getpid(), number)
