"""Call a handler once: in a context of its own, on the event loop or in a thread, and within a timeout."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from contextvars import Context, copy_context
from inspect import iscoroutine
from types import CoroutineType, coroutine
from typing import Any

from anyio import CapacityLimiter, move_on_after

from chanflow._offload import is_async, run_in_thread
from chanflow._park import running_home

__all__ = ["Attempt"]


class Attempt:
    """A handler, with how it is called.

    Args:
        handler: any function.
        limiter: bounds the threads.
        timeout: seconds that a call may take, greater than 0; None for no bound. A thread can't be stopped, and is
            waited for.
    """

    def __init__(self, handler: Callable[..., Any], limiter: CapacityLimiter, timeout: float | None) -> None:
        self._handler = handler
        self._limiter = limiter
        self._timeout = timeout
        self._is_async = is_async(handler)

    async def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call it with these arguments, and give what it returned.

        Raises:
            TimeoutError: it took longer than the timeout.
            TypeError: a plain function gave a coroutine.
            RuntimeError: the handler was cancelled, though nobody had cancelled the caller.
            Exception: what the handler raised.
        """
        try:
            if self._is_async and self._timeout is None:
                return await drive(self._handler(*args, **kwargs), copy_context())
            return await self._call(*args, **kwargs)
        except BaseException as error:
            if isinstance(error, Exception) or not running_home().strays(error):
                raise
            msg = "the handler was cancelled by what it waited for, which somebody had cancelled"
            raise RuntimeError(msg) from error

    async def _call(self, /, *args: Any, **kwargs: Any) -> Any:
        if self._is_async:
            with move_on_after(self._timeout) as scope:
                return await drive(self._handler(*args, **kwargs), copy_context())
            # Reached only when the scope was left by its own deadline.
            assert scope.cancelled_caught
            msg = f"the handler took longer than {self._timeout} s"
            raise TimeoutError(msg)
        value = await run_in_thread(
            lambda _job: self._handler(*args, **kwargs),
            None,
            self._limiter,
            timeout=self._timeout,
            expired=lambda _error: None,
        )
        if iscoroutine(value):
            value.close()
            msg = f"the handler gave a coroutine that nobody awaits: make it an async function: {self._handler!r}"
            raise TypeError(msg)
        return value


async def wait_for(awaitable: Awaitable[Any]) -> Any:
    """Make a coroutine of something else that can be awaited."""
    return await awaitable


@coroutine
def drive(handling: Awaitable[Any], context: Context) -> Generator[Any, Any, Any]:
    """Await what a handler gave in a context: what it sets there, the next one of the same worker doesn't see."""
    if not isinstance(handling, CoroutineType):
        handling = wait_for(handling)
    run = context.run
    try:
        waits_for = run(handling.send, None)
        while True:
            try:
                value = yield waits_for
            except GeneratorExit:
                run(handling.close)
                raise
            except BaseException as error:  # noqa: BLE001 -- it is passed on
                waits_for = run(handling.throw, error)
            else:
                waits_for = run(handling.send, value)
    except StopIteration as end:
        return end.value
