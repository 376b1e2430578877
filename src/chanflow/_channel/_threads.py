"""Channels for threads: the waiting threads, and the pump that serves them in the event loop, once for a batch.

The ledger of the channel has the room and items lent to threads.
"""

# Invariant, while the channel is open: a waiting thread has either a request in one of the two queues here, with a pump
# scheduled, or an entry in a waiting room of the channel.

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
"""Seconds between a waiting thread's checks whether the event loop has ended without notice."""
PENDING: Any = object()


class Process:
    """Counts the forks between the first process and this one, to recognize objects from before a fork."""

    forks = 0

    @classmethod
    def forked(cls) -> None:
        cls.forks += 1


if hasattr(os, "register_at_fork"):  # pragma: no branch -- missing on systems without forks
    os.register_at_fork(after_in_child=Process.forked)


class LoopEndedError(BrokenResourceError):
    """The outcome of a request that was not served before the event loop ended."""


class Request:
    """The send or receive operation of a thread, and its outcome."""

    __slots__ = ("_gate", "deadline", "item", "looked", "outcome")

    def __init__(self, item: Any = None, deadline: float = math.inf) -> None:
        self.item = item
        self.deadline = deadline
        # Whether the event loop has looked for an item for it.
        self.looked = False
        # Pending, then None for success or the class of the error.
        self.outcome: Outcome = PENDING
        self._gate = threading.Lock()
        self._gate.acquire()

    def done(self) -> bool:
        return self.outcome is not PENDING

    def finish(self, outcome: Outcome) -> None:
        """Wake the thread with an outcome, unless it has one; call this under the lock of the channel."""
        if not self.done():
            self.outcome = outcome
            self._gate.release()

    def wait(self, seconds: float) -> bool:
        return self._gate.acquire(timeout=seconds)


class Parked:
    """The waiter of a thread in a waiting room of the channel."""

    __slots__ = ("_finish", "_request", "done")

    def __init__(self, request: Request, finish: Callable[[Request, Outcome], object]) -> None:
        self._request = request
        self._finish = finish
        self.done = request.done

    def set_result(self, outcome: Outcome) -> None:
        self._finish(self._request, outcome)


class ThreadChannel(Generic[T]):
    """A channel for use from threads; created by `Channel.from_thread`.

    Any number of threads may use it concurrently, along with tasks in the event loop, and share the channel's capacity
    and order with them. When the event loop ends, all waiting threads get BrokenResourceError.
    """

    def __init__(self, state: ChannelState[T], home: Home) -> None:
        state.home = home
        state.special = True
        self._state = state
        self._home = home
        self._ledger = Ledger(state)
        state.ledger = self._ledger
        # One lock for both, since this object's state changes together with the ledger.
        self._lock = self._ledger.lock
        # The number of abandoned requests with an entry in a waiting room.
        self._abandoned = 0
        self._sending: deque[Request] = deque()
        self._receiving: deque[Request] = deque()
        self._scheduled = False
        # Room is lent only once a thread has tried to send.
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
            item: any object; passed by reference, never copied.

        Raises:
            ClosedResourceError: the channel was closed, before or while waiting.
            BrokenResourceError: all receivers were closed, or the event loop ended, before or while waiting.
            RuntimeError: called in the event loop's own thread, which would block; or in a forked process.

        Cancellation:
            After a KeyboardInterrupt while waiting, the item may or may not be delivered.
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
            timeout: how many seconds to wait, at least 0; None to wait without a time limit. Even with 0, an item that
                is in the channel is received, if the event loop responds within a second.

        Returns:
            The oldest item in the channel.

        Raises:
            TimeoutError: no item arrived in time; none was taken.
            EndOfStream: the channel is closed, and no items are left in it.
            ClosedResourceError: the receiving side of the channel is closed.
            BrokenResourceError: the event loop ended, before or while waiting.
            ValueError: `timeout` is negative.
            RuntimeError: called in the event loop's own thread, which would block; or in a forked process.

        Cancellation:
            After a KeyboardInterrupt while waiting, no item was taken.
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
        """Close the channel for sending; Go's `close`. Items sent earlier are delivered. Closing again has no effect.

        Raises:
            RuntimeError: called in a forked process.
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
        """Mark the pump as scheduled; return whether the caller must wake the event loop, after releasing the lock.

        Waking the loop is a system call. Under the lock, its thread would run only to find the lock taken.
        """
        wake = not self._scheduled
        self._scheduled = True
        return wake

    def _wake(self) -> None:
        try:
            self._home.call_soon(self._pump)
        except RuntimeError:
            # The event loop ended without notice.
            self._lost()

    def _wait(self, request: Request, timeout: float | None, *, receiving: bool) -> None:
        """Wait until the event loop has finished a request, and raise its error if it failed."""
        until, patience = request.deadline, monotonic() + POLL
        try:
            while not request.wait(max(0.0, min(POLL, until - monotonic()))):
                now = monotonic()
                if self._home.ended():
                    self._lost()
                elif now < until:
                    continue
                elif request.looked or now >= patience:
                    self._abandon(request)
                else:
                    # The event loop has not looked yet. It will finish the request when it has.
                    until = patience
        except BaseException:
            with self._lock:
                if receiving and request.outcome is None:
                    self._ledger.give_back(request.item)
            self._abandon(request)
            raise
        if request.outcome is TimeoutError:
            msg = f"nothing to receive from {self._state} within {timeout} s"
            raise TimeoutError(msg)
        if request.outcome is LoopEndedError:
            raise self._end_error()
        if request.outcome is not None:
            raise self._state.error(request.outcome)

    def _abandon(self, request: Request) -> None:
        """Abandon a request, and schedule the removal of its entry in a waiting room."""
        with self._lock:
            self._abandoned += not request.done()
            request.finish(TimeoutError)
            wake = not self._ended and self._schedule()
        if wake:
            self._wake()

    def _lost(self) -> None:
        """Record, from a thread, that the event loop has ended."""
        with self._lock:
            if self._state.bridge is self:
                self._state.evict()

    # In the event loop

    def _pump(self) -> None:
        """Serve all requests of threads, and lend them room and items."""
        with self._lock:
            self._scheduled = False
            if self._ended:
                return
            self._ledger.recall_room()
            for _ in range(self._abandoned):
                self._state.receivers.leave()
            self._abandoned = 0
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
            # The receivers that were woken for the first items come first.
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
                # It timed out before it could take the item.
                self._state.release()
                return
            if outcome is None:
                request.item = self._state.redeem_at_once()
            request.finish(outcome)

    def closed(self) -> None:
        """Refuse further calls from threads, since one side of the channel was closed."""
        with self._lock:
            self._refusal = ClosedResourceError if self._state.closed else BrokenResourceError

    def sender_parked(self) -> None:
        """Make sure that a sender that has just parked sees room that threads made."""
        with self._lock:
            wake = self._ledger.made_room and self._schedule()
        if wake:
            self._wake()

    def end(self) -> None:
        """Wake all waiting threads with an error, since the event loop has ended."""
        state = self._state
        with self._lock:
            if self._ended:
                return
            if state.bridge is self:
                state.ledger = state.bridge = None
            else:
                # The state was evicted, so all reservations are already forgotten.
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
    """Return the thread side of a channel, creating it on first use."""
    home = state.enter()
    if state.bridge is None:
        state.bridge = ThreadChannel(state, home)
    assert isinstance(state.bridge, ThreadChannel)
    return state.bridge
