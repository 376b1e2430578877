"""Run a sync callable off the event loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, TypeAlias, TypeVar, cast

import anyio
from anyio import CapacityLimiter, to_thread

from chanflow._park import running_home

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

    def call() -> list[T]:
        # In a list, because trio refuses a coroutine in words that say nothing of the handler.
        return [fn()]

    if timeout is None:
        return (await to_thread.run_sync(call, limiter=limiter))[0]
    late: list[TimeoutError] = []
    value: Any = None
    failed: BaseException | None = None

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
                [value] = await to_thread.run_sync(call, limiter=limiter)
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
        # An error must not refer to itself through its traceback, nor to whom `expired` tells.
        late.clear()
        failed = expired = None
    return cast("T", value)
