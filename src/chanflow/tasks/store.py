"""What a store of tasks implements: it keeps records, and carries out each change of one as a single step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TypeAlias

from chanflow.tasks.record import TaskRecord, TaskStatus

__all__ = ["Change", "Store"]

Change: TypeAlias = Callable[[TaskRecord], TaskRecord | None]
"""Gives a task as it is after a change, or None to refuse; it may be called more than once, and has no other effect."""


class Store(ABC):
    """Where the tasks are. What a call returned for is kept, as far as the place is durable."""

    durable: bool
    """Whether what is in it outlives the process."""
    shared: bool
    """Whether other processes may change what is in it."""

    @abstractmethod
    async def open(self) -> None:
        """Get ready.

        Raises:
            StorageError: the place can't be used.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of everything, also when cancelled."""

    @abstractmethod
    async def create(self, record: TaskRecord) -> TaskRecord:
        """Keep a new task, and give it; or give the one that has its idempotency key already."""

    @abstractmethod
    async def get(self, task_id: str, now: float) -> TaskRecord | None:
        """Find a task that has not expired."""

    @abstractmethod
    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        """Change a task in one step, and give it as it is then; None if it is not there, or the change refused."""

    @abstractmethod
    async def page(
        self, now: float, *, status: TaskStatus | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[TaskRecord]:
        """List tasks that have not expired, the newest first.

        Args:
            now: the time.
            status: only those; None for all.
            after: the id of the last one of the page before; None for the first page.
            limit: the most to give.
        """

    @abstractmethod
    async def count(self, now: float) -> dict[TaskStatus, int]:
        """Count the tasks that have not expired, by their status."""

    @abstractmethod
    async def neglected(self, since: float, limit: int) -> Sequence[str]:
        """Find tasks that are not at their end, and that nobody has come to since then; see `looked_for_at`."""

    @abstractmethod
    async def forget(self, now: float) -> None:
        """Let go of what has expired."""
