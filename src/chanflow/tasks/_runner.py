"""The workers of a task service: they run what was claimed, and settle it by what came of that."""

# Invariants:
# 1. A run is there from the moment at which its task was handed to the workers until it was settled: what is there has
#    its lease renewed.
# 2. There are no more runs than workers; what was claimed too late to be run is put back as it came.

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Mapping, Sequence
from functools import partial
from typing import Any

from anyio import CancelScope, Event, create_task_group, move_on_after, sleep
from attrs import define

from chanflow._check import message_of
from chanflow._errors import StorageError
from chanflow._loop._home import running_home
from chanflow._loop._signal import Signal
from chanflow._work._retry import judge
from chanflow.tasks._dispatch import AGAIN, Dispatch
from chanflow.tasks._handler import MAX_SECONDS, Handler, topic_of
from chanflow.tasks._log import about, current
from chanflow.tasks._statistics import Tally
from chanflow.tasks._trace import Tracing
from chanflow.tasks.record import ProgressReport, TaskRecord, TaskStatus, finish, put_back, renew, report
from chanflow.tasks.store import Change, News, Store

__all__ = ["Runner"]

logger = logging.getLogger("chanflow.tasks")

GRACE = 5.0
"""Seconds to put back, or to settle, what is cut off."""
HEARTBEAT = 1.0
"""The most seconds from one renewal of the leases to the next."""
WORKER_LOST = "WorkerLostError"
"""Where the class of an error is told: the attempt ended with its worker."""


@define(eq=False)
class Run:
    """A claimed task that is here."""

    record: TaskRecord
    """As it was claimed."""
    cancelled: bool = False
    """Whether its cancellation was asked for."""
    lost: bool = False
    """Whether another worker has the task by now."""
    scope: CancelScope | None = None
    """Its worker's, while the handler runs: what comes of that is settled in spite of a cancellation."""

    def interrupt(self) -> None:
        """Cancel the handler."""
        if self.scope is not None:
            self.scope.cancel()

    @property
    def worker(self) -> str:
        """The id of the run."""
        assert self.record.worker is not None
        return self.record.worker


class Runner:
    """The workers of one stay in a service's block.

    Args:
        dispatch: brings the tasks.
        store: where the tasks are.
        handlers: by name.
        workers: how many tasks may run at the same time, at least 0.
        ttl: seconds for which a finished task is kept.
        lease: seconds for which a worker has a task without a sign of life.
        tally: counts what comes of the tasks.
        tracing: makes spans of their runs; None for none.
    """

    def __init__(
        self,
        dispatch: Dispatch,
        store: Store,
        handlers: Mapping[str, Handler[Any, Any]],
        *,
        workers: int,
        ttl: float,
        lease: float,
        tally: Tally,
        tracing: Tracing | None,
    ) -> None:
        self._dispatch = dispatch
        self._store = store
        self._handlers = handlers
        self._workers = workers
        self._ttl = ttl
        self._lease = lease
        self._tally = tally
        self._tracing = tracing
        self._home = running_home()
        self._runs: set[Run] = set()
        # Runs that wait for a worker, and that there are some. One worker is woken, and wakes the next if there is
        # more: a channel would wake one for each, when one that is awake may take them all.
        self._waiting: deque[Run] = deque()
        self._news = Signal()
        self._waking = False
        # That a worker has nothing to do.
        self._freed = Signal()
        # That of this event loop, without looking for it again each time.
        self._new_scope = type(CancelScope())
        self.stopped = False
        self._cut_off = False
        self.drained = Event()
        if not workers:
            self.drained.set()

    @property
    def busy(self) -> int:
        """How many tasks run."""
        return len(self._runs)

    def cut_off(self) -> None:
        """Put back what runs, and what is going to."""
        self._cut_off = True
        for run in self._runs:
            run.interrupt()

    def stop(self) -> None:
        """Take up nothing more."""
        self.stopped = True
        self._dispatch.stop()
        self._news.send_all()
        self._freed.send_all()

    def hear(self, news: News) -> None:
        """Be told of a change of a task whose cancellation was asked for."""
        if news.status is TaskStatus.RUNNING:
            for run in self._runs:
                if run.record.id == news.id and not run.cancelled:
                    run.cancelled = True
                    run.interrupt()

    async def work(self) -> None:
        """Run what the dispatch brings, until stopped."""
        try:
            async with create_task_group() as group:
                group.start_soon(self._dispatch.serve, self)
                for _ in range(self._workers):
                    group.start_soon(self._run_waiting)
        finally:
            # What no worker has come to.
            await self._give_back([run.record for run in self._waiting])
            self.drained.set()

    # What the dispatch sees

    async def room(self) -> int:
        """Wait for a worker that has nothing to do, and tell how many there are; 0 once stopped."""
        while not self.stopped:
            if len(self._runs) < self._workers:
                return self._workers - len(self._runs)
            await self._freed.wait(self._home)
        # For others who wait.
        self._freed.send_all()
        return 0

    async def take(self, records: Sequence[TaskRecord]) -> None:
        """Run what was claimed."""
        if self.stopped:
            # Meanwhile.
            await self._give_back(records)
            return
        for record in records:
            run = Run(record, record.cancel_requested)
            self._runs.add(run)
            self._waiting.append(run)
        if records:
            self._wake()

    async def _give_back(self, records: Sequence[TaskRecord]) -> None:
        if not records:
            return
        now = self._store.now()
        changes: list[tuple[str, Change]] = [
            (record.id, partial(put_back, worker=record.worker or "", run_at=now, attempted=False))
            for record in records
        ]
        await self._insist(changes, "put back")

    async def _insist(self, changes: Sequence[tuple[str, Change]], what: str) -> None:
        """Change tasks, even when cancelled."""
        with move_on_after(GRACE, shield=True):
            try:
                await self._store.change_many(changes)
            except StorageError as error:
                logger.warning("%d task(s) could not be %s: %s", len(changes), what, error)

    def _wake(self) -> None:
        """Wake a worker, unless one was woken and has not come yet, or all are awake and are going to look."""
        if not self._waking:
            self._waking = True
            self._news.send()

    async def _run_waiting(self) -> None:
        """Run what was taken, one after the other, until stopped."""
        while not self.stopped or self._waiting:
            try:
                await self._run_some()
            except BaseException as error:
                # Whoever cancelled this asyncio task meant the run, which was put back: the worker goes on.
                if not self._home.uncancel(error):
                    raise

    async def _run_some(self) -> None:
        """Run what was taken, until a run is interrupted, or until stopped."""
        run: Run | None = None
        outcome: bytes | Exception | None = None
        try:
            # One scope for many runs: to make one takes a tenth of the time of a task that does nothing.
            with self._new_scope() as scope:
                while not self.stopped or self._waiting:
                    if not self._waiting:
                        await self._news.wait(self._home)
                        self._waking = False
                        continue
                    run = self._begin_next()
                    outcome = await self._attempt(run, scope)
                    if scope.cancel_called:
                        break
                    await self._settle(run, outcome)
                    self._leave(run)
                    run = outcome = None
                    await self._home.operate()
            if run is not None:
                await self._settle(run, outcome)
        except BaseException:
            # The service is cut off, or this asyncio task was cancelled.
            if run is not None and outcome is None:
                await self._give_back([run.record])
            raise
        finally:
            if run is not None:
                self._leave(run)

    # A run

    def _begin_next(self) -> Run:
        run = self._waiting.popleft()
        if self._waiting:
            self._wake()
        self._tally.begun(run.record)
        return run

    def _leave(self, run: Run) -> None:
        self._tally.left(run.record)
        self._runs.discard(run)
        self._freed.send()

    async def _attempt(self, run: Run, scope: CancelScope) -> bytes | Exception | None:
        """Call the handler, and give its encoded result or its error; None if it was not to be called."""
        record, handler = run.record, self._handlers[run.record.name]
        if run.cancelled or self._cut_off or record.attempts > handler.retry.attempts:
            return None
        current.set(record)
        attempt = handler.attempt(record.arguments, partial(self._report, run))
        run.scope = scope
        try:
            return await (attempt if self._tracing is None else self._trace(self._tracing, record, attempt))
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is this task's
            return error
        finally:
            run.scope = None

    async def _trace(self, tracing: Tracing, record: TaskRecord, attempt: Awaitable[bytes]) -> bytes:
        with tracing.running(topic_of(record.name), record):
            return await attempt

    async def _settle(self, run: Run, outcome: bytes | Exception | None) -> None:
        """Settle a run by what came of its attempt; None if that was interrupted, or not made."""
        record, handler = run.record, self._handlers[run.record.name]
        try:
            if isinstance(outcome, bytes):
                await self._finish(run, TaskStatus.SUCCESS, result=outcome)
            elif outcome is not None:
                await self._settle_failure(run, handler, outcome)
            elif run.lost:
                logger.warning(
                    "task %s took its worker too long to renew its lease, and is with another",
                    record.id,
                    extra=about(record),
                )
            elif run.cancelled:
                await self._finish(run, TaskStatus.CANCELLED)
            elif record.attempts > handler.retry.attempts:
                await self._fail_lost(run)
            else:
                await self._give_back([record])
        except StorageError as error:
            logger.warning("task %s could not be settled: %s", record.id, error, extra=about(record))

    async def _fail_lost(self, run: Run) -> None:
        """End a task whose last attempt ended with its worker."""
        record = run.record
        message = f"the worker was gone before attempt {record.attempts - 1} ended"
        logger.error("%s, task %s, failed: %s", record.name, record.id, message, extra=about(record))
        await self._finish(run, TaskStatus.FAILED, error=(WORKER_LOST, message), attempted=False)

    async def _settle_failure(self, run: Run, handler: Handler[..., Any], error: Exception) -> None:
        record = run.record
        again, error = judge(handler.retry, error, record.attempts)
        told = type(error).__name__, message_of(error)
        if again and not run.cancelled:
            self._tally.retried(record)
            delay = min(handler.retry.backoff(record.attempts), MAX_SECONDS)
            logger.warning(
                "%s, task %s, failed, and is run again in %.3g s",
                record.name,
                record.id,
                delay,
                exc_info=error,
                extra=about(record),
            )
            now = self._store.now()
            await self._change(run, partial(put_back, worker=run.worker, run_at=now + delay, error=told))
        else:
            logger.error("%s, task %s, failed", record.name, record.id, exc_info=error, extra=about(record))
            await self._finish(run, TaskStatus.FAILED, error=told)

    async def _finish(self, run: Run, status: TaskStatus, **outcome: Any) -> None:
        now = self._store.now()
        ended = await self._change(
            run, partial(finish, worker=run.worker, status=status, now=now, ttl=self._ttl, **outcome)
        )
        if ended is not None:
            self._tally.ended(ended)

    async def _change(self, run: Run, change: Change) -> TaskRecord | None:
        """Settle a task in the store, which may be away for a while: for as long as the lease holds at most."""
        give_up_at = self._home.time() + self._lease
        try:
            while True:
                try:
                    return await self._store.change(run.record.id, change)
                except StorageError as error:
                    if self._cut_off or run.lost or self._home.time() >= give_up_at:
                        raise
                    logger.warning(
                        "task %s could not be settled, which is tried again in %g s: %s",
                        run.record.id,
                        AGAIN,
                        error,
                        extra=about(run.record),
                    )
                    await sleep(AGAIN)
        except StorageError:
            raise
        except BaseException:
            # The service is cut off, but it is known what came of the run.
            await self._insist([(run.record.id, change)], "settled")
            raise

    async def _report(self, run: Run, progress: ProgressReport) -> None:
        await self._store.change(run.record.id, partial(report, worker=run.worker, progress=progress))

    async def keep(self) -> None:
        """Renew the leases of what runs, and see whether its cancellation was asked for."""
        while True:
            await sleep(min(self._lease / 3, HEARTBEAT))
            runs = list(self._runs)
            if not runs:
                continue
            until = self._store.now() + self._lease
            changes: list[tuple[str, Change]] = [
                (run.record.id, partial(renew, worker=run.worker, lease_until=until)) for run in runs
            ]
            try:
                records = await self._store.change_many(changes)
            except StorageError as error:
                logger.warning("the leases of %d task(s) could not be renewed: %s", len(runs), error)
                continue
            for run, record in zip(runs, records, strict=True):
                if run in self._runs and (record is None or record.cancel_requested):
                    run.lost = record is None
                    run.cancelled = record is not None
                    run.interrupt()
