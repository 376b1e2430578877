"""Argument checks, with one wording for each rule; and safe representations of any object for messages."""

from __future__ import annotations

import math
import sys
from functools import partial
from reprlib import Repr

__all__ = [
    "check_count",
    "check_number",
    "check_seconds",
    "check_text",
    "message_of",
    "name_of",
    "show",
    "show_error",
    "storable",
]


class Shown(Repr):
    """A `Repr` that represents any object in one short line, even one whose `__repr__` raises."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def show(self, value: object) -> str:
        try:
            return self.repr(value)
        except Exception as error:  # noqa: BLE001 -- for example, an int with too many digits has no repr
            return f"<{type(value).__name__} whose repr raises {type(error).__name__}>"


show = Shown().show


def show_error(error: BaseException) -> str:
    """Return the class and message of an error, as in the last line of a traceback."""
    message = message_of(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def message_of(error: BaseException) -> str:
    """Return the message of an error, even one whose `__str__` raises, as text that can always be encoded."""
    try:
        message = str(error)
    except Exception as broken:  # noqa: BLE001 -- a user's class may raise anything here
        message = f"<its str raises {type(broken).__name__}>"
    return storable(message)


def storable(text: str) -> str:
    """Return a text that can be stored anywhere: a lone surrogate, which a file name may contain, is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def check_text(argument: str, text: str) -> None:
    """Raise ValueError unless a text can be encoded; one with a lone surrogate can't."""
    if storable(text) != text:
        msg = f"{argument} must be text that UTF-8 can encode, got {show(text)}"
        raise ValueError(msg)


def name_of(function: object) -> str:
    """Return the name of a function, looking through partials; for a callable object, the name of its class."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def check_count(argument: str, value: object, least: int, *, infinite: bool = False) -> None:
    """Raise an error that names the argument, the rule and the value, unless the value is an int of at least `least`.

    Args:
        argument: the name to put in the error.
        value: the value to check.
        least: the lower bound.
        infinite: whether `math.inf` is allowed too.
    """
    if infinite and isinstance(value, float) and value == math.inf:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        msg = f"{argument} must be an int{' or math.inf' if infinite else ''}, got {show(value)}"
        raise TypeError(msg)
    if value < least:
        msg = f"{argument} must be >= {least}, got {show(value)}"
        raise ValueError(msg)


def check_number(argument: str, value: object) -> float:
    """Return the value if it is a number that fits a float; otherwise raise an error that names the argument."""
    if not isinstance(value, (int, float)):
        msg = f"{argument} must be a number, got {show(value)}"
        raise TypeError(msg)
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        msg = f"{argument} must be a number that fits a float, got {show(value)}"
        raise ValueError(msg)
    return value


def check_seconds(argument: str, value: object, *, positive: bool = False) -> None:
    """Raise an error that names the argument, the rule and the value, unless the value is a duration in seconds."""
    value = check_number(argument, value)
    if not (value > 0 if positive else value >= 0):
        msg = f"{argument} must be {'>' if positive else '>='} 0, got {show(value)}"
        raise ValueError(msg)
