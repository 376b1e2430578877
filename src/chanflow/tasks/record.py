"""What is known of a task, and what may become of it."""

# Invariants:
# 1. A task is pending, or running, or at its end: success, failed or cancelled. An end is for good.
# 2. Pending goes to running, when a worker claims it, or to cancelled. Running goes to an end, or back to pending: for
#    the next attempt, or when its worker gives it back or is gone.
# 3. Only the run that has the lease changes a running task, apart from asking for its cancellation. Each claim begins a
#    run with an id of its own, so that a worker that comes back after its lease was lost changes nothing.
# 4. Each change is a function of the record and its arguments alone, so that it may be carried out again if its answer
#    was lost.

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any

from msgspec import Struct, msgpack
from msgspec.structs import asdict, replace

__all__ = [
    "ProgressReport",
    "TaskRecord",
    "TaskStatus",
    "cancel",
    "claim",
    "due_at",
    "expired",
    "finish",
    "publish",
    "put_back",
    "renew",
    "report",
    "revive",
]


ENCODED = {"arguments", "result"}
NEGLECT = 300.0
"""Seconds after which a task that was published to a bus, and that nobody has claimed, is due again."""


class TaskStatus(StrEnum):
    """Where a task is in its life."""

    PENDING = "pending"
    """It waits for a worker, for its delay, or for its next attempt."""
    RUNNING = "running"
    SUCCESS = "success"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_end(self) -> bool:
        """Whether nothing comes after it."""
        return self is not TaskStatus.PENDING and self is not TaskStatus.RUNNING


class ProgressReport(Struct, frozen=True, gc=False):
    """How far a task says that it is."""

    done: float
    total: float
    message: str = ""


class TaskRecord(Struct, frozen=True, kw_only=True, gc=False):
    """A task as its store knows it; times are seconds since the epoch."""

    id: str
    """One of a kind, and not to be guessed."""
    name: str
    status: TaskStatus = TaskStatus.PENDING
    arguments: bytes
    """Encoded; `decode_arguments` gives them as plain data."""
    result: bytes | None = None
    """Encoded; what a task that succeeded gave."""
    error_type: str | None = None
    """The name of the class of the last error; None where there was none."""
    error_message: str | None = None
    attempts: int = 0
    """How often it was begun."""
    progress: ProgressReport | None = None
    """What it last reported."""
    created_at: float
    run_at: float
    """Before which it is not begun: its delay, or the backoff of its next attempt."""
    priority: int = 0
    """Of the tasks that are due, those with a higher one are begun first."""
    published_at: float | None = None
    """When its id was last published to a bus; None where no bus is used."""
    started_at: float | None = None
    """When its last attempt began."""
    finished_at: float | None = None
    expires_at: float | None = None
    """When a finished task is forgotten."""
    idempotency_key: str | None = None
    fingerprint: str | None = None
    """What tells its arguments from others, where it has an idempotency key."""
    worker: str | None = None
    """The id of its run, while it runs."""
    lease_until: float | None = None
    """Until when that one is taken to be alive."""
    cancel_requested: bool = False
    trace: dict[str, str] | None = None
    """Which trace its submission was part of, in OpenTelemetry's headers."""

    def __repr__(self) -> str:
        # Without what may be long, or a secret.
        shown = {name: value for name, value in asdict(self).items() if value is not None and name not in ENCODED}
        return f"TaskRecord({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def decode_arguments(self) -> dict[str, Any]:
        """Give the arguments as plain data."""
        return msgpack.decode(self.arguments, type=dict[str, Any])

    def decode_result(self) -> Any:
        """Give the result as plain data; None where there is none."""
        return None if self.result is None else msgpack.decode(self.result)


# Every change of a task is one of these: they take it as it is, and give it as it is then, or None to refuse. A store
# carries each out as one step.


def claim(record: TaskRecord, *, worker: str, now: float, lease_until: float) -> TaskRecord | None:
    """Begin a run: of a pending task that is due, or one whose worker is gone."""
    gone = record.lease_until is not None and record.lease_until <= now
    if record.status.is_end or record.run_at > now or (record.status is TaskStatus.RUNNING and not gone):
        return None
    if record.cancel_requested:
        # It was asked for while its worker was dying.
        return replace(record, status=TaskStatus.RUNNING, worker=worker, lease_until=lease_until)
    return replace(
        record,
        status=TaskStatus.RUNNING,
        attempts=record.attempts + 1,
        started_at=now,
        worker=worker,
        lease_until=lease_until,
    )


def has(record: TaskRecord, worker: str) -> bool:
    """Tell whether a worker has the task."""
    return record.status is TaskStatus.RUNNING and record.worker == worker


def renew(record: TaskRecord, *, worker: str, lease_until: float) -> TaskRecord | None:
    """Let the lease last longer."""
    return replace(record, lease_until=lease_until) if has(record, worker) else None


def report(record: TaskRecord, *, worker: str, progress: ProgressReport) -> TaskRecord | None:
    """Keep what a running task says of its progress."""
    return replace(record, progress=progress) if has(record, worker) else None


def finish(
    record: TaskRecord,
    *,
    worker: str,
    status: TaskStatus,
    now: float,
    ttl: float,
    result: bytes | None = None,
    error: tuple[str, str] | None = None,
    attempted: bool = True,
) -> TaskRecord | None:
    """End a running task; the error is the name of its class, and its message."""
    if not has(record, worker):
        return None
    attempts = record.attempts if attempted else record.attempts - 1
    return replace(end(record, status, now, ttl, result=result, error=error), attempts=attempts)


def end(
    record: TaskRecord,
    status: TaskStatus,
    now: float,
    ttl: float,
    *,
    result: bytes | None = None,
    error: tuple[str, str] | None = None,
) -> TaskRecord:
    """Put a task at its end."""
    error_type, error_message = error or (None, None)
    return replace(
        record,
        status=status,
        result=result,
        error_type=error_type,
        error_message=error_message,
        finished_at=now,
        # Kept for ever if that is infinite.
        expires_at=now + ttl if ttl < math.inf else None,
        worker=None,
        lease_until=None,
    )


def put_back(
    record: TaskRecord,
    *,
    worker: str,
    run_at: float,
    attempted: bool = True,
    error: tuple[str, str] | None = None,
) -> TaskRecord | None:
    """Let a running task be pending again: after a failed attempt, or because its worker stops."""
    if not has(record, worker):
        return None
    error_type, error_message = error or (record.error_type, record.error_message)
    return replace(
        record,
        status=TaskStatus.PENDING,
        attempts=record.attempts if attempted else record.attempts - 1,
        run_at=run_at,
        published_at=None,
        error_type=error_type,
        error_message=error_message,
        worker=None,
        lease_until=None,
    )


def cancel(record: TaskRecord, *, now: float, ttl: float) -> TaskRecord:
    """End a pending task, ask for it of one that runs, and leave one at its end alone."""
    if record.status is TaskStatus.PENDING:
        return replace(end(record, TaskStatus.CANCELLED, now, ttl), cancel_requested=True)
    return record if record.status.is_end else replace(record, cancel_requested=True)


def revive(record: TaskRecord, *, now: float) -> TaskRecord | None:
    """Let a task that failed or was cancelled be pending again, from its first attempt."""
    if record.status not in {TaskStatus.FAILED, TaskStatus.CANCELLED}:
        return None
    return replace(
        record,
        status=TaskStatus.PENDING,
        error_type=None,
        error_message=None,
        attempts=0,
        progress=None,
        run_at=now,
        published_at=None,
        started_at=None,
        finished_at=None,
        expires_at=None,
        cancel_requested=False,
    )


def publish(record: TaskRecord, *, now: float) -> TaskRecord | None:
    """Note that the id of a task that is due goes to a bus now."""
    due = due_at(record)
    return None if due is None or due > now else replace(record, published_at=now)


def due_at(record: TaskRecord) -> float | None:
    """Tell from when on a worker that looks for tasks may claim this one; None at its end."""
    status = record.status
    if status is TaskStatus.PENDING:
        since = record.run_at
    elif status is TaskStatus.RUNNING:
        # A worker is gone when its lease has run out.
        since = record.lease_until or 0.0
    else:
        return None
    if record.published_at is None or record.published_at < since:
        return since
    # Its message is on its way.
    return record.published_at + NEGLECT


def expired(record: TaskRecord, now: float) -> bool:
    """Tell whether a task is to be forgotten."""
    return record.expires_at is not None and record.expires_at <= now
