"""Worker groups: a bounded number of workers, and a result channel for each job."""

# Invariants:
# 1. An accepted job is in exactly one place: in the queue, with one worker, or in `_delayed` between two attempts. It
#    leaves when its result is done, or moves to `leftover`.
# 2. `_busy` handlers are running, and none starts while `_busy >= _limit`.
# 3. While jobs are queued, `_limit` workers exist.

from __future__ import annotations

import logging
import math
from collections.abc import AsyncIterable, Awaitable, Callable, Iterable
from contextvars import Context, ContextVar, copy_context
from functools import partial
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self, TypeAlias, TypeVar, cast, overload
from weakref import WeakSet

import anyio
import anyio.lowlevel
from anyio import BrokenResourceError, CapacityLimiter, ClosedResourceError, EndOfStream, WouldBlock
from anyio.abc import TaskGroup

from chanflow._channel._ends import Channel, SendChannel
from chanflow._check import check_count, check_seconds, name_of, show
from chanflow._loop._home import Home, current_home, running_home, withdraw
from chanflow._loop._wait import WaitingRoom
from chanflow._work._call import Attempt, check_handler, enter, failure_of_handler, follow, is_async
from chanflow._work._group import NEVER_BEGAN, PENDING, Failure, Result
from chanflow._work._map import Feed, MapIterator
from chanflow._work._offload import Offload
from chanflow._work._retry import Retry, judge

__all__ = ["DeadLetter", "Retry", "WorkerGroup", "WorkerStatistics"]

Job = TypeVar("Job")
R = TypeVar("R")

logger = logging.getLogger("chanflow")


class DeadLetter(NamedTuple, Generic[Job]):
    """A job that failed and is not retried any more."""

    job: Job
    error: Exception
    attempts: int


class WorkerStatistics(NamedTuple):
    """A snapshot of a worker group."""

    workers: int
    """How many handlers may run at the same time."""
    running: int
    """How many handlers are running."""
    queued: int
    """Jobs that wait for a worker."""
    delayed: int
    """Jobs that wait for their next attempt."""
    submitters_waiting: int
    """Tasks that wait to submit a job."""
    succeeded: int
    failed: int
    """Jobs that failed and are not retried any more."""
    cancelled: int
    retries: int
    """Attempts after the first of each job."""


Verdict: TypeAlias = tuple[bool, Exception]
"""Whether to retry a failed job, and the error to fail it with if not."""


class JobResult(Result[R]):
    """A result together with its job, so that a job costs only one object."""

    __slots__ = ("cancelling", "context", "expired", "job", "worker")

    def __init__(self, home: Home, cancel: Callable[[Any], object], job: Any) -> None:
        # The constructor of `Result`, inlined because it runs for each job.
        self._home = home
        self._cancel = cancel
        self._attempts = 0
        self._value = PENDING
        self._failure = self._waiting = self._channel = None
        self.job = job
        # The context of the submitter, in which the handler runs; None when the job has ended.
        self.context: Any = copy_context()
        self.worker: Worker | None = None
        # Whether its cancellation was requested, so that it is not left over if the group is stopped in the meantime.
        self.cancelling = False
        # The verdict at the timeout of its attempt, whose thread is still running.
        self.expired: Verdict | None = None


class Worker:
    """A task that handles one job after another."""

    __slots__ = ("blocked", "context", "deadlocked", "group", "result", "retired", "running", "scope", "spent", "task")

    context: Context
    """The context between jobs."""

    def __init__(self, group: WorkerGroup[Any, Any], result: JobResult[Any] | None) -> None:
        self.group = group
        self.result = result
        # Cancels the job. The scope is then spent, and replaced unless the worker is retired.
        self.scope = anyio.CancelScope()
        self.spent = False
        self.retired = False
        # Whether it is counted in `_busy`.
        self.running = False
        self.task: int | None = None
        # The job that its handler is waiting to submit to this group, and whether that is refused as a deadlock.
        self.blocked: JobResult[Any] | None = None
        self.deadlocked = False


SHUTTING_DOWN = "the worker group is shutting down"
DEADLOCK = (
    "the worker group is full, and every one of its handlers waits to submit to it, which could never end; "
    "use a larger buffer, submit_nowait, or another group for the jobs of jobs"
)

# The job whose handler runs in the current task, or has started it.
inside: ContextVar[JobResult[Any] | None] = ContextVar("inside", default=None)


class WorkerGroup(Generic[Job, R]):
    """A bounded number of workers that handle jobs, with a result channel for each job.

    Jobs are started in the order in which they were submitted, each in a copy of the context (`contextvars`) of
    its submitter. If a job fails, its result fails, but not the group. The error is logged if it is never
    retrieved. If a handler exits, or awaits something that was cancelled, its job fails with a RuntimeError caused by
    that. Leaving the block normally waits until all submitted jobs are done. Leaving it with an error or a cancellation
    stops the group: unfinished results raise ResultCancelledError, and `leftover` has their jobs.

    Args:
        handler: called with each job. An async function runs in the event loop; a sync one in a thread. Type checkers
            infer the job and result types from it. For a lambda, give them: `WorkerGroup[int, str](lambda page: ...)`.
        workers: how many handlers may run at the same time, at least 1; 10 by default.
        buffer: how many jobs may wait for a worker before `submit` waits, at least 0; `math.inf` for an unbounded
            buffer. 100 by default.
        retry: when to retry a failed job; None for never.
        timeout: seconds that each attempt may take, greater than 0; None for no time limit. An attempt that takes
            longer fails with TimeoutError.
        dead_letters: a channel that receives a `DeadLetter` for each job that failed and is not retried any more; or
            None. A worker waits while the channel is full.
        offload: where a sync handler runs; only "thread" so far. None chooses by the kind of handler.

    Raises:
        ValueError: a number is out of its bounds; `offload` is unknown or given for an async handler.
        TypeError: `handler` is not callable, `dead_letters` is not a channel that can be sent to, or a count is not an
            int.

    Source:
        Go's worker pool; sourcegraph/conc, alitto/pond (groups and pools with results).
    """

    # The async overload comes first: to type checkers, an async function is also a function that returns a coroutine.
    @overload
    def __init__(
        self,
        handler: Callable[[Job], Awaitable[R]],
        *,
        workers: int = ...,
        buffer: float = ...,
        retry: Retry | None = ...,
        timeout: float | None = ...,
        dead_letters: Channel[DeadLetter[Job]] | SendChannel[DeadLetter[Job]] | None = ...,
        offload: None = ...,
    ) -> None: ...
    @overload
    def __init__(
        self,
        handler: Callable[[Job], R],
        *,
        workers: int = ...,
        buffer: float = ...,
        retry: Retry | None = ...,
        timeout: float | None = ...,
        dead_letters: Channel[DeadLetter[Job]] | SendChannel[DeadLetter[Job]] | None = ...,
        offload: Offload | None = ...,
    ) -> None: ...
    def __init__(
        self,
        handler: Callable[[Job], Any],
        *,
        workers: int = 10,
        buffer: float = 100,
        retry: Retry | None = None,
        timeout: float | None = None,
        dead_letters: Channel[DeadLetter[Job]] | SendChannel[DeadLetter[Job]] | None = None,
        offload: Offload | None = None,
    ) -> None:
        check_handler("handler", handler)
        check_count("workers", workers, 1)
        check_count("buffer", buffer, 0, infinite=True)
        if timeout is not None:
            check_seconds("timeout", timeout, positive=True)
        if retry is not None and not isinstance(retry, Retry):
            msg = f"retry must be a Retry or None, got {show(retry)}"
            raise TypeError(msg)
        if dead_letters is not None and not isinstance(dead_letters, Channel | SendChannel):
            msg = f"dead_letters must be a Channel, SendChannel or None, got {show(dead_letters)}"
            raise TypeError(msg)
        if offload not in {None, "thread"}:
            msg = f"offload must be 'thread' or None, got {show(offload)}"
            raise ValueError(msg)
        self._name = name_of(handler)
        self._sync = not is_async(handler)
        if offload is not None and not self._sync:
            msg = f"offload must be None for an async handler, got {show(offload)}"
            raise ValueError(msg)
        self._handler: Callable[[Job], Any] = handler
        self._limit = workers
        self._retry = retry
        self._dead_letters = dead_letters
        # Calls the handler. None for an async handler without a timeout, which is called directly.
        self._attempt = Attempt(handler, CapacityLimiter(math.inf), timeout) if self._sync or timeout else None
        self._queue: Channel[JobResult[R]] = Channel(buffer, f"jobs of {self._name}")
        self._home: Home | None = None
        self._tasks: TaskGroup | None = None
        self._workers: set[Worker] = set()
        # The number of jobs that were accepted, or wait to be, and have not ended; and of running handlers.
        self._jobs = 0
        self._busy = 0
        # Workers that have a job but must wait, because the group was made smaller.
        self._turns: WaitingRoom[tuple[Any, None]] = WaitingRoom()
        self._delayed: dict[JobResult[R], anyio.CancelScope] = {}
        # The number of handlers that wait to submit to this group, including any that were accepted but have not run
        # since.
        self._waiting_handlers = 0
        self._feeds: set[Feed[Job, R]] = set()
        self._failures: WeakSet[Failure] = WeakSet()
        self._closing = False
        self._stopping = False
        # Set when no job is left, and when no task is left; created by a task that waits for that.
        self._drained: anyio.Event | None = None
        self._gone: anyio.Event | None = None
        self._succeeded = self._failed = self._cancelled = self._retries = 0
        self._leftover: list[Job] = []
        self._returned = False

    def __repr__(self) -> str:
        return f"<WorkerGroup of {self._name}: {self._busy} of {self._limit} running, {len(self._queue)} queued>"

    async def __aenter__(self) -> Self:
        if self._tasks is not None:
            msg = "a WorkerGroup may only be entered once"
            raise RuntimeError(msg)
        self._home = current_home()
        self._context = copy_context()
        self._tasks = await anyio.create_task_group().__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> bool | None:
        assert self._tasks is not None
        try:
            if exc is None:
                self._closing = True
                await self._drain()
        except BaseException as error:
            await self._end(error)
            raise  # pragma: no cover -- the task group has raised it, but need not
        return await self._end(exc)

    async def _end(self, error: BaseException | None) -> bool | None:
        """Stop the group and wait for its tasks; after draining, these are only idle workers."""
        assert self._tasks is not None
        self._stop()
        try:
            # The task group would wrap an error of the block, so it doesn't get to see it. But it must see a
            # cancellation, which may be its own, for example after a handler raised KeyboardInterrupt.
            cancelled = isinstance(error, anyio.get_cancelled_exc_class() | BaseExceptionGroup)
            if error is not None and cancelled and not isinstance(error, Exception):
                swallowed = await self._tasks.__aexit__(type(error), error, error.__traceback__)
            else:
                swallowed = None
                try:
                    await self._tasks.__aexit__(None, None, None)
                except anyio.get_cancelled_exc_class():
                    # A cancellation that came while waiting must not replace the error of the block.
                    if error is None:
                        raise
            if (error is None or swallowed) and (self._workers or self._delayed):
                raise RuntimeError(NEVER_BEGAN)
            return swallowed
        finally:
            # The jobs of tasks that never began are left over, too.
            for worker in list(self._workers):
                self._put_down(worker)
            self._workers.clear()
            self._collect()
            self._home = None
            for failure in list(self._failures):
                failure.report()
            if self._leftover and not self._returned:
                logger.warning("%r was stopped with %d job(s) left over", self, len(self._leftover))

    # Submitting

    async def submit(self, job: Job) -> Result[R]:
        """Submit a job, waiting for room.

        Args:
            job: the argument for the handler.

        Returns:
            The result channel of the job.

        Raises:
            ClosedResourceError: the group has ended, or it is shutting down, when only its own handlers may submit
                jobs.
            RuntimeError: the group was not entered, or belongs to another event loop; or the group is full and
                all of its handlers, including the caller, wait for room in it, which is a deadlock.

        Cancellation:
            Atomic: if the call is cancelled, the job was not submitted. A call that does not have to wait is only
            occasionally a checkpoint, see :func:`set_checkpoint_interval`.
        """
        home = self._home
        if home is None or self._closing or next(home.turns, None) is not home.loop:
            try:
                home = self._check_open()
            except ClosedResourceError:
                await running_home().operate()
                raise
            if not home.turns_left() and self._has_room():
                await home.checkpoint()
                self._check_open()
        result: JobResult[R] = JobResult(home, self._cancel_job, job)
        if not self._accept(result):
            worker = self._check_progress(result)
            self._jobs += 1
            try:
                await self._queue.send(result)
            except BaseException as error:
                self._jobs -= 1
                self._check_done()
                if worker is not None and worker.deadlocked and isinstance(error, ClosedResourceError):
                    worker.deadlocked = False
                    raise RuntimeError(DEADLOCK) from None
                raise
            finally:
                if worker is not None:
                    worker.blocked = None
                    self._waiting_handlers -= 1
        return result

    def submit_nowait(self, job: Job) -> Result[R]:
        """Submit a job if there is room.

        Args:
            job: the argument for the handler.

        Returns:
            The result channel of the job.

        Raises:
            WouldBlock: the buffer is full and every worker is busy.
            ClosedResourceError: the group is shutting down, when only its own handlers may submit jobs.
            RuntimeError: the group was not entered or belongs to another event loop.
        """
        result: JobResult[R] = JobResult(self._check_open(), self._cancel_job, job)
        if not self._accept(result):
            raise WouldBlock
        return result

    def _check_open(self) -> Home:
        home = self._home
        if home is None:
            if self._tasks is not None:
                # The same error as while the group is ending, since the caller is only a little later.
                msg = "the worker group is over"
                raise ClosedResourceError(msg)
            msg = "a WorkerGroup accepts jobs only inside of its `async with` block"
            raise RuntimeError(msg)
        if home.running() is not home.loop:
            self._check_here()
        if self._closing and (self._stopping or self._ancestor() is None):
            raise ClosedResourceError(SHUTTING_DOWN)
        return home

    def _check_here(self) -> None:
        if self._home is not None and not self._home.here():
            msg = "this WorkerGroup belongs to another event loop; use it there, as with anyio.from_thread.run"
            raise RuntimeError(msg)

    def _ancestor(self) -> Worker | None:
        """Return the worker whose handler is the caller, or has started the calling task or thread."""
        job = inside.get()
        worker = None if job is None else job.worker
        return worker if worker is not None and worker.group is self else None

    def _caller(self) -> Worker | None:
        """Return the worker whose handler itself is the caller, possibly from its thread."""
        worker = self._ancestor()
        # Tasks that a handler started don't count, as the handler may not be waiting for them.
        if worker is None or self._home is None or not self._home.here():
            return None
        assert worker.task is not None
        return worker if worker.task == anyio.get_current_task().id or self._home.serves(worker.task) else None

    def _has_room(self) -> bool:
        """Return whether `_accept` would accept a job."""
        queue = self._queue._state
        free = queue.count_free()
        return free < queue.room or (not free and len(self._workers) < self._limit) or queue.receivers.any_live()

    def _accept(self, result: JobResult[R]) -> bool:
        """Accept a job if there is a worker or room for it; return whether there is."""
        if self._stopping:
            # A task that was woken before the group was stopped may reach this afterwards.
            raise ClosedResourceError(SHUTTING_DOWN)
        queue = self._queue._state
        if len(self._workers) < self._limit and not queue.count_free() and not queue.receivers.any_live():
            # Every worker has a job or was handed one, and no queued job comes before this one.
            self._start_worker(result)
        elif not queue.put(result):
            return False
        self._jobs += 1
        return True

    def _ensure_worker(self) -> None:
        """Start workers for queued jobs, up to the limit."""
        queue = self._queue._state
        jobs = queue.count_free() + queue.senders.count_live()
        if not self._stopping:
            for _ in range(min(self._limit - len(self._workers), jobs)):
                self._start_worker(None)

    def _start_worker(self, result: JobResult[R] | None) -> None:
        assert self._tasks is not None
        worker = Worker(self, result)
        self._workers.add(worker)
        if result is not None:
            result.worker = worker
        # Not in the context of a job, which would then live as long as the worker.
        self._context.copy().run(self._start_task, worker)

    def _start_task(self, worker: Worker) -> None:
        assert self._tasks is not None
        self._tasks.start_soon(self._work, worker, name=self._name)

    def _check_progress(self, result: JobResult[R]) -> Worker | None:
        """Raise an error instead of waiting if every other handler already waits for room in this group.

        Returns:
            The worker whose handler is the caller and now counts as waiting; None if the caller is no handler.
        """
        worker = self._caller()
        if worker is None:
            return None
        others = len(self._workers) - 1
        if self._waiting_handlers >= others >= self._limit - 1 and self._blocked() >= others:
            raise RuntimeError(DEADLOCK)
        worker.blocked = result
        self._waiting_handlers += 1
        return worker

    def _blocked(self) -> int:
        """Return how many workers' handlers are waiting to submit to this group, not yet accepted or cancelled."""
        waiting = {entry[2] for entry in self._queue._state.senders if not entry[0].done()}
        return sum(worker.blocked in waiting for worker in self._workers)

    def _break_deadlock(self) -> None:
        """Fail the submission of one handler if all remaining handlers wait for room, now that a worker has left."""
        most = max(len(self._workers), self._limit)
        # The cheap count comes first, since `_blocked` looks at every worker.
        if not self._workers or self._stopping or self._waiting_handlers < most or self._blocked() < most:
            return
        worker = next(iter(self._workers))
        worker.deadlocked = True
        self._queue._state.senders.dismiss(ClosedResourceError, lambda entry: entry[2] is worker.blocked)

    def map(self, jobs: Iterable[Job] | AsyncIterable[Job], *, ordered: bool = True) -> MapIterator[R]:
        """Handle jobs, and iterate over the values that the handler returns for them.

        At most `workers + buffer` jobs are read from `jobs` ahead of the iteration, so an endless
        source or large results are fine. If the iteration is left early, or ends with an error, the
        jobs that are not finished are cancelled.

        Args:
            jobs: any iterable, asynchronous iterable or channel. If it raises an error, the iteration raises it after
                the results of the jobs before.
            ordered: True for results in the order of `jobs`, False for the order in which they finish.

        Returns:
            An asynchronous iterator. It raises the error of the first job, in that order, that failed and is not
            retried any more.

        Raises:
            TypeError: `jobs` is not iterable.
            ClosedResourceError: the group is shutting down.
            RuntimeError: the group was not entered or belongs to another event loop.

        Cancellation:
            Cancels the jobs that are not finished.
        """
        if not isinstance(jobs, Iterable | AsyncIterable):
            msg = f"jobs must be an iterable or asynchronous iterable, got {show(jobs)}"
            raise TypeError(msg)
        self._check_open()
        window = self._limit + self._queue.capacity
        return MapIterator(Feed(self, jobs, ordered=ordered, window=window))

    # Working

    async def _work(self, worker: Worker) -> None:
        await follow(self._handle_jobs(worker))

    async def _handle_jobs(self, worker: Worker) -> None:
        worker.task = anyio.get_current_task().id
        worker.context = copy_context()
        try:
            while not worker.retired and self._wanted(worker):
                try:
                    with worker.scope:
                        await self._serve(worker)
                except EndOfStream:
                    """The group was stopped or made smaller."""
                except BaseException as error:
                    # The worker's asyncio task may have been cancelled between two attempts. The worker goes on.
                    if self._home is None or not self._home.uncancel(error):
                        raise
                    if worker.result is not None:
                        worker.result.cancelling = True
                self._put_down(worker)
                if not worker.retired:
                    worker.spent = False
                    worker.scope = anyio.CancelScope()
        except BaseException:
            # The whole group is being cancelled, so no new worker may start.
            self._leave(worker)
            raise
        self._leave(worker)
        self._ensure_worker()
        self._break_deadlock()

    def _leave(self, worker: Worker) -> None:
        """Remove a worker from the group."""
        self._put_down(worker)
        self._workers.discard(worker)
        self._check_done()

    def _wanted(self, worker: Worker) -> bool:
        """Return whether a worker should go on: it has a job, or the group has not become too large."""
        return worker.result is not None or len(self._workers) <= self._limit

    async def _serve(self, worker: Worker) -> None:  # noqa: C901 -- saves a frame for each job
        """Handle one job after another, while this worker is wanted and its scope is not spent."""
        queue, home = self._queue._state, self._home
        assert home is not None
        while not worker.spent and (worker.result is not None or len(self._workers) <= self._limit):
            result = worker.result
            if result is None:
                if len(queue.buffer) > queue.reserved and next(home.turns, None) is home.loop:
                    # `receive`, without a coroutine for each job.
                    result = queue.take()
                else:
                    # An idle worker should not keep the context of its last job alive.
                    await enter(worker.context)
                    result = await self._queue.receive()
                worker.result = result
                result.worker = worker
                if self._delayed:
                    # The task that put it back into the queue may not have removed it yet.
                    self._delayed.pop(result, None)
            while self._busy >= self._limit and not result.done:
                # The job was handed over before the group was made smaller.
                await self._wait_turn()
            if worker.retired:
                return
            self._busy += 1
            worker.running = True
            # When the task runs, its job may have been cancelled, or the group stopped, since it was woken.
            while not (worker.spent or result.done):
                if self._busy > self._limit:
                    # The group was made smaller while this worker kept its job between two attempts.
                    await self._wait_again(worker)
                    continue
                result._attempts += 1
                try:
                    # Each attempt begins with the context as it was when the job was submitted.
                    await enter(result.context if self._retry is None else result.context.copy())
                    inside.set(result)
                    if self._attempt is None:
                        value = await self._handler(result.job)
                    else:
                        # Only a thread continues after its timeout. With an async handler, the error would refer to its
                        # result through this partial.
                        expired = partial(self._expire, result) if self._sync else None
                        value = await self._attempt.run(partial(self._handler, result.job), expired)
                except BaseException as error:
                    # Judged in another frame: a local variable for the failure would be in its own traceback.
                    if not await self._settle(result, error):
                        raise
                    if result in self._delayed:
                        break
                else:
                    self._succeeded += result._succeed(value)
                    # An idle worker should not keep it alive.
                    del value
                    break
            self._put_down(worker)

    async def _wait_again(self, worker: Worker) -> None:
        """Stop counting as busy, and wait until fewer handlers run; the worker keeps its job."""
        result = worker.result
        assert result is not None
        worker.running = False
        self._busy -= 1
        while self._busy >= self._limit and not result.done:
            await self._wait_turn()
        worker.running = True
        self._busy += 1

    async def _wait_turn(self) -> None:
        """Wait until fewer handlers run, after the group was made smaller."""
        assert self._home is not None
        waiter = self._home.waiter()
        self._turns.append((waiter, None))
        try:
            await waiter
        except BaseException as exc:
            if withdraw(waiter, self._home, exc):
                self._give_turn()  # pragma: no cover -- only if asyncio itself cancels the worker, in that tick
            self._turns.leave()
            raise

    def _give_turn(self) -> None:
        if self._busy < self._limit and self._turns.any_live():
            self._turns.popleft()[0].set_result(None)

    def _put_down(self, worker: Worker) -> None:
        """Detach a worker from its job, and record the job as ended unless it is delayed."""
        result = worker.result
        if result is None:
            return
        worker.result = result.worker = None
        if worker.running:
            worker.running = False
            self._busy -= 1
            if self._turns:
                self._give_turn()
        if self._delayed and result in self._delayed:
            return
        if result._value is PENDING and not result.done:
            if result.cancelling:
                self._end_cancelled(result)
            else:
                self._leave_over(result)
        # A reference to the result should not keep the job alive.
        result.job = result.context = None
        self._jobs -= 1
        if self._drained is not None:
            self._check_done()

    def _expire(self, result: JobResult[R], error: TimeoutError) -> None:
        """Judge an attempt that timed out, and fail the result unless it is retried; its thread is still running."""
        result.expired = self._judge(result, error)[0], error
        if not result.expired[0]:
            self._fail(result, error)

    def _judge(self, result: JobResult[R], error: Exception) -> Verdict:
        """Return whether to retry a job, and the error to fail it with if not."""
        if self._retry is None or result.done or self._ends(result):
            return False, error
        return judge(self._retry, error, result._attempts)

    def _ends(self, result: JobResult[R]) -> bool:
        """Return whether a job must not be retried, because it was cancelled or the group stopped."""
        return result.cancelling or self._stopping

    async def _settle(self, result: JobResult[R], error: BaseException) -> bool:
        """Settle a failed attempt by retrying or failing the job; return False if the worker was interrupted in it."""
        home = self._home
        assert home is not None
        failure = failure_of_handler(error, home)
        if failure is None:
            if result.worker is None or result.worker.spent or not home.uncancel(error):
                return False
            # `task.cancel()` on the worker's asyncio task cancels only this job; the worker goes on.
            self._end_cancelled(result)
            return True
        verdict, result.expired = result.expired, None
        again, failure = verdict or self._judge(result, failure)
        if again and not self._ends(result):
            await self._attempt_later(result)
        else:
            await self._bury(result, failure)
        return True

    async def _attempt_later(self, result: JobResult[R]) -> None:
        """Delay a job until its next attempt: in a task of its own, or if there are too many, with its worker."""
        assert self._retry is not None
        assert self._tasks is not None
        self._retries += 1
        wait = self._retry.backoff(result._attempts)
        if len(self._delayed) < self._queue.capacity:
            self._delayed[result] = anyio.CancelScope()
            self._tasks.start_soon(self._delay, result, wait, name=f"{self._name} (retry)")
        else:
            # As many jobs as the buffer holds are already delayed, so this one keeps its worker.
            await anyio.sleep(wait)

    async def _bury(self, result: JobResult[R], error: Exception) -> None:
        """Send a job to the dead letters, and fail its result."""
        sent = False
        if self._dead_letters is not None and (not result.done or result._failure_is(error)):
            try:
                await self._dead_letters.send(DeadLetter(cast("Job", result.job), error, result._attempts))
                sent = True
            except (BrokenResourceError, ClosedResourceError, RuntimeError) as refusal:
                # The channel is closed, or belongs to another event loop. The failure is logged unless it is retrieved.
                logger.warning("job %s could not be sent to the dead letters: %s", show(result.job), refusal)
        self._fail(result, error)
        if sent:
            # The receiver of the dead letter has the error, so it counts as retrieved.
            result.exception()

    async def _delay(self, result: JobResult[R], wait: float) -> None:
        """Put a job back into the queue after the wait."""
        scope = self._delayed[result]
        taken = False
        try:
            with scope:
                await anyio.sleep(wait)
                if self._accept(result):
                    # `_accept` has counted it again, but it is the same job.
                    self._jobs -= 1
                else:
                    await self._queue.send(result)
                taken = True
        except ClosedResourceError:
            """The group was stopped."""
        except BaseException as error:
            if self._home is None or not self._home.uncancel(error):
                raise
            # `task.cancel()` on this asyncio task cancels only the job.
            self._end_cancelled(result)
        finally:
            # If a worker took it, it may have failed and be delayed again by now.
            if self._delayed.get(result) is scope:
                del self._delayed[result]
            if not taken:
                self._leave_over(result)
                self._jobs -= 1
                self._check_done()
            self._check_done()

    # Ending

    def _cancel_job(self, result: JobResult[R]) -> None:
        result.cancelling = True
        worker = result.worker
        if worker is not None:
            worker.spent = True
            worker.scope.cancel()
            if not self._sync:
                # The result is done when its handler has stopped.
                return
        elif result in self._delayed:
            self._delayed[result].cancel()
        self._end_cancelled(result)

    def _end_cancelled(self, result: JobResult[R]) -> None:
        self._cancelled += result._end_cancelled()

    def _leave_over(self, result: JobResult[R]) -> None:
        if not result.done:
            self._leftover.append(cast("Job", result.job))
            result._end_cancelled()

    def _fail(self, result: JobResult[R], error: Exception) -> None:
        failure = result._fail(error, f"job {show(result.job)}")
        if failure is not None:
            self._failed += 1
            self._failures.add(failure)

    async def _drain(self) -> None:
        """Wait until all jobs have ended, or the group is stopped."""
        while self._unfinished():
            if self._drained is None or self._drained.is_set():
                self._drained = anyio.Event()
            await self._drained.wait()

    def _unfinished(self) -> bool:
        return self._jobs > 0 and not self._stopping

    def _check_done(self) -> None:
        if self._drained is not None and not self._unfinished():
            self._drained.set()
        if self._gone is not None and not self._workers and not self._delayed:
            self._gone.set()

    def _stop(self) -> None:
        """Cancel all unfinished jobs; each is recorded as left over or cancelled when its task ends."""
        self._closing = self._stopping = True
        self._queue._state.close()
        for worker in self._workers:
            worker.retired = worker.spent = True
            worker.scope.cancel()
        for scope in self._delayed.values():
            scope.cancel()
        for feed in self._feeds:
            feed.refuse()
        self._check_done()

    def _collect(self) -> None:
        """Add the jobs that never reached a worker to those left over."""
        for result in (*self._queue._state.drain(), *self._delayed):
            self._leave_over(result)
        self._delayed.clear()

    async def shutdown(self, timeout: float | None = None) -> list[Job]:
        """Stop accepting jobs, wait for the submitted ones until the timeout, then cancel the rest.

        Jobs submitted by the group's own handlers are still accepted until then. A sync handler in a thread can't be
        cancelled, so this waits until it returns.

        Args:
            timeout: seconds to wait for jobs, at least 0; None for no time limit.

        Returns:
            The jobs that were not finished. Their results raise ResultCancelledError.

        Raises:
            ValueError: `timeout` is negative.
            RuntimeError: called by a handler of the group itself, or the group was not entered.

        Cancellation:
            The group still accepts no more jobs. Leaving its block stops the remaining ones.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        if self._home is None or self._caller() is not None:
            msg = "shutdown must be called inside of the group's block, and not by one of its handlers"
            raise RuntimeError(msg)
        self._check_here()
        self._closing = True
        with anyio.move_on_after(timeout):
            await self._drain()
        self._stop()
        while self._workers or self._delayed:
            if self._gone is None or self._gone.is_set():
                self._gone = anyio.Event()
            await self._gone.wait()
        self._collect()
        self._returned = True
        return list(self._leftover)

    @property
    def leftover(self) -> tuple[Job, ...]:
        """The jobs that were accepted but not finished when the group was stopped."""
        return tuple(self._leftover)

    def resize(self, workers: int) -> None:
        """Change how many handlers may run at the same time.

        Making the group smaller does not interrupt handlers: none starts until few enough are running.

        Args:
            workers: at least 1.

        Raises:
            ValueError: `workers` is less than 1.
            TypeError: `workers` is not an int.
            RuntimeError: the group belongs to another event loop or thread.
        """
        check_count("workers", workers, 1)
        self._check_here()
        self._limit = workers
        receivers = self._queue._state.receivers
        for _ in range(len(self._workers) - workers):
            if not receivers.any_live():
                break
            # Idle workers leave immediately, the others after their job.
            receivers.popleft()[0].set_result(EndOfStream)
        for _ in range(workers - self._busy):
            self._give_turn()
        if self._home is not None:
            self._ensure_worker()
            self._break_deadlock()

    def statistics(self) -> WorkerStatistics:
        """Return the numbers of jobs, running handlers and waiting submitters, and totals of ended jobs."""
        queue = self._queue.statistics()
        return WorkerStatistics(
            workers=self._limit,
            running=self._busy,
            queued=queue.current_buffer_used,
            delayed=len(self._delayed),
            submitters_waiting=queue.tasks_waiting_send,
            succeeded=self._succeeded,
            failed=self._failed,
            cancelled=self._cancelled,
            retries=self._retries,
        )
