"""The task service: submit now, ask later."""

from __future__ import annotations

import logging
import math
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from secrets import token_hex
from types import MappingProxyType, TracebackType
from typing import Any, ParamSpec, Self, TypeVar, overload

from anyio import CapacityLimiter, ClosedResourceError, create_task_group, move_on_after, sleep
from anyio.abc import TaskGroup
from msgspec.structs import replace

from chanflow._check import check_count, check_seconds, show
from chanflow._errors import StorageError
from chanflow._loop._home import Home, running_home
from chanflow._work._retry import Retry
from chanflow.bus import Bus, connect
from chanflow.tasks._bus_dispatch import BusDispatch
from chanflow.tasks._dispatch import Dispatch, StoreDispatch
from chanflow.tasks._errors import TaskCancelledError, TaskFailedError, TaskStateError, UnknownTaskError, unknown_cursor
from chanflow.tasks._handler import MAX_SECONDS, Handler, topic_of
from chanflow.tasks._idempotency import check_key, check_same
from chanflow.tasks._open import open_store
from chanflow.tasks._runner import Runner
from chanflow.tasks._statistics import Tally, TaskStatistics
from chanflow.tasks._trace import Tracing, find_tracing
from chanflow.tasks._watch import Watches
from chanflow.tasks.record import TaskRecord, TaskStatus, cancel, revive
from chanflow.tasks.store import News, Store

__all__ = ["ServiceCore"]

P = ParamSpec("P")
R = TypeVar("R")

logger = logging.getLogger("chanflow.tasks")

MAX_NAME = 200
MAX_PRIORITY = 1000
POLL = 5.0
"""The most seconds after which whoever waits for a task asks a shared store again: news may get lost."""
SWEEP_INTERVAL = 30.0
"""Seconds from one look for expired tasks to the next."""
DEFAULT_RETRY = Retry(3, on=())
"""No error is worth another attempt; but a worker may be killed, which is no fault of the task's unless it does it."""


class ServiceCore:
    """All of a `TaskService` but its doors, which stand above it; see there."""

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
        if ttl != math.inf:
            check_most("ttl", ttl)
        check_seconds("lease", lease, positive=True)
        check_most("lease", lease)
        self._store: Store = open_store(store)
        # Whether the workers are told of tasks by the bus.
        self._uses_bus: bool = isinstance(bus, Bus) or not (bus == "memory://" or is_same_place(bus, store))
        self._bus: Bus = bus if isinstance(bus, Bus) else open_bus(bus, alone=not self._uses_bus)
        self._workers: int = workers
        self._ttl: float = ttl
        self._lease: float = float(lease)
        self._handlers: dict[str, Handler[Any, Any]] = {}
        self._tasks: TaskGroup | None = None
        self._entered: bool = False
        self._watches: Watches = Watches()
        self._tally: Tally = Tally()
        self._tracing: Tracing | None = None
        self._home: Home
        self._dispatch: Dispatch
        self._runner: Runner

    # Registering

    @overload
    def task(self, fn: Callable[P, R], /) -> Handler[P, R]: ...
    @overload
    def task(
        self, /, *, name: str | None = ..., retry: Retry = ..., timeout: float | None = ..., limit: int | None = ...
    ) -> Callable[[Callable[P, R]], Handler[P, R]]: ...
    def task(
        self,
        fn: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        retry: Retry = DEFAULT_RETRY,
        timeout: float | None = None,
        limit: int | None = None,
    ) -> Any:
        """Register a function as a task: a decorator, with or without arguments.

        Its parameters are passed by name; their type hints say what is accepted, and what the function is given. A
        parameter with the type `Progress` is for reporting. A plain function runs in a thread.

        Args:
            fn: the function.
            name: what the task is called in the store and in URLs, from 1 to 200 printable characters without a slash,
                not `.` or `..`; the function's own name by default.
            retry: how often to attempt it, and which errors are worth another attempt. An attempt that ended with its
                worker, which was killed, counts and is made again, whatever `on` says. By default an error ends the
                task, and after three attempts that ended so it has failed; `Retry(1)` for one attempt at most.
            timeout: seconds for one attempt, greater than 0; None for no bound.
            limit: how many tasks of this handler may run at the same time, in all processes that share the store
                together, at least 1; None for as many as there are workers. A task whose worker is gone counts until
                its lease has run out.

        Returns:
            The handler, which `submit` takes, and which can be called like the function.

        Raises:
            ValueError: there is a task with this name, or an argument is out of its bounds.
            TypeError: an argument or a type hint can't be used.
            RuntimeError: the service's block was entered already.
        """
        if timeout is not None:
            check_seconds("timeout", timeout, positive=True)
        if limit is not None:
            check_count("limit", limit, 1)
        if not isinstance(retry, Retry):
            msg = f"retry must be a Retry, got {show(retry)}"
            raise TypeError(msg)
        if name is not None:
            check_task_name(name)
        if self._tasks is not None:
            msg = "tasks must be registered before the service's block is entered"
            raise RuntimeError(msg)

        def register(fn: Callable[..., Any]) -> Handler[..., Any]:
            if not callable(fn):
                msg = f"a task must be a function, got {show(fn)}"
                raise TypeError(msg)
            chosen = getattr(fn, "__name__", None) if name is None else name
            if chosen is None:
                msg = f"a task that is no plain function needs a name: {show(fn)}"
                raise TypeError(msg)
            check_task_name(chosen)
            handler: Handler[..., Any] = Handler(fn, chosen, retry, timeout, limit)
            if handler.name in self._handlers:
                msg = f"there is a task {handler.name!r} already"
                raise ValueError(msg)
            self._handlers[handler.name] = handler
            self._tally.add(handler.name)
            return handler

        return register if fn is None else register(fn)

    # Its life

    async def __aenter__(self) -> Self:
        if self._entered:
            msg = "the service's block was entered already: a service has one at a time"
            raise RuntimeError(msg)
        self._entered = True
        try:
            await self._open()
        except BaseException:
            self._entered = False
            raise
        return self

    async def _open(self) -> None:
        await self._store.open()
        try:
            await self._bus.__aenter__()
        except BaseException:
            await self._store.aclose()
            raise
        self._home = running_home()
        limiter = CapacityLimiter(max(self._workers, 1))
        for handler in self._handlers.values():
            handler.bind(limiter)
        self._tracing = find_tracing()
        limits = {name: handler.limit for name, handler in self._handlers.items()}
        self._dispatch = dispatch = (
            BusDispatch(self._bus, self._workers, self._store, limits, self._lease)
            if self._uses_bus
            else StoreDispatch(self._store, limits, self._lease)
        )
        self._runner = runner = Runner(
            dispatch,
            self._store,
            self._handlers,
            workers=self._workers,
            ttl=self._ttl,
            lease=self._lease,
            tally=self._tally,
            tracing=self._tracing,
        )
        self._tasks = tasks = await create_task_group().__aenter__()
        try:
            await tasks.start(self._store.news, self._hear)
        except BaseException as error:
            await self._end(error)
            raise
        if self._workers:
            tasks.start_soon(runner.work)
            tasks.start_soon(runner.keep)
        tasks.start_soon(dispatch.keep)
        tasks.start_soon(self._sweep)

    def _hear(self, news: News | None) -> None:
        """Be told of a change of a task."""
        if self._watches:
            self._watches.tell(news)
        self._dispatch.hear(news)
        if news is not None and news.cancel_requested:
            self._runner.hear(news)

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
            # Each of them sees to it that a cancellation doesn't keep it from closing, and may raise it then. A scope
            # around them would be in the way of a client that has a task group.
            async with AsyncExitStack() as closing:
                closing.callback(self._leave)
                closing.push_async_callback(self._store.aclose)
                closing.push_async_callback(self._tell_left)
                closing.push_async_callback(self._bus.aclose)

    def _leave(self) -> None:
        self._entered = False

    async def _tell_left(self) -> None:
        if not self._store.durable:
            counts = await self._store.count(self._store.now())
            left = counts[TaskStatus.PENDING] + counts[TaskStatus.RUNNING]
            if left:
                logger.warning("%d task(s) were not at their end, and end with the memory that they were in", left)

    def _check_open(self) -> None:
        if self._tasks is None:
            msg = "the task service is closed, or its block was not entered"
            raise ClosedResourceError(msg)
        if not self._home.here():
            msg = "the task service belongs to the event loop in which its block was entered, and this is another one"
            raise RuntimeError(msg)

    # What others ask of it

    async def submit(
        self,
        handler: Handler[..., Any] | str,
        /,
        *positional: Any,
        idempotency_key: str | None = None,
        delay: float = 0.0,
        priority: int = 0,
        **arguments: Any,
    ) -> str:
        """Submit a task.

        Args:
            handler: what to run: what `task` made, or its name.
            positional: none: a task takes its arguments by name.
            idempotency_key: a second submission with the same key and the same arguments, while the first one's task is
                kept, is that task: 1 to 255 printable ASCII characters, with no space at either end.
            delay: seconds before which the task is not begun, from 0 to a hundred years.
            priority: of the tasks that are due, those with a higher one are begun first, from -1000 to 1000.
            arguments: the handler's, by name: plain data, or typed as its hints say.

        Returns:
            The task's id, which can't be guessed. Once this has returned, the task is kept as the store keeps it.

        Raises:
            UnknownTaskError: no handler has this name here.
            ArgumentError: the arguments don't fit the handler, or can't be stored.
            IdempotencyError: the key was used for another task or other arguments.
            ClosedResourceError: the service's block was not entered.
            RuntimeError: it was entered in another event loop.
            StorageError: the store failed; there is no such task then, unless the answer was lost on the way.
            ValueError, TypeError: another argument is not as said above.

        Cancellation:
            The task may have been submitted nevertheless.
        """
        self._check_open()
        registered = self._find(handler)
        if positional:
            msg = (
                f"a task takes its arguments by name: submit({registered.name}, name=value), got {show(positional[0])}"
            )
            raise TypeError(msg)
        encoded = registered.encode(arguments)
        key = None if idempotency_key is None else registered.fingerprint(arguments)
        record = self._new(registered, encoded, delay, priority)
        return await self._submit(record, idempotency_key, key)

    async def submit_many(
        self,
        handler: Handler[..., Any] | str,
        /,
        arguments: Iterable[Mapping[str, Any]],
        *,
        delay: float = 0.0,
        priority: int = 0,
    ) -> list[str]:
        """Submit many tasks of a handler in one step: all, or none if that fails.

        Args:
            handler: as for `submit`.
            arguments: of each task, by name.
            delay: as for `submit`.
            priority: as for `submit`.

        Returns:
            The tasks' ids, in the order of their arguments.

        Raises:
            Exception: as for `submit`.

        Cancellation:
            The tasks may have been submitted nevertheless.
        """
        self._check_open()
        registered = self._find(handler)
        records = [self._new(registered, registered.encode(each), delay, priority) for each in arguments]
        if records:
            await self._store.create_many(records)
            self._tally.submitted(registered.name, len(records))
        return [record.id for record in records]

    async def submit_encoded(
        self,
        handler: Handler[..., Any] | str,
        encoded: bytes,
        *,
        idempotency_key: str | None = None,
        delay: float = 0.0,
        priority: int = 0,
    ) -> str:
        """Submit a task with arguments that `Handler.encode` or `Handler.encode_json` has checked; else as `submit`."""
        self._check_open()
        registered = self._find(handler)
        key = None if idempotency_key is None else registered.fingerprint(encoded)
        record = self._new(registered, encoded, delay, priority)
        return await self._submit(record, idempotency_key, key)

    def _new(self, handler: Handler[..., Any], encoded: bytes, delay: float, priority: int) -> TaskRecord:
        """Make the record of a new task."""
        if delay:
            check_seconds("delay", delay)
            check_most("delay", delay)
        if priority:
            check_priority(priority)
        now = self._store.now()
        return TaskRecord(
            id=token_hex(16),
            name=handler.name,
            arguments=encoded,
            created_at=now,
            run_at=now + delay,
            priority=priority,
        )

    async def _submit(self, record: TaskRecord, idempotency_key: str | None, fingerprint: str | None) -> str:
        if idempotency_key is not None:
            check_key(idempotency_key)
            record = replace(record, idempotency_key=idempotency_key, fingerprint=fingerprint)
        if self._tracing is None:
            return await self._keep(record)
        with self._tracing.submitting(topic_of(record.name), record.id) as trace:
            return await self._keep(replace(record, trace=trace))

    async def _keep(self, record: TaskRecord) -> str:
        """Keep a new task, or find the one that has its idempotency key."""
        kept = await self._store.create(record)
        if kept.id != record.id:
            check_same(kept, record)
            return kept.id
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
        record = await self._store.get(task_id, self._store.now()) if may_be_id("task_id", task_id) else None
        return self._known(task_id, record)

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
        process are noticed within milliseconds, or within 5 seconds if its news gets lost.

        Args:
            task_id: what `submit` returned.

        Raises:
            UnknownTaskError, ClosedResourceError, StorageError: as for `get`.

        Cancellation:
            The task goes on.
        """
        with self._watches.watching(task_id) as watch:
            seen = watch.changes
            record = await self.get(task_id)
            yield record
            while not record.status.is_end:
                if watch.changes == seen:
                    await watch.wait(self._home, self._home.time() + POLL if self._store.shared else None)
                told = watch.record if watch.changes != seen else None
                seen = watch.changes
                latest = await self.get(task_id) if told is None else told
                if latest != record:
                    record = latest
                    yield record

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
        change = partial(cancel, now=self._store.now(), ttl=self._ttl)
        return self._known(task_id, await self._store.change(task_id, change))

    async def retry(self, task_id: str) -> TaskRecord:
        """Let a task that failed or was cancelled be run again, from its first attempt.

        Args:
            task_id: what `submit` returned.

        Returns:
            The task as it is then.

        Raises:
            TaskStateError: it is not at such an end.
            UnknownTaskError, ClosedResourceError, StorageError: as for `get`.
        """
        await self.get(task_id)
        record = await self._store.change(task_id, partial(revive, now=self._store.now()))
        if record is None:
            status = (await self.get(task_id)).status
            msg = f"only a task that failed or was cancelled can be retried; this one is {status.value}"
            raise TaskStateError(msg)
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
            UnknownTaskError: `after` has expired, or never was: begin again with the first page.
            ClosedResourceError: the service's block was not entered.
            StorageError: the store failed.
        """
        self._check_open()
        check_count("limit", limit, 1)
        if after is not None and not may_be_id("after", after):
            raise unknown_cursor(after)
        return await self._store.page(self._store.now(), status=status, after=after, limit=limit)

    async def count(self) -> dict[TaskStatus, int]:
        """Count the tasks by their status.

        Raises:
            ClosedResourceError: the service's block was not entered.
            StorageError: the store failed.
        """
        self._check_open()
        return await self._store.count(self._store.now())

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
        """The service's bus: it may carry other messages, and carries the ids of tasks if it was named for that."""
        return self._bus

    @property
    def store(self) -> Store:
        """Where the service's tasks are."""
        return self._store

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
            msg = f"there is no task {show(task_id)}, or it has expired"
            raise UnknownTaskError(msg)
        return record

    async def _sweep(self) -> None:
        """Forget what has expired."""
        while True:
            try:
                await self._store.forget(self._store.now())
            except StorageError as error:
                logger.error("looking for expired tasks failed, and is tried again: %s", error)  # noqa: TRY400
            await sleep(SWEEP_INTERVAL)


def may_be_id(argument: str, task_id: object) -> bool:
    """Tell whether a task may have this id; no store is asked for what it may be unable to encode."""
    if not isinstance(task_id, str):
        msg = f"{argument} must be a str, got {show(task_id)}"
        raise TypeError(msg)
    return task_id != "" and task_id.isprintable()


def check_most(argument: str, seconds: float) -> None:
    """Refuse a time that no date can tell."""
    if seconds > MAX_SECONDS:
        msg = f"{argument} must be <= {MAX_SECONDS:.0f}, a hundred years, got {seconds}"
        raise ValueError(msg)


def check_task_name(name: object) -> None:
    """Refuse a name that could not be a part of a URL's path."""
    if not (isinstance(name, str) and 1 <= len(name) <= MAX_NAME and name.isprintable() and "/" not in name):
        msg = f"name must be a str of 1 to {MAX_NAME} printable characters without a slash, got {show(name)}"
        raise ValueError(msg)
    if name in {".", ".."}:
        msg = f"name must not be . or .., which are steps in a URL's path, got {show(name)}"
        raise ValueError(msg)


def check_priority(priority: object) -> None:
    """Refuse what is no priority."""
    if not isinstance(priority, int) or isinstance(priority, bool):
        msg = f"priority must be an int, got {show(priority)}"
        raise TypeError(msg)
    if abs(priority) > MAX_PRIORITY:
        msg = f"priority must be from -{MAX_PRIORITY} to {MAX_PRIORITY}, got {priority}"
        raise ValueError(msg)


def is_same_place(bus: object, store: object) -> bool:
    """Tell whether two URLs name one place."""
    if not isinstance(bus, str) or not isinstance(store, str):
        return False
    path, other = (url.removeprefix("sqlite:///") for url in (bus, store))
    return bus == store or (path != bus and other != store and Path(path).resolve() == Path(other).resolve())


def open_bus(url: str, *, alone: bool) -> Bus:
    """Make the bus that a URL names; where the store is alone, one for other messages, in its file if it has one."""
    return connect("memory://" if alone and not url.startswith("sqlite:") else url)
