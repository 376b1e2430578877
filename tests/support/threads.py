"""Calls in threads, and what threads do to a channel."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from time import monotonic
from typing import Any

import pytest
from anyio import to_thread
from anyio.lowlevel import checkpoint

from chanflow import Channel, ThreadChannel
from chanflow._channel._threads import Request

PATIENCE = 30.0
"""Seconds of real time after which something that should have happened never will."""


class Job:
    """A call in a thread of its own, which can't keep the tests from ending."""

    def __init__(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        self.value: Any = None
        self.error: BaseException | None = None

        def run() -> None:
            try:
                self.value = function(*args, **kwargs)
            except BaseException as error:  # noqa: BLE001 -- raised by `result`
                self.error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> Any:
        """Wait for the end, blocking the caller."""
        self._thread.join(PATIENCE)
        assert not self.running, "the thread is still blocked"
        if self.error is not None:
            raise self.error
        return self.value

    def __await__(self) -> Any:
        return to_thread.run_sync(self.result).__await__()


async def until(condition: Callable[[], object]) -> None:
    """Let the event loop run until something is so."""
    deadline = monotonic() + PATIENCE
    while not condition():
        assert monotonic() < deadline, "it never happened"
        await checkpoint()


def waiting(channel: Channel[Any]) -> tuple[int, int]:
    """Count those who wait to send and to receive, without taking back what threads have."""
    return channel._state.senders.count_live(), channel._state.receivers.count_live()


async def lend(channel: Channel[Any], handle: ThreadChannel[Any]) -> None:
    """Let the channel lend room to threads, as it does once one of them has sent."""
    await Job(handle.send, "first")
    assert await channel.receive() == "first"
    handle._pump()
    assert handle._ledger._credits == min(channel.capacity, sys.maxsize)


async def reserve(channel: Channel[Any], handle: ThreadChannel[Any], *items: Any) -> None:
    """Let the channel reserve these items for threads, as it does once one of them has received."""
    for item in ("first", *items):
        channel.send_nowait(item)
    assert await Job(handle.receive) == "first"
    assert handle._ledger._claims == len(items)


class Interruption:
    """Ctrl-C in a thread that was served or not, once the test lets it go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, served: bool) -> None:
        self.came = threading.Event()
        self.waiting = threading.Event()
        self.now = threading.Event()
        original = Request.wait

        def wait(request: Request, _seconds: float) -> bool:
            self.came.set()
            if served:
                assert original(request, PATIENCE)
            self.waiting.set()
            assert self.now.wait(PATIENCE)
            raise KeyboardInterrupt

        monkeypatch.setattr(Request, "wait", wait)

    async def receive(self, channel: Channel[Any], *items: Any) -> Job:
        """Let a thread wait for the first of these items; it is interrupted when it has been served, if ever."""
        job = Job(channel.from_thread().receive)
        await until(lambda: self.came.is_set() and waiting(channel) == (0, 1))
        for item in items:
            channel.send_nowait(item)
        await until(self.waiting.is_set)
        return job

    async def happen(self, job: Job) -> None:
        self.now.set()
        with pytest.raises(KeyboardInterrupt):
            await job
