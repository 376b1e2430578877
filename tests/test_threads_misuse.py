"""Uses of a channel from threads that are refused: the loop's own thread, another loop, a forked process."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from functools import partial

import anyio
import pytest

from chanflow import Channel, select, select_nowait
from chanflow._channel import _threads
from tests.support.channels import assert_at_rest
from tests.support.messages import whole
from tests.support.threads import Job, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("bounded")]


async def test_a_channel_has_one_thread_side() -> None:
    """`from_thread` gives the same object each time."""
    channel = Channel[int](name="c")
    handle = channel.from_thread()
    assert channel.from_thread() is handle
    assert repr(handle) == "<ThreadChannel of channel 'c'>"


async def test_waiting_in_the_loops_own_thread_is_refused() -> None:
    """It would block the event loop that it waits for, even where nothing has to be waited for."""
    channel = Channel[int](2, "c")
    handle = channel.from_thread()
    message = (
        r"\A<ThreadChannel of channel 'c'> would block the event loop of its own thread; "
        r"use the channel itself there\Z"
    )
    channel.send_nowait(1)
    with pytest.raises(RuntimeError, match=message):
        handle.send(2)
    with pytest.raises(RuntimeError, match=message):
        handle.receive(timeout=1)
    with pytest.raises(RuntimeError, match=message):
        next(handle)
    assert channel.drain() == [1]
    assert_at_rest(channel)


async def test_close_in_the_loops_own_thread_does_not_wait() -> None:
    """Closing is allowed anywhere."""
    channel = Channel[int](2)
    with channel.from_thread():
        pass
    await until(lambda: channel.closed)
    assert_at_rest(channel)


ELSEWHERE = (
    r"\Achannel 'c' belongs to another event loop; "
    r"call channel.from_thread\(\) there, and use here what it returns\Z"
)

USES: dict[str, Callable[[Channel[int]], object]] = {
    "send_nowait": lambda channel: channel.send_nowait(1),
    "receive_nowait": Channel.receive_nowait,
    "close": Channel.close,
    "drain": Channel.drain,
    "clone": lambda channel: channel.sender.clone(),
    "select_nowait": select_nowait,
    "from_thread": Channel.from_thread,
}


@pytest.mark.parametrize("use", USES)
async def test_the_channel_itself_is_refused_to_other_threads(use: str) -> None:
    """The error tells what to do instead."""
    channel = Channel[int](1, "c")
    channel.from_thread()
    with pytest.raises(RuntimeError, match=ELSEWHERE):
        await Job(USES[use], channel)
    assert not channel.closed
    assert_at_rest(channel)
    channel.sender.close()


async def use_waiting(name: str, channel: Channel[int]) -> object:
    """Use a channel in ways that may wait."""
    if name == "send":
        return await channel.send(1)
    if name == "receive":
        return await channel.receive()
    if name == "select":
        return await select(channel)
    return USES[name](channel)


@pytest.mark.parametrize("use", ["send", "receive", "select", *USES])
@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_the_channel_itself_is_refused_to_other_loops(use: str, other: str) -> None:
    """A loop in another thread is told to use from_thread, too."""
    channel = Channel[int](1, "c")
    channel.from_thread()
    with pytest.raises(RuntimeError, match=ELSEWHERE):
        await Job(anyio.run, use_waiting, use, channel, backend=other)
    assert_at_rest(channel)
    channel.close()
    channel.sender.close()


def test_from_thread_needs_a_loop() -> None:
    """There must be an event loop for threads to reach."""
    with pytest.raises(RuntimeError, match=r"\Achannel 'c' was used outside of asyncio and trio\Z"):
        Channel[int](name="c").from_thread()


async def test_what_counts_the_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is called in each forked process, where nothing else can be asked of it."""
    handle = Channel[int](1, "c").from_thread()
    monkeypatch.setattr(_threads.Process, "forks", _threads.Process.forks)
    _threads.Process.forked()
    message = "<ThreadChannel of channel 'c'> was made before a fork: its event loop runs in the parent process only"
    for call in handle.close, handle.receive, partial(handle.send, 1):
        with pytest.raises(RuntimeError, match=whole(message)):
            call()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no forks")
@pytest.mark.parametrize("call", ["send", "receive", "next", "close"])
async def test_regression_a_forked_process_is_refused(call: str) -> None:
    """Nobody would ever serve it there."""
    channel = Channel[int](1, "c")
    handle = channel.from_thread()
    calls: dict[str, Callable[[], object]] = {
        "send": lambda: handle.send(1),
        "receive": lambda: handle.receive(1),
        "next": lambda: next(handle),
        "close": handle.close,
    }
    with warnings.catch_warnings():
        # Python warns of forks beside threads, which is what this is about.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if not child:
        status = 1
        try:
            calls[call]()
        except RuntimeError as error:
            message = (
                "<ThreadChannel of channel 'c'> was made before a fork: its event loop runs in the parent process only"
            )
            status = 0 if str(error) == message else 2
        finally:
            os._exit(status)
    _, status = await Job(os.waitpid, child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    channel.send_nowait(1)
    assert await Job(handle.receive) == 1
