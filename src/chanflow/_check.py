"""Checks of arguments, with one wording for each rule; and how anybody's objects appear in messages."""

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
    """Represent any object in one short line, even one whose `__repr__` raises."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = 100

    def show(self, value: object) -> str:
        try:
            return self.repr(value)
        except Exception as error:  # noqa: BLE001 -- an int of too many digits, for one, has no repr
            return f"<{type(value).__name__} whose repr raises {type(error).__name__}>"


show = Shown().show


def show_error(error: BaseException) -> str:
    """Represent an error by its class and message."""
    message = message_of(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def message_of(error: BaseException) -> str:
    """Give the message of an error, even of one whose `__str__` raises, as text that can be stored anywhere."""
    try:
        message = str(error)
    except Exception as broken:  # noqa: BLE001 -- what a program's own class raises here is anything
        message = f"<its str raises {type(broken).__name__}>"
    return storable(message)


def storable(text: str) -> str:
    """Give a text as it can be stored anywhere: half of a surrogate pair, which a file's name may have, is escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def check_text(argument: str, text: str) -> None:
    """Refuse a name that can't be stored everywhere: one with half of a surrogate pair."""
    if storable(text) != text:
        msg = f"{argument} must be text that UTF-8 can encode, got {show(text)}"
        raise ValueError(msg)


def name_of(function: object) -> str:
    """Name a function, looking into partials; a callable object is named by its class."""
    while isinstance(function, partial):
        function = function.func
    name = getattr(function, "__qualname__", None)
    return name if isinstance(name, str) else type(function).__qualname__


def check_count(argument: str, value: object, least: int, *, infinite: bool = False) -> None:
    """Refuse what is not a count, naming the argument, the rule and the value."""
    if infinite and isinstance(value, float) and value == math.inf:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        msg = f"{argument} must be an int{' or math.inf' if infinite else ''}, got {show(value)}"
        raise TypeError(msg)
    if value < least:
        msg = f"{argument} must be >= {least}, got {show(value)}"
        raise ValueError(msg)


def check_number(argument: str, value: object) -> float:
    """Refuse what is no number, or too large for a float, and give it."""
    if not isinstance(value, (int, float)):
        msg = f"{argument} must be a number, got {show(value)}"
        raise TypeError(msg)
    if isinstance(value, int) and abs(value) > sys.float_info.max:
        msg = f"{argument} must be a number that fits a float, got {show(value)}"
        raise ValueError(msg)
    return value


def check_seconds(argument: str, value: object, *, positive: bool = False) -> None:
    """Refuse what is not a duration, naming the argument, the rule and the value."""
    value = check_number(argument, value)
    if not (value > 0 if positive else value >= 0):
        msg = f"{argument} must be {'>' if positive else '>='} 0, got {show(value)}"
        raise ValueError(msg)
