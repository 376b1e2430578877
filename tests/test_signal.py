"""The wake-up call that those share who wait for the same thing."""

from __future__ import annotations

import asyncio

import pytest
from anyio import CancelScope, create_task_group, current_time, fail_after, sleep, wait_all_tasks_blocked

from chanflow._loop._home import running_home
from chanflow._loop._signal import Signal

pytestmark = pytest.mark.anyio


async def test_one_is_woken_in_the_order_of_waiting() -> None:
    """Each call wakes one, the first to wait first."""
    signal, woken = Signal(), list[int]()

    async def wait(number: int) -> None:
        await signal.wait(running_home())
        woken.append(number)

    async with create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(wait, number)
            await wait_all_tasks_blocked()
        for number in range(3):
            assert woken == list(range(number))
            signal.send()
            await wait_all_tasks_blocked()
    assert woken == [0, 1, 2]


async def test_calls_are_kept_but_do_not_pile_up() -> None:
    """A call that finds nobody is for whoever comes next, and several are one."""
    signal, home = Signal(), running_home()
    signal.send()
    signal.send()
    with fail_after(1.0):
        await signal.wait(home)
    before = current_time()
    await signal.wait(home, before + 5.0)
    assert current_time() - before == pytest.approx(5.0)


async def test_all_are_woken_and_nothing_is_kept() -> None:
    """A call for all is for those who wait."""
    signal, home = Signal(), running_home()
    async with create_task_group() as tasks:
        for _ in range(3):
            tasks.start_soon(signal.wait, home)
        await wait_all_tasks_blocked()
        signal.send_all()
    before = current_time()
    await signal.wait(home, before + 5.0)
    assert current_time() - before == pytest.approx(5.0)


async def test_whoever_gave_up_is_passed_over() -> None:
    """Neither one that was cancelled nor one whose time was over keeps a call from the next, and none is kept."""
    signal, home, woken = Signal(), running_home(), list[int]()
    scope = CancelScope()

    async def wait_cancelled() -> None:
        with scope:
            await signal.wait(home)

    async def wait(number: int) -> None:
        await signal.wait(home)
        woken.append(number)

    async with create_task_group() as tasks:
        tasks.start_soon(wait_cancelled)
        tasks.start_soon(signal.wait, home, current_time() + 1.0)
        for number in range(4):
            await wait_all_tasks_blocked()
            tasks.start_soon(wait, number)
        scope.cancel()
        await sleep(2.0)
        for _ in range(4):
            signal.send()
        await wait_all_tasks_blocked()
        # trio runs what was woken in one tick in any order.
        assert sorted(woken) == [0, 1, 2, 3]
    assert not signal._waiters


def test_a_call_to_one_that_is_cancelled_in_the_same_moment_reaches_the_next() -> None:
    """Whoever was woken, and is cancelled before it runs, passes the call on."""

    # Neither anyio nor trio cancels a task that was woken.
    async def run() -> None:
        signal, home = Signal(), running_home()
        waiting = [asyncio.create_task(signal.wait(home)) for _ in range(2)]
        await asyncio.sleep(0)
        signal.send()
        waiting[0].cancel()
        await asyncio.wait(waiting, timeout=1.0)
        assert [task.cancelled() for task in waiting] == [True, False]

    asyncio.run(run())
