"""Channels from threads: who waits there, and how the event loop is woken to serve them, once for a batch.

What threads have from the channel meanwhile is kept in its ledger.
"""

# Invariant, while the channel is open: a thread that waits has a request in one of the two queues here, with a pump
# scheduled, or a place in a waiting room of the channel.

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from time import monotonic
from types import TracebackType
from typing import Any, Generic, NoReturn, Self, TypeVar, cast
from weakref import WeakMethod

from anyio import BrokenResourceError, ClosedResourceError, EndOfStream

from chanflow._channel._ledger import Ledger
from chanflow._channel._state import ChannelState
from chanflow._check import check_seconds
from chanflow._loop._home import Home
from chanflow._loop._wait import Outcome

__all__ = ["ThreadChannel", "open_from_thread"]

T = TypeVar("T")

POLL = 1.0
"""How often, in seconds, a waiting thread looks whether a loop has ended that gave no notice of it."""
PENDING: Any = object()


class Process:
    """Tells a process from those that it was forked from."""

    forks = 0

    @classmethod
    def forked(cls) -> None:
        cls.forks += 1


if hasattr(os, "register_at_fork"):  # pragma: no branch -- only systems with forks need it
    os.register_at_fork(after_in_child=Process.forked)


class LoopEndedError(BrokenResourceError):
    """The outcome of a request that the end of the loop left unserved."""


class Request:
    """A thread that waits to send or to receive."""

    __slots__ = ("_gate", "deadline", "item", "looked", "outcome")

    def __init__(self, item: Any = None, deadline: float = math.inf) -> None:
        self.item = item
        self.deadline = deadline
        # Whether the event loop has seen it, and what there was for it.
        self.looked = False
        # Pending, then None for success or the class of the error.
        self.outcome: Outcome = PENDING
        self._gate = threading.Lock()
        self._gate.acquire()

    def done(self) -> bool:
        return self.outcome is not PENDING

    def finish(self, outcome: Outcome) -> None:
        """Let the thread go on; only under the lock of the channel."""
        if not self.done():
            self.outcome = outcome
            self._gate.release()

    def wait(self, seconds: float) -> bool:
        return self._gate.acquire(timeout=seconds)


class Parked:
    """The place of a thread in a waiting room of the channel."""

    __slots__ = ("_finish", "_request", "done")

    def __init__(self, request: Request, finish: Callable[[Request, Outcome], object]) -> None:
        self._request = request
        self._finish = finish
        self.done = request.done

    def set_result(self, outcome: Outcome) -> None:
        self._finish(self._request, outcome)


class ThreadChannel(Generic[T]):
    """A channel as threads use it; made by `Channel.from_thread`.

    Any number of threads may use it at the same time, with the channel's capacity and order, and together with
    tasks in the event loop. When the event loop ends, every waiting thread gets BrokenResourceError.
    """

    def __init__(self, state: ChannelState[T], home: Home) -> None:
        state.home = home
        state.special = True
        self._state = state
        self._home = home
        self._ledger = Ledger(state)
        state.ledger = self._ledger
        # One for both, since the threads' own state changes together with what they have from the channel.
        self._lock = self._ledger.lock
        # Requests in a waiting room that were given up.
        self._given_up = 0
        self._sending: deque[Request] = deque()
        self._receiving: deque[Request] = deque()
        self._scheduled = False
        # Room is lent only where threads send.
        self._lending = False
        self._closing = False
        self._refusal: Outcome = None
        self._ended = False
        self._forks = Process.forks
        end = WeakMethod(self.end)
        self._forget_end = home.on_end(lambda: (method := end()) and method())
        self._pump()
        if state.closed or state.broken:
            self.closed()

    def __repr__(self) -> str:
        return f"<ThreadChannel of {self._state}>"

    # From threads

    def send(self, item: T) -> None:
        """Send one item, waiting for room.

        Args:
            item: any object; handed over by reference, never copied.

        Raises:
            ClosedResourceError: the channel was closed, before or while waiting.
            BrokenResourceError: every receiver is closed, or the event loop has ended, before or while waiting.
            RuntimeError: called in the event loop's own thread, which waiting would block; or in a process that was
                forked from its own.

        Cancellation:
            A KeyboardInterrupt while waiting leaves open whether the item is delivered.
        """
        self._check_thread()
        request = None
        with self._lock:
            if self._ended or self._refusal is not None:
                self._refuse()
            if self._sending or not self._ledger.send(item):
                self._lending = True
                request = Request(item)
                self._sending.append(request)
            wake = self._schedule()
        if wake:
            self._wake()
        if request is not None:
            self._wait(request, None, receiving=False)

    def receive(self, timeout: float | None = None) -> T:
        """Receive the next item, waiting for one.

        Args:
            timeout: how many seconds to wait, at least 0; None for no bound. Even with 0, what is in the channel is
                received, if the event loop answers within a second.

        Returns:
            The item that has been in the channel for the longest time.

        Raises:
            TimeoutError: nothing came in time; nothing was taken.
            EndOfStream: the channel is closed, and nothing is left in it.
            ClosedResourceError: the receiving side of the channel is closed.
            BrokenResourceError: the event loop has ended, before or while waiting.
            ValueError: `timeout` is negative.
            RuntimeError: called in the event loop's own thread, which waiting would block; or in a process that was
                forked from its own.

        Cancellation:
            On a KeyboardInterrupt while waiting, it took nothing.
        """
        if timeout is not None:
            check_seconds("timeout", timeout)
        self._check_thread()
        request = Request(deadline=math.inf if timeout is None else monotonic() + timeout)
        wake = False
        with self._lock:
            if self._ledger.can_take():
                request.item = self._ledger.take()
                request.finish(None)
                if not self._ledger.can_take() or self._state.senders:
                    wake = self._schedule()
            elif self._ended:
                raise self._end_error()
            else:
                self._receiving.append(request)
                wake = self._schedule()
        if wake:
            self._wake()
        self._wait(request, timeout, receiving=True)
        return cast("T", request.item)

    def close(self) -> None:
        """Close the channel for sending, after what was sent before; Go's `close`. Closing again does nothing.

        Raises:
            RuntimeError: called in a process that was forked from its own.
        """
        self._check_process()
        with self._lock:
            self._closing = True
            self._refusal = self._refusal or ClosedResourceError
            wake = not self._ended and self._schedule()
        if wake:
            self._wake()

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        try:
            return self.receive()
        except EndOfStream:
            raise StopIteration from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    def _check_process(self) -> None:
        if self._forks != Process.forks:
            msg = f"{self!r} was made before a fork: its event loop runs in the parent process only"
            raise RuntimeError(msg)

    def _check_thread(self) -> None:
        if self._forks != Process.forks:
            self._check_process()
        if self._home.thread == threading.get_ident() and not self._home.ended():
            msg = f"{self!r} would block the event loop of its own thread; use the channel itself there"
            raise RuntimeError(msg)

    def _refuse(self) -> NoReturn:
        if self._ended:
            raise self._end_error()
        assert self._refusal is not None
        raise self._state.error(self._refusal)

    def _end_error(self) -> Exception:
        return BrokenResourceError(f"the event loop of {self._state} has ended")

    def _schedule(self) -> bool:
        """Tell, under the lock, whether the loop has to be woken to pump: the caller does it without the lock.

        Waking is a system call, after which the loop's thread would only find the lock taken.
        """
        wake = not self._scheduled
        self._scheduled = True
        return wake

    def _wake(self) -> None:
        try:
            self._home.call_soon(self._pump)
        except RuntimeError:
            # It ended without having told.
            self._lost()

    def _wait(self, request: Request, timeout: float | None, *, receiving: bool) -> None:
        """Wait until the loop has finished a request."""
        until, patience = request.deadline, monotonic() + POLL
        try:
            while not request.wait(max(0.0, min(POLL, until - monotonic()))):
                now = monotonic()
                if self._home.ended():
                    self._lost()
                elif now < until:
                    continue
                elif request.looked or now >= patience:
                    self._give_up(request)
                else:
                    # The event loop has not even looked yet: it ends the request when it has.
                    until = patience
        except BaseException:
            with self._lock:
                if receiving and request.outcome is None:
                    self._ledger.give_back(request.item)
            self._give_up(request)
            raise
        if request.outcome is TimeoutError:
            msg = f"nothing to receive from {self._state} within {timeout} s"
            raise TimeoutError(msg)
        if request.outcome is LoopEndedError:
            raise self._end_error()
        if request.outcome is not None:
            raise self._state.error(request.outcome)

    def _give_up(self, request: Request) -> None:
        """Let the loop serve a request no more, and clear away what is left of it."""
        with self._lock:
            self._given_up += not request.done()
            request.finish(TimeoutError)
            wake = not self._ended and self._schedule()
        if wake:
            self._wake()

    def _lost(self) -> None:
        """Take note, in a thread, that the loop is over."""
        with self._lock:
            if self._state.bridge is self:
                self._state.evict()

    # In the event loop

    def _pump(self) -> None:
        """Exchange with the channel what has come together."""
        with self._lock:
            self._scheduled = False
            if self._ended:
                return
            self._ledger.recall_room()
            for _ in range(self._given_up):
                self._state.receivers.leave()
            self._given_up = 0
            self._serve_senders()
            if self._closing:
                self._state.close()
            if self._receiving:
                self._serve_receivers()
            self._lend()

    def _serve_senders(self) -> None:
        state = self._state
        while self._sending:
            request = self._sending.popleft()
            if request.done():
                continue
            try:
                if state.put(request.item):
                    request.finish(None)
                else:
                    state.senders.append((Parked(request, self._finish), self, request.item))
            except (ClosedResourceError, BrokenResourceError) as error:
                request.finish(type(error))

    def _serve_receivers(self) -> None:
        state = self._state
        while self._receiving:
            request = self._receiving.popleft()
            if request.done():
                continue
            if state.can_take():
                request.item = state.take_behind() if state.reserved else state.take()
                request.finish(None)
            elif state.over():
                request.finish(ClosedResourceError if state.broken else EndOfStream)
            elif monotonic() >= request.deadline:
                request.finish(TimeoutError)
            else:
                request.looked = True
                state.receivers.append((Parked(request, self._hand_over), self))
        if state.reserved:
            # Those who were woken for the first items come before.
            return
        self._ledger.lend_items()

    def _lend(self) -> None:
        if self._lending and not self._state.senders.any_live():
            self._ledger.lend_room()

    def _finish(self, request: Request, outcome: Outcome) -> None:
        """Wake a thread that waited for room."""
        with self._lock:
            request.finish(outcome)

    def _hand_over(self, request: Request, outcome: Outcome) -> None:
        """Wake a thread that waited for an item."""
        with self._lock:
            if outcome is None and request.done():
                # Its time was over in this very moment.
                self._state.release()
                return
            if outcome is None:
                request.item = self._state.redeem_at_once()
            request.finish(outcome)

    def closed(self) -> None:
        """Tell the threads that one side of the channel was closed."""
        with self._lock:
            self._refusal = ClosedResourceError if self._state.closed else BrokenResourceError

    def sender_parked(self) -> None:
        """Make sure that room which threads made is seen by a sender that has just come to wait."""
        with self._lock:
            wake = self._ledger.made_room and self._schedule()
        if wake:
            self._wake()

    def end(self) -> None:
        """Let all threads go, as the event loop is over."""
        state = self._state
        with self._lock:
            if self._ended:
                return
            if state.bridge is self:
                state.ledger = state.bridge = None
            else:
                # Evicted: all reservations are forgotten already.
                self._ledger.forget_reservations()
            self._ledger.recall_room()
            self._ledger.recall_items()
            self._ended = True
            for request in (*self._sending, *self._receiving):
                request.finish(LoopEndedError)
            state.senders.dismiss(LoopEndedError, lambda entry: entry[1] is self)
            state.receivers.dismiss(LoopEndedError, lambda entry: entry[1] is self)

    def __del__(self) -> None:
        self._forget_end()


def open_from_thread(state: ChannelState[Any]) -> ThreadChannel[Any]:
    """Give a channel its one thread side."""
    home = state.enter()
    if state.bridge is None:
        state.bridge = ThreadChannel(state, home)
    assert isinstance(state.bridge, ThreadChannel)
    return state.bridge
