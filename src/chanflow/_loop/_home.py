"""Park the current task and wake it again: the only file that knows asyncio from trio.

The event loop a channel belongs to is its *home*. A task parks by awaiting a *waiter* from
its home, and another task of that home wakes it with `set_result`. A waiter has the methods of an
`asyncio.Future` that the waiting rooms use, `done`, `cancelled`, `result` and
`set_result`, so on asyncio it simply is one. A waiter is done from the moment it was woken
or its task was cancelled, even if the task has not run yet; a done waiter waits for nothing
and is skipped.

asyncio and trio are looked up only when a program already runs one of them, so that `import chanflow` needs neither.
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
    "give_up",
    "running_home",
    "set_checkpoint_interval",
]

DEFAULT_INTERVAL = 128

TIMED_OUT: Any = type("TIMED_OUT", (), {"__repr__": lambda _: "TIMED_OUT"})()
"""What `Home.wait` gives when the deadline came first."""


CANCELLED: Any = object()


class Waiter(Protocol):
    """One parked task, or a callback that stands for one."""

    def done(self) -> object:
        """Tell whether it was woken or cancelled."""
        ...

    def set_result(self, result: Any, /) -> None:
        """Wake it; only a waiter that is not done may be woken."""
        ...


class TaskWaiter(Waiter, Awaitable[Any], Protocol):
    """A waiter that the current task can await."""

    def cancelled(self) -> bool:
        """Tell whether it was cancelled before it was woken."""
        ...

    def cancel(self) -> object:
        """Let nobody wake it any more."""
        ...

    def result(self) -> Any:
        """Give what it was woken with."""
        ...


class Home(ABC):
    """One running event loop, with its budget of operations that need no trip through it."""

    __slots__ = ("__weakref__", "_budget", "loop", "running", "thread", "time", "turns", "waiter")

    running: Callable[[], object]
    """Give what runs in this thread, of this kind of event loop; or None."""
    loop: object
    """What `running` gives here, and nowhere else."""
    turns: Iterator[object]
    """What `running` gives, for as many operations as may still finish at once; then nothing.

    So `next(home.turns, None) is home.loop` asks in one go whether the caller is at home and may
    finish an operation without yielding, and takes it from the budget. It is done for every item, and two separate
    questions were a tenth of its time.
    """
    thread: int
    waiter: Callable[[], TaskWaiter]
    """Make a waiter for the current task, which is going to await it."""
    time: Callable[[], float]
    """Read the event loop's clock, in seconds."""
    shuffles = False
    """Whether tasks that are woken in one tick may run in another order than that of their waking."""

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
        """Find out in another way what runs in this thread."""
        self.running = running
        self.renew(self.turns_left())

    def renew(self, operations: int) -> None:
        """Set how many operations may finish at once before one must yield to the event loop."""
        self._budget = repeat((), operations)
        self.turns = starmap(self.running, self._budget)

    def refresh(self) -> None:
        """Begin a new interval: the caller lets the event loop run now."""
        # The last operation of an interval is the one that yields.
        self.renew(interval.operations - 1)

    def rest(self) -> None:
        """Take note that the caller is about to wait, so that whoever runs next may use most of an interval.

        A new interval each time would be a tenth of the time of a rendezvous.
        """
        if self._budget.__length_hint__() * 2 < interval.operations:
            self.refresh()

    def charge(self, operations: int) -> None:
        """Take more operations from the budget, which may be more than are left."""
        self.renew(max(self.turns_left() - operations, 0))

    def turns_left(self) -> int:
        """Count the operations that may still finish at once."""
        return self._budget.__length_hint__()

    def here(self) -> bool:
        """Tell whether the caller runs in this event loop."""
        return self.running() is self.loop

    @abstractmethod
    async def checkpoint(self) -> None:
        """Yield to the event loop, letting a pending cancellation in."""

    async def operate(self) -> None:
        """Take an operation from the budget, yielding to the event loop when it is used up."""
        if next(self.turns, None) is not self.loop:
            await self.checkpoint()

    @abstractmethod
    async def wait(self, waiter: TaskWaiter, deadline: float | None) -> Any:
        """Await a waiter until a deadline on this home's clock; then give `TIMED_OUT`."""

    @abstractmethod
    def ended(self) -> bool:
        """Tell whether this event loop is over for good; from any thread."""

    @abstractmethod
    def call_soon(self, callback: Callable[[], object]) -> None:
        """Run a callback in the event loop, from any thread; RuntimeError if it has ended."""

    def defer_cancellation(self, exc: BaseException) -> bool:
        """Let a cancellation that came too late arrive at the next checkpoint; False if it is none."""
        # On trio, a task that was woken is not cancelled before its next checkpoint anyway.
        del exc  # pragma: no cover -- see above
        return False  # pragma: no cover -- see above

    def cancelled(self) -> bool:
        """Tell whether somebody has cancelled the current task, or a cancel scope around it."""
        return current_effective_deadline() == -math.inf

    def uncancel(self, exc: BaseException) -> bool:
        """Withdraw the cancellation of the current task itself, and of no scope around it; False if this is none."""
        del exc
        return False

    def serves(self, task_id: int) -> bool:
        """Tell whether the current task makes a call (`anyio.from_thread.run`) for a thread that a task waits for."""
        # trio makes such calls in the task that waits for the thread.
        del task_id
        return False

    def on_end(self, callback: Callable[[], object]) -> Callable[[], None]:
        """Call back when the event loop shuts down; returns a function that cancels this.

        Both event loops close the asynchronous generators that were started in them, and that is
        the one end-of-loop notice that both give.
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
                # A generator that is dropped unfinished makes trio warn.
                step(watcher.aclose())

        return cancel


def step(awaitable: Awaitable[Any]) -> None:
    """Run to its end what is known not to wait."""
    with suppress(StopIteration):
        awaitable.__await__().send(None)


class Interval:
    """The budget that every home has from one checkpoint to the next."""

    __slots__ = ("operations",)

    def __init__(self) -> None:
        self.operations = DEFAULT_INTERVAL


interval = Interval()


def set_checkpoint_interval(operations: int = DEFAULT_INTERVAL) -> None:
    """Set how many operations that can finish at once may do so before one yields to the event loop.

    An operation that need not wait returns without a trip through the event loop. After so many in
    a row, whichever tasks and channels they belong to, the next one yields to the event loop first, so that no
    task starves the others. Like `sys.setswitchinterval`, this is a setting of the whole process.

    Args:
        operations: at least 1. 128 by default; 1 makes every operation a checkpoint, as in trio and anyio.

    Raises:
        ValueError: `operations` is less than 1.
        TypeError: `operations` is not an int.

    Source:
        tokio's cooperative budget, which is 128 operations too.
    """
    check_count("operations", operations, 1)
    interval.operations = operations
    for home in list(homes.values()):
        home.refresh()


@types.coroutine
def yield_once() -> Generator[None, None, None]:
    """Suspend the current asyncio task for one iteration of its loop, as `asyncio.sleep(0)` does."""
    yield


class AsyncioHome(Home):
    """An asyncio event loop."""

    __slots__ = ("_asyncio",)

    loop: asyncio.AbstractEventLoop  # pyright: ignore[reportIncompatibleVariableOverride] # never assigned again

    def __init__(self, running: Callable[[], Any]) -> None:
        import asyncio  # noqa: PLC0415 -- it runs, so that it is there already

        loop = running()
        make = loop.create_future
        if getattr(type(loop), "create_future", None) is asyncio.BaseEventLoop.create_future:
            # What that does, without a Python call for each wait. From 3.12 on, looking for the loop that runs is
            # quicker than passing it.
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
        # While a scope is cancelled, anyio counts its own requests.
        if task is None or not task.cancelling() or super().cancelled():
            return False
        while task.uncancel():
            """There may be several."""
        return True

    def serves(self, task_id: int) -> bool:
        task = self._asyncio.current_task()
        # Nothing but the name of its coroutine tells such a task from others.
        name: str = getattr(task and task.get_coro(), "__qualname__", "")
        if not name.startswith("AsyncIOBackend.run_async_from_thread."):
            return False
        # It is in the cancel scope of the task that waits for the thread; where that can't be seen, it counts.
        states: Any = getattr(sys.modules.get("anyio._backends._asyncio"), "_task_states", {})
        host = getattr(getattr(states.get(task), "cancel_scope", None), "_host_task", None)
        return host is None or id(host) == task_id


def time_out(waiter: Waiter) -> None:
    """Wake a waiter whose deadline has come."""
    if not waiter.done():
        waiter.set_result(TIMED_OUT)


def cancel_again(task: asyncio.Task[Any], requests: int, args: tuple[object, ...]) -> None:
    """Deliver a deferred cancellation, unless whoever asked for it has withdrawn it meanwhile.

    `asyncio.timeout` and the task groups count: they withdraw theirs with `uncancel()` on leaving.
    So the number of requests tells whether this one still stands, beside earlier ones whose cancellation the
    task is dealing with; and it must be the same after as before. The message is kept, since anyio knows its own
    cancellations by it.
    """
    if task.cancelling() >= requests and not task.done():
        task.uncancel()
        task.cancel(*args)


def give_up(waiter: TaskWaiter, home: Home, exc: BaseException) -> bool:
    """Let nobody wake a waiter any more whose task was interrupted; True if it was woken, with None, before that."""
    if isinstance(exc, GeneratorExit) and home.ended():
        # The remains of a task are collected after its loop was closed: nobody is left to wake.
        return False
    if not waiter.done():
        waiter.cancel()
    return not waiter.cancelled() and waiter.result() is None


@cache
def trio_waiter(trio: Any) -> Callable[[], TaskWaiter]:
    """Make the class of trio's waiters."""
    from outcome import Value  # noqa: PLC0415 -- trio needs it, so that it is there already

    current_task, reschedule = trio.lowlevel.current_task, trio.lowlevel.reschedule
    wait_task_rescheduled, succeeded = trio.lowlevel.wait_task_rescheduled, trio.lowlevel.Abort.SUCCEEDED

    class TrioWaiter(list[Any]):
        """A trio task that is about to park, parked, or done: then this holds the outcome. A list is quickly asked."""

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
    """One `trio.run`."""

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
            # Idempotent calls are kept once, so asking often doesn't fill the run's queue.
            self._token.run_sync_soon(do_nothing, idempotent=True)
        except self._trio.RunFinishedError:
            return True
        return False

    def call_soon(self, callback: Callable[[], object]) -> None:
        self._token.run_sync_soon(callback)


def do_nothing() -> None:
    """Be called for nothing."""


def trio_token(trio: Any) -> Any:
    """Identify the trio run of this thread, or give None where there is none."""
    try:
        return trio.lowlevel.current_trio_token()
    except (RuntimeError, AttributeError):
        # The latter while another thread is still importing it.
        return None


@cache
def reach_run(trio: Any) -> Callable[[], object]:
    """Give a function that identifies the trio run of this thread: by the run itself, else through the public call.

    It is called for every item, and looking into trio's own thread-local takes a tenth of the time.
    """
    context = getattr(getattr(getattr(trio, "_core", None), "_run", None), "GLOBAL_RUN_CONTEXT", None)
    if isinstance(context, threading.local) and hasattr(context, "runner"):
        return partial(getattr, context, "runner", None)
    return partial(trio_token, trio)


class Nowhere(Home):
    """The home of a channel that nobody has parked on yet."""

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(lambda: None, self._no_waiter, lambda: math.nan)
        self.loop = self
        self.renew(0)

    def _no_waiter(self) -> TaskWaiter:
        raise AssertionError

    def ended(self) -> bool:
        return True

    # Nobody is ever here to call them.
    checkpoint = wait = call_soon = _no_waiter  # type: ignore[assignment] # pyright: ignore[reportAssignmentType]


NOWHERE = Nowhere()

# By the identity of the loop or run. A home keeps its loop alive, so a key can't come to mean another loop.
homes: WeakValueDictionary[int, Home] = WeakValueDictionary()


class Recent(threading.local):
    """The home that was asked for last in this thread: kept, or its budget would be new each time."""

    home: Home = NOWHERE


recent = Recent()


def running_home() -> Home:
    """Find the home of a coroutine that runs."""
    home = current_home()
    assert home is not None
    return home


def current_home() -> Home | None:
    """Find the home of the caller; None outside of any event loop."""
    home = recent.home
    trio = sys.modules.get("trio")
    if home.running() is home.loop and (trio is None or home.shuffles):
        return home
    run = None if trio is None else reach_run(trio)()
    # The public `get_running_loop` raises where there is none; this one returns None, and is documented for
    # event loop implementers.
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
    """Give the one home of an event loop."""
    return homes.get(id(loop)) or homes.setdefault(id(loop), make())


def find_home_beside_guest(trio: Any, run: object, loop: object) -> Home:
    """Find the caller's home where trio runs as a guest of asyncio, in the same thread: both seem to run."""
    running_run, running_loop = ask_beside_guest(trio)
    if running_run() is run:
        return find_home(run, partial(TrioHome, trio, running_run))
    home = find_home(loop, partial(AsyncioHome, running_loop))
    if home.running is not running_loop:
        # It is older than the guest.
        home.ask(running_loop)
    return home


@cache
def ask_beside_guest(trio: Any) -> tuple[Callable[[], object], Callable[[], object]]:
    """Give functions that identify the trio run, and the asyncio loop, of this thread if that is what runs now."""
    in_trio_task, trio_run = trio.lowlevel.in_trio_task, reach_run(trio)
    asyncio_loop: Callable[[], object] = sys.modules["asyncio.events"]._get_running_loop
    return (lambda: trio_run() if in_trio_task() else None), (lambda: None if in_trio_task() else asyncio_loop())
