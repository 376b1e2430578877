"""Where the workers' tasks come from: the store itself, which is the queue."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from itertools import count
from secrets import token_hex
from typing import Protocol

from anyio import move_on_after, sleep

from chanflow._errors import StorageError
from chanflow._loop._home import running_home
from chanflow._loop._signal import Signal
from chanflow.tasks.record import TaskRecord, TaskStatus
from chanflow.tasks.store import Claimed, News, Store

__all__ = ["AGAIN", "Dispatch", "Pool", "StoreDispatch"]

logger = logging.getLogger("chanflow.tasks")

AGAIN = 1.0
"""Seconds to wait for a store or a bus that failed."""
POLL = 1.0
"""The most seconds from one look into a shared store to the next: news may get lost."""
LEAST = 0.001
"""The least."""
CLAIM_TIMEOUT = 30.0
"""Seconds that a claim may take, even if its caller is cancelled: a task that it took must not be lost sight of."""


class Pool(Protocol):
    """The workers, as a dispatch sees them."""

    async def room(self) -> int:
        """Wait for a worker that has nothing to do, and tell how many there are; 0 once they take nothing more."""
        ...

    async def take(self, records: Sequence[TaskRecord]) -> None:
        """Run what was claimed, which is no more than there is room for."""
        ...


class Dispatch(ABC):
    """Brings the tasks to the workers.

    Args:
        store: where the tasks are.
        limits: the handlers here, each with how many of its tasks may run at the same time in all processes, or None.
        lease: seconds for which a claim holds.
    """

    def __init__(self, store: Store, limits: Mapping[str, int | None], lease: float) -> None:
        self._store = store
        self._limits = limits
        self._lease = lease
        self._home = running_home()
        # That there may be something to do.
        self._bell = Signal()
        # What tells the claims from one another, in all processes.
        own = token_hex(8)
        self._ids = (f"{own}.{number}" for number in count(1))

    @abstractmethod
    async def serve(self, pool: Pool) -> None:
        """Bring tasks to the workers, until they take nothing more."""

    @abstractmethod
    async def keep(self) -> None:
        """Do what has to be done beside that, also where there are no workers; until cancelled."""

    def hear(self, news: News | None) -> None:
        """Be told of a change of a task."""
        if news is None or (
            news.name in self._limits
            and (
                news.status is TaskStatus.PENDING
                # It makes room for the next one.
                or (self._limits[news.name] is not None and news.status.is_end)
            )
        ):
            self._ring(news)

    def _ring(self, news: News | None) -> None:
        """Wake whoever waits for such news."""
        del news
        self._bell.send()

    def stop(self) -> None:
        """Be told that the workers take nothing more."""
        self._bell.send()

    async def _claim(self, limits: Mapping[str, int | None], limit: int, task_id: str | None = None) -> Claimed:
        now = self._store.now()
        with move_on_after(CLAIM_TIMEOUT, shield=True):
            return await self._store.claim(
                limits, worker=next(self._ids), now=now, lease_until=now + self._lease, limit=limit, task_id=task_id
            )
        msg = f"the store has not answered for {CLAIM_TIMEOUT:g} s"
        raise StorageError(msg)

    async def _wait(self, next_at: float | None, bell: Signal) -> None:
        """Wait until the bell rings, or until a time at which there may be something to do."""
        seconds = math.inf if next_at is None else max(next_at - self._store.now(), LEAST)
        if self._store.shared:
            seconds = min(seconds, POLL)
        await bell.wait(self._home, None if seconds == math.inf else self._home.time() + seconds)


class StoreDispatch(Dispatch):
    """Claims tasks from the store as workers become idle."""

    async def keep(self) -> None:
        """Nothing needs to be done."""

    async def serve(self, pool: Pool) -> None:
        while room := await pool.room():
            try:
                claimed = await self._claim(self._limits, room)
            except StorageError as error:
                logger.error("the store failed, and is tried again in %g s: %s", AGAIN, error)  # noqa: TRY400
                await sleep(AGAIN)
                continue
            await pool.take(claimed.records)
            if len(claimed.records) < room:
                await self._wait(claimed.next_at, self._bell)
