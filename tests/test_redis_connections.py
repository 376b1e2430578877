"""Connections to Redis: who may come in, how long a silent server holds anybody up, clusters and sentinels."""

from __future__ import annotations

import gc
import logging
import math
import traceback
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from urllib.parse import quote

import anyio
import pytest
from anyio import create_task_group, create_tcp_listener, fail_after, move_on_after, sleep
from anyio.abc import ByteStream, SocketAttribute
from coredis.exceptions import ConnectionError as RedisConnectionError

from chanflow.bus import StorageError
from chanflow.tasks import TaskService, TaskStatus
from chanflow.tasks.stores.redis import RedisStore
from tests.support.redis import Server, running_cluster, running_server

pytestmark = [
    pytest.mark.anyio,
    # coredis leaves streams of its own open when it can't connect.
    pytest.mark.filterwarnings(
        "ignore:Exception ignored in. <function MemoryObject:pytest.PytestUnraisableExceptionWarning"
    ),
]

QUICK = "connect_timeout=0.3&stream_timeout=0.3"
BOUND = 3.0
"""Seconds that a call with these may take at most: two answers and a connection, on a machine that has much to do."""
TOGETHER = 100
"""More than the places that coredis has for connections."""


@pytest.fixture(params=["asyncio", "trio"])
def anyio_backend(request: pytest.FixtureRequest) -> str:
    # A virtual clock doesn't wait for a server.
    return request.param


@pytest.fixture(autouse=True)
def collect() -> Iterator[None]:
    """Let what was left be told of in the test that left it."""
    yield
    gc.collect()


def service_on(url: str, workers: int = 2) -> TaskService:
    service = TaskService(store=url, workers=workers)

    @service.task
    async def double(number: int) -> int:
        return number * 2

    return service


async def is_used(url: str) -> None:
    """Two services share it: what one accepts the other runs, and both hear of it at once."""
    front, back = service_on(url, workers=0), service_on(url)
    async with front, back:
        with fail_after(20.0):
            for number in range(5):
                assert await front.result(await front.submit("double", number=number)) == number * 2
            assert (await front.count())[TaskStatus.SUCCESS] == 5
            assert len(await back.page(limit=3)) == 3


async def fails(url: str) -> StorageError:
    """Enter a service, and give the error that came of it in time."""
    with fail_after(BOUND), pytest.raises(StorageError) as caught:
        async with service_on(url):
            pass
    return caught.value


async def is_back(service: TaskService) -> None:
    """Wait until a service can use its store again."""
    with fail_after(20.0):
        while True:
            try:
                assert await service.result(await service.submit("double", number=4)) == 8
            except StorageError:
                await sleep(0.05)
            else:
                return


# Users


async def test_users() -> None:
    """A user and a password of any characters, percent-encoded, who may touch keys of one prefix only."""
    user, password = "us/er@", "p@ss:w/rd?#% é"
    with running_server() as server:
        server.ask("ACL", "SETUSER", user, "on", f">{password}", "~app:*", "&app:*", "+@all", "-@dangerous", "+keys")
        server.ask("ACL", "SETUSER", "default", "off")
        await is_used(f"redis://{quote(user, safe='')}:{quote(password, safe='')}@{server.place}/0?prefix=app:")
        error = await fails(f"redis://{quote(user, safe='')}:s3cret@{server.place}")
        assert str(error).startswith(f"redis://{server.place}: ")
        assert "s3cret" not in "".join(traceback.format_exception(error))


async def test_prefixes_keep_services_apart() -> None:
    """Services with different prefixes on one database know nothing of each other."""
    with running_server() as server:
        one, other = (service_on(f"redis://{server.place}?prefix={name}:") for name in ("one", "other"))
        async with one, other:
            task_id = await one.submit("double", number=1)
            assert await one.result(task_id) == 2
            assert (await other.count())[TaskStatus.SUCCESS] == 0
        assert {key.split(":")[0] for key in server.ask("KEYS", "*").split()} == {"one"}


# Servers that are none


@asynccontextmanager
async def saying(answer: bytes, times: float = math.inf) -> AsyncIterator[str]:
    """Listen, and answer all that comes with the same, or only so much of it; with nothing at all if that is empty."""

    async def serve(client: ByteStream) -> None:
        left = times if answer else 0
        async with client:
            try:
                async for _ in client:
                    if left > 0:
                        left -= 1
                        await client.send(answer)
            except (anyio.BrokenResourceError, anyio.ClosedResourceError):
                pass

    async with await create_tcp_listener(local_host="127.0.0.1") as listener, create_task_group() as tasks:
        tasks.start_soon(listener.serve, serve)
        port = listener.extra(SocketAttribute.local_port)  # noqa: S610 -- of anyio, not of Django
        yield f"127.0.0.1:{port}"
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize("scheme", ["redis", "rediss", "redis+cluster", "redis+sentinel"])
async def test_a_server_that_says_nothing(scheme: str) -> None:
    """It is one error within bounds, whatever was hoped to be there."""
    async with saying(b"") as place:
        path = "/main" if scheme == "redis+sentinel" else ""
        error = await fails(f"{scheme}://:s3cret@{place}{path}?{QUICK}")
        assert str(error).startswith(f"{scheme}://{place}{path}: ")


@pytest.mark.parametrize(
    "answer",
    [
        b"-ERR unknown command 'HELLO', with args beginning with: '3' 'AUTH' 'default' 's3cret'\r\n",
        b"-NOAUTH HELLO AUTH default s3cret\r\n",
        b"-LOADING s3cret\r\n",
        b"+s3cret\r\n",
        b"$6\r\ns3cret\r\n",
        b"HTTP/1.1 400 s3cret\r\n\r\n",
        b"\xff\xfe\r\n",
    ],
)
async def test_a_server_that_repeats_the_password(answer: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """What a server says is not told where it has the password: neither in the error, nor behind it, nor in the log."""
    caplog.set_level(logging.INFO)
    async with saying(answer) as place:
        error = await fails(f"redis://:s3cret@{place}?{QUICK}")
    assert str(error).startswith(f"redis://{place}: ")
    assert "s3cret" not in "".join(traceback.format_exception(error, limit=0))
    assert "s3cret" not in "".join(record.getMessage() for record in caplog.records)
    assert "s3cret" not in caplog.text


async def test_tls_to_a_plain_port() -> None:
    """It is one error within bounds."""
    with running_server() as server:
        error = await fails(f"rediss://:s3cret@{server.place}?{QUICK}")
        assert str(error).startswith(f"rediss://{server.place}: ")


# Servers that stop


async def test_a_server_that_stops_answering() -> None:
    """Each call is an error within bounds, and when it answers again, all is as before."""
    with running_server() as server:
        service = service_on(f"redis://{server.place}?{QUICK}")
        async with service:
            await is_back(service)
            server.stop()
            for _ in range(3):
                with fail_after(BOUND), pytest.raises(StorageError, match=f"^redis://{server.place}: .*timed out"):
                    await service.count()
            server.go_on()
            await is_back(service)
            server.stop()
            left_at = anyio.current_time()
        # The block is left in time, too.
        assert anyio.current_time() - left_at < BOUND


@pytest.mark.parametrize("kind", ["server", "cluster"])
async def test_calls_that_are_cancelled_leave_room(kind: str) -> None:
    """However many calls are cancelled while a connection is made, there is one for the next."""
    with running_cluster(1) as servers:
        [server] = servers
        scheme = "redis+cluster" if kind == "cluster" else "redis"
        prefix = "" if kind == "cluster" else "&prefix={chanflow:tasks}:"
        service = service_on(f"{scheme}://{server.place}?{QUICK}{prefix}")
        async with service:
            await is_back(service)
            server.stop()
            with pytest.raises(StorageError):
                await service.get("id")
            for _ in range(2):
                with move_on_after(0.1):
                    async with create_task_group() as tasks:
                        for number in range(TOGETHER):
                            tasks.start_soon(service.get, f"id {number}")
            server.go_on()
            await is_back(service)


# Clusters


async def test_a_cluster_of_one() -> None:
    """All keys are on one node, by the part of their prefix that is in braces."""
    with running_cluster(1) as [server]:
        await is_used(f"redis+cluster://{server.place}")
        assert {key.split("}")[0] for key in server.ask("KEYS", "*").split()} == {"{chanflow:tasks"}


async def test_a_node_that_says_nothing_of_its_cluster() -> None:
    """It is as one that is away, which is tried again: coredis would end the block of the service for it."""
    hello = b"%3\r\n$5\r\nproto\r\n:3\r\n$7\r\nversion\r\n$5\r\n7.0.0\r\n$2\r\nid\r\n:1\r\n"
    async with saying(hello, times=1) as place:
        error = await fails(f"redis+cluster://{place}?{QUICK}")
        said = "a node of the cluster does not answer: CLUSTER SLOTS timed out after 0.3 seconds"
        assert str(error).startswith(f"redis+cluster://{place}: {said}")
        assert isinstance(error.__cause__, RedisConnectionError)


@pytest.mark.slow
async def test_a_cluster_of_three() -> None:
    """It is used through any node, and survives that one hangs that it needs, and that all hang."""
    with running_cluster(3) as servers:
        places = [server.place for server in servers]
        for place in places:
            await is_used(f"redis+cluster://{place}?prefix={{{place}}}:")
        service = service_on(f"redis+cluster://{','.join(places)}?{QUICK}")
        async with service:
            await is_back(service)
            for server in servers:
                server.stop()
            for _ in range(4):
                with fail_after(BOUND), pytest.raises(StorageError):
                    await service.count()
            for server in servers:
                server.go_on()
            await is_back(service)


# Sentinels


def sentinel_of(server: Server) -> str:
    return f"sentinel monitor main 127.0.0.1 {server.port} 1\nsentinel down-after-milliseconds main 500\n"


async def test_a_sentinel() -> None:
    """The server that it names is used; one that it doesn't know is an error, however often it is asked for."""
    with running_server() as server, running_server("--sentinel", settings=sentinel_of(server)) as sentinel:
        await is_used(f"redis+sentinel://{sentinel.place}/main/2?prefix=app:")
        assert {key.split(":")[0] for key in server.ask("-n", "2", "KEYS", "*").split()} == {"app"}
        error = await fails(f"redis+sentinel://{sentinel.place}/other?{QUICK}")
        assert str(error) == (f"redis+sentinel://{sentinel.place}/other: No primary found for 'other'")
        service = service_on(f"redis+sentinel://{sentinel.place}/main?{QUICK}")
        async with service:
            await is_back(service)
            for each in server, sentinel:
                each.stop()
            with pytest.raises(StorageError):
                await service.get("id")
            sentinel.go_on()
            sentinel.ask("sentinel", "remove", "main")
            # Each of them looks for the server anew.
            for _ in range(TOGETHER):
                with fail_after(BOUND), pytest.raises(StorageError, match=r"No primary found for 'main'$"):
                    await service.get("id")
            sentinel.ask("sentinel", "monitor", "main", "127.0.0.1", str(server.port), "1")
            server.go_on()
            await is_back(service)


async def test_a_server_that_takes_too_long_while_the_store_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an error of the store, before there is a client, and the next time as well."""

    async def connect(*_arguments: object) -> None:
        raise TimeoutError

    monkeypatch.setattr("chanflow.tasks.stores.redis.connect", connect)
    store = RedisStore("redis://localhost")
    for _ in range(2):
        with pytest.raises(StorageError, match=r"^redis://localhost: TimeoutError$"):
            await store.open()
