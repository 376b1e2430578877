"""A client for the Redis that a URL names: a server, a cluster, or what sentinels watch."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Any, TypeAlias

from anyio import CancelScope
from coredis import Redis, RedisCluster, Sentinel
from coredis.connection import TCPConnection, TCPLocation, UnixDomainSocketConnection, UnixDomainSocketLocation
from coredis.connection._sentinel import SentinelManagedConnection
from coredis.exceptions import ClusterDownError
from coredis.exceptions import ConnectionError as RedisConnectionError
from coredis.pool import ClusterConnectionPool, ConnectionPool, SentinelConnectionPool
from coredis.retry import CompositeRetryPolicy, ConstantRetryPolicy, RetryPolicy

from chanflow.tasks.stores._redis_url import RedisUrl

__all__ = ["Client", "connect"]

Client: TypeAlias = "Redis[bytes] | RedisCluster[bytes]"


# coredis loses a place in a pool, of which there are 64, for each connection whose making is cancelled; with none
# left, everybody would wait for ever. A connection is made, or not, within its timeouts.


class ServerPool(ConnectionPool[Any]):
    async def get_connection(self, **options: Any) -> Any:
        with CancelScope(shield=True):
            return await super().get_connection(**options)


class SentinelPool(SentinelConnectionPool):
    async def get_connection(self, **options: Any) -> Any:
        with CancelScope(shield=True):
            return await super().get_connection(**options)

    async def _construct_connection(self) -> SentinelManagedConnection:
        try:
            return await super()._construct_connection()
        except BaseException:
            # It loses the place, too, where the sentinels don't know a server.
            self._available_connections.append_nowait(None)
            raise


class ClusterPool(ClusterConnectionPool):
    def __init__(self, nodes: list[TCPLocation], **options: Any) -> None:
        super().__init__(nodes, **options)
        refresh, discovery = self.cluster_layout._refresh, self.cluster_layout._discovery_service  # noqa: SLF001

        async def refresh_or_fail() -> None:
            try:
                await refresh()
            except (OSError, ExceptionGroup) as error:
                # From a node that doesn't answer: it would end the pool. The next time, another may be asked first.
                random.shuffle(discovery._startup_nodes)  # noqa: SLF001
                first = error.exceptions[0] if isinstance(error, ExceptionGroup) else error
                msg = f"a node of the cluster does not answer: {first}"
                raise RedisConnectionError(msg) from error

        self.cluster_layout._refresh = refresh_or_fail  # type: ignore[method-assign]  # noqa: SLF001

    async def get_connection(self, *arguments: Any, **options: Any) -> Any:
        with CancelScope(shield=True):
            return await super().get_connection(*arguments, **options)

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        try:
            await super().__aexit__(exc_type, exc_val, exc_tb)
        finally:
            for stream in self.cluster_layout._error_stream:  # noqa: SLF001
                stream.close()


async def connect(url: RedisUrl, stack: AsyncExitStack) -> Client:
    """Make a client, which connects when it is first used, and lasts for as long as the stack."""
    options: dict[str, Any] = {
        "connect_timeout": url.connect_timeout,
        "stream_timeout": url.stream_timeout,
        "ssl_context": url.ssl_context,
    }
    access: dict[str, Any] = {"username": url.username, "password": url.password, "client_name": url.client_name}
    locations = [TCPLocation(host, port) for host, port in url.hosts]
    # An answer that got lost is asked for again, but not beyond the time that one answer may take.
    lost: RetryPolicy = ConstantRetryPolicy(
        (RedisConnectionError, TimeoutError), retries=2, delay=0.01, deadline=url.stream_timeout
    )
    if url.kind == "cluster":
        down = ConstantRetryPolicy((ClusterDownError,), retries=2, delay=0.1, deadline=url.stream_timeout)
        cluster: RedisCluster[bytes] = RedisCluster(
            connection_pool=ClusterPool(locations, **options, **access),
            retry_policy=CompositeRetryPolicy(down, lost),
        )
        return await stack.enter_async_context(cluster)
    if url.kind == "sentinel":
        asking = {"username": url.sentinel_username, "password": url.sentinel_password, **options}
        sentinel: Sentinel[bytes] = Sentinel(
            locations, sentinel_kwargs=asking, retry_policy=lost, db=url.db, **options, **access
        )
        await stack.enter_async_context(sentinel)
        server = sentinel.primary_for(url.service, connection_pool_class=SentinelPool)
        return await stack.enter_async_context(server)
    location = UnixDomainSocketLocation(url.path) if url.path else locations[0]
    connection_class = UnixDomainSocketConnection if url.path else TCPConnection
    pool = ServerPool(connection_class=connection_class, location=location, db=url.db, **options, **access)
    client: Redis[bytes] = Redis(connection_pool=pool, retry_policy=lost)
    return await stack.enter_async_context(client)
