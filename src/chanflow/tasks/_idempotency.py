"""Idempotency keys: what they may be, and whether two submissions are one."""

from __future__ import annotations

from chanflow._check import show
from chanflow.tasks._errors import IdempotencyError
from chanflow.tasks.record import TaskRecord

__all__ = ["check_key", "check_same"]

MAX_KEY = 255


def check_key(key: object) -> None:
    """Refuse what an HTTP header couldn't carry as it is, so that a key means the same wherever it comes from.

    Raises:
        TypeError, ValueError: it is no key.
    """
    if not isinstance(key, str):
        msg = f"idempotency_key must be a str or None, got {show(key)}"
        raise TypeError(msg)
    if not 1 <= len(key) <= MAX_KEY or not key.isascii() or not key.isprintable() or key != key.strip():
        msg = (
            f"idempotency_key must be 1 to {MAX_KEY} printable ASCII characters without a space at either end, "
            f"got {key!r}"
        )
        raise ValueError(msg)


def check_same(kept: TaskRecord, record: TaskRecord) -> None:
    """Refuse a key that another task has.

    Raises:
        IdempotencyError: the tasks are not the same.
    """
    if None in {kept.fingerprint, record.fingerprint}:
        same = kept.arguments == record.arguments
    else:
        same = kept.fingerprint == record.fingerprint
    if kept.name != record.name or not same:
        msg = f"idempotency key {kept.idempotency_key!r} was used for another task: {kept.name} {kept.id}"
        raise IdempotencyError(msg)
