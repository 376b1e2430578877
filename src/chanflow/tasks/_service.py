"""The task service: submit now, ask later."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from secrets import token_hex
from types import TracebackType
from typing import Any, ParamSpec, Self, TypeVar, overload

from anyio import (
    CancelScope,
    CapacityLimiter,
    ClosedResourceError,
    Event,
    create_task_group,
    move_on_after,
    sleep,
)
from anyio.abc import TaskGroup
from attrs import define, field

from chanflow._channel import Channel
from chanflow._park import Home, running_home
from chanflow._retry import Retry, check_seconds, judge
from chanflow._signal import Signal
from chanflow._state import check_count
from chanflow._storage import StorageError
from chanflow.bus import Bus, LeaseLostError, Message, Subscription, connect
from chanflow.tasks._handler import Handler
from chanflow.tasks._open import open_store
from chanflow.tasks.record import (
    ProgressReport,
    TaskRecord,
    TaskStatus,
    cancel,
    claim,
    finish,
    put_back,
    renew,
    report,
    requeue,
    revive,
)
from chanflow.tasks.store import Store

__all__ = [
    "IdempotencyError",
    "TaskCancelledError",
    "TaskFailedError",
    "TaskService",
    "UnknownTaskError",
]

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("chanflow.tasks")

TOPIC = "tasks."
"""What the topics begin with: each handler has one, so that a worker is only told of tasks that it knows."""
MAX_NAME = 200
GROUP = "workers"
POLL = 0.1
"""Seconds after which to ask a store that other processes change."""
SWEEP_INTERVAL = 30.0
"""Seconds from one look for expired and neglected tasks to the next."""
SWEEP = 1000
"""The most neglected tasks to find at once."""
LOOK_INTERVAL = 0.2
"""Seconds from one look for other processes' tasks to the next, and for which their own workers come first."""
LOOK_AHEAD = 10
"""How many of them each worker may find at once."""
NEGLECT = 300.0
"""Seconds after which a task that nobody has come to is told of once more: it may just have to wait for others."""
GRACE = 5.0
"""Seconds to put back what is cut off."""
AGAIN = 1.0
"""Seconds to wait for a bus that failed."""
HEARTBEAT = 1.0
"""The most seconds until a task hears of its cancellation in another process."""
NO_RETRY = Retry(1)


class UnknownTaskError(LookupError):
    """There is no such task, or no such handler: it never was, or has expired."""


class IdempotencyError(ValueError):
    """An idempotency key was used before, for another task or other arguments."""


class TaskFailedError(Exception):
    """A task failed; `record` tells how. The traceback is in the log of its worker."""

    def __init__(self, record: TaskRecord) -> None:
        super().__init__(f"{record.name} failed: {record.error_type}: {record.error_message}")
        self.record: TaskRecord = record


class TaskCancelledError(Exception):
    """A task was cancelled."""

    def __init__(self, record: TaskRecord) -> None:
        super().__init__(f"{record.name} was cancelled")
        self.record: TaskRecord = record


@define(eq=False)
class Run:
    """An attempt that is going on here."""

    message: Message
    worker: str
    scope: CancelScope = field(factory=CancelScope)
    lost: bool = False
    """Whether another worker has the task by now."""
    cancelled: bool = False
    """Whether its cancellation was asked for."""


@define(eq=False)
class Intake:
    """One handler's messages, as they come in."""

    handler: Handler[Any, Any]
    messages: Subscription
    held: set[Message] = field(factory=set[Message])
    """Those whose tasks run, or wait for a worker."""
    idle: Signal = field(factory=Signal)
    """That none is held any more."""


class Watch(Signal):
    """Those who wait here for the end of a task."""

    __slots__ = ("ended", "watchers")

    def __init__(self) -> None:
        super().__init__()
        self.watchers: int = 0
        self.ended: TaskRecord | None = None


def topic_of(name: str) -> str:
    """Name the topic of a handler's tasks."""
    return TOPIC + name


class TaskService:
    """Tasks that are submitted now and asked for later, run by a bounded number of workers.

    Register handlers with `task`, then enter the service as a context manager: its workers run until the block is
    left. Leaving it waits for the tasks that run; what is still pending stays in the store, for the next worker.
    An error or a cancellation stops at once: what runs is cancelled and put back.

    A task is run at least once, and its record tells how it ended until `ttl` seconds after that. A worker that was
    killed loses its lease, and the task runs again.

    Args:
        bus: what tells workers of tasks: a URL for `chanflow.bus.connect`, or a `Bus`, which the service closes.
        store: where the tasks are kept: `memory://`, `sqlite:///file.db`, which keeps them through a restart and lets
            several processes share them, or a `Store`.
        workers: how many tasks may run here at the same time, at least 0: with 0, this process only submits.
        ttl: for how many seconds a finished task is kept, at least 0.
        lease: seconds after which a worker that gave no sign of life is taken for gone, greater than 0.

    Raises:
        ValueError, TypeError: an argument is not as said above.
    """

    def __init__(
        self,
        *,
        bus: str | Bus = "memory://",
        store: str | Store = "memory://",
        workers: int = 10,
        ttl: float = 3600.0,
        lease: float = 30.0,
    ) -> None:
        check_count("workers", workers, 0)
        check_seconds("ttl", ttl)
        check_seconds("lease", lease, positive=True)
        self._bus: Bus = bus if isinstance(bus, Bus) else connect(bus)
        self._store: Store = open_store(store)
        self._workers: int = workers
        self._ttl: float = ttl
        self._lease: float = float(lease)
        self._handlers: dict[str, Handler[Any, Any]] = {}
        self._tasks: TaskGroup | None = None
        self._runs: dict[str, Run] = {}
        self._watches: dict[str, Watch] = {}
        self._intakes: set[Intake] = set()
        self._stopped: bool = False
        self._home: Home
        # What the event loop's clock has to be moved by.
        self._epoch: float = 0.0
        # What tells the runs from one another, in all processes.
        self._run_ids: Iterator[str]
        # From the takers to the workers.
        self._taken: Channel[tuple[Message, Intake]]
        self._drained: Event

    def _now(self) -> float:
        """Tell the time, in seconds since the epoch: by the machine's clock where other processes read it, too."""
        return time.time() if self._store.shared else self._epoch + self._home.time()

    # Registering

    @overload
    def task(self, fn: Callable[P, R], /) -> Handler[P, R]: ...
    @overload
    def task(
        self, /, *, name: str | None = ..., retry: Retry = ..., timeout: float | None = ...
    ) -> Callable[[Callable[P, R]], Handler[P, R]]: ...
    def task(
        self,
        fn: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        retry: Retry = NO_RETRY,
        timeout: float | None = None,
    ) -> Any:
        """Register a function as a task: a decorator, with or without arguments.

        Its parameters are passed by name; their type hints say what is accepted, and what the function is given. A
        parameter with the type `Progress` is for reporting. A plain function runs in a thread.

        Args:
            fn: the function.
            name: what the task is called in the store; the function's own name by default.
            retry: how often to attempt it; once by default.
            timeout: seconds for one attempt, greater than 0; None for no bound.

        Returns:
            The handler, which `submit` takes, and which can be called like the function.

        Raises:
            ValueError: there is a task with this name, or an argument is out of its bounds.
            TypeError: an argument or a type hint can't be used.
            RuntimeError: the service's block was entered already.
        """
        if timeout is not None:
            check_seconds("timeout", timeout, positive=True)
        if not isinstance(retry, Retry):
            msg = f"retry must be a Retry, got {retry!r}"
            raise TypeError(msg)
        if name is not None and not (isinstance(name, str) and 1 <= len(name) <= MAX_NAME):
            msg = f"name must be a str of 1 to {MAX_NAME} characters, got {name!r}"
            raise ValueError(msg)
        if self._tasks is not None:
            msg = "tasks must be registered before the service's block is entered"
            raise RuntimeError(msg)

        def register(fn: Callable[..., Any]) -> Handler[..., Any]:
            if not callable(fn):
                msg = f"a task must be a function, got {fn!r}"
                raise TypeError(msg)
            chosen = getattr(fn, "__name__", None) if name is None else name
            if chosen is None:
                msg = f"a task that is no plain function needs a name: {fn!r}"
                raise TypeError(msg)
            handler: Handler[..., Any] = Handler(fn, chosen, retry, timeout)
            if handler.name in self._handlers:
                msg = f"there is a task {handler.name!r} already"
                raise ValueError(msg)
            self._handlers[handler.name] = handler
            return handler

        return register if fn is None else register(fn)

    # Its life

    async def __aenter__(self) -> Self:
        await self._store.open()
        try:
            await self._bus.__aenter__()
        except BaseException:
            await self._store.aclose()
            raise
        self._stopped = False
        self._home = running_home()
        self._epoch = time.time() - self._home.time()
        own = token_hex(8)
        self._run_ids = (f"{own}.{number}" for number in count(1))
        limiter = CapacityLimiter(max(self._workers, 1))
        for handler in self._handlers.values():
            handler.bind(limiter)
        self._taken = Channel(0)
        self._drained = Event()
        self._tasks = await create_task_group().__aenter__()
        if self._workers:
            self._tasks.start_soon(self._work)
            self._tasks.start_soon(self._keep)
            if self._store.shared and not self._bus.capabilities.shared:
                self._tasks.start_soon(self._look_around)
        else:
            self._drained.set()
        self._tasks.start_soon(self._sweep, self._now())
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._tasks is not None
        try:
            if exc is None:
                await self.shutdown()
        finally:
            await self._end(exc)

    async def shutdown(self, timeout: float = math.inf) -> None:
        """Stop taking up tasks, wait for those that run, and put back what runs for longer.

        Tasks can still be submitted and asked for, but they wait for another worker.

        Args:
            timeout: seconds to wait, at least 0; without bound by default.

        Raises:
            ClosedResourceError: the service's block was not entered.

        Cancellation:
            What runs goes on.
        """
        self._check_open()
        check_seconds("timeout", timeout)
        self._stop_taking()
        with move_on_after(timeout):
            await self._drained.wait()
        for run in self._runs.values():
            run.scope.cancel()
        await self._drained.wait()

    async def _end(self, error: BaseException | None) -> None:
        assert self._tasks is not None
        tasks, self._tasks = self._tasks, None
        for watch in self._watches.values():
            watch.send_all()
        tasks.cancel_scope.cancel()
        try:
            # The task group would wrap an error of the block's; but a cancellation may be its own.
            if error is None or isinstance(error, Exception):
                await tasks.__aexit__(None, None, None)
            else:
                await tasks.__aexit__(type(error), error, error.__traceback__)
        finally:
            # Each of them sees to it that a cancellation doesn't keep it from closing. A scope around them would be in
            # the way of a client that has a task group.
            await self._bus.aclose()
            await self._tell_left()
            await self._store.aclose()

    async def _tell_left(self) -> None:
        if not self._store.durable:
            counts = await self._store.count(self._now())
            left = counts[TaskStatus.PENDING] + counts[TaskStatus.RUNNING]
            if left:
                logger.warning("%d task(s) were not at their end, and end with the memory that they were in", left)

    def _check_open(self) -> None:
        if self._tasks is None:
            msg = "the task service is closed, or its block was not entered"
            raise ClosedResourceError(msg)

    # What others ask of it

    async def submit(
        self,
        handler: Handler[..., Any] | str,
        /,
        *,
        idempotency_key: str | None = None,
        delay: float = 0.0,
        **arguments: Any,
    ) -> str:
        """Submit a task, waiting while too many are pending.

        Args:
            handler: what to run: what `task` made, or its name.
            idempotency_key: a second submission with the same key, while the first one's task is kept, is that task.
            delay: seconds before which the task is not begun, at least 0.
            arguments: the handler's, by name: plain data, or typed as its hints say.

        Returns:
            The task's id, which can't be guessed. Once this has returned, the task is kept as the store keeps it.

        Raises:
            UnknownTaskError: no handler has this name here.
            ArgumentError: the arguments don't fit the handler, or can't be stored.
            IdempotencyError: the key was used for another task or other arguments.
            ClosedResourceError: the service's block was not entered.
            StorageError: the store or the bus failed.
            ValueError, TypeError: another argument is not as said above.

        Cancellation:
            The task may have been submitted nevertheless.
        """
        self._check_open()
        registered = self._find(handler)
        check_seconds("delay", delay)
        if idempotency_key is not None and not isinstance(idempotency_key, str):
            msg = f"idempotency_key must be a str or None, got {idempotency_key!r}"
            raise TypeError(msg)
        now = self._now()
        record = TaskRecord(
            id=token_hex(16),
            name=registered.name,
            arguments=registered.encode(arguments),
            created_at=now,
            run_at=now + delay,
            queued_at=now,
            idempotency_key=idempotency_key,
        )
        kept = await self._store.create(record)
        if kept.id != record.id:
            if (kept.name, kept.arguments) != (record.name, record.arguments):
                msg = f"idempotency key {idempotency_key!r} was used for another task: {kept.name} {kept.id}"
                raise IdempotencyError(msg)
            return kept.id
        # Should it end here, the task is neglected, and found by the sweep.
        await self._tell(record.id, record.name)
        return record.id

    async def get(self, task_id: str) -> TaskRecord:
        """Give what is known of a task.

        Args:
            task_id: what `submit` returned.

        Raises:
            UnknownTaskError: there is no such task, or it has expired.
            ClosedResourceError: the service's block was not entered.
            StorageError: the store failed.
        """
        self._check_open()
        return self._known(task_id, await self._store.get(task_id, self._now()))

    async def wait(self, task_id: str) -> TaskRecord:
        """Wait for the end of a task, and give what is known of it.

        Args:
            task_id: what `submit` returned.

        Raises:
            UnknownTaskError, ClosedResourceError, StorageError: as for `get`.

        Cancellation:
            The task goes on.
        """
        watch = self._watches.get(task_id)
        if watch is None:
            watch = self._watches[task_id] = Watch()
        watch.watchers += 1
        try:
            record = await self.get(task_id)
            while not record.status.is_end and watch.ended is None:
                await watch.wait(self._home, self._home.time() + POLL if self._store.shared else None)
                if watch.ended is None:
                    record = await self.get(task_id)
            return watch.ended or record
        finally:
            watch.watchers -= 1
            if not watch.watchers and self._watches.get(task_id) is watch:
                del self._watches[task_id]

    async def result(self, task_id: str) -> Any:
        """Wait for the end of a task, and give its result.

        Args:
            task_id: what `submit` returned.

        Returns:
            What the handler returned, as the type that it is declared to return if it is registered here, else as
            plain data.

        Raises:
            TaskFailedError: the task failed.
            TaskCancelledError: the task was cancelled.
            UnknownTaskError, ClosedResourceError, StorageError: as for `get`.

        Cancellation:
            The task goes on.
        """
        record = await self.wait(task_id)
        if record.status is TaskStatus.FAILED:
            raise TaskFailedError(record)
        if record.result is None:
            raise TaskCancelledError(record)
        handler = self._handlers.get(record.name)
        return record.decode_result() if handler is None else handler.decode_result(record.result)

    async def cancel(self, task_id: str) -> TaskRecord:
        """Cancel a task: one that is pending is at its end at once, one that runs is told so.

        Its handler is cancelled where it runs, in this process or another; it may take a while to end, or even
        succeed. A plain function in a thread can't be stopped. A task at its end stays as it is.

        Args:
            task_id: what `submit` returned.

        Returns:
            The task as it is then.

        Raises:
            UnknownTaskError, ClosedResourceError, StorageError: as for `get`.
        """
        await self.get(task_id)
        record = self._known(
            task_id, await self._store.change(task_id, partial(cancel, now=self._now(), ttl=self._ttl))
        )
        run = self._runs.get(task_id)
        if run is not None and record.cancel_requested:
            run.cancelled = True
            run.scope.cancel()
        self._announce(record)
        return record

    async def retry(self, task_id: str) -> TaskRecord:
        """Let a task that failed or was cancelled be run again, from its first attempt.

        Args:
            task_id: what `submit` returned.

        Returns:
            The task as it is then; a task that is not at such an end stays as it is.

        Raises:
            UnknownTaskError, ClosedResourceError, StorageError: as for `get`.
        """
        await self.get(task_id)
        record = await self._store.change(task_id, partial(revive, now=self._now()))
        if record is None:
            return await self.get(task_id)
        await self._tell(task_id, record.name)
        return record

    async def page(
        self, *, status: TaskStatus | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[TaskRecord]:
        """List tasks, the newest first.

        Args:
            status: only those; None for all.
            after: the id of the last task of the page before; None for the first page.
            limit: the most to give, at least 1.

        Raises:
            ClosedResourceError: the service's block was not entered.
            StorageError: the store failed.
        """
        self._check_open()
        check_count("limit", limit, 1)
        return await self._store.page(self._now(), status=status, after=after, limit=limit)

    async def count(self) -> dict[TaskStatus, int]:
        """Count the tasks by their status.

        Raises:
            ClosedResourceError: the service's block was not entered.
            StorageError: the store failed.
        """
        self._check_open()
        return await self._store.count(self._now())

    def _find(self, handler: Handler[..., Any] | str) -> Handler[..., Any]:
        name = handler.name if isinstance(handler, Handler) else handler
        registered = self._handlers.get(name) if isinstance(name, str) else None
        if registered is None or (isinstance(handler, Handler) and registered is not handler):
            msg = f"no task {name!r} is registered with this service"
            raise UnknownTaskError(msg)
        return registered

    def _known(self, task_id: str, record: TaskRecord | None) -> TaskRecord:
        if record is None:
            msg = f"there is no task {task_id!r}, or it has expired"
            raise UnknownTaskError(msg)
        return record

    async def _tell(self, task_id: str, name: str) -> None:
        """Tell the workers of a task."""
        await self._bus.publish(topic_of(name), task_id.encode())

    def _announce(self, record: TaskRecord) -> None:
        """Tell those who wait here for the end of a task."""
        if record.status.is_end and (watch := self._watches.pop(record.id, None)) is not None:
            watch.ended = record
            watch.send_all()

    # What its workers do

    def _stop_taking(self) -> None:
        self._stopped = True
        self._taken.close()
        for intake in self._intakes:
            intake.messages.stop()

    async def _work(self) -> None:
        """Take up tasks and run them, until stopped."""
        async with create_task_group() as group:
            for handler in self._handlers.values():
                group.start_soon(self._serve, handler)
            for _ in range(self._workers):
                group.start_soon(self._run_taken)
        self._drained.set()

    async def _serve(self, handler: Handler[..., Any]) -> None:
        """Take up one handler's tasks until stopped."""
        while not self._stopped:
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
            if self._stopped:
                # While it was being entered.
                messages.stop()
            try:
                async for message in messages:
                    await self._hand_over(message, intake)
            finally:
                # The workers' messages are settled through it.
                with CancelScope(shield=True):
                    while intake.held:
                        await intake.idle.wait(self._home)
                self._intakes.discard(intake)

    async def _hand_over(self, message: Message, intake: Intake) -> None:
        """Let a worker have a message; one that none takes is given back with the subscription."""
        intake.held.add(message)
        try:
            await self._taken.send((message, intake))
        except BaseException as error:
            intake.held.discard(message)
            if not isinstance(error, ClosedResourceError):
                raise

    async def _run_taken(self) -> None:
        """Run what was taken up, one after the other, until stopped."""
        async for message, intake in self._taken:
            try:
                await self._look_at(message, intake.handler)
            finally:
                intake.held.discard(message)
                if not intake.held:
                    intake.idle.send()

    async def _look_at(self, message: Message, handler: Handler[..., Any]) -> None:
        """Run the task of a message, unless there is nothing to do."""
        task_id = message.body.decode()
        try:
            now = self._now()
            run = Run(message, next(self._run_ids))
            record = await self._store.change(
                task_id, partial(claim, worker=run.worker, now=now, lease_until=now + self._lease)
            )
            if record is None:
                await self._pass(message, task_id)
            else:
                await self._run(record, run, handler)
        except (StorageError, LeaseLostError) as error:
            # The leases run out, here and there, and then it is taken up again.
            logger.warning("task %s could not be settled: %s", task_id, error)

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
        self._runs[record.id] = run
        try:
            result: bytes | None = None
            with run.scope:
                if not run.cancelled:
                    result = await handler.attempt(record.arguments, partial(self._report, record.id, run))
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
                logger.warning("task %s took its worker too long to renew its lease, and is with another", record.id)
            elif run.cancelled:
                await self._finish(record, run, TaskStatus.CANCELLED)
            else:
                await self._put_back(record, run, 0.0, attempted=False)
        finally:
            del self._runs[record.id]

    async def _settle_failure(self, record: TaskRecord, run: Run, handler: Handler[..., Any], error: Exception) -> None:
        again, error = judge(handler.retry, error, record.attempts)
        told = type(error).__name__, str(error)
        if again and not run.cancelled:
            delay = handler.retry.backoff(record.attempts)
            logger.warning(
                "%s, task %s, failed, and is run again in %.3g s", record.name, record.id, delay, exc_info=error
            )
            await self._put_back(record, run, delay, error=told)
        else:
            logger.error("%s, task %s, failed", record.name, record.id, exc_info=error)
            await self._finish(record, run, TaskStatus.FAILED, error=told)

    async def _finish(self, record: TaskRecord, run: Run, status: TaskStatus, **outcome: Any) -> None:
        ended = await self._store.change(
            record.id, partial(finish, worker=run.worker, status=status, now=self._now(), ttl=self._ttl, **outcome)
        )
        if ended is not None:
            self._announce(ended)
        await run.message.ack()

    async def _put_back(self, record: TaskRecord, run: Run, delay: float, **how: Any) -> None:
        await self._store.change(record.id, partial(put_back, worker=run.worker, run_at=self._now() + delay, **how))
        await run.message.nack(delay)

    async def _report(self, task_id: str, run: Run, progress: ProgressReport) -> None:
        await self._store.change(task_id, partial(report, worker=run.worker, progress=progress))

    async def _keep(self) -> None:
        """Renew the leases of what runs, and see whether its cancellation was asked for."""
        while True:
            await sleep(min(self._lease / 3, HEARTBEAT))
            for task_id, run in list(self._runs.items()):
                try:
                    record = await self._store.change(
                        task_id, partial(renew, worker=run.worker, lease_until=self._now() + self._lease)
                    )
                except StorageError as error:
                    logger.warning("the lease of task %s could not be renewed: %s", task_id, error)
                    continue
                if task_id in self._runs and (record is None or record.cancel_requested):
                    run.lost = record is None
                    run.cancelled = record is not None
                    run.scope.cancel()
            for message in [message for intake in self._intakes for message in intake.held]:
                if not message.settled:
                    try:
                        await message.extend()
                    except (StorageError, LeaseLostError) as error:
                        logger.warning("the lease of %r could not be renewed: %s", message, error)

    async def _sweep(self, entered: float) -> None:
        """Forget what has expired, and tell the workers once more of what nobody has come to.

        A bus that kept nothing from before knows nothing of what was there when the service was entered.
        """
        since = entered - NEGLECT if self._bus.capabilities.durable else math.nextafter(entered, 0.0)
        while True:
            await self._protect(self._store.forget, self._now())
            await self._protect(self._tell_neglected, since)
            await sleep(SWEEP_INTERVAL)
            since = self._now() - NEGLECT

    async def _look_around(self) -> None:
        """Look in the store for what other processes were given, of which the bus can't tell; only while idle."""
        while not self._stopped:
            if len(self._runs) < self._workers:
                await self._protect(self._tell_neglected, self._now() - LOOK_INTERVAL, self._workers * LOOK_AHEAD)
            await sleep(LOOK_INTERVAL)

    async def _tell_neglected(self, since: float, limit: int | None = None) -> None:
        while found := await self._store.neglected(since, limit or SWEEP):
            for task_id in found:
                record = await self._store.change(task_id, partial(requeue, now=self._now(), since=since))
                if record is not None:
                    await self._tell(task_id, record.name)
            if limit is not None or len(found) < SWEEP:
                break

    async def _protect(self, step: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        try:
            await step(*arguments)
        except StorageError as error:
            logger.error("looking for tasks failed, and is tried again: %s", error)  # noqa: TRY400
