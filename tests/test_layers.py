"""The house: which module may import which, and what is public."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import chanflow

SOURCE = Path(chanflow.__file__).parent

# Each storey may import from those before it, and modules of one tier not from each other.
TIERS = [
    {"_check", "_url", "_visible"},
    {"_park"},
    {"_room", "_offload", "_ledger"},
    {"_state", "_signal"},
    {"_attempt"},
    {"_retry"},
    {"_channel"},
    {"_select", "_group", "_threads"},
    {"_map"},
    {"_workers", "_storage"},
    {"chanflow"},
    {"bus.backend"},
    {"bus._subscription", "bus.memory", "bus.sqlite"},
    {"bus._consume"},
    {"bus._bus"},
    {"bus._connect", "bus.conformance"},
    {"bus"},
    {"tasks.record"},
    {"tasks._errors", "tasks._schema"},
    {"tasks._handler"},
    {"tasks.store"},
    {"tasks.stores", "tasks.stores._bell", "tasks.stores._gather", "tasks.stores._redis_url", "tasks.stores._scripts"},
    {"tasks.stores._redis_client"},
    {"tasks.stores.memory", "tasks.stores.redis", "tasks.stores.sqlite", "tasks.conformance"},
    {"tasks._open", "tasks._token", "tasks._statistics", "tasks._log", "tasks._trace", "tasks._watch"},
    {"tasks._dispatch", "tasks._idempotency", "tasks.wire"},
    {"tasks._bus_dispatch", "tasks._runner"},
    {"tasks.http._problem", "tasks.http._metrics", "tasks.http._client"},
    {"tasks.http._request", "tasks.http._openapi"},
    {"tasks.http._upload"},
    {"tasks.http._guard", "tasks.http._stream"},
    {"tasks.http._live"},
    {"tasks.http._app", "tasks.http"},
    {"tasks._service"},
    {"tasks"},
    {"demo", "demo_service", "ending", "connections"},
    {"server_uvicorn", "server_hypercorn"},
    {"server"},
    {"commands"},
    {"serve"},
    {"cli"},
]


def imported(path: Path) -> set[str]:
    """Give the modules of chanflow that a module imports when it runs."""
    names: set[str] = set()
    tree = ast.parse(path.read_text("utf-8"))
    for_types = [
        node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    skipped = {id(inner) for block in for_types for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} has a relative import"
            assert node.module is not None
            names.add(node.module)
    return {name.removeprefix("chanflow.") for name in names if name.split(".")[0] == "chanflow"}


def name_of(path: Path) -> str:
    """Give the name of a module within chanflow."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "chanflow"


MODULES = sorted(path for path in SOURCE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=map(name_of, MODULES))
def test_imports_come_from_below(path: Path) -> None:
    """Each module imports only from lower tiers of the house."""
    name = name_of(path)
    tier = next((index for index, tier in enumerate(TIERS) if name in tier), None)
    assert tier is not None, f"{name} has no place in the house"
    below = set[str]().union(*TIERS[:tier])
    assert imported(path) <= below


def test_only_park_knows_asyncio_from_trio() -> None:
    """No other module of the library imports an event loop, but those of the servers, of which each is for one."""
    for path in MODULES:
        tree = ast.parse(path.read_text("utf-8"))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            loops = {name.split(".")[0] for name in names} & {"asyncio", "trio", "sniffio", "uvloop"}
            assert not loops or path.stem in {"_park", "server_uvicorn", "server_hypercorn"}, (
                f"{path.name} imports {loops}"
            )


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
