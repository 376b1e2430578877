"""How a command fails: with an error of one line, and an exit status."""

from __future__ import annotations

import click

__all__ = ["INTERRUPTED", "CommandError", "UsageError"]

INTERRUPTED = 130
"""The exit status that shells give to a command that Ctrl-C ended."""


class CommandError(click.ClickException):
    """An error of one line; the exit status is 1."""


class UsageError(CommandError):
    """An error of one line about how the command was called, without the usage that click would add."""

    exit_code = 2
