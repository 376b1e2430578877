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
# A case that is None gives nothing.
T0 = TypeVar("T0", default=Never)
T1 = TypeVar("T1", default=Never)
T2 = TypeVar("T2", default=Never)
T3 = TypeVar("T3", default=Never)
T4 = TypeVar("T4", default=Never)
T5 = TypeVar("T5", default=Never)

# Our own generator, so that a program that seeds `random` stays reproducible. Not for security.
random: Callable[[], float] = Random().random  # noqa: S311 -- said above


class Selectable(Protocol[T_co]):
    """What can be a case of `select`: `Channel`, `ReceiveChannel`, `Send`, `Result`, `after`, `ticker`."""

    def _ready(self, home: Home, /) -> bool:
        """Tell whether it can happen now, or fail."""
        ...

    def _attempt(self, home: Home | None, /) -> T_co | Answer:
        """Make it happen if it can happen now, else give `NOTHING`; the home is the caller's, where it is known."""
        ...

    def _join(self, waiter: Waiter, home: Home, /) -> None:
        """Enter the waiting room."""
        ...

    def _leave(self) -> None:
        """Leave the waiting room; another case happened."""
        ...

    def _redeem(self, outcome: Outcome, /) -> T_co | Answer:
        """Finish the operation that the waiter was woken for."""
        ...

    def _release(self, outcome: Outcome, /) -> bool:
        """Give back what the waiter was woken for; False if it can't be given back."""
        ...


# A case for `select`, or None for one that never happens.
Maybe: TypeAlias = Selectable[T] | None


class Case(NamedTuple, Generic[T_co, I_co]):
    """What happened in a `select`.

    To type checkers, `select` of up to six cases returns a union of `Case[T0, Literal[0]]`, `Case[T1, Literal[1]]`
    and so on. Comparing the index by `==` tells them the type of the item, and comparing the item with None that there
    is one: `if case.index == 0 and case.item is not None:`. In annotations, `Case[int]` is a case at any place.
    """

    index: I_co  # type: ignore[assignment] # pyright: ignore[reportIncompatibleMethodOverride] # not a tuple to search
    """The place of the case among the arguments, from 0."""
    channel: Any
    """The channel, result or timer of the case; of a `Send`, its channel."""
    item: T_co | None
    """What was received; None for a `Send` and when `closed`."""
    closed: bool
    """Whether this is a channel that is closed and drained; Go's `v, ok := <-ch` with `ok` false."""


# What the named tuple does in Python, at once.
new_case: Callable[[tuple[int, Any, Any, bool]], Case[Any]] = partial(tuple.__new__, Case)


class Send(Generic[T_contra]):
    """Sending an item, as a case of `select`.

    Args:
        channel: a `Channel` or `SendChannel`. If it is closed or broken when the case is chosen,
            `select` raises as `send` would.
        item: any object; handed over by reference, and only if this case happens.

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

    def _attempt(self, home: Home | None) -> Answer | None:
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
    """What becomes ready when its time comes. A `select` waits until then by itself, so there is no task."""

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

    def _attempt(self, _home: Home | None) -> float | Answer:
        self._check_here()
        now = self._home.time()
        return self._take(now) if now >= self._due else NOTHING

    def _take(self, now: float) -> float:
        """Give the time at which it was due, and set when it is due next."""
        raise NotImplementedError

    def _leave(self) -> None:
        """Nothing was joined."""

    def _join(self, _waiter: Waiter, _home: Home) -> None:
        """Nobody wakes it: `select` looks at the time."""


class After(Timer):
    """A case that is ready once, when its time has come; made by `after`."""

    __slots__ = ()

    def __repr__(self) -> str:
        return f"<After at {self._due}>"

    def _take(self, now: float) -> float:
        del now
        due, self._due = self._due, math.inf
        return due

    def _redeem(self, _outcome: Outcome) -> float:
        # Nobody wakes it.
        raise AssertionError

    def _release(self, _outcome: Outcome) -> bool:
        raise AssertionError


def after(seconds: float) -> After:
    """Make a case that becomes ready once, so many seconds from now; no task is started for it.

    Args:
        seconds: at least 0, `math.inf` for never. They count from this call, so that one `after` can
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
    """A case that is ready at regular times, and an iterator over them; made by `ticker`."""

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

    def _attempt(self, home: Home | None) -> float | Answer:
        item = super()._attempt(home)
        if self._closed:
            msg = f"{self!r} is closed"
            raise EndOfStream(msg)
        return item

    def _take(self, now: float) -> float:
        due = now - math.fmod(now - self._due, self._interval)
        # An interval may be too short to move the clock.
        self._due = max(due + self._interval, math.nextafter(now, math.inf))
        return due

    def _join(self, waiter: Waiter, _home: Home) -> None:
        self._room.append((waiter, None))

    def _leave(self) -> None:
        self._room.leave()

    def _redeem(self, _outcome: Outcome) -> float | Answer:
        # It is woken only by `close`.
        return self._attempt(self._home)

    def _release(self, _outcome: Outcome) -> bool:
        return True

    def close(self) -> None:
        """Stop the ticker: iteration ends, and as a case it is ready with `closed`.

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
    """Make a ticker: a context manager that is a case for `select` and an asynchronous iterator.

    The first tick comes one interval from now. A tick that nobody takes before the next is dropped, so a slow reader
    gets the latest one and is never flooded. No task is started for it.

    Args:
        interval: seconds from tick to tick, greater than 0 and finite.

    Returns:
        The ticker. Its item is the time on the event loop's clock at which the tick was due.

    Raises:
        ValueError: `interval` is not greater than 0 or not finite.
        TypeError: `interval` is not a number.
        RuntimeError: called outside of asyncio and trio, or used in another event loop.

    Source:
        Go, time.NewTicker.
    """
    return Ticker(interval)


class Ticket:
    """One select's place in one waiting room: all its tickets stand for the same parked task."""

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
    """Refuse what is no case."""
    for index, case in enumerate(cases):
        if case is not None and (isinstance(case, type) or not hasattr(case, "_attempt")):
            msg = f"case {index} must be a Channel, ReceiveChannel, Send, Result, timer or None, got {show(case)}"
            raise TypeError(msg)


Happened: TypeAlias = "Case[Any] | Answer"
"""What happened in a select, or an answer with the error of a result."""


def reveal(happened: Happened) -> Case[Any]:
    """Give what happened, or raise the error of a result."""
    if type(happened) is not Answer:
        return cast("Case[Any]", happened)
    assert happened.error is not None
    try:
        raise happened.error
    finally:
        # As said in `select`.
        del happened


def attempt(cases: Cases, home: Home | None, *, priority: bool) -> Happened | None:
    """Let one of the cases happen if any can: the first in the order given, or in a random order, as in Go."""
    check_cases(cases)
    untried = list(range(len(cases)))
    while untried:
        index = untried.pop(0 if priority else int(random() * len(untried)))
        case = cases[index]
        if case is not None:
            happened = carry_out(index, case, case._attempt, home)
            if happened is not None:
                return happened
    return None


def carry_out(index: int, case: Any, operation: Callable[[Any], Any], argument: object) -> Happened | None:
    """Attempt a case, or finish it, and tell what happened."""
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
async def select(*cases: Maybe[Any], priority: bool = False) -> Case[Any]:  # noqa: C901 -- a short cut
    """Wait until one of several cases can happen, and let exactly that one happen.

    A channel or its receiving end is a case of receiving, `Send` one of sending; a `Result`, `after` and a `ticker` are
    cases too. A closed and drained channel is always ready, with `closed=True`. Losing cases leave
    nothing behind. A case that is None is never ready, like Go's nil channel; without any other case, the call
    waits until it is cancelled.

    Args:
        cases: what to wait for.
        priority: among several that are ready, False takes each with the same chance, True the first in the order
            given.

    Returns:
        What happened, with the place, channel and item. Type checkers know the item's type once the place is compared,
        as in `if case.index == 0:`; see :class:`Case`.

    Raises:
        ClosedResourceError: the case that happened is a `Send` to a closed channel, or an end that was closed.
        BrokenResourceError: the case that happened is a `Send` to a channel without receivers.
        TypeError: something is not a case.
        RuntimeError: a channel belongs to another event loop.
        Exception: the case that happened is the `Result` of a task that failed; its error. The results that are
            `done` tell which it may be.

    Cancellation:
        Atomic: if the call is cancelled, no case happened. Once a `Send` was taken, the call returns
        normally, and a cancellation that came too late arrives at the next checkpoint. A call that need not wait is
        a checkpoint only every so often, see :func:`set_checkpoint_interval`.

    Source:
        Go, runtime/select.go, selectgo.
    """
    home = recent.home
    if next(home.turns, None) is not home.loop or (not home.shuffles and "trio" in sys.modules):
        home = await arrive(cases)
    try:
        while True:
            # Pass 1: look for a case that can happen now. An item in the channel that is tried first needs no closer
            # look.
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
            happened = attempt(cases, home, priority=priority)
            if happened is not None:
                return reveal(happened)
            # Pass 2: wait for all of them.
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
            # Pass 3: leave those that didn't happen.
            leave_losers(cases, woken)
            if woken is not TIMED_OUT:
                index, outcome = woken
                winner: Any = cases[index]
                return reveal(cast("Happened", carry_out(index, winner, winner._redeem, outcome)))
    except BaseException:
        # The error of a result must not refer to it through its traceback.
        cases = ()
        lucky = winner = selectable = happened = None
        raise


async def arrive(cases: Cases) -> Home:
    """Find the caller's home, and yield if it is time to and a case can happen at once."""
    home = current_home()
    if home is None:
        msg = "select was used outside of asyncio and trio"
        raise RuntimeError(msg)
    check_cases(cases)
    if not home.turns_left() and any(case is not None and is_ready(case, home) for case in cases):
        await home.checkpoint()
    return home


def is_ready(case: Selectable[Any], home: Home) -> bool:
    """Tell whether a case can happen now, or is refused."""
    try:
        return case._ready(home)
    except Exception:  # noqa: BLE001 -- the attempt raises it
        return True


def interrupt(cases: Cases, waiter: TaskWaiter, home: Home, exc: BaseException) -> Happened | None:
    """Undo what an interrupted select waited for, or give what happened before and can't be undone."""
    if isinstance(exc, GeneratorExit) and home.ended():
        # As in `give_up`.
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
    """Take a select's tickets back from all rooms but that of the case that happened."""
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
    """Let one of several cases happen if any can without waiting: Go's `select` with `default:`.

    Args:
        cases: what to look at, as for `select`.
        priority: among several that are ready, False takes each with the same chance, True the first in the order
            given.

    Returns:
        What happened, as from `select`.

    Raises:
        WouldBlock: no case can happen now.
        ClosedResourceError: the case that happened is a `Send` to a closed channel, or an end that was closed.
        BrokenResourceError: the case that happened is a `Send` to a channel without receivers.
        TypeError: something is not a case.
        RuntimeError: a channel belongs to another event loop.
        Exception: the case that happened is the `Result` of a task that failed; its error.
    """
    try:
        happened = attempt(cases, None, priority=priority)
        if happened is None:
            raise WouldBlock  # noqa: TRY301 -- all errors go the same way
        return reveal(happened)
    except BaseException:
        # As in `select`.
        cases = ()
        happened = None
        raise
