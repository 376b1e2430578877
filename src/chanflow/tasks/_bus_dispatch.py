"""Tasks that reach their workers through a bus: the store stays the truth, a message says that a task is due."""

# Invariants:
# 1. A task is published once it is due, by the one service that noted so in its record. Submitting one doesn't wait for
#    the bus.
# 2. A message is acknowledged as soon as its task was claimed or can't be: what becomes of the task then is between the
#    worker and the store, which makes it due again if the worker is gone.

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from functools import partial

from anyio import Lock, create_task_group, sleep
from msgspec.structs import replace

from chanflow._errors import StorageError
from chanflow._loop._signal import Signal
from chanflow.bus import Bus, LeaseLostError, Message, Subscription
from chanflow.tasks._dispatch import AGAIN, Dispatch, Pool
from chanflow.tasks._handler import topic_of
from chanflow.tasks.record import TaskRecord, TaskStatus, publish
from chanflow.tasks.store import News, Store

__all__ = ["BusDispatch"]

logger = logging.getLogger("chanflow.tasks")

GROUP = "workers"
PART = 100
"""How many tasks that are due to look at together."""


class BusDispatch(Dispatch):
    """Publishes what is due, and claims what it is told of.

    Args:
        bus: carries the ids.
        workers: how many tasks may run here at the same time.
        store, limits, lease: as for any dispatch.
    """

    def __init__(self, bus: Bus, workers: int, store: Store, limits: Mapping[str, int | None], lease: float) -> None:
        super().__init__(store, limits, lease)
        self._bus = bus
        self._workers = workers
        # Of each handler, that there may be something to publish.
        self._bells = {name: Signal() for name in limits}
        self._subscriptions: set[Subscription] = set()
        self._stopped = False
        # One message at a time is looked at, so that there is room for what it brings.
        self._turn = Lock()

    def stop(self) -> None:
        self._stopped = True
        for messages in self._subscriptions:
            messages.stop()

    def _ring(self, news: News | None) -> None:
        for name, bell in self._bells.items():
            if news is None or news.name == name:
                bell.send()

    async def keep(self) -> None:
        # Side by side, since a topic that is full holds up its own handler, and no other.
        async with create_task_group() as tasks:
            for name in self._limits:
                tasks.start_soon(self._publish, name)

    async def _publish(self, name: str) -> None:
        """Publish one handler's tasks as they become due."""
        while True:
            try:
                found = await self._store.due([name], self._store.now(), PART)
                for record in found.records:
                    await self._publish_one(record)
            except StorageError as error:
                logger.error("publishing failed, and is tried again in %g s: %s", AGAIN, error)  # noqa: TRY400
                await sleep(AGAIN)
            else:
                if len(found.records) < PART:
                    await self._wait(found.next_at, self._bells[name])

    async def serve(self, pool: Pool) -> None:
        async with create_task_group() as tasks:
            for name in self._limits:
                tasks.start_soon(self._take, name, pool)

    async def _publish_one(self, record: TaskRecord) -> None:
        # First noted, so that one of all services does it. If it ends in between, the task is due again later.
        noted = await self._store.change(record.id, partial(publish, now=self._store.now()))
        if noted is None:
            return
        try:
            await self._bus.publish(topic_of(record.name), record.id.encode())
        except StorageError:
            await self._store.change(record.id, partial(take_back, noted))
            raise

    async def _take(self, name: str, pool: Pool) -> None:
        """Take up one handler's tasks, until the workers take nothing more."""
        while not self._stopped:
            try:
                async with self._bus.subscribe(
                    topic_of(name), group=GROUP, max_in_flight=self._workers, ack_deadline=self._lease
                ) as messages:
                    await self._take_all(messages, name, pool)
            except StorageError as error:
                logger.error("the bus failed, and is tried again in %g s: %s", AGAIN, error)  # noqa: TRY400
                await sleep(AGAIN)

    async def _take_all(self, messages: Subscription, name: str, pool: Pool) -> None:
        if self._stopped:
            # While it was being entered.
            return
        self._subscriptions.add(messages)
        try:
            async for message in messages:
                async with self._turn:
                    if not await pool.room():
                        # What is left is given back with the subscription.
                        return
                    await self._look_at(message, name, pool)
        finally:
            self._subscriptions.discard(messages)

    async def _look_at(self, message: Message, name: str, pool: Pool) -> None:
        """Claim the task of a message, if it is still there to be claimed."""
        task_id = message.body.decode("utf-8", "replace")
        claimed = await self._claim({name: self._limits[name]}, 1, task_id)
        await pool.take(claimed.records)
        with suppress(LeaseLostError):
            if not claimed.records and await self._is_held_up(task_id):
                await message.nack(AGAIN)
            else:
                await message.ack()

    async def _is_held_up(self, task_id: str) -> bool:
        """Tell whether a task could run, if no others of its handler did."""
        now = self._store.now()
        record = await self._store.get(task_id, now)
        return record is not None and record.status is TaskStatus.PENDING and record.run_at <= now


def take_back(noted: TaskRecord, record: TaskRecord) -> TaskRecord | None:
    """Undo what `publish` noted, unless more has happened."""
    return replace(record, published_at=None) if record == noted else None
