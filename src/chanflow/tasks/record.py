"""What is known of a task, and what may become of it."""

# Invariants:
# 1. A task is pending, or running, or at its end: success, failed or cancelled. An end is for good.
# 2. Pending goes to running, when a worker claims it, or to cancelled. Running goes to an end, or back to pending: for
#    the next attempt, or when its worker gives it back or is gone.
# 3. Only the worker that has the lease changes a running task, apart from asking for its cancellation.

from __future__ import annotations

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
    "expired",
    "finish",
    "looked_for_at",
    "put_back",
    "renew",
    "report",
    "requeue",
    "revive",
]


ENCODED = {"arguments", "result"}


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
    queued_at: float
    """When a worker was last told of it."""
    started_at: float | None = None
    """When its last attempt began."""
    finished_at: float | None = None
    expires_at: float | None = None
    """When a finished task is forgotten."""
    idempotency_key: str | None = None
    worker: str | None = None
    """Who has it, while it runs."""
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
    """Let a worker begin an attempt: of a pending task that is due, or one whose worker is gone."""
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
) -> TaskRecord | None:
    """End a running task; the error is the name of its class, and its message."""
    return end(record, status, now, ttl, result=result, error=error) if has(record, worker) else None


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
        expires_at=now + ttl,
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
        queued_at=run_at,
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
        queued_at=now,
        started_at=None,
        finished_at=None,
        expires_at=None,
        cancel_requested=False,
    )


def requeue(record: TaskRecord, *, now: float, since: float) -> TaskRecord | None:
    """Note that workers are told once more of a task that nobody has come to since then."""
    if record.status.is_end or looked_for_at(record) > since:
        return None
    return replace(record, queued_at=now)


def looked_for_at(record: TaskRecord) -> float:
    """Tell from when on somebody should have come to a task that is not at its end."""
    return max(record.run_at, record.queued_at, record.lease_until or 0.0)


def expired(record: TaskRecord, now: float) -> bool:
    """Tell whether a task is to be forgotten."""
    return record.expires_at is not None and record.expires_at <= now
