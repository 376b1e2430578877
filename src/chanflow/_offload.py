"""Run a sync callable off the event loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import iscoroutinefunction
from typing import Any, Literal, TypeAlias, TypeVar, cast

import anyio
from anyio import CapacityLimiter, to_thread
from anyio.lowlevel import checkpoint_if_cancelled

__all__ = ["Offload", "is_async", "run_in_thread"]

T = TypeVar("T")
Offload: TypeAlias = Literal["thread"]


def is_async(fn: Callable[..., Any]) -> bool:
    """Tell whether calling this gives something to await, looking into partials and callable objects."""
    while isinstance(fn, partial):
        fn = fn.func
    return iscoroutinefunction(fn) or iscoroutinefunction(getattr(fn, "__call__", None))  # noqa: B004 -- its kind is asked, not whether it's callable


async def run_in_thread(
    fn: Callable[[Any], T],
    job: Any,
    limiter: CapacityLimiter,
    *,
    timeout: float | None = None,
    expired: Callable[[TimeoutError], object],
) -> T:
    """Call `fn(job)` in a thread, and return only when it has returned.

    Args:
        fn: the callable.
        job: its argument.
        limiter: bounds the threads.
        timeout: seconds after which the call counts as failed; None for no bound.
        expired: called with the error at once when the time is over, though the thread can't be stopped.

    Raises:
        TimeoutError: the call took longer than `timeout`; raised once it has returned.
        Exception: what `fn` raised.

    Cancellation:
        Waits for the thread first: a running thread can't be stopped.
    """

    def call() -> list[T]:
        # In a list, because trio refuses a coroutine in words that say nothing of the handler.
        return [fn(job)]

    if timeout is None:
        return (await to_thread.run_sync(call, limiter=limiter))[0]
    late: list[TimeoutError] = []

    async def watch() -> None:
        await anyio.sleep(timeout)
        late.append(TimeoutError(f"the call took longer than {timeout} s"))
        expired(late[0])

    await checkpoint_if_cancelled()
    value: Any = None
    failed: Exception | None = None
    # The thread is waited for anyway, and then a cancellation must not lose what it returned.
    with anyio.CancelScope(shield=True):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch)
            try:
                [value] = await to_thread.run_sync(call, limiter=limiter)
            except Exception as error:  # noqa: BLE001 -- raised below: the task group would wrap it
                failed = error
            tasks.cancel_scope.cancel()
    if late:
        raise late[0] from failed
    if failed is not None:
        raise failed
    return cast("T", value)
