"""A real Redis server, on a socket of its own."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["MISSING", "running_redis"]

MISSING = "needs a redis-server on the PATH: apt-get install redis-server"


@contextmanager
def running_redis() -> Iterator[str]:
    """Run a server, and give its URL; FileNotFoundError where there is none."""
    server = shutil.which("redis-server")
    if server is None:
        raise FileNotFoundError(MISSING)
    # A socket's path must be short.
    with tempfile.TemporaryDirectory(prefix="redis") as directory:
        socket = Path(directory) / "redis.sock"
        settings = ["--port", "0", "--unixsocket", str(socket), "--dir", directory, "--save", "", "--appendonly", "no"]
        process = subprocess.Popen([server, *settings], stdout=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 10
            while not socket.exists():
                assert time.monotonic() < deadline, "the server did not start"
                assert process.poll() is None, "the server ended"
                time.sleep(0.01)
            yield f"unix://{socket}"
        finally:
            process.terminate()
            process.wait(10)
