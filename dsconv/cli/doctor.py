"""``dsconv doctor``."""

from __future__ import annotations

from typing import Any

import click

from dsconv.cli import console
from dsconv.cli.console import command
from dsconv.errors import EXIT_UNREADABLE
from dsconv.urls import local_path

CORE_CHECKS = 2  # the first ones: without them nothing works


@command(epilog="""\b
Example:
  dsconv doctor
  dsconv doctor /scratch --json""")  # fmt: skip
@click.argument("folder", type=click.Path(), default=".")
@console.JSON
@console.DEBUG
@click.pass_context
def doctor(context: click.Context, folder: str, as_json: bool, debug: bool) -> None:
    """Show versions, devices, free space and what works here.

    FOLDER is the folder whose free space is shown. A small checkpoint is merged and compared; if that fails, the exit
    code is 3. Missing optional packages are not a failure. What "works" was tried here; of what is "installed",
    only the packages were imported.
    """
    from dsconv.doctor import diagnose

    console.quiet_downloads(quiet=True)
    found = diagnose(local_path(folder, "the folder whose free space is shown"))
    if as_json:
        console.show_json(found)
    else:
        _show(found)
    if not all(check["works"] for check in found["works"][:CORE_CHECKS]):
        context.exit(EXIT_UNREADABLE)


def _show(found: dict[str, Any]) -> None:
    console.say(f"dsconv {found['dsconv']}, Python {found['python']}, {found['system']}")
    console.say(
        "packages: "
        + ", ".join(f"{name} {version}" if version else f"no {name}" for name, version in found["packages"].items())
    )
    devices = found["devices"]
    accelerators = ", ".join(devices["accelerators"]) or "no GPU"
    console.say(
        f"devices: {console.count(devices['cores'], 'core')}, {console.size(devices['memory_bytes'])} of memory,"
        f" {accelerators}"
    )
    for path, free in found["free_bytes"].items():
        console.say(f"free: {'unknown' if free is None else console.size(free)} in {path}")
    for check in found["works"]:
        if check["works"]:
            console.say(f"{'works' if check['tried'] else 'installed'}: {check['what']}")
        else:
            console.say(f"does not work: {check['what']}: {check['problem']}. {check['fix']}")
