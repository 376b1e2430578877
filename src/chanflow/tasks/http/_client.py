"""A client of a task service that is served over HTTP."""

from __future__ import annotations

import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from email.utils import parsedate_to_datetime
from secrets import token_hex
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote, unquote

import anyio.abc
import httpx
import msgspec
from anyio import (
    CancelScope,
    ClosedResourceError,
    EndOfStream,
    Event,
    create_task_group,
    current_time,
    move_on_after,
    sleep,
)
from anyio.abc import TaskGroup

from chanflow._channel._ends import Channel
from chanflow._check import check_seconds, show
from chanflow._loop._home import running_home
from chanflow._url import without_secrets
from chanflow._work._retry import Retry
from chanflow.tasks._errors import (
    IdempotencyError,
    TaskCancelledError,
    TaskFailedError,
    TaskStateError,
    UnknownTaskError,
)
from chanflow.tasks._handler import ArgumentError
from chanflow.tasks._idempotency import check_key
from chanflow.tasks.record import TaskRecord, TaskStatus
from chanflow.tasks.wire import KEY_REUSED, from_json

__all__ = ["ServiceError", "TaskClient", "Watch"]

T = TypeVar("T")

LONG_POLL = 20.0
"""Seconds for which one request waits for the end of a task."""
PAUSE = 1.0
"""Seconds from one request to the next where the service doesn't wait, or a stream is over at once."""
LONGEST_LINE = 2**26
"""Bytes of a stream's line, which is kept until its end."""
DEFAULT_RETRY = Retry(5)
MALFORMED = ValueError, TypeError, KeyError, RecursionError
"""What comes of reading what is no answer of a task service."""
PASSING = {
    httpx.codes.TOO_MANY_REQUESTS,
    httpx.codes.BAD_GATEWAY,
    httpx.codes.SERVICE_UNAVAILABLE,
    httpx.codes.GATEWAY_TIMEOUT,
}
"""What a service that is full, or a proxy whose service is away, answers for a while."""


class ServiceError(Exception):
    """The service can't be reached, refuses, or doesn't answer as a task service does."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status: int | None = status
        """The HTTP status; None where there was no answer."""


class TaskClient:
    """Submits tasks to a service over HTTP, and asks for them.

    Use it as a context manager, on asyncio or trio. What fails for a moment is tried again: a connection, a service
    that is full or away, and a proxy that says so (429, 502, 503 and 504). A `Retry-After` takes the place of the
    backoff, up to the retry's `max_delay`. A submission carries an idempotency key, so that it is one task however
    often it is tried.

    Args:
        url: where the service's app is, as `http://127.0.0.1:8000`. User information in it is for a proxy that asks
            for a user and a password, percent-encoded; it excludes a token.
        token: its bearer token, printable ASCII without a space at either end; None for none.
        retry: how often to try, and how long to wait in between; 5 times by default.
        timeout: seconds to wait for an answer, greater than 0, beside what a request itself waits for.
        http: an httpx client to use and to leave open; None to make one.

    Raises:
        ValueError, TypeError: an argument is not as said above.
    """

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        retry: Retry = DEFAULT_RETRY,
        timeout: float = 30.0,
        http: httpx.AsyncClient | None = None,
    ) -> None:
        check_seconds("timeout", timeout, positive=True)
        self._url, self._auth = read_url(url)
        if token is not None:
            check_token(token)
            if isinstance(self._auth, httpx.BasicAuth):
                msg = "url must have no user information where there is a token: a request has one or the other"
                raise ValueError(msg)
        self._headers: dict[str, str] = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._retry: Retry = retry
        self._timeout: float = timeout
        self._own: bool = http is None
        self._http: httpx.AsyncClient = httpx.AsyncClient() if http is None else http
        self._watching: TaskGroup | None = None

    def __repr__(self) -> str:
        return f"<TaskClient {self._url}>"

    async def __aenter__(self) -> Self:
        if self._own:
            await self._http.__aenter__()
        self._watching = await create_task_group().__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._watching is not None
        watching, self._watching = self._watching, None
        watching.cancel_scope.cancel()
        try:
            # The task group would wrap an error of the block's; but a cancellation may be its own.
            if exc is None or isinstance(exc, Exception):
                await watching.__aexit__(None, None, None)
            else:
                await watching.__aexit__(exc_type, exc, tb)
        finally:
            if self._own:
                await self._http.__aexit__(exc_type, exc, tb)

    async def submit(
        self,
        name: str,
        /,
        *,
        idempotency_key: str | None = None,
        delay: float = 0.0,
        priority: int = 0,
        **arguments: Any,
    ) -> str:
        """Submit a task.

        Args:
            name: what the task is called there.
            idempotency_key: a second submission with the same key is the same task; one of its own by default.
            delay: seconds before which the task is not begun, at least 0.
            priority: of the tasks that are due, those with a higher one are begun first.
            arguments: plain data, or what msgspec makes JSON of.

        Returns:
            The task's id.

        Raises:
            UnknownTaskError: there is no handler of this name.
            ArgumentError: the arguments don't fit the handler, or can't be sent.
            IdempotencyError: the key was used for another task or other arguments.
            ServiceError: the service can't be reached, or refuses.
            ValueError, TypeError: another argument is not as for `TaskService.submit`.

        Cancellation:
            The task may have been submitted nevertheless.
        """
        check_seconds("delay", delay)
        try:
            body = msgspec.json.encode(arguments)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            msg = f"arguments of {name} can't be sent: {error}"
            raise ArgumentError(msg) from error
        key = token_hex(16) if idempotency_key is None else idempotency_key
        check_key(key)
        headers = {"Content-Type": "application/json", "Idempotency-Key": quoted(key)}
        parameters = {"delay": repr(float(delay))} if delay else {}
        if priority:
            parameters["priority"] = str(priority)
        response = await self._ask(
            "POST", f"tasks/{escape(name)}", headers=headers, content=body, params=parameters or None
        )
        return self._read(response, lambda answer: str(answer["task_id"]))

    async def get(self, task_id: str) -> TaskRecord:
        """Give what is known of a task.

        Raises:
            UnknownTaskError: there is no such task, or it has expired.
            ServiceError: the service can't be reached, or refuses.
        """
        return self._read(await self._ask("GET", f"tasks/{escape(task_id)}"), from_json)

    async def wait(self, task_id: str, timeout: float = math.inf) -> TaskRecord:
        """Wait for the end of a task, and give what is known of it then.

        Args:
            task_id: what `submit` returned.
            timeout: seconds, at least 0; without bound by default. The answer may take `timeout` of the client more.

        Raises:
            TimeoutError: it has not ended in time, or the service could not be asked.
            UnknownTaskError, ServiceError: as for `get`.

        Cancellation:
            The task goes on.
        """
        check_seconds("timeout", timeout)
        deadline = current_time() + timeout
        # A service that is away for long would keep us from noticing, retry by retry.
        with move_on_after(timeout + self._timeout):
            while True:
                asked_at = current_time()
                wait = min(LONG_POLL, max(deadline - asked_at, 0.0))
                headers = {"Prefer": f"wait={math.ceil(wait)}"}
                response = await self._ask("GET", f"tasks/{escape(task_id)}", headers=headers, waiting=wait)
                record = self._read(response, from_json)
                if record.status.is_end:
                    return record
                if current_time() >= deadline:
                    msg = f"task {task_id} is {record.status.value} after {timeout} s"
                    raise TimeoutError(msg)
                await pause(min(asked_at + PAUSE, deadline))
        msg = f"{self._url}: no answer to how task {task_id} is, after {timeout} s and {self._timeout} s more"
        raise TimeoutError(msg)

    async def result(self, task_id: str, timeout: float = math.inf) -> Any:
        """Wait for the end of a task, and give its result as plain data.

        Args:
            task_id: what `submit` returned.
            timeout: as for `wait`.

        Raises:
            TaskFailedError: the task failed.
            TaskCancelledError: the task was cancelled.
            TimeoutError, UnknownTaskError, ServiceError: as for `wait`.

        Cancellation:
            The task goes on.
        """
        record = await self.wait(task_id, timeout)
        if record.status is TaskStatus.FAILED:
            raise TaskFailedError(record)
        if record.status is TaskStatus.CANCELLED:
            raise TaskCancelledError(record)
        return record.decode_result()

    def watch(self, task_id: str) -> Watch:
        """Iterate over what becomes of a task, until its end; a connection that breaks is made again.

        Args:
            task_id: what `submit` returned.

        Raises:
            UnknownTaskError, ServiceError: as for `get`, when the iteration comes to that.
            ClosedResourceError: the client's block was not entered, or was left.

        Cancellation:
            The task goes on, and what is left of the iteration goes on from there.
        """
        return Watch(lambda: self._follow(task_id))

    async def _follow(self, task_id: str) -> Following:
        """Begin to ask for what becomes of a task."""
        if self._watching is None:
            msg = "the client's block was not entered, or was left"
            raise ClosedResourceError(msg)
        following = Following(self, task_id)
        await self._watching.start(following.run)
        return following

    async def listen(self, task_id: str, tell: Callable[[TaskRecord], Awaitable[None]]) -> None:
        """Tell of records as the service does, until that is over or fails."""
        path = f"{self._url}/tasks/{escape(task_id)}/events"
        # A stream is never idle for long: see the app's keep-alive.
        timeout = httpx.Timeout(self._timeout + LONG_POLL)
        # As it is: where decoding fails, generators of httpx are left behind.
        headers = {**self._headers, "Accept-Encoding": "identity"}
        # What breaks may do so in the middle of a message. Whoever listens asks again.
        with suppress(httpx.RequestError, *MALFORMED):
            async with self._http.stream("GET", path, headers=headers, auth=self._auth, timeout=timeout) as response:
                parts = response.aiter_bytes()
                rest = b""
                try:
                    async for part in parts:
                        *lines, rest = (rest + part).split(b"\n")
                        for line in lines if response.is_success else ():
                            if line.startswith(b"data: "):
                                await tell(from_json(msgspec.json.decode(line.removeprefix(b"data: "))))
                        if len(rest) > LONGEST_LINE:
                            return
                finally:
                    await cut_off(parts)

    async def cancel(self, task_id: str) -> TaskRecord:
        """Cancel a task, and give what is known of it then; one that runs may take a while to end.

        Raises:
            UnknownTaskError, ServiceError: as for `get`.
        """
        return self._read(await self._ask("DELETE", f"tasks/{escape(task_id)}"), from_json)

    async def _ask(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        params: Mapping[str, str] | None = None,
        waiting: float = 0.0,
    ) -> httpx.Response:
        """Ask until there is an answer, or it has been tried often enough."""
        attempts = 0
        failed: Exception
        while True:
            attempts += 1
            again: float | None = None
            try:
                response = await self._http.request(
                    method,
                    f"{self._url}/{path}",
                    headers={**self._headers, **(headers or {})},
                    content=content,
                    params=params,
                    auth=self._auth,
                    timeout=self._timeout + waiting,
                )
            except httpx.RequestError as error:
                failed = ServiceError(f"{self._url}: {str(error) or type(error).__name__}")
                failed.__cause__ = error
            else:
                if response.is_success:
                    return response
                failed = self._failure(response)
                if response.status_code not in PASSING:
                    raise failed
                again = retry_after(response.headers)
            if not self._retry.wants(failed, attempts):
                raise failed
            await sleep(self._retry.backoff(attempts) if again is None else min(again, self._retry.max_delay))

    def _read(self, response: httpx.Response, read: Callable[[Any], T]) -> T:
        """Make something of an answer."""
        try:
            return read(response.json())
        except MALFORMED as error:
            msg = f"{self._url}: the answer is none of a task service's: {error!r}"
            raise ServiceError(msg, response.status_code) from error

    def _failure(self, response: httpx.Response) -> Exception:
        """Make an error of an answer that is none."""
        problem: Any = None
        try:
            problem = response.json()
            detail = str(problem["detail"])
        except MALFORMED:
            detail = response.reason_phrase
        kinds: dict[int, type[Exception]] = {404: UnknownTaskError, 409: TaskStateError, 422: ArgumentError}
        kind = kinds.get(response.status_code)
        if isinstance(problem, dict) and problem.get("type") == KEY_REUSED:
            kind = IdempotencyError
        if kind is not None and response.headers.get("content-type") == "application/problem+json":
            return kind(detail)
        return ServiceError(f"{self._url}: {response.status_code} {detail}", response.status_code)


class Following:
    """The part of a watch that asks the service, in a task of the client's."""

    def __init__(self, client: TaskClient, task_id: str) -> None:
        self._client = client
        self._task_id = task_id
        self._home = running_home()
        self._scope = CancelScope()
        self._last: TaskRecord | None = None
        self.records: Channel[TaskRecord] = Channel()
        self.error: Exception | None = None
        """Why there are no more records, where the task is not at its end."""
        self.ended: Event = Event()

    def stop(self) -> None:
        """Close the connection, from any thread."""
        # The event loop may have ended.
        with suppress(RuntimeError):
            self._home.call_soon(self._scope.cancel)

    async def run(self, *, task_status: anyio.abc.TaskStatus[None]) -> None:
        """Ask until the task ends."""
        self.error = ClosedResourceError("the client is closed")
        task_status.started()
        try:
            with self._scope:
                await self._ask()
                self.error = None
        except Exception as error:  # noqa: BLE001 -- goes to whoever iterates
            self.error = error
        finally:
            self.records.close()
            self.ended.set()

    async def _ask(self) -> None:
        while True:
            asked_at = current_time()
            # Besides, it tells whether the task is still known.
            await self._tell(await self._client.get(self._task_id))
            if not self._is_over():
                await self._client.listen(self._task_id, self._tell)
            if self._is_over():
                return
            await pause(asked_at + PAUSE)

    def _is_over(self) -> bool:
        return self._last is not None and self._last.status.is_end

    async def _tell(self, record: TaskRecord) -> None:
        if record != self._last:
            self._last = record
            await self.records.send(record)


class Watch(AsyncIterator[TaskRecord]):
    """The records of a task, until its end: what `TaskClient.watch` gives.

    Leave the iteration whenever you like: once it is dropped, its connection is closed.
    """

    # A generator that is left before its end would be finished by the garbage collector, with those of httpx in it,
    # which trio warns of.

    def __init__(self, begin: Callable[[], Awaitable[Following]]) -> None:
        self._begin = begin
        self._following: Following | None = None

    async def __anext__(self) -> TaskRecord:
        if self._following is None:
            self._following = await self._begin()
        try:
            return await self._following.records.receive()
        except EndOfStream:
            if self._following.error is None:
                raise StopAsyncIteration from None
            raise self._following.error from self._following.error.__cause__

    async def aclose(self) -> None:
        """Close the connection at once, as for `contextlib.aclosing`; nothing more comes."""
        if self._following is not None:
            self._following.stop()
            await self._following.ended.wait()

    def __del__(self) -> None:
        if self._following is not None:
            self._following.stop()


async def cut_off(parts: AsyncIterator[object]) -> None:
    """Finish a generator of httpx, and those in it, which closing it would leave to the garbage collector."""
    with CancelScope() as scope:
        scope.cancel()
        async for _ in parts:
            pass


def read_url(url: str) -> tuple[str, Any]:
    """Take a URL apart: without user information, and what that says."""
    if not isinstance(url, str):
        msg = f"url must be a str, got a {type(url).__name__}"
        raise TypeError(msg)
    place = without_secrets(url)
    scheme, _, rest = url.partition("://")
    authority = rest.partition("/")[0]
    user_information, at, host = authority.rpartition("@")
    if scheme.lower() not in {"http", "https"} or place.endswith("://...") or not host.partition(":")[0]:
        msg = f"url must be http://HOST[:PORT][/PATH] or https://..., got {show(place)}"
        raise ValueError(msg)
    if "?" in rest or "#" in rest:
        msg = f"url must have no query and no fragment: {place}"
        raise ValueError(msg)
    user, _, password = user_information.partition(":")
    return place.rstrip("/"), httpx.BasicAuth(unquote(user), unquote(password)) if at else httpx.USE_CLIENT_DEFAULT


def check_token(token: object) -> None:
    """Refuse what no header can carry, without telling it."""
    if not isinstance(token, str):
        msg = f"token must be a str or None, got a {type(token).__name__}"
        raise TypeError(msg)
    if not (token and token.isascii() and token.isprintable() and token == token.strip()):
        msg = "token must be printable ASCII, not empty, without a space at either end"
        raise ValueError(msg)


def retry_after(headers: httpx.Headers) -> float | None:
    """Give the seconds after which to ask again; None where the answer says nothing of that."""
    said = headers.get("Retry-After", "").strip()
    if said.isascii() and said.isdigit():
        return float(said)
    try:
        until = parsedate_to_datetime(said).timestamp()
    except (ValueError, OverflowError):
        return None
    try:
        # By the clock of whoever said so.
        now = parsedate_to_datetime(headers.get("Date", "")).timestamp()
    except (ValueError, OverflowError):
        now = time.time()
    return max(until - now, 0.0)


def quoted(key: str) -> str:
    """Make a string of RFC 9651 of a key, as the draft wants it."""
    escaped = key.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


async def pause(until: float) -> None:
    """Wait until a time, if it is not over already."""
    await sleep(max(until - current_time(), 0.0))


def escape(part: str) -> str:
    """Make a part of a path of any text."""
    # Dots alone would be taken for a way through the path.
    return quote(part, safe="") if part.strip(".") else part.replace(".", "%2E")
