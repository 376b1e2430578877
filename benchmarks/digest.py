"""The demo as a workload: SHA-256 of every file of the standard library."""

from __future__ import annotations

import os
import subprocess
import sysconfig
import threading
from collections.abc import Iterator
from shutil import which

from benchmarks.plan import BOTH, LOOPLESS, Entry, UnsupportedError, Workload
from chanflow.cli.demos.digest import Summary, digest_file, digest_tree, walk

__all__ = ["workloads"]

ROOT = sysconfig.get_path("stdlib")
SKIP = [os.path.join(ROOT, "site-packages")]
CPUS = os.cpu_count() or 1
FILES_EACH = 64


def paths() -> list[str]:
    return list(walk(ROOT, SKIP, lambda _error: None))


async def chanflow_demo(_count: int) -> None:
    summary = Summary()
    await digest_tree(ROOT, summary, lambda _digest: None, workers=CPUS, skip=SKIP)
    assert summary.files


def thread_pool(_count: int) -> None:
    from concurrent.futures import ThreadPoolExecutor

    stop = threading.Event()
    with ThreadPoolExecutor(CPUS) as pool:
        for _ in pool.map(lambda path: digest_file(path, stop), paths()):
            pass


def xargs(_count: int) -> None:
    program = which("xargs")
    if program is None or which("sha256sum") is None:
        msg = "xargs or sha256sum is not installed"
        raise UnsupportedError(msg)
    subprocess.run(
        [program, "-0", "-P", str(CPUS), "-n", str(FILES_EACH), "sha256sum", "--"],
        input="\0".join(paths()).encode(),
        stdout=subprocess.DEVNULL,
        check=True,
    )


def workloads() -> Iterator[Workload]:
    yield Workload(
        "digest",
        "SHA-256 of each file of the standard library, a worker for each CPU",
        "file",
        len(paths()),
        {
            "chanflow": Entry(chanflow_demo, BOTH, note="chanflow demo"),
            "ThreadPoolExecutor": Entry(thread_pool, LOOPLESS, note="the walk first, then map"),
            "xargs -P": Entry(xargs, LOOPLESS, note=f"sha256sum, {FILES_EACH} files a process"),
        },
        "worker",
        fixed=True,
        slow=True,
    )
