"""What the type checkers infer for users' programs; checked by mypy and pyright, and never run."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from typing import Any, assert_type

from chanflow import Channel, DeadLetter, Result, Retry, SendChannel, WorkerGroup

# Worker groups: the job and the result come from the handler, whatever kind of callable it is.


async def render(page: int) -> str:
    return f"page {page}"


def render_in_thread(page: int) -> str:
    return f"page {page}"


def render_later(page: int) -> Awaitable[str]:
    return render(page)


async def render_with(page: int, *, title: str = "") -> str:
    return f"{title} {page}"


def render_in_thread_with(page: int, *, title: str = "") -> str:
    return f"{title} {page}"


async def publish(page: int) -> None:
    assert page


def load(page: int) -> Any:
    return page


class Renderer:
    async def __call__(self, page: int) -> str:
        return f"page {page}"

    async def render(self, page: int) -> str:
        return f"page {page}"


class ThreadRenderer:
    def __call__(self, page: int) -> str:
        return f"page {page}"


def handlers() -> None:
    assert_type(WorkerGroup(render), WorkerGroup[int, str])
    assert_type(WorkerGroup(render_in_thread), WorkerGroup[int, str])
    assert_type(WorkerGroup(render_later), WorkerGroup[int, str])
    assert_type(WorkerGroup(render_with), WorkerGroup[int, str])
    assert_type(WorkerGroup(render_in_thread_with), WorkerGroup[int, str])
    assert_type(WorkerGroup(publish), WorkerGroup[int, None])
    assert_type(WorkerGroup(load), WorkerGroup[int, Any])
    assert_type(WorkerGroup(Renderer()), WorkerGroup[int, str])
    assert_type(WorkerGroup(Renderer().render), WorkerGroup[int, str])
    assert_type(WorkerGroup(ThreadRenderer()), WorkerGroup[int, str])


async def partials() -> None:
    # mypy takes any job for a partial, so the group says which it is.
    async_pages: WorkerGroup[int, str] = WorkerGroup(partial(render_with, title="a"))
    assert_type(await (await async_pages.submit(1)), str)
    pages: WorkerGroup[int, str] = WorkerGroup(partial(render_in_thread_with, title="a"))
    assert_type(await (await pages.submit(1)), str)


def lambdas() -> None:
    # Nothing says what a bare lambda takes.
    assert_type(WorkerGroup[int, str](lambda page: str(page + 1)), WorkerGroup[int, str])
    assert_type(WorkerGroup[int, str](lambda page: render(page + 1)), WorkerGroup[int, str])
    annotated: WorkerGroup[int, str] = WorkerGroup(lambda page: str(page + 1))
    assert_type(annotated.submit_nowait(1), Result[str])


def options(dead: Channel[DeadLetter[int]], sender: SendChannel[DeadLetter[int]]) -> None:
    assert_type(
        WorkerGroup(render, workers=4, buffer=100, retry=Retry(3), timeout=1.0, dead_letters=dead),
        WorkerGroup[int, str],
    )
    assert_type(WorkerGroup(render_in_thread, dead_letters=sender, offload="thread"), WorkerGroup[int, str])
    assert_type(WorkerGroup(render, dead_letters=Channel[DeadLetter[int]](10)), WorkerGroup[int, str])
    assert_type(WorkerGroup(lambda page: page + 1, dead_letters=dead), WorkerGroup[int, int])


def mistakes(dead: Channel[DeadLetter[str]]) -> None:
    WorkerGroup(3)  # type: ignore[call-overload]
    WorkerGroup(render, dead_letters=dead)  # type: ignore[arg-type]
    WorkerGroup(render).submit_nowait("1")  # type: ignore[arg-type]


async def jobs(dead: Channel[DeadLetter[int]]) -> None:
    async with WorkerGroup(render, dead_letters=dead) as workers:
        assert_type(workers, WorkerGroup[int, str])
        result = await workers.submit(1)
        assert_type(result, Result[str])
        assert_type(workers.submit_nowait(1), Result[str])
        assert_type(await result, str)
        assert_type(await result.receive(), str)
        async for text in workers.map(range(3)):
            assert_type(text, str)
        async for letter in dead:
            assert_type(letter.job, int)
        assert_type(await workers.shutdown(1.0), list[int])
