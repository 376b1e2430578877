"""Tasks in Redis, which processes on several machines may share."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from coredis import Redis
from coredis.exceptions import RedisError

from chanflow._storage import StorageError
from chanflow.tasks.record import TaskRecord, TaskStatus, expired, looked_for_at
from chanflow.tasks.store import Change, Store

__all__ = ["RedisStore"]

# A record is one string, which Redis lets expire by itself. Beside it are sorted sets of ids: all and those of each
# status, by the order of their making; those to look for, and those that expire, by the time of that. Each script is
# one step. The keys are made from one prefix, so that they need one Redis, not a cluster.
CREATE = """
local prefix, id, record, looked, key = ARGV[1], ARGV[2], ARGV[3], ARGV[4], ARGV[5]
if key ~= '' then
    local there = redis.call('GET', prefix .. 'key:' .. key)
    local kept = there and redis.call('GET', prefix .. 'task:' .. there)
    if kept then return kept end
    redis.call('SET', prefix .. 'key:' .. key, id)
end
local number = redis.call('INCR', prefix .. 'number')
redis.call('SET', prefix .. 'task:' .. id, record)
redis.call('ZADD', prefix .. 'all', number, id)
redis.call('ZADD', prefix .. 'status:' .. ARGV[6], number, id)
if looked ~= '' then redis.call('ZADD', prefix .. 'looked', looked, id) end
return false
"""
CHANGE = """
local prefix, id, old, new = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local task = prefix .. 'task:' .. id
if redis.call('GET', task) ~= old then return 0 end
local looked, ttl, expires, key = ARGV[7], ARGV[8], ARGV[9], ARGV[10]
if ttl ~= '' then redis.call('SET', task, new, 'PX', ttl) else redis.call('SET', task, new) end
if ARGV[5] ~= ARGV[6] then
    redis.call('ZREM', prefix .. 'status:' .. ARGV[5], id)
    redis.call('ZADD', prefix .. 'status:' .. ARGV[6], redis.call('ZSCORE', prefix .. 'all', id), id)
end
if looked ~= '' then redis.call('ZADD', prefix .. 'looked', looked, id)
else redis.call('ZREM', prefix .. 'looked', id) end
if expires ~= '' then redis.call('ZADD', prefix .. 'expiring', expires, id)
else redis.call('ZREM', prefix .. 'expiring', id) end
if key ~= '' then
    if ttl ~= '' then redis.call('PEXPIRE', prefix .. 'key:' .. key, ttl)
    else redis.call('PERSIST', prefix .. 'key:' .. key) end
end
return 1
"""
FORGET = """
local prefix = ARGV[1]
for _, id in ipairs(redis.call('ZRANGEBYSCORE', prefix .. 'expiring', '-inf', ARGV[2], 'LIMIT', 0, 1000)) do
    redis.call('DEL', prefix .. 'task:' .. id)
    for index = 3, #ARGV do redis.call('ZREM', prefix .. ARGV[index], id) end
end
return redis.call('ZCOUNT', prefix .. 'expiring', '-inf', ARGV[2])
"""
PAGE = """
local prefix, chosen, after, limit = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local below = '+inf'
if after ~= '' then
    local number = redis.call('ZSCORE', prefix .. 'all', after)
    if not number then return {} end
    below = '(' .. number
end
local records = {}
for _, id in ipairs(redis.call('ZREVRANGEBYSCORE', prefix .. chosen, below, '-inf', 'LIMIT', 0, limit)) do
    table.insert(records, redis.call('GET', prefix .. 'task:' .. id) or nil)
end
return records
"""
NEGLECTED = """
return redis.call('ZRANGEBYSCORE', ARGV[1] .. 'looked', '-inf', ARGV[2], 'LIMIT', 0, ARGV[3])
"""
MOST_REMEMBERED = 10_000
LARGEST_REMEMBERED = 1000
"""Bytes."""
INDEXES = ("all", "looked", "expiring", *(f"status:{status.value}" for status in TaskStatus))


class RedisStore(Store):
    """Tasks in Redis.

    Args:
        url: as `redis://host:port/database`; `rediss://` for TLS, `unix://` for a socket.
        prefix: what the keys begin with.
    """

    durable = True
    shared = True

    def __init__(self, url: str, *, prefix: str = "chanflow:tasks:") -> None:
        self._url = url
        self._prefix = prefix
        self._client: Redis[bytes]
        # What the last tasks that this process made or changed were kept as: mostly they still are.
        self._last: dict[str, bytes] = {}

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[None]:
        try:
            yield
        except (RedisError, OSError) as error:
            msg = f"{self._url}: {error or type(error).__name__}"
            raise StorageError(msg) from error

    async def open(self) -> None:
        client: Redis[bytes] = Redis.from_url(self._url)
        async with self._calling():
            self._client = await client.__aenter__()
        try:
            async with self._calling():
                await self._client.ping()
        except BaseException:
            await self.aclose()
            raise

    async def aclose(self) -> None:
        await self._client.__aexit__(None, None, None)

    async def _run(self, script: str, *arguments: str | bytes | float) -> Any:
        async with self._calling():
            return await self._client.eval(script, args=[self._prefix, *arguments])

    async def create(self, record: TaskRecord) -> TaskRecord:
        if record.idempotency_key is not None:
            # The key may be that of a task whose time is over.
            await self.forget(record.created_at)
        encoded = msgspec.msgpack.encode(record)
        kept = await self._run(
            CREATE,
            record.id,
            encoded,
            "" if record.status.is_end else repr(looked_for_at(record)),
            record.idempotency_key or "",
            record.status.value,
        )
        if kept:
            return decode(kept)
        self._remember(record, encoded)
        return record

    async def get(self, task_id: str, now: float) -> TaskRecord | None:
        if (encoded := self._last.get(task_id)) is not None and (last := decode(encoded)).status is TaskStatus.SUCCESS:
            # It stays so until it expires.
            return None if expired(last, now) else last
        encoded = await self._find(task_id)
        record = None if encoded is None else decode(encoded)
        return None if record is None or expired(record, now) else record

    async def change(self, task_id: str, change: Change) -> TaskRecord | None:
        encoded = self._last.pop(task_id, None)
        remembered = encoded is not None
        while True:
            if encoded is None:
                encoded = await self._find(task_id)
                if encoded is None:
                    return None
            record = decode(encoded)
            changed = change(record)
            if changed is not None and await self._replace(record, encoded, changed):
                return changed
            if changed is None and not remembered:
                return None
            # Somebody else has changed it.
            encoded, remembered = None, False

    async def _find(self, task_id: str) -> bytes | None:
        async with self._calling():
            return await self._client.get(f"{self._prefix}task:{task_id}")

    def _remember(self, record: TaskRecord, encoded: bytes) -> None:
        if len(encoded) <= LARGEST_REMEMBERED:
            self._last[record.id] = encoded
            if len(self._last) > MOST_REMEMBERED:
                del self._last[next(iter(self._last))]

    async def _replace(self, record: TaskRecord, encoded: bytes, changed: TaskRecord) -> bool:
        """Put a task in the place of what it was, unless it isn't that any more."""
        new = msgspec.msgpack.encode(changed)
        ttl = expires = ""
        if changed.expires_at is not None and changed.finished_at is not None:
            # A key can't expire at once.
            ttl = str(max(int((changed.expires_at - changed.finished_at) * 1000), 1))
            expires = repr(changed.expires_at)
        looked = "" if changed.status.is_end else repr(looked_for_at(changed))
        replaced = await self._run(
            CHANGE,
            record.id,
            encoded,
            new,
            record.status.value,
            changed.status.value,
            looked,
            ttl,
            expires,
            record.idempotency_key or "",
        )
        if replaced:
            self._remember(changed, new)
        return bool(replaced)

    async def page(
        self, now: float, *, status: TaskStatus | None = None, after: str | None = None, limit: int = 100
    ) -> Sequence[TaskRecord]:
        await self.forget(now)
        chosen = "all" if status is None else f"status:{status.value}"
        return [decode(each) for each in await self._run(PAGE, chosen, after or "", limit)]

    async def count(self, now: float) -> dict[TaskStatus, int]:
        await self.forget(now)
        async with self._calling():
            return {status: await self._client.zcard(f"{self._prefix}status:{status.value}") for status in TaskStatus}

    async def neglected(self, since: float, limit: int) -> Sequence[str]:
        return [task_id.decode() for task_id in await self._run(NEGLECTED, repr(since), limit)]

    async def forget(self, now: float) -> None:
        # A part at a time, since nobody else is served meanwhile.
        while await self._run(FORGET, repr(now), *INDEXES):
            pass


def decode(encoded: bytes) -> TaskRecord:
    """Read a record."""
    return msgspec.msgpack.decode(encoded, type=TaskRecord)
