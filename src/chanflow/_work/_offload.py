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
    """Call `fn` in a thread, and wait until the call has ended, even after a timeout or a cancellation.

    Args:
        fn: the callable. In it, `anyio.from_thread.check_cancelled` raises after a cancellation or a timeout.
        limiter: limits the number of threads.
        timeout: seconds after which the call counts as failed; None for no time limit.
        expired: called with the TimeoutError when the timeout is exceeded, although the thread is still running.

    Raises:
        TimeoutError: the call took longer than `timeout`; raised once the call has ended.
        Exception: `fn` raised it.

    Cancellation:
        Waits for the thread first, since a running thread can't be stopped.
    """
    thread = Thread(fn)
    if timeout is None:
        value, failed = await thread.run(limiter)
        try:
            if failed is not None:
                raise failed
        finally:
            # The error must not refer to itself through its traceback.
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
            except BaseException as error:  # noqa: BLE001 -- raised below, since the task group would wrap it
                failed = error
            tasks.cancel_scope.cancel()
    except anyio.get_cancelled_exc_class() as cancelled:
        # The cancellation came while waiting for `watch`, after the call had ended: its outcome must not be lost.
        running_home().defer_cancellation(cancelled)
    try:
        if late:
            raise late[0] from failed
        if failed is not None:
            raise failed
    finally:
        # As above; nor must it refer to `expired`.
        late.clear()
        failed = expired = None
    return cast("T", value)


class Thread:
    """A call in a thread. Its caller always waits until the call has ended."""

    def __init__(self, fn: Callable[[], Any]) -> None:
        self._fn = fn
        self._home = running_home()
        self._lock = threading.Lock()
        self._running = False
        # Set when the call has ended; created by a caller that waits for that.
        self._over: anyio.Event | None = None

    def _call(self) -> tuple[Any, BaseException | None]:
        self._running = True
        try:
            # In a tuple, because trio rejects a coroutine with a message that doesn't mention the handler, and because
            # a future that raises creates a reference cycle with its error.
            return self._fn(), None
        except BaseException as error:  # noqa: BLE001 -- raised by the caller
            return None, error
        finally:
            with self._lock:
                self._running = False
                if self._over is not None:
                    self._home.call_soon(self._over.set)

    async def run(self, limiter: CapacityLimiter) -> tuple[Any, BaseException | None]:
        """Run the call; return its value and None, or None and its error."""
        try:
            return await to_thread.run_sync(self._call, limiter=limiter)
        except BaseException:
            # asyncio's own cancellation doesn't wait for the thread.
            with self._lock:
                if self._running:
                    self._over = anyio.Event()
            while self._over is not None and not self._over.is_set():
                with suppress(anyio.get_cancelled_exc_class()), anyio.CancelScope(shield=True):
                    await self._over.wait()
            raise
