"""The demo: a bounded pipeline that digests every file of a directory tree.

A thread walks the tree and sends paths into a channel; a worker group receives them, hashes in threads, and gives each
digest back on its result channel. Every stage is bounded, so that a tree of any size takes little memory.

Source:
    "Go Concurrency Patterns: Pipelines and cancellation", The Go Blog: its bounded parallelism.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Collection, Iterator
from functools import partial
from time import perf_counter

from anyio import BrokenResourceError, to_thread
from attrs import define, field, frozen

from chanflow import Channel, Group, ThreadChannel, WorkerGroup

__all__ = ["Digest", "Summary", "checksum_line", "digest_tree", "measure_speedup"]

CHUNK = 1 << 20
SAMPLE_FILES = 1000
SAMPLE_BYTES = 64 << 20


@frozen
class Digest:
    """What came of one file: its size in bytes and its SHA-256, or the error that stopped it."""

    path: str
    size: int
    sha256: str
    error: OSError | None = None


@define
class Summary:
    """What came of a tree so far."""

    files: int = 0
    bytes: int = 0
    unreadable: int = 0
    seconds: float = 0.0
    found: int = 0
    sample: list[str] = field(factory=list)
    """Files to measure the speed-up with."""

    def add(self, digest: Digest) -> None:
        """Count one file."""
        if digest.error is not None:
            self.unreadable += 1
            return
        self.files += 1
        self.bytes += digest.size
        if self.files <= SAMPLE_FILES and self.bytes <= SAMPLE_BYTES:
            self.sample.append(digest.path)


def identify(file: str | int) -> tuple[int, int]:
    """Tell the file behind a path, whatever it is called, or behind a descriptor; (0, 0) for none."""
    try:
        status = os.stat(file)
    except OSError:
        return 0, 0
    return status.st_dev, status.st_ino


def walk(root: str, skip: Collection[str | int], failed: Callable[[OSError], None]) -> Iterator[str]:
    """Give the path of each file under a root, in order, leaving out what is no regular file."""
    skipped = {identify(file) for file in skip} - {(0, 0)}
    if not os.path.isdir(root):
        yield root
        return
    for directory, subdirectories, names in os.walk(root, onerror=failed):
        subdirectories[:] = sorted(
            name for name in subdirectories if identify(os.path.join(directory, name)) not in skipped
        )
        for name in sorted(names):
            path = os.path.join(directory, name)
            try:
                status = os.stat(path)
            except OSError:
                # Reading it will tell why.
                yield path
                continue
            # A named pipe, say, would be waited for without end.
            if stat.S_ISREG(status.st_mode) and (status.st_dev, status.st_ino) not in skipped:
                yield path


def digest_file(path: str, stop: threading.Event) -> Digest:
    """Digest one file, piece by piece, so that it can be stopped."""
    size = 0
    sha256 = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as file:
            while (chunk := file.read(CHUNK)) and not stop.is_set():
                size += len(chunk)
                sha256.update(chunk)
    except OSError as error:
        return Digest(path, size, "", error)
    return Digest(path, size, sha256.hexdigest())


async def digest_tree(
    root: str, summary: Summary, report: Callable[[Digest], object], *, workers: int, skip: Collection[str | int] = ()
) -> None:
    """Digest every file under a root.

    Args:
        root: a directory or a file.
        summary: counts what is done, also when the call is cancelled.
        report: called with each digest, in the order of the walk.
        workers: how many files to hash at the same time, at least 1.
        skip: paths to leave out, of files or whole directories, or open file descriptors.

    Cancellation:
        Stops at once what is being hashed; nothing is reported of it.
    """
    start = perf_counter()
    stop = threading.Event()
    paths: Channel[str] = Channel(1000, "paths")

    def tell(digest: Digest) -> None:
        summary.add(digest)
        summary.seconds = perf_counter() - start
        report(digest)

    def send_paths(channel: ThreadChannel[str]) -> list[OSError]:
        failed: list[OSError] = []
        try:
            with channel:
                for path in walk(root, skip, failed.append):
                    summary.found += 1
                    channel.send(path)
        except BrokenResourceError:
            """Nobody hashes any more."""
        return failed

    async with Group() as group:
        walker = group.go(to_thread.run_sync, send_paths, paths.from_thread())
        async with paths.receiver as receiver, WorkerGroup(partial(digest_file, stop=stop), workers=workers) as hashers:
            try:
                async for digest in hashers.map(receiver):
                    tell(digest)
            finally:
                stop.set()
        for error in await walker:
            tell(Digest(str(error.filename), 0, "", error))
    summary.seconds = perf_counter() - start


async def measure_speedup(paths: list[str], workers: int) -> float:
    """Measure how many times faster so many workers are than one, on files that were just read.

    Args:
        paths: the files.
        workers: at least 1.

    Returns:
        The time of one worker over that of `workers`, each the best of two rounds.
    """
    stop = threading.Event()
    times: dict[int, list[float]] = {1: [], workers: []}
    for count in (1, workers, 1, workers):
        start = perf_counter()
        async with WorkerGroup(partial(digest_file, stop=stop), workers=count) as hashers:
            async for _ in hashers.map(paths):
                pass
        times[count].append(perf_counter() - start)
    return min(times[1]) / min(times[workers])


ESCAPES = str.maketrans({"\\": "\\\\", "\n": "\\n", "\r": "\\r"})


def checksum_line(digest: Digest) -> bytes:
    """Give the line for a digest that `sha256sum --check` accepts, for any file name."""
    name = digest.path.translate(ESCAPES)
    escaped = "\\" if name != digest.path else ""
    return os.fsencode(f"{escaped}{digest.sha256}  {name}\n")
