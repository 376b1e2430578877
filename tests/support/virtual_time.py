"""An asyncio event loop whose clock jumps to the next timer instead of waiting for it."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any


class VirtualSelector(selectors.DefaultSelector):
    """A selector that lets time pass by adding it up."""

    elapsed = 0.0

    def select(self, timeout: float | None = None) -> Any:
        if timeout is None or timeout <= 0:
            return super().select(timeout)
        # What a thread or a process has for us comes first.
        ready = super().select(0)
        if not ready:
            self.elapsed += timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """The counterpart of trio's MockClock with an autojump threshold of 0."""

    def __init__(self) -> None:
        self._virtual = VirtualSelector()
        super().__init__(self._virtual)
        # The real clock's is too fine for the sums of long times.
        self._clock_resolution = 1e-6

    def time(self) -> float:
        return self._virtual.elapsed


def passes(
    test: Coroutine[Any, Any, None],
    *,
    seconds: float = 1000.0,
    loop_factory: Callable[[], Any] | None = VirtualTimeLoop,
) -> bool:
    """Run a test by hand, for so long at most, and tell whether it passed."""

    async def run() -> None:
        async with asyncio.timeout(seconds):
            await test

    with asyncio.Runner(loop_factory=loop_factory) as runner:
        try:
            runner.run(run())
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001 -- pytest's own outcomes are no Exceptions
            return False
    return True
