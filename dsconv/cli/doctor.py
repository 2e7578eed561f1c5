"""``dsconv doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from dsconv.cli import console
from dsconv.errors import EXIT_UNREADABLE

CORE_CHECKS = 2  # the first ones: without them nothing works


@click.command(epilog="""\b
Example:
  dsconv doctor
  dsconv doctor /scratch --json""")  # fmt: skip
@click.argument("folder", type=click.Path(), default=".")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--debug", "-d", is_flag=True, help="On an error, print the traceback.")
@click.pass_context
def doctor(context: click.Context, folder: str, as_json: bool, debug: bool) -> None:
    """Show versions, devices, free space (of FOLDER) and what works here.

    A small checkpoint is merged and compared on the way. Exit code 3 when that fails; what is not installed is no
    failure.
    """
    from dsconv.doctor import diagnose

    console.quiet_downloads(quiet=True)
    found = diagnose(Path(folder))
    if as_json:
        console.show_json(found)
    else:
        _show(found)
    if not all(check["works"] for check in found["works"][:CORE_CHECKS]):
        context.exit(EXIT_UNREADABLE)


def _show(found: dict[str, Any]) -> None:
    click.echo(f"dsconv {found['dsconv']}, Python {found['python']}, {found['system']}")
    click.echo(
        "packages: "
        + ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in found["packages"].items())
    )
    devices = found["devices"]
    accelerators = ", ".join(devices["accelerators"]) or "no GPU"
    click.echo(
        f"devices: {console.count(devices['cores'], 'core')}, {console.size(devices['memory_bytes'])} of memory,"
        f" {accelerators}"
    )
    for path, free in found["free_bytes"].items():
        click.echo(f"free: {'unknown' if free is None else console.size(free)} in {path}")
    for check in found["works"]:
        if check["works"]:
            click.echo(f"works: {check['what']}")
        else:
            click.echo(f"does not work: {check['what']}: {check['problem']}. {check['fix']}")
