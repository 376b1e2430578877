"""A registered handler: its arguments by its type hints, and how it is attempted."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping
from functools import partial
from hashlib import sha256
from typing import Any, Generic, ParamSpec, TypeAlias, TypeVar, Union, cast, get_type_hints

import msgspec
from anyio import CapacityLimiter, from_thread

from chanflow._check import show, storable
from chanflow._work._call import Attempt, is_async
from chanflow._work._retry import Retry
from chanflow.tasks._schema import from_plain, pack, reader, strip
from chanflow.tasks.record import ProgressReport

__all__ = ["MAX_SECONDS", "ArgumentError", "Handler", "Progress", "ResultError", "topic_of"]

P = ParamSpec("P")
R = TypeVar("R")
Report: TypeAlias = Callable[[ProgressReport], Coroutine[Any, Any, None]]

KINDS = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
RESERVED = {"idempotency_key", "delay", "priority"}
MAX_SECONDS = 3_155_760_000.0
"""A hundred years: the most for which a task waits or is kept, so that every time can be told as a date."""
EXACT = 2**53
"""Below this, a float that is whole is the only one that means this number."""
TOPIC = "tasks."
"""What the topics of a bus begin with: each handler has one, so that a worker is only told of tasks that it knows."""


class ArgumentError(ValueError):
    """A task was submitted with arguments that its handler doesn't take, or that can't be stored."""


class ResultError(TypeError):
    """What a handler returned can't be stored."""


class Progress:
    """What a handler reports its progress with: a parameter with this type gets one."""

    def __init__(self, report: Report, *, in_thread: bool = False) -> None:
        self._report: Report = report
        self._in_thread: bool = in_thread

    def update(self, done: float, total: float = 1.0, message: str = "") -> Awaitable[None]:
        """Report how far the task is: an async handler awaits it, a plain one just calls it.

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
                msg = f"{argument} must be a number, got {show(value)}"
                raise TypeError(msg)
        if not 0 <= done <= total or not total > 0:
            msg = f"done must be from 0 to total, and total > 0, got {done} of {total}"
            raise ValueError(msg)
        if not isinstance(message, str):
            msg = f"message must be a str, got {show(message)}"
            raise TypeError(msg)
        progress = ProgressReport(done, total, storable(message))
        if not self._in_thread:
            return self._report(progress)
        from_thread.run(self._report, progress)
        return REPORTED


class Reported:
    """An awaitable that is done."""

    def __await__(self) -> Iterator[Any]:
        return iter(())


REPORTED = cast("Awaitable[None]", Reported())


class Handler(Generic[P, R]):
    """A function that was registered as a task; it can still be called as before."""

    def __init__(
        self, fn: Callable[P, R], name: str, retry: Retry, timeout: float | None, limit: int | None = None
    ) -> None:
        self.fn: Callable[P, R] = fn
        self.name: str = name
        self.retry: Retry = retry
        self.timeout: float | None = timeout
        self.limit: int | None = limit
        self.__doc__ = fn.__doc__
        self.__wrapped__ = fn
        self._attempt: Attempt
        hints = hints_of(fn)
        self._progress: list[str] = []
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
            if strip(hint) is Progress:
                self._progress.append(parameter.name)
                continue
            check_hint(name, parameter.name, hint)
            if parameter.default is parameter.empty:
                fields.append((parameter.name, hint))
            else:
                # Left to the function.
                fields.append((parameter.name, Union[hint, msgspec.UnsetType], msgspec.UNSET))  # noqa: UP007 -- a hint may be a string
        self.arguments: type[msgspec.Struct] = make_struct(name, fields)
        self._decoder: msgspec.msgpack.Decoder[msgspec.Struct] = reader(self.arguments)
        self._json_decoder: msgspec.json.Decoder[msgspec.Struct] = msgspec.json.Decoder(
            self.arguments, dec_hook=from_plain
        )
        self.returns: Any = hints.get("return", Any)
        self._result_decoder: msgspec.msgpack.Decoder[Any] = make_decoder(name, self.returns)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself."""
        return self.fn(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<task {self.name!r}>"

    def fingerprint(self, arguments: Mapping[str, Any] | bytes) -> str:
        """Give what is the same for the same arguments, however they are written, and not for others.

        Args:
            arguments: checked by `encode`, or what it gave.

        Raises:
            ArgumentError: they are nested too deeply.
        """
        if not isinstance(arguments, bytes):
            # A set's order is another in each process.
            arguments = pack(dict(arguments), ordered=True)
        ordered = pack(self._read(arguments), ordered=True)
        try:
            plain = pack(one_number(msgspec.msgpack.decode(ordered)), ordered=True)
        except RecursionError as error:
            msg = f"arguments of {self.name} are nested too deeply to have an idempotency key"
            raise ArgumentError(msg) from error
        return sha256(plain).hexdigest()

    def encode(self, arguments: Mapping[str, Any]) -> bytes:
        """Check arguments by the type hints, and make of them what is stored.

        Raises:
            ArgumentError: one is missing, unknown, of the wrong type, or can't be stored.
        """
        try:
            encoded = pack(dict(arguments))
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
            ResultError: what it returned can't be stored, or is not what its annotation says.
            Exception: what it raised.
        """
        arguments = given(self._read(encoded))
        for parameter in self._progress:
            arguments[parameter] = Progress(report, in_thread=not is_async(self.fn))
        value = await self._attempt(**arguments)
        try:
            encoded = pack(value)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            msg = f"the result of {self.name} can't be stored: {error}"
            raise ResultError(msg) from error
        if self.returns is not Any:
            try:
                # Or whoever asks for it could not read it.
                self._result_decoder.decode(encoded)
            except msgspec.ValidationError as error:
                msg = f"the result of {self.name} does not fit its annotation: {error}"
                raise ResultError(msg) from error
        return encoded

    def decode_result(self, encoded: bytes) -> Any:
        """Give a result as the type that the function returns."""
        return self._result_decoder.decode(encoded)


def hints_of(fn: Callable[..., Any]) -> dict[str, Any]:
    """Give the type hints of a function, a partial or an object that can be called."""
    while isinstance(fn, partial):
        fn = fn.func
    return get_type_hints(fn if inspect.isroutine(fn) else type(fn).__call__, include_extras=True)


def given(arguments: msgspec.Struct) -> dict[str, Any]:
    """Give the arguments that are not left to the function."""
    names = arguments.__struct_fields__
    return {name: value for name in names if (value := getattr(arguments, name)) is not msgspec.UNSET}


def one_number(value: Any) -> Any:
    """Give data in which a whole number is an int, however it was written."""
    if isinstance(value, float) and value.is_integer() and abs(value) < EXACT:
        return int(value)
    if isinstance(value, list):
        return [one_number(each) for each in value]
    if isinstance(value, dict):
        return {one_number(key): one_number(each) for key, each in value.items()}
    return value


def topic_of(name: str) -> str:
    """Name the topic of a handler's tasks."""
    return TOPIC + name


def make_decoder(name: str, returns: Any) -> msgspec.msgpack.Decoder[Any]:
    """Make what reads a function's results."""
    try:
        return reader(returns)
    except TypeError as error:
        msg = f"what {name} is annotated to return is not plain data: {error}"
        raise TypeError(msg) from error


def check_hint(name: str, parameter: str, hint: Any) -> None:
    """Refuse a type hint of what can't be stored, or not be described to those who submit."""
    try:
        reader(hint)
    except TypeError as error:
        msg = f"the type hints of {name} are not for plain data: {parameter}: {error}"
        raise TypeError(msg) from error


def make_struct(name: str, fields: list[Any]) -> type[msgspec.Struct]:
    """Make what a function's arguments are read as, by their type hints."""
    # The module's name keeps a type of the same name apart.
    return msgspec.defstruct(name, fields, kw_only=True, forbid_unknown_fields=True, module="arguments of")
