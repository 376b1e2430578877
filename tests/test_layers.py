"""The house: which room may import from which, and what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import version
from pathlib import Path

import pytest

import chanflow

SOURCE = Path(chanflow.__file__).parent
TESTS = Path(__file__).parent
BENCHMARKS = TESTS.parent / "benchmarks"

# From the lowest up; each imports only from those below it, and from itself.
ROOMS = [
    "_check",
    "_url",
    "_errors",
    "_loop",
    "_sqlite",
    "_channel",
    "_work",
    "chanflow",
    "bus",
    "tasks",
    "cli",
    "__main__",
]
# Each drives a server that runs on one event loop only.
SERVERS = {"chanflow.cli.server_uvicorn", "chanflow.cli.server_hypercorn"}


def imported(path: Path, package: str = "chanflow") -> set[str]:
    """Give the modules of a package that a module imports: anywhere, also in a function or for type checkers only."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            assert node.module is not None
            # A name may be that of a module.
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.split(".")[0] == package}


def modules_of(package: Path) -> dict[str, Path]:
    """Give the modules of a package, by name."""
    return {
        ".".join(part for part in path.relative_to(package.parent).with_suffix("").parts if part != "__init__"): path
        for path in sorted(package.rglob("*.py"))
    }


def room_of(module: str) -> str:
    """Give the room that a module is in; the package as such is one, too."""
    return [*module.split("."), "chanflow"][1]


MODULES = modules_of(SOURCE)


@pytest.mark.parametrize("module", MODULES)
def test_imports_come_from_below(module: str) -> None:
    """Each module imports only from its room and from the rooms below."""
    room = room_of(module)
    assert room in ROOMS, f"{module} has no place in the house"
    below = set(ROOMS[: ROOMS.index(room) + 1])
    assert {room_of(name) for name in imported(MODULES[module]) & MODULES.keys()} <= below


def test_tests_share_by_way_of_their_support_only() -> None:
    """No module of the tests imports another, but those in `tests.support`."""
    modules = modules_of(TESTS)
    for module, path in modules.items():
        others = imported(path, "tests") & modules.keys()
        assert {name for name in others if not f"{name}.".startswith("tests.support.")} <= {"tests"}, module


@pytest.mark.parametrize("package", [SOURCE, BENCHMARKS], ids=lambda path: path.name)
def test_no_circles(package: Path) -> None:
    """No module imports, by way of others, itself."""
    modules = modules_of(package)
    # A package's own file is what its modules are found through, which is no dependency.
    graph = {
        name: {other for other in imported(path, package.name) & modules.keys() if not name.startswith(f"{other}.")}
        for name, path in modules.items()
    }
    tuple(TopologicalSorter(graph).static_order())


def test_the_check_finds_circles(tmp_path: Path) -> None:
    """One that is hidden in a function, or behind TYPE_CHECKING, is one."""
    package = tmp_path / "circular"
    package.mkdir()
    (package / "lower.py").write_text("def f() -> None:\n    from circular import upper\n")
    (package / "upper.py").write_text("if TYPE_CHECKING:\n    from circular.lower import f\n")
    with pytest.raises(CycleError):
        test_no_circles(package)


def test_only_the_loop_knows_asyncio_from_trio() -> None:
    """No other room imports an event loop."""
    for module, path in MODULES.items():
        names: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add(node.module or "")
        loops = {name.split(".")[0] for name in names} & {"asyncio", "trio", "sniffio", "uvloop"}
        assert not loops or room_of(module) == "_loop" or module in SERVERS, f"{module} imports {loops}"


def test_public_names() -> None:
    """The public names are these, and each says where users find it."""
    public = set(chanflow.__all__)
    assert public <= set(dir(chanflow))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        chanflow.Nothing  # noqa: B018
    assert public == {
        "After",
        "Case",
        "Channel",
        "ChannelStatistics",
        "DeadLetter",
        "Group",
        "ReceiveChannel",
        "Result",
        "ResultCancelledError",
        "Retry",
        "Selectable",
        "Send",
        "SendChannel",
        "ThreadChannel",
        "Ticker",
        "WorkerGroup",
        "WorkerStatistics",
        "after",
        "select",
        "select_nowait",
        "set_checkpoint_interval",
        "ticker",
    }
    for name in public:
        assert getattr(chanflow, name).__module__ == "chanflow", name
        assert getattr(chanflow, name).__doc__, name


def test_import_brings_no_event_loop_and_no_extra() -> None:
    """A fresh interpreter with all the names of channels has neither an event loop, nor attrs, nor an extra."""
    script = "import sys, chanflow; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "anyio" in loaded
    assert not loaded & {"asyncio", "trio", "attrs", "logging", "rich", "click", "hypothesis", "pytest"}


def test_the_bus_brings_no_backend() -> None:
    """Each is imported where it is used."""
    script = "import sys, chanflow.bus; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not {"sqlite3", "coredis"} & set(run.stdout.split())


def test_the_version_is_that_of_the_package() -> None:
    assert chanflow.__version__ == version("chanflow")


def test_every_public_docstring_has_its_sections() -> None:
    """What is awaited says what cancellation does; what raises, takes or returns says so by name."""
    missing = []
    for name in chanflow.__all__:
        thing = getattr(chanflow, name)
        if name.startswith("_") or not isinstance(thing, type):
            continue
        for attribute in dir(thing):
            member = getattr(thing, attribute)
            module = getattr(member, "__module__", "") or ""
            if attribute.startswith("_") or not callable(member) or not module.startswith("chanflow"):
                continue
            text = member.__doc__ or ""
            code = getattr(member, "__code__", None)
            if not text:
                missing.append(f"{name}.{attribute}: a docstring")
            elif code is not None and code.co_flags & 0x80 and "Cancellation:" not in text:
                missing.append(f"{name}.{attribute}: Cancellation")
    assert missing == []
