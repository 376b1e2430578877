"""The `chanflow` command."""

from __future__ import annotations

import logging
import os
import signal
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import TextIOWrapper, UnsupportedOperation
from typing import IO, Any

import anyio
from anyio import CancelScope, open_signal_receiver
from attrs import define, field

from chanflow.cli.demos.digest import Digest, Summary, checksum_line, digest_tree, measure_speedup
from chanflow.cli.visible import visible

try:
    import click
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
except ModuleNotFoundError:
    sys.exit("the chanflow command needs click and rich: pip install 'chanflow[cli]'")

from chanflow.cli.errors import INTERRUPTED, UsageError

__all__ = ["main"]


@contextmanager
def visible_errors() -> Iterator[None]:
    """Let errors do nothing to a terminal, whatever they repeat of arguments, files and stores."""
    try:
        yield
    except click.ClickException as error:
        vars(error)["message"] = visible(error.message)
        raise


class Program(click.Group):
    """The command with all those below it."""

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        """Read the arguments."""
        with visible_errors():
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        with visible_errors():
            return super().invoke(ctx)


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="chanflow")
def main() -> None:
    """Goroutines, channels and worker groups for asyncio and trio."""
    if isinstance(sys.stdout, TextIOWrapper):
        # What can't be written there is shown all the same.
        sys.stdout.reconfigure(errors="backslashreplace")


def add_commands() -> None:
    """Add the commands that need more than the command itself does."""
    try:
        from chanflow.cli import serve, tasks, worker  # noqa: PLC0415 -- what they need may be missing
    except ModuleNotFoundError as error:
        missing = error.name

        @click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
        @click.argument("rest", nargs=-1, type=click.UNPROCESSED)
        def unavailable(rest: tuple[str, ...]) -> None:  # noqa: ARG001 -- whatever it is
            """Not available: pip install 'chanflow[tasks]'."""
            msg = f"this command needs {missing}: pip install 'chanflow[tasks]'"
            raise UsageError(msg)

        for name in ("tasks", "worker", "serve", "demo-service"):
            main.add_command(unavailable, name)
    else:
        for command in (tasks.tasks, worker.worker, serve.serve, serve.demo_service):
            main.add_command(command)


@main.command()
@click.argument("path", required=False)
@click.option("--workers", type=click.IntRange(1), default=os.cpu_count() or 1, show_default="one for each CPU")
@click.option("--backend", type=click.Choice(["asyncio", "trio"]), default="asyncio", show_default=True)
@click.option("--output", "target", metavar="FILE", help="Write lines for sha256sum --check; - for stdout.")
def demo(path: str | None, workers: int, backend: str, target: str | None) -> None:
    """Digest all files under PATH in a bounded pipeline.

    PATH is a directory or a file; by default the standard library of the Python that runs this.
    """
    if path is not None and not (os.path.isfile(path) or os.path.isdir(path)):
        what = "neither a file nor a directory" if os.path.exists(path) else "no such file or directory"
        msg = f"{path}: {what}"
        raise UsageError(msg)
    # What is left undone after Ctrl-C is told in the summary.
    logging.getLogger("chanflow").addHandler(logging.NullHandler())
    with ExitStack() as stack:
        output = None if target is None else stack.enter_context(open_output(target))
        console = Console(stderr=True)
        run = Run(path, workers, output, make_progress(console))
        if console.is_terminal:
            # Elsewhere, rich before 14.1 would write an empty line at its end.
            stack.enter_context(run.progress)
        try:
            anyio.run(run.main, backend=backend)
        except* KeyboardInterrupt:
            run.interrupted = True
        except* BrokenPipeError:
            # Whoever reads the checksums has seen enough.
            mute_stdout()
            sys.exit(1)
        except* OSError as group:
            if target == "-":
                mute_stdout()
            raise UsageError(first_error(group)) from None
    if run.interrupted:
        click.echo("interrupted; this is what was done so far:", err=True)
    try:
        click.echo(run.describe(), err=target == "-")
        sys.stdout.flush()
    except BrokenPipeError:
        mute_stdout()
        sys.exit(1)
    except OSError as error:
        mute_stdout()
        msg = f"stdout: {error.strerror}"
        raise UsageError(msg) from None
    if run.interrupted:
        sys.exit(INTERRUPTED)
    if run.summary.unreadable:
        sys.exit(1)


@contextmanager
def open_output(target: str) -> Iterator[IO[bytes]]:
    """Open the file for the checksums, or stdout."""
    if target == "-":
        yield sys.stdout.buffer
        return
    try:
        output = open(target, "wb")  # noqa: SIM115 -- closed below
    except OSError as error:
        msg = f"Invalid value for '--output': {target!r}: {error.strerror}"
        raise UsageError(msg) from None
    try:
        yield output
    finally:
        # Every line was flushed, so that an error was told already.
        with suppress(OSError):
            output.close()


@define
class Run:
    """One run of the demo."""

    path: str | None
    workers: int
    output: IO[bytes] | None
    progress: Progress
    summary: Summary = field(factory=Summary)
    speedup: float | None = None
    interrupted: bool = False
    bar: TaskID = field(init=False)

    async def main(self) -> None:
        """Digest, then measure."""
        self.bar = self.progress.add_task("digesting", total=None)
        root = self.path or sysconfig.get_path("stdlib")
        skip: list[str | int] = [] if self.path else [os.path.join(root, "site-packages")]
        # What is no file of the system's has no descriptor, and can't be met in the tree.
        with suppress(UnsupportedOperation):
            skip += [self.output.fileno()] if self.output else []
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.watch, tasks.cancel_scope)
            await digest_tree(root, self.summary, self.report, workers=self.workers, skip=skip)
            if self.workers > 1 and self.summary.sample:
                self.progress.update(self.bar, description="measuring the speed-up")
                self.speedup = await measure_speedup(self.summary.sample, self.workers)
            tasks.cancel_scope.cancel()

    def report(self, digest: Digest) -> None:
        """Write the line of a file, or tell why there is none."""
        summary = self.summary
        self.progress.update(self.bar, completed=summary.files + summary.unreadable, total=summary.found)
        if digest.error is not None:
            click.echo(visible(f"cannot read {digest.path}: {digest.error.strerror}"), err=True)
        elif self.output is not None:
            self.output.write(checksum_line(digest))
            # Now, so that a full disk is noticed and Ctrl-C leaves whole lines.
            self.output.flush()

    async def watch(self, scope: CancelScope) -> None:
        """Stop at Ctrl-C: a KeyboardInterrupt would come only when the event loop happens to wake."""
        # On Windows, it has to do.
        with suppress(NotImplementedError), open_signal_receiver(signal.SIGINT) as signals:
            async for _ in signals:
                self.interrupted = True
                scope.cancel()
                break

    def describe(self) -> str:
        """Put the summary into words."""
        summary = self.summary
        megabytes = summary.bytes / 1e6
        speed = megabytes / max(summary.seconds, 1e-9)
        lines = [
            f"files     {summary.files}" + (f" ({summary.unreadable} unreadable)" if summary.unreadable else ""),
            f"bytes     {summary.bytes} ({megabytes:.1f} MB)",
            f"seconds   {summary.seconds:.2f} ({speed:.1f} MB/s, {self.workers} workers)",
        ]
        if self.speedup is not None:
            lines.append(
                f"speed-up  {self.speedup:.2f} over one worker, measured on {len(summary.sample)} of the files"
            )
        return "\n".join(lines)


def mute_stdout() -> None:
    """Let Python's own last flush of stdout not complain again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_error(group: BaseException) -> str:
    """Describe the first error of a group, however deep."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return str(group)


def make_progress(console: Console) -> Progress:
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


add_commands()
