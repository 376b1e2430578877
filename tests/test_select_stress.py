"""Thousands of random selects, cancelled at random, with every item accounted for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from random import Random
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import WouldBlock, wait_all_tasks_blocked

from chanflow import Case, Channel, Send, select, select_nowait
from tests.support.backends import native
from tests.support.channels import assert_at_rest

pytestmark = pytest.mark.anyio


class Stress:
    """Random selects over a few channels, cancelled at random, with every item accounted for."""

    OPERATIONS = 10_000
    TOGETHER = 8

    def __init__(self, seed: int) -> None:
        self.dice = Random(seed)
        self.channels = [Channel[int](0), Channel[int](0), Channel[int](1), Channel[int](3)]
        self.sent: list[int] = []
        self.received: list[int] = []
        self.cancelled = 0
        self.number = 0

    def cases(self) -> list[Any]:
        cases: list[Any] = []
        for channel in self.dice.sample(self.channels, self.dice.randint(1, 3)):
            self.number += 1
            cases.append(channel if self.dice.random() < 0.5 else Send(channel, self.number))
        return cases

    def count(self, cases: list[Any], case: Case[int]) -> None:
        chosen = cases[case.index]
        if isinstance(chosen, Send):
            self.sent.append(chosen.item)
        else:
            assert case.item is not None
            self.received.append(case.item)

    async def operate(self) -> None:
        cases = self.cases()
        self.count(cases, await select(*cases))

    def act(self) -> None:
        """Do something that hands an item over, without waiting."""
        cases = self.cases()
        try:
            self.count(cases, select_nowait(*cases))
        except WouldBlock:
            return

    def settle(self) -> None:
        left = [item for channel in self.channels for item in channel.drain()]
        assert len(set(self.sent)) == len(self.sent) > self.OPERATIONS // 10
        assert sorted(self.received + left) == sorted(self.sent)
        assert self.cancelled > self.OPERATIONS // 20
        assert_at_rest(*self.channels)


@pytest.mark.parametrize("seed", [11, 12])
async def test_stress_with_scopes(seed: int) -> None:
    """10,000 selects with scopes cancelled at random conserve every item exactly once."""
    stress = Stress(seed)
    scopes: list[anyio.CancelScope] = []

    async def operate(scope: anyio.CancelScope) -> None:
        with scope:
            await stress.operate()
        stress.cancelled += scope.cancelled_caught
        scopes.remove(scope)

    async with anyio.create_task_group() as tasks:
        for _ in range(stress.OPERATIONS):
            while len(scopes) >= stress.TOGETHER:
                for action in stress.dice.sample([stress.act, stress.dice.choice(scopes).cancel], 2):
                    action()
                await anyio.lowlevel.checkpoint()
            scopes.append(anyio.CancelScope())
            tasks.start_soon(operate, scopes[-1])
        await wait_all_tasks_blocked()
        for scope in scopes:
            scope.cancel()
    stress.settle()


@native
@pytest.mark.parametrize("seed", [21, 22])
async def test_stress_with_native_cancellation(seed: int) -> None:
    """10,000 selects in tasks cancelled natively at random conserve every item exactly once."""
    stress = Stress(seed)
    running: set[asyncio.Task[None]] = set()

    def done(task: asyncio.Task[None]) -> None:
        running.discard(task)
        stress.cancelled += task.cancelled()

    for _ in range(stress.OPERATIONS):
        while len(running) >= stress.TOGETHER:
            victim = stress.dice.choice(sorted(running, key=lambda task: task.get_name()))
            actions: list[Callable[[], object]] = [stress.act, victim.cancel]
            for action in stress.dice.sample(actions, 2):
                action()
            await asyncio.sleep(0)
        task = asyncio.create_task(stress.operate(), name=f"{stress.number:07}")
        task.add_done_callback(done)
        running.add(task)
    await wait_all_tasks_blocked()
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    stress.settle()
