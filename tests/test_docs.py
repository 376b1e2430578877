"""The examples in the README and the documentation run, and print what the text says they print."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from sybil import Document, Example
from sybil.evaluators.python import PythonEvaluator
from sybil.parsers.markdown import CodeBlockParser

import chanflow
from chanflow import bus, tasks
from tests.support.documents import DOCUMENTS, ROOT, WITHOUT_EXAMPLES


class Examples:
    """The Python blocks of one document, which share a namespace, each with the `text` block of its output after it."""

    def __init__(self, path: Path) -> None:
        self.count = 0
        self._python = PythonEvaluator()
        self._output = ""
        self._end = 0
        parsers = CodeBlockParser("python", self._run), CodeBlockParser("text", self._compare)
        self._document = Document.parse(str(path), *parsers)

    def evaluate(self) -> None:
        for example in self._document:
            example.evaluate()

    def _run(self, example: Example) -> None:
        self.count += 1
        with redirect_stdout(io.StringIO()) as output:
            self._python(example)
        self._output = output.getvalue()
        self._end = example.end

    def _compare(self, example: Example) -> str | None:
        follows = not self._document.text[self._end : example.start].strip()
        if not follows or example.parsed == self._output:
            return None
        return f"the block before printed:\n{self._output}"


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    """Undo what an example may have set."""
    yield
    chanflow.set_checkpoint_interval()
    logging.getLogger("chanflow").setLevel(logging.NOTSET)


@pytest.mark.parametrize("path", DOCUMENTS, ids=[path.name for path in DOCUMENTS])
def test_examples(path: Path) -> None:
    """All blocks run, in their order, and a document that should have examples has some."""
    examples = Examples(path)
    examples.evaluate()
    assert (examples.count > 0) == (path.name not in WITHOUT_EXAMPLES)


def test_reference_is_complete() -> None:
    """Every public name has its entry in the reference, and every entry is a public name."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    entries = re.findall(r"^\.\. auto(?:class|data|exception|function):: (\w+)(?:\(\))?$", text, re.MULTILINE)
    assert sorted(entries) == sorted([*chanflow.__all__, *bus.__all__, *tasks.__all__])
