"""The `chanflow` command and its demo, run the way a user runs it."""

from __future__ import annotations

import hashlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from chanflow.cli.demos.digest import Digest, Summary, checksum_line, digest_tree
from chanflow.cli.main import main
from tests.support.command import COMMAND, PATIENCE

HUGE = 1 << 40
AWKWARD = [b"plain", b"with space", b"new\nline", b"back\\slash", b"carriage\rreturn", b"\xff\xfe", b"\\\r\n", b" lead"]


@pytest.fixture(autouse=True)
def buffered(monkeypatch: pytest.MonkeyPatch) -> None:
    """As users have it: Python's last flush of stdout finds what could not be written."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@pytest.fixture(params=["asyncio", "trio"])
def backend(request: pytest.FixtureRequest) -> str:
    """Give the backends by name: processes have no virtual time."""
    return request.param


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Make a small tree with files in three directories."""
    root = tmp_path / "tree"
    (root / "b" / "deep").mkdir(parents=True)
    (root / "empty").mkdir()
    for path in ("a", "b/c", "b/deep/d", "e"):
        (root / path).write_bytes(path.encode() * 1000)
    (root / "b" / "nothing").touch()
    return root


def demo(*args: str | os.PathLike[str], **kwargs: Any) -> subprocess.CompletedProcess[bytes]:
    """Run `chanflow demo`."""
    kwargs = {"capture_output": True, "timeout": PATIENCE} | kwargs
    command = [*COMMAND, "demo", *(os.fspath(argument) for argument in args)]
    completed: Any = subprocess.run(command, check=False, **kwargs)
    return completed


def expected(root: Path) -> dict[bytes, str]:
    """Give the digest of each regular file under a root, by its path."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {os.fsencode(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def digests(output: bytes) -> dict[bytes, str]:
    """Read lines as `sha256sum --check` does."""
    found = {}
    for line in output.split(b"\n")[:-1]:
        match = re.fullmatch(rb"(\\?)([0-9a-f]{64})  (.*)", line)
        assert match
        escaped, digest, name = match.groups()
        if escaped:
            name = re.sub(rb"\\(.)", lambda match: {b"n": b"\n", b"r": b"\r"}.get(match[1], match[1]), name)
        found[name] = digest.decode()
    return found


@pytest.mark.parametrize("workers", ["1", "3"])
def test_it_digests_a_tree(tree: Path, tmp_path: Path, backend: str, workers: str) -> None:
    """Every file has its line, in the order of the walk, and the summary counts them."""
    output = tmp_path / "sums"
    done = demo(tree, "--backend", backend, "--workers", workers, "--output", output)
    assert (done.returncode, done.stderr) == (0, b"")
    assert digests(output.read_bytes()) == expected(tree)
    size = sum(path.stat().st_size for path in tree.rglob("*") if path.is_file())
    lines = done.stdout.decode().splitlines()
    assert lines[:2] == ["files     5", f"bytes     {size} (0.0 MB)"]
    assert re.fullmatch(rf"seconds   \d+\.\d\d \(\d+\.\d MB/s, {workers} workers\)", lines[2])
    if workers == "1":
        assert len(lines) == 3
    else:
        assert re.fullmatch(r"speed-up  \d+\.\d\d over one worker, measured on 5 of the files", lines[3])
        assert len(lines) == 4


def test_lines_come_in_the_order_of_the_walk(tree: Path) -> None:
    """The output is the same each time, whoever of the workers is first."""
    done = demo(tree, "--workers", "4", "--output", "-")
    names = [line.partition("  ")[2] for line in done.stdout.decode().splitlines()]
    assert names == [str(tree / name) for name in ("a", "e", "b/c", "b/nothing", "b/deep/d")]
    # The summary goes where it is not in the way.
    assert done.stderr.startswith(b"files     5\n")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="there is no sha256sum on this machine")
def test_sha256sum_accepts_the_output(tmp_path: Path, backend: str) -> None:
    """Whatever bytes a file name is made of, `sha256sum --check --strict` finds the file."""
    root = tmp_path / "tree"
    root.mkdir()
    for name in AWKWARD:
        (root / os.fsdecode(name)).write_bytes(name)
    output = tmp_path / "sums"
    assert demo(root, "--backend", backend, "--output", output).returncode == 0
    assert digests(output.read_bytes()) == expected(root)
    command = ["sha256sum", "--check", "--strict", str(output)]
    check = subprocess.run(command, capture_output=True, check=False, timeout=PATIENCE)
    assert (check.returncode, check.stderr) == (0, b"")
    assert check.stdout.count(b": OK\n") == len(AWKWARD)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a b", b"00  a b\n"),
        ("a\nb", b"\\00  a\\nb\n"),
        ("a\rb", b"\\00  a\\rb\n"),
        ("a\\b", b"\\00  a\\\\b\n"),
        ("\udcff", b"00  \xff\n"),
    ],
)
def test_checksum_line(name: str, line: bytes) -> None:
    """A line break or backslash in a name is escaped, and the line marked, as GNU coreutils do it."""
    assert checksum_line(Digest(name, 0, "00")) == line


def test_what_cannot_be_read_is_told_and_counted(tree: Path, backend: str) -> None:
    """The rest goes on; only the exit status tells in the end."""
    (tree / "c").symlink_to("nowhere")
    done = demo(tree, "--backend", backend, "--output", "-", "--workers", "1")
    assert done.returncode == 1
    assert len(digests(done.stdout)) == 5
    first, second, *_ = done.stderr.decode().splitlines()
    assert first == f"cannot read {tree}/c: No such file or directory"
    assert second == "files     5 (1 unreadable)"


@pytest.mark.anyio
async def test_a_directory_that_cannot_be_read_is_told(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error of the walk is one of the digests, after the others."""
    original = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", path)
        return original(path)

    monkeypatch.setattr(os, "scandir", scandir)
    summary = Summary()
    digests: list[Digest] = []
    await digest_tree(str(tree), summary, digests.append, workers=2)
    assert (summary.files, summary.unreadable, summary.found) == (4, 1, 4)
    assert digests[-1].path == str(tree / "b" / "deep")
    assert isinstance(digests[-1].error, PermissionError)


@pytest.mark.anyio
async def test_an_error_of_the_report_ends_the_digest(tree: Path) -> None:
    """A failure to write is not taken for the end of the work, on either backend."""

    def report(digest: Digest) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ExceptionGroup) as caught:
        await digest_tree(str(tree), Summary(), report, workers=2)
    assert caught.group_contains(OSError, match=r"\A\[Errno 28\] No space left on device\Z")


def test_a_path_that_is_missing(tmp_path: Path) -> None:
    """One line, and the exit status of a wrong use."""
    done = demo(tmp_path / "missing")
    assert done.returncode == 2
    assert done.stdout == b""
    assert done.stderr.decode() == f"Error: {tmp_path}/missing: no such file or directory\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--workers", "0"], "Invalid value for '--workers': 0 is not in the range x>=1."),
        (["--workers", "many"], "Invalid value for '--workers': 'many' is not a valid integer range."),
        (["--backend", "curio"], "Invalid value for '--backend': 'curio' is not one of 'asyncio', 'trio'."),
        (["--output", "/missing/x"], "Invalid value for '--output': '/missing/x': No such file or directory"),
    ],
)
def test_wrong_arguments(tree: Path, args: list[str], message: str) -> None:
    """The error names the option, the rule and the value."""
    result = CliRunner().invoke(main, ["demo", str(tree), *args])
    assert result.exit_code == 2
    assert result.output.splitlines()[-1] == f"Error: {message}"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full on this machine")
@pytest.mark.parametrize("target", ["file", "stdout"])
def test_a_full_disk(tree: Path, backend: str, target: str) -> None:
    """One line instead of a traceback, and no summary that looks like success."""
    if target == "file":
        done = demo(tree, "--backend", backend, "--output", "/dev/full")
    else:
        with Path("/dev/full").open("wb") as full:
            done = demo(
                tree, "--backend", backend, "--output", "-", stdout=full, stderr=subprocess.PIPE, capture_output=False
            )
    assert done.returncode == 2
    assert done.stderr == b"Error: [Errno 28] No space left on device\n"
    assert not done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full on this machine")
def test_a_full_disk_for_the_summary(tree: Path) -> None:
    """The summary itself may find no room."""
    with Path("/dev/full").open("wb") as full:
        done = demo(tree, stdout=full, stderr=subprocess.PIPE, capture_output=False)
    assert (done.returncode, done.stderr) == (2, b"Error: stdout: No space left on device\n")


@pytest.fixture
def huge_tree(tree: Path) -> Path:
    """Add a file that is hashed for longer than anybody waits."""
    (tree / "b" / "huge").touch()
    os.truncate(tree / "b" / "huge", HUGE)
    return tree


@pytest.fixture
def start() -> Iterator[Any]:
    """Start `chanflow demo`, and see to it that it ends."""
    processes: list[subprocess.Popen[bytes]] = []

    def start(*args: str | os.PathLike[str], **kwargs: Any) -> subprocess.Popen[bytes]:
        kwargs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | kwargs
        command = [*COMMAND, "demo", *(os.fspath(argument) for argument in args)]
        process: Any = subprocess.Popen(command, **kwargs)
        processes.append(process)
        return process

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_tells_what_was_done(huge_tree: Path, backend: str, workers: str, start: Any) -> None:
    """Ctrl-C stops even the file that is being hashed; what was done is written and summed up."""
    process = start(huge_tree, "--backend", backend, "--workers", workers, "--output", "-")
    lines = [process.stdout.readline() for _ in range(3)]
    # The next in line is the huge one.
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert rest == b""
    assert list(digests(b"".join(lines))) == [os.fsencode(huge_tree / name) for name in ("a", "e", "b/c")]
    summary = errors.decode().splitlines()
    assert summary[:3] == [
        "interrupted; this is what was done so far:",
        "files     3",
        "bytes     5000 (0.0 MB)",
    ]
    assert summary[3].startswith("seconds   ")
    assert not summary[4:]


def test_a_closed_pipe(tree: Path, backend: str, start: Any) -> None:
    """A reader that has seen enough, like `head`, is no reason for a traceback."""
    for number in range(300):
        (tree / f"x{number}").touch()
    process = start(tree, "--backend", backend, "--output", "-")
    assert process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(PATIENCE) == 1
    assert errors == b""


def test_a_pipe_that_is_closed_before_the_summary(tree: Path, backend: str) -> None:
    """The same for who doesn't want to read even the summary."""
    reading, writing = os.pipe()
    os.close(reading)
    done = demo(tree, "--backend", backend, stdout=writing, stderr=subprocess.PIPE, capture_output=False)
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode == 1


def test_no_progress_bar_without_a_terminal(tree: Path, backend: str) -> None:
    """Not one control character reaches a file or a pipe."""
    done = demo(tree, "--backend", backend)
    assert done.returncode == 0
    assert done.stderr == b""
    assert not re.search(rb"[^\n -~]", done.stdout)


def test_a_progress_bar_on_a_terminal(tree: Path, backend: str) -> None:
    """A terminal gets a progress bar, which is gone in the end."""
    master, slave = pty.openpty()
    seen = bytearray()

    def read() -> None:
        try:
            while piece := os.read(master, 1 << 16):
                seen.extend(piece)
        except OSError:
            """The terminal is closed."""

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    done = demo(tree, "--backend", backend, stderr=slave, stdout=subprocess.PIPE, capture_output=False, env=environment)
    os.close(slave)
    reader.join(PATIENCE)
    assert not reader.is_alive()
    os.close(master)
    assert done.returncode == 0
    assert b"digesting" in seen
    assert b"\x1b[" in seen
    # The last thing is to erase the line.
    assert seen.rstrip().endswith(b"\x1b[2K")


def test_the_standard_library_is_the_default(
    tree: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Without PATH it is the standard library, but for what was installed into it."""
    (tree / "site-packages").mkdir()
    (tree / "site-packages" / "installed").touch()
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": str(tree)}.__getitem__)
    target = tmp_path_factory.mktemp("sums") / "sums"
    result = CliRunner().invoke(main, ["demo", "--output", str(target), "--workers", "1"])
    assert result.exit_code == 0
    assert list(digests(target.read_bytes())) == [
        os.fsencode(tree / name) for name in ("a", "e", "b/c", "b/nothing", "b/deep/d")
    ]


def test_a_file_as_path(tree: Path, backend: str) -> None:
    """PATH may be a file."""
    done = demo(tree / "a", "--backend", backend, "--output", "-")
    assert done.returncode == 0
    assert digests(done.stdout) == {os.fsencode(tree / "a"): hashlib.sha256(b"a" * 1000).hexdigest()}


def test_an_empty_directory(tree: Path, backend: str) -> None:
    """Nothing to do is no error."""
    done = demo(tree / "empty", "--backend", backend)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.splitlines()[0] == b"files     0"


def test_what_is_no_regular_file_is_left_out(tree: Path, backend: str) -> None:
    """A named pipe would be waited for without end."""
    os.mkfifo(tree / "fifo")
    (tree / "b" / "fifo").symlink_to(tree / "fifo")
    done = demo(tree, "--backend", backend, "--output", "-")
    assert done.returncode == 0
    assert digests(done.stdout).keys() == {
        os.fsencode(tree / name) for name in ("a", "e", "b/c", "b/nothing", "b/deep/d")
    }


@pytest.mark.parametrize(
    ("path", "output"),
    [(".", "./sums"), (".", "sums"), ("", "sums"), ("", None)],
    ids=["same", "in here", "other way", "redirected"],
)
def test_the_output_is_not_digested(tree: Path, path: str, output: str | None) -> None:
    """However it is spelled, the file that is being written is left out: its digest would be wrong."""
    count = len(expected(tree))
    root = path or tree
    if output is None:
        with (tree / "sums").open("wb") as file:
            demo(root, "--output", "-", cwd=tree, stdout=file, stderr=subprocess.PIPE, capture_output=False)
    else:
        demo(root, "--output", output, cwd=tree)
    found = digests((tree / "sums").read_bytes())
    assert len(found) == count
    assert not any(name.endswith(b"sums") for name in found)


@pytest.mark.parametrize("missing", ["click", "rich"])
def test_the_extra_is_missing(missing: str) -> None:
    """Without the `cli` extra, the command says how to get it."""
    code = f"import sys; sys.modules[{missing!r}] = None; import chanflow.cli.main"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=PATIENCE)
    assert done.returncode == 1
    assert done.stderr == b"the chanflow command needs click and rich: pip install 'chanflow[cli]'\n"


def test_help_and_version() -> None:
    """The command tells what it does and which version it is."""
    runner = CliRunner()
    text = runner.invoke(main, ["-h"])
    assert text.exit_code == 0
    assert "Goroutines, channels and worker groups for asyncio and trio." in text.output
    text = runner.invoke(main, ["demo", "--help"])
    assert text.exit_code == 0
    assert "Digest all files under PATH in a bounded pipeline." in text.output
    for option in ("--workers", "--backend", "--output"):
        assert option in text.output
    assert runner.invoke(main, ["--version"], prog_name="chanflow").output == "chanflow, version 0.1.0\n"
