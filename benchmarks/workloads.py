"""All that is measured, in the order of the tables."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks import channel, choice, digest, http, imports, memory, task, thread, worker
from benchmarks.plan import Workload

__all__ = ["all_workloads"]


def all_workloads() -> Iterator[Workload]:
    """Give every workload; those whose making costs something come last."""
    for module in (channel, choice, thread, worker, task, http, imports, memory, digest):
        yield from module.workloads()
