"""``dsconv push``."""

from __future__ import annotations

import time
from typing import Any

import click

from dsconv.cli import console
from dsconv.cli.console import Repo, command


@command(
    epilog="""\b
Example:
  dsconv push merged/ org/model --private
  dsconv push merged/ org/model --dry-run
  dsconv push merged/ org/model --revision step-500 --create-pr

To resume an interrupted push, run it again."""
)
@click.argument("folder", type=click.Path(), metavar="DIR")
@click.argument("repo", type=Repo(), metavar="REPO")
@click.option("--private", is_flag=True, help="Create the repository as private; refuse a public one.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to, created if missing (default: main).")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of pushing to the main branch.")
@click.option(
    "--commit-message", metavar="TEXT", help="First line of the commit (default: the step or the folder's name)."
)
@click.option(
    "--check/--no-check", default=True, help="Compare the files with the checksums in the manifest (default: yes)."
)
@click.option("--dry-run", is_flag=True, help="Print the files and their sizes without contacting the Hub.")
@console.JSON
@console.QUIET
@console.DEBUG
def push(folder: str, repo: str, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Push a folder of safetensors to the Hugging Face Hub.

    DIR is the output of a merge or of save_pretrained. One commit puts it into the model repository REPO (org/model),
    which is created if missing, with a model card that keeps every line of an existing README. Files that differ from
    their manifest are refused.
    """
    from dsconv.convert import push as convert

    if options["create_pr"] and options["revision"] is not None:
        raise click.UsageError(
            "--create-pr opens a pull request against the main branch: give only one of --create-pr and --revision"
        )
    console.quiet_downloads(quiet or as_json)
    began = time.monotonic()
    with console.progress(quiet or as_json) as progress:
        report = convert.push(folder, repo, progress=progress, **options)
    if as_json:
        console.show_json({**report.to_dict(), "seconds": round(time.monotonic() - began, 3)})
    elif not quiet and report.dry_run:
        console.warn(report.warnings)
        for row in report.files:
            console.say(f"  {row['bytes']:>16,}  {row['file']}")
        console.say(
            f"{console.count(len(report.files), 'file')}, {console.size(report.nbytes)}, and a model card; nothing was"
            " sent (--dry-run)"
        )
        if report.left_out:
            console.say(f"left out: {', '.join(report.left_out)}")
    elif not quiet:
        console.show_push(report.to_dict())
