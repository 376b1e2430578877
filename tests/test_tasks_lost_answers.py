"""A Redis whose answers get lost on the way: each step is safe to repeat."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.lowlevel
import pytest
from anyio import connect_unix, create_task_group, create_unix_listener, fail_after, sleep
from anyio.abc import ByteStream
from coredis.tokens import PureToken

from chanflow.bus import StorageError
from chanflow.tasks import TaskRecord, TaskService, TaskStatus
from chanflow.tasks.record import cancel, claim, finish, put_back
from chanflow.tasks.stores import redis as redis_module
from chanflow.tasks.stores.redis import RedisStore
from tests.support.redis import running_redis

pytestmark = [pytest.mark.anyio, pytest.mark.real_time]

NOW = 1000.0


class Proxy:
    """Passes on what is asked, and loses some answers: it closes the connection instead."""

    def __init__(self, path: str) -> None:
        self._path = path
        self.lose = False
        self.lost = 0
        self.every = 1
        self._answers = 0
        self.before_loss: Callable[[], Awaitable[None]] | None = None

    async def serve(self, client: ByteStream) -> None:
        async with client, await connect_unix(self._path) as server:
            asked: list[bytes] = []
            async with create_task_group() as tasks:
                tasks.start_soon(self._pass_on, client, server, asked, tasks)
                await self._answer(client, server, asked)
                tasks.cancel_scope.cancel()

    async def _pass_on(self, client: ByteStream, server: ByteStream, asked: list[bytes], tasks: Any) -> None:
        try:
            async for data in client:
                asked.append(data)
                await server.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        tasks.cancel_scope.cancel()

    async def _answer(self, client: ByteStream, server: ByteStream, asked: list[bytes]) -> None:
        try:
            async for data in server:
                # Only those of scripts, not those of a connection that begins or listens.
                is_step = any(b"EVAL" in each for each in asked)
                asked.clear()
                self._answers += is_step
                if self.lose and is_step and self._answers % self.every == 0:
                    self.lost += 1
                    if self.before_loss is not None:
                        await self.before_loss()
                    return
                await client.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass


@asynccontextmanager
async def losing_answers() -> AsyncIterator[tuple[Proxy, str, str]]:
    """Run a Redis behind a proxy, and give the proxy, its URL and that of the server itself."""
    with running_redis() as url, TemporaryDirectory() as directory:
        proxy = Proxy(urlsplit(url).path)
        path = Path(directory) / "proxy"
        async with await create_unix_listener(path) as listener, create_task_group() as tasks:
            tasks.start_soon(listener.serve, proxy.serve)
            yield proxy, f"unix://{path}", url
            tasks.cancel_scope.cancel()


def task(number: int, **fields: Any) -> TaskRecord:
    return TaskRecord(id=f"task {number}", name="work", arguments=b"\x80", created_at=NOW, run_at=NOW, **fields)


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[RedisStore]:
    store = RedisStore(url)
    await store.open()
    # So that the server knows the script already.
    await store.claim({}, worker="nobody", now=NOW, lease_until=NOW, limit=1)
    yield store
    await store.aclose()


async def once(proxy: Proxy, step: Any) -> Any:
    """Take a step whose first answer is lost."""
    before = proxy.lost
    proxy.lose = True

    async def stop() -> None:
        while proxy.lost == before:  # noqa: ASYNC110 -- the proxy tells by a number alone
            await sleep(0.001)
        proxy.lose = False

    async with create_task_group() as tasks:
        tasks.start_soon(stop)
        with fail_after(10.0):
            result = await step
    assert proxy.lost == before + 1
    return result


async def test_each_step_is_safe_to_repeat() -> None:
    """A step whose answer is lost is asked for again by the client, and has the same result as if it were not."""
    async with losing_answers() as (proxy, url, direct), opened(url) as store, opened(direct) as other:
        # Created once, also with a key.
        assert await once(proxy, store.create(task(1))) == task(1)
        keyed = task(2, idempotency_key="key")
        assert await once(proxy, store.create(keyed)) == keyed
        assert await once(proxy, store.create_many([task(3), task(4)])) == [task(3), task(4)]
        assert (await other.count(NOW))[TaskStatus.PENDING] == 4
        # Claimed once: the second time gives the same tasks, and no more.
        claimed = await once(proxy, store.claim({"work": None}, worker="a", now=NOW, lease_until=NOW + 10, limit=2))
        assert [(run.id, run.attempts) for run in claimed.records] == [("task 1", 1), ("task 2", 1)]
        assert (await other.count(NOW))[TaskStatus.RUNNING] == 2
        # Changed once: what is there already is done.
        success = partial(finish, worker="a", status=TaskStatus.SUCCESS, now=NOW, ttl=1000.0, result=b"\x01")
        done = await once(proxy, store.change("task 1", success))
        assert done is not None
        assert (done.status, done.result) == (TaskStatus.SUCCESS, b"\x01")
        back = await once(proxy, store.change("task 2", partial(put_back, worker="a", run_at=NOW + 5)))
        assert back is not None
        assert (back.status, back.attempts) == (TaskStatus.PENDING, 1)
        assert await once(proxy, store.change("task 2", partial(cancel, now=NOW, ttl=1000.0))) is not None
        assert await once(proxy, store.change("task 3", partial(claim, worker="b", now=NOW, lease_until=NOW + 10)))
        for number, status in enumerate(("success", "cancelled", "running", "pending"), 1):
            record = await other.get(f"task {number}", NOW)
            assert record is not None
            assert record.status == status
        counts = await other.count(NOW)
        assert [counts[status] for status in TaskStatus] == [1, 1, 1, 0, 1]


async def test_a_repeated_step_does_not_overwrite_what_came_after_it() -> None:
    """Between the two, another process may have begun or ended the task."""
    async with losing_answers() as (proxy, url, direct), opened(url) as store, opened(direct) as other:

        async def meddle() -> None:
            [run] = (await other.claim({"work": None}, worker="b", now=NOW, lease_until=NOW + 9, limit=1)).records
            await other.change(
                run.id, partial(finish, worker="b", status=TaskStatus.SUCCESS, now=NOW, ttl=1000.0, result=b"\x07")
            )
            proxy.lose = False

        proxy.before_loss, proxy.lose = meddle, True
        with fail_after(10.0):
            kept = await store.create(task(1))
        assert proxy.lost == 1
        # By somebody who remembers nothing of it.
        async with opened(direct) as fresh:
            found = await fresh.get("task 1", NOW)
        assert found is not None
        assert (found.status, found.result) == (TaskStatus.SUCCESS, b"\x07")
        assert kept.id == "task 1"


async def test_a_service_behind_a_line_that_loses_answers() -> None:
    """Each task runs once and has its own result, though every fifth answer is lost."""
    runs: Counter[int] = Counter()

    async def work(number: int) -> int:
        runs[number] += 1
        return number * 2

    async with losing_answers() as (proxy, url, _direct):
        service = TaskService(store=url, workers=5)
        service.task(work)
        async with service:
            proxy.every, proxy.lose = 5, True
            with fail_after(8.0):
                ids = [await service.submit("work", number=number) for number in range(50)]
                assert [await service.result(task_id) for task_id in ids] == [number * 2 for number in range(50)]
            proxy.lose = False
        assert proxy.lost > 5
    assert runs == Counter(range(50))


async def test_a_claim_that_is_repeated_too_late() -> None:
    """What it took meanwhile belongs to another, whose lease is newer, and is not given again."""
    async with losing_answers() as (_proxy, _url, direct), opened(direct) as store:
        await store.create(task(1))
        begin = partial(store.claim, {"work": None}, limit=1)
        assert len((await begin(worker="a", now=NOW, lease_until=NOW + 1)).records) == 1
        assert len((await begin(worker="a", now=NOW, lease_until=NOW + 1)).records) == 1
        assert len((await begin(worker="b", now=NOW + 1, lease_until=NOW + 2)).records) == 1
        assert (await begin(worker="a", now=NOW, lease_until=NOW + 1)).records == []


# coredis leaves a stream of a lost connection open.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function MemoryObject:pytest.PytestUnraisableExceptionWarning"
)
async def test_a_subscription_that_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """The news go on at once, or `until` fails, however often; and whoever listens is told that some may be missed."""
    monkeypatch.setattr(redis_module, "AGAIN", 0.01)
    monkeypatch.setattr(redis_module, "CLOCK_INTERVAL", 0.2)
    heard: list[Any] = []

    async def until(is_heard: Callable[[], bool]) -> None:
        with fail_after(10.0):
            while not is_heard():  # noqa: ASYNC110 -- nobody tells that it has been told
                await sleep(0.01)

    async with (
        losing_answers() as (_proxy, _url, direct),
        opened(direct) as store,
        opened(direct) as other,
        create_task_group() as tasks,
    ):
        await tasks.start(store.news, heard.append)
        for number in range(6):
            heard.clear()
            await other._client.client_kill(type_=PureToken.PUBSUB)
            await until(lambda: None in heard)
            await other.create(task(number))
            name = f"task {number}"
            await until(lambda name=name: any(news is not None and news.id == name for news in heard))  # type: ignore[misc]
        tasks.cancel_scope.cancel()
    gc.collect()


async def test_news_that_can_be_heard_only_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A server that refuses to be listened to, or to tell the time, is asked again; all else works meanwhile."""
    monkeypatch.setattr(redis_module, "AGAIN", 0.01)
    monkeypatch.setattr(redis_module, "CLOCK_INTERVAL", 0.01)
    async with losing_answers() as (_proxy, _url, direct), opened(direct) as store:
        listen, set_clock = store._listen, store._set_clock
        refusals = 3

        async def refuse(*_arguments: Any) -> None:
            nonlocal refusals
            refusals -= 1
            if refusals == 0:
                store._listen, store._set_clock = listen, set_clock  # type: ignore[method-assign]
            msg = "not now"
            raise StorageError(msg)

        store._listen = store._set_clock = refuse  # type: ignore[method-assign, assignment]
        heard: list[Any] = []
        async with create_task_group() as tasks:
            await tasks.start(store.news, heard.append)
            await store.create(task(1))
            with fail_after(10.0):
                while None not in heard:  # noqa: ASYNC110 -- as above
                    await sleep(0.01)
            tasks.cancel_scope.cancel()
        assert [news.id for news in heard if news is not None] == ["task 1"]
        assert "no news, which is tried again: not now" in caplog.text
        assert "the clock can't be read: not now" in caplog.text


async def test_a_step_that_fails_fails_for_all_who_wait() -> None:
    """Each of those who went together is told, and nothing of them is left behind."""
    async with losing_answers() as (_proxy, _url, direct), opened(direct) as store:
        heard: list[Any] = []
        store._listeners.append(heard.append)
        await store._client.set("chanflow:tasks:all", "a stranger's")
        errors: list[str] = []

        async def create(number: int) -> None:
            try:
                await store.create(task(number))
            except StorageError as error:
                errors.append(str(error))

        async with create_task_group() as tasks:
            for number in range(5):
                tasks.start_soon(create, number)
        assert len(errors) == 5
        assert heard == [None] * 5
        with pytest.raises(StorageError, match="wrong kind of value"):
            await store.create(task(9))
        await store._client.delete(["chanflow:tasks:all"])
        await store.create(task(7))
        await store._client.delete(["chanflow:tasks:status:running"])
        await store._client.set("chanflow:tasks:status:running", "a stranger's")
        begin = partial(claim, worker="a", now=NOW, lease_until=NOW + 1)
        with pytest.raises(StorageError, match="wrong kind of value"):
            await store.change_many([("task 7", begin)])


async def test_whoever_is_cancelled_leaves_the_others_alone() -> None:
    """Steps that go together with those of a caller who is cancelled are taken all the same."""
    async with losing_answers() as (_proxy, _url, direct), opened(direct) as store:
        kept: list[str] = []

        async def create(number: int) -> None:
            kept.append((await store.create(task(number))).id)

        async with create_task_group() as tasks, create_task_group() as first:
            first.start_soon(create, 0)
            await anyio.lowlevel.checkpoint()
            for number in range(1, 4):
                tasks.start_soon(create, number)
            await anyio.lowlevel.checkpoint()
            first.cancel_scope.cancel()
        assert {"task 1", "task 2", "task 3"} <= set(kept)
        assert not store._together._waiting


async def test_a_task_whose_key_is_anothers_that_cannot_be_read() -> None:
    """That is an error, rather than a second task with this key."""
    async with losing_answers() as (_proxy, _url, direct), opened(direct) as store:
        await store.create(task(1, idempotency_key="key"))
        await store._client.hset("chanflow:tasks:task:task 1", {"r": b"garbage"})
        with pytest.raises(StorageError, match="the task with the idempotency key 'key' can't be read"):
            await store.create(task(2, idempotency_key="key"))
        # A page goes on behind what can't be read.
        await store.create_many([task(3), task(4)])
        assert [record.id for record in await store.page(NOW, limit=3)] == ["task 4", "task 3"]
