"""The README and the documentation."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITHOUT_EXAMPLES = {"problems.md", "benchmarks-tasks.md", "benchmarks.md", "changelog.md", "reference.md"}
