"""`after` and `ticker`, as cases of `select` and by themselves."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable
from typing import Any

import anyio
import pytest
from anyio import WouldBlock, wait_all_tasks_blocked

from chanflow import Channel, Ticker, after, select, select_nowait, ticker
from tests.support.backends import native
from tests.support.channels import assert_at_rest
from tests.support.messages import whole

pytestmark = pytest.mark.anyio


# after


async def test_after_fires_once_when_due() -> None:
    """`after` happens at its time and gives that time; then it is never ready again."""
    start = anyio.current_time()
    timer = after(2.5)
    case = await select(timer)
    assert (case.index, case.channel, case.closed) == (0, timer, False)
    assert case.item == start + 2.5
    assert anyio.current_time() == pytest.approx(start + 2.5, abs=1e-6)
    with pytest.raises(WouldBlock):
        select_nowait(timer)
    with anyio.move_on_after(1_000) as scope:
        await select(timer)
    assert scope.cancelled_caught


async def test_after_counts_from_its_making() -> None:
    """The time counts from the call of `after`, not from the select."""
    start = anyio.current_time()
    timer = after(5)
    await anyio.sleep(3)
    await select(timer)
    assert anyio.current_time() == pytest.approx(start + 5, abs=1e-6)
    late = after(1)
    await anyio.sleep(10)
    before = anyio.current_time()
    case = await select(late)
    assert anyio.current_time() == before
    assert case.item == pytest.approx(start + 6, abs=1e-6)


async def test_after_bounds_a_loop() -> None:
    """One `after` ends a loop of many selects, however much each of them receives."""
    channel = Channel[int]()
    start = anyio.current_time()
    got = []

    async def producer() -> None:
        for number in range(1_000):
            await anyio.sleep(1)
            await channel.send(number)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(producer)
        timeout = after(10.5)
        while (case := await select(channel, timeout)).channel is channel:
            got.append(case.item)
        tasks.cancel_scope.cancel()
    assert got == list(range(10))
    assert anyio.current_time() == pytest.approx(start + 10.5, abs=1e-6)
    assert_at_rest(channel)


async def test_after_starts_no_task() -> None:
    """Neither a thousand timers, nor a ticker, nor a select that waits for them all start a task."""
    before = len(anyio.get_running_tasks())
    timers = [after(seconds) for seconds in range(1, 1_001)]
    with ticker(5_000.0) as every:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(lambda: select(*timers[500:], every))
            await wait_all_tasks_blocked()
            assert len(anyio.get_running_tasks()) == before + 1
            tasks.cancel_scope.cancel()
    assert (await select(*timers)).index == 0
    assert len(anyio.get_running_tasks()) == before


async def test_earliest_of_several_timers() -> None:
    """A select waits for the earliest of its timers, in whatever order they are given."""
    start = anyio.current_time()
    timers = [after(3), after(1), after(math.inf), after(2)]
    order = [(await select(*timers)).index for _ in range(3)]
    assert order == [1, 3, 0]
    assert anyio.current_time() == pytest.approx(start + 3, abs=1e-6)


async def test_after_zero_is_ready_at_once() -> None:
    """`after(0)` is ready without waiting, once."""
    start = anyio.current_time()
    timer = after(0)
    assert select_nowait(timer) == (0, timer, start, False)
    with pytest.raises(WouldBlock):
        select_nowait(timer)
    assert (await select(after(0.0), None)).item == start


async def test_after_infinity_never_fires() -> None:
    """`after(math.inf)` is never ready, and doesn't hide an earlier timer."""
    with anyio.move_on_after(1e6) as scope:
        await select(after(math.inf))
    assert scope.cancelled_caught
    assert (await select(after(math.inf), after(1))).index == 1


@pytest.mark.parametrize(
    ("seconds", "message"),
    [
        (-1, "seconds must be >= 0, got -1"),
        (-1e-9, "seconds must be >= 0, got -1e-09"),
        (-math.inf, "seconds must be >= 0, got -inf"),
        (math.nan, "seconds must be >= 0, got nan"),
    ],
)
async def test_after_refuses(seconds: float, message: str) -> None:
    """A time that is negative or not a number is refused with the rule and the value."""
    with pytest.raises(ValueError, match=whole(message)):
        after(seconds)


async def test_after_shared_by_two_selects() -> None:
    """Of two selects that wait for the same `after` one gets it; the other goes on waiting for its other cases."""
    channel = Channel[int]()
    timer = after(1)
    kept: list[Any] = []

    async def wait() -> None:
        kept.append(await select(timer, channel))

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(wait)
        await anyio.sleep(5)
        assert [case.channel for case in kept] == [timer]
        await channel.send(7)
    assert kept[1] == (1, channel, 7, False)
    assert_at_rest(channel)


async def test_after_loses_without_being_used_up() -> None:
    """A timer that lost a select, ready or not, is still to happen."""
    channel = Channel[int](2)
    timer = after(1)
    channel.send_nowait(1)
    assert (await select(timer, channel)).item == 1
    await anyio.sleep(2)
    channel.send_nowait(2)
    assert (await select(channel, timer, priority=True)).item == 2
    assert select_nowait(timer).channel is timer
    assert_at_rest(channel)


async def test_hand_over_in_the_tick_of_the_timer() -> None:
    """An item that is sent when the timer has come, but the select has not run, is not lost on it."""
    channel = Channel[int]()
    timer = after(5)
    kept: list[Any] = []
    refused: list[int] = []

    async def wait() -> None:
        kept.append(await select(timer, channel, priority=True))

    async def send() -> None:
        for number in range(20):
            await anyio.sleep(0.5)
            try:
                channel.send_nowait(number)
            except WouldBlock:
                refused.append(number)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wait)
        tasks.start_soon(send)
    # Whichever came first in the tick at 5 s.
    assert len(refused) == 19
    assert kept == [(1, channel, 0, False)]
    assert_at_rest(channel)


@pytest.mark.parametrize("sender_first", [True, False])
async def test_item_and_timer_due_together(*, sender_first: bool) -> None:
    """When a timer and a blocked sender come at the same moment, one of the two happens, and no item is lost."""
    channel = Channel[int]()
    kept: list[Any] = []

    async def wait() -> None:
        kept.append(await select(after(1), channel))
        with anyio.move_on_after(5):
            kept.append((await select(channel)).item)

    async def send() -> None:
        await anyio.sleep(1)
        await channel.send(1)

    async with anyio.create_task_group() as tasks:
        for function in (send, wait) if sender_first else (wait, send):
            tasks.start_soon(function)
            await wait_all_tasks_blocked()
    if kept[0].channel is channel:
        assert kept == [(1, channel, 1, False)]
    else:
        assert kept[1:] == [1]
    assert_at_rest(channel)


async def test_after_says_when_it_is() -> None:
    """The repr of a timer tells its time, and after it happened that there is none."""
    timer = after(0)
    assert repr(timer) == f"<After at {anyio.current_time()}>"
    await select(timer)
    assert repr(timer) == "<After at inf>"
    assert repr(ticker(0.5)) == "<Ticker every 0.5 s>"


# ticker


async def test_ticker_ticks_when_due() -> None:
    """The first tick comes one interval from the making, and each gives the time at which it was due."""
    start = anyio.current_time()
    ticks: list[float] = []
    with ticker(2.0) as every:
        async for due in every:
            ticks.append(due)
            assert anyio.current_time() == pytest.approx(due, abs=1e-6)
            if len(ticks) == 5:
                break
    assert ticks == pytest.approx([start + 2.0 * number for number in range(1, 6)])


async def test_ticker_drops_missed_ticks() -> None:
    """A slow reader gets the latest tick, and then goes on in step with the ticker."""
    start = anyio.current_time()
    with ticker(1.0) as every:
        await anyio.sleep(3.5)
        assert (await select(every)).item == pytest.approx(start + 3)
        assert anyio.current_time() == pytest.approx(start + 3.5, abs=1e-6)
        with pytest.raises(WouldBlock):
            select_nowait(every)
        assert await anext(every) == pytest.approx(start + 4)
        await anyio.sleep(1.5)
        assert await anext(every) == pytest.approx(start + 5)
        assert await anext(every) == pytest.approx(start + 6)


async def test_ticker_beside_a_channel() -> None:
    """A ticker in a select keeps its rhythm however often the other case happens."""
    channel = Channel[int]()
    start = anyio.current_time()
    ticks: list[float] = []
    items: list[int] = []

    async def producer() -> None:
        for number in range(9):
            await anyio.sleep(0.4)
            await channel.send(number)
        channel.close()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(producer)
        with ticker(1.0) as every:
            while not (case := await select(channel, every, priority=True)).closed:
                assert case.item is not None
                if case.index == 0:
                    items.append(case.item)
                else:
                    ticks.append(case.item)
    assert items == list(range(9))
    assert ticks == pytest.approx([start + 1, start + 2, start + 3])
    assert len(every._room) == 0
    assert_at_rest(channel)


async def test_ticker_close_wakes_all() -> None:
    """Closing ends iterations and wakes selects with `closed`; from then on it is always ready so."""
    channel = Channel[int]()
    kept: list[Any] = []
    every = ticker(1_000.0)

    async def iterate() -> None:
        kept.append([due async for due in every])

    async def wait() -> None:
        kept.append(await select(channel, every))

    async with anyio.create_task_group() as tasks:
        for function in (iterate, wait, iterate, wait):
            tasks.start_soon(function)
        await wait_all_tasks_blocked()
        assert len(every._room) == 4
        closed_at = anyio.current_time()
        every.close()
    assert anyio.current_time() - closed_at < 1
    assert sorted(kept, key=str) == [(1, every, None, True)] * 2 + [[]] * 2
    every.close()
    assert await select(every, channel) == (0, every, None, True)
    assert select_nowait(every) == (0, every, None, True)
    with pytest.raises(StopAsyncIteration):
        await anext(every)
    # A tick that nobody took before the closing is gone.
    late = ticker(1.0)
    await anyio.sleep(1.5)
    late.close()
    assert (await select(late)).closed
    assert len(every._room) == 0
    assert_at_rest(channel)


async def test_ticker_is_closed_by_its_block() -> None:
    """Leaving the block closes the ticker, also by an error."""
    with ticker(1.0) as every:
        assert await anext(every)
        assert aiter(every) is every
    assert [due async for due in every] == []
    msg = "from the block"
    with pytest.raises(LookupError, match=whole(msg)), ticker(1.0) as failed:
        raise LookupError(msg)
    assert select_nowait(failed).closed


async def test_ticker_shared_by_two_tasks() -> None:
    """Each tick goes to one of those who wait; who missed it waits for the next."""
    start = anyio.current_time()
    ticks: list[float] = []

    async def iterate() -> None:
        async for due in every:
            ticks.append(due)
            if len(ticks) == 6:
                every.close()

    with ticker(1.0) as every:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(iterate)
            tasks.start_soon(iterate)
    assert ticks == pytest.approx([start + number for number in range(1, 7)])
    assert len(every._room) == 0


async def test_ticker_cancelled() -> None:
    """A cancelled wait for a tick leaves nobody in the ticker's room, and the tick to the next."""
    start = anyio.current_time()
    with ticker(2.0) as every:
        for _ in range(10):
            with anyio.move_on_after(0.1) as scope:
                await anext(every)
            assert scope.cancelled_caught
        assert len(every._room) == 0
        assert await anext(every) == pytest.approx(start + 2)


@pytest.mark.parametrize(
    ("interval", "message"),
    [
        (0, "interval must be > 0 and finite, got 0"),
        (-1.5, "interval must be > 0 and finite, got -1.5"),
        (math.inf, "interval must be > 0 and finite, got inf"),
        (math.nan, "interval must be > 0 and finite, got nan"),
    ],
)
async def test_ticker_refuses(interval: float, message: str) -> None:
    """An interval that is no time between two ticks is refused with the rule and the value."""
    with pytest.raises(ValueError, match=whole(message)):
        ticker(interval)


async def test_ticker_long_run_has_no_drift() -> None:
    """After 10,000 ticks of a tenth of a second the ticker is where it should be."""
    start = anyio.current_time()
    due = start
    with ticker(0.1) as every:
        for _ in range(10_000):
            due = await anext(every)
    assert due == pytest.approx(start + 1_000, abs=1e-6)


# Where they may be used


@pytest.mark.parametrize("make", [after, ticker])
def test_outside_of_an_event_loop(make: Callable[[float], Any]) -> None:
    """A timer needs the clock of an event loop when it is made."""
    with pytest.raises(RuntimeError, match=whole("a timer can only be made inside of asyncio or trio")):
        make(1.0)


@pytest.mark.parametrize("other", ["asyncio", "trio"])
@pytest.mark.parametrize("make", [after, ticker])
async def test_in_another_loop(make: Callable[[float], Any], other: str) -> None:
    """A timer is refused in another event loop than that whose clock it counts on."""
    timer = make(1.0)
    errors: list[str] = []

    async def elsewhere() -> None:
        for operation in (select, select_nowait):
            try:
                result: Any = operation(timer)
                if operation is select:
                    await result
            except RuntimeError as error:
                errors.append(str(error))

    thread = threading.Thread(target=lambda: anyio.run(elsewhere, backend=other))
    thread.start()
    thread.join()
    assert errors == [f"{timer!r} was made in another event loop"] * 2


@native
async def test_waiting_for_a_timer_leaves_no_handle() -> None:
    """A select that did not need its timer cancels it in the event loop."""
    channel = Channel[int]()
    loop: Any = asyncio.get_running_loop()
    never = after(1e6)
    for number in range(1_000):
        task = asyncio.create_task(channel.send(number))
        await select(channel, never)
        await task
    # asyncio sweeps cancelled handles when they are more than 100 and more than half.
    assert len(loop._scheduled) <= 202
    assert all(handle.cancelled() for handle in loop._scheduled)
    assert_at_rest(channel)


@native
async def test_timer_that_comes_just_after_the_hand_over() -> None:
    """A timer that comes in the tick in which a select was handed an item, and before it runs, does nothing."""
    channel = Channel[int]()
    loop = asyncio.get_running_loop()
    errors: list[Any] = []
    loop.set_exception_handler(lambda _loop, context: errors.append(context))
    timer = after(1)
    # It was set before the select's own timer, so it comes first.
    loop.call_at(timer._due, channel.send_nowait, 1)
    assert await select(timer, channel) == (1, channel, 1, False)
    await asyncio.sleep(1)
    assert errors == []
    assert select_nowait(timer).channel is timer
    assert_at_rest(channel)


async def test_times_are_numbers() -> None:
    """What is no number is refused by name."""
    with pytest.raises(TypeError, match=r"^seconds must be a number, got '1'$"):
        after("1")  # type: ignore[arg-type] # that is the point
    with pytest.raises(TypeError, match=r"^interval must be a number, got None$"):
        ticker(None)  # type: ignore[arg-type] # that is the point


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_ticker_is_closed_after_its_event_loop(backend: str) -> None:
    """Nobody is left to wake."""
    tickers: list[Ticker] = []

    async def main() -> None:
        tickers.append(ticker(1))

    anyio.run(main, backend=backend)
    tickers[0].close()
    assert tickers[0]._closed
