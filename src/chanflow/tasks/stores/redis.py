"""Tasks in Redis, which processes on several machines may share."""

# Invariants:
# 1. A task is a hash: its record, and beside it, once it was claimed, what it was claimed with. Whoever reads it
#    applies the claim to the record, for a script can't: so a claim is one step on the server.
# 2. A task that is not at its end is in `later`, by when it is due, or in the queue of its handler, `ready:NAME`, by
#    its rank, then by when it became due.
# 3. A change happens to a task as it was read, or not at all; one whose result is there already has happened.

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import cache, partial
from hashlib import sha1
from secrets import token_hex
from typing import Any, TypeAlias

import msgspec
from anyio import TASK_STATUS_IGNORED, CancelScope, Event, create_task_group, sleep
from anyio.abc import TaskGroup
from anyio.abc import TaskStatus as Started
from anyio.lowlevel import checkpoint
from coredis.exceptions import NoScriptError, ReadOnlyError, RedisError, WrongTypeError
from coredis.retry import NoRetryPolicy

from chanflow._errors import StorageError
from chanflow.tasks._errors import unknown_cursor
from chanflow.tasks.record import TaskRecord, TaskStatus, claim, due_at, expired
from chanflow.tasks.store import Change, Claimed, Decoder, News, Store, TaskStarted, Tell, news_of
from chanflow.tasks.stores._gather import Gather
from chanflow.tasks.stores._redis_client import Client, connect
from chanflow.tasks.stores._redis_url import read_url
from chanflow.tasks.stores._scripts import DUE, FORGET, PAGE, SET_ASIDE, STEPS, TIME

__all__ = ["RedisStore"]

logger: logging.Logger = logging.getLogger("chanflow.tasks")

MOST_REMEMBERED = 10_000
LARGEST_REMEMBERED = 1000
"""Bytes."""
CLOCK_INTERVAL = 10.0
"""Seconds from one look at the server's clock to the next, and from one sign of life on our subscription."""
AGAIN = 1.0
"""Seconds to wait for a server that is away."""
MOST_TOGETHER = 100
"""The most steps in one script: nobody else is served meanwhile."""

# A record, and what it was claimed with since the record was written, a line for each claim.
Kept: TypeAlias = tuple[bytes, bytes]
# What is to be done, and its arguments.
Step: TypeAlias = tuple[str, Sequence[str | bytes | float]]


@cache
def digest(script: str) -> str:
    """Give the name by which the server knows a script."""
    return sha1(script.encode(), usedforsecurity=False).hexdigest()


class RedisStore(Store):
    """Tasks in Redis.

    Args:
        url: `redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE]`, `rediss://` for TLS, `unix:///PATH` for a socket,
            `redis+cluster://HOST[:PORT],...` for a cluster, or `redis+sentinel://HOST[:PORT],.../SERVICE[/DATABASE]`
            for the server that sentinels watch; for the last two, `rediss+` for TLS. USER and PASSWORD are
            percent-encoded. Options behind a question mark: `prefix`; `connect_timeout` and `stream_timeout`, the
            seconds to wait for a connection and for an answer, greater than 0 and at most 600, 5 by default; `db`,
            `username`, `password` and `client_name`; for TLS `ssl_ca_certs`, `ssl_certfile`, `ssl_keyfile`,
            `ssl_cert_reqs` (`required` or `none`) and `ssl_check_hostname` (`true` or `false`); for sentinels,
            `sentinel_username` and `sentinel_password`.
        prefix: what the keys begin with; None for what the URL says, or `chanflow:tasks:`. In a cluster, it has a part
            in braces, so that all keys are on one node, and is `{chanflow:tasks}:` by default.

    Raises:
        ValueError: an argument is not as said above.
    """

    durable = True
    shared = True

    def __init__(self, url: str, *, prefix: str | None = None) -> None:
        self._url = read_url(url, prefix)
        self._place = self._url.place
        self._prefix = self._url.prefix
        self._writer = token_hex(8)
        # Where we tell ourselves that we still hear.
        self._own_channel = f"{self._prefix}news:{self._writer}"
        self._client: Client
        # What keeps the client open; None where the store is closed.
        self._keeper: TaskGroup | None = None
        self._closing: Event
        # What the last tasks that this process made or changed were kept as: mostly they still are.
        self._last: dict[str, Kept] = {}
        self._decode = Decoder()
        self._listeners: list[Tell] = []
        self._moved_by: float
        # How many subscriptions to the news are our own; -1 where the server doesn't know of all.
        self._listens = -1 if self._url.kind == "cluster" else 0
        self._together: Gather[Step, Any] = Gather(self._take_steps, MOST_TOGETHER)

    def __repr__(self) -> str:
        return f"<RedisStore {self._place}>"

    @asynccontextmanager
    async def _calling(self, *, opening: bool = False) -> AsyncIterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            if isinstance(error, (TimeoutError, ReadOnlyError)) and not opening:
                # Of a connection to a server that is gone, or that is the first one no more, nobody would ever hear.
                self._client.connection_pool.disconnect()
            raise self._failure(error) from (None if self._tells_secret(error) else error)

    def _failure(self, error: BaseException) -> StorageError:
        """Say what is wrong, without a secret: a server may repeat what it was asked."""
        if isinstance(error, StorageError):
            return error
        if self._tells_secret(error):
            return StorageError(f"{self._place}: {type(error).__name__}, and what it says has a secret")
        text = str(error) or type(error).__name__
        # The client says only that it could not connect.
        while (cause := error.__cause__) is not None:
            error = cause
            text = f"{text}: {cause}"
        return StorageError(f"{self._place}: {text}")

    def _tells_secret(self, error: BaseException) -> bool:
        """Whether the message of an error, or of one behind it, has a password."""
        if not self._url.secrets:
            return False
        text = "".join(traceback.format_exception(error, limit=0))
        return any(secret in text for secret in self._url.secrets)

    def _is_discreet(self, record: logging.LogRecord) -> bool:
        """Whether the client may log something."""
        error = record.exc_info and record.exc_info[1]
        text = record.getMessage()
        return not (any(secret in text for secret in self._url.secrets) or (error and self._tells_secret(error)))

    async def open(self) -> None:
        if self._keeper is not None:
            msg = "this store in Redis is open already: each service needs one of its own"
            raise RuntimeError(msg)
        self._keeper = keeper = create_task_group()
        self._closing = Event()
        await keeper.__aenter__()
        try:
            async with self._calling(opening=True):
                self._client = await keeper.start(self._keep_client)
            await self._set_clock()
        except BaseException:
            await self.aclose()
            raise

    async def _keep_client(self, *, task_status: Started[Client]) -> None:
        """Have a client open until the store is closed, whoever is cancelled meanwhile: what runs is still put back."""
        client_log = logging.getLogger("coredis")
        client_log.addFilter(self._is_discreet)
        try:
            with CancelScope() as scope:
                async with AsyncExitStack() as stack:
                    task_status.started(await connect(self._url, stack))
                    # Where opening was cancelled, nobody will close it.
                    await checkpoint()
                    scope.shield = True
                    await self._closing.wait()
        finally:
            client_log.removeFilter(self._is_discreet)

    async def aclose(self) -> None:
        assert self._keeper is not None
        self._closing.set()
        keeper, self._keeper = self._keeper, None
        await keeper.__aexit__(None, None, None)

    def now(self) -> float:
        return self._moved_by + time.monotonic()

    async def _set_clock(self) -> None:
        """Take the server's time, as of the middle of the question."""
        asked_at = time.monotonic()
        seconds, microseconds = await self._run(TIME)
        self._moved_by = int(seconds) + int(microseconds) / 1e6 - (asked_at + time.monotonic()) / 2

    async def _run(self, script: str, *arguments: str | bytes | float) -> Any:
        async with self._calling():
            try:
                return await self._client.evalsha(digest(script), [self._prefix], [self._prefix, *arguments])
            except NoScriptError:
                return await self._client.eval(script, [self._prefix], [self._prefix, *arguments])

    async def _step(self, kind: str, arguments: Sequence[str | bytes | float]) -> Any:
        try:
            return await self._together((kind, arguments))
        except BaseException:
            # It may have been taken all the same.
            self._tell(None)
            raise

    async def _take_steps(self, steps: Sequence[Step]) -> list[Any]:
        """Take steps in one go, in their order: those that come while others are on their way go together."""
        arguments = [each for kind, given in steps for each in (kind, len(given), *given)]
        results: list[Any] = await self._run(STEPS, self._writer, self._listens, *arguments)
        return results

    async def create_many(self, records: Sequence[TaskRecord]) -> list[TaskRecord]:
        arguments: list[str | bytes | float] = []
        if any(record.idempotency_key is not None for record in records):
            # A key may be that of a task whose time is over.
            await self.forget(max(record.created_at for record in records))
        encoded = [msgspec.msgpack.encode(record) for record in records]
        for record, each in zip(records, encoded, strict=True):
            due = due_at(record)
            arguments += [
                record.id,
                each,
                record.name,
                record.status.value,
                record.priority,
                "" if due is None else repr(due),
                "1" if due is not None and due <= record.created_at else "",
                record.idempotency_key or "",
                repr(record.run_at),
            ]
        kept: list[TaskRecord] = []
        for record, each, there in zip(records, encoded, await self._step("create", arguments), strict=True):
            if not there:
                self._remember(record.id, (each, b""))
                self._tell(News(record.id, record.name, record.status, record=record))
                kept.append(record)
                continue
            found = self._read(there[0].decode(), (there[1], there[2] or b""))
            if found is None:
                msg = f"the task with the idempotency key {record.idempotency_key!r} can't be read"
                raise StorageError(msg)
            kept.append(found)
        return kept

    async def get(self, task_id: str, now: float) -> TaskRecord | None:
        kept = self._last.get(task_id)
        last = None if kept is None else self._read(task_id, kept)
        if last is None or last.status is not TaskStatus.SUCCESS:
            # That would stay so until it expires.
            kept = await self._find(task_id)
            last = None if kept is None else self._read(task_id, kept)
        return None if last is None or expired(last, now) else last

    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        # First as it is remembered, then as it is.
        kept = self._last.pop(task_id, None)
        is_guess = kept is not None
        while True:
            kept = kept or await self._find(task_id)
            record = None if kept is None else self._read(task_id, kept)
            changed = None if record is None else change(record)
            if record is None or kept is None or changed is None or changed == record:
                if not is_guess:
                    return changed
            elif await self._replace(record, kept, changed):
                return changed
            # Somebody else has changed it.
            kept, is_guess = None, False

    async def change_many(self, changes: Sequence[tuple[str, Change]]) -> list[TaskRecord | None]:
        results: list[TaskRecord | None] = [None] * len(changes)
        by_task: dict[str, list[int]] = {}
        for index, (task_id, _) in enumerate(changes):
            by_task.setdefault(task_id, []).append(index)

        async def change_all(indexes: Sequence[int]) -> None:
            # Those of one task one after the other.
            for index in indexes:
                results[index] = await self.change(*changes[index])

        await side_by_side([partial(change_all, indexes) for indexes in by_task.values()])
        return results

    async def _find(self, task_id: str) -> Kept | None:
        try:
            async with self._calling():
                record, claimed = await self._client.hmget(f"{self._prefix}task:{task_id}", ["r", "c"])
        except StorageError as error:
            if isinstance(error.__cause__, WrongTypeError):
                # Somebody else's.
                self._decode(task_id, b"")
                return None
            raise
        return None if record is None else (record, claimed or b"")

    def _read(self, task_id: str, kept: Kept) -> TaskRecord | None:
        """Read a record, and apply the claims that there were since it was written."""
        encoded, claims = kept
        record = self._decode(task_id, encoded)
        for each in claims.decode().splitlines():
            worker, now, lease_until = each.rsplit(" ", 2)
            if record is not None:
                # It was due by the clock of whoever said so, which may be a little ahead of the other's.
                begun_at = max(float(now), record.run_at, record.lease_until or 0.0)
                record = claim(record, worker=worker, now=begun_at, lease_until=float(lease_until))
        return record

    def _remember(self, task_id: str, kept: Kept) -> None:
        if len(kept[0]) <= LARGEST_REMEMBERED:
            self._last[task_id] = kept
            if len(self._last) > MOST_REMEMBERED:
                del self._last[next(iter(self._last))]

    async def _replace(self, record: TaskRecord, kept: Kept, changed: TaskRecord) -> bool:
        """Put a task in the place of what it was, unless it isn't that any more."""
        new = msgspec.msgpack.encode(changed)
        ttl = expires = ""
        if changed.expires_at is not None and changed.finished_at is not None:
            # A key can't expire at once.
            ttl = str(max(int((changed.expires_at - changed.finished_at) * 1000), 1))
            expires = repr(changed.expires_at)
        due = due_at(changed)
        news = news_of(record, changed)
        arguments = [
            record.id,
            *kept,
            new,
            changed.status.value,
            "" if due is None else repr(due),
            ttl,
            expires,
            record.idempotency_key or "",
            "" if news is None else "1",
            "1" if changed.cancel_requested else "",
            repr(changed.run_at),
        ]
        if not await self._step("change", arguments):
            return False
        self._remember(record.id, (new, b""))
        if news is not None:
            self._tell(news)
        return True

    # What is due

    async def claim(
        self,
        names: Mapping[str, int | None],
        *,
        worker: str,
        now: float,
        lease_until: float,
        limit: int,
        task_id: str | None = None,
    ) -> Claimed:
        limits = [each for name, most in names.items() for each in (name, "" if most is None else most)]
        arguments = [worker, repr(now), repr(lease_until), limit, task_id or "", *limits]
        next_at, *found = await self._step("claim", arguments)
        runs: list[TaskRecord] = []
        for each_id, kept in triples(found):
            run = self._read(each_id, kept)
            if run is None:
                await self._run(SET_ASIDE, each_id)
            elif run.worker == worker:
                self._remember(each_id, kept)
                self._tell(News(each_id, run.name, run.status, run.cancel_requested, run))
                runs.append(run)
        return Claimed(runs, now if len(found) >= 3 * limit else float(next_at) if next_at else None)

    async def due(self, names: Sequence[str], now: float, limit: int) -> Claimed:
        next_at, *found = await self._run(DUE, repr(now), limit, *names)
        records: list[TaskRecord] = []
        for each_id, kept in triples(found):
            record = self._read(each_id, kept)
            if record is None:
                await self._run(SET_ASIDE, each_id)
            else:
                records.append(record)
        return Claimed(records, now if len(found) >= 3 * limit else float(next_at) if next_at else None)

    # Looking around

    async def page(
        self, now: float, *, status: TaskStatus | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[TaskRecord]:
        await self.forget(now)
        records: list[TaskRecord] = []
        while len(records) < limit:
            wanted = limit - len(records)
            found = await self._run(PAGE, "all" if status is None else f"status:{status.value}", after or "", wanted)
            if found is None:
                raise unknown_cursor(str(after))
            for each_id, kept in triples(found):
                after = each_id
                record = self._read(each_id, kept)
                if record is not None:
                    records.append(record)
            if len(found) < 3 * wanted:
                break
        return records

    async def count(self, now: float) -> dict[TaskStatus, int]:
        await self.forget(now)
        async with self._calling():
            return {status: await self._client.zcard(f"{self._prefix}status:{status.value}") for status in TaskStatus}

    async def forget(self, now: float) -> None:
        # A part at a time, since nobody else is served meanwhile.
        while await self._run(FORGET, repr(now)):
            pass

    # News

    def _tell(self, news: News | None) -> None:
        for tell in self._listeners:
            tell(news)

    async def news(self, tell: Tell, *, task_status: TaskStarted = TASK_STATUS_IGNORED) -> None:
        self._listeners.append(tell)
        try:
            async with create_task_group() as tasks:
                tasks.start_soon(self._keep_time)
                listening = Event()
                tasks.start_soon(self._listen_on, tell, listening)
                await listening.wait()
                task_status.started()
        finally:
            self._listeners.remove(tell)

    async def _keep_time(self) -> None:
        while True:
            await sleep(CLOCK_INTERVAL)
            try:
                await self._set_clock()
                async with self._calling():
                    await self._client.publish(self._own_channel, b"")
            except StorageError as error:
                logger.warning("the clock can't be read: %s", error)

    async def _listen_on(self, tell: Tell, listening: Event) -> None:
        """Listen, and begin again where that fails."""
        while True:
            try:
                await self._listen(tell, listening)
            except* (StorageError, RedisError, OSError) as errors:
                error: BaseException = errors
                while isinstance(error, BaseExceptionGroup):
                    error = error.exceptions[0]
                logger.warning("no news, which is tried again: %s", self._failure(error))
            listening.set()
            await sleep(AGAIN)

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        counts = self._listens >= 0
        self._listens += counts
        try:
            yield
        finally:
            self._listens -= counts

    async def _listen(self, tell: Tell, listening: Event) -> None:
        channels = [f"{self._prefix}news", self._own_channel]
        # A lost connection ends the block. coredis would wait for longer each time before it connects again, and
        # could not be left meanwhile.
        pubsub = self._client.pubsub(channels=channels, retry_policy=NoRetryPolicy())
        async with pubsub as messages, self._listening():
            # Where nothing comes for so long, not even our own, the connection is dead.
            while (message := await messages.get_message(timeout=2 * CLOCK_INTERVAL)) is not None:
                data = message["data"]
                if not isinstance(data, bytes):
                    # That it has been subscribed to, for the first time or once more.
                    listening.set()
                    tell(None)
                elif data:
                    for each in self._news_in(data):
                        tell(each)

    def _news_in(self, data: bytes) -> list[News | None]:
        """Read a message; None where only something is known to have happened."""
        try:
            writer, *changes = msgspec.msgpack.decode(data)
            if writer == self._writer:
                return []
            # Too many are not told one by one.
            return [News(each, name, TaskStatus(status), cancels) for each, name, status, cancels in changes] or [None]
        except (msgspec.DecodeError, ValueError, TypeError):
            # Somebody else's.
            return [None]


async def side_by_side(steps: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Take steps at the same time; the first error of all is raised once all have ended."""
    errors: list[StorageError] = []

    async def take(step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except StorageError as error:
            errors.append(error)

    async with create_task_group() as tasks:
        for step in steps:
            tasks.start_soon(take, step)
    if errors:
        raise errors[0]


def triples(found: Sequence[bytes | None]) -> Iterator[tuple[str, Kept]]:
    """Give what a script has found: ids, each with the record and the claim."""
    for at in range(0, len(found), 3):
        task_id, record, claimed = found[at : at + 3]
        assert task_id is not None
        yield task_id.decode(), (record or b"", claimed or b"")
