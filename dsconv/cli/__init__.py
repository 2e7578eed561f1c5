"""The command line: one file a command, each of which parses, calls one function and prints."""

from __future__ import annotations

import json
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

import click

from dsconv._version import __version__
from dsconv.cli.config import config
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
from dsconv.errors import EXIT_INTERRUPTED, EXIT_UNREADABLE, DsconvError

EPILOG = """\b
Example:
  dsconv inspect checkpoints/                  what is in there?
  dsconv zero-to-fp32 checkpoints/ merged/     merge it into safetensors
  dsconv verify checkpoints/ merged/           prove that nothing was lost

Exit codes: 0 ok, 2 usage, 3 unreadable or malformed, 4 refused as unsafe,
5 verification mismatch, 6 Hub or network, 130 interrupted."""


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80})
@click.version_option(__version__, prog_name="dsconv")
def cli() -> None:
    """Sharded training checkpoints into safetensors: streaming, exact and safe.

    Nothing that a checkpoint's files name is ever run, memory stays flat whatever the size of the model, and an output
    is whole or absent.
    """


COMMANDS = (
    zero_to_fp32,
    merge,
    to_universal,
    to_dcp,
    inspect,
    verify,
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


def main(args: list[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code (see ``dsconv.errors``)."""
    arguments = sys.argv[1:] if args is None else args
    signal.signal(signal.SIGTERM, _terminate)
    try:
        code = cli.main(arguments, prog_name="dsconv", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (KeyboardInterrupt, click.Abort):
        click.echo("Interrupted: nothing was left behind.", err=True)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of our output has gone: as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except (DsconvError, OSError) as error:
        if "-d" in arguments or "--debug" in arguments:
            raise
        code = _report(error, "--json" in arguments)
    sys.exit(code if isinstance(code, int) else 0)


def _terminate(signum: int, frame: FrameType | None) -> NoReturn:
    """End as an interrupt does, so that what was half written is taken away."""
    sys.exit(128 + signum)


def _report(error: DsconvError | OSError, as_json: bool) -> int:
    code = getattr(error, "exit_code", EXIT_UNREADABLE)
    message = (
        str(error)
        if isinstance(error, DsconvError)
        else f"{error.filename}: {error.strerror}"
        if error.filename
        else str(error)
    )
    click.echo(f"Error: {message}", err=True)
    if as_json:
        found: dict[str, Any] = {"error": message, "type": type(error).__name__, "exit_code": code}
        click.echo(json.dumps(found))
    return code
