"""Calls that go together: those that come while one is on its way wait, and are the next one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from chanflow._loop._home import running_home
from chanflow._loop._signal import Signal

__all__ = ["Gather"]

T = TypeVar("T")
R = TypeVar("R")


class Part(Generic[T, R]):
    """One caller's share of a call."""

    __slots__ = ("done", "error", "item", "value")

    def __init__(self, item: T) -> None:
        self.item = item
        self.done = False
        self.error: Exception | None = None
        self.value: R


class Gather(Generic[T, R]):
    """Makes one call of many.

    Args:
        call: takes items, and gives something for each. It must be safe to repeat, for if its caller is cancelled, the
            others make the call again.
        most: the most items in one call.
    """

    def __init__(self, call: Callable[[Sequence[T]], Awaitable[list[R]]], most: int) -> None:
        self._call = call
        self._most = most
        self._waiting: list[Part[T, R]] = []
        self._calling = False
        self._over = Signal()

    async def __call__(self, item: T) -> R:
        """Make the call, alone or with others.

        Raises:
            Exception: what the call raised, for each of those who made it.

        Cancellation:
            The call may have been made.
        """
        part: Part[T, R] = Part(item)
        self._waiting.append(part)
        try:
            while not part.done:
                if self._calling:
                    await self._over.wait(running_home())
                else:
                    await self._call_all()
        finally:
            if not part.done and part in self._waiting:
                self._waiting.remove(part)
        if part.error is not None:
            raise part.error
        return part.value

    async def _call_all(self) -> None:
        parts, self._waiting = self._waiting[: self._most], self._waiting[self._most :]
        self._calling = True
        try:
            values = await self._call([part.item for part in parts])
            for part, value in zip(parts, values, strict=True):
                part.value, part.done = value, True
        except Exception as error:  # noqa: BLE001 -- goes to whoever waits
            for part in parts:
                part.error, part.done = error, True
        finally:
            self._waiting[:0] = [part for part in parts if not part.done]
            self._calling = False
            self._over.send_all()
