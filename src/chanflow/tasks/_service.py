"""The task service: submit now, ask later."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from functools import partial
from secrets import token_hex
from types import MappingProxyType, TracebackType
from typing import Any, ParamSpec, Self, TypeAlias, TypeVar, overload

from anyio import CapacityLimiter, ClosedResourceError, create_task_group, move_on_after, sleep
from anyio.abc import TaskGroup
from msgspec.structs import replace

from chanflow._check import check_count, check_seconds
from chanflow._park import Home, running_home
from chanflow._retry import Retry
from chanflow._storage import StorageError
from chanflow.bus import Bus, connect
from chanflow.tasks._errors import IdempotencyError, TaskCancelledError, TaskFailedError, UnknownTaskError
from chanflow.tasks._handler import Handler
from chanflow.tasks._open import open_store
from chanflow.tasks._runner import Runner, topic_of
from chanflow.tasks._statistics import Tally, TaskStatistics
from chanflow.tasks._trace import Tracing, find_tracing
from chanflow.tasks._watch import Watches
from chanflow.tasks.record import TaskRecord, TaskStatus, cancel, requeue, revive
from chanflow.tasks.store import Store

__all__ = ["TaskService"]

ASGIApp: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("chanflow.tasks")

MAX_NAME = 200
POLL = 0.1, 1.0
"""The least and the most seconds after which to ask a store that other processes change."""
POLL_SHARE = 0.1
"""In between, it is this part of the time waited so far."""
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
NO_RETRY = Retry(1)


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
        self._watches: Watches = Watches()
        self._tally: Tally = Tally()
        self._tracing: Tracing | None = None
        self._home: Home
        # Tells the time, in seconds since the epoch.
        self._now: Callable[[], float]
        self._runner: Runner

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
            name: what the task is called in the store, from 1 to 200 characters without a slash; the function's own
                name by default.
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
        if name is not None and not (isinstance(name, str) and 1 <= len(name) <= MAX_NAME and "/" not in name):
            msg = f"name must be a str of 1 to {MAX_NAME} characters without a slash, got {name!r}"
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
            self._tally.add(handler.name)
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
        self._home = running_home()
        # By the machine's clock where other processes read it, too.
        self._now = time.time if self._store.shared else since_epoch(self._home.time)
        limiter = CapacityLimiter(max(self._workers, 1))
        for handler in self._handlers.values():
            handler.bind(limiter)
        self._tracing = find_tracing()
        self._runner = runner = Runner(
            self._bus,
            self._store,
            self._handlers,
            workers=self._workers,
            ttl=self._ttl,
            lease=self._lease,
            now=self._now,
            tell=self._watches.tell,
            tally=self._tally,
            tracing=self._tracing,
        )
        self._tasks = await create_task_group().__aenter__()
        if self._workers:
            self._tasks.start_soon(runner.work)
            self._tasks.start_soon(runner.keep)
            if self._store.shared and not self._bus.capabilities.shared:
                self._tasks.start_soon(self._look_around)
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
        self._runner.stop()
        with move_on_after(timeout):
            await self._runner.drained.wait()
        self._runner.cut_off()
        await self._runner.drained.wait()

    async def _end(self, error: BaseException | None) -> None:
        assert self._tasks is not None
        tasks, self._tasks = self._tasks, None
        self._watches.tell_end()
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

    def asgi(
        self,
        *,
        tokens: Sequence[str] | None = None,
        max_pending: int = 1000,
        max_body: int = 1_000_000,
        max_wait: float = 60.0,
        dead_letters: Sequence[str] = (),
    ) -> ASGIApp:
        """Make an ASGI app that serves the tasks over HTTP, with a dashboard at its root.

        Served by itself, it enters the service's block. Mounted in another app, it leaves that to the other's
        lifespan.

        Args:
            tokens: bearer tokens of which a request needs one; None for none needed.
            max_pending: how many tasks may be pending before more are refused, at least 1.
            max_body: how many bytes the body of a request may have, at least 1.
            max_wait: for how many seconds a request may wait for a task's end, at least 0.
            dead_letters: dead-letter topics of the service's bus, for the dashboard.

        Raises:
            ModuleNotFoundError: what it needs is not installed.
            TypeError, ValueError: an argument is not as said above.
        """
        if tokens is not None and (
            isinstance(tokens, str) or not tokens or not all(isinstance(token, str) and token for token in tokens)
        ):
            # Without the tokens themselves.
            msg = f"tokens must be a sequence of one str or more, none empty, or None, got a {type(tokens).__name__}"
            raise TypeError(msg)
        check_count("max_pending", max_pending, 1)
        check_count("max_body", max_body, 1)
        check_seconds("max_wait", max_wait)
        if isinstance(dead_letters, str):
            msg = f"dead_letters must be a sequence of topics, got {dead_letters!r}"
            raise TypeError(msg)
        from chanflow.tasks.http._app import make_app  # noqa: PLC0415 -- what it needs may be missing

        return make_app(
            self, tokens, max_pending=max_pending, max_body=max_body, max_wait=max_wait, dead_letters=dead_letters
        )

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
        return await self._submit(registered.name, registered.encode(arguments), idempotency_key, delay)

    async def submit_encoded(
        self,
        handler: Handler[..., Any] | str,
        encoded: bytes,
        *,
        idempotency_key: str | None = None,
        delay: float = 0.0,
    ) -> str:
        """Submit a task with arguments that `Handler.encode` or `Handler.encode_json` has checked; else as `submit`."""
        self._check_open()
        return await self._submit(self._find(handler).name, encoded, idempotency_key, delay)

    async def _submit(self, name: str, encoded: bytes, idempotency_key: str | None, delay: float) -> str:
        check_seconds("delay", delay)
        if idempotency_key is not None and not isinstance(idempotency_key, str):
            msg = f"idempotency_key must be a str or None, got {idempotency_key!r}"
            raise TypeError(msg)
        now = self._now()
        record = TaskRecord(
            id=token_hex(16),
            name=name,
            arguments=encoded,
            created_at=now,
            run_at=now + delay,
            queued_at=now,
            idempotency_key=idempotency_key,
        )
        if self._tracing is None:
            return await self._keep(record)
        with self._tracing.submitting(topic_of(name), record.id) as trace:
            return await self._keep(replace(record, trace=trace))

    async def _keep(self, record: TaskRecord) -> str:
        """Keep a new task, and tell the workers; or find the one that has its idempotency key."""
        kept = await self._store.create(record)
        if kept.id != record.id:
            if (kept.name, kept.arguments) != (record.name, record.arguments):
                msg = f"idempotency key {kept.idempotency_key!r} was used for another task: {kept.name} {kept.id}"
                raise IdempotencyError(msg)
            return kept.id
        # Should it end here, the task is neglected, and found by the sweep.
        await self._tell(record.id, record.name)
        self._tally.submitted(record.name)
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
        record = await self.get(task_id)
        if not record.status.is_end:
            async for record in self.watch(task_id):  # noqa: B007 -- the last one counts
                pass
        return record

    async def watch(self, task_id: str) -> AsyncGenerator[TaskRecord, None]:
        """Iterate over what becomes of a task: as it is now, and after changes, until its end.

        Changes that come faster than they are asked for are passed over, but never the last one. Those of another
        process are noticed after 0.1 to 1 seconds.

        Args:
            task_id: what `submit` returned.

        Raises:
            UnknownTaskError, ClosedResourceError, StorageError: as for `get`.

        Cancellation:
            The task goes on.
        """
        with self._watches.watching(task_id) as watch:
            seen = watch.told
            record = await self.get(task_id)
            yield record
            began = self._home.time()
            while not record.status.is_end:
                if watch.told is seen:
                    await watch.wait(self._home, self._poll_at(began))
                told = watch.told
                latest = await self.get(task_id) if told is None or told is seen else told
                seen = told
                if latest != record:
                    record = latest
                    yield record

    def _poll_at(self, began: float) -> float | None:
        """Tell when to ask the store again for what others may have changed; None where there are no others."""
        if not self._store.shared:
            return None
        now = self._home.time()
        least, most = POLL
        return now + min(max((now - began) * POLL_SHARE, least), most)

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
        if record.status is TaskStatus.RUNNING:
            self._runner.cancel(task_id)
        self._watches.tell(record)
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
        self._watches.tell(record)
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

    @property
    def is_open(self) -> bool:
        """Whether the service's block was entered, and not left."""
        return self._tasks is not None

    @property
    def is_draining(self) -> bool:
        """Whether it takes up nothing more: `shutdown` was called, or the block is not entered."""
        return self._tasks is None or self._runner.stopped

    def statistics(self) -> TaskStatistics:
        """Give figures of what was submitted and run in this process, since the service was made."""
        busy = 0 if self._tasks is None else self._runner.busy
        return self._tally.snapshot(self._workers, busy)

    @property
    def workers(self) -> int:
        """How many tasks may run here at the same time; it can be set until the service's block is entered."""
        return self._workers

    @workers.setter
    def workers(self, workers: int) -> None:
        check_count("workers", workers, 0)
        if self._tasks is not None:
            msg = "workers can't be set after the service's block was entered"
            raise RuntimeError(msg)
        self._workers = workers

    @property
    def bus(self) -> Bus:
        """What tells the workers, and may carry other messages, too."""
        return self._bus

    @property
    def handlers(self) -> Mapping[str, Handler[Any, Any]]:
        """What is registered, by name."""
        return MappingProxyType(self._handlers)

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
        """Tell the workers of a task, if there are any that can be told: others look into the store by themselves."""
        if self._workers or self._bus.capabilities.shared or not self._store.shared:
            await self._bus.publish(topic_of(name), task_id.encode())

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
        while not self._runner.stopped:
            if self._runner.busy < self._workers:
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


def since_epoch(clock: Callable[[], float]) -> Callable[[], float]:
    """Make of a clock, whose time may begin anywhere, one that tells the seconds since the epoch."""
    moved_by = time.time() - clock()
    return lambda: moved_by + clock()
