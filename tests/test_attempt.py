"""The context of an attempt."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Generator
from contextvars import ContextVar, copy_context
from types import coroutine
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from anyio import CapacityLimiter

from chanflow._work._call import Attempt, enter, follow

pytestmark = pytest.mark.anyio

seen: ContextVar[str] = ContextVar("seen", default="nothing")


@coroutine
def pause() -> Generator[str, Any, Any]:
    return (yield "waiting")


async def test_a_coroutine_goes_from_context_to_context() -> None:
    """It begins in a copy of the current one; what it sets in each stays there."""
    other = copy_context()

    async def steps() -> list[str]:
        heard = [seen.get()]
        seen.set("own")
        await enter(other)
        heard.append(seen.get())
        seen.set("other")
        heard.append(await pause())
        heard.append(seen.get())
        return heard

    driven: Any = follow(steps())
    assert driven.send(None) == "waiting"
    with pytest.raises(StopIteration) as end:
        driven.send("value")
    assert end.value.value == ["nothing", "nothing", "value", "other"]
    assert seen.get() == "nothing"
    assert other[seen] == "other"


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_a_thread_that_takes_too_long(backend: str) -> None:
    """It is told, if it asks."""

    def handler() -> None:
        while True:
            anyio.from_thread.check_cancelled()

    async def main() -> None:
        with pytest.raises(TimeoutError, match=r"^the call took longer than 0.01 s$"):
            await Attempt(handler, CapacityLimiter(1), 0.01)()

    anyio.run(main, backend=backend)


async def test_what_comes_from_outside_reaches_the_handler_in_its_context() -> None:
    """Values, errors and the end of an abandoned attempt come where the handler waits, in its own context."""
    heard: list[object] = []

    async def handler(word: str) -> str:
        seen.set(word)
        try:
            heard.append(await pause())
            await pause()
        except ValueError as error:
            heard.append(error)
            await pause()
        finally:
            heard.append(seen.get())
        return word

    attempt = Attempt(handler, CapacityLimiter(1), None)
    error = ValueError()
    first = attempt("first")
    assert first.send(None) == "waiting"
    assert first.send("value") == "waiting"
    assert first.throw(error) == "waiting"
    with pytest.raises(StopIteration) as end:
        first.send(None)
    assert end.value.value == "first"
    assert heard == ["value", error, "first"]
    second = attempt("second")
    assert second.send(None) == "waiting"
    second.close()
    assert heard[3:] == ["second"]
    assert seen.get() == "nothing"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="inspect.markcoroutinefunction is new in 3.12")
async def test_a_plain_function_that_is_marked_as_async() -> None:
    """What it returns is awaited, in a context of its own, even if it is no coroutine."""

    class Awaitable:
        def __await__(self) -> Generator[Any, Any, str]:
            seen.set("own")
            yield from anyio.lowlevel.checkpoint().__await__()
            return "value"

    def handler() -> Awaitable:
        seen.set("own")
        return Awaitable()

    inspect.markcoroutinefunction(handler)  # type: ignore[attr-defined,unused-ignore]
    assert await Attempt(handler, CapacityLimiter(1), None)() == "value"
    assert seen.get() == "nothing"
