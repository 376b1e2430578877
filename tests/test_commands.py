"""`chanflow tasks` and `chanflow worker`, run the way a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import pytest

from chanflow.tasks import TaskRecord, TaskService, TaskStatus
from tests.support.command import COMMAND, PATIENCE
from tests.support.redis import running_server

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
secret = "redis://:s3cret@host"
in_memory = TaskService()
in_memory.task(double.fn)
idle = TaskService(store="sqlite:///tasks.db", workers=0)
empty = TaskService(store="sqlite:///tasks.db")
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
    (place / "empty").touch()
    run = partial(subprocess.run, cwd=place, text=True, capture_output=True, timeout=PATIENCE, check=False)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("CHANFLOW_")}
    for arguments, status, error in (
        (["tasks", "list"], 2, "Missing option '--store'"),
        (["tasks", "--store", "memory://", "list"], 1, "memory:// is the memory of another process"),
        (["tasks", "--store", "ftp://x", "list"], 1, "store must be memory://, sqlite:///PATH or redis://HOST"),
        (["tasks", "--store", "sqlite:///no/such/directory.db", "list"], 1, "no/such/directory.db: no such file"),
        (["tasks", "--store", "sqlite:///application.py", "list"], 1, "application.py: file is not a database"),
        (["tasks", "--store", "sqlite:///empty", "list"], 1, "empty: there are no tasks in this file"),
        (["tasks", "--store", "redis://:s3cret@127.0.0.1:1", "list"], 1, "redis://127.0.0.1:1: "),
        (["tasks", "--store", "redis://:s/3cret@127.0.0.1:1", "list"], 1, "store must be redis://"),
        (["tasks", "--store", "redis://127.0.0.1:1", "list"], 1, "redis://127.0.0.1:1: "),
        (["tasks", "--store", "sqlite:///tasks.db", "show", "nothing"], 1, "tasks.db: no such file"),
        (["worker", "application"], 1, "is in app/tasks.py or installed, got 'application'"),
        (["worker", "nowhere:service"], 1, "there is no module 'nowhere' here or on the path"),
        (["worker", "application.py:service"], 1, "MODULE:SERVICE must be like app.tasks:service"),
        (["worker", "./application:service"], 1, "MODULE:SERVICE must be like app.tasks:service"),
        (["worker", ".application:service"], 1, "MODULE:SERVICE must be like app.tasks:service"),
        (["serve", "application.py:service"], 1, "MODULE:SERVICE must be like app.tasks:service"),
        (["worker", "application:secret"], 1, "'secret' of module 'application' must be a TaskService, got str"),
        (["worker", "application:in_memory"], 1, "application:in_memory keeps its tasks in its own memory"),
        (["worker", "application:idle"], 1, "application:idle has no workers: see --workers"),
        (["worker", "application:empty"], 1, "application:empty has no tasks"),
        (["worker", "--n\x1b[31mo"], 2, "--n\\x1b[31mo"),
        (["wo\x9brker"], 2, "No such command 'wo\\x9brker'"),
        (["worker", "application:not_a_service"], 1, "must be a TaskService, got int"),
        (["worker", "application:missing"], 1, "must be a TaskService, got nothing"),
    ):
        done = run([*COMMAND, *arguments], env=environment)
        assert done.returncode == status, done
        assert error in done.stderr
        assert "Traceback" not in done.stderr
        assert "3cret" not in done.stderr
    # None of them has made a store.
    assert {path.name for path in place.iterdir()} - {"__pycache__"} == {"application.py", "empty"}
    submit(place, "double", number=1)
    for wrong in "nothing", "", "\x1b[31m":
        done = tasks(place, "show", wrong)
        assert (done.returncode, done.stderr) == (1, f"Error: there is no task {wrong!r}, or it has expired\n")
    with_variable = run([*COMMAND, "tasks", "list"], env=environment | {"CHANFLOW_STORE": "sqlite:///tasks.db"})
    assert (with_variable.returncode, len(with_variable.stdout.splitlines())) == (0, 1)


def test_ids_in_part(place: Path) -> None:
    """So much of an id will do as no other task has: what the dashboard shows."""
    ids = [submit(place, "double", number=number) for number in range(20)]
    assert json.loads(told(place, "show", ids[3][:8]))["id"] == ids[3]
    assert told(place, "cancel", ids[4][:8]) == "cancelled\n"
    assert told(place, "retry", ids[4][:8]) == "pending\n"
    [(first, number)] = Counter(task_id[0] for task_id in ids).most_common(1)
    done = tasks(place, "show", first)
    assert (done.returncode, done.stderr) == (
        1,
        f"Error: {number} tasks have an id that begins with '{first}': give more of it\n",
    )


def test_cancelling_what_has_ended(place: Path) -> None:
    """It is told, with an exit status; what was cancelled already is as it was asked to be."""
    succeeded, failed = submit(place, "double", number=1), submit(place, "broken", why="so")
    with working(place):
        wait_for(place, succeeded, TaskStatus.SUCCESS)
        wait_for(place, failed, TaskStatus.FAILED)
    for task_id, status in ((succeeded, "success"), (failed, "failed")):
        done = tasks(place, "cancel", task_id)
        assert (done.returncode, done.stdout, done.stderr) == (
            1,
            "",
            f"Error: only a task that has not ended can be cancelled; the status of this one is {status}\n",
        )


HOSTILE = "\x1b]0;title\x07\x1b[31m\x9b31m\u202e\r\n\u2028\udcff end"
SHOWN = r"\x1b]0;title\x07\x1b[31m\x9b31m\u202e\r \u2028\udcff end"


def test_nothing_moves_the_cursor(place: Path, backend: str) -> None:
    """What others have written into a store or an error is shown, and is nothing to a terminal."""
    (place / "hostile.py").write_text(f"""
from chanflow.tasks import TaskRecord, TaskService
service = TaskService(store="sqlite:///tasks.db", workers=1)
@service.task
async def hostile() -> None:
    raise ValueError({HOSTILE!r})
async def main():
    async with service:
        await service.store.create(
            TaskRecord(id="0" * 32, name={HOSTILE[:-5]!r}, arguments=b"\\x80", created_at=1e9, run_at=9e9)
        )
        await service.wait(await service.submit(hostile))
""")
    code = f"import anyio, hostile; anyio.run(hostile.main, backend={backend!r})"
    subprocess.run([sys.executable, "-c", code], cwd=place, capture_output=True, timeout=PATIENCE, check=True)
    line, other = told(place, "list").split("\n")[:-1]
    assert line.endswith(SHOWN)
    assert SHOWN.removesuffix(r"\udcff end") in other
    assert (line + other).isprintable()
    assert told(place, "show", line.split()[0]).isascii()
    # A narrow terminal gets a line each.
    assert [len(each) > 60 for each in told_on_a_terminal(place, columns=60).splitlines()] == [False, False]
    with subprocess.Popen(
        [*COMMAND, "worker", "hostile:service", "--backend", backend], cwd=place, text=True, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        while process.stderr.readline() != "ready\n":
            assert process.poll() is None
        assert told(place, "retry", line.split()[0]) == "pending\n"
        wait_for(place, line.split()[0], TaskStatus.FAILED)
        process.terminate()
        said = process.stderr.read()
    assert "ValueError: " + SHOWN.split(r"\r", maxsplit=1)[0] in said
    assert said.replace("\n", "").isprintable()


def told_on_a_terminal(place: Path, columns: int) -> str:
    """Give the line of `list` as it is on a terminal."""
    code = f"import os, pty, sys; os.environ['COLUMNS'] = '{columns}'; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    command = [*COMMAND, "tasks", "--store", "sqlite:///tasks.db", "list"]
    done = subprocess.run(
        [sys.executable, "-c", code, *command],
        cwd=place,
        text=True,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    return done.stdout.rstrip("\r\n")


def test_a_pipe_that_is_closed(place: Path) -> None:
    """Whoever reads has seen enough: no traceback."""
    for number in range(3):
        submit(place, "double", number=number)
    command = [*COMMAND, "tasks", "--store", "sqlite:///tasks.db", "list"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run(command, cwd=place, stdout=pipe, stderr=subprocess.PIPE, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stderr) == (1, b"")


def test_an_encoding_that_is_narrow(place: Path) -> None:
    """What it has no character for is escaped."""
    task_id = submit(place, "broken", why="ö → x")
    with working(place):
        wait_for(place, task_id, TaskStatus.FAILED)
    done = subprocess.run(
        [*COMMAND, "tasks", "--store", "sqlite:///tasks.db", "list"],
        cwd=place,
        env=os.environ | {"PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        timeout=PATIENCE,
        check=True,
    )
    assert done.stdout.rstrip().endswith(b"\xf6 \\u2192 x")


def test_a_store_is_its_owners(place: Path) -> None:
    """The file and those that belong to it can be read by nobody else; one that was there stays as it was."""
    submit(place, "double", number=1)
    with working(place):
        modes = {path.name: path.stat().st_mode & 0o777 for path in place.glob("tasks.db*")}
    assert modes == dict.fromkeys(("tasks.db", "tasks.db-wal", "tasks.db-shm"), 0o600)
    (place / "tasks.db").chmod(0o644)
    submit(place, "double", number=2)
    assert (place / "tasks.db").stat().st_mode & 0o777 == 0o644


BLOCKING = """
import threading
import time
import anyio
from chanflow.tasks import TaskService

service = TaskService(store="sqlite:///tasks.db", workers=1)

@service.task
async def slow(seconds: float) -> None:
    print("blocked", flush=True)
    if seconds == 1:
        time.sleep(3600)
    elif seconds == 2:
        while True:
            pass
    elif seconds == 3:
        threading.Thread(target=time.sleep, args=[3600]).start()
    else:
        with anyio.CancelScope(shield=True):
            await anyio.sleep(3600)
"""


@pytest.mark.parametrize("how", [1, 2, 3, 4])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_always_ends_it(place: Path, backend: str, how: int, number: signal.Signals) -> None:
    """Whether a handler blocks the event loop, leaves a thread behind or can't be cancelled."""
    (place / "blocking.py").write_text(BLOCKING)
    submit(place, "slow", seconds=how)
    command = [*COMMAND, "worker", "blocking:service", "--backend", backend, "--drain", "0" if how == 3 else "3600"]
    with subprocess.Popen(command, cwd=place, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "blocked\n"
            process.send_signal(number)
            time.sleep(1.0)
            assert process.poll() is None
            process.send_signal(number)
            process.wait(5.0)
        finally:
            process.kill()


@pytest.mark.parametrize("command", ["worker", "serve"])
def test_a_silent_redis(place: Path, backend: str, command: str) -> None:
    """The first signal ends what can't reach its store, before it is ready and after."""
    with running_server() as server:
        url = f"redis://:s3cret@{server.place}"
        server.ask("config", "set", "requirepass", "s3cret")
        (place / "remote.py").write_text(f"""
from chanflow.tasks import TaskService
service = TaskService(store="{url}?stream_timeout=1&connect_timeout=1")
@service.task
async def double(number: int) -> int:
    return number * 2
""")
        arguments = [*COMMAND, command, "remote:service", "--backend", backend, "--drain", "1"]
        arguments += ["--port", "0"] if command == "serve" else []
        for silent_first in (True, False):
            if silent_first:
                server.stop()
            with subprocess.Popen(arguments, cwd=place, text=True, stderr=subprocess.PIPE) as process:
                try:
                    assert process.stderr is not None
                    if silent_first:
                        # It gives up by itself.
                        said = process.stderr.read()
                        assert process.wait(PATIENCE) == 1
                        assert said.startswith(f"Error: redis://{server.place}: ")
                        server.go_on()
                    else:
                        assert process.stderr.readline().startswith(("ready", "serving"))
                        server.stop()
                        time.sleep(2.0)
                        process.terminate()
                        assert process.wait(PATIENCE) == 0
                        said = process.stderr.read()
                    assert "s3cret" not in said
                    assert "Traceback" not in said
                finally:
                    process.kill()


def test_without_msgspec(place: Path) -> None:
    """The rest of the command works, and these say what is missing."""
    code = "import sys; sys.modules['msgspec'] = None; from chanflow.cli.main import main; main(prog_name='chanflow')"
    for command in ("tasks", "worker"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, "--store", "x"], text=True, capture_output=True, check=False
        )
        assert (done.returncode, done.stderr) == (
            2,
            "Error: this command needs msgspec: pip install 'chanflow[tasks]'\n",
        )
    assert subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, check=False).returncode == 0
