"""Real Redis servers for the tests."""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from attrs import frozen
from benchmarks import redis_server

PATIENCE = 20.0
CLUSTER_BUS = 10_000
"""A node of a cluster takes the port that is so much higher, too."""


@contextmanager
def running_redis() -> Iterator[str]:
    """Run a server, and give its URL; the test is skipped where there is none."""
    try:
        with redis_server.running_redis() as url:
            yield url
    except FileNotFoundError as error:
        pytest.skip(str(error))


@frozen
class Server:
    """A server on a port."""

    port: int
    process: subprocess.Popen[bytes]

    @property
    def place(self) -> str:
        return f"127.0.0.1:{self.port}"

    def ask(self, *words: str) -> str:
        """Ask it something."""
        command = ["redis-cli", "-h", "127.0.0.1", "-p", str(self.port), *words]
        return subprocess.run(command, text=True, capture_output=True, timeout=PATIENCE, check=True).stdout

    def stop(self) -> None:
        """Let it answer nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def free_port() -> int:
    """Find a port that is free, and the one of the cluster's bus that belongs to it, too."""
    while True:
        port = random.randint(15_000, 29_000)
        with suppress(OSError):
            for each in port, port + CLUSTER_BUS:
                with socket.socket() as taken:
                    taken.bind(("127.0.0.1", each))
            return port


@contextmanager
def running_server(*options: str, settings: str = "") -> Iterator[Server]:
    """Run a server with options, and settings in a file that it may write; skipped as above."""
    command = shutil.which("redis-server")
    if command is None:
        pytest.skip(redis_server.MISSING)
    with tempfile.TemporaryDirectory(prefix="redis") as directory:
        path = Path(directory) / "settings"
        path.write_text(settings)
        port = free_port()
        plain = ["--bind", "127.0.0.1", "--port", str(port), "--dir", directory, "--save", "", "--appendonly", "no"]
        process = subprocess.Popen([command, str(path), *plain, *options], stdout=subprocess.DEVNULL)
        server = Server(port, process)
        try:
            deadline = time.monotonic() + PATIENCE
            while True:
                with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                    break
                assert time.monotonic() < deadline, "the server did not start"
                assert process.poll() is None, "the server ended"
                time.sleep(0.01)
            yield server
        finally:
            server.go_on()
            process.kill()
            process.wait(PATIENCE)


@contextmanager
def running_cluster(nodes: int) -> Iterator[list[Server]]:
    """Run a cluster of so many nodes: 1, or 3 or more."""
    with ExitStack() as stack:
        servers = [stack.enter_context(running_server("--cluster-enabled", "yes")) for _ in range(nodes)]
        if nodes == 1:
            servers[0].ask("cluster", "addslotsrange", "0", "16383")
        else:
            servers[0].ask("--cluster", "create", *[server.place for server in servers], "--cluster-yes")
        deadline = time.monotonic() + PATIENCE
        while not all("cluster_state:ok" in server.ask("cluster", "info") for server in servers):
            assert time.monotonic() < deadline, "the cluster did not form"
            time.sleep(0.05)
        yield servers
