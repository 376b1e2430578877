"""Two submissions with one key are one task if they mean the same, wherever they come from."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from chanflow.tasks import IdempotencyError, TaskService
from chanflow.tasks.http import TaskClient
from tests.support.messages import whole

pytestmark = pytest.mark.anyio


@dataclass
class Order:
    item: str
    price: float


async def place(order: Order, tags: set[str], count: float = 1.0, extra: Any = None) -> None: ...


SAME: list[dict[str, Any]] = [
    {"order": Order("tea", 2.0), "tags": {"a", "b", "c"}, "count": 3, "extra": {"x": 1, "y": [1.0]}},
    {"tags": ["c", "b", "a"], "count": 3.0, "order": {"price": 2, "item": "tea"}, "extra": {"y": [1], "x": 1.0}},
]
OTHERS: list[dict[str, Any]] = [
    {**SAME[0], "tags": {"a", "b"}},
    {**SAME[0], "count": 4},
    {**SAME[0], "extra": {"x": True, "y": [1.0]}},
    {**SAME[0], "extra": {"x": 1, "y": [1.0, 1]}},
    {**SAME[0], "order": Order("Tea", 2.0)},
]


async def test_one_value_is_one_value() -> None:
    """The order of arguments, of a set and of keys makes no difference, nor does `1` for `1.0`; all else does."""
    service = TaskService(workers=0)
    service.task(place)
    async with service:
        first = await service.submit("place", idempotency_key="key", **SAME[0])
        assert await service.submit("place", idempotency_key="key", **SAME[1]) == first
        for other in OTHERS:
            message = whole(f"idempotency key 'key' was used for another task: place {first}")
            with pytest.raises(IdempotencyError, match=message):
                await service.submit("place", idempotency_key="key", **other)


@pytest.mark.parametrize("key", ["key", "with a space", '"quoted"', "back\\slash", "k" * 255, "!"])
async def test_over_http_it_is_the_same(key: str) -> None:
    """The same key and arguments are the same task in the process, over HTTP, and through the client."""
    service = TaskService(workers=0)
    service.task(place)
    async with service:
        first = await service.submit("place", idempotency_key=key, **SAME[0])
        transport = httpx.ASGITransport(service.asgi())
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            async with TaskClient("http://test", http=http) as client:
                assert await client.submit("place", idempotency_key=key, **SAME[1]) == first
                with pytest.raises(IdempotencyError, match="was used for another task"):
                    await client.submit("place", idempotency_key=key, **{**SAME[1], "count": 7})
            quoted = '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
            answer = await http.post("/tasks/place", json=SAME[1], headers={"Idempotency-Key": quoted})
            assert answer.json()["task_id"] == first


@pytest.mark.parametrize("key", ["", " ", " key", "key ", "ké", "a\nb", "k" * 256])
async def test_what_is_no_key_is_none_anywhere(key: str) -> None:
    """It is refused in the process and by the client, with one rule."""
    message = whole(
        f"idempotency_key must be 1 to 255 printable ASCII characters without a space at either end, got {key!r}"
    )
    service = TaskService(workers=0)
    service.task(place)
    async with service:
        with pytest.raises(ValueError, match=message):
            await service.submit("place", idempotency_key=key, **SAME[0])
        transport = httpx.ASGITransport(service.asgi())
        async with (
            httpx.AsyncClient(transport=transport, base_url="http://test") as http,
            TaskClient("http://test", http=http) as client,
        ):
            with pytest.raises(ValueError, match=message):
                await client.submit("place", idempotency_key=key, **SAME[1])
        assert sum((await service.count()).values()) == 0


SUBMIT = """
import sys, anyio
from chanflow.tasks import TaskService
service = TaskService(store=sys.argv[1], workers=0)

@service.task
async def tag(tags: set[str], anything: object = None) -> None: ...

async def main():
    async with service:
        words = {"one", "two", "three", "four", "five"}
        print(await service.submit(tag, tags=words, anything={"words": words}, idempotency_key="key"))

anyio.run(main)
"""


def test_a_set_in_another_process(tmp_path: Path) -> None:
    """Its order there makes no difference, with a type hint and without one."""
    ids = set()
    for seed in range(4):
        run = subprocess.run(
            [sys.executable, "-c", SUBMIT, f"sqlite:///{tmp_path}/tasks.db"],
            env={"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            text=True,
            check=True,
        )
        ids.add(run.stdout)
    assert len(ids) == 1


async def test_a_task_from_before_fingerprints() -> None:
    """One that has none is compared by its arguments as they are stored."""
    from msgspec.structs import replace  # noqa: PLC0415 -- only here

    service = TaskService(workers=0)
    service.task(place)
    async with service:
        first = await service.submit("place", idempotency_key="key", **SAME[0])
        await service._store.change(first, lambda record: replace(record, fingerprint=None))
        assert await service.submit("place", idempotency_key="key", **SAME[0]) == first
        with pytest.raises(IdempotencyError):
            await service.submit("place", idempotency_key="key", **OTHERS[1])
