"""Call a handler once: on the event loop, or in a thread for a plain function, and within a timeout."""

from __future__ import annotations

from collections.abc import Callable
from inspect import iscoroutine
from typing import Any

from anyio import CapacityLimiter, move_on_after

from chanflow._offload import is_async, run_in_thread

__all__ = ["Attempt"]


class Attempt:
    """A handler, with how it is called.

    Args:
        handler: a function of one argument.
        limiter: bounds the threads.
        timeout: seconds that a call may take, greater than 0; None for no bound. A thread can't be stopped, and is
            waited for.
    """

    def __init__(self, handler: Callable[[Any], Any], limiter: CapacityLimiter, timeout: float | None) -> None:
        self._handler = handler
        self._limiter = limiter
        self._timeout = timeout
        self._is_async = is_async(handler)

    async def __call__(self, argument: object) -> Any:
        """Call it, and give what it returned.

        Raises:
            TimeoutError: it took longer than the timeout.
            TypeError: a plain function gave a coroutine.
            Exception: what the handler raised.
        """
        if self._is_async and self._timeout is None:
            return await self._handler(argument)
        if self._is_async:
            with move_on_after(self._timeout) as scope:
                return await self._handler(argument)
            # Reached only when the scope was left by its own deadline.
            assert scope.cancelled_caught
            msg = f"the handler took longer than {self._timeout} s"
            raise TimeoutError(msg)
        value = await run_in_thread(
            self._handler, argument, self._limiter, timeout=self._timeout, expired=lambda _error: None
        )
        if iscoroutine(value):
            value.close()
            msg = f"the handler gave a coroutine that nobody awaits: make it an async function: {self._handler!r}"
            raise TypeError(msg)
        return value
