"""The service of `chanflow demo-service`: reports that take a while, and an import that fails now and then."""

from __future__ import annotations

from random import Random

import anyio

from chanflow import Retry
from chanflow.tasks import Progress, TaskService

__all__ = ["make_service"]

PAGE = 0.25
"""Seconds that a page takes."""


def make_service() -> TaskService:
    """Make the service, in memory."""
    service = TaskService(workers=4, ttl=600.0)
    chance = Random().random  # noqa: S311 -- not for security

    @service.task
    async def report(progress: Progress, customer: str = "Ada", pages: int = 12) -> dict[str, object]:
        """Write a report, page by page."""
        words = 0
        for page in range(1, pages + 1):
            await progress.update(page - 1, pages, f"page {page} of {pages}")
            await anyio.sleep(PAGE)
            words += 200 + len(customer) * page
        await progress.update(1, 1, "done")
        return {"customer": customer, "pages": pages, "words": words}

    @service.task(retry=Retry(3, delay=1.0))
    async def fetch(url: str = "https://example.org/data.csv", chance_of_failure: float = 0.5) -> dict[str, object]:
        """Pretend to fetch a file over a bad line: it fails now and then, and is tried three times."""
        await anyio.sleep(PAGE)
        if chance() < chance_of_failure:
            msg = f"{url}: the line went dead"
            raise ConnectionError(msg)
        return {"url": url, "rows": 1000}

    @service.task(name="sum")
    def add_up(numbers: list[float]) -> float:
        """Add numbers up, in a thread."""
        return sum(numbers)

    return service
