"""The examples in the README and the documentation pass the type checkers, as they do in a user's strict project."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from sybil import Document
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

from tests.support.documents import DOCUMENTS, ROOT, WITHOUT_EXAMPLES

PACKAGE = "documented"
"""What pyproject.toml calls the blocks, to say where mypy has to be less strict."""
UNTYPED = "django"
PYRIGHT_WITHOUT_TYPES = "# pyright: basic, reportAttributeAccessIssue=false, reportIndexIssue=false"
"""For the blocks with Django, which has no types: pyright guesses them from its code, and some wrongly."""


def names_bound(block: str) -> set[str]:
    """Give the names that a block defines or imports at its top level."""
    names: set[str] = set()
    waiting: list[ast.AST] = list(ast.parse(block).body)
    while waiting:
        node = waiting.pop()
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                names.add(node.name)
                continue
            case ast.comprehension():
                continue
            case ast.alias():
                names.add((node.asname or node.name).partition(".")[0])
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
        waiting += ast.iter_child_nodes(node)
    return names


def modules(path: Path) -> Iterator[tuple[str, str]]:
    """Make a module of each Python block of a document, at the same lines, for which the blocks before are imported.

    One module of them all would define `main` again and again, which type checkers refuse.
    """
    bound: dict[str, str] = {}
    for example in Document.parse(str(path), CodeBlockParser("python", PythonEvaluator())):
        block: str = example.parsed
        defined = names_bound(block)
        used = {node.id for node in ast.walk(ast.parse(block)) if isinstance(node, ast.Name)} - defined
        imports = "; ".join(f"from .{bound[name]} import {name}" for name in sorted(used & bound.keys()))
        settings = PYRIGHT_WITHOUT_TYPES if UNTYPED in block else ""
        name = f"line_{example.line}"
        yield name, f"{imports}\n{settings}" + "\n" * (example.line - 1) + block
        bound |= dict.fromkeys(defined, name)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the modules of all documents, as a package with one of its own for each."""
    root = tmp_path_factory.mktemp("types") / PACKAGE
    for path in DOCUMENTS:
        directory = root / path.stem.replace("-", "_")
        directory.mkdir(parents=True)
        for parent in root, directory:
            (parent / "__init__.py").touch()
        for name, text in modules(path):
            (directory / f"{name}.py").write_text(text, encoding="utf-8")
        assert (len(list(directory.iterdir())) > 1) == (path.name not in WITHOUT_EXAMPLES)
    return root


def check(module: str, *arguments: str | Path) -> None:
    """Run a type checker that must have nothing to say."""
    if find_spec(module) is None:
        pytest.skip(f"needs {module}, of the extra `lint`")
    command = sys.executable, "-m", module, *map(str, arguments)
    checker = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if checker.returncode != 0:
        pytest.fail(f"{checker.stdout}\n{checker.stderr}", pytrace=False)


def test_mypy(package: Path) -> None:
    """In strict mode."""
    check("mypy", "--config-file", ROOT / "pyproject.toml", package)


def test_pyright(package: Path) -> None:
    """In strict mode."""
    project = package.parent / "pyrightconfig.json"
    settings = {
        "include": [PACKAGE],
        "typeCheckingMode": "strict",
        "pythonVersion": "3.11",
        # What a block imports is there for those after it.
        "reportUnusedImport": False,
        # A name may be there for the reader, and a loop goes round at least once.
        "reportUnusedVariable": False,
        "reportPossiblyUnboundVariable": False,
    }
    project.write_text(json.dumps(settings), encoding="utf-8")
    check("pyright", "--project", project, "--pythonpath", sys.executable)
