"""``dsconv watch``."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from dsconv.cli import console
from dsconv.cli.console import Dtype, Repo, Size, command
from dsconv.errors import EXIT_UNREADABLE

if TYPE_CHECKING:
    from dsconv.convert.watch_events import Event


@command(
    epilog="""\b
Example:
  dsconv watch checkpoints/ --push-to-hub org/model --dtype bf16
  dsconv watch checkpoints/ --push-to-hub org/model --once     from cron

RUN/.dsconv-watch/ records what was pushed. The first start begins with the
checkpoint that 'latest' names."""
)
@click.argument("run", type=click.Path(), metavar="RUN")
@click.option("--push-to-hub", "repo", type=Repo(), metavar="REPO", required=True, help="Repository, org/model.")
@click.option("--private", is_flag=True, help="Create the repository as private; refuse a public one.")
@console.ITEM
@click.option("--dtype", type=Dtype(), help="Cast floats, once, to nearest even (default: fp32).")
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest file.")
@click.option("--exclude-frozen", is_flag=True, help="Leave out weights that were not trained.")
@click.option("--adapter", is_flag=True, help="Push only the LoRA/PEFT adapter.")
@click.option(
    "--config-from",
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="Copy config and tokenizer from DIR, a URL or org/model (default: found beside the checkpoint).",
)
@click.option(
    "--interval",
    "interval_seconds",
    type=click.FloatRange(min=0.01),
    default=30.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two checks.",
)
@click.option(
    "--keep",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    metavar="N",
    help="Merged copies to hold while the Hub cannot be reached; the oldest goes first.",
)
@click.option(
    "--once", is_flag=True, help="Push what is new, then exit; the exit code is not 0 if the newest was not pushed."
)
@console.QUIET
@console.DEBUG
@click.pass_context
def watch(context: click.Context, /, run: str, repo: str, once: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Merge and push each new checkpoint of a training run.

    RUN is the folder in which DeepSpeed writes 'latest', a Trainer's output folder with checkpoint-N (with DeepSpeed or
    without), or a folder of step-N. Each checkpoint becomes one commit on the main branch of REPO, in order. A
    checkpoint is merged at once; while the Hub is away, merged copies wait in line. A watcher may be killed and started
    again. A second watcher of the same run and repository is refused.
    """
    from dsconv.convert import watch as convert
    from dsconv.convert.watch_events import FAILED, WAITING

    def show(event: Event) -> None:
        step = "" if event.step is None else f" (step {event.step})"
        if event.error is None:
            if not quiet:
                cost = f"{console.size(event.nbytes)}, {event.seconds:.1f} s"
                console.say(f"{event.name}{step} → {repo}: {event.url} ({cost})")
            return
        then = {
            WAITING: " (will be tried again)",
            FAILED: " (will be tried again when its files or the options change)",
        }.get(event.outcome, "")
        console.say(f"Error: {event.name}{step}: {event.error}{' (not pushed)' if once else then}", err=True)

    console.quiet_downloads(quiet)

    def say(message: str) -> None:
        if not quiet:
            console.say(f"{message}{'' if once else '; waiting for one'}", err=True)

    # Where stderr is no terminal, it is a log: one line a checkpoint.
    with console.progress(quiet or not sys.stderr.isatty()) as progress:
        events = convert.watch(run, repo, once=once, on_event=show, on_message=say, progress=progress, **options)
    failures = [event.error for event in events if event.error is not None]
    if failures:
        context.exit(getattr(failures[0], "exit_code", EXIT_UNREADABLE))
