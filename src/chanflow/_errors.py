"""Errors that more than one room raises."""

from __future__ import annotations

__all__ = ["StorageError"]


class StorageError(Exception):
    """The storage for messages or tasks can't be reached, is full or damaged, or has the wrong format.

    The underlying error, if any, is its `__cause__`.
    """
