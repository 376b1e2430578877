"""Call a handler once, in the event loop or in a thread, in a context and within a timeout; and judge how it ended."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Generator
from contextvars import Context, copy_context
from functools import partial
from inspect import (
    CO_COROUTINE,
    isasyncgen,
    isasyncgenfunction,
    isawaitable,
    iscoroutinefunction,
    isgenerator,
    isgeneratorfunction,
)
from types import CodeType, CoroutineType, TracebackType, coroutine
from typing import Any, TypeVar, cast

from anyio import CapacityLimiter, get_cancelled_exc_class, move_on_after

from chanflow._check import show, show_error
from chanflow._loop._home import Home, running_home
from chanflow._work._offload import run_in_thread

__all__ = [
    "Attempt",
    "check_handler",
    "enter",
    "failure_of",
    "failure_of_handler",
    "follow",
    "is_async",
    "traceback_of",
]

T = TypeVar("T")


def is_kind(function: Callable[..., Any], *tests: Callable[[object], bool]) -> bool:
    """Return whether one of the tests is true of a callable, looking through partials and callable objects."""
    while isinstance(function, partial):
        function = function.func
    call = getattr(function, "__call__", None)  # noqa: B004 -- to test its kind, not whether it's callable
    return any(test(function) or test(call) for test in tests)


def is_async(function: Callable[..., Any]) -> bool:
    """Return whether calling this function returns a coroutine."""
    return is_kind(function, iscoroutinefunction)


def makes_coroutine(function: object) -> bool:
    """Return whether a function was defined with `async def`, and not merely marked as a coroutine function."""
    code = getattr(function, "__code__", None)
    return isinstance(code, CodeType) and bool(code.co_flags & CO_COROUTINE)


def check_handler(argument: str, handler: object) -> None:
    """Raise an error that names the argument unless the handler is a callable other than a generator function."""
    if not callable(handler):
        msg = f"{argument} must be callable, got {show(handler)}"
        raise TypeError(msg)
    if is_kind(handler, isasyncgenfunction, isgeneratorfunction):
        msg = f"{argument} must be a function without `yield`, as its body would never run, got {show(handler)}"
        raise TypeError(msg)


def failure_of(error: BaseException, home: Home) -> BaseException | None:
    """Return the error that a task failed with, for its result; None if it was cancelled.

    A cancellation that was not requested is a failure: for example, awaiting a cancelled future raises one. So are
    StopIteration and StopAsyncIteration, which would silently end an iteration over results (see PEP 479).
    """
    if isinstance(error, GeneratorExit):
        # The event loop may have ended.
        return None
    cancelled = get_cancelled_exc_class()
    cancellation: BaseException | None = None
    rest: BaseException | None = error
    if isinstance(error, cancelled):
        cancellation, rest = error, None
    elif isinstance(error, BaseExceptionGroup):
        cancellation, rest = error.split(cancelled)
    leave_frames(error if rest is None else rest)
    if cancellation is not None and home.cancelled():
        return rest
    if cancellation is not None:
        return substitute("the task awaited something that was cancelled, but was not cancelled itself", error)
    if isinstance(error, StopIteration | StopAsyncIteration):
        return substitute(f"the task raised {type(error).__name__}", error)
    return error


def failure_of_handler(error: BaseException, home: Home) -> Exception | None:
    """Return the error that a job failed with, for its result; None if its handler was interrupted.

    Whatever a handler raises is a failure of its job, including SystemExit. Only KeyboardInterrupt, which ends the
    program, and GeneratorExit, which ends the coroutine, are not.
    """
    failure = failure_of(error, home)
    if failure is None or isinstance(failure, Exception):
        return failure
    group = failure if isinstance(failure, BaseExceptionGroup) else BaseExceptionGroup("", [failure])
    if group.subgroup((KeyboardInterrupt, GeneratorExit)) is not None:
        return None
    return substitute(f"the task raised {show_error(failure)}", failure)


# Bypasses the error's own class, which may be frozen or define such an attribute itself.
traceback_of: Callable[[BaseException], TracebackType | None] = BaseException.__dict__["__traceback__"].__get__


def leave_frames(error: BaseException) -> None:
    """Remove the library's own frames from the head of an error's traceback.

    They are of no use to a reader, and would create a reference cycle between the error and the result that has it.
    The innermost frame always stays.
    """
    traceback = traceback_of(error)
    while (
        traceback is not None
        and traceback.tb_next is not None
        and traceback.tb_frame.f_globals.get("__name__", "").startswith("chanflow._")
    ):
        traceback = traceback.tb_next
    BaseException.with_traceback(error, traceback)


def substitute(message: str, cause: BaseException) -> RuntimeError:
    """Return the error to raise in place of one that a result must not raise, with that as its cause."""
    error = RuntimeError(message)
    error.__cause__ = cause
    return error


class Attempt:
    """A handler together with its limiter and timeout; each call is one attempt.

    Args:
        handler: any function that `check_handler` accepts.
        limiter: limits the number of threads.
        timeout: seconds that a call may take, greater than 0; None for no time limit. A thread can't be stopped, so the
            call waits until it has finished.
    """

    def __init__(self, handler: Callable[..., Any], limiter: CapacityLimiter, timeout: float | None) -> None:
        self._handler = handler
        self._limiter = limiter
        self._timeout = timeout
        self._is_async = is_async(handler)
        # Whether a call only creates a coroutine.
        self._is_simple = timeout is None and is_kind(handler, makes_coroutine)

    async def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        """Call the handler with these arguments, in a copy of the current context, and return its value.

        Raises:
            TimeoutError: the call took longer than the timeout.
            TypeError: a sync handler returned an awaitable or a generator.
            RuntimeError: the handler was cancelled although the caller was not, or it raised
                a BaseException that is no Exception, such as SystemExit.
            Exception: the handler raised it.
        """
        try:
            if self._is_simple:
                return await follow(self._handler(*args, **kwargs))
            return await follow(self.run(partial(self._handler, *args, **kwargs)))
        except BaseException as error:  # noqa: BLE001 -- reraised unless it is a failure
            failure = failure_of_handler(error, running_home())
            try:
                if failure is None or failure is error:
                    raise
                raise failure
            finally:
                # An error must not refer to itself through its traceback.
                del failure

    async def run(self, call: Callable[[], Any], expired: Callable[[TimeoutError], object] | None = None) -> Any:
        """Call the handler, and return its value or raise its error unchanged.

        Args:
            call: the handler bound to its arguments.
            expired: called with the TimeoutError as soon as a sync handler has exceeded the timeout.
        """
        if self._is_async:
            with move_on_after(self._timeout) as scope:
                return await call()
            # Reached only if the scope's own deadline cancelled it.
            assert scope.cancelled_caught
            msg = f"the handler took longer than {self._timeout} s"
            raise TimeoutError(msg)
        value = await run_in_thread(call, self._limiter, timeout=self._timeout, expired=expired)
        if isawaitable(value) or isasyncgen(value) or isgenerator(value):
            if isinstance(value, CoroutineType):
                # It will never be awaited, and would warn about that.
                value.close()
            msg = f"the handler returned {show(value)}, which nobody awaits; make it an async function"
            raise TypeError(msg)
        return value


@coroutine
def enter(context: Context) -> Generator[Context, None, None]:
    """Continue in another context. This works only in a coroutine that `follow` runs."""
    yield context


@coroutine
def follow(steps: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Await a coroutine in a copy of the current context, switching to each context that it passes to `enter`.

    A task can't change its context, and a task for each job would take several times as long.
    """
    run, send = copy_context().run, steps.send
    step: Callable[[Any], Any] = send
    argument: Any = None
    try:
        while True:
            waits_for = run(step, argument)
            while type(waits_for) is Context:
                run = waits_for.run
                waits_for = run(send, None)
            try:
                argument = yield waits_for
                step = send
            except GeneratorExit:
                run(steps.close)
                raise
            except BaseException as error:  # noqa: BLE001 -- thrown into the coroutine
                step, argument = steps.throw, error
    except StopIteration as end:
        return cast("T", end.value)
    finally:
        # An error must not refer to itself through its traceback.
        del argument
