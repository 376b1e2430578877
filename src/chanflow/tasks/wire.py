"""A task as JSON: for HTTP, for the command line, and back again in the client."""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache
from typing import Any

import msgspec

from chanflow.tasks.record import ProgressReport, TaskRecord, TaskStatus

__all__ = ["KEY_REUSED", "PROBLEM", "TIMES", "from_json", "moment", "plain", "to_json"]

PROBLEM = "urn:chanflow:problem:"
"""What the types of problems begin with."""
KEY_REUSED = f"{PROBLEM}idempotency-key-reused"
SHORT = 1000
"""Characters of an error's message in a list."""
TIMES = ("created_at", "run_at", "started_at", "finished_at", "expires_at")


def to_json(record: TaskRecord, *, whole: bool = True) -> dict[str, Any]:
    """Say what is known of a task in what JSON has.

    Args:
        record: the task.
        whole: whether with its arguments and its result, which may be long, and the whole of an error's message.
    """
    progress = record.progress
    task = {
        "id": record.id,
        "name": record.name,
        "status": record.status.value,
        "attempts": record.attempts,
        "error_type": record.error_type,
        "error_message": record.error_message if whole else record.error_message and record.error_message[:SHORT],
        "progress": progress and {"done": progress.done, "total": progress.total, "message": progress.message},
        "priority": record.priority,
        "idempotency_key": record.idempotency_key,
        "worker": record.worker,
        "cancel_requested": record.cancel_requested,
        **{name: moment(getattr(record, name)) for name in TIMES},
    }
    if whole:
        task["arguments"] = plain(record.decode_arguments())
        task["result"] = plain(record.decode_result())
    return task


def from_json(task: dict[str, Any]) -> TaskRecord:
    """Read what `to_json` said of a task."""
    times: dict[str, Any] = {name: task[name] and datetime.fromisoformat(task[name]).timestamp() for name in TIMES}
    status = TaskStatus(task["status"])
    return TaskRecord(
        id=task["id"],
        name=task["name"],
        status=status,
        attempts=task["attempts"],
        arguments=msgspec.msgpack.encode(task.get("arguments", {})),
        result=msgspec.msgpack.encode(task.get("result")) if status is TaskStatus.SUCCESS else None,
        error_type=task["error_type"],
        error_message=task["error_message"],
        progress=task["progress"] and ProgressReport(**task["progress"]),
        priority=task.get("priority", 0),
        idempotency_key=task["idempotency_key"],
        worker=task["worker"],
        cancel_requested=task["cancel_requested"],
        **times,
    )


def moment(seconds: float | None) -> str | None:
    """Say a time as RFC 3339 does, to the millisecond."""
    if seconds is None:
        return None
    whole, milliseconds = divmod(int(seconds * 1000), 1000)
    return f"{second(whole)}.{milliseconds:03}Z"


@lru_cache(256)
def second(seconds: int) -> str:
    # The times of busy hours have few seconds between them.
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def plain(value: Any) -> Any:
    """Give data as JSON can say it: bytes as base64, and in words what it can't, or is nested too deeply."""
    try:
        return simple(value)
    except RecursionError:
        return "nested too deeply to be shown"


def simple(value: Any) -> Any:
    """Give data of the types that JSON has."""
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): simple(each) for key, each in value.items()}
    if isinstance(value, list):
        return [simple(each) for each in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return msgspec.to_builtins(value, enc_hook=repr)
