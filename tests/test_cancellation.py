"""No item is lost or delivered twice, whatever is cancelled and when.

Programs of random operations run on a real event loop, with cancellations between any two steps, also in the very
tick of a hand-over. On asyncio each runs under anyio's cancel scopes and under native cancellation.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import anyio
import anyio.lowlevel
import pytest
import trio.testing
from anyio import CancelScope, ClosedResourceError, EndOfStream, wait_all_tasks_blocked
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from chanflow import Channel
from tests.support.channels import assert_at_rest
from tests.support.virtual_time import VirtualTimeLoop


class Operation:
    """One task that sends or receives, and what came of it."""

    def __init__(self, channel: Channel[int], kind: str, items: list[int]) -> None:
        self.channel = channel
        self.kind = kind
        self.items = items
        self.left: deque[int] = deque(items)
        self.done = False
        self.cancelled = False
        self.cancel: Callable[[], object] = lambda: None

    async def work(self, received: list[int]) -> None:
        if self.kind == "send":
            await self.channel.send(self.items[0])
            self.left.clear()
        elif self.kind == "send_many":
            await self.channel.send_many(self.left)
        elif self.kind == "receive":
            received.append(await self.channel.receive())
        elif self.kind == "receive_many":
            received += await self.channel.receive_many(len(self.items))
        else:
            received += await self.channel.receive_many(len(self.items), max_wait=1)

    async def run(self, received: list[int]) -> None:
        try:
            await self.work(received)
        except (EndOfStream, ClosedResourceError):
            pass
        except BaseException:
            self.cancelled = True
            raise
        finally:
            self.done = True


class Scopes:
    """Tasks in cancel scopes of anyio."""

    def __init__(self, tasks: anyio.abc.TaskGroup) -> None:
        self.tasks = tasks

    def start(self, operation: Operation, received: list[int]) -> None:
        scope = CancelScope()
        operation.cancel = scope.cancel

        async def main() -> None:
            with scope:
                await operation.run(received)

        self.tasks.start_soon(main)


class Native(Scopes):
    """Bare asyncio tasks."""

    def start(self, operation: Operation, received: list[int]) -> None:
        async def main() -> None:
            try:
                await operation.run(received)
                # A cancellation that came too late arrives here.
                await asyncio.sleep(0)
                await asyncio.sleep(0)
            except asyncio.CancelledError:
                assert task.cancelling() == requests

        requests = 0

        def cancel() -> None:
            nonlocal requests
            requests += task.cancel()

        task = asyncio.get_running_loop().create_task(main())
        operation.cancel = cancel

        async def wait() -> None:
            await asyncio.wait([task])
            if task.cancelled():
                # Before its first step.
                operation.done = True
            else:
                task.result()

        self.tasks.start_soon(wait)


STEPS = st.one_of(
    st.tuples(st.just("send"), st.just(1)),
    st.tuples(st.just("receive"), st.just(1)),
    st.tuples(st.sampled_from(["send_many", "receive_many", "collect"]), st.integers(1, 5)),
    st.tuples(st.just("cancel"), st.integers(0, 20)),
    st.tuples(st.sampled_from(["send_nowait", "receive_nowait", "settle", "tick"]), st.just(1)),
)


async def perform(steps: list[tuple[str, int]], capacity: float, starter: type[Scopes]) -> None:
    """Run a program of operations and account for every item."""
    channel: Channel[int] = Channel(capacity)
    operations: list[Operation] = []
    received: list[int] = []
    delivered: list[int] = []
    count = 0
    async with anyio.create_task_group() as tasks:
        start = starter(tasks).start
        for kind, number in steps:
            if kind == "settle":
                await wait_all_tasks_blocked()
            elif kind == "tick":
                await anyio.lowlevel.checkpoint()
            elif kind == "cancel":
                pending = [operation for operation in operations if not operation.done]
                if pending:
                    pending[number % len(pending)].cancel()
            elif kind == "send_nowait":
                count += 1
                try:
                    channel.send_nowait(count)
                except anyio.WouldBlock:
                    continue
                delivered.append(count)
            elif kind == "receive_nowait":
                try:
                    received.append(channel.receive_nowait())
                except anyio.WouldBlock:
                    continue
            else:
                items = list(range(count + 1, count + 1 + number))
                count += number
                operation = Operation(channel, kind, items)
                operations.append(operation)
                start(operation, received)
        await wait_all_tasks_blocked()
        channel.close()
        await wait_all_tasks_blocked()
    for operation in operations:
        assert operation.done
        if operation.kind.startswith("send"):
            delivered += operation.items[: len(operation.items) - len(operation.left)]
        if operation.kind == "send" and operation.cancelled:
            assert operation.left, "a send that was cancelled delivered its item"
    received += channel.drain()
    assert sorted(received) == sorted(delivered)
    assert_at_rest(channel)


def run_on(kind: str, program: Any, *args: Any) -> None:
    starter = Native if kind == "native" else Scopes
    if kind == "trio":
        options: dict[str, Any] = {"clock": trio.testing.MockClock(autojump_threshold=0)}
        anyio.run(program, *args, starter, backend="trio", backend_options=options)
    else:
        anyio.run(program, *args, starter, backend_options={"loop_factory": VirtualTimeLoop})


@pytest.fixture(params=["anyio", "trio", "native"])
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=st.lists(STEPS, max_size=40), capacity=st.sampled_from([0, 1, 2, 10, math.inf]))
def test_any_program_conserves_items(kind: str, steps: list[tuple[str, int]], capacity: float) -> None:
    """Hypothesis looks for the shortest program that loses or doubles an item."""
    run_on(kind, perform, steps, capacity)


def test_ten_thousand_random_operations(kind: str, capacity: float) -> None:
    """The same with long programs from fixed seeds: 10,000 operations for each kind and capacity."""
    rng = random.Random(271828)
    kinds = ["send", "receive", "send_many", "receive_many", "collect", "cancel", "cancel", "settle", "tick"]
    kinds += ["send_nowait", "receive_nowait"]
    for _ in range(20):
        steps = [(rng.choice(kinds), rng.randrange(1, 6)) for _ in range(500)]
        steps = [(name, 1 if name in {"send", "receive"} else number) for name, number in steps]
        run_on(kind, perform, steps, capacity)
