"""`chanflow tasks` and `chanflow worker`, run the way a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from chanflow.tasks import TaskRecord, TaskService, TaskStatus
from tests.support.command import COMMAND, PATIENCE

pytestmark = pytest.mark.slow

APPLICATION = """
import anyio
from chanflow.tasks import Progress, TaskService

service = TaskService(bus="sqlite:///tasks.db", store="sqlite:///tasks.db", workers=2, lease=2.0)

@service.task
async def double(number: int) -> int:
    return number * 2

@service.task
async def broken(why: str) -> None:
    raise ValueError(why)

@service.task
async def slow(seconds: float, progress: Progress) -> str:
    await progress.update(0, 1, "begun")
    await anyio.sleep(seconds)
    return "done"

not_a_service = 5
"""


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Make a directory with an application."""
    (tmp_path / "application.py").write_text(APPLICATION)
    return tmp_path


def tasks(place: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `chanflow tasks` on its store."""
    command = [*COMMAND, "tasks", "--store", "sqlite:///tasks.db", *arguments]
    return subprocess.run(command, cwd=place, text=True, capture_output=True, timeout=PATIENCE, check=False)


def told(place: Path, *arguments: str) -> str:
    """Give what it says, when all is well."""
    done = tasks(place, *arguments)
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout


@contextmanager
def working(place: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run `chanflow worker` until the block is left."""
    command = [*COMMAND, "worker", "application:service", *arguments]
    with subprocess.Popen(command, cwd=place, text=True, stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        while process.stderr.readline() != "ready\n":
            assert process.poll() is None
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def ask(place: Path, question: Callable[[TaskService], Any]) -> Any:
    """Ask a service on the same store."""
    url = f"sqlite:///{place}/tasks.db"
    service = TaskService(bus=url, store=url, workers=0)
    for name, parameter in (("double", "number: int"), ("broken", "why: str"), ("slow", "seconds: float")):
        namespace: dict[str, Any] = {}
        exec(f"async def {name}({parameter}): ...", namespace)  # noqa: S102 -- only submitted here
        service.task(namespace[name])

    async def main() -> Any:
        async with service:
            return await question(service)

    return anyio.run(main)


def submit(place: Path, name: str, **arguments: Any) -> str:
    return str(ask(place, lambda service: service.submit(name, **arguments)))


def wait_for(place: Path, task_id: str, status: TaskStatus) -> TaskRecord:
    """Wait until a task has a status."""
    deadline = time.monotonic() + PATIENCE
    while True:
        record: TaskRecord = ask(place, lambda service: service.get(task_id))
        if record.status is status:
            return record
        assert time.monotonic() < deadline, record
        time.sleep(0.05)


def test_a_worker_runs_what_was_submitted(place: Path, backend: str) -> None:
    """It works until SIGTERM, drains, and ends with 0; what came out of it can be listed and shown."""
    before = submit(place, "double", number=21)
    with working(place, "--backend", backend) as process:
        wait_for(place, before, TaskStatus.SUCCESS)
        broken = submit(place, "broken", why="it is\nbroken")
        wait_for(place, broken, TaskStatus.FAILED)
        running = submit(place, "slow", seconds=1.0)
        wait_for(place, running, TaskStatus.RUNNING)
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE) == 0
    assert wait_for(place, running, TaskStatus.SUCCESS).decode_result() == "done"
    listed = told(place, "list").splitlines()
    lines = [line.split()[:3] for line in listed]
    assert lines == [[running, "success", "slow"], [broken, "failed", "broken"], [before, "success", "double"]]
    assert listed[1].endswith("it is broken")
    assert told(place, "list", "--status", "failed").split()[0] == broken
    assert len(told(place, "list", "--limit", "1").splitlines()) == 1
    objects = [json.loads(line) for line in told(place, "list", "--json").splitlines()]
    assert [each["id"] for each in objects] == [running, broken, before]
    shown = json.loads(told(place, "show", before))
    assert (shown["arguments"], shown["result"], shown["status"]) == ({"number": 21}, 42, "success")
    assert json.loads(told(place, "show", running))["progress"] == {"done": 0, "total": 1, "message": "begun"}


def test_what_takes_too_long_is_put_back(place: Path, backend: str) -> None:
    """After the time to drain, or at a second signal, what runs is pending again, and its attempt doesn't count."""
    for drain, signals in (("0.2", [signal.SIGTERM]), ("100", [signal.SIGTERM, signal.SIGTERM])):
        task_id = submit(place, "slow", seconds=60.0)
        with working(place, "--backend", backend, "--drain", drain) as process:
            wait_for(place, task_id, TaskStatus.RUNNING)
            for number in signals:
                process.send_signal(number)
                time.sleep(0.3)
            assert process.wait(PATIENCE) == 0
        record = wait_for(place, task_id, TaskStatus.PENDING)
        assert record.attempts == 0
        assert told(place, "cancel", task_id) == "cancelled\n"


def test_ctrl_c_ends_a_worker(place: Path, backend: str) -> None:
    """It drains as SIGTERM does, and the exit status tells of Ctrl-C."""
    with working(place, "--backend", backend) as process:
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130
        assert process.stderr is not None
        assert process.stderr.read() == "draining, for up to 30 s\n"


def test_cancel_and_retry(place: Path) -> None:
    """A waiting task is cancelled at once, and runs when it is retried; a running one is cancelled where it runs."""
    task_id = submit(place, "double", number=4)
    assert told(place, "cancel", task_id) == "cancelled\n"
    assert told(place, "retry", task_id) == "pending\n"
    refused = tasks(place, "retry", task_id)
    assert (refused.returncode, refused.stderr) == (
        1,
        "Error: only a task that failed or was cancelled can be retried; this one is pending\n",
    )
    with working(place):
        assert wait_for(place, task_id, TaskStatus.SUCCESS).decode_result() == 8
        running = submit(place, "slow", seconds=60.0)
        wait_for(place, running, TaskStatus.RUNNING)
        assert told(place, "cancel", running) == "cancelling\n"
        wait_for(place, running, TaskStatus.CANCELLED)
    assert told(place, "cancel", running) == "cancelled\n"


def test_mistakes_are_told_in_a_line(place: Path) -> None:
    """An unknown task, store or service is one line and an exit status, without a traceback."""
    run = partial(subprocess.run, cwd=place, text=True, capture_output=True, timeout=PATIENCE, check=False)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CHANFLOW_")}
    for arguments, status, error in (
        (["tasks", "list"], 2, "Missing option '--store'"),
        (["tasks", "--store", "memory://", "list"], 1, "memory:// is the memory of another process"),
        (["tasks", "--store", "ftp://x", "list"], 1, "store must be memory://, sqlite:///PATH or redis://HOST"),
        (["tasks", "--store", "sqlite:///no/such/directory.db", "list"], 1, "unable to open database file"),
        (["tasks", "--store", "redis://127.0.0.1:1", "list"], 1, "redis://127.0.0.1:1: "),
        (["tasks", "--store", "sqlite:///tasks.db", "show", "nothing"], 1, "there is no task 'nothing'"),
        (["worker", "application"], 1, "MODULE:SERVICE must be like app.tasks:service, got 'application'"),
        (["worker", "nowhere:service"], 1, "there is no module 'nowhere' here or on the path"),
        (["worker", "application:not_a_service"], 1, "must be a TaskService, got 5"),
        (["worker", "application:missing"], 1, "must be a TaskService, got None"),
    ):
        done = run([*COMMAND, *arguments], env=environment)
        assert done.returncode == status, done
        assert error in done.stderr
        assert "Traceback" not in done.stderr
    with_variable = run([*COMMAND, "tasks", "list"], env=environment | {"CHANFLOW_STORE": "sqlite:///tasks.db"})
    assert (with_variable.returncode, with_variable.stdout) == (0, "")


def test_without_msgspec(place: Path) -> None:
    """The rest of the command works, and these say what is missing."""
    code = "import sys; sys.modules['msgspec'] = None; from chanflow.cli import main; main(prog_name='chanflow')"
    for command in ("tasks", "worker"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--store", "x"], text=True, capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (
            2,
            "Error: this command needs msgspec: pip install 'chanflow[tasks]'\n",
        )
    assert subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, check=False).returncode == 0
