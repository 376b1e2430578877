"""The commands of the pages on HTTP run, against the service that the page serves, and print what it says."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Timer

import pytest
from attrs import define, field

from chanflow.tasks import http
from tests.support.command import COMMAND, PATIENCE

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {"tutorial-5.md": 30, "deploying.md": 2}
"""How many files and commands each has at least."""
BLOCK = re.compile(r"^```(python|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"This is `([a-z]+\.py)`[^\n]*\n\n$")
"""What stands before a block that is a file of the reader's."""
SERVE = "chanflow serve "
SERVING = "serving on http://127.0.0.1:"
DONE = "the command is done"
DIFFERING = (
    (r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", "TIME"),
    (r"(?m)^date: .*$", "date: TIME"),
    (r"\b[0-9a-f]{16}\.\d+\b", "WORKER"),
    # Its name since Python 3.13.
    (r"Unprocessable Content", "Unprocessable Entity"),
)
"""What differs from one run to the next."""


@define
class Step:
    """A command of the page and what it says that it prints, or a file and its text."""

    line: int
    command: str
    text: str = ""
    is_file: bool = False


def read_page(path: Path) -> list[Step]:
    """Give what the page lets its reader do, in order: its files, and commands that have a prompt."""
    page = path.read_text(encoding="utf-8")
    steps: list[Step] = []
    for block in BLOCK.finditer(page):
        line = page.count("\n", 0, block.start()) + 2
        name = FILE.search(page, 0, block.start())
        if block[1] == "python":
            steps += [Step(line, name[1], block[2], is_file=True)] if name else []
        if not block[2].startswith("$ "):
            continue
        for number, text in enumerate(block[2].splitlines(), line):
            if text.startswith("$ "):
                steps.append(Step(number, text.removeprefix("$ ")))
            else:
                steps[-1].text += f"{text}\n"
    return steps


@define(eq=False)
class Reader:
    """Does what the page says, in a directory and one bash, so that variables stay."""

    directory: Path
    bash: subprocess.Popen[str]
    environment: dict[str, str]
    servers: ExitStack
    ports: dict[str, str] = field(factory=dict)
    """Those of the page, and those that are theirs here."""

    def do(self, step: Step) -> str:
        """Do a step, and give what came of it as the page would say it."""
        command = self._here(step.command)
        if step.is_file:
            (self.directory / command).write_text(self._here(step.text), encoding="utf-8")
            return step.text
        if command.startswith(SERVE):
            return self.servers.enter_context(self._serving(command))
        return self._there(self._run(command))

    def _run(self, command: str) -> str:
        assert self.bash.stdin is not None
        assert self.bash.stdout is not None
        # In braces, as `</dev/null` is then for all of it: the input is where the commands come from.
        self.bash.stdin.write(f"{{ {command}\n}} </dev/null; printf '\\n{DONE}\\n'\n")
        self.bash.stdin.flush()
        printed = ""
        while (line := self.bash.stdout.readline()) != f"{DONE}\n":
            assert line, f"bash ended, or was ended after {PATIENCE:g} s:\n{printed}"
            printed += line
        return printed

    @contextmanager
    def _serving(self, command: str) -> Iterator[str]:
        """Serve on a free port, and give the line that tells of it."""
        port = re.search(r" --port (\d+)", command)
        arguments = command.replace(port[0], "").split() if port else command.split()
        with subprocess.Popen(
            [*COMMAND, *arguments[1:], "--port", "0"],
            cwd=self.directory,
            env=self.environment,
            text=True,
            stderr=subprocess.PIPE,
        ) as server:
            assert server.stderr is not None
            try:
                log = ""
                while not (line := server.stderr.readline()).startswith(SERVING):
                    log += line
                    assert line, f"it ended:\n{log}"
                self.ports[port[1] if port else "8000"] = line.removeprefix(SERVING).strip("/\n")
                yield self._there(line)
            finally:
                # The second one doesn't let it wait for what runs.
                server.terminate()
                for line in server.stderr:
                    if line.startswith("draining"):
                        server.terminate()

    def _here(self, text: str) -> str:
        for page, here in self.ports.items():
            text = text.replace(f"127.0.0.1:{page}", f"127.0.0.1:{here}")
        return text

    def _there(self, text: str) -> str:
        for page, here in self.ports.items():
            text = text.replace(f"127.0.0.1:{here}", f"127.0.0.1:{page}")
        return text


def normal(text: str, ids: dict[str, str]) -> str:
    """Make the same what may differ; an id becomes the number of those before it."""
    text = re.sub(r"\b[0-9a-f]{32}\b", lambda found: ids.setdefault(found[0], f"ID {len(ids)}"), text)
    for pattern, instead in DIFFERING:
        text = re.sub(pattern, instead, text)
    return text.strip()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    """Make a reader with a terminal."""
    for program in "bash", "curl":
        if shutil.which(program) is None:
            pytest.fail(f"{program} is not on the PATH, and the commands of the documentation need it")
    # Nothing of the user's own settings, and no proxy.
    environment = os.environ | {"CURL_HOME": str(tmp_path), "NO_PROXY": "*", "no_proxy": "*", "PYTHON": sys.executable}
    with (
        ExitStack() as servers,
        subprocess.Popen(
            ["bash", "--norc"],  # noqa: S607 -- wherever it is
            cwd=tmp_path,
            env=environment,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as bash,
    ):
        # With what it started.
        alarm = Timer(PATIENCE, os.killpg, (bash.pid, signal.SIGKILL))
        alarm.start()
        try:
            reader = Reader(tmp_path, bash, environment, servers)
            # Whatever it is called here.
            reader._run('python() { "$PYTHON" "$@"; }')
            yield reader
            bash.communicate(timeout=PATIENCE)
        finally:
            alarm.cancel()


@pytest.mark.parametrize("name", PAGES)
def test_commands(reader: Reader, name: str) -> None:
    """Each prints what the page says, but for what differs each time; ids are the same where the page says so."""
    here: dict[str, str] = {}
    there: dict[str, str] = {}
    steps = read_page(DOCS / name)
    assert len(steps) >= PAGES[name]
    for step in steps:
        try:
            printed = reader.do(step)
        except AssertionError as error:
            pytest.fail(f"{name}, line {step.line}: {step.command}\n{error}")
        if normal(printed, here) != normal(step.text, there):
            pytest.fail(f"{name}, line {step.line}: {step.command}\nprinted:\n{printed}")


def test_reference() -> None:
    """The public names of `chanflow.tasks.http` have their entries in the reference."""
    text = (DOCS / "reference.md").read_text(encoding="utf-8")
    entries = re.findall(r"^\.\. auto(?:class|exception):: chanflow\.tasks\.http\.(\w+)", text, re.MULTILINE)
    assert sorted(entries) == sorted(http.__all__)
