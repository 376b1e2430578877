"""What the dashboard draws: a snapshot of the service each second, made once for all who watch."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Any

import msgspec
from anyio import Lock, sleep

from chanflow.tasks._service import ServiceCore
from chanflow.tasks.http._stream import event
from chanflow.tasks.wire import moment, to_json

__all__ = ["Live"]

INTERVAL = 1.0
"""Seconds from one snapshot to the next."""
RECENT = 20
"""How many tasks are in it."""


class Live:
    """The snapshots of a service."""

    def __init__(self, service: ServiceCore) -> None:
        self._service = service
        self._turn = Lock()
        self._latest = b""
        self._made_at = float("-inf")
        self._ended = 0

    async def stream(self) -> AsyncGenerator[bytes, None]:
        """Give each snapshot as a message."""
        while True:
            yield await self._snapshot()
            await sleep(INTERVAL)

    async def _snapshot(self) -> bytes:
        async with self._turn:
            now = time.monotonic()
            # Those who come in the same second share one; a little less, or half of them would be late for it.
            if now - self._made_at > 0.9 * INTERVAL:
                self._latest = event("snapshot", msgspec.json.encode(await self._make(now)))
                self._made_at = now
            return self._latest

    async def _make(self, now: float) -> dict[str, Any]:
        figures = self._service.statistics()
        ended = sum(sum(each.ended.values()) for each in figures.handlers.values())
        elapsed = now - self._made_at
        # What ended while nobody watched says nothing of now.
        throughput = (ended - self._ended) / elapsed if elapsed < 5 * INTERVAL else 0.0
        counts = await self._service.count()
        recent = await self._service.page(limit=RECENT)
        self._ended = ended
        return {
            "at": moment(time.time()),
            "workers": {"total": figures.workers, "busy": figures.running},
            "draining": self._service.is_draining,
            "counts": {status.value: number for status, number in counts.items()},
            "queues": [
                {
                    "name": name,
                    "submitted": each.submitted,
                    "running": each.running,
                    "retried": each.retried,
                    **{status.value: number for status, number in each.ended.items()},
                }
                for name, each in figures.handlers.items()
            ],
            "throughput": throughput,
            "latency": {
                **percentiles("wait", [waited for waited, _ in figures.recent]),
                **percentiles("run", [ran for _, ran in figures.recent]),
            },
            "recent": [to_json(record, whole=False) for record in recent],
        }


def percentiles(name: str, seconds: list[float]) -> dict[str, float | None]:
    """Give what half of them, and what 95 of 100, are at most."""
    ordered = sorted(seconds)
    return {f"{name}_p{share}": ordered[-(-len(ordered) * share // 100) - 1] if ordered else None for share in (50, 95)}
