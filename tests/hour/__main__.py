"""``python -m tests.hour``: many checkpoints, kills of the watcher, stores that fail, and what became of it all."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from tests.hour import hub, stores


@click.command()
@click.option("--saves", type=int, default=40, help="Checkpoints of each run.")
@click.option("--every", type=float, default=1.5, help="Seconds between two checkpoints.")
@click.option("--kills", type=int, default=10, help="How often the watcher, and each conversion, is killed.")
@click.option("--seed", type=int, default=0)
def main(saves: int, every: float, kills: int, seed: int) -> None:
    problems: list[str] = []
    for deepspeed in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            hour = hub.live(Path(folder), saves, every, kills, deepspeed, seed)
            click.echo(
                f"{'ZeRO-2' if deepspeed else 'the Trainer alone'}: {len(hour.saved)} checkpoints, {hour.kills} kills:"
                f" {len(hour.pushed)} pushed once, {len(hour.told)} losses told ({', '.join(sorted(hour.told))})"
            )
            if hour.problems:
                click.echo(hour.log)
            problems += hour.problems
    with tempfile.TemporaryDirectory() as folder, stores.failing_s3(seed=seed) as s3:
        for name in stores.JOBS:
            outcome = stores.convert(name, Path(folder), s3, kills)
            click.echo(
                f"{name} into S3: {outcome.faults} faults, {outcome.kills} kills, {outcome.failures} runs that failed,"
                " and the same bytes as on the disk"
            )
            problems += outcome.problems
    for problem in problems:
        click.echo(problem)
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
