"""The `chanflow` command."""

from __future__ import annotations

import logging
import os
import sys
import sysconfig
from contextlib import ExitStack, suppress
from io import UnsupportedOperation
from typing import Any, BinaryIO

import anyio

from chanflow.demo import Digest, Summary, checksum_line, digest_tree, measure_speedup

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ModuleNotFoundError:
    sys.exit("the chanflow command needs click and rich: pip install 'chanflow[cli]'")

__all__ = ["main"]

INTERRUPTED = 130
"""The exit status that shells give to a command that Ctrl-C ended."""


class UsageError(click.ClickException):
    """An error of one line, without the usage that click would add."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="chanflow")
def main() -> None:
    """Goroutines, channels and worker groups for asyncio and trio."""


@main.command()
@click.argument("path", required=False)
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count() or 1, show_default="one for each CPU")
@click.option("--backend", type=click.Choice(["asyncio", "trio"]), default="asyncio", show_default=True)
@click.option("--output", type=click.File("wb", lazy=False), help="Write lines for sha256sum --check; - for stdout.")
def demo(path: str | None, workers: int, backend: str, output: BinaryIO | None) -> None:
    """Digest all files under PATH in a bounded pipeline.

    PATH is a directory or a file; by default the standard library of the Python that runs this.
    """
    if path is not None and not os.path.exists(path):
        msg = f"{path}: no such file or directory"
        raise UsageError(msg)
    # What is left undone after Ctrl-C is told in the summary.
    logging.getLogger("chanflow").addHandler(logging.NullHandler())
    summary = Summary()
    speedup = None
    interrupted = False
    console = Console(stderr=True)
    with ExitStack() as stack:
        progress = stack.enter_context(make_progress(console))
        bar = progress.add_task("digesting", total=None)

        def report(digest: Digest) -> None:
            progress.update(bar, completed=summary.files + summary.unreadable, total=summary.found)
            if digest.error is not None:
                click.echo(f"cannot read {digest.path}: {digest.error.strerror}", err=True)
            elif output is not None:
                output.write(checksum_line(digest))
                # Now, so that a full disk is noticed and Ctrl-C leaves whole lines.
                output.flush()

        async def run() -> None:
            nonlocal speedup
            root = path or sysconfig.get_path("stdlib")
            skip: list[str | int] = [] if path else [os.path.join(root, "site-packages")]
            # What is no file of the system's has no descriptor, and can't be met in the tree.
            with suppress(UnsupportedOperation):
                skip += [output.fileno()] if output else []
            await digest_tree(root, summary, report, workers=workers, skip=skip)
            if workers > 1 and summary.sample:
                progress.update(bar, description="measuring the speed-up")
                speedup = await measure_speedup(summary.sample, workers)

        try:
            anyio.run(run, backend=backend)
        except* KeyboardInterrupt:
            interrupted = True
        except* BrokenPipeError:
            # Whoever reads the checksums has seen enough. Python's own last flush of stdout would complain again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except* OSError as group:
            raise UsageError(str(group.exceptions[0])) from None
    click.echo(describe(summary, workers, speedup), err=output is sys.stdout.buffer)
    if interrupted:
        click.echo("interrupted; this is what was done so far", err=True)
        sys.exit(INTERRUPTED)
    if summary.unreadable:
        sys.exit(1)


def make_progress(console: Any) -> Any:
    """Make the progress bar, which shows itself only on a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def describe(summary: Summary, workers: int, speedup: float | None) -> str:
    """Put the summary into words."""
    megabytes = summary.bytes / 1e6
    lines = [
        f"files     {summary.files}" + (f" ({summary.unreadable} unreadable)" if summary.unreadable else ""),
        f"bytes     {summary.bytes} ({megabytes:.1f} MB)",
        f"seconds   {summary.seconds:.2f} ({megabytes / max(summary.seconds, 1e-9):.1f} MB/s, {workers} workers)",
    ]
    if speedup is not None:
        lines.append(f"speed-up  {speedup:.2f} over one worker, measured on {len(summary.sample)} of the files")
    return "\n".join(lines)
