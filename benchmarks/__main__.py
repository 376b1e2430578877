"""`python -m benchmarks`: see README.md."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks import golang, machine, report
from benchmarks.report import Results
from benchmarks.runner import Row, measure_all, plan_rows
from benchmarks.workloads import all_workloads

try:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from benchmarks.plot import draw
except ModuleNotFoundError as error:
    sys.exit(f"the benchmarks need {error.name}: pip install '.[bench]'")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description="Measure chanflow and its peers side by side.")
    parser.add_argument("--quick", action="store_true", help="one round of little work: a look, not a measurement")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="workloads, or the start of their names")
    parser.add_argument("--rounds", type=int, metavar="N", help="default: 5, or 1 with --quick")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"), metavar="DIR", help="%(default)s")
    parser.add_argument(
        "--python", nargs="+", default=[sys.executable], metavar="PATH", help="the interpreters to measure with"
    )
    parser.add_argument("--docs", type=Path, metavar="PAGE", help="put the results into this page, too")
    parser.add_argument("--list", action="store_true", help="name the workloads, and measure nothing")
    arguments = parser.parse_args()
    if arguments.rounds is None:
        arguments.rounds = 1 if arguments.quick else 5
    if arguments.rounds < 1:
        parser.error(f"--rounds must be >= 1, got {arguments.rounds}")
    return arguments


def main() -> None:
    arguments = parse()
    workloads = list(all_workloads())
    if arguments.list:
        for workload in workloads:
            print(f"{workload.name:22} {workload.title}")
        return
    chosen = [
        workload for workload in workloads if not arguments.only or workload.name.startswith(tuple(arguments.only))
    ]
    if not chosen:
        sys.exit(f"no workload is called {' or '.join(arguments.only)}; --list names them")
    facts = machine.describe(arguments.python)
    pythons = {versions["Python"]: path for versions, path in zip(facts["versions"], arguments.python, strict=True)}
    facts["command"] = command(arguments, pythons)
    with TemporaryDirectory() as directory:
        go = golang.build(Path(directory))
        results = plan_rows(chosen, pythons=pythons, quick=arguments.quick, go=go)
        # Written after each round, so that a run that is broken off has something to show.
        measure(results, pythons, arguments, go, lambda rounds: write(results, facts | {"rounds": rounds}, arguments))
    print((arguments.output / "results.md").read_text())
    for (name, reason), peers in not_measured(results).items():
        print(f"not measured: {name}, {', '.join(peers)}: {reason}", file=sys.stderr)


def measure(
    results: Results,
    pythons: dict[str, str],
    arguments: argparse.Namespace,
    go: Path | str,
    ended: Callable[[int], object],
) -> None:
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        bar = progress.add_task("", total=len(results) * arguments.rounds)

        def done(row: Row) -> None:
            progress.update(bar, advance=1, description=f"{row.workload:18.18} {row.peer:18.18}")

        measure_all(results, pythons=pythons, go=go, rounds=arguments.rounds, done=done, ended=ended)


def write(results: Results, facts: dict[str, Any], arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    rows = [row.to_json() for _, row in results]
    (output / "results.json").write_text(json.dumps({"machine": facts, "results": rows}, indent=1) + "\n")
    text = report.render(results, facts, "##")
    (output / "results.md").write_text("# Results\n\n" + text)
    draw(results, output)
    if arguments.docs:
        report.embed(arguments.docs, report.render(results, facts, "###"))
        draw(results, arguments.docs.parent / "_static")


def not_measured(results: Results) -> dict[tuple[str, str], list[str]]:
    """Group those who were left out by workload and reason."""
    peers: dict[tuple[str, str], list[str]] = {}
    for _, row in results:
        if row.reason:
            where = f"{row.peer} ({', '.join(dict.fromkeys([row.python, row.backend]))})"
            peers.setdefault((row.workload, row.reason), []).append(where)
    return peers


def command(arguments: argparse.Namespace, versions: Iterable[str]) -> str:
    """Give the command again, without the paths of this machine."""
    words = ["python -m benchmarks", f"--rounds {arguments.rounds}"]
    words += ["--quick"] * arguments.quick
    if arguments.only:
        words.append("--only " + " ".join(arguments.only))
    if len(arguments.python) > 1:
        words.append("--python " + " ".join(f"python{version.rpartition('.')[0]}" for version in versions))
    return " ".join(words)


if __name__ == "__main__":
    main()
