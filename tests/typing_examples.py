"""What the type checkers infer for users' programs; checked by mypy and pyright, and never run."""

# pyright: strict, reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Awaitable
from functools import partial
from typing import Any, Literal, assert_type

from chanflow import (
    Case,
    Channel,
    DeadLetter,
    Group,
    ReceiveChannel,
    Result,
    Retry,
    Send,
    SendChannel,
    Ticker,
    WorkerGroup,
    after,
    select,
    select_nowait,
)
from chanflow.bus import Bus, Message
from chanflow.tasks import Progress, ProgressReport, TaskService

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


# Groups, tasks and messages: the result is that of the function.


async def groups(page: int) -> None:
    async with Group(limit=2) as group:
        result = group.go(render, page)
        assert_type(result, Result[str])
        assert_type(await result, str)
        assert_type(group.go(partial(render_with, title="a"), page), Result[str])
        assert_type(group.go(Renderer(), page), Result[str])
        group.go(render, "1")  # type: ignore[arg-type]
        group.go(render)  # type: ignore[arg-type]
        group.go(render_in_thread, page)  # type: ignore[arg-type]


async def tasks(service: TaskService) -> None:
    @service.task
    async def report(customer: int, progress: Progress) -> dict[str, int]:
        await progress.update(1, 2)
        return {"customer": customer}

    @service.task(retry=Retry(3), timeout=1.0)
    def price(item: str) -> int:
        return len(item)

    assert_type(price("a"), int)
    price(1)  # type: ignore[arg-type]
    assert_type(await service.submit(report, customer=42), str)
    assert_type(await report(42, Progress(service_report)), dict[str, int])


async def service_report(report: ProgressReport) -> None:
    assert report


async def messages(bus: Bus) -> None:
    async def handle(message: Message) -> None:
        assert_type(message.body, bytes)

    def handle_in_thread(message: Message) -> str:
        return message.id

    def mistaken(message: str) -> None:
        assert message

    await bus.consume("orders", handle, group="billing")
    await bus.consume("orders", handle_in_thread, group="billing", workers=3)
    await bus.consume("orders", partial(handle), group="billing")
    await bus.consume("orders", mistaken, group="billing")  # type: ignore[arg-type]


# Select: the index tells the type of the item, which is None when the channel is closed.


async def narrowing_by_index(numbers: Channel[int], words: ReceiveChannel[str], result: Result[bytes]) -> None:
    case = await select(numbers, words, result)
    if case.index == 0:
        assert_type(case, Case[int, Literal[0]])
        assert_type(case.item, int | None)
    elif case.index == 1:
        assert_type(case.item, str | None)
    else:
        assert_type(case.index, Literal[2])
        assert_type(case.item, bytes | None)


async def narrowing_to_an_item(numbers: Channel[int], words: Channel[str]) -> None:
    case = await select(numbers, words)
    if case.index == 0 and case.item is not None:
        assert_type(case.item + 1, int)
    elif case.index == 1 and case.item is not None:
        assert_type(case.item.upper(), str)
    else:
        assert_type(case.closed, bool)
    if case.closed:
        return
    if case.index == 0:
        assert case.item is not None
        assert_type(case.item, int)


async def every_kind_of_case(out: SendChannel[str], tick: Ticker, done: Channel[None], *, quiet: bool) -> None:
    case = await select(Send(out, "a"), None if quiet else tick, after(1.0), done, None, priority=True)
    if case.index == 0:
        assert_type(case.item, None)
    elif case.index == 1 or case.index == 2:  # noqa: PLR1714 -- mypy narrows by comparisons only
        assert_type(case.item, float | None)
    else:
        assert_type(case.item, None)


def six_cases(a: Channel[int], b: Channel[str], c: Channel[bytes]) -> None:
    case = select_nowait(a, b, c, a, b, c)
    if case.index == 5:
        assert_type(case.item, bytes | None)
    elif case.index == 4:
        assert_type(case.item, str | None)
    elif case.index == 3:
        assert_type(case.item, int | None)
    elif case.index == 2:
        assert_type(case.item, bytes | None)
    elif case.index == 1:
        assert_type(case.item, str | None)
    else:
        assert_type(case, Case[int, Literal[0]])


def any_number_of_cases(inputs: list[Channel[int]], cases: list[Channel[int] | Send[int] | None]) -> None:
    case = select_nowait(*inputs)
    assert_type(case, Case[int])
    assert_type(case.index, int)
    if case.index == 0:
        assert_type(case.item, int | None)
    assert_type(select_nowait(inputs[0], *inputs), Case[int])
    assert_type(select_nowait(*cases).item, int | None)


async def annotated_cases(numbers: Channel[int], words: Channel[str]) -> None:
    def length(case: Case[str]) -> int:
        return 0 if case.item is None else len(case.item)

    def show(case: Case[int | str]) -> str:
        return str(case.item)

    length(await select(words))
    length(await select(words, words))
    case = await select(numbers, words)
    show(case)
    length(case)  # type: ignore[arg-type]
    if case.index == 1:
        length(case)
    seen: list[Case[int | str]] = [case, await select(numbers), select_nowait(words)]
    show(seen[0])


def mistaken_cases(numbers: Channel[int], text: str) -> None:
    case = select_nowait(numbers, Send(numbers, 1))
    if case.index == 0:
        case.item + 1  # type: ignore[operator] # it may be None
    select_nowait(numbers, text)  # type: ignore[call-overload]
