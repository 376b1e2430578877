"""What can be wrong with a task that is asked for."""

from __future__ import annotations

from chanflow._check import show
from chanflow.tasks.record import TaskRecord

__all__ = ["IdempotencyError", "TaskCancelledError", "TaskFailedError", "TaskStateError", "UnknownTaskError"]


class UnknownTaskError(LookupError):
    """There is no such task, or no such handler: it never was, or has expired."""


def unknown_cursor(after: str) -> UnknownTaskError:
    """Say of the cursor of a page that its task is not there."""
    return UnknownTaskError(f"after must be the id of a task that is there; {show(after)} has expired, or never was")


class IdempotencyError(ValueError):
    """An idempotency key was used before, for another task or other arguments."""


class TaskStateError(RuntimeError):
    """A task is not in a state in which this can be done."""


class TaskFailedError(Exception):
    """A task failed; `record` tells how. The traceback is in the log of its worker."""

    def __init__(self, record: TaskRecord) -> None:
        super().__init__(f"{record.name} failed: {record.error_type}: {record.error_message}")
        self.record: TaskRecord = record


class TaskCancelledError(Exception):
    """A task was cancelled."""

    def __init__(self, record: TaskRecord) -> None:
        super().__init__(f"{record.name} was cancelled")
        self.record: TaskRecord = record
