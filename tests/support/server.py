"""A command that serves, and a client for it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import monotonic, sleep

import httpx

from tests.support.command import COMMAND, PATIENCE


class Server:
    """A command that serves, and a client to ask it."""

    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=PATIENCE)

    def submit(self, name: str, **arguments: object) -> str:
        """Submit a task, which is accepted."""
        response = self.http.post(f"tasks/{name}", json=arguments)
        assert response.status_code == 202, response.text
        return str(response.json()["task_id"])

    def status(self, task_id: str) -> str:
        """Ask for a task's status."""
        return str(self.http.get(f"tasks/{task_id}").json()["status"])

    def end(self, *signals: int) -> tuple[int, str]:
        """Stop it, and give its exit status and what else it said."""
        for number in signals:
            self.process.send_signal(number)
        _, said = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, said


@contextmanager
def serving(place: Path, *arguments: str, said: list[str] | None = None) -> Iterator[Server]:
    """Run a command that serves on any port that is free, until the block is left."""
    command = [*COMMAND, *arguments, "--port", "0"]
    with ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, cwd=place, text=True, stderr=subprocess.PIPE))
        # So that the pipe is closed whatever happens.
        stack.callback(process.kill)
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("serving on "):
                server = Server(process, line.split()[-1])
                stack.callback(server.http.close)
                yield server
                return
            assert said is not None, line
            said.append(line)
        raise AssertionError(process.wait())


def wait_until(what: Callable[[], object]) -> None:
    """Wait until something is so."""
    deadline = monotonic() + PATIENCE
    while not what():
        assert monotonic() < deadline
        sleep(0.02)
