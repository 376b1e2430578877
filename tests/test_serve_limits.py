"""A server alone on the open net: silent clients, those that do not read, floods, and where descriptors run out."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from time import monotonic, sleep

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import h2.settings
import httpx
import pytest

from chanflow.tasks import TaskStatus
from tests.support.command import PATIENCE
from tests.support.server import Server, serving, wait_until

pytestmark = pytest.mark.slow

APPLICATION = """
import os
import anyio
from chanflow.cli import connections
from chanflow.tasks import TaskService

connections.HEAD_SECONDS = {head}
connections.BODY_SECONDS = {body}
connections.STALL_SECONDS = {stall}
connections.RETRY_SECONDS = 0.05
service = TaskService(workers=4)

@service.task
async def large(size: int) -> str:
    return "x" * size

@service.task
async def stuck() -> None:
    await anyio.sleep(3600)

@service.task
async def hog(seconds: float) -> int:
    "Take all descriptors for a while."
    taken = []
    try:
        while True:
            taken.append(os.open("/dev/null", os.O_RDONLY))
    except OSError:
        await anyio.sleep(seconds)
        return len(taken)
    finally:
        for each in taken:
            os.close(each)
"""
HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    return request.param


@contextmanager
def limited(
    place: Path, backend: str, *arguments: str, head: float = 20.0, body: float = 60.0, stall: float = 60.0
) -> Iterator[tuple[Server, int]]:
    """Serve with shorter deadlines, and give the port, too."""
    (place / "limited.py").write_text(APPLICATION.format(head=head, body=body, stall=stall))
    with serving(place, "serve", "limited:service", "--backend", backend, "--drain", "0", *arguments) as server:
        port = httpx.URL(server.url).port
        assert port is not None
        yield server, port


def connect(port: int) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), PATIENCE)


def ask(connection: socket.socket, request: bytes = HEAD) -> bytes:
    """Send a request, and give what comes first."""
    connection.sendall(request)
    return connection.recv(65536)


def receive_until(connection: socket.socket, part: bytes) -> None:
    """Receive until something has come."""
    received = b""
    while part not in received:
        more = connection.recv(65536)
        assert more, received
        received += more


def is_cut(connection: socket.socket) -> bool:
    """Wait for the end of a connection; false if it doesn't come."""
    try:
        while connection.recv(65536):
            pass
    except ConnectionError:
        pass
    except TimeoutError:
        return False
    return True


def is_well(port: int) -> bool:
    """Tell whether the server answers somebody new."""
    with connect(port) as connection:
        return b" 200 " in ask(connection)


def memory(server: Server) -> int:
    """Give the bytes of memory that the server's process has."""
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) * 1024


def test_silent_connections_are_cut(tmp_path: Path, backend: str) -> None:
    """Whoever does not send the head of a request in time is cut off, and nobody else."""
    with limited(tmp_path, backend, head=1.5) as (server, port), ExitStack() as stack:
        task_id = server.submit("stuck")
        silent, slow, again, half, streaming, waiting = (stack.enter_context(connect(port)) for _ in range(6))
        assert b" 200 " in ask(again)
        assert b" 200 " in ask(half)
        half.sendall(HEAD[:-2])
        assert b" 200 " in ask(streaming, f"GET /tasks/{task_id}/events HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        waiting.sendall(f"GET /tasks/{task_id} HTTP/1.1\r\nHost: localhost\r\nPrefer: wait=4\r\n\r\n".encode())
        began = monotonic()
        # A byte now and then changes nothing.
        for byte in HEAD * 3:
            try:
                slow.sendall(bytes([byte]))
            except ConnectionError:
                break
            sleep(0.1)
        slow_for = monotonic() - began
        assert all(map(is_cut, (silent, slow, again, half)))
        if backend == "trio":
            # As is one that says that it goes on in HTTP/2, and then nothing.
            flood = Flood(port)
            stack.callback(flood.socket.close)
            assert is_cut(flood.socket)
        assert 1.0 < slow_for < 10.0
        receive_until(waiting, b'"status":"running"')
        # It is told every 5 seconds that it is alive.
        receive_until(streaming, b": keep-alive")
        assert b" 200 " in ask(waiting)
        assert server.end(signal.SIGTERM)[0] == 0


def test_a_body_that_does_not_come_is_cut(tmp_path: Path, backend: str) -> None:
    """Nobody holds a connection with a body that does not end, at once or by the byte; an answer may take longer."""
    with limited(tmp_path, backend, body=1.5) as (server, port), ExitStack() as stack:
        task_id = server.submit("stuck")
        head = b"POST /tasks/large HTTP/1.1\r\nHost: localhost\r\nContent-Length: 50\r\n\r\n"
        silent, slow, waiting = (stack.enter_context(connect(port)) for _ in range(3))
        silent.sendall(head)
        slow.sendall(head)
        waiting.sendall(f"GET /tasks/{task_id} HTTP/1.1\r\nHost: localhost\r\nPrefer: wait=4\r\n\r\n".encode())
        began = monotonic()
        with suppress(ConnectionError):
            for _ in range(45):
                slow.sendall(b" ")
                sleep(0.1)
        assert 1.0 < monotonic() - began < 4.4
        assert is_cut(silent)
        receive_until(waiting, b'"status":"running"')
        assert server.end(signal.SIGTERM)[0] == 0


def test_a_client_that_does_not_read_is_cut(tmp_path: Path, backend: str) -> None:
    """It is aborted once it has taken nothing for so long; one that reads slowly gets all."""
    with limited(tmp_path, backend, head=0.5, stall=2.0) as (server, port), ExitStack() as stack:
        size = 20_000_000
        headers = {"Prefer": "wait=10"}
        task_id = server.http.post("tasks/large", json={"size": size}, headers=headers).json()["id"]
        request = f"GET /tasks/{task_id} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
        deaf, slow = (stack.enter_context(connect(port)) for _ in range(2))
        for each in (deaf, slow):
            each.sendall(request)
        received, began = 0, monotonic()
        while received < size:
            more = slow.recv(1_000_000)
            assert more, received
            received += len(more)
            sleep(0.15)
        # Longer than anybody may take nothing; the other one has got what was on its way when it was given up.
        assert monotonic() - began > 3.0
        received = 0
        with suppress(ConnectionError):
            while more := deaf.recv(4_000_000):
                received += len(more)
        assert received < size
        assert server.end(signal.SIGTERM)[0] == 0


def test_clients_that_do_not_read_keep_no_process(tmp_path: Path, backend: str) -> None:
    """After the grace their connections are aborted, and the process ends."""
    with limited(tmp_path, backend) as (server, port), ExitStack() as stack:
        headers = {"Prefer": "wait=10"}
        task_id = server.http.post("tasks/large", json={"size": 20_000_000}, headers=headers).json()["id"]
        for _ in range(10):
            deaf = stack.enter_context(connect(port))
            deaf.sendall(f"GET /tasks/{task_id} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            deaf.recv(1)
        began = monotonic()
        assert server.end(signal.SIGTERM)[0] == 0
        assert monotonic() - began < 5.0


def test_connections_are_bounded(tmp_path: Path, backend: str) -> None:
    """With so many, others wait until one has ended, and the log says so once."""
    with limited(tmp_path, backend, "--max-connections", "5") as (server, port), ExitStack() as stack:
        first = [stack.enter_context(connect(port)) for _ in range(5)]
        assert all(b" 200 " in ask(each) for each in first)
        later = [stack.enter_context(connect(port)) for _ in range(20)]
        for each in later:
            each.sendall(HEAD)
            each.settimeout(0.02)
            with pytest.raises(TimeoutError):
                each.recv(1)
            each.settimeout(PATIENCE)
        first[3].close()
        assert b" 200 " in later[0].recv(65536)
        for each in [*first, later[0]]:
            each.close()
        assert all(b" 200 " in each.recv(65536) for each in later[1:6])
        for each in later:
            each.close()
        # All places were given back.
        assert all(b" 200 " in ask(stack.enter_context(connect(port))) for _ in range(5))
        status, said = server.end(signal.SIGTERM)
        assert status == 0
        assert said.count("5 connections are open, and others have to wait") == 1


def test_where_descriptors_run_out(tmp_path: Path, backend: str) -> None:
    """It waits, says so in one line, and answers once there are some again."""
    with limited(tmp_path, backend) as (server, port), ExitStack() as stack:
        task_id = server.submit("hog", seconds=2.0)
        wait_until(lambda: server.status(task_id) == TaskStatus.RUNNING)
        others = [stack.enter_context(connect(port)) for _ in range(20)]
        for each in others:
            each.sendall(HEAD)
        assert server.status(task_id) == TaskStatus.RUNNING
        assert all(b" 200 " in each.recv(65536) for each in others)
        assert server.status(task_id) == TaskStatus.SUCCESS
        status, said = server.end(signal.SIGTERM)
        assert status == 0
        assert said.count("connections can't be accepted, which is tried again: Too many open files") == 1
        assert len(said.splitlines()) < 10, said


NONE_CHECKED = h2.config.H2Configuration(
    client_side=True, validate_outbound_headers=False, normalize_outbound_headers=False
)


class Flood:
    """A connection in HTTP/2 whose window for answers is closed."""

    def __init__(self, port: int) -> None:
        self.socket = connect(port)
        self.h2 = h2.connection.H2Connection(NONE_CHECKED)
        self.h2.initiate_connection()
        self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        self.send()
        # Their settings say how many requests are too many.
        while self.h2.remote_settings.max_concurrent_streams > 1000:
            self.h2.receive_data(self.socket.recv(65536))
        self.send()

    def send(self) -> None:
        self.socket.sendall(self.h2.data_to_send())

    def ask(self, path: bytes, count: int) -> None:
        headers = [(b":method", b"GET"), (b":path", path), (b":scheme", b"http"), (b":authority", b"localhost")]
        for _ in range(count):
            self.h2.send_headers(self.h2.get_next_available_stream_id(), headers, end_stream=True)
        self.send()


def test_a_flood_of_streams(tmp_path: Path) -> None:
    """Requests in HTTP/2 are bounded in each connection and in all; memory is, too, and the process ends."""
    with limited(tmp_path, "trio", "--max-connections", "300", stall=3.0) as (server, port), ExitStack() as stack:
        assert server.http.get("health").status_code == 200
        before = memory(server)
        floods = [Flood(port) for _ in range(20)]
        for flood in floods:
            stack.callback(flood.socket.close)
            assert flood.h2.remote_settings.max_concurrent_streams == 100
            flood.ask(b"/dashboard.js", 100)
        sleep(1.0)
        assert server.http.get("health").status_code == 200
        # Of 2,000 requests there is room for less than 300.
        assert memory(server) - before < 40_000_000
        # More than they may have ends the connection.
        one = Flood(port)
        one.h2.remote_settings[h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS] = 1000
        one.h2.remote_settings.acknowledge()
        stack.callback(one.socket.close)
        one.ask(b"/dashboard.js", 101)
        assert is_cut(one.socket)
        # After a while, those that read nothing are given up.
        assert all(is_cut(flood.socket) for flood in floods)
        assert server.http.get("health").status_code == 200
        last = Flood(port)
        stack.callback(last.socket.close)
        last.ask(b"/dashboard.js", 100)
        began = monotonic()
        assert server.end(signal.SIGTERM)[0] == 0
        assert monotonic() - began < 5.0


def test_nonsense_ends_no_server(tmp_path: Path, backend: str) -> None:
    """Whatever a client sends, the others are served, and the log is not filled."""
    with limited(tmp_path, backend, head=1.0) as (server, port):
        for request in NONSENSE:
            with connect(port) as connection:
                with suppress(ConnectionError):
                    connection.sendall(request)
                assert is_cut(connection), request
            assert is_well(port), request
        if backend == "trio":
            for path in (b"/\xff", b"", b"no slash", b"/%", b"\x00"):
                flood = Flood(port)
                flood.ask(path, 1)
                flood.socket.close()
                assert is_well(port), path
        status, said = server.end(signal.SIGTERM)
        assert status == 0
        assert len(said.splitlines()) < 4, said


WEB_SOCKET = b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
NONSENSE = [
    b"",
    b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200,
    b"GET / HTTP/1.1\r\n\r\n",
    b"GET /\xff\xfe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"CONNECT localhost:80 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 100,
    b"GET /%ff%fe%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 1_000_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: a\r\n" * 10_000 + b"\r\n",
    b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    b"POST /tasks/large HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n{}",
    b"POST /tasks/large HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n{}",
    b"POST /tasks/x HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST /tasks/large HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n{}",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n" + WEB_SOCKET,
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: !\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\r\n",
    HEAD * 1000,
]
