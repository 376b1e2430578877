"""Run a sync callable off the event loop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, TypeAlias, TypeVar, cast

import anyio
from anyio import CapacityLimiter, to_thread

from chanflow._loop._home import running_home

__all__ = ["Offload", "run_in_thread"]

T = TypeVar("T")
Offload: TypeAlias = Literal["thread"]


async def run_in_thread(
    fn: Callable[[], T],
    limiter: CapacityLimiter,
    *,
    timeout: float | None = None,
    expired: Callable[[TimeoutError], object] | None = None,
) -> T:
    """Call `fn` in a thread, and return only when it has returned.

    Args:
        fn: the callable. `anyio.from_thread.check_cancelled` tells it of a cancellation, and of the end of its time.
        limiter: bounds the threads.
        timeout: seconds after which the call counts as failed; None for no bound.
        expired: called with the error at once when the time is over, though the thread can't be stopped.

    Raises:
        TimeoutError: the call took longer than `timeout`; raised once it has returned.
        Exception: what `fn` raised.

    Cancellation:
        Waits for the thread first: a running thread can't be stopped.
    """
    thread = Thread(fn)
    if timeout is None:
        value, failed = await thread.run(limiter)
        try:
            if failed is not None:
                raise failed
        finally:
            # An error must not refer to itself through its traceback.
            failed = None
        return cast("T", value)
    late: list[TimeoutError] = []
    value = failed = None

    async def watch() -> None:
        await anyio.sleep(timeout)
        late.append(TimeoutError(f"the call took longer than {timeout} s"))
        if expired is not None:
            expired(late[0])
        tasks.cancel_scope.cancel()

    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            try:
                value, failed = await thread.run(limiter)
            except BaseException as error:  # noqa: BLE001 -- raised below: the task group would wrap it
                failed = error
            tasks.cancel_scope.cancel()
    except anyio.get_cancelled_exc_class() as cancelled:
        # It came while `watch` was waited for, and must not lose what the call came to.
        running_home().defer_cancellation(cancelled)
    try:
        if late:
            raise late[0] from failed
        if failed is not None:
            raise failed
    finally:
        # As above; nor must it refer to whom `expired` tells.
        late.clear()
        failed = expired = None
    return cast("T", value)


class Thread:
    """A call in a thread, which is waited for whatever happens."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        self._fn = fn
        self._home = running_home()
        self._lock = threading.Lock()
        self._running = False
        # Set when it is over; made by who waits for that.
        self._over: anyio.Event | None = None

    def _call(self) -> tuple[Any, BaseException | None]:
        self._running = True
        try:
            # In a tuple, because trio refuses a coroutine in words that say nothing of the handler, and because a
            # future that raises makes a cycle of its error and itself.
            return self._fn(), None
        except BaseException as error:  # noqa: BLE001 -- raised by who waits
            return None, error
        finally:
            with self._lock:
                self._running = False
                if self._over is not None:
                    self._home.call_soon(self._over.set)

    async def run(self, limiter: CapacityLimiter) -> tuple[Any, BaseException | None]:
        """Give what the call returned and raised."""
        try:
            return await to_thread.run_sync(self._call, limiter=limiter)
        except BaseException:
            # asyncio's own cancellation comes at once, and would leave the thread behind.
            with self._lock:
                if self._running:
                    self._over = anyio.Event()
            while self._over is not None and not self._over.is_set():
                with suppress(anyio.get_cancelled_exc_class()), anyio.CancelScope(shield=True):
                    await self._over.wait()
            raise
