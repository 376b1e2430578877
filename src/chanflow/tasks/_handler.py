"""A registered handler: its arguments by its type hints, and how it is attempted."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar, Union, get_type_hints

import msgspec
from anyio import CapacityLimiter

from chanflow._attempt import Attempt
from chanflow._retry import Retry
from chanflow.tasks.record import ProgressReport

__all__ = ["ArgumentError", "Handler", "Progress", "ResultError"]

P = ParamSpec("P")
R = TypeVar("R")
Report: TypeAlias = Callable[[ProgressReport], Awaitable[None]]

KINDS = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
RESERVED = {"idempotency_key", "delay"}


class ArgumentError(ValueError):
    """A task was submitted with arguments that its handler doesn't take, or that can't be stored."""


class ResultError(TypeError):
    """What a handler returned can't be stored."""


class Progress:
    """What a handler reports its progress with: a parameter with this type gets one."""

    def __init__(self, report: Report) -> None:
        self._report: Report = report

    async def update(self, done: float, total: float = 1.0, message: str = "") -> None:
        """Report how far the task is.

        Args:
            done: how much of it is done, from 0 to `total`.
            total: how much there is, greater than 0.
            message: what is going on.

        Raises:
            ValueError: a number is out of its bounds.
            TypeError: an argument has the wrong type.
            StorageError: the store failed.

        Cancellation:
            It may have been reported nevertheless.
        """
        for argument, value in (("done", done), ("total", total)):
            if not isinstance(value, int | float) or isinstance(value, bool):
                msg = f"{argument} must be a number, got {value!r}"
                raise TypeError(msg)
        if not 0 <= done <= total or not total > 0:
            msg = f"done must be from 0 to total, and total > 0, got {done} of {total}"
            raise ValueError(msg)
        if not isinstance(message, str):
            msg = f"message must be a str, got {message!r}"
            raise TypeError(msg)
        # See the runner's messages of errors.
        await self._report(ProgressReport(done, total, message.encode("utf-8", "backslashreplace").decode()))


class Handler(Generic[P, R]):
    """A function that was registered as a task; it can still be called as before."""

    def __init__(self, fn: Callable[P, R], name: str, retry: Retry, timeout: float | None) -> None:
        self.fn: Callable[P, R] = fn
        self.name: str = name
        self.retry: Retry = retry
        self.timeout: float | None = timeout
        self.__doc__ = fn.__doc__
        self.__wrapped__ = fn
        self._attempt: Attempt
        hints = hints_of(fn)
        self._progress: str | None = None
        fields: list[Any] = []
        for parameter in inspect.signature(fn).parameters.values():
            if parameter.kind not in KINDS:
                bare = parameter.replace(annotation=parameter.empty, default=parameter.empty)
                msg = f"a task takes its arguments by name: {name} can't have {bare}"
                raise TypeError(msg)
            if parameter.name in RESERVED:
                msg = f"{parameter.name} is an argument of submit itself: {name} can't have it"
                raise TypeError(msg)
            hint = hints.get(parameter.name, Any)
            if hint is Progress:
                self._progress = parameter.name
            elif parameter.default is parameter.empty:
                fields.append((parameter.name, hint))
            else:
                # Left to the function.
                fields.append((parameter.name, Union[hint, msgspec.UnsetType], msgspec.UNSET))  # noqa: UP007 -- a hint may be a string
        self.arguments: type[msgspec.Struct] = make_struct(name, fields)
        self._decoder: msgspec.msgpack.Decoder[msgspec.Struct] = msgspec.msgpack.Decoder(self.arguments)
        self._json_decoder: msgspec.json.Decoder[msgspec.Struct] = msgspec.json.Decoder(self.arguments)
        self.returns: Any = hints.get("return", Any)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself."""
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<task {self.name!r}>"

    def encode(self, arguments: Mapping[str, Any]) -> bytes:
        """Check arguments by the type hints, and make of them what is stored.

        Raises:
            ArgumentError: one is missing, unknown, of the wrong type, or can't be stored.
        """
        try:
            encoded = msgspec.msgpack.encode(dict(arguments))
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            msg = f"arguments of {self.name} can't be stored: {error}"
            raise ArgumentError(msg) from error
        self._read(encoded)
        return encoded

    def encode_json(self, body: bytes | bytearray) -> bytes:
        """Check arguments that are a JSON object, and make of them what is stored.

        Raises:
            ArgumentError: one is missing, unknown or of the wrong type.
            ValueError: it is no JSON.
        """
        try:
            decoded = self._json_decoder.decode(body)
        except msgspec.ValidationError as error:
            msg = f"arguments of {self.name}: {error}"
            raise ArgumentError(msg) from error
        return self.encode(given(decoded))

    def _read(self, encoded: bytes) -> msgspec.Struct:
        try:
            return self._decoder.decode(encoded)
        except msgspec.ValidationError as error:
            msg = f"arguments of {self.name}: {error}"
            raise ArgumentError(msg) from error

    def bind(self, limiter: CapacityLimiter) -> None:
        """Get ready to be attempted; the limiter bounds the threads of plain functions."""
        self._attempt = Attempt(self.fn, limiter, self.timeout)

    async def attempt(self, encoded: bytes, report: Report) -> bytes:
        """Call the function with stored arguments, and give its result as it is stored.

        Args:
            encoded: the arguments.
            report: keeps what the function reports.

        Raises:
            ArgumentError: the arguments were stored by another version, and don't fit.
            TimeoutError: it took longer than the timeout.
            ResultError: what it returned can't be stored.
            Exception: what it raised.
        """
        arguments = given(self._read(encoded))
        if self._progress is not None:
            arguments[self._progress] = Progress(report)
        value = await self._attempt(**arguments)
        try:
            return msgspec.msgpack.encode(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            msg = f"the result of {self.name} can't be stored: {error}"
            raise ResultError(msg) from error

    def decode_result(self, encoded: bytes) -> Any:
        """Give a result as the type that the function returns."""
        return msgspec.msgpack.decode(encoded, type=self.returns)


def hints_of(fn: Callable[..., Any]) -> dict[str, Any]:
    """Give the type hints of a function, a partial or an object that can be called."""
    while isinstance(fn, partial):
        fn = fn.func
    return get_type_hints(fn if inspect.isroutine(fn) else type(fn).__call__)


def given(arguments: msgspec.Struct) -> dict[str, Any]:
    """Give the arguments that are not left to the function."""
    names = arguments.__struct_fields__
    return {name: value for name in names if (value := getattr(arguments, name)) is not msgspec.UNSET}


def make_struct(name: str, fields: list[Any]) -> type[msgspec.Struct]:
    """Make what a function's arguments are read as, by their type hints."""
    try:
        struct = msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True)
        msgspec.msgpack.Decoder(struct)
    except TypeError as error:
        msg = f"the type hints of {name} are not for plain data: {error}"
        raise TypeError(msg) from error
    return struct
