"""The table of commands, and how a command line is run: a command is imported when it is run, or all are listed."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import click

from dsconv._version import __version__
from dsconv.cli import console
from dsconv.errors import UsageError

EPILOG = """\b
Example:
  dsconv inspect checkpoints/                  what is in there?
  dsconv zero-to-fp32 checkpoints/ merged/     merge it into safetensors
  dsconv verify checkpoints/ merged/           prove that nothing was lost

Exit codes: 0 ok, 1 a bug, 2 usage, 3 unreadable or malformed, 4 refused as
unsafe, 5 verification mismatch, 6 Hub or network, 130 interrupted,
143 terminated."""
PROGRAM = "dsconv"
# {command: the file of this folder that has it}
HOMES = {
    "zero-to-fp32": "merge", "merge": "merge", "to-universal": "to_universal", "to-dcp": "to_dcp", "inspect": "inspect",
    "verify": "verify", "diff": "diff", "push": "push", "watch": "watch", "config": "config", "estimate": "estimate",
    "train": "train", "resume": "train", "validate": "validate", "doctor": "doctor",
}  # fmt: skip


class Commands(console.Group):
    """The group of all commands."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands, sorted."""
        return sorted(HOMES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, which is imported now, or None if there is none of that name."""
        return command_of(cmd_name) if cmd_name in HOMES else None


def command_of(name: str) -> click.Command:
    """Return the command of a name in ``HOMES``."""
    found: click.Command = getattr(import_module(f"dsconv.cli.{HOMES[name]}"), name.replace("-", "_"))
    return found


@click.group(
    cls=Commands,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Convert sharded training checkpoints: streaming, exact and safe.

    No code that a checkpoint names is ever run, memory stays flat whatever the size of the model, and an output is
    complete or absent.
    """


def run(arguments: list[str]) -> int:
    """Run a command line and return its exit code. Raises whatever the command raises.

    click's own ``main`` is not used: it turns a closed pipe into exit code 1.

    Raises:
        UsageError: The arguments do not fit the command.
        KeyboardInterrupt: The user interrupted a prompt.
    """
    if "_DSCONV_COMPLETE" in os.environ:
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, PROGRAM, "_DSCONV_COMPLETE", os.environ["_DSCONV_COMPLETE"])
    try:
        with cli.make_context(PROGRAM, list(arguments)) as context:
            found: Any = cli.invoke(context)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        where = getattr(error, "ctx", None)
        if where is not None and not arguments:
            console.say(*where.get_help().splitlines(), err=True)
            return error.exit_code
        _show_usage(where)
        raise UsageError(error.format_message()) from None
    return found if isinstance(found, int) else 0


def _show_usage(context: click.Context | None) -> None:
    """Print how the command is used, before the error."""
    if context is not None:
        console.say(*context.get_usage().splitlines(), f"Try '{context.command_path} --help' for help.", "", err=True)
