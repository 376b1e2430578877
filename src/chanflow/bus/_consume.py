"""Call a handler for each message of a subscription, and settle the message according to the outcome."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from anyio import create_task_group

from chanflow._check import show_error
from chanflow._errors import StorageError
from chanflow._loop._home import running_home
from chanflow._work._call import Attempt
from chanflow._work._retry import Retry, judge
from chanflow.bus._subscription import LeaseLostError, Message, Subscription

__all__ = ["MessageHandler", "consume"]

logger = logging.getLogger("chanflow.bus")

MessageHandler: TypeAlias = Callable[[Message], Awaitable[object]] | Callable[[Message], object]


async def consume(subscription: Subscription, attempt: Attempt, retry: Retry) -> None:
    """Call the handler for each message until the subscription ends, and wait for all calls."""
    failed: StorageError | None = None
    async with subscription, create_task_group() as renewing:
        renewing.start_soon(subscription._renew_leases)
        async with create_task_group() as handlers:
            try:
                async for message in subscription:
                    handlers.start_soon(handle, message, attempt, retry)
            except StorageError as error:
                # Raised below, since the task groups would wrap it.
                failed = error
        renewing.cancel_scope.cancel()
    if failed is not None:
        raise failed


async def handle(message: Message, attempt: Attempt, retry: Retry) -> None:
    """Call the handler for a message, and settle the message."""
    try:
        if message.attempt > retry.attempts:
            await message.reject(f"delivered {message.attempt - 1} times, and never acknowledged")
            return
        try:
            await attempt(message)
        except Exception as error:  # noqa: BLE001 -- any error fails only this message
            await settle_failure(message, error, retry)
        except BaseException as error:
            if not running_home().uncancel(error):
                raise
            # `task.cancel()` on this asyncio task cancels only this message; the others go on.
            logger.warning("the handler of %r was cancelled, and the message comes again", message)
            if not message.settled:
                await message.nack()
        else:
            if not message.settled:
                await message.ack()
    except (LeaseLostError, StorageError) as error:
        # The message will be delivered again, or already has been.
        logger.warning("%r was handled, but could not be settled: %s", message, error)


async def settle_failure(message: Message, error: Exception, retry: Retry) -> None:
    """Give a message back after a failed attempt, or reject it after the last one."""
    if message.settled:
        logger.error("the handler of %r failed after it had settled it", message, exc_info=error)
        return
    again, error = judge(retry, error, message.attempt)
    if again:
        delay = retry.backoff(message.attempt)
        logger.warning("%r failed, and comes again in %.3g s", message, delay, exc_info=error)
        await message.nack(delay)
    else:
        logger.error("%r failed, and becomes a dead letter", message, exc_info=error)
        await message.reject(show_error(error))
