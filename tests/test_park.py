"""Checkpoints, and what an event loop's home is."""

from __future__ import annotations

import asyncio
import gc
import math
import types
import weakref
from collections.abc import Iterator
from typing import Any

import anyio
import pytest
import trio
from anyio import wait_all_tasks_blocked

from chanflow import Channel, Group, WorkerGroup, after, select, set_checkpoint_interval
from chanflow._loop._home import NOWHERE, current_home, reach_run
from tests.support.channels import assert_at_rest

pytestmark = pytest.mark.anyio

SEVEN = {"asyncio": {7}, "trio": {6, 7, 8}}


@pytest.fixture
def every_operation() -> Iterator[None]:
    """Make every operation a checkpoint."""
    set_checkpoint_interval(1)
    yield
    set_checkpoint_interval()


async def passes_while(operation: Any) -> int:
    """Count how often the event loop goes round during an operation."""
    passes = 0

    async def count() -> None:
        nonlocal passes
        while True:
            await anyio.lowlevel.checkpoint()
            passes += 1

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(count)
        # A task of its own, so that the budget is fresh and the counter runs.
        await anyio.lowlevel.checkpoint()
        home = current_home()
        assert home is not None
        set_checkpoint_interval()
        before = passes
        await operation()
        after = passes
        tasks.cancel_scope.cancel()
    return after - before  # pyright: ignore[reportOperatorIssue] # bound in the block


async def test_operations_that_need_not_wait_yield_every_128th_time(backend: str) -> None:
    """1,000 buffered sends and as many receives make 7 trips through the event loop each."""
    channel = Channel[int](math.inf)

    async def send() -> None:
        for item in range(1000):
            await channel.send(item)

    async def receive() -> None:
        for _ in range(1000):
            await channel.receive()

    # trio runs the counting task before or after the other one, as it pleases.
    assert await passes_while(send) in SEVEN[backend]
    assert await passes_while(receive) in SEVEN[backend]
    await channel.send_many(range(1000))
    assert await passes_while(lambda: drain(channel, 1000)) in SEVEN[backend]
    assert_at_rest(channel)


async def drain(channel: Channel[int], count: int) -> None:
    async for _ in channel:
        count -= 1
        if not count:
            return


async def test_results_yield_too(backend: str) -> None:
    """Awaiting results that are done lets others run as well."""
    async with Group() as group:
        results = [group.go(anyio.lowlevel.checkpoint) for _ in range(1000)]
        for result in results:
            await result

        async def again() -> None:
            for result in results:
                await result

        assert await passes_while(again) in SEVEN[backend]


@pytest.mark.usefixtures("every_operation")
async def test_every_operation_a_checkpoint() -> None:
    """With an interval of 1, each operation is a checkpoint, before which nothing has happened."""
    channel = Channel[int](1)
    with anyio.CancelScope() as scope:
        scope.cancel()
        await channel.send(1)
    assert scope.cancelled_caught
    channel.send_nowait(1)
    for operation in (channel.receive, lambda: channel.receive_many(1), channel.__anext__):
        with anyio.CancelScope() as scope:
            scope.cancel()
            await operation()
        assert scope.cancelled_caught
    with anyio.CancelScope() as scope:
        scope.cancel()
        await channel.send_many([2])
    assert scope.cancelled_caught
    assert channel.drain() == [1]
    async with Group() as group:
        result = group.go(anyio.lowlevel.checkpoint)
        await result
        with anyio.CancelScope() as scope:
            scope.cancel()
            await result
        assert scope.cancelled_caught


@pytest.mark.parametrize(
    ("operations", "error", "message"),
    [
        (0, ValueError, "operations must be >= 1, got 0"),
        (1.5, TypeError, "operations must be an int, got 1.5"),
        (True, TypeError, "operations must be an int, got True"),
    ],
)
def test_bad_interval(operations: Any, error: type[Exception], message: str) -> None:
    """A bad interval is refused by name."""
    with pytest.raises(error) as caught:
        set_checkpoint_interval(operations)
    assert str(caught.value) == message


async def test_home_knows_where_it_is(backend: str) -> None:
    """There is one home for each running loop; it knows its clock, and when it is over."""
    home = current_home()
    assert home is not None
    assert home is current_home()
    assert home.here()
    assert not home.ended()
    assert home.time() == pytest.approx(anyio.current_time())

    def elsewhere() -> None:
        assert current_home() is None
        assert not home.here()

    await anyio.to_thread.run_sync(elsewhere)

    done: list[str] = []
    home.call_soon(lambda: done.append("called"))
    await wait_all_tasks_blocked()
    assert done == ["called"]


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_home_of_a_loop_that_is_over(backend: str) -> None:
    """A home tells that its loop has ended, refuses calls to it, and gave notice of the end."""
    notices: list[str] = []

    async def main() -> Any:
        home = current_home()
        assert home is not None
        home.on_end(lambda: notices.append("withdrawn"))()
        return home, home.on_end(lambda: notices.append("end"))

    home, withdraw = anyio.run(main, backend=backend)
    assert notices == ["end"]
    withdraw()
    assert notices == ["end"]
    assert home.ended()
    assert not home.here()
    with pytest.raises(RuntimeError):
        home.call_soon(lambda: None)


def test_nowhere() -> None:
    """A channel that nobody waited on is at home nowhere."""
    assert Channel[int]()._state.home is NOWHERE
    assert not NOWHERE.here()
    assert NOWHERE.ended()
    assert current_home() is None


def test_loops_are_not_kept() -> None:
    """At most the last loop of a thread is remembered."""
    loops: list[Any] = []

    async def main() -> None:
        loops.append(weakref.ref(asyncio.get_running_loop()))
        channel = Channel[int](1)
        with anyio.move_on_after(0):
            await channel.receive()

    for _ in range(5):
        asyncio.run(main())
    gc.collect()
    assert sum(loop() is not None for loop in loops) <= 1


def test_trio_as_a_guest_of_asyncio() -> None:
    """Where trio runs inside an asyncio loop, a trio task's home is trio."""

    async def trio_main() -> str:
        channel = Channel[int]()
        async with Group() as group:
            group.go(channel.send, 1)
            assert await channel.receive() == 1
        home = current_home()
        assert home is not None
        return type(home).__name__

    async def asyncio_main() -> Any:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[Any] = loop.create_future()
        channel = Channel[int](1)
        await channel.send(1)
        trio.lowlevel.start_guest_run(
            trio_main,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=done.set_result,
        )
        outcome = await done
        assert await channel.receive() == 1
        return outcome.unwrap()

    assert asyncio.run(asyncio_main()) == "TrioHome"


def test_tasks_of_asyncio_beside_a_guest() -> None:
    """Both run in one thread; each task is at home in its own loop, and refused in the other's channels."""
    refused: list[str] = []

    async def pass_on(channel: Channel[int], other: list[Channel[int]]) -> int:
        async with Group() as group:
            group.go(channel.send, 1)
            received = await channel.receive()
        case = await select(channel, after(0.01))
        assert case.index == 1
        async with WorkerGroup(anyio.sleep) as workers:
            await workers.submit_nowait(0)
        while not other:  # noqa: ASYNC110 -- the other loop can't tell this one
            await anyio.sleep(0.01)
        with pytest.raises(RuntimeError) as caught:
            await other[0].send(1)
        refused.append(str(caught.value))
        return received

    async def trio_main() -> int:
        channel = Channel[int](name="trio's")
        of_trio.append(channel)
        received = await pass_on(channel, of_asyncio)
        while len(refused) < 2:  # noqa: ASYNC110 -- as above
            await anyio.sleep(0.01)
        return received

    async def asyncio_main() -> Any:
        loop = asyncio.get_running_loop()
        # One home is older than the guest, the other is not.
        channel = Channel[int](name="asyncio's")
        with anyio.move_on_after(0):
            await channel.receive()
        done: asyncio.Future[Any] = loop.create_future()
        trio.lowlevel.start_guest_run(
            trio_main,
            run_sync_soon_threadsafe=loop.call_soon_threadsafe,
            done_callback=done.set_result,
        )
        await asyncio.sleep(0.01)
        of_asyncio.append(channel)
        received = await pass_on(channel, of_trio)
        return received, (await done).unwrap()

    of_asyncio: list[Channel[int]] = []
    of_trio: list[Channel[int]] = []
    assert asyncio.run(asyncio_main()) == (1, 1)
    assert sorted(error.partition(";")[0] for error in refused) == [
        """channel "asyncio's" belongs to another event loop""",
        """channel "trio's" belongs to another event loop""",
    ]


def test_two_loops_in_turns() -> None:
    """Each loop keeps its home, whichever ran last in the thread."""
    loops = [asyncio.new_event_loop(), asyncio.new_event_loop()]

    async def look() -> Any:
        return current_home()

    first, second = (loop.run_until_complete(look()) for loop in loops)
    assert first is not second
    assert loops[0].run_until_complete(look()) is first
    assert loops[1].run_until_complete(look()) is second
    for loop in loops:
        loop.close()


def test_a_loop_with_futures_of_its_own() -> None:
    """A loop that makes its own futures is asked for them."""
    made: list[Any] = []

    class Loop(asyncio.SelectorEventLoop):
        def create_future(self) -> Any:
            made.append(super().create_future())
            return made[-1]

    async def main() -> int:
        channel = Channel[int]()
        async with Group() as group:
            group.go(channel.send, 1)
            made.clear()
            received = await channel.receive()
        assert_at_rest(channel)
        return received

    with asyncio.Runner(loop_factory=Loop) as runner:
        assert runner.run(main()) == 1
    assert made


@pytest.mark.parametrize("hidden", [True, False])
async def test_the_run_of_trio_is_told_from_others(*, hidden: bool, backend: str) -> None:
    """By trio's own thread-local or, where that can't be reached, by its public call."""
    running = reach_run.__wrapped__(types.SimpleNamespace(lowlevel=trio.lowlevel) if hidden else trio)
    assert (running() is None) == (backend == "asyncio")
    assert running() is running()
    assert await anyio.to_thread.run_sync(running) is None
