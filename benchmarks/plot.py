"""Draw the results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.plan import Workload
from benchmarks.report import Results
from benchmarks.runner import Row

__all__ = ["draw"]

OURS, FLOOR, FAR, OTHERS = "#c2410c", "#94a3b8", "#0ea5e9", "#475569"
COLUMNS = 3
MICRO = 1e6

Chosen = Callable[[Workload, Row], bool]
PLOTS: dict[str, Chosen] = {
    "channels-asyncio": lambda workload, row: workload.group == "channel" and row.backend in {"asyncio", "-"},
    "channels-trio": lambda workload, row: workload.group == "channel" and row.backend in {"trio", "-"},
    "select-threads-workers": lambda workload, row: (
        workload.group in {"select", "thread", "worker"} and row.backend in {"asyncio", "-"}
    ),
}


def draw(results: Results, directory: Path) -> list[Path]:
    """Write one SVG for each plot that has anything to show."""
    # The same results give the same file.
    mpl.rcParams["svg.hashsalt"] = "chanflow"
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    # One picture for each plot is enough: that of the interpreter named first.
    first = results[0][1].python
    for name, chosen in PLOTS.items():
        panels: dict[str, list[Row]] = {}
        titles = {}
        for workload, row in results:
            if row.wall and row.python == first and chosen(workload, row):
                panels.setdefault(workload.name, []).append(row)
                titles[workload.name] = f"{workload.name}, µs per {workload.unit}"
        if panels:
            path = directory / f"benchmarks-{name}.svg"
            draw_panels([(titles[key], rows) for key, rows in panels.items()], path)
            paths.append(path)
    return paths


def draw_panels(panels: list[tuple[str, list[Row]]], path: Path) -> None:
    lines = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(5 * COLUMNS, 3.2 * lines), layout="constrained")
    axes = figure.subplots(lines, COLUMNS, squeeze=False).flatten()
    for axis, (title, rows) in zip(axes, panels, strict=False):
        ranked = sorted(rows, key=Row.least, reverse=True)
        values = [row.least() * MICRO for row in ranked]
        bars = axis.barh([row.peer for row in ranked], values, color=[colour(row) for row in ranked])
        axis.bar_label(bars, labels=[f"{value:.3g}" for value in values], padding=3, fontsize=8)
        axis.set_xscale("log")
        axis.set_xlim(min(values) / 2, max(values) * 4)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    figure.savefig(path, metadata={"Date": None})


def colour(row: Row) -> str:
    if row.peer.startswith("chanflow"):
        return OURS
    if row.peer.startswith("floor"):
        return FLOOR
    return FAR if row.peer == "Go" else OTHERS
