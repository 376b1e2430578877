"""Workloads of task services over HTTP: submit by POST, and ask for the result by GET, over kept connections."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import sniffio
from anyio import connect_tcp, create_task_group, sleep
from anyio.abc import SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream

from benchmarks.plan import ASYNCIO, BOTH, Entry, UnsupportedError, Workload

__all__ = ["workloads"]

CLIENTS = 10
"""Connections that ask at the same time, each one request after the other."""
CHANFLOW = """
import anyio
from chanflow.tasks import TaskService

service = TaskService(workers=10)

@service.task
async def work(number: int) -> int:
    return number

@service.task
async def stuck(number: int) -> int:
    await anyio.sleep(3600)
    return number

app = service.asgi(max_pending=1_000_000)
"""
# What people write: a dictionary, and a task of the event loop for each request.
STARLETTE = """
import asyncio
import contextlib
import json
import secrets
from starlette.applications import Starlette
from starlette.responses import JSONResponse
from starlette.routing import Route

tasks = {}

async def run(task_id, number):
    tasks[task_id] = {"task_id": task_id, "status": "success", "result": number}

async def submit(request):
    arguments = json.loads(await request.body())
    task_id = secrets.token_hex(16)
    tasks[task_id] = {"task_id": task_id, "status": "pending"}
    running.add(task := asyncio.create_task(run(task_id, int(arguments["number"]))))
    task.add_done_callback(running.discard)
    return JSONResponse({"task_id": task_id}, 202, {"Location": f"/tasks/{task_id}"})

async def get(request):
    task = tasks.get(request.path_params["task_id"])
    return JSONResponse({"detail": "unknown"}, 404) if task is None else JSONResponse(task)

running = set()
app = Starlette(routes=[Route("/tasks/work", submit, methods=["POST"]), Route("/tasks/{task_id}", get)])
"""
FASTAPI = """
from contextlib import asynccontextmanager
from fastapi import FastAPI
from pydantic import BaseModel
from taskiq import InMemoryBroker

broker = InMemoryBroker(max_stored_results=1_000_000)

@broker.task
async def work(number: int) -> int:
    return number

@asynccontextmanager
async def lifespan(app):
    await broker.startup()
    yield
    await broker.shutdown()

class Arguments(BaseModel):
    number: int

app = FastAPI(lifespan=lifespan)

@app.post("/tasks/work", status_code=202)
async def submit(arguments: Arguments):
    task = await work.kiq(arguments.number)
    return {"task_id": task.task_id}

@app.get("/tasks/{task_id}")
async def get(task_id: str):
    if not await broker.result_backend.is_result_ready(task_id):
        return {"task_id": task_id, "status": "pending"}
    result = await broker.result_backend.get_result(task_id)
    return {"task_id": task_id, "status": "success", "result": result.return_value}
"""
SERVER = """
import socket, sys
import anyio
import application
from chanflow.cli.server import serve

async def main(descriptor, backend):
    app = application.app
    lifespan = getattr(application, "service", None) or app.router.lifespan_context(app)
    async with lifespan:
        await serve(app, socket.socket(fileno=descriptor), backend, anyio.Event())

anyio.run(main, int(sys.argv[1]), sys.argv[2], backend=sys.argv[2])
"""


class Servers:
    """The servers that a measurement needs, each in a process of its own, from their first use to its end."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._ports: dict[str, int] = {}

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Stop them at the end of the block."""
        with self._stack:
            yield

    def port(self, application: str, backend: str) -> int:
        """Give the port of a server, which is started if it isn't there."""
        port = self._ports.get(application)
        if port is None:
            port = self._ports[application] = self._stack.enter_context(serving(application, backend))
        return port


servers = Servers()


@contextmanager
def serving(application: str, backend: str) -> Iterator[int]:
    """Serve an application from a process of its own, and give its port."""
    from chanflow.cli.server import listen

    with tempfile.TemporaryDirectory() as directory, listen("127.0.0.1", 0) as taken:
        (Path(directory) / "application.py").write_text(application)
        process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(taken.fileno()), backend],
            cwd=directory,
            pass_fds=[taken.fileno()],
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        try:
            yield taken.getsockname()[1]
        finally:
            process.terminate()
            _, said = process.communicate(timeout=30)
            if b"ModuleNotFoundError" in said:
                raise UnsupportedError(said.decode().splitlines()[-1])


class Client:
    """A connection that is kept, for requests with a length in the answer."""

    def __init__(self, stream: SocketStream) -> None:
        self._stream = BufferedByteReceiveStream(stream)
        self._send = stream.send

    async def ask(self, method: str, path: str, body: bytes = b"") -> dict[str, Any]:
        kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        await self._send(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n".encode() + body)
        head = (await self._stream.receive_until(b"\r\n\r\n", 65536)).lower()
        length = int(head.partition(b"content-length:")[2].partition(b"\r")[0])
        answer: dict[str, Any] = json.loads(await self._stream.receive_exactly(length))
        return answer


async def connect(port: int) -> SocketStream:
    """Connect, waiting until the server is there."""
    while True:
        try:
            return await connect_tcp("127.0.0.1", port)
        except OSError:
            await sleep(0.01)


def arguments(number: int) -> bytes:
    return json.dumps({"number": number}).encode()


async def submit_and_ask(application: str, count: int) -> None:
    """Submit tasks, and ask for each until it has ended."""
    port = servers.port(application, current_backend())

    async def work(numbers: range) -> None:
        async with await connect(port) as stream:
            client = Client(stream)
            for number in numbers:
                task = await client.ask("POST", "/tasks/work", arguments(number))
                while task.get("status") != "success":
                    task = await client.ask("GET", f"/tasks/{task.get('id') or task['task_id']}")
                assert task["result"] == number

    async with create_task_group() as tasks:
        for first in range(CLIENTS):
            tasks.start_soon(work, range(first, count, CLIENTS))


async def submit_queued(application: str, count: int) -> None:
    """Submit tasks, one request after the other, to a service with many in its queue."""
    async with await connect(servers.port(application, current_backend())) as stream:
        client = Client(stream)
        # Those of the first call, which warms up, stay queued for the second.
        for number in range(count):
            await client.ask("POST", "/tasks/stuck", arguments(number))


def current_backend() -> str:
    return sniffio.current_async_library()


def workloads() -> Iterator[Workload]:
    workload = partial(Workload, group="http", around=servers.kept)
    yield workload(
        "http-tasks",
        f"Tasks over HTTP: a POST, and a GET for the result, {CLIENTS} connections",
        unit="task",
        count=2000,
        entries={
            "chanflow": Entry(partial(submit_and_ask, CHANFLOW), BOTH),
            "starlette": Entry(partial(submit_and_ask, STARLETTE), ASYNCIO, note="by hand: `create_task` and a dict"),
            "FastAPI, taskiq": Entry(partial(submit_and_ask, FASTAPI), ASYNCIO, note="InMemoryBroker"),
        },
    )
    yield workload(
        "http-submit",
        "Submitting over HTTP, one request after the other, to a queue that goes from 1,000 tasks to 2,000",
        unit="submission",
        count=1000,
        warm_up=1000,
        entries={"chanflow": Entry(partial(submit_queued, CHANFLOW), BOTH)},
    )
