"""Errors that more than one room raises."""

from __future__ import annotations

__all__ = ["StorageError"]


class StorageError(Exception):
    """Where messages or tasks are kept can't be reached, is full or damaged, or is no such place; it has the cause."""
