"""A waiter without an event loop."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any


class FakeWaiter:
    """A waiter whose task runs when the test says so."""

    def __init__(self) -> None:
        self.outcome: Any = "pending"

    def __await__(self) -> Generator[Any, Any, Any]:
        yield self
        return self.outcome

    def done(self) -> bool:
        return self.outcome != "pending"

    def cancelled(self) -> bool:
        return self.outcome == "cancelled"

    def cancel(self) -> None:
        self.outcome = "cancelled"

    def result(self) -> Any:
        return self.outcome

    def set_result(self, outcome: Any) -> None:
        assert not self.done(), "woken twice"
        self.outcome = outcome
