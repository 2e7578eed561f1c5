"""``python -m tests.fuzz``: break any number of files, and count the outcomes."""

from __future__ import annotations

import contextlib
import gc
import itertools
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

import click

from tests.fuzz.judging import OTHER, REFUSED, SAME, Failure, judged, limits
from tests.fuzz.kinds import TARGETS
from tests.fuzz.targets import Target, seeds

MAX_SHOWN = 20
REPORT_SECONDS = 60.0
RAM_DISK = Path("/dev/shm")


def input_of(target: Target, seed: int, number: int) -> Random:
    """Return the random choices of one input, which depend only on target, seed and number, so that a failure can be
    repeated.
    """
    return Random(f"{target.name}/{seed}/{number}")


@click.command()
@click.option("--count", "-n", default=1_000_000, show_default=True, help="Inputs, over all targets.")
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--first",
    default=0,
    show_default=True,
    help="Number of the first input: to make one again, with --count 1 and --target.",
)
@click.option(
    "--target",
    "names",
    multiple=True,
    type=click.Choice([t.name for t in TARGETS]),
    help="Only this one; may be given again.",
)
def main(count: int, seed: int, first: int, names: tuple[str, ...]) -> None:
    """Break real files COUNT times. Exits with 1 if dsconv fails on one of them."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dsconv-fuzz-", dir=RAM_DISK if RAM_DISK.is_dir() else None) as folder:
        found = seeds(Path(folder))
        targets = [kind(found) for kind in TARGETS if not names or kind.name in names]
        counts: dict[str, Counter[str]] = {target.name: Counter() for target in targets}
        failures = 0
        gc.collect()
        gc.freeze()  # torch and transformers have a million objects, which no collection needs to look at again
        reported = time.monotonic()
        turns = itertools.cycle([target for target in targets for _ in range(target.share)])
        with limits(), contextlib.suppress(KeyboardInterrupt):  # still report what was done
            for number in range(first, first + count):
                target = next(turns)
                try:
                    outcome = judged(lambda: target.judge(target.broken(input_of(target, seed, number))))  # noqa: B023 - called at once
                except Failure as failure:
                    outcome = "failure"
                    failures += 1
                    if failures <= MAX_SHOWN:
                        click.echo(
                            f"FAILURE: --target '{target.name}' --seed {seed} --first {number} --count 1: {failure}",
                            err=True,
                        )
                counts[target.name][outcome] += 1
                if time.monotonic() - reported > REPORT_SECONDS:
                    reported = time.monotonic()
                    done = number - first + 1
                    click.echo(
                        f"{done:,} inputs, {done / (reported - began):.0f} a second, {failures} failures", err=True
                    )
    columns = (SAME, OTHER, REFUSED, "failure")
    click.echo(f"{'target':14}{'inputs':>11}" + "".join(f"{column:>14}" for column in columns))
    for name, row in [*counts.items(), ("all", sum(counts.values(), Counter()))]:
        click.echo(f"{name:14}{row.total():>11,}" + "".join(f"{row[column]:>14,}" for column in columns))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    click.echo(f"seed {seed}, {time.monotonic() - began:.0f} s, peak memory {peak / 1e6:.0f} MB (with torch)")
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
