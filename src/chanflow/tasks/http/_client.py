"""A client of a task service that is served over HTTP."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from secrets import token_hex
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import httpx
import msgspec
from anyio import current_time, sleep

from chanflow._check import check_seconds
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

__all__ = ["ServiceError", "TaskClient"]

T = TypeVar("T")

LONG_POLL = 20.0
"""Seconds for which one request waits for the end of a task."""
PAUSE = 1.0
"""Seconds from one request to the next where the service doesn't wait, or a stream is over at once."""
DEFAULT_RETRY = Retry(5)


class ServiceError(Exception):
    """The service can't be reached, refuses, or doesn't answer as a task service does."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status: int | None = status
        """The HTTP status; None where there was no answer."""


class TaskClient:
    """Submits tasks to a service over HTTP, and asks for them.

    Use it as a context manager, on asyncio or trio. What fails for a moment is tried again: a connection, and a
    service that is full or away. A submission carries an idempotency key, so that it is one task however often it is
    tried.

    Args:
        url: where the service's app is, as `http://127.0.0.1:8000`.
        token: its bearer token; None for none.
        retry: how often to try, and how long to wait in between; 5 times by default.
        timeout: seconds to wait for an answer, greater than 0, beside what a request itself waits for.
        http: an httpx client to use and to leave open; None to make one.
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
        self._url: str = url.rstrip("/")
        self._headers: dict[str, str] = {} if token is None else {"Authorization": f"Bearer {token}"}
        self._retry: Retry = retry
        self._timeout: float = timeout
        self._own: bool = http is None
        self._http: httpx.AsyncClient = httpx.AsyncClient() if http is None else http

    async def __aenter__(self) -> Self:
        if self._own:
            await self._http.__aenter__()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
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
            timeout: seconds, at least 0; without bound by default.

        Raises:
            TimeoutError: it has not ended in time.
            UnknownTaskError, ServiceError: as for `get`.

        Cancellation:
            The task goes on.
        """
        check_seconds("timeout", timeout)
        deadline = current_time() + timeout
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

    async def watch(self, task_id: str) -> AsyncGenerator[TaskRecord, None]:
        """Iterate over what becomes of a task, until its end; a connection that breaks is made again.

        Raises:
            UnknownTaskError, ServiceError: as for `get`.

        Cancellation:
            The task goes on.
        """
        last: TaskRecord | None = None
        while last is None or not last.status.is_end:
            asked_at = current_time()
            # Besides, it tells whether the task is still known.
            record = await self.get(task_id)
            if record != last:
                last = record
                yield record
            if record.status.is_end:
                return
            async with aclosing(self._stream(task_id)) as records:
                async for record in records:
                    if record != last:
                        last = record
                        yield record
            if not record.status.is_end:
                await pause(asked_at + PAUSE)

    async def _stream(self, task_id: str) -> AsyncGenerator[TaskRecord, None]:
        path = f"{self._url}/tasks/{escape(task_id)}/events"
        # A stream is never idle for long: see the app's keep-alive.
        timeout = httpx.Timeout(self._timeout + LONG_POLL)
        try:
            async with self._http.stream("GET", path, headers=self._headers, timeout=timeout) as response:
                if not response.is_success:
                    return
                async for line in response.aiter_lines():
                    if line.startswith("data: "):
                        yield from_json(msgspec.json.decode(line.removeprefix("data: ")))
        except (httpx.TransportError, ValueError, TypeError, KeyError):
            # It broke, perhaps in the middle of a message. Whoever iterates asks again.
            return

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
                    timeout=self._timeout + waiting,
                )
            except httpx.RequestError as error:
                failed = ServiceError(f"{self._url}: {str(error) or type(error).__name__}")
                failed.__cause__ = error
            else:
                if response.is_success:
                    return response
                failed = self._failure(response)
                if response.status_code != httpx.codes.SERVICE_UNAVAILABLE:
                    raise failed
                hint = response.headers.get("Retry-After", "")
                again = float(hint) if hint.isdecimal() else None
            if not self._retry.wants(failed, attempts):
                raise failed
            await sleep(self._retry.backoff(attempts) if again is None else again)

    def _read(self, response: httpx.Response, read: Callable[[Any], T]) -> T:
        """Make something of an answer."""
        try:
            return read(response.json())
        except (ValueError, TypeError, KeyError) as error:
            msg = f"{self._url}: the answer is none of a task service's: {error!r}"
            raise ServiceError(msg, response.status_code) from error

    def _failure(self, response: httpx.Response) -> Exception:
        """Make an error of an answer that is none."""
        problem: Any = None
        try:
            problem = response.json()
            detail = str(problem["detail"])
        except (ValueError, TypeError, KeyError):
            detail = response.reason_phrase
        kinds: dict[int, type[Exception]] = {404: UnknownTaskError, 409: TaskStateError, 422: ArgumentError}
        kind = kinds.get(response.status_code)
        if isinstance(problem, dict) and problem.get("type") == KEY_REUSED:
            kind = IdempotencyError
        if kind is not None and response.headers.get("content-type") == "application/problem+json":
            return kind(detail)
        return ServiceError(f"{self._url}: {response.status_code} {detail}", response.status_code)


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
