"""The table of commands, and how a command line is run."""

from __future__ import annotations

import os
from typing import Any

import click

from dsconv._version import __version__
from dsconv.cli import console
from dsconv.cli.config import config
from dsconv.cli.diff import diff
from dsconv.cli.doctor import doctor
from dsconv.cli.estimate import estimate
from dsconv.cli.inspect import inspect
from dsconv.cli.merge import merge, zero_to_fp32
from dsconv.cli.push import push
from dsconv.cli.to_dcp import to_dcp
from dsconv.cli.to_universal import to_universal
from dsconv.cli.train import resume, train
from dsconv.cli.validate import validate
from dsconv.cli.verify import verify
from dsconv.cli.watch import watch
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


@click.group(
    cls=console.Group,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.version_option(__version__, prog_name=PROGRAM)
def cli() -> None:
    """Convert sharded training checkpoints: streaming, exact and safe.

    No code that a checkpoint names is ever run, memory stays flat whatever the size of the model, and an output is
    complete or absent.
    """


COMMANDS = (
    zero_to_fp32,
    merge,
    to_universal,
    to_dcp,
    inspect,
    verify,
    diff,
    push,
    watch,
    config,
    estimate,
    train,
    resume,
    validate,
    doctor,
)
for _command in COMMANDS:
    cli.add_command(_command)


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
