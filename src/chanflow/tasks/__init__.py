"""Slow work that is submitted now and asked for later: tasks with an id, a status, progress and a result.

:class:`TaskService` keeps them in memory or in an SQLite file, and runs them in a bounded number of workers.
It needs msgspec: `pip install 'chanflow[tasks]'`.
"""

try:
    import msgspec as _needed  # noqa: F401
except ModuleNotFoundError as _error:
    _message = f"chanflow.tasks needs {_error.name}: pip install 'chanflow[tasks]'"
    raise ModuleNotFoundError(_message, name=_error.name) from None

from chanflow.tasks._doors import TaskService
from chanflow.tasks._errors import (
    IdempotencyError,
    TaskCancelledError,
    TaskFailedError,
    TaskStateError,
    UnknownTaskError,
)
from chanflow.tasks._handler import ArgumentError, Handler, Progress, ResultError
from chanflow.tasks._log import JsonFormatter, TaskFilter, current_task
from chanflow.tasks._statistics import HandlerStatistics, Histogram, TaskStatistics
from chanflow.tasks._token import Token
from chanflow.tasks.record import ProgressReport, TaskRecord, TaskStatus
from chanflow.tasks.store import Change, Claimed, News, Store

__all__ = [
    "ArgumentError",
    "Change",
    "Claimed",
    "Handler",
    "HandlerStatistics",
    "Histogram",
    "IdempotencyError",
    "JsonFormatter",
    "News",
    "Progress",
    "ProgressReport",
    "ResultError",
    "Store",
    "TaskCancelledError",
    "TaskFailedError",
    "TaskFilter",
    "TaskRecord",
    "TaskService",
    "TaskStateError",
    "TaskStatistics",
    "TaskStatus",
    "Token",
    "UnknownTaskError",
    "current_task",
]
