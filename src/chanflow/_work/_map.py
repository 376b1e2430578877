"""`WorkerGroup.map`: iterates over the results of jobs, with a bounded window of jobs in progress."""

from __future__ import annotations

import math
from collections.abc import AsyncIterable, AsyncIterator, Iterable
from contextlib import suppress
from contextvars import copy_context
from functools import partial
from typing import Any, Generic, NoReturn, Protocol, TypeVar

import anyio
from anyio import ClosedResourceError
from anyio.abc import TaskGroup

from chanflow._channel._ends import Channel
from chanflow._loop._home import Home, running_home
from chanflow._work._call import failure_of_handler
from chanflow._work._group import Result

__all__ = ["Feed", "MapIterator"]

Job = TypeVar("Job")
R = TypeVar("R")


class Submitter(Protocol[Job, R]):
    """A worker group, as its maps see it."""

    _name: str
    _home: Home | None
    _tasks: TaskGroup | None
    _feeds: set[Feed[Job, R]]
    _closing: bool

    def _check_open(self) -> Home: ...
    def _check_here(self) -> None: ...
    async def submit(self, job: Job, /) -> Result[R]: ...


class Feed(Generic[Job, R]):
    """The submitting side of a `WorkerGroup.map`.

    Args:
        group: the worker group that handles the jobs.
        jobs: any iterable or asynchronous iterable.
        ordered: whether the results are in the order of the jobs.
        window: the maximum number of jobs that were submitted and whose results have not been iterated over.
    """

    def __init__(
        self, group: Submitter[Job, R], jobs: Iterable[Job] | AsyncIterable[Job], *, ordered: bool, window: float
    ) -> None:
        self._group = group
        self._jobs = jobs
        self._ordered = ordered
        # It has one item for each job in the window.
        self.window: Channel[None] = Channel(window, "window of a map")
        self.results: Channel[Result[R]] = Channel(math.inf, "results of a map")
        self.unfinished: set[Result[R]] = set()
        self.error: Exception | None = None
        self.started: bool = False
        self.stopped: bool = False
        self._scope = anyio.CancelScope()
        # The context of the caller of `map`, in which the jobs run.
        self._context = copy_context()
        # The number of unordered results still to come, plus 1 until all jobs are submitted.
        self._coming = 1

    @property
    def group_name(self) -> str:
        return self._group._name

    def start(self) -> None:
        """Start the task that submits the jobs."""
        self._group._check_open()
        assert self._group._tasks is not None
        self.started = True
        self._group._feeds.add(self)
        self._context.run(partial(self._group._tasks.start_soon, self._run, name=f"{self._group._name} (map)"))

    async def _run(self) -> None:
        home = self._group._home
        assert home is not None
        try:
            with self._scope:
                await self._submit_all()
        except BaseException as error:
            failure = failure_of_handler(error, home)
            if failure is None:
                # The group is being cancelled, possibly before it was stopped.
                if not home.uncancel(error):
                    self.refuse()
                    raise
                self.refuse("the task that submits the jobs of this map was cancelled")
            else:
                # The iterating task raises it.
                self.error = failure
            del failure
        finally:
            self._group._feeds.discard(self)
            self._came()

    async def _submit_all(self) -> None:
        source: Any = self._jobs
        asynchronous = isinstance(source, AsyncIterable)
        # StopIteration from an asynchronous source is an error, and so is the reverse.
        end: type[Exception] = StopAsyncIteration if asynchronous else StopIteration
        jobs: Any = aiter(source) if asynchronous else iter(source)
        while True:
            # Before reading the job, so that no job is read before there is room for it.
            await self.window.send(None)
            if self._group._closing:
                self._group._check_open()
            try:
                job = await anext(jobs) if asynchronous else next(jobs)
            except end:
                return
            await self._submit(job)

    async def _submit(self, job: Job) -> None:
        result = await self._group.submit(job)
        if self.stopped:
            result.cancel()
        self.unfinished.add(result)
        if self._ordered:
            self.results.send_nowait(result)
        else:
            self._coming += 1
            result._when_done(self._came)

    def _came(self, result: Result[R] | None = None) -> None:
        if result is not None:
            self.results.send_nowait(result)
        self._coming -= 1
        if not self._coming:
            self.results.close()

    def refuse(self, reason: str = "the worker group is shutting down") -> None:
        """Stop submitting jobs; after the results of those submitted, the iteration raises ClosedResourceError."""
        self.error = self.error or ClosedResourceError(reason)
        self._scope.cancel()

    def drop(self) -> None:
        """Stop in the group's event loop, from whichever thread the iterator was garbage collected in."""
        home = self._group._home
        if self.stopped or not self.started or home is None:
            return
        if home.here():
            self.stop()
        else:
            with suppress(RuntimeError):
                home.call_soon(self.stop)

    def stop(self) -> None:
        """Stop submitting jobs, and cancel those that are not finished."""
        self.stopped = True
        self._scope.cancel()
        for result in self.unfinished:
            result.cancel()
        self.unfinished.clear()


class MapIterator(AsyncIterator[R]):
    """An asynchronous iterator over the results of a `WorkerGroup.map`.

    It is not a generator, because trio warns about a generator that is not exhausted unless it is closed explicitly.
    The submitting task has no reference to it, so it is freed as soon as it is dropped, and then stops the task.
    """

    def __init__(self, feed: Feed[Any, R]) -> None:
        self._feed = feed

    def __repr__(self) -> str:
        feed = self._feed
        state = "stopped" if feed.stopped else f"{len(feed.unfinished)} unfinished" if feed.started else "not started"
        return f"<MapIterator of {feed.group_name}: {state}>"

    def __iter__(self) -> NoReturn:
        msg = "a map's results come as they are ready: use `async for`, not `for`"
        raise TypeError(msg)

    async def __anext__(self) -> R:
        feed = self._feed
        if feed.stopped:
            await running_home().operate()
            raise StopAsyncIteration
        if not feed.started:
            feed.start()
        try:
            # Unlike with `receive`, an EndOfStream raised by a job is not taken for the end.
            async for result in feed.results:
                value = await result
                # The feed may have been stopped in the meantime, so this is not `remove`.
                feed.unfinished.discard(result)
                feed.window.receive_nowait()
                return value
        except BaseException:
            feed.stop()
            # An error must not refer to the result that has it through its traceback.
            result = None
            raise
        feed.stop()
        error, feed.error = feed.error, None
        try:
            raise StopAsyncIteration if error is None else error
        finally:
            del error

    async def aclose(self) -> None:
        """End the iteration: stop submitting jobs, and cancel those that are not finished.

        Raises:
            RuntimeError: the group belongs to another event loop.

        Cancellation:
            Not a checkpoint: it always ends the iteration.
        """
        self._feed._group._check_here()
        self._feed.stop()

    def __del__(self) -> None:
        self._feed.drop()
