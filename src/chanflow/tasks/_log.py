"""The task in the log: of chanflow's own lines, and of those that a handler writes."""

from __future__ import annotations

import json
import logging
from contextvars import ContextVar
from datetime import UTC, datetime

from chanflow.tasks.record import TaskRecord

__all__ = ["JsonFormatter", "TaskFilter", "about", "current", "current_task"]

TOLD = ("task_id", "task_name", "token_name")
"""What a line of the log may be about."""

current: ContextVar[TaskRecord | None] = ContextVar("chanflow task", default=None)


def current_task() -> TaskRecord | None:
    """Give the task whose handler this is, as it was when its attempt began; None outside of any handler."""
    return current.get()


def about(record: TaskRecord) -> dict[str, str]:
    """Say of a line of the log which task it is about."""
    return {"task_id": record.id, "task_name": record.name}


class TaskFilter(logging.Filter):
    """Adds `task_id` and `task_name` to the lines that a handler writes: add it to a logging handler."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every line pass."""
        task = current.get()
        if task is not None and not hasattr(record, "task_id"):
            vars(record).update(about(task))
        return True


class JsonFormatter(logging.Formatter):
    """Writes each line of the log as a JSON object, with the task that it is about."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the line."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name in TOLD if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
