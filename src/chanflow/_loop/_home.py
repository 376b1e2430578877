"""Park the current task and wake it again: the only file that knows asyncio from trio.

The event loop that a channel belongs to is its *home*. A task parks by awaiting a *waiter* from
its home, and another task in the same loop wakes it with `set_result`. A waiter has those methods of an
`asyncio.Future` that the waiting rooms use: `done`, `cancelled`, `result` and
`set_result`. On asyncio, it is a future. A waiter is done as soon as it was woken
or its task was cancelled, even if the task has not run yet. Waiters that are done are skipped.

asyncio and trio are looked up only when a program already runs one of them, so `import chanflow` imports neither.
"""

from __future__ import annotations

import math
import sys
import threading
import types
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
from contextlib import suppress
from functools import cache, partial
from itertools import repeat, starmap
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from anyio import current_effective_deadline

from chanflow._check import check_count

if TYPE_CHECKING:
    import asyncio

__all__ = [
    "NOWHERE",
    "TIMED_OUT",
    "Home",
    "Nowhere",
    "TaskWaiter",
    "Waiter",
    "current_home",
    "running_home",
    "set_checkpoint_interval",
    "withdraw",
]

DEFAULT_INTERVAL = 128

TIMED_OUT: Any = type("TIMED_OUT", (), {"__repr__": lambda _: "TIMED_OUT"})()
"""What `Home.wait` returns when the deadline passes first."""


CANCELLED: Any = object()


class Waiter(Protocol):
    """A parked task, or a callback that takes the place of one."""

    def done(self) -> object:
        """Return a true value if it was woken or cancelled."""
        ...

    def set_result(self, result: Any, /) -> None:
        """Wake the waiter with a result; call this only if it is not done."""
        ...


class TaskWaiter(Waiter, Awaitable[Any], Protocol):
    """A waiter that the current task can await."""

    def cancelled(self) -> bool:
        """Return whether it was cancelled before it was woken."""
        ...

    def cancel(self) -> object:
        """Mark it as done without waking the task."""
        ...

    def result(self) -> Any:
        """Return the result it was woken with."""
        ...


class Home(ABC):
    """A running event loop, with a budget of operations that may finish without yielding to it."""

    __slots__ = ("__weakref__", "_budget", "loop", "running", "thread", "time", "turns", "waiter")

    running: Callable[[], object]
    """Return the event loop of this kind that runs in the current thread, or None."""
    loop: object
    """What `running` returns inside this event loop, and nowhere else."""
    turns: Iterator[object]
    """Calls `running` once for each operation left in the budget; then exhausted.

    So `next(home.turns, None) is home.loop` checks in one step that the caller runs in this event loop and that
    the budget is not used up, and takes one operation from it. This happens for every item, and two separate
    checks cost a tenth of the time of an item.
    """
    thread: int
    waiter: Callable[[], TaskWaiter]
    """Create a waiter for the current task, which must then await it."""
    time: Callable[[], float]
    """Return the time on the event loop's clock, in seconds."""
    shuffles = False
    """Whether tasks that are woken in the same tick may run in a different order than they were woken in."""

    def __init__(
        self, running: Callable[[], object], waiter: Callable[[], TaskWaiter], time: Callable[[], float]
    ) -> None:
        self.running = running
        self.loop = running()
        self.waiter = waiter
        self.time = time
        self.thread = threading.get_ident()
        self.refresh()

    def ask(self, running: Callable[[], object]) -> None:
        """Replace the function that returns the running event loop, and keep the rest of the budget."""
        self.running = running
        self.renew(self.turns_left())

    def renew(self, operations: int) -> None:
        """Set how many operations may finish without waiting before one must yield to the event loop."""
        self._budget = repeat((), operations)
        self.turns = starmap(self.running, self._budget)

    def refresh(self) -> None:
        """Begin a new interval, because the caller is about to yield to the event loop."""
        # The last operation of an interval is the one that yields.
        self.renew(interval.operations - 1)

    def rest(self) -> None:
        """Record that the caller is about to wait, so that the tasks that run next have at least half an interval.

        Beginning a new interval every time would cost a tenth of the time of a rendezvous.
        """
        if self._budget.__length_hint__() * 2 < interval.operations:
            self.refresh()

    def charge(self, operations: int) -> None:
        """Take several operations from the budget, down to none left."""
        self.renew(max(self.turns_left() - operations, 0))

    def turns_left(self) -> int:
        """Return how many operations may still finish without yielding."""
        return self._budget.__length_hint__()

    def here(self) -> bool:
        """Return whether the caller runs in this event loop."""
        return self.running() is self.loop

    @abstractmethod
    async def checkpoint(self) -> None:
        """Yield to the event loop, and let a pending cancellation be delivered."""

    async def operate(self) -> None:
        """Take one operation from the budget; if it is used up, yield to the event loop."""
        if next(self.turns, None) is not self.loop:
            await self.checkpoint()

    @abstractmethod
    async def wait(self, waiter: TaskWaiter, deadline: float | None) -> Any:
        """Await a waiter and return its result, or `TIMED_OUT` if the deadline on this home's clock passes first."""

    @abstractmethod
    def ended(self) -> bool:
        """Return whether this event loop has ended for good. Any thread may call this."""

    @abstractmethod
    def call_soon(self, callback: Callable[[], object]) -> None:
        """Schedule a callback in the event loop, from any thread; raises RuntimeError if the loop has ended."""

    def defer_cancellation(self, exc: BaseException) -> bool:
        """Defer a cancellation that came too late to the next checkpoint; return False if `exc` is no cancellation."""
        # On trio, a task that was woken is not cancelled before its next checkpoint anyway.
        del exc  # pragma: no cover -- see above
        return False  # pragma: no cover -- see above

    def cancelled(self) -> bool:
        """Return whether the current task, or a cancel scope around it, has been cancelled."""
        return current_effective_deadline() == -math.inf

    def uncancel(self, exc: BaseException) -> bool:
        """Withdraw the cancellation of the current task itself, but not that of a scope around it.

        Returns False if `exc` is not such a cancellation.
        """
        del exc
        return False

    def serves(self, task_id: int) -> bool:
        """Return whether the current task runs an `anyio.from_thread.run` call for a thread that that task awaits."""
        # trio runs such calls in the task that waits for the thread.
        del task_id
        return False

    def on_end(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call `callback` when the event loop shuts down; return a function that cancels this.

        Both event loops close the asynchronous generators that were started in them. That is
        the only notice of their end that both of them provide.
        """
        watching = True

        async def watch() -> AsyncGenerator[None, None]:
            nonlocal watching
            try:
                yield
            finally:
                if watching:
                    watching = False
                    callback()

        watcher = watch()
        step(watcher.asend(None))

        def cancel() -> None:
            nonlocal watching
            if watching:
                watching = False
                # trio warns about a generator that is garbage collected before it is finished.
                step(watcher.aclose())

        return cancel


def step(awaitable: Awaitable[Any]) -> None:
    """Run an awaitable that never suspends."""
    with suppress(StopIteration):
        awaitable.__await__().send(None)


class Interval:
    """The setting of `set_checkpoint_interval`, shared by all homes."""

    __slots__ = ("operations",)

    def __init__(self) -> None:
        self.operations = DEFAULT_INTERVAL


interval = Interval()


def set_checkpoint_interval(operations: int = DEFAULT_INTERVAL) -> None:
    """Set how often an operation that does not have to wait yields to the event loop anyway.

    Such an operation returns without a trip through the event loop. But every `operations`-th in
    a row, counted across all tasks and channels, yields to the event loop first, so that no
    task starves the others. Like `sys.setswitchinterval`, this setting applies to the whole process.

    Args:
        operations: at least 1. 128 by default; 1 makes every operation a checkpoint, as in trio and anyio.

    Raises:
        ValueError: `operations` is less than 1.
        TypeError: `operations` is not an int.

    Source:
        tokio's cooperative budget, which is also 128 operations.
    """
    check_count("operations", operations, 1)
    interval.operations = operations
    for home in list(homes.values()):
        home.refresh()


@types.coroutine
def yield_once() -> Generator[None, None, None]:
    """Suspend the current asyncio task for one iteration of its event loop, as `asyncio.sleep(0)` does."""
    yield


class AsyncioHome(Home):
    """An asyncio event loop."""

    __slots__ = ("_asyncio",)

    loop: asyncio.AbstractEventLoop  # pyright: ignore[reportIncompatibleVariableOverride] # never assigned again

    def __init__(self, running: Callable[[], Any]) -> None:
        import asyncio  # noqa: PLC0415 -- its event loop is running, so it is already imported

        loop = running()
        make = loop.create_future
        if getattr(type(loop), "create_future", None) is asyncio.BaseEventLoop.create_future:
            # The same without a Python call for each wait. From 3.12 on, letting the future find the running loop is
            # faster than passing it.
            make = asyncio.Future if sys.version_info >= (3, 12) else partial(asyncio.Future, loop=loop)
        super().__init__(running, make, loop.time)
        self._asyncio = asyncio

    async def checkpoint(self) -> None:
        self.refresh()
        await yield_once()

    async def wait(self, waiter: TaskWaiter, deadline: float | None) -> Any:
        if deadline is None:
            return await waiter
        timer = self.loop.call_at(deadline, time_out, waiter)
        try:
            return await waiter
        finally:
            timer.cancel()

    def ended(self) -> bool:
        return self.loop.is_closed()

    def call_soon(self, callback: Callable[[], object]) -> None:
        self.loop.call_soon_threadsafe(callback)

    def defer_cancellation(self, exc: BaseException) -> bool:
        task = self._asyncio.current_task()
        if task is None or not isinstance(exc, self._asyncio.CancelledError):
            return False
        self.loop.call_soon(cancel_again, task, task.cancelling(), exc.args)
        return True

    def cancelled(self) -> bool:
        task = self._asyncio.current_task()
        return super().cancelled() or (task is not None and task.cancelling() > 0)

    def uncancel(self, exc: BaseException) -> bool:
        task = self._asyncio.current_task() if isinstance(exc, self._asyncio.CancelledError) else None
        # While a scope is cancelled, `task.cancelling()` also counts anyio's own requests.
        if task is None or not task.cancelling() or super().cancelled():
            return False
        while task.uncancel():
            """There may be several requests."""
        return True

    def serves(self, task_id: int) -> bool:
        task = self._asyncio.current_task()
        # Only the name of its coroutine distinguishes such a task from others.
        name: str = getattr(task and task.get_coro(), "__qualname__", "")
        if not name.startswith("AsyncIOBackend.run_async_from_thread."):
            return False
        # It runs in the cancel scope of the task that waits for the thread. If the scope can't be found, assume that it
        # does.
        states: Any = getattr(sys.modules.get("anyio._backends._asyncio"), "_task_states", {})
        host = getattr(getattr(states.get(task), "cancel_scope", None), "_host_task", None)
        return host is None or id(host) == task_id


def time_out(waiter: Waiter) -> None:
    """Wake a waiter with `TIMED_OUT`, unless it is done."""
    if not waiter.done():
        waiter.set_result(TIMED_OUT)


def cancel_again(task: asyncio.Task[Any], requests: int, args: tuple[object, ...]) -> None:
    """Deliver a deferred cancellation, unless it has been withdrawn in the meantime.

    `asyncio.timeout` and the task groups withdraw their requests with `uncancel()` when they are left.
    So the number of requests shows whether this one is still valid, besides earlier ones that the
    task is already handling; delivering it must not change the number. The message is preserved because anyio
    recognizes its own cancellations by it.
    """
    if task.cancelling() >= requests and not task.done():
        task.uncancel()
        task.cancel(*args)


def withdraw(waiter: TaskWaiter, home: Home, exc: BaseException) -> bool:
    """Withdraw a waiter whose task was interrupted, so that it can't be woken any more.

    Returns True if it had already been woken with None: then the caller has to pass on what it was woken for.
    """
    if isinstance(exc, GeneratorExit) and home.ended():
        # A task is garbage collected after its event loop was closed, so there is no task left to wake.
        return False
    if not waiter.done():
        waiter.cancel()
    return not waiter.cancelled() and waiter.result() is None


@cache
def trio_waiter(trio: Any) -> Callable[[], TaskWaiter]:
    """Return the class of trio's waiters."""
    from outcome import Value  # noqa: PLC0415 -- trio has already imported it

    current_task, reschedule = trio.lowlevel.current_task, trio.lowlevel.reschedule
    wait_task_rescheduled, succeeded = trio.lowlevel.wait_task_rescheduled, trio.lowlevel.Abort.SUCCEEDED

    class TrioWaiter(list[Any]):
        """The waiter of a trio task: an empty list until it is done, then a list of its outcome.

        It is a list because `list.__len__` is the fastest way to implement `done`.
        """

        __slots__ = ("_task",)

        def __init__(self) -> None:
            self._task = current_task()

        def __await__(self) -> Generator[Any, Any, Any]:
            steps: Generator[Any, Any, Any] = wait_task_rescheduled(self._abort).__await__()
            return steps

        def cancel(self) -> None:
            self.append(CANCELLED)

        def _abort(self, _raise_cancel: Callable[[], object]) -> Any:
            self.cancel()
            return succeeded

        done = list.__len__

        def cancelled(self) -> bool:
            return self[0] is CANCELLED

        def result(self) -> Any:
            return self[0]  # pragma: no cover -- asked only of a task that was woken, then cancelled

        def set_result(self, result: Any) -> None:
            self.append(result)
            reschedule(self._task, Value(result))

    return TrioWaiter


class TrioHome(Home):
    """A run of trio's event loop."""

    __slots__ = ("_token", "_trio")
    shuffles = True

    def __init__(self, trio: Any, running: Callable[[], object]) -> None:
        super().__init__(running, trio_waiter(trio), trio.current_time)
        self._trio = trio
        self._token = trio.lowlevel.current_trio_token()

    async def checkpoint(self) -> None:
        self.refresh()
        await self._trio.lowlevel.checkpoint()

    async def wait(self, waiter: TaskWaiter, deadline: float | None) -> Any:
        if deadline is None:
            return await waiter
        with self._trio.CancelScope(deadline=deadline):
            return await waiter
        return TIMED_OUT

    def ended(self) -> bool:
        try:
            # trio queues an idempotent call only once, so frequent checks don't fill its queue.
            self._token.run_sync_soon(do_nothing, idempotent=True)
        except self._trio.RunFinishedError:
            return True
        return False

    def call_soon(self, callback: Callable[[], object]) -> None:
        self._token.run_sync_soon(callback)


def do_nothing() -> None:
    """Return None: a callback without effect."""


def trio_token(trio: Any) -> Any:
    """Return the token of the trio run in this thread, or None if there is none."""
    try:
        return trio.lowlevel.current_trio_token()
    except (RuntimeError, AttributeError):
        # AttributeError while another thread is still importing trio.
        return None


@cache
def reach_run(trio: Any) -> Callable[[], object]:
    """Return a function that identifies the trio run in the current thread, or returns None.

    It is called for every item, and reading trio's private thread-local takes a tenth of the time of the public
    call, which is used if the private one is missing.
    """
    context = getattr(getattr(getattr(trio, "_core", None), "_run", None), "GLOBAL_RUN_CONTEXT", None)
    if isinstance(context, threading.local) and hasattr(context, "runner"):
        return partial(getattr, context, "runner", None)
    return partial(trio_token, trio)


class Nowhere(Home):
    """The home of a channel on which no task has parked yet."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(lambda: None, self._no_waiter, lambda: math.nan)
        self.loop = self
        self.renew(0)

    def _no_waiter(self) -> TaskWaiter:
        raise AssertionError

    def ended(self) -> bool:
        return True

    # Never called, since no task runs in this home.
    checkpoint = wait = call_soon = _no_waiter  # type: ignore[assignment] # pyright: ignore[reportAssignmentType]


NOWHERE = Nowhere()

# By the id of the loop or run. A home keeps its loop alive, so an id can't be reused for another loop.
homes: WeakValueDictionary[int, Home] = WeakValueDictionary()


class Recent(threading.local):
    """The home that was last looked up in this thread.

    The reference keeps the home alive; otherwise each lookup would create one with a new budget.
    """

    home: Home = NOWHERE


recent = Recent()


def running_home() -> Home:
    """Return the home of the caller, which must run in an event loop."""
    home = current_home()
    assert home is not None
    return home


def current_home() -> Home | None:
    """Return the home of the caller, or None outside of any event loop."""
    home = recent.home
    trio = sys.modules.get("trio")
    if home.running() is home.loop and (trio is None or home.shuffles):
        return home
    run = None if trio is None else reach_run(trio)()
    # The public `get_running_loop` raises if there is no loop. This one returns None, and is documented for
    # authors of event loops.
    running = getattr(sys.modules.get("asyncio.events"), "_get_running_loop", do_nothing)
    loop = running()
    if run is None and loop is None:
        return None
    if run is None:
        home = find_home(loop, partial(AsyncioHome, running))
    elif loop is None:
        home = find_home(run, partial(TrioHome, trio, reach_run(trio)))
    else:
        home = find_home_beside_guest(trio, run, loop)
    recent.home = home
    return home


def find_home(loop: object, make: Callable[[], Home]) -> Home:
    """Return the home of an event loop, creating it on first use."""
    return homes.get(id(loop)) or homes.setdefault(id(loop), make())


def find_home_beside_guest(trio: Any, run: object, loop: object) -> Home:
    """Return the caller's home where trio runs as a guest of asyncio: both seem to be running in the thread."""
    running_run, running_loop = ask_beside_guest(trio)
    if running_run() is run:
        return find_home(run, partial(TrioHome, trio, running_run))
    home = find_home(loop, partial(AsyncioHome, running_loop))
    if home.running is not running_loop:
        # The home was created before the guest run began.
        home.ask(running_loop)
    return home


@cache
def ask_beside_guest(trio: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return two functions: each returns the trio run, or the asyncio loop, if that is what is running the caller."""
    in_trio_task, trio_run = trio.lowlevel.in_trio_task, reach_run(trio)
    asyncio_loop: Callable[[], object] = sys.modules["asyncio.events"]._get_running_loop
    return (lambda: trio_run() if in_trio_task() else None), (lambda: None if in_trio_task() else asyncio_loop())
