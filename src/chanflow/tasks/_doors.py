"""The task service with its doors: what others reach it by, each of which needs more than the service itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias

from chanflow._check import check_count, check_seconds, show
from chanflow.tasks._service import ServiceCore
from chanflow.tasks._token import Token

__all__ = ["TaskService"]

ASGIApp: TypeAlias = Callable[[Any, Any, Any], Awaitable[None]]


class TaskService(ServiceCore):
    """Tasks that are submitted now and asked for later, run by a bounded number of workers.

    Register handlers with `task`, then enter the service as a context manager: its workers run until the block is
    left. Leaving it waits for the tasks that run; what is still pending stays in the store, for the next worker.
    The store is the queue: all services on one store share its tasks, and each runs those whose handlers it has.
    An error or a cancellation stops at once: what runs is cancelled and put back.

    A task is run at least once, and its record tells how it ended until `ttl` seconds after that. A worker that was
    killed loses its lease, and the task runs again if it has attempts left.

    Args:
        bus: for work that travels through a broker: a URL for `chanflow.bus.connect`, or a `Bus`, which the service
            closes. The ids of tasks that are due are published there, and messages claim them in the store.
            `memory://`, or the store's own URL, means the store alone.
        store: where the tasks are kept: `memory://`, `sqlite:///file.db`, which keeps them through a restart and lets
            several processes share them, or a `Store`.
        workers: how many tasks may run here at the same time, at least 0: with 0, this process only submits.
        ttl: for how many seconds a finished task is kept, from 0 to a hundred years, or `math.inf` for ever.
        lease: seconds after which a worker that gave no sign of life is taken for gone, greater than 0, and at most a
            hundred years.

    Raises:
        ValueError, TypeError: an argument is not as said above.
    """

    def asgi(
        self,
        *,
        tokens: Sequence[str | Token] | None = None,
        hosts: Sequence[str] | None = None,
        cors: Sequence[str] = (),
        max_pending: int = 1000,
        max_body: int = 1_000_000,
        max_wait: float = 60.0,
        dead_letters: Sequence[str] = (),
    ) -> ASGIApp:
        """Make an ASGI app that serves the tasks over HTTP, with a dashboard at its root.

        Served by itself, it enters the service's block. Mounted in another app, it leaves that to the other's
        lifespan.

        Args:
            tokens: bearer tokens of which a request needs one, each a `Token`, or the secret of one that allows
                everything; None for none needed.
            hosts: names and addresses, without ports: a request whose `Host` is none of them is refused. None for any,
                which is for whoever serves tasks with tokens, or mounts them in an app that looks at hosts itself:
                otherwise, any page in a browser that can reach the service can read it, by a name of its own.
            cors: origins, such as `https://app.example`, whose pages may use the service from a browser as any client
                may.
            max_pending: how many tasks may be pending before more are refused, at least 1.
            max_body: how many bytes the body of a request may have, at least 1.
            max_wait: for how many seconds a request may wait for a task's end, at least 0.
            dead_letters: dead-letter topics of the service's bus, for the dashboard.

        Raises:
            ModuleNotFoundError: what it needs is not installed.
            TypeError, ValueError: an argument is not as said above.
        """
        check_count("max_pending", max_pending, 1)
        check_count("max_body", max_body, 1)
        check_seconds("max_wait", max_wait)
        if isinstance(dead_letters, str):
            msg = f"dead_letters must be a sequence of topics, got {show(dead_letters)}"
            raise TypeError(msg)
        from chanflow.tasks.http._app import make_app  # noqa: PLC0415 -- what it needs may be missing

        return make_app(
            self,
            tokens=tokens,
            hosts=hosts,
            cors=cors,
            max_pending=max_pending,
            max_body=max_body,
            max_wait=max_wait,
            dead_letters=dead_letters,
        )
