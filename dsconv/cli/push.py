"""``dsconv push``."""

from __future__ import annotations

import time
from typing import Any

import click

from dsconv.cli import console
from dsconv.cli.console import Repo


@click.command(
    epilog="""\b
Example:
  dsconv push merged/ org/model --private
  dsconv push merged/ org/model --dry-run
  dsconv push merged/ org/model --revision step-500 --create-pr

A push that was cut off is resumed by running it again."""
)
@click.argument("folder", type=click.Path(), metavar="DIR")
@click.argument("repo", type=Repo(), metavar="REPO")
@click.option("--private", is_flag=True, help="Make the repository a private one; refuse one that is there and public.")
@click.option("--revision", metavar="BRANCH", help="The branch to push to, made if need be (default: main).")
@click.option("--create-pr", is_flag=True, help="Open a pull request instead of pushing to the main branch.")
@click.option(
    "--commit-message", metavar="TEXT", help="First line of the commit (default: the step, or the folder's name)."
)
@click.option(
    "--check/--no-check", default=True, help="Compare the files with the checksums of their manifest (default: yes)."
)
@click.option("--dry-run", is_flag=True, help="Print the files and their bytes, and ask the Hub nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--debug", "-d", is_flag=True, help="On an error, print the traceback.")
def push(folder: str, repo: str, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Push a folder of safetensors to the Hugging Face Hub.

    DIR is what a merge or save_pretrained wrote. It goes to the model repository REPO (org/model), which is made if
    need be, in one commit, with a model card that keeps every line of a README that is there. Files that are not what
    their manifest says are refused.
    """
    from dsconv.convert import push as convert

    if options["create_pr"] and options["revision"] is not None:
        raise click.UsageError("--create-pr is against the main branch: leave out --revision, or --create-pr")
    console.quiet_downloads(quiet or as_json)
    began = time.monotonic()
    with console.progress(quiet or as_json) as progress:
        report = convert.push(folder, repo, progress=progress, **options)
    if as_json:
        console.show_json({**report.to_dict(), "seconds": round(time.monotonic() - began, 3)})
    elif not quiet and report.dry_run:
        console.warn(report.warnings)
        for row in report.files:
            click.echo(f"  {row['bytes']:>16,}  {row['file']}")
        click.echo(
            f"{console.count(len(report.files), 'file')}, {console.size(report.nbytes)}, and a model card; nothing was"
            " sent (--dry-run)"
        )
        if report.left_out:
            click.echo(f"left out: {', '.join(report.left_out)}")
    elif not quiet:
        console.show_push(report.to_dict())
