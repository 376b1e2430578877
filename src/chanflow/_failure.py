"""What a handler failed with, and what only went through it."""

from __future__ import annotations

from anyio import get_cancelled_exc_class

__all__ = ["is_failure", "message_of"]


def is_failure(error: BaseException) -> bool:
    """Tell whether an error is the handler's own, whatever it is: not a cancellation of its caller, nor Ctrl-C.

    A group is its own if none of those is in it.
    """
    others = (get_cancelled_exc_class(), KeyboardInterrupt, GeneratorExit)
    if isinstance(error, BaseExceptionGroup):
        return error.split(others)[0] is None
    return not isinstance(error, others)


def message_of(error: BaseException) -> str:
    """Give the message of an error, even of one that can't tell it, as text that every store takes."""
    try:
        message = str(error)
    except Exception as broken:  # noqa: BLE001 -- whatever it is, the error is the news
        message = f"its message can't be told: {type(broken).__name__}"
    # No store takes half of a surrogate pair, which a file's name may have.
    return message.encode("utf-8", "backslashreplace").decode()
