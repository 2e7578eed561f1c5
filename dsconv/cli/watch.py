"""``dsconv watch``."""

from __future__ import annotations

import sys
from typing import Any

import click

from dsconv.cli import console
from dsconv.cli.console import Repo, Size
from dsconv.errors import EXIT_UNREADABLE


@click.command(
    epilog="""\b
Example:
  dsconv watch checkpoints/ --push-to-hub org/model --dtype bf16
  dsconv watch checkpoints/ --push-to-hub org/model --once     from cron

What was pushed is noted in RUN/.dsconv-watch/. The first start begins with the
checkpoint that 'latest' names."""
)
@click.argument("run", type=click.Path(), metavar="RUN")
@click.option("--push-to-hub", "repo", type=Repo(), metavar="REPO", required=True, help="The repository, org/model.")
@click.option("--private", is_flag=True, help="Make the repository a private one; refuse one that is there and public.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Cast floats, once, to nearest even (default: fp32)."
)
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest output file.")
@click.option("--exclude-frozen", is_flag=True, help="Leave out weights that were not trained.")
@click.option("--adapter", is_flag=True, help="Push only the LoRA/PEFT adapter.")
@click.option(
    "--config-from",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Take config and tokenizer from DIR (default: found beside the checkpoint).",
)
@click.option(
    "--interval",
    "interval_seconds",
    type=click.FloatRange(min=0.01),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks.",
)
@click.option("--once", is_flag=True, help="Push what is there, and end.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors.")
@click.option("--debug", "-d", is_flag=True, help="On an error, print the traceback.")
def watch(run: str, repo: str, once: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Merge and push each new checkpoint of a training run, once each.

    RUN is where DeepSpeed writes 'latest', or a Trainer's output folder of checkpoint-N. Checkpoints go to the main
    branch of REPO, a commit each, in order. A watcher may be killed and started again; two on one run and repository
    are refused.
    """
    from dsconv.convert import watch as convert

    def show(event: convert.Event) -> None:
        step = "" if event.step is None else f" (step {event.step})"
        if event.error is None:
            if not quiet:
                click.echo(f"{event.name}{step} → {repo}: {event.url}")
                sys.stdout.flush()
            return
        then = "tried again when its files change" if event.outcome == convert.FAILED else "tried again"
        click.echo(f"Error: {event.name}{step}: {event.error} ({'not pushed' if once else then})", err=True)

    console.quiet_downloads(quiet)
    with console.progress(quiet) as progress:
        events = convert.watch(run, repo, once=once, on_event=show, progress=progress, **options)
    failures = [event.error for event in events if event.error is not None]
    if failures:
        sys.exit(getattr(failures[0], "exit_code", EXIT_UNREADABLE))
