"""The workers of a task service: they take tasks up, run them, and settle them by what came of that."""

# Invariants:
# 1. A message is held by its subscription from its delivery until its task was settled, and no longer. A subscription
#    is left only when none of its tasks runs; what was still waiting for a worker is given back then.
# 2. A run is there from the claim of its task until it was settled: what is there has its lease renewed.

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from itertools import count
from secrets import token_hex
from typing import Any

from anyio import CancelScope, Event, Semaphore, WouldBlock, create_task_group, move_on_after, sleep
from attrs import define, field

from chanflow._park import running_home
from chanflow._retry import judge
from chanflow._signal import Signal
from chanflow._storage import StorageError
from chanflow.bus import Bus, LeaseLostError, Message, Subscription
from chanflow.tasks._handler import Handler
from chanflow.tasks._log import about, current
from chanflow.tasks._statistics import Tally
from chanflow.tasks._trace import Tracing
from chanflow.tasks.record import ProgressReport, TaskRecord, TaskStatus, claim, finish, put_back, renew, report
from chanflow.tasks.store import Store

__all__ = ["Runner", "topic_of"]

logger = logging.getLogger("chanflow.tasks")

TOPIC = "tasks."
"""What the topics begin with: each handler has one, so that a worker is only told of tasks that it knows."""
GROUP = "workers"
GRACE = 5.0
"""Seconds to put back what is cut off."""
AGAIN = 1.0
"""Seconds to wait for a bus or a store that failed."""
HEARTBEAT = 1.0
"""The most seconds until a task hears of its cancellation in another process."""


def topic_of(name: str) -> str:
    """Name the topic of a handler's tasks."""
    return TOPIC + name


@define(eq=False)
class Run:
    """An attempt that is going on here."""

    task_id: str
    message: Message
    worker: str
    scope: CancelScope
    lost: bool = False
    """Whether another worker has the task by now."""
    cancelled: bool = False
    """Whether its cancellation was asked for."""


@define(eq=False)
class Intake:
    """One handler's messages, as they come in."""

    handler: Handler[Any, Any]
    messages: Subscription
    running: int = 0
    """How many of their tasks run."""
    idle: Signal = field(factory=Signal)
    """That none runs any more."""


class Runner:
    """The workers of one stay in a service's block.

    Args:
        bus: tells them of tasks.
        store: where the tasks are.
        handlers: by name.
        workers: how many tasks may run at the same time, at least 0.
        ttl: seconds for which a finished task is kept.
        lease: seconds for which a worker has a task without a sign of life.
        now: tells the time, in seconds since the epoch.
        tell: is called with a task after each change.
        tally: counts what comes of the tasks.
        tracing: makes spans of their runs; None for none.
    """

    def __init__(
        self,
        bus: Bus,
        store: Store,
        handlers: Mapping[str, Handler[Any, Any]],
        *,
        workers: int,
        ttl: float,
        lease: float,
        now: Callable[[], float],
        tell: Callable[[TaskRecord], None],
        tally: Tally,
        tracing: Tracing | None,
    ) -> None:
        self._bus = bus
        self._store = store
        self._handlers = handlers
        self._workers = workers
        self._ttl = ttl
        self._lease = lease
        self._now = now
        self._tell = tell
        self._tally = tally
        self._tracing = tracing
        self._home = running_home()
        # By what tells them from one another: a task whose lease ran out may be taken up a second time here.
        self._runs: dict[str, Run] = {}
        self._intakes: set[Intake] = set()
        # What waits for a worker, and that there is something. One worker is woken, and wakes the next if there is
        # more: a channel would wake one for each, when one that is awake may take them all.
        self._waiting: deque[tuple[Message, Intake]] = deque()
        self._news = Signal()
        self._waking = False
        # The workers that have nothing to do, less what waits for them.
        self._idle = Semaphore(workers, fast_acquire=True)
        # That of this event loop, without looking for it again each time.
        self._new_scope = type(CancelScope())
        # What tells the runs from one another, in all processes.
        own = token_hex(8)
        self._run_ids: Iterator[str] = (f"{own}.{number}" for number in count(1))
        self.stopped = False
        self._cut_off = False
        self.drained = Event()
        if not workers:
            self.drained.set()

    @property
    def busy(self) -> int:
        """How many tasks run."""
        return len(self._runs)

    def cancel(self, task_id: str) -> None:
        """Cancel a task if it runs here."""
        for run in self._runs.values():
            if run.task_id == task_id:
                run.cancelled = True
                run.scope.cancel()

    def cut_off(self) -> None:
        """Put back what runs, and what is going to."""
        self._cut_off = True
        for run in self._runs.values():
            run.scope.cancel()

    def stop(self) -> None:
        """Take up nothing more."""
        self.stopped = True
        self._news.send_all()
        for intake in self._intakes:
            intake.messages.stop()
            # It may wait for a worker.
            self._idle.release()

    async def work(self) -> None:
        """Take up tasks and run them, until stopped."""
        try:
            async with create_task_group() as group:
                for handler in self._handlers.values():
                    group.start_soon(self._serve, handler)
                for _ in range(self._workers):
                    group.start_soon(self._run_waiting)
        finally:
            self.drained.set()

    async def _serve(self, handler: Handler[..., Any]) -> None:
        """Take up one handler's tasks until stopped."""
        while not self.stopped:
            try:
                await self._take(handler)
            except StorageError as error:
                logger.error("the bus failed, and is tried again in %g s: %s", AGAIN, error)  # noqa: TRY400
                await sleep(AGAIN)

    async def _take(self, handler: Handler[..., Any]) -> None:
        async with self._bus.subscribe(
            topic_of(handler.name), group=GROUP, max_in_flight=self._workers, ack_deadline=self._lease
        ) as messages:
            intake = Intake(handler, messages)
            self._intakes.add(intake)
            if self.stopped:
                # While it was being entered.
                messages.stop()
            try:
                async for message in messages:
                    try:
                        self._idle.acquire_nowait()
                    except WouldBlock:
                        # In turns, where there are several handlers.
                        await self._idle.acquire()
                    self._waiting.append((message, intake))
                    self._wake()
            finally:
                # What waits for a worker is given back with the subscription.
                for each in [each for each in self._waiting if each[1] is intake]:
                    self._waiting.remove(each)
                    self._idle.release()
                # The workers' messages are settled through it.
                with CancelScope(shield=True):
                    while intake.running:
                        await intake.idle.wait(self._home)
                self._intakes.discard(intake)

    def _wake(self) -> None:
        """Wake a worker, unless one was woken and has not come yet, or all are awake and are going to look."""
        if not self._waking:
            self._waking = True
            self._news.send()

    async def _run_waiting(self) -> None:
        """Run what was taken up, one after the other, until stopped."""
        while not self.stopped:
            if not self._waiting:
                await self._news.wait(self._home)
                self._waking = False
                continue
            message, intake = self._waiting.popleft()
            if self._waiting:
                self._wake()
            intake.running += 1
            try:
                await self._look_at(message, intake.handler)
            finally:
                self._idle.release()
                intake.running -= 1
                if not intake.running:
                    intake.idle.send()
            await self._home.operate()

    async def _look_at(self, message: Message, handler: Handler[..., Any]) -> None:
        """Run the task of a message, unless there is nothing to do."""
        task_id = message.body.decode()
        try:
            now = self._now()
            run = Run(task_id, message, next(self._run_ids), self._new_scope())
            record = await self._store.change(
                task_id, partial(claim, worker=run.worker, now=now, lease_until=now + self._lease)
            )
            if record is None:
                await self._pass(message, task_id)
            else:
                self._tell(record)
                await self._run(record, run, handler)
        except (StorageError, LeaseLostError) as error:
            logger.warning("task %s could not be settled: %s", task_id, error)
            if not message.settled:
                with suppress(StorageError, LeaseLostError):
                    await message.nack(AGAIN)

    async def _pass(self, message: Message, task_id: str) -> None:
        """Have done with a message whose task can't be claimed, or wait until it can."""
        now = self._now()
        record = await self._store.get(task_id, now)
        if record is None or record.status.is_end:
            await message.ack()
        else:
            await message.nack(max(record.run_at - now, (record.lease_until or 0.0) - now, 0.0))

    async def _run(self, record: TaskRecord, run: Run, handler: Handler[..., Any]) -> None:
        """Attempt a claimed task, and settle it by what came of that."""
        run.cancelled = record.cancel_requested
        self._runs[run.worker] = run
        self._tally.begun(record)
        try:
            result: bytes | None = None
            with run.scope:
                if not run.cancelled and not self._cut_off:
                    result = await self._attempt(record, run, handler)
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is this task's
            await self._settle_failure(record, run, handler, error)
        except BaseException:
            # The service is cut off.
            with move_on_after(GRACE, shield=True), suppress(StorageError, LeaseLostError):
                await self._put_back(record, run, 0.0, attempted=False)
            raise
        else:
            if result is not None:
                await self._finish(record, run, TaskStatus.SUCCESS, result=result)
            elif run.lost:
                logger.warning(
                    "task %s took its worker too long to renew its lease, and is with another",
                    record.id,
                    extra=about(record),
                )
            elif run.cancelled:
                await self._finish(record, run, TaskStatus.CANCELLED)
            else:
                await self._put_back(record, run, 0.0, attempted=False)
        finally:
            del self._runs[run.worker]
            self._tally.left(record)

    def _attempt(self, record: TaskRecord, run: Run, handler: Handler[..., Any]) -> Awaitable[bytes]:
        current.set(record)
        attempt = handler.attempt(record.arguments, partial(self._report, record.id, run))
        return attempt if self._tracing is None else self._trace(self._tracing, record, attempt)

    async def _trace(self, tracing: Tracing, record: TaskRecord, attempt: Awaitable[bytes]) -> bytes:
        with tracing.running(topic_of(record.name), record):
            return await attempt

    async def _settle_failure(self, record: TaskRecord, run: Run, handler: Handler[..., Any], error: Exception) -> None:
        again, error = judge(handler.retry, error, record.attempts)
        # No store takes half of a surrogate pair, which a file's name may have.
        told = type(error).__name__, str(error).encode("utf-8", "backslashreplace").decode()
        if again and not run.cancelled:
            self._tally.retried(record)
            delay = handler.retry.backoff(record.attempts)
            logger.warning(
                "%s, task %s, failed, and is run again in %.3g s",
                record.name,
                record.id,
                delay,
                exc_info=error,
                extra=about(record),
            )
            await self._put_back(record, run, delay, error=told)
        else:
            logger.error("%s, task %s, failed", record.name, record.id, exc_info=error, extra=about(record))
            await self._finish(record, run, TaskStatus.FAILED, error=told)

    async def _finish(self, record: TaskRecord, run: Run, status: TaskStatus, **outcome: Any) -> None:
        ended = await self._store.change(
            record.id, partial(finish, worker=run.worker, status=status, now=self._now(), ttl=self._ttl, **outcome)
        )
        if ended is not None:
            self._tally.ended(ended)
            self._tell(ended)
        await run.message.ack()

    async def _put_back(self, record: TaskRecord, run: Run, delay: float, **how: Any) -> None:
        back = await self._store.change(
            record.id, partial(put_back, worker=run.worker, run_at=self._now() + delay, **how)
        )
        if back is not None:
            self._tell(back)
        await run.message.nack(delay)

    async def _report(self, task_id: str, run: Run, progress: ProgressReport) -> None:
        record = await self._store.change(task_id, partial(report, worker=run.worker, progress=progress))
        if record is not None:
            self._tell(record)

    async def keep(self) -> None:
        """Renew the leases of what runs, and see whether its cancellation was asked for."""
        while True:
            await sleep(min(self._lease / 3, HEARTBEAT))
            for run in list(self._runs.values()):
                try:
                    record = await self._store.change(
                        run.task_id, partial(renew, worker=run.worker, lease_until=self._now() + self._lease)
                    )
                except StorageError as error:
                    logger.warning("the lease of task %s could not be renewed: %s", run.task_id, error)
                    continue
                if run.worker in self._runs and (record is None or record.cancel_requested):
                    run.lost = record is None
                    run.cancelled = record is not None
                    run.scope.cancel()
            for intake in list(self._intakes):
                await intake.messages.extend()
