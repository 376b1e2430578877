"""Put the results into Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.plan import Workload
from benchmarks.runner import Row

__all__ = ["Results", "embed", "ratio", "render"]

Results = list[tuple[Workload, Row]]

BEGIN = "<!-- results: written by `python -m benchmarks --docs` -->\n"
END = "<!-- end of results -->\n"
HEAD = (
    "| peer | backend | best, {unit} | median, {unit} | CPU, {unit} | chanflow ÷ peer | |\n"
    "|---|---|--:|--:|--:|--:|---|"
)
MICRO, MILLI = 1e6, 1e3
NONE = "-"
LINEAR = 1.1
"""How much more bytes each of many may take than each of few."""
SUMMARY_PEERS = ("asyncio.Queue", "anyio", "trio", "aiochan", "asyncio-channel", "janus", "culsans", "aiologic")


def render(results: Results, machine: dict[str, Any], title: str = "#") -> str:
    """Give everything, with headings below the given one."""
    parts = [environment(machine)]
    pythons = list(dict.fromkeys(row.python for _, row in results))
    for python in pythons:
        part = [(workload, row) for workload, row in results if row.python == python]
        if len(pythons) > 1:
            parts += [f"{title} Python {python}", *sections(part, f"{title}#")]
        else:
            parts += sections(part, title)
    return "\n\n".join(parts) + "\n"


def sections(results: Results, title: str) -> Iterator[str]:
    """Give the results of one interpreter."""
    if any(workload.group == "channel" for workload, _ in results):
        for backend in ("asyncio", "trio"):
            yield f"{title} Channels on {backend}, chanflow ÷ peer"
            yield summary(results, backend)
    for workload in unique(results):
        rows = [row for other, row in results if other is workload]
        if not workload.memory:
            yield f"{title} {workload.title}"
            yield table(workload, rows)
    for kind, heading in (
        ("channel", "Memory of idle channels"),
        ("receiver", "Memory of parked receivers"),
        ("job", "Memory of queued jobs"),
    ):
        rows = [row for _, row in results if row.workload.startswith(f"memory-{kind}-")]
        if rows:
            yield f"{title} {heading}"
            yield memory_table(rows)


def unique(results: Results) -> list[Workload]:
    return list({workload.name: workload for workload, _ in results}.values())


def environment(machine: dict[str, Any]) -> str:
    versions = [", ".join(f"{name} {version}" for name, version in each.items()) for each in machine["versions"]]
    return "\n".join(
        [
            f"- Command: `{machine['command']}`",
            f"- Rounds: {machine['rounds']}",
            f"- Machine: {machine['cpu']}, {machine['cpus']} CPUs, {machine['system']}",
            f"- Load average before: {machine['load']}",
            f"- Date and commit: {machine['date']}, {machine['commit']}",
            *(f"- Versions: {each}" for each in versions),
            f"- Go: {machine['go']}",
        ]
    )


def baseline(row: Row, rows: Iterable[Row]) -> Row | None:
    """Find chanflow's row: on the same backend, or on asyncio for what has none."""
    own = {other.backend: other for other in rows if other.peer == "chanflow" and other.wall}
    return own.get(row.backend) or (own.get("asyncio") if row.backend == "-" else None)


def ratio(row: Row, rows: Iterable[Row]) -> float | None:
    """Give the time of chanflow over that of a peer: the median over the rounds, as each round met both alike."""
    own = baseline(row, rows)
    if own is None:
        return None
    shares = [
        (ours / own.operations) / (theirs / row.operations) for ours, theirs in zip(own.wall, row.wall, strict=False)
    ]
    return median(shares) if shares else None


def number(value: float) -> str:
    """Round to three digits, without an exponent."""
    if value >= 100:  # noqa: PLR2004
        return f"{value:,.0f}"
    return f"{value:.3g}"


def table(workload: Workload, rows: list[Row]) -> str:
    per, unit = (MILLI, "ms") if workload.fixed else (MICRO, "µs")
    lines = [HEAD.format(unit=f"{unit} per {workload.unit}")]
    for row in rows:
        cells = [row.peer, row.backend]
        if row.wall:
            scale = per / row.operations
            cells += [number(value * scale) for value in (min(row.wall), median(row.wall), min(row.cpu))]
            times = ratio(row, rows)
            cells.append("" if times is None else f"{times:.2f}")
        else:
            cells += [NONE] * 4
        cells.append("; ".join(filter(None, (row.note if row.wall else "", row.reason))))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(results: Results, backend: str) -> str:
    """Set the peers' ratios side by side."""
    workloads = [workload for workload in unique(results) if workload.group == "channel"]
    rows = {(row.workload, row.peer): row for _, row in results if row.backend == backend}
    peers = [peer for peer in SUMMARY_PEERS if any((workload.name, peer) in rows for workload in workloads)]
    lines = [
        "| workload | chanflow, µs | " + " | ".join(peers) + " |",
        "|---|--:|" + "--:|" * len(peers),
    ]
    for workload in workloads:
        own = rows.get((workload.name, "chanflow"))
        cells = [workload.title, number(median(own.wall) / own.operations * MICRO) if own and own.wall else NONE]
        for peer in peers:
            row = rows.get((workload.name, peer))
            times = row and ratio(row, [other for (name, _), other in rows.items() if name == workload.name])
            cells.append(f"{times:.2f}" if times else NONE)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory_table(rows: list[Row]) -> str:
    """Count bytes of each thing, whatever there is of them."""
    counts = sorted({row.operations for row in rows if row.operations})
    lines = [
        "| peer | "
        + " | ".join(f"bytes each, of {count:,}" for count in counts)
        + f" | growth, {counts[-1]:,} to {counts[0]:,} | chanflow ÷ peer | |",
        "|---|" + "--:|" * (len(counts) + 2) + "---|",
    ]
    each = {(row.peer, row.operations): row.bytes / row.operations for row in rows if row.bytes is not None}
    for peer in dict.fromkeys(row.peer for row in rows):
        sizes = [each.get((peer, count)) for count in counts]
        known = [size for size in sizes if size is not None]
        cells = [peer, *(NONE if size is None else f"{size:,.0f}" for size in sizes)]
        growth = sizes[-1] / sizes[0] if sizes[0] and sizes[-1] else None
        cells.append(NONE if growth is None else f"{growth:.2f}, {'linear' if growth <= LINEAR else 'not linear'}")
        shared = [
            each["chanflow", count] / size
            for size, count in zip(sizes, counts, strict=True)
            if size and ("chanflow", count) in each
        ]
        cells.append(f"{shared[-1]:.2f}" if known and shared else NONE)
        words = [word for row in rows if row.peer == peer for word in (row.note, row.reason) if word]
        cells.append("; ".join(dict.fromkeys(words)))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def embed(page: Path, text: str) -> None:
    """Put the results into a page, between its two comments."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
