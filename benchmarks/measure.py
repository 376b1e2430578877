"""One measurement, in a process of its own: `python -m benchmarks.measure WORKLOAD PEER BACKEND COUNT`.

It prints a line of JSON: seconds of wall and CPU time, or bytes, or why there are none.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import anyio

from benchmarks.plan import UnsupportedError, Workload
from benchmarks.workloads import all_workloads

__all__ = ["main"]

WARM_UP = 0.02
LEAST_WARM_UP = 200


def cpu_seconds() -> float:
    """Count all threads, and processes that were waited for."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def measure(workload: Workload, run: Callable[[int], Any], backend: str, count: int) -> dict[str, float]:
    """Warm up, then measure, in one event loop."""
    # A little brings the interpreter to its specialised code; where the amount is fixed, the first round has to do.
    warm_up = workload.warm_up
    if warm_up is None:
        warm_up = 0 if workload.fixed else max(int(count * WARM_UP), LEAST_WARM_UP)

    def start() -> tuple[float, float]:
        gc.collect()
        return time.perf_counter(), cpu_seconds()

    def stop(wall: float, cpu: float) -> dict[str, float]:
        return {"wall": time.perf_counter() - wall, "cpu": cpu_seconds() - cpu}

    async def measure_async() -> dict[str, float]:
        if warm_up:
            await run(warm_up)
        started = start()
        await run(count)
        return stop(*started)

    if backend != "-":
        return anyio.run(measure_async, backend=backend)
    if warm_up:
        run(warm_up)
    started = start()
    run(count)
    return stop(*started)


def weigh(run: Callable[[int], Any], backend: str, count: int) -> dict[str, float]:
    return {"bytes": run(count) if backend == "-" else anyio.run(run, count, backend=backend)}


def main() -> None:
    name, peer, backend, count = sys.argv[1:]
    workload = next(workload for workload in all_workloads() if workload.name == name)
    run = workload.entries[peer].run
    assert run is not None
    # Ends that are left open are the workload's business.
    warnings.simplefilter("ignore")
    result: dict[str, Any]
    try:
        with workload.around():
            result = weigh(run, backend, int(count)) if workload.memory else measure(workload, run, backend, int(count))
    except BaseException as error:  # noqa: BLE001 -- whatever it is goes into the table
        result = {"reason": describe(error)}
    print(json.dumps(result), flush=True)
    # Taking apart 100,000 tasks and threads that still wait measures nothing.
    os._exit(0)


def describe(error: BaseException) -> str:
    """Put an error into a few words: the first one of a group."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, UnsupportedError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    return f"{type(error).__name__}: {error}".strip(": ")[:120]


if __name__ == "__main__":
    main()
