"""Sphinx configuration: `python -m sphinx -b html -W -n docs docs/_build/html`, without any network."""

from __future__ import annotations

import sys
from importlib.metadata import version as distribution_version
from typing import Any

from docutils.nodes import Element
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import chanflow

project = "chanflow"
author = "The chanflow authors"
project_copyright = author
version = release = distribution_version("chanflow")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
nitpicky = True
# Docstrings use single backticks for code, as Markdown does.
default_role = "code"

html_theme = "furo"
html_title = f"chanflow {release}"

# So that other documents and the README can point at a heading.
myst_heading_anchors = 3

autodoc_class_signature = "mixed"
autodoc_member_order = "bysource"
autodoc_typehints = "signature"

napoleon_numpy_docstring = False
napoleon_custom_sections = ["Cancellation", "Source"]

nitpick_ignore = [
    # What a public function gives or takes, but is not a name of its own for users.
    ("py:class", "After"),
    ("py:class", "Ticker"),
    ("py:class", "chanflow._channel._select.After"),
    ("py:class", "chanflow._channel._select.Ticker"),
    # One of three strings, and one; their meaning is told with the argument.
    ("py:class", "Overflow"),
    ("py:class", "Offload"),
]
nitpick_ignore_regex = [
    # Documented elsewhere, and a build needs no network to look it up.
    (r"py:.*", r"(anyio|asyncio|httpx|logging|collections\.abc|types|typing)\..*"),
    # anyio's errors, which docstrings call by their bare names.
    (r"py:exc", r"BrokenResourceError|ClosedResourceError|EndOfStream|WouldBlock"),
    # Protocols and bases that are written out where they are used.
    (r"py:class", r"chanflow\._.*"),
    # Type variables.
    (r"py:(class|obj)", r"(.*\.)?(T|T_co|I_co|T_contra|T\d|Ts|P|R|Job)"),
]


def resolve_public(app: Sphinx, env: BuildEnvironment, node: pending_xref, content: Element) -> Element | None:
    """Point `chanflow._channel._ends.Channel` at `chanflow.Channel`, which is where it is documented."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    if not module.startswith("chanflow._") or not hasattr(chanflow, name):
        return None
    python: Any = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], f"chanflow.{name}", node, content)


# Names say that they are of `chanflow`; the comments on their fields are found where they were written.
for module_name, module in list(sys.modules.items()):
    if module_name.startswith("chanflow._"):
        for public_name in getattr(module, "__all__", ()):
            if hasattr(chanflow, public_name):
                getattr(module, public_name).__module__ = module_name


def hide_attribute(_app: Sphinx, what: str, name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Put the text of attributes aside, as napoleon takes words before a colon for the attribute's type."""
    if what in {"attribute", "property"}:
        hidden[name] = lines.copy()


def show_attribute(_app: Sphinx, _what: str, name: str, _object: Any, _options: Any, lines: list[str]) -> None:
    """Put it back."""
    if name in hidden:
        lines[:] = hidden.pop(name)


hidden: dict[str, list[str]] = {}


def setup(app: Sphinx) -> None:
    """Register with Sphinx."""
    # napoleon's own priority is 500.
    app.connect("autodoc-process-docstring", hide_attribute, priority=400)
    app.connect("autodoc-process-docstring", show_attribute, priority=600)
    app.connect("missing-reference", resolve_public)
