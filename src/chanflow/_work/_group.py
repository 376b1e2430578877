"""Groups of tasks, with a result channel for each task: Go's errgroup with results."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Awaitable, Callable, Generator
from contextvars import Context, copy_context
from functools import partial
from inspect import isawaitable
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, TypeVarTuple

import anyio
from anyio import BrokenResourceError, WouldBlock
from anyio.abc import TaskGroup

from chanflow._channel._ends import Channel
from chanflow._channel._state import NOTHING, Answer
from chanflow._check import check_count, name_of, show
from chanflow._loop._home import Home, Waiter, current_home, withdraw
from chanflow._loop._wait import Outcome, WaitingRoom
from chanflow._work._call import failure_of, traceback_of

__all__ = ["Group", "Result", "ResultCancelledError"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
Ts = TypeVarTuple("Ts")


class ResultCancelledError(BrokenResourceError):
    """The task was cancelled, by `Result.cancel` or with its group, before it had a result."""


class Failure:
    """The error that a task ended with; logged if it is garbage collected before it was retrieved."""

    __slots__ = ("__weakref__", "_label", "_seen", "_traceback", "error")

    def __init__(self, error: BaseException, label: object) -> None:
        self.error = error
        self._traceback = traceback_of(error)
        self._label = label
        self._seen = False

    def look(self) -> BaseException:
        """Return the error, and mark it as retrieved."""
        self._seen = True
        # Raising an error adds to its traceback, so each waiting task would see the frames of those before it.
        return BaseException.with_traceback(self.error, self._traceback)

    def report(self) -> None:
        """Log the error unless it was retrieved."""
        if not self._seen:
            self._seen = True
            import logging  # noqa: PLC0415 -- imported only when there is something to log

            logging.getLogger("chanflow").error(
                "%s failed and nobody looked at its result", self._label, exc_info=self.error
            )

    __del__ = report


class Callback:
    """A waiter that calls a function when it is woken."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[[], object]) -> None:
        self._function = function

    def done(self) -> bool:
        return False

    def set_result(self, _outcome: Outcome) -> None:
        self._function()


PENDING: Any = object()

NEVER_BEGAN = "a task of this group was cancelled before it began, which ends the group"
"""asyncio doesn't start such a task, and its TaskGroup then ends without an error."""


class Result(Generic[T_co]):
    """The result of a task, as a receive-only channel with one item.

    `await result` returns the value or raises the task's error. Any number of tasks may await it, any number of times.
    Used as a channel, with `receive` or as a case of `select`, its one item is received once, and then it is closed.
    Results are created by `Group.go` and `WorkerGroup.submit`.
    """

    __slots__ = ("__weakref__", "_attempts", "_cancel", "_channel", "_failure", "_home", "_value", "_waiting")

    def __init__(self, home: Home, cancel: Callable[[Result[Any]], object]) -> None:
        self._home = home
        # Cancels the task. It is called with the result, so no closure is needed for each.
        self._cancel = cancel
        self._attempts = 0
        self._value: T_co = PENDING
        self._failure: Failure | None = None
        # The waiting room and the channel are created on first use.
        self._waiting: WaitingRoom[tuple[Waiter, Any]] | None = None
        self._channel: Channel[None] | None = None

    def __repr__(self) -> str:
        if not self.done:
            shown = "pending"
        elif self._failure is not None:
            shown = show(self._failure.error)
        else:
            shown = show(self._value)
        return f"<Result {shown} at {id(self):#x}>"

    @property
    def done(self) -> bool:
        """Whether the task has ended: with a value, with an error or by cancellation."""
        return self._value is not PENDING or self._failure is not None

    @property
    def attempts(self) -> int:
        """How often the task was started: 0 while it is queued, more than 1 only with `Retry`."""
        return self._attempts

    def exception(self) -> BaseException | None:
        """Return the error that the task ended with, or None if it ended with a value.

        Returns:
            The error; a `ResultCancelledError` if the task was cancelled.

        Raises:
            WouldBlock: the task has not ended.
        """
        if not self.done:
            raise WouldBlock
        return None if self._failure is None else self._failure.look()

    def cancel(self) -> None:
        """Cancel the task. A queued one is never started. Has no effect once the task has ended.

        The task has stopped when the result is done, which may take a while. A sync handler in a thread can't be
        stopped: its worker stays busy until it returns, but the result is done immediately.

        Raises:
            RuntimeError: the task belongs to another event loop or thread; call it there, as with
                `anyio.from_thread.run_sync`.
        """
        if not self.done:
            self._check_here()
            self._cancel(self)

    def _check_here(self) -> None:
        if not self._home.here():
            msg = "this result belongs to another event loop; use it there, as with anyio.from_thread.run"
            raise RuntimeError(msg)

    def __await__(self) -> Generator[Any, Any, T_co]:
        home = self._home
        if self._value is not PENDING or self._failure is not None:
            if next(home.turns, None) is not home.loop:
                self._check_here()
                yield from home.checkpoint().__await__()
        else:
            self._check_here()
            waiter = home.waiter()
            waiting = self._waiters()
            waiting.append((waiter, None))
            try:
                yield from waiter.__await__()
            except BaseException as exc:
                withdraw(waiter, home, exc)
                waiting.leave()
                raise
        if self._failure is None:
            return self._value
        try:
            raise self._failure.look()
        finally:
            # An error must not refer to itself through its traceback, nor to the result that has it.
            del self

    async def receive(self) -> T_co:
        """Receive the one item of this channel.

        Returns:
            The task's value.

        Raises:
            EndOfStream: the item was already received.
            ResultCancelledError: the task was cancelled.
            Exception: the task failed; this is its error.

        Cancellation:
            Atomic: if the call is cancelled, the item was not taken. The task is not cancelled.
        """
        await self._as_channel().receive()
        try:
            return self._outcome()
        finally:
            del self

    def receive_nowait(self) -> T_co:
        """Receive the one item of this channel if the task has ended.

        Returns:
            The task's value.

        Raises:
            WouldBlock: the task has not ended.
            EndOfStream: the item was already received.
            ResultCancelledError: the task was cancelled.
            Exception: the task failed; this is its error.
        """
        self._as_channel().receive_nowait()
        try:
            return self._outcome()
        finally:
            del self

    def _outcome(self) -> T_co:
        if self._failure is None:
            return self._value
        try:
            raise self._failure.look()
        finally:
            del self

    def _as_channel(self) -> Channel[None]:
        # The item in the channel is only a token. The value stays here for tasks that await the result.
        if self._channel is None:
            self._channel = Channel(1, "result")
            self._channel._state.home = self._home
            if self.done:
                self._deliver(self._channel)
        return self._channel

    @staticmethod
    def _deliver(channel: Channel[None]) -> None:
        channel.send_nowait(None)
        channel.close()

    # Called by the owner of the task. Only the first outcome counts.

    def _succeed(self, value: Any) -> bool:
        if self.done:
            return False
        self._value = value
        if self._waiting is not None or self._channel is not None:
            self._wake()
        return True

    def _fail(self, error: BaseException, label: object = "a task") -> Failure | None:
        if self.done:
            return None
        failure = self._failure = Failure(error, label)
        self._wake()
        return failure

    def _end_cancelled(self) -> bool:
        # Cancellation is requested, so it is not a failure to log.
        failure = self._fail(ResultCancelledError("the task was cancelled"))
        if failure is not None:
            failure.look()
        return failure is not None

    def _failure_is(self, error: BaseException) -> bool:
        return self._failure is not None and self._failure.error is error

    def _when_done(self, callback: Callable[[Result[Any]], object]) -> None:
        if self.done:
            callback(self)
        else:
            self._waiters().append((Callback(partial(callback, self)), None))

    def _waiters(self) -> WaitingRoom[tuple[Waiter, Any]]:
        if self._waiting is None:
            self._waiting = WaitingRoom()
        return self._waiting

    def _wake(self) -> None:
        if self._waiting is not None:
            self._waiting.dismiss(None)
        if self._channel is not None:
            self._deliver(self._channel)

    # The `Selectable` protocol, which is documented in `_select`.

    def _ready(self, home: Home) -> bool:
        return self._as_channel()._ready(home)

    def _try(self, home: Home | None) -> T_co | Answer:
        item: Any = self._as_channel()._try(home)
        return item if item is NOTHING else self._received()

    def _join(self, waiter: Waiter, home: Home) -> None:
        self._as_channel()._join(waiter, home)

    def _leave(self) -> None:
        self._as_channel()._leave()

    def _redeem(self, outcome: Outcome) -> T_co | Answer:
        self._as_channel()._redeem(outcome)
        return self._received()

    def _received(self) -> T_co | Answer:
        return self._value if self._failure is None else Answer(self._failure.look())

    def _release(self, outcome: Outcome) -> bool:
        return self._as_channel()._release(outcome)


Job = tuple[Result[Any], Callable[..., Awaitable[Any]], tuple[Any, ...]]


class Group:
    """Tasks that end together: Go's errgroup, with a result for each task.

    Leaving the block waits for all tasks. If one fails, the others are cancelled, and leaving the block raises
    an ExceptionGroup of the errors, each error once. An error in the block itself has the same effect.

    Args:
        limit: how many tasks may run at the same time, at least 1; None for no limit. The others are queued, and
            started in order.

    Raises:
        ValueError: `limit` is less than 1.
        TypeError: `limit` is not an int.

    Source:
        Go, golang.org/x/sync/errgroup.
    """

    def __init__(self, limit: int | None = None) -> None:
        if limit is not None:
            check_count("limit", limit, 1)
        self._limit = limit
        self._tasks: TaskGroup | None = None
        self._home: Home | None = None
        # The running tasks, each with the scope to cancel it.
        self._running: dict[Result[Any], anyio.CancelScope] = {}
        # The queued tasks, each with the context of the caller of `go`.
        self._waiting: deque[tuple[Context, Job]] = deque()

    def __repr__(self) -> str:
        return f"<Group {len(self._running)} running, {len(self._waiting)} waiting, limit {self._limit}>"

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            msg = "a Group may only be entered once"
            raise RuntimeError(msg)
        self._home = current_home()
        self._tasks = await anyio.create_task_group().__aenter__()
        return self

    def go(self, fn: Callable[[*Ts], Awaitable[T]], /, *args: *Ts) -> Result[T]:
        """Start a task: Go's `go` statement. It never waits: above the limit, the task is queued instead.

        Args:
            fn: an async function; use `functools.partial` for keyword arguments.
            args: its arguments.

        Returns:
            The result channel of the task.

        Raises:
            TypeError: `fn` is not callable.
            RuntimeError: the group was not entered, has ended, or belongs to another event loop.
        """
        if not callable(fn):
            msg = f"fn must be an async function, got {show(fn)}"
            raise TypeError(msg)
        home = self._home
        if home is None or not home.here():
            msg = "a Group may only start tasks inside of its `async with` block, in the same event loop"
            raise RuntimeError(msg)
        result: Result[T] = Result(home, self._cancel_one)
        job = result, fn, args
        if self._limit is not None and len(self._running) >= self._limit:
            self._waiting.append((copy_context(), job))
        else:
            self._start(job)
        return result

    def cancel(self) -> None:
        """Cancel all tasks of the group, and its block. Results that are not done raise ResultCancelledError.

        Raises:
            RuntimeError: the group belongs to another event loop or thread.
        """
        if self._home is not None and self._tasks is not None:
            if not self._home.here():
                msg = "this Group belongs to another event loop; cancel it there, as with anyio.from_thread.run_sync"
                raise RuntimeError(msg)
            self._tasks.cancel_scope.cancel()

    def _start(self, job: Job) -> None:
        assert self._tasks is not None
        self._running[job[0]] = anyio.CancelScope()
        self._tasks.start_soon(self._run, job, name=name_of(job[1]))

    async def _run(self, job: Job) -> None:
        result, fn, args = job
        home = self._home
        assert home is not None
        try:
            with self._running[result]:
                result._attempts = 1
                awaitable = fn(*args)
                if not isawaitable(awaitable):
                    msg = f"fn must be an async function, but {name_of(fn)} returned {show(awaitable)}"
                    raise TypeError(msg)  # noqa: TRY301 -- it fails the task like an error of the function
                result._succeed(await awaitable)
        except BaseException as error:  # noqa: BLE001 -- reraised unless it is a failure
            failure = failure_of(error, home)
            try:
                if failure is None:
                    if home.uncancel(error):
                        # `task.cancel()` on the asyncio task cancels only this task; the group goes on.
                        return
                    raise
                result._fail(failure)
                # The group raises it, so it counts as retrieved.
                result.exception()
                # Before `_next` would start a queued task.
                self.cancel()
                if failure is error:
                    raise
                raise failure
            finally:
                del failure
        finally:
            # Without a value or an error, it was cancelled.
            result._end_cancelled()
            del self._running[result]
            self._next()
            # An error must not refer to the result that has it through its traceback.
            del result, job

    def _next(self) -> None:
        while self._waiting:
            context, job = self._waiting.popleft()
            if anyio.current_effective_deadline() == -math.inf:
                job[0]._end_cancelled()
            elif not job[0].done:
                context.run(self._start, job)
                break

    def _cancel_one(self, result: Result[Any]) -> None:
        scope = self._running.get(result)
        if scope is None:
            # It is queued, and `_next` skips it.
            result._end_cancelled()
        else:
            scope.cancel()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        assert self._tasks is not None
        try:
            swallowed = await self._tasks.__aexit__(exc_type, exc, tb)
        except BaseExceptionGroup as group:
            # A block that awaits the result of a failed task raises the same error object as the task.
            errors = {id(error): error for error in group.exceptions}
            try:
                raise group.derive(list(errors.values())) from None
            finally:
                del errors
        else:
            if self._running:
                raise RuntimeError(NEVER_BEGAN)
            return swallowed
        finally:
            for result in (*self._running, *(job[0] for _context, job in self._waiting)):
                result._end_cancelled()
            self._home = None
            del exc, tb
