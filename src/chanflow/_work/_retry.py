"""When to retry a failed job."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from inspect import isawaitable
from random import Random

from attrs import field, frozen

from chanflow._check import check_count, check_number, check_seconds, show
from chanflow._loop._home import running_home
from chanflow._work._call import failure_of_handler, is_async

__all__ = ["Retry", "judge"]

uniform = Random().uniform  # noqa: S311 -- not for security
"""From our own generator, so that programs that seed `random` stay reproducible."""


@frozen
class Retry:
    """When to retry a failed job: exponential backoff with jitter.

    After the n-th failed attempt, the job waits `delay * factor ** (n - 1)` seconds, at most `max_delay`. A
    random fraction of up to `jitter` is subtracted, so that jobs that failed together are not retried together.

    Args:
        attempts: the maximum number of attempts, including the first; at least 1.
        delay: seconds to wait after the first failed attempt, at least 0.
        factor: the factor by which the wait grows with each attempt, at least 1.
        max_delay: the maximum number of seconds to wait, at least 0.
        jitter: the fraction of the wait that is random, from 0 to 1.
        on: the error classes to retry, or a function that returns whether to retry an error.

    Raises:
        ValueError: a number is out of its bounds.
        TypeError: `attempts` is not an int, another number is not a number, or `on` is neither of these.

    Source:
        "Exponential Backoff and Jitter", AWS Architecture Blog; `jitter=1` is its full jitter.
    """

    attempts: int = field()
    delay: float = field(default=0.1, kw_only=True)
    factor: float = field(default=2.0, kw_only=True)
    max_delay: float = field(default=60.0, kw_only=True)
    jitter: float = field(default=0.5, kw_only=True)
    on: type[Exception] | tuple[type[Exception], ...] | Callable[[Exception], bool] = field(
        default=Exception, kw_only=True
    )

    def __attrs_post_init__(self) -> None:
        check_count("attempts", self.attempts, 1)
        check_seconds("delay", self.delay)
        check_seconds("max_delay", self.max_delay)
        for argument in "factor", "jitter":
            check_number(argument, getattr(self, argument))
        if not self.factor >= 1:
            msg = f"factor must be >= 1, got {show(self.factor)}"
            raise ValueError(msg)
        kinds = self.on if isinstance(self.on, tuple) else (self.on,)
        if is_async(self.on) if callable(self.on) else not all(isinstance(kind, type) for kind in kinds):
            msg = f"on must be an error class, a tuple of them or a function that is not async, got {show(self.on)}"
            raise TypeError(msg)
        if not 0 <= self.jitter <= 1:
            msg = f"jitter must be from 0 to 1, got {show(self.jitter)}"
            raise ValueError(msg)

    def wants(self, error: Exception, attempts: int) -> bool:
        """Return whether to retry a job.

        Args:
            error: the error of the last attempt.
            attempts: the number of attempts so far, at least 1.
        """
        if attempts >= self.attempts:
            return False
        if isinstance(self.on, type | tuple):
            return isinstance(error, self.on)
        wanted: object = self.on(error)
        if isawaitable(wanted):
            if isinstance(wanted, Coroutine):
                # It will never be awaited, and would warn about that.
                wanted.close()
            msg = f"on returned {show(wanted)}, which nobody awaits; it must tell at once"
            raise TypeError(msg)
        return bool(wanted)

    def backoff(self, attempts: int) -> float:
        """Return the number of seconds to wait before the next attempt, with random jitter.

        Args:
            attempts: the number of attempts so far, at least 1.
        """
        try:
            wait = min(self.delay * float(self.factor) ** (attempts - 1), self.max_delay)
        except OverflowError:
            wait = self.max_delay if self.delay else 0.0
        return wait * (1 - uniform(0, self.jitter))


def judge(retry: Retry, error: Exception, attempts: int) -> tuple[bool, Exception]:
    """Return whether to retry a job, and the error to report: that of the `on` function, if it failed itself.

    Call this while the job's error is being handled, so that it becomes the context of the other.
    """
    try:
        return retry.wants(error, attempts), error
    except BaseException as broken:
        # An error of the `on` function is judged like one of the handler.
        failure = failure_of_handler(broken, running_home())
        if failure is None:
            raise
        return False, failure
