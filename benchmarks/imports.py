"""What `import chanflow` costs, against the parts of anyio that it needs."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.plan import LOOPLESS, Entry, Workload

__all__ = ["workloads"]

# Only `sys` and `time` are there before, so that everybody pays for what they need.
PROBE = """
import sys, time
wall, cpu = time.perf_counter(), time.process_time()
{statement}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
uninvited = " ".join(sorted({uninvited!r} & sys.modules.keys()))
print('{{"wall": %r, "cpu": %r, "uninvited": "%s"}}' % (wall, cpu, uninvited))
"""
# What nobody should get who did not ask for it: trio, and what the extras bring.
UNINVITED = {"trio", "click", "rich", "matplotlib"}
# anyio imports its parts when they are touched.
STATEMENTS = {
    "chanflow": "import chanflow",
    "chanflow, worker groups": "import chanflow; chanflow.WorkerGroup",
    "anyio": "import anyio; anyio.create_memory_object_stream; anyio.create_task_group",
    "anyio and asyncio": "import asyncio, anyio; anyio.create_memory_object_stream; anyio.create_task_group",
    "asyncio": "import asyncio",
}


def workloads() -> Iterator[Workload]:
    yield Workload(
        "import",
        "Import in a fresh interpreter",
        "import",
        1,
        {
            name: Entry(
                None,
                LOOPLESS,
                note=f"`{statement}`",
                script=PROBE.format(statement=statement, uninvited=UNINVITED),
            )
            for name, statement in STATEMENTS.items()
        },
        "import",
        fixed=True,
    )
