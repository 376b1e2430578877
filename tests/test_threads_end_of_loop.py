"""What threads are told when the event loop of their channel ends, is closed, or is lost with the channel."""

from __future__ import annotations

import asyncio
import gc
import threading
import warnings
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from time import monotonic
from typing import Any

import anyio
import pytest
from anyio import BrokenResourceError, WouldBlock
from anyio.lowlevel import checkpoint

from chanflow import Channel, ThreadChannel
from chanflow._channel import _threads
from chanflow._channel._state import ChannelState
from chanflow._channel._threads import Parked, Request
from chanflow._loop._home import current_home
from tests.support.channels import assert_at_rest
from tests.support.threads import PATIENCE, Job, lend, reserve, until, waiting

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("bounded")]


# The end of the loop


def run(backend: str, main: Callable[[], Awaitable[Any]]) -> Any:
    return anyio.run(main, backend=backend)


ENDED = r"\Athe event loop of channel 'c' has ended\Z"


@pytest.fixture(params=["asyncio", "trio"])
def loop_kind(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_end_of_the_loop_wakes_waiting_threads(loop_kind: str) -> None:
    """Threads that wait when `run` returns get BrokenResourceError, and so do those that come later."""
    sent, received = Channel[int](1, "c"), Channel[int](1, "c")

    async def main() -> tuple[ThreadChannel[int], list[Job]]:
        handle = sent.from_thread()
        sent.send_nowait(0)
        jobs = [Job(handle.send, 1), Job(received.from_thread().receive)]
        await until(lambda: waiting(sent) == (1, 0) and waiting(received) == (0, 1))
        return handle, jobs

    handle, jobs = run(loop_kind, main)
    for job in jobs:
        with pytest.raises(BrokenResourceError, match=ENDED):
            job.result()
    with pytest.raises(BrokenResourceError, match=ENDED):
        handle.send(1)
    with pytest.raises(BrokenResourceError, match=ENDED):
        Job(handle.receive, timeout=1).result()
    handle.close()
    # The item that was in the channel is still there.
    assert sent.drain() == [0]
    assert waiting(sent) == waiting(received) == (0, 0)


def test_the_end_of_the_loop_keeps_what_was_sent_and_reserved(loop_kind: str) -> None:
    """What threads had not received or had sent too late for anybody stays in the channel."""
    sent, received = Channel[Any](5), Channel[Any](5)

    async def main() -> None:
        handle = sent.from_thread()
        await lend(sent, handle)
        await reserve(received, received.from_thread(), 1, 2)
        Job(handle.send, 3).result()

    run(loop_kind, main)
    assert sent.drain() == [3]
    assert received.drain() == [1, 2]


def test_a_pump_after_the_end_does_nothing(loop_kind: str) -> None:
    """A call that was on its way when the loop ended finds nothing to do, and ending twice is ending once."""
    channel = Channel[int](1)

    async def main() -> None:
        handle = channel.from_thread()
        job = Job(handle.receive)
        await until(lambda: waiting(channel) == (0, 1))
        handle.end()
        handle.end()
        handle._pump()
        with pytest.raises(BrokenResourceError):
            await job

    run(loop_kind, main)
    assert channel.drain() == []


def test_a_thread_that_was_served_before_the_end_gets_what_it_was_served(
    loop_kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loop: closes the channel and ends; thread: runs only then, and is told of the close, not of the end."""
    channel = Channel[int](name="c")
    original = Request.wait
    ended = threading.Event()

    def wait(request: Request, _seconds: float) -> bool:
        assert original(request, PATIENCE)
        return ended.wait(PATIENCE)

    monkeypatch.setattr(Request, "wait", wait)

    async def main() -> Job:
        job = Job(list, channel.from_thread())
        await until(lambda: waiting(channel) == (0, 1))
        channel.close()
        return job

    job = run(loop_kind, main)
    ended.set()
    assert job.result() == []


@pytest.fixture
def raw_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that a program closes itself, without the notice that `asyncio.run` gives."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def test_waiting_threads_notice_a_loop_that_was_just_closed(
    raw_loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that waits looks now and then whether the loop still is."""
    monkeypatch.setattr(_threads, "POLL", 0.01)
    sent, received = Channel[int](name="c"), Channel[int](name="c")

    async def main() -> list[Job]:
        jobs = [Job(sent.from_thread().send, 1), Job(received.from_thread().receive)]
        await until(lambda: waiting(sent) == (1, 0) and waiting(received) == (0, 1))
        return jobs

    jobs = raw_loop.run_until_complete(main())
    raw_loop.close()
    for job in jobs:
        with pytest.raises(BrokenResourceError, match=ENDED):
            job.result()
    assert waiting(sent) == waiting(received) == (0, 0)


def test_requests_that_a_closed_loop_never_saw_are_answered(
    raw_loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that came as the loop stopped ends as well."""
    monkeypatch.setattr(_threads, "POLL", 0.01)
    channel = Channel[int](name="c")

    async def main() -> ThreadChannel[int]:
        return channel.from_thread()

    handle = raw_loop.run_until_complete(main())
    jobs = [Job(handle.send, 1), Job(handle.receive)]
    deadline = monotonic() + PATIENCE
    while not (handle._sending and handle._receiving):
        assert monotonic() < deadline
    raw_loop.close()
    for job in jobs:
        with pytest.raises(BrokenResourceError, match=ENDED):
            job.result()
    assert channel.drain() == []


@pytest.mark.parametrize("operation", ["send", "receive"])
def test_a_thread_that_comes_after_a_loop_was_just_closed_is_told(
    raw_loop: asyncio.AbstractEventLoop, operation: str
) -> None:
    """The loop can't be woken: that is how the thread learns of its end."""
    channel = Channel[int](1, "c")

    async def main() -> ThreadChannel[int]:
        return channel.from_thread()

    handle = raw_loop.run_until_complete(main())
    raw_loop.close()
    with pytest.raises(BrokenResourceError, match=ENDED):
        Job(handle.send, 1).result() if operation == "send" else Job(handle.receive).result()
    handle.close()
    assert channel.drain() == []


def test_close_after_a_loop_was_just_closed_does_nothing(raw_loop: asyncio.AbstractEventLoop) -> None:
    """Closing never fails."""
    channel = Channel[int](1, "c")

    async def main() -> ThreadChannel[int]:
        return channel.from_thread()

    handle = raw_loop.run_until_complete(main())
    raw_loop.close()
    Job(handle.close).result()
    with pytest.raises(BrokenResourceError, match=ENDED):
        Job(handle.receive).result()


async def park_and_lend(channel: Channel[Any]) -> tuple[ThreadChannel[Any], asyncio.Task[Any]]:
    """Leave a task waiting for an item, and room lent to threads."""
    handle = channel.from_thread()
    await asyncio.to_thread(handle.send, "first")
    assert await channel.receive() == "first"
    handle._pump()
    task = asyncio.ensure_future(channel.receive())
    await until(lambda: waiting(channel) == (0, 1))
    return handle, task


def test_tasks_abandoned_in_a_closed_loop_do_not_trouble_threads(raw_loop: asyncio.AbstractEventLoop) -> None:
    """A thread sends into room it was lent, for a task that can't be woken any more: it is told of the end."""
    channel = Channel[Any](3, "c")
    handle, task = raw_loop.run_until_complete(park_and_lend(channel))
    raw_loop.run_until_complete(raw_loop.shutdown_default_executor())
    raw_loop.close()
    # The item may stay in the channel, but "Event loop is closed" is no answer.
    with suppress(BrokenResourceError):
        Job(handle.send, 1).result()
    with pytest.raises(BrokenResourceError, match=ENDED):
        Job(handle.receive).result()
    with pytest.raises(BrokenResourceError, match=ENDED):
        Job(handle.send, 2).result()
    # Nobody will ever end it.
    setattr(task, "_log_destroy_pending", False)  # noqa: B010 -- it isn't in the types of asyncio
    with suppress(RuntimeError):
        task.get_coro().close()


def test_a_channel_used_in_a_second_loop_has_a_new_thread_side(loop_kind: str) -> None:
    """A channel outlives its event loop, and so do its threads' ways into it."""
    channel = Channel[int](1)

    async def main() -> int:
        await Job(channel.from_thread().send, 1)
        number = await channel.receive()
        assert_at_rest(channel)
        return number

    assert run(loop_kind, main) == 1
    assert run(loop_kind, main) == 1


def test_reserved_items_of_a_lost_loop_are_in_one_place(raw_loop: asyncio.AbstractEventLoop) -> None:
    """Items that were reserved when a loop was just closed are the next loop's or the threads', never both's."""
    channel = Channel[Any](5, "c")

    async def first() -> ThreadChannel[Any]:
        handle = channel.from_thread()
        await reserve(channel, handle, 1, 2, 3)
        return handle

    handle = raw_loop.run_until_complete(first())
    raw_loop.close()

    async def second() -> list[Any]:
        got = [await channel.receive() for _ in range(3)]
        # An IndexError, or an item twice, if it still believed to have them.
        with pytest.raises(BrokenResourceError, match=ENDED):
            await Job(handle.receive)
        with pytest.raises(WouldBlock):
            channel.receive_nowait()
        assert channel._state.room == 5
        assert_at_rest(channel)
        return got

    assert asyncio.run(second()) == [1, 2, 3]


def test_the_thread_of_a_closed_loop_is_like_any_other(raw_loop: asyncio.AbstractEventLoop) -> None:
    """Once the loop is closed, its own thread gets BrokenResourceError; nothing can be blocked any more."""
    channel = Channel[int](name="c")

    async def main() -> ThreadChannel[int]:
        return channel.from_thread()

    handle = raw_loop.run_until_complete(main())
    raw_loop.close()
    with pytest.raises(BrokenResourceError, match=ENDED):
        handle.receive(timeout=1)


# Being dropped


async def test_a_dropped_channel_leaves_no_warning(backend: str) -> None:
    """The notice of the loop's end goes with the channel: no warning, and nothing is kept alive."""
    gc.collect()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number in range(20):
            channel = Channel[int](2)
            handle = channel.from_thread()
            await Job(handle.send, number)
            # An entry in a waiting room, too, must not hold it.
            channel._state.receivers.append((Parked(Request(), handle._hand_over), handle))
            gone = weakref.ref(handle)
            state: weakref.ref[ChannelState[int]] = weakref.ref(channel._state)
            del channel, handle
            await checkpoint()
            gc.collect()
            assert gone() is None
            assert state() is None
        await checkpoint()
    assert [str(warning.message) for warning in caught] == []


def test_a_thread_side_may_be_dropped_while_the_end_is_told(loop_kind: str) -> None:
    """Loop: tells that it ends; garbage collector, in between: collects the thread side, which wants no notice."""
    told: list[BaseException | None] = []

    def drop() -> None:
        try:
            cancel()
        except RuntimeError as error:
            told.append(error)
        else:
            told.append(None)

    cancel: Any = None

    async def main() -> None:
        nonlocal cancel
        home = current_home()
        assert home is not None
        cancel = home.on_end(drop)

    run(loop_kind, main)
    assert told == [None]


async def test_a_channel_that_is_kept_while_its_thread_side_is_dropped() -> None:
    """The channel keeps its thread side: what was lent to it is never lost."""
    channel = Channel[int](2)
    await Job(channel.from_thread().send, 1)
    gc.collect()
    handle = channel.from_thread()
    await Job(handle.send, 2)
    assert channel.drain() == [1, 2]
    assert_at_rest(channel)


async def test_a_thread_that_waits_for_long_goes_on_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking whether the loop has ended is not the end of the wait."""
    monkeypatch.setattr("chanflow._channel._threads.POLL", 0.001)
    channel = Channel[int]()
    original = Request.wait
    looks: list[bool] = []

    def wait(request: Request, seconds: float) -> bool:
        looks.append(original(request, seconds))
        return looks[-1]

    monkeypatch.setattr(Request, "wait", wait)
    job = Job(channel.from_thread().receive)
    await until(lambda: len(looks) > 3)
    await channel.send(1)
    assert await job == 1
    assert looks[-1]
    assert_at_rest(channel)


def test_a_loss_is_noticed_once(raw_loop: asyncio.AbstractEventLoop) -> None:
    """Two threads notice that the loop is over: the second finds nothing to do."""
    channel = Channel[int](1, "c")

    async def main() -> Any:
        return channel.from_thread()

    handle = raw_loop.run_until_complete(main())
    raw_loop.close()
    handle._lost()
    handle._lost()
    with pytest.raises(BrokenResourceError, match=ENDED):
        Job(handle.receive).result()
