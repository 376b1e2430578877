"""Wait for the first of several channel operations: Go's `select`, with its timers."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from random import Random
from types import TracebackType
from typing import Any, Generic, Literal, NamedTuple, Never, Protocol, Self, TypeAlias, cast, overload

from anyio import EndOfStream, WouldBlock

from chanflow._channel._ends import Channel, ReceiveChannel, SendChannel
from chanflow._channel._state import NOTHING, SENT, Answer, ChannelState
from chanflow._check import check_number, show
from chanflow._loop._home import NOWHERE, TIMED_OUT, Home, TaskWaiter, Waiter, current_home, recent
from chanflow._loop._wait import Outcome, WaitingRoom

if sys.version_info >= (3, 13):  # pragma: no cover -- one of the two, by the Python that measures
    from typing import TypeVar
else:  # pragma: no cover -- see above
    # For type variables with defaults; anyio has imported it already.
    from typing_extensions import TypeVar

__all__ = ["After", "Case", "Selectable", "Send", "Ticker", "after", "select", "select_nowait", "ticker"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)
I_co = TypeVar("I_co", bound=int, covariant=True, default=int)
# A case that is None never has an item.
T0 = TypeVar("T0", default=Never)
T1 = TypeVar("T1", default=Never)
T2 = TypeVar("T2", default=Never)
T3 = TypeVar("T3", default=Never)
T4 = TypeVar("T4", default=Never)
T5 = TypeVar("T5", default=Never)

# Our own generator, so that programs that seed `random` stay reproducible. Not for security.
random: Callable[[], float] = Random().random  # noqa: S311 -- see above


class Selectable(Protocol[T_co]):
    """A case of `select`: a `Channel`, `ReceiveChannel`, `Send`, `Result`, `After` or `Ticker`."""

    def _ready(self, home: Home, /) -> bool:
        """Return whether the operation would complete, or raise an error, without waiting."""
        ...

    def _try(self, home: Home | None, /) -> T_co | Answer:
        """Complete the operation if that is possible without waiting; otherwise return `NOTHING`.

        The home is the caller's, or None if the caller has not looked it up.
        """
        ...

    def _join(self, waiter: Waiter, home: Home, /) -> None:
        """Add the waiter to the waiting room."""
        ...

    def _leave(self) -> None:
        """Leave the waiting room, because another case happened."""
        ...

    def _redeem(self, outcome: Outcome, /) -> T_co | Answer:
        """Complete the operation for which the waiter was woken."""
        ...

    def _release(self, outcome: Outcome, /) -> bool:
        """Undo the operation for which the waiter was woken; return False if it can't be undone."""
        ...


# A case for `select`, or None for one that never happens.
Maybe: TypeAlias = Selectable[T] | None


class Case(NamedTuple, Generic[T_co, I_co]):
    """The case that happened in a `select`.

    For type checkers, `select` with up to six cases returns a union of `Case[T0, Literal[0]]`, `Case[T1, Literal[1]]`
    and so on. Comparing the index with `==` narrows the type of the item, and comparing the item with None excludes
    None: `if case.index == 0 and case.item is not None:`. In annotations, `Case[int]` is a case with any index.
    """

    index: I_co  # type: ignore[assignment] # pyright: ignore[reportIncompatibleMethodOverride] # not a tuple to search
    """The position of the case among the arguments, from 0."""
    channel: Any
    """The channel, result or timer of the case; for a `Send`, its channel."""
    item: T_co | None
    """The item that was received; None for a `Send` or if `closed`."""
    closed: bool
    """Whether the channel is closed and drained; in Go, `v, ok := <-ch` with `ok` false."""


# The constructor of the named tuple without its frame in Python.
new_case: Callable[[tuple[int, Any, Any, bool]], Case[Any]] = partial(tuple.__new__, Case)


class Send(Generic[T_contra]):
    """Sending an item, as a case of `select`.

    Args:
        channel: a `Channel` or `SendChannel`. If it is closed or broken when the case is chosen,
            `select` raises the same error as `send`.
        item: any object; passed by reference, and only if this case happens.

    Raises:
        TypeError: `channel` can't be sent to.
    """

    __slots__ = ("channel", "item")

    def __init__(self, channel: Channel[T_contra] | SendChannel[T_contra], item: T_contra) -> None:
        if not isinstance(channel, Channel | SendChannel):
            msg = f"channel must be a Channel or SendChannel, got {show(channel)}"
            raise TypeError(msg)
        self.channel: Channel[T_contra] | SendChannel[T_contra] = channel
        self.item: T_contra = item

    def __repr__(self) -> str:
        return f"Send(channel={self.channel!r}, item={show(self.item)})"

    def _ready(self, home: Home) -> bool:
        state = self.channel._open
        if state.home is not home:
            state.check()
        return state.can_put()

    def _try(self, home: Home | None) -> Answer | None:
        state = self.channel._open
        if state.home is not home:
            state.check()
        return SENT if state.put(self.item) else NOTHING

    def _join(self, waiter: Waiter, home: Home) -> None:
        state: ChannelState[T_contra] = self.channel._open
        state.home = home
        state.senders.append((waiter, self.channel, self.item))
        if self.channel._waiters is not None:
            self.channel._waiters.append(waiter)
        if state.bridge is not None:
            state.bridge.sender_parked()

    def _leave(self) -> None:
        self.channel._state.senders.leave()

    def _redeem(self, outcome: Outcome) -> Answer | None:
        if outcome is not None:
            raise self.channel._state.error(outcome)
        return SENT

    def _release(self, outcome: Outcome) -> bool:
        return outcome is not None


class Timer:
    """A case that becomes ready at a certain time. It needs no task: `select` itself waits until then."""

    __slots__ = ("_due", "_home")

    def __init__(self, argument: str, seconds: float, rule: str, valid: Callable[[float], bool]) -> None:
        check_number(argument, seconds)
        if not valid(seconds):
            msg = f"{argument} must be {rule}, got {show(seconds)}"
            raise ValueError(msg)
        home = current_home()
        if home is None:
            msg = "a timer can only be made inside of asyncio or trio"
            raise RuntimeError(msg)
        self._home = home
        self._due = home.time() + seconds

    def _check_here(self) -> None:
        if not self._home.here():
            msg = f"{self!r} was made in another event loop"
            raise RuntimeError(msg)

    def _ready(self, _home: Home) -> bool:
        self._check_here()
        return self._home.time() >= self._due

    def _try(self, _home: Home | None) -> float | Answer:
        self._check_here()
        now = self._home.time()
        return self._take(now) if now >= self._due else NOTHING

    def _take(self, now: float) -> float:
        """Return the time at which it was due, and set the time at which it is due next."""
        raise NotImplementedError

    def _leave(self) -> None:
        """Do nothing, as there is no waiting room."""

    def _join(self, _waiter: Waiter, _home: Home) -> None:
        """Do nothing, as `select` itself waits for the deadline."""


class After(Timer):
    """A case that becomes ready once, at its time; created by `after`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<After at {self._due}>"

    def _take(self, now: float) -> float:
        del now
        due, self._due = self._due, math.inf
        return due

    def _redeem(self, _outcome: Outcome) -> float:
        # It is never woken.
        raise AssertionError

    def _release(self, _outcome: Outcome) -> bool:
        raise AssertionError


def after(seconds: float) -> After:
    """Create a case that becomes ready once, after a number of seconds. It starts no task.

    Args:
        seconds: at least 0; `math.inf` for never. The time starts with this call, so one `after` can
            bound a whole loop of selects.

    Returns:
        A case for `select`, whose item is the time on the event loop's clock at which it was due.

    Raises:
        ValueError: `seconds` is negative or NaN.
        TypeError: `seconds` is not a number.
        RuntimeError: called outside of asyncio and trio, or used in another event loop.

    Source:
        Go, time.After.
    """
    return After("seconds", seconds, ">= 0", lambda seconds: seconds >= 0)


class Ticker(Timer):
    """A case that becomes ready at regular intervals, and an asynchronous iterator; created by `ticker`."""

    __slots__ = ("_closed", "_interval", "_room")

    def __init__(self, interval: float) -> None:
        super().__init__("interval", interval, "> 0 and finite", lambda interval: 0 < interval < math.inf)
        self._interval = interval
        self._closed = False
        self._room: WaitingRoom[tuple[Waiter, Any]] = WaitingRoom()

    def __repr__(self) -> str:
        return f"<Ticker every {self._interval} s>"

    def _ready(self, home: Home) -> bool:
        return super()._ready(home) or self._closed

    def _try(self, home: Home | None) -> float | Answer:
        item = super()._try(home)
        if self._closed:
            msg = f"{self!r} is closed"
            raise EndOfStream(msg)
        return item

    def _take(self, now: float) -> float:
        due = now - math.fmod(now - self._due, self._interval)
        # The interval may be too short for the resolution of the clock.
        self._due = max(due + self._interval, math.nextafter(now, math.inf))
        return due

    def _join(self, waiter: Waiter, _home: Home) -> None:
        self._room.append((waiter, None))

    def _leave(self) -> None:
        self._room.leave()

    def _redeem(self, _outcome: Outcome) -> float | Answer:
        # Only `close` wakes it.
        return self._try(self._home)

    def _release(self, _outcome: Outcome) -> bool:
        return True

    def close(self) -> None:
        """Stop the ticker. Iteration ends, and as a case it is ready with `closed=True`.

        Raises:
            RuntimeError: called in another event loop or thread.
        """
        if not self._home.ended():
            self._check_here()
        self._closed = True
        self._room.dismiss(EndOfStream)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> float:
        case = await select(self)
        if case.item is None:
            raise StopAsyncIteration
        return case.item

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()


def ticker(interval: float) -> Ticker:
    """Create a ticker: a case for `select`, an asynchronous iterator and a context manager that closes it.

    The first tick is due one interval from now. A tick that is not received before the next one is dropped, so a slow
    receiver gets only the latest. A ticker starts no task.

    Args:
        interval: seconds between ticks, greater than 0 and finite.

    Returns:
        The ticker. Its items are the times on the event loop's clock at which the ticks were due.

    Raises:
        ValueError: `interval` is not greater than 0 or not finite.
        TypeError: `interval` is not a number.
        RuntimeError: called outside of asyncio and trio, or used in another event loop.

    Source:
        Go, time.NewTicker.
    """
    return Ticker(interval)


class Ticket:
    """The waiter of one case of a select; all tickets of a select wake the same parked task."""

    __slots__ = ("_index", "_waiter", "done")

    def __init__(self, waiter: Waiter, index: int) -> None:
        self._waiter = waiter
        self._index = index
        self.done = waiter.done

    def set_result(self, outcome: Outcome) -> None:
        self._waiter.set_result((self._index, outcome))


Cases: TypeAlias = Sequence[Maybe[Any]]

RECEIVING = frozenset({Channel, ReceiveChannel})


def check_cases(cases: Cases) -> None:
    """Raise TypeError unless all arguments are cases or None."""
    for index, case in enumerate(cases):
        if case is not None and (isinstance(case, type) or not hasattr(case, "_try")):
            msg = f"case {index} must be a Channel, ReceiveChannel, Send, Result, timer or None, got {show(case)}"
            raise TypeError(msg)


Happened: TypeAlias = "Case[Any] | Answer"
"""The case that happened in a select, or an answer with the error of a `Result`."""


def reveal(happened: Happened) -> Case[Any]:
    """Return the case that happened, or raise the error of a `Result`."""
    if type(happened) is not Answer:
        return cast("Case[Any]", happened)
    assert happened.error is not None
    try:
        raise happened.error
    finally:
        # See `select`: an error must not refer to itself through its traceback.
        del happened


def try_cases(cases: Cases, home: Home | None, *, priority: bool) -> Happened | None:
    """Complete one of the cases that are ready, if any: with `priority` the first, else a random one, as in Go."""
    check_cases(cases)
    untried = list(range(len(cases)))
    while untried:
        index = untried.pop(0 if priority else int(random() * len(untried)))
        case = cases[index]
        if case is not None:
            happened = carry_out(index, case, case._try, home)
            if happened is not None:
                return happened
    return None


def carry_out(index: int, case: Any, operation: Callable[[Any], Any], argument: object) -> Happened | None:
    """Call the given operation of a case, and return what happened; None if the case is not ready."""
    try:
        item = operation(argument)
    except EndOfStream:
        return new_case((index, case, None, True))
    if type(item) is not Answer:
        return new_case((index, case, item, False))
    if item.error is not None:
        return item
    return new_case((index, case.channel, None, False)) if item is SENT else None


@overload
async def select(c0: Maybe[T0], /, *, priority: bool = ...) -> Case[T0, Literal[0]]: ...
@overload
async def select(
    c0: Maybe[T0], c1: Maybe[T1], /, *, priority: bool = ...
) -> Case[T0, Literal[0]] | Case[T1, Literal[1]]: ...
@overload
async def select(
    c0: Maybe[T0], c1: Maybe[T1], c2: Maybe[T2], /, *, priority: bool = ...
) -> Case[T0, Literal[0]] | Case[T1, Literal[1]] | Case[T2, Literal[2]]: ...
@overload
async def select(
    c0: Maybe[T0], c1: Maybe[T1], c2: Maybe[T2], c3: Maybe[T3], /, *, priority: bool = ...
) -> Case[T0, Literal[0]] | Case[T1, Literal[1]] | Case[T2, Literal[2]] | Case[T3, Literal[3]]: ...
@overload
async def select(
    c0: Maybe[T0], c1: Maybe[T1], c2: Maybe[T2], c3: Maybe[T3], c4: Maybe[T4], /, *, priority: bool = ...
) -> (
    Case[T0, Literal[0]] | Case[T1, Literal[1]] | Case[T2, Literal[2]] | Case[T3, Literal[3]] | Case[T4, Literal[4]]
): ...
@overload
async def select(
    c0: Maybe[T0], c1: Maybe[T1], c2: Maybe[T2], c3: Maybe[T3], c4: Maybe[T4], c5: Maybe[T5], /, *, priority: bool = ...
) -> (
    Case[T0, Literal[0]]
    | Case[T1, Literal[1]]
    | Case[T2, Literal[2]]
    | Case[T3, Literal[3]]
    | Case[T4, Literal[4]]
    | Case[T5, Literal[5]]
): ...
@overload
async def select(*cases: Maybe[T0], priority: bool = ...) -> Case[T0]: ...
async def select(*cases: Maybe[Any], priority: bool = False) -> Case[Any]:  # noqa: C901 -- because of the fast path
    """Wait until at least one of several cases is ready, and let exactly one of them happen.

    A channel or receiving end is a case that receives, and a `Send` is one that sends. A `Result`, `after` and `ticker`
    are cases too. A closed and drained channel is always ready, with `closed=True`. The cases that do not happen have
    no effect. A case that is None is never ready, like Go's nil channel. Without any other case, the call
    waits until it is cancelled.

    Args:
        cases: the cases to wait for.
        priority: if several cases are ready, False chooses one at random, True the first in the order
            given.

    Returns:
        The case that happened, with its index, channel and item. Type checkers narrow the type of the item when the
        index is compared, as in `if case.index == 0:`; see :class:`Case`.

    Raises:
        ClosedResourceError: the case that happened is a `Send` to a closed channel, or an end that was closed.
        BrokenResourceError: the case that happened is a `Send` to a channel without receivers.
        TypeError: an argument is not a case.
        RuntimeError: a channel belongs to another event loop.
        Exception: the case that happened is the `Result` of a task that failed; this is its error. Only a result that
            is `done` can be the one.

    Cancellation:
        Atomic: if the call is cancelled, no case happened. Once the item of a `Send` has been taken, the call returns
        normally, and a cancellation that came too late is delivered at the next checkpoint. A call that does not have
        to wait is only occasionally a checkpoint, see :func:`set_checkpoint_interval`.

    Source:
        Go, runtime/select.go, selectgo.
    """
    home = recent.home
    if next(home.turns, None) is not home.loop or (not home.shuffles and "trio" in sys.modules):
        home = await arrive(cases)
    try:
        while True:
            # Pass 1: look for a case that is ready. If the first one tried is a channel with an item, take a fast path.
            if cases and not priority:
                index = int(random() * len(cases))
                lucky: Any = cases[index]
                if type(lucky) in RECEIVING:
                    state = lucky._open
                    if len(state.buffer) > state.reserved and (state.home is home or state.home is NOWHERE):
                        item = state.buffer.popleft()
                        if state.senders:
                            state.refill()
                        return new_case((index, lucky, item, False))
            happened = try_cases(cases, home, priority=priority)
            if happened is not None:
                return reveal(happened)
            # Pass 2: wait for all cases at once.
            home.rest()
            waiter = home.waiter()
            due = math.inf
            for index, selectable in enumerate(cases):
                if selectable is not None:
                    selectable._join(Ticket(waiter, index), home)
                    if isinstance(selectable, Timer):
                        due = min(due, selectable._due)
            try:
                woken = await home.wait(waiter, None if due == math.inf else due)
            except BaseException as exc:
                happened = interrupt(cases, waiter, home, exc)
                if happened is None:
                    raise
                return reveal(happened)
            # Pass 3: leave the waiting rooms of the cases that didn't happen.
            leave_losers(cases, woken)
            if woken is not TIMED_OUT:
                index, outcome = woken
                winner: Any = cases[index]
                return reveal(cast("Happened", carry_out(index, winner, winner._redeem, outcome)))
    except BaseException:
        # The error of a result must not refer to the result through its traceback.
        cases = ()
        lucky = winner = selectable = happened = None
        raise


async def arrive(cases: Cases) -> Home:
    """Return the caller's home, after yielding if the budget is used up and a case is ready."""
    home = current_home()
    if home is None:
        msg = "select was used outside of asyncio and trio"
        raise RuntimeError(msg)
    check_cases(cases)
    if not home.turns_left() and any(case is not None and is_ready(case, home) for case in cases):
        await home.checkpoint()
    return home


def is_ready(case: Selectable[Any], home: Home) -> bool:
    """Return whether a case would complete, or raise an error, without waiting."""
    try:
        return case._ready(home)
    except Exception:  # noqa: BLE001 -- `_try` will raise it
        return True


def interrupt(cases: Cases, waiter: TaskWaiter, home: Home, exc: BaseException) -> Happened | None:
    """Withdraw an interrupted select; return a case that had already happened and can't be undone, or None."""
    if isinstance(exc, GeneratorExit) and home.ended():
        # As in `withdraw`.
        return None
    if not waiter.done():
        waiter.cancel()
    woken = TIMED_OUT if waiter.cancelled() else waiter.result()
    leave_losers(cases, woken)
    if woken is not TIMED_OUT:
        index, outcome = woken
        winner: Any = cases[index]
        if not winner._release(outcome) and home.defer_cancellation(exc):
            return carry_out(index, winner, winner._redeem, outcome)
    return None


def leave_losers(cases: Cases, woken: Any) -> None:
    """Leave the waiting rooms of all cases except the one that happened."""
    won = None if woken is TIMED_OUT else woken[0]
    for index, case in enumerate(cases):
        if case is not None and index != won:
            case._leave()


@overload
def select_nowait(c0: Maybe[T0], /, *, priority: bool = ...) -> Case[T0, Literal[0]]: ...
@overload
def select_nowait(
    c0: Maybe[T0], c1: Maybe[T1], /, *, priority: bool = ...
) -> Case[T0, Literal[0]] | Case[T1, Literal[1]]: ...
@overload
def select_nowait(
    c0: Maybe[T0], c1: Maybe[T1], c2: Maybe[T2], /, *, priority: bool = ...
) -> Case[T0, Literal[0]] | Case[T1, Literal[1]] | Case[T2, Literal[2]]: ...
@overload
def select_nowait(
    c0: Maybe[T0], c1: Maybe[T1], c2: Maybe[T2], c3: Maybe[T3], /, *, priority: bool = ...
) -> Case[T0, Literal[0]] | Case[T1, Literal[1]] | Case[T2, Literal[2]] | Case[T3, Literal[3]]: ...
@overload
def select_nowait(
    c0: Maybe[T0], c1: Maybe[T1], c2: Maybe[T2], c3: Maybe[T3], c4: Maybe[T4], /, *, priority: bool = ...
) -> (
    Case[T0, Literal[0]] | Case[T1, Literal[1]] | Case[T2, Literal[2]] | Case[T3, Literal[3]] | Case[T4, Literal[4]]
): ...
@overload
def select_nowait(
    c0: Maybe[T0], c1: Maybe[T1], c2: Maybe[T2], c3: Maybe[T3], c4: Maybe[T4], c5: Maybe[T5], /, *, priority: bool = ...
) -> (
    Case[T0, Literal[0]]
    | Case[T1, Literal[1]]
    | Case[T2, Literal[2]]
    | Case[T3, Literal[3]]
    | Case[T4, Literal[4]]
    | Case[T5, Literal[5]]
): ...
@overload
def select_nowait(*cases: Maybe[T0], priority: bool = ...) -> Case[T0]: ...
def select_nowait(*cases: Maybe[Any], priority: bool = False) -> Case[Any]:
    """Let one of several cases happen if any is ready, without waiting: Go's `select` with `default:`.

    Args:
        cases: the cases, as for `select`.
        priority: if several cases are ready, False chooses one at random, True the first in the order
            given.

    Returns:
        The case that happened, as for `select`.

    Raises:
        WouldBlock: no case is ready.
        ClosedResourceError: the case that happened is a `Send` to a closed channel, or an end that was closed.
        BrokenResourceError: the case that happened is a `Send` to a channel without receivers.
        TypeError: an argument is not a case.
        RuntimeError: a channel belongs to another event loop.
        Exception: the case that happened is the `Result` of a task that failed; this is its error.
    """
    try:
        happened = try_cases(cases, None, priority=priority)
        if happened is None:
            raise WouldBlock  # noqa: TRY301 -- handled like all other errors
        return reveal(happened)
    except BaseException:
        # As in `select`.
        cases = ()
        happened = None
        raise
