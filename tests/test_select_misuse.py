"""Wrong arguments to `select`, and selects outside of the event loop that they belong to."""

from __future__ import annotations

import threading
from functools import partial
from typing import Any

import anyio
import pytest
from anyio import WouldBlock, wait_all_tasks_blocked

from chanflow import Channel, Send, select, select_nowait
from tests.support.channels import assert_at_rest
from tests.support.messages import whole
from tests.support.operations import keep

pytestmark = pytest.mark.anyio


async def test_wrong_argument() -> None:
    """What is not a case is refused with its place, the rule and what it is."""
    channel = Channel[int](0, "x")
    rule = "must be a Channel, ReceiveChannel, Send, Result, timer or None, got"
    wrong: Any
    for wrong in (3, "channel", channel.sender, [channel]):
        with pytest.raises(TypeError, match=whole(f"case 1 {rule} {wrong!r}")):
            await select(channel, wrong)
        with pytest.raises(TypeError, match=whole(f"case 0 {rule} {wrong!r}")):
            select_nowait(wrong)
    assert repr(Send(channel, 5)) == f"Send(channel={channel!r}, item=5)"
    with pytest.raises(TypeError, match=whole("channel must be a Channel or SendChannel, got 5")):
        Send(5, 1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=whole(f"channel must be a Channel or SendChannel, got {channel.receiver!r}")):
        Send(channel.receiver, 1)  # type: ignore[arg-type]
    channel.sender.close()
    channel.receiver.close()
    assert_at_rest(channel)


async def test_attribute_error_inside_of_a_case_is_not_hidden() -> None:
    """An AttributeError from within a case is not taken for a wrong argument."""

    class Faulty:
        def _try(self, _home: Any) -> bool:
            msg = "from within"
            raise AttributeError(msg)

    faulty: Any = Faulty()
    with pytest.raises(AttributeError, match=whole("from within")):
        await select(faulty)


def test_outside_of_an_event_loop() -> None:
    """`select` needs an event loop; `select_nowait` works without one, as the channel's own `_nowait` calls do."""
    channel = Channel[int](1)
    with pytest.raises(RuntimeError, match=whole("select was used outside of asyncio and trio")):
        select(channel).send(None)
    assert select_nowait(Send(channel, 1), priority=True) == (0, channel, None, False)
    assert select_nowait(channel) == (0, channel, 1, False)
    assert_at_rest(channel)


@pytest.mark.parametrize("other", ["asyncio", "trio"])
async def test_channel_of_another_loop(other: str) -> None:
    """A channel that belongs to an event loop is refused in another, in either direction."""
    channel = Channel[int](0, "home")
    message = (
        "channel 'home' belongs to another event loop; call channel.from_thread() there, and use here what it returns"
    )
    kept: list[Any] = []

    async def elsewhere() -> None:
        await keep(kept, lambda: select(channel))
        await keep(kept, lambda: select(Send(channel, 1)))
        for operation in (select_nowait, partial(select_nowait, priority=True)):
            with pytest.raises(RuntimeError, match=whole(message)):
                operation(channel)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(channel.receive)
        await wait_all_tasks_blocked()
        thread = threading.Thread(target=lambda: anyio.run(elsewhere, backend=other))
        thread.start()
        thread.join()
        channel.send_nowait(1)
    assert [(type(error), str(error)) for error in kept] == [(RuntimeError, message)] * 2
    assert_at_rest(channel)


async def test_coroutine_closed_while_waiting() -> None:
    """A select whose coroutine is closed by hand waits nowhere any more, so nothing is handed to it."""
    inbox, outbox = Channel[int](), Channel[int]()
    coroutine = select(inbox, Send(outbox, 1))
    coroutine.send(None)
    assert (inbox.statistics().tasks_waiting_receive, outbox.statistics().tasks_waiting_send) == (1, 1)
    coroutine.close()
    with pytest.raises(WouldBlock):
        inbox.send_nowait(1)
    with pytest.raises(WouldBlock):
        outbox.receive_nowait()
    assert_at_rest(inbox)
    assert_at_rest(outbox)


@pytest.mark.parametrize("where", ["asyncio", "trio"])
def test_abandoned_with_its_loop(where: str) -> None:
    """What is left of a select whose event loop has ended goes away silently, and the channel serves another."""
    channel = Channel[int]()
    left: list[Any] = []

    async def abandon() -> None:
        left.append(select(channel))
        left[0].send(None)

    async def use() -> None:
        with pytest.raises(WouldBlock):
            channel.send_nowait(1)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(channel.send, 2)
            assert (await select(channel)).item == 2

    anyio.run(abandon, backend=where)
    left.pop().close()
    for backend in ("asyncio", "trio"):
        anyio.run(use, backend=backend)
    assert_at_rest(channel)


async def test_waiting_makes_the_channel_at_home() -> None:
    """A channel belongs to the event loop in which a select first waited on it, for either direction."""
    inbox, outbox = Channel[int](0, "in"), Channel[int](0, "out")
    with anyio.move_on_after(1):
        await select(inbox, Send(outbox, 1))
    kept: list[Any] = []

    async def elsewhere() -> None:
        await keep(kept, inbox.receive)
        await keep(kept, lambda: outbox.send(1))

    thread = threading.Thread(target=lambda: anyio.run(elsewhere))
    thread.start()
    thread.join()
    rest = "belongs to another event loop; call channel.from_thread() there, and use here what it returns"
    assert list(map(str, kept)) == [f"channel 'in' {rest}", f"channel 'out' {rest}"]
    assert_at_rest(inbox)
    assert_at_rest(outbox)
