"""`chanflow serve` and `chanflow demo-service`, run the way a user runs them, and asked over real connections."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from time import sleep
from urllib.parse import unquote

import httpx
import pytest

from chanflow.tasks import TaskStatus
from tests.support.command import COMMAND, PATIENCE
from tests.support.server import Server, serving, wait_until

APPLICATION = """
import anyio
from dataclasses import dataclass
from chanflow.tasks import Progress, TaskService

service = TaskService(bus="sqlite:///tasks.db", store="sqlite:///tasks.db", workers=2, lease=2.0)
quick = TaskService(workers=4)

@service.task
async def slow(seconds: float) -> str:
    await anyio.sleep(seconds)
    return "done"

@dataclass
class Address:
    street: str
    number: int = 1

@quick.task
async def report(progress: Progress, pages: int = 2, to: Address | None = None) -> dict:
    "Write a report."
    await progress.update(pages, max(pages, 1)) if 0 <= pages <= max(pages, 1) else None
    return {"pages": pages}

@quick.task
async def fail(text: str) -> None:
    raise ValueError(text)

@quick.task
async def echo(data: dict[str, float | str | None], tags: list[str] = []) -> dict:
    return data

@quick.task
async def stuck() -> None:
    await anyio.sleep(3600)
"""
pytestmark = pytest.mark.slow

STREAMS = 1000
FLOOD = 1000


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Make a directory with an application."""
    (tmp_path / "application.py").write_text(APPLICATION)
    return tmp_path


def count(directory: Path) -> int:
    return len(list(directory.iterdir()))


def refused(place: Path, *arguments: str) -> tuple[int, str]:
    """Run a command that ends at once, and give its exit status and its last line."""
    done = subprocess.run(
        [*COMMAND, *arguments], cwd=place, text=True, capture_output=True, timeout=PATIENCE, check=False
    )
    return done.returncode, done.stderr.splitlines()[-1]


def has_status(server: Server, task_id: str, status: str) -> bool:
    return server.status(task_id) == status


def test_it_drains_and_answers_meanwhile(place: Path, backend: str) -> None:
    """After SIGTERM what runs may end, new tasks are refused with 503, and everything else is answered."""
    with serving(place, "serve", "application:service", "--backend", backend) as server:
        assert server.http.get("health").json() == {"status": "ok"}
        task_id = server.submit("slow", seconds=2.0)
        wait_until(lambda: server.status(task_id) == "running")
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: server.http.get("health").status_code == 503)
        response = server.http.post("tasks/slow", json={"seconds": 0.0})
        assert (response.status_code, response.headers["Retry-After"]) == (503, "5")
        assert response.headers["Content-Type"] == "application/problem+json"
        assert server.status(task_id) == "running"
        ended = server.http.get(f"tasks/{task_id}", headers={"Prefer": "wait=20"})
        assert (ended.json()["status"], ended.json()["result"]) == ("success", "done")
        assert server.end() == (0, "draining, for up to 30 s\n")


def test_what_takes_too_long_is_handed_back(place: Path, backend: str) -> None:
    """After the time to drain, or at a second signal, what runs is pending again; an open stream ends."""
    for drain, signals in (("0.2", [signal.SIGTERM]), ("100", [signal.SIGTERM, signal.SIGTERM])):
        with serving(place, "serve", "application:service", "--backend", backend, "--drain", drain) as server:
            task_id = server.submit("slow", seconds=60.0)
            wait_until(partial(has_status, server, task_id, "running"))
            with server.http.stream("GET", "events") as events:
                lines = events.iter_lines()
                assert next(lines) == "event: snapshot"
                for number in signals:
                    server.process.send_signal(number)
                    sleep(0.3)
                if len(signals) == 1:
                    # It ends as it should, and is not torn off.
                    assert all(line.startswith(("event: ", "data: ", "")) for line in lines)
            assert server.process.wait(PATIENCE) == 0
        with serving(place, "serve", "application:service", "--backend", backend, "--workers", "0") as server:
            record = server.http.get(f"tasks/{task_id}").json()
            assert (record["status"], record["attempts"]) == ("pending", 0)
            assert server.http.delete(f"tasks/{task_id}").json()["status"] == "cancelled"
            assert server.end(signal.SIGTERM)[0] == 0


def test_ctrl_c(place: Path, backend: str) -> None:
    """It drains as SIGTERM does, and the exit status tells of Ctrl-C."""
    with serving(place, "serve", "application:service", "--backend", backend) as server:
        assert server.end(signal.SIGINT) == (130, "draining, for up to 30 s\n")


def test_tokens(place: Path) -> None:
    """With a token file, nothing but health and the empty page is there without a token of it."""
    (place / "tokens").write_text("first\n\nsecond\n")
    said: list[str] = []
    arguments = ("serve", "application:quick", "--token-file", "tokens")
    with serving(place, *arguments, said=said) as server:
        for path in ("tasks", "metrics", "openapi.json", "events", "handlers", "dead-letters", "tasks/x"):
            assert server.http.get(path).status_code == 401, path
        for path in ("health", ""):
            assert server.http.get(path).status_code == 200, path
        for token, status in (("first", 200), ("second", 200), ("third", 401)):
            assert server.http.get("tasks", headers={"Authorization": f"Bearer {token}"}).status_code == status
        server.end(signal.SIGTERM)
    assert said == []


@pytest.mark.parametrize(
    ("root_path", "said", "shown"),
    [
        ("", None, ""),
        ("/reports", None, "/reports"),
        ("/a/b%20c", None, "/a/b c"),
        ("/reports", "/x/y/", "/x/y"),
        # What is no path, or would be another host's, is not believed.
        ("/reports", "//evil.example", "/reports"),
        ("/reports", "/a/../b", "/reports"),
        ("/reports", "http://evil.example", "/reports"),
        ("/reports", "/a?b", "/reports"),
        ("", "/a\\b", ""),
    ],
)
def test_below_a_path(place: Path, backend: str, root_path: str, said: str | None, shown: str) -> None:
    """A proxy that takes a path off says which, or the command is told: addresses in answers begin with it."""
    with serving(place, "serve", "application:quick", "--backend", backend, "--root-path", root_path) as server:
        headers = {} if said is None else {"X-Forwarded-Prefix": said, "X-Forwarded-For": "192.0.2.1"}
        answer = server.http.post("tasks/report", json={}, headers=headers)
        task_id = answer.json()["task_id"]
        assert unquote(answer.headers["Location"]) == f"{shown}/tasks/{task_id}"
        assert server.http.get(f"tasks/{task_id}", headers=headers).status_code == 200
        assert server.http.get("", headers=headers).status_code == 200
        assert server.http.get("dashboard.js", headers=headers).status_code == 200


def test_a_unix_socket(place: Path, backend: str) -> None:
    """It is made, asked and taken away again; one that is left over is in nobody's way, and one in use is refused."""
    arguments = [*COMMAND, "serve", "application:quick", "--backend", backend, "--uds", "socket"]
    path = place / "socket"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with subprocess.Popen(arguments, cwd=place, text=True, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "serving on unix:socket\n"
            with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://localhost") as http:
                answer = http.post("tasks/report", json={}, headers={"Prefer": "wait=10", "X-Forwarded-Prefix": "/a"})
                assert answer.json()["status"] == "success"
                assert http.get("tasks").status_code == 200
                second = subprocess.run(
                    arguments, cwd=place, text=True, capture_output=True, timeout=PATIENCE, check=False
                )
                assert (second.returncode, second.stderr) == (
                    1,
                    "Error: can't listen on socket: Address already in use\n",
                )
                assert http.get("health").status_code == 200
            process.terminate()
            assert process.wait(PATIENCE) == 0
            assert not path.exists()
        finally:
            process.kill()
    path.write_text("somebody's")
    assert refused(place, "serve", "application:quick", "--uds", "socket")[0] == 1
    assert path.read_text() == "somebody's"


def test_names_and_scopes_of_tokens(place: Path) -> None:
    """Each token does what its line of the file says, and the log names whose it was."""
    (place / "tokens").write_text("\ufeff# alice's laptop\nalice: first\nbob[read]: second\n", "utf-8")
    with serving(place, "serve", "application:quick", "--token-file", "tokens", "--log-format", "json") as server:
        server.http.headers["Authorization"] = "Bearer first"
        task_id = server.submit("report")
        for token, status in (("#", 401), ("laptop", 401), ("alice:", 401), ("second", 403)):
            answer = server.http.post("tasks/report", headers={"Authorization": f"Bearer {token}"})
            assert answer.status_code == status
        _, said = server.end(signal.SIGTERM)
    lines = [line for line in said.splitlines() if line.startswith("{")]
    assert f'"message": "alice: POST /tasks/report: 202 /tasks/{task_id}", "token_name": "alice"' in lines[0]
    assert '"message": "bob: POST /tasks/report: 403", "token_name": "bob"' in lines[1]
    assert len(lines) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--host", "127.0.0.2"],
            ["anybody who reaches 127.0.0.2 can submit tasks, and read them: see --token-file\n"],
        ),
        (
            ["--host", "0.0.0.0"],  # noqa: S104 -- the test's own
            [
                "anybody who reaches 0.0.0.0 can submit tasks, and read them: see --token-file\n",
                "requests by another name than localhost are refused: see --host-name\n",
            ],
        ),
    ],
)
def test_open_to_all_is_told(place: Path, arguments: list[str], said: list[str]) -> None:
    """Whoever serves beyond this machine without tokens is told what that means."""
    told: list[str] = []
    with serving(place, "serve", "application:quick", *arguments, said=told) as server:
        server.end(signal.SIGTERM)
    assert told == said


def test_dns_rebinding(place: Path, backend: str) -> None:
    """A page whose own name leads to this machine gets nothing at all, where there are no tokens."""
    arguments = ("serve", "application:quick", "--backend", backend, "--host-name", "shop.example")
    with serving(place, *arguments) as server:
        task_id = server.submit("stuck")
        page = {"Host": f"evil.example:{httpx.URL(server.url).port}", "Sec-Fetch-Site": "same-origin"}
        for path in (
            "",
            "dashboard.js",
            "health",
            "tasks",
            f"tasks/{task_id}/events",
            "events",
            "metrics",
            "openapi.json",
        ):
            answer = server.http.get(path, headers=page)
            assert (answer.status_code, answer.json()["type"]) == (421, "urn:chanflow:problem:wrong-host"), path
        for method, path in (("POST", "tasks/report"), ("DELETE", f"tasks/{task_id}")):
            assert server.http.request(method, path, headers=page).status_code == 421
        for host in ("localhost", "127.0.0.1", "[::1]", "shop.example"):
            assert server.http.get("tasks", headers={"Host": f"{host}:8000"}).status_code == 200
        server.http.delete(f"tasks/{task_id}")
        assert server.end(signal.SIGTERM)[0] == 0


def test_hosts_with_tokens(place: Path) -> None:
    """With tokens any name will do, unless there are some that are called for."""
    (place / "tokens").write_text("first\n")
    for arguments, status in (((), 200), (("--host-name", "shop.example"), 421)):
        with serving(place, "serve", "application:quick", "--token-file", "tokens", *arguments) as server:
            assert server.http.get("health", headers={"Host": "evil.example"}).status_code == status
            server.end(signal.SIGTERM)


def test_cors(place: Path) -> None:
    """The pages of an origin that is named may use the service."""
    with serving(place, "serve", "application:quick", "--cors", "https://app.example") as server:
        page = {"Origin": "https://app.example", "Sec-Fetch-Site": "cross-site"}
        assert server.http.post("tasks/report", headers=page).headers["Access-Control-Allow-Origin"] == page["Origin"]
        assert server.http.post("tasks/report", headers=page | {"Origin": "https://evil.example"}).status_code == 403
        server.end(signal.SIGTERM)


def test_mistakes_are_told_in_a_line(place: Path) -> None:
    """A port that is taken, a file without tokens, a service that is none."""
    (place / "empty").write_text("\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refused(place, "serve", "application:quick", "--port", str(port))
        assert said == (1, f"Error: can't listen on 127.0.0.1 port {port}: Address already in use")
    said = refused(place, "serve", "application:quick", "--token-file", "empty")
    assert said == (1, "Error: empty: the file has no token")
    (place / "words").write_text("first\nsecond third\n")
    code, line = refused(place, "serve", "application:quick", "--token-file", "words")
    assert (code, line.startswith("Error: words: line 2: must be a secret without spaces, or ")) == (1, True)
    assert "third" not in line
    for option, value in (("--host-name", "a:1"), ("--cors", "*")):
        code, line = refused(place, "serve", "application:quick", option, value)
        assert (code, line.startswith("Error: ")) == (1, True)
        assert repr(value) in line
    assert refused(place, "serve", "application:quick", "--token-file", "missing")[0] == 2
    assert refused(place, "serve", "application:nothing")[0] == 1
    assert refused(place, "serve", "application:quick", "--port", "70000")[0] == 2
    for wrong in "reports", "/reports/", "//reports", "/a b", "/..":
        rule = "must begin with a slash, and not end with one, in letters, digits and -._~/%"
        assert refused(place, "serve", "application:quick", "--root-path", wrong) == (
            2,
            f"Error: Invalid value for '--root-path': {rule}, got {wrong!r}",
        )
    assert refused(place, "serve", "application:quick", "--uds", "a" * 200) == (
        1,
        f"Error: can't listen on {'a' * 200}: AF_UNIX path too long",
    )
    without = "import sys; sys.modules['starlette'] = None; from chanflow.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", without, "serve", "application:quick"],
        cwd=place,
        text=True,
        capture_output=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stderr == "Error: chanflow.tasks.http needs starlette: pip install 'chanflow[http]'\n"
    assert done.returncode == 1


def test_json_log(place: Path) -> None:
    """Each line is an object, which names the task that it is about."""
    with serving(place, "serve", "application:quick", "--log-format", "json") as server:
        task_id = server.submit("fail", text="it is broken")
        assert server.http.get(f"tasks/{task_id}", headers={"Prefer": "wait=10"}).json()["status"] == "failed"
        _, said = server.end(signal.SIGTERM)
    [line] = [line for line in said.splitlines() if line.startswith("{")]
    assert f'"task_id": "{task_id}", "task_name": "fail"' in line
    assert "ValueError: it is broken" in line


def test_the_demo(tmp_path: Path, backend: str) -> None:
    """It serves a page, and reports that can be submitted and watched."""
    with serving(tmp_path, "demo-service", "--backend", backend) as server:
        assert server.http.get("").headers["Content-Type"] == "text/html; charset=utf-8"
        names = [handler["name"] for handler in server.http.get("handlers").json()["handlers"]]
        assert names == ["report", "fetch", "sum"]
        task_id = server.submit("report", pages=2)
        with server.http.stream("GET", f"tasks/{task_id}/events") as events:
            records = [line for line in events.iter_lines() if line.startswith("data: ")]
        assert any('"message":"page 2 of 2"' in record for record in records)
        assert '"status":"success"' in records[-1]
        done = server.http.post("tasks/sum", json={"numbers": [1, 2.5]}, headers={"Prefer": "wait=10"})
        assert done.json()["result"] == 3.5
        assert server.end(signal.SIGINT)[0] == 130


def test_a_flood_is_refused_and_survived(place: Path, backend: str) -> None:
    """So many are accepted as may be pending, the others get 503 and when to come again, and the service stays up."""
    arguments = ("serve", "application:quick", "--backend", backend, "--max-pending", "100", "--drain", "0")
    with serving(place, *arguments) as server:
        answers: Counter[int] = Counter()
        for _ in range(FLOOD):
            response = server.http.post("tasks/stuck", json={})
            answers[response.status_code] += 1
            assert response.status_code == 202 or response.headers["Retry-After"] == "1"
        # Four run, and do not count; the count may be a moment old.
        assert 100 <= answers[202] <= 104
        assert answers[202] + answers[503] == FLOOD
        counts = server.http.get("metrics").text
        assert f'chanflow_tasks{{status="pending"}} {answers[202] - 4:.1f}' in counts
        [task, *_] = server.http.get("tasks", params={"status": "pending"}).json()["tasks"]
        server.http.delete(f"tasks/{task['id']}")
        sleep(0.3)
        server.submit("stuck")
        assert server.end(signal.SIGTERM)[0] == 0


def test_a_connection_lasts_through_refusals(place: Path, backend: str) -> None:
    """A refusal that could be told before the body is there waits for it, and the next request finds the connection."""
    with serving(place, "serve", "application:quick", "--backend", backend) as server:
        url = httpx.URL(server.url)
        head = "POST /tasks/none HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 2\r\n\r\n"
        with socket.create_connection((url.host, url.port), PATIENCE) as connection:
            for _ in range(3):
                connection.sendall(head.encode())
                connection.settimeout(0.3)
                with pytest.raises(TimeoutError):
                    connection.recv(1)
                connection.settimeout(PATIENCE)
                connection.sendall(b"{}")
                received = b""
                while b"no task" not in received:
                    more = connection.recv(65536)
                    assert more, received
                    received += more
                assert b" 404 " in received


def test_a_thousand_streams(place: Path, backend: str) -> None:
    """So many event streams are open at the same time, and nothing is left of them after they are gone."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = STREAMS + 500
    if hard < needed:
        pytest.skip("needs more open files than may be had here: ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, needed), hard))
    with serving(place, "serve", "application:quick", "--backend", backend, "--drain", "0") as server:
        task_id = server.submit("stuck")
        port = httpx.URL(server.url).port
        descriptors = Path(f"/proc/{server.process.pid}/fd")
        before = count(descriptors)
        with ExitStack() as stack:
            streams = [
                stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE)) for _ in range(STREAMS)
            ]
            for number, stream in enumerate(streams):
                path = "events" if number % 2 else f"tasks/{task_id}/events"
                stream.sendall(f"GET /{path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            for stream in streams:
                received = b""
                while b"\ndata: " not in received:
                    more = stream.recv(65536)
                    assert more, received
                    received += more
                assert received.startswith(b"HTTP/1.1 200")
            assert count(descriptors) >= before + STREAMS
            # It still answers.
            assert server.status(task_id) == TaskStatus.RUNNING
        wait_until(lambda: count(descriptors) <= before)
        assert server.end(signal.SIGTERM)[0] == 0


DESCRIBED = """
import os
from dataclasses import dataclass
from pathlib import Path

import anyio
from chanflow.tasks import Progress, TaskService
from chanflow.tasks.http import _live
from pydantic import BaseModel

class Preaching(TaskService):
    "Whose bus has dead letters."

    async def __aenter__(self):
        await super().__aenter__()
        async with self.bus.subscribe("orders", group="shop") as messages:
            for reason in ("no such thing", "\\udcff", "<b>", ""):
                await self.bus.publish("orders", b"\\xff", key="k", headers={"a": "b"})
                await (await anext(messages)).reject(reason)
        return self

service = Preaching(bus="sqlite:///bus.db", workers=4, ttl=5.0)

@dataclass
class Address:
    street: str
    number: int = 1

class Order(BaseModel):
    item: str
    parts: list["Order"] = []

@service.task
async def report(progress: Progress | None, pages: int = 2, to: Address | None = None) -> dict:
    "Write a report."
    return {"pages": pages}

@service.task
async def fail(text: str) -> None:
    raise ValueError(text)

@service.task(name="{send} mail?")
async def echo(data: dict[str, float | str | None], tags: list[str] = [], at: Path = Path()) -> dict:
    return data

@service.task
async def order(order: Order, more: object = None) -> Order:
    return order

@service.task
async def nap(long: bool = False) -> None:
    "So that some are cancelled, and some watched."
    await anyio.sleep(0.5 if long else 0.01)

async def end(self):
    "A stream of snapshots has no end, and nobody who looks at answers would see one."
    for _ in range(2):
        yield await self._snapshot()
        await anyio.sleep(0.01)

_live.Live.stream = end
"""
EACH = re.compile(r"Operations: +(\d+) selected / \1 total.*Tested: \1\n", re.DOTALL)
"""What it says where it tried all that is described."""


def test_schemathesis(place: Path, backend: str) -> None:
    """Whatever is asked of any route, it is no server error, and what is answered is as the description says."""
    (place / "described.py").write_text(DESCRIBED)
    arguments = ("--drain", "0", "--max-wait", "0.05", "--dead-letters", "orders.dead")
    with serving(place, "serve", "described:service", "--backend", backend, *arguments) as server:
        command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}openapi.json"]
        checks = (
            "not_a_server_error,status_code_conformance,content_type_conformance,"
            "response_schema_conformance,response_headers_conformance"
        )
        done = subprocess.run(
            [*command, "--checks", checks, "--max-examples", "6", "--generation-deterministic", "--no-color"],
            cwd=place,
            text=True,
            capture_output=True,
            timeout=10 * PATIENCE,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-5000:]
        assert EACH.search(done.stdout), done.stdout[-5000:]
        assert server.end(signal.SIGTERM)[0] == 0
