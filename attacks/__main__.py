"""``python -m attacks``: make every hostile file, give it to each tool, and count where the payload ran."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click

from attacks import peers
from attacks.classes import CLASSES
from attacks.containers import CONTAINERS, records_of
from attacks.judging import faults
from attacks.payload import CANARY_MODULE, CANARY_SOURCE, touch
from attacks.places import Place, places, poisoned
from attacks.table import TECHNIQUES
from tests.checkpoint.building import call, glob, whole

TOOLS = ("pickle.load", "zero_to_fp32.py", "weights_only=True", "picklescan", "dsconv")


class Attack:
    """One hostile file in the form that each tool takes, the canaries it would make, and what each tool answered."""

    def __init__(self, title: str, folder: Path) -> None:
        self.title = title
        self.folder = folder
        self.answers: dict[str, str] = {}

    def canary(self, tool: str) -> Path:
        return self.folder / tool / "canary"

    def give(self, tool: str, prepare: Callable[[str], None], action: Callable[[], str]) -> None:
        """Give a tool the file that ``prepare`` writes, whose payload makes this tool's canary."""
        folder = self.folder / tool
        folder.mkdir(parents=True)
        (folder / f"{CANARY_MODULE}.py").write_text(CANARY_SOURCE.format(canary=str(folder / "canary")))
        prepare(str(folder / "canary"))

        def importing() -> str:
            sys.path.insert(0, str(folder))
            return action()

        self.answers[tool] = peers.in_child(importing, folder)

    def outcome(self, tool: str) -> str:
        """Return what happened. Call this at the very end, since a process that a payload started may be slow."""
        answer = self.answers.get(tool, "-")
        if answer != "-" and self.canary(tool).exists():
            return "RAN"
        if tool == "picklescan":
            return answer if answer in ("dangerous", "suspicious", "clean") else "no verdict"
        return "read it" if answer == "read" else answer if answer == "-" else "refused"


def attack_all(
    title: str, folder: Path, files: dict[str, Place], file_of: Callable[[Place, str], bytes], raw: bool
) -> Attack:
    attack = Attack(title, folder)
    state_dict, optimizer = files["state dict (.bin)"], files["optimizer states, ZeRO-2"]

    def put(place: Place, canary: str) -> None:
        place.file.write_bytes(file_of(place, canary))

    if raw:
        bare = Place("bare", folder, folder / "program", b"N.")
        attack.give("pickle.load", partial(put, bare), partial(peers.unpickled, bare.file))
    attack.give("zero_to_fp32.py", partial(put, optimizer), partial(peers.zero_to_fp32, optimizer.checkpoint))
    attack.give("weights_only=True", partial(put, state_dict), partial(peers.weights_only, state_dict.file))
    attack.give("picklescan", partial(put, state_dict), partial(peers.picklescan, state_dict.file))
    attack.give("dsconv", partial(put, optimizer), partial(peers.dsconv, optimizer.checkpoint))
    attack.give("dsconv, .bin", partial(put, state_dict), partial(peers.dsconv, state_dict.file))
    for place in (state_dict, optimizer):
        place.heal()
    return attack


def sound_files(found: list[Place], folder: Path) -> list[Attack]:
    """Give each tool the sound files, none of which it should refuse."""
    attacks = []
    for place in found:
        attack = Attack(place.title, folder / place.title)
        for tool, read in (("weights_only=True", peers.weights_only), ("picklescan", peers.picklescan)):
            attack.give(tool, lambda canary: None, partial(read, place.file))
        attack.give("dsconv", lambda canary: None, partial(peers.dsconv, place.checkpoint))
        attacks.append(attack)
    return attacks


def everywhere(found: list[Place], canary: Path) -> tuple[int, list[str]]:
    """Put every program in every place; return their number and those that dsconv did not refuse by the file's name."""
    count, taken = 0, []
    for place in found:
        for cases in TECHNIQUES.values():
            for case in cases:
                place.poison(case.program(str(canary)))
                answer = peers.dsconv(place.checkpoint)
                count += 1
                if answer == "read" or str(place.file) not in answer:
                    taken.append(f"{case.title} in {place.title}: {answer}")
        place.heal()
    return count, taken


def show(rows: dict[str, list[Attack]]) -> None:
    for tool in TOOLS:
        kinds = (
            ("RAN", "refused", "read it")
            if tool != "picklescan"
            else ("dangerous", "suspicious", "clean", "no verdict")
        )
        if not any(tool in attack.answers for attacks in rows.values() for attack in attacks):
            continue
        click.echo(f"\n{tool:36}{'files':>7}" + "".join(f"{kind:>12}" for kind in kinds))
        total: Counter[str] = Counter()
        for name, attacks in rows.items():
            row = Counter(attack.outcome(tool) for attack in attacks)
            total += row
            click.echo(f"  {name:34}{len(attacks):>7}" + "".join(f"{row[kind]:>12}" for kind in kinds))
        click.echo(f"  {'all':34}{total.total():>7}" + "".join(f"{total[kind]:>12}" for kind in kinds))


@click.command()
@click.option("--list", "list_all", is_flag=True, help="Print each file and what became of it.")
@click.option("--only", metavar="TECHNIQUE", help="The programs of one technique, or the downloads of one class.")
def main(list_all: bool, only: str | None) -> None:
    """Make the hostile files and give them to Python, DeepSpeed, torch, picklescan and dsconv. Exits with 1 if dsconv
    takes one, or if a download does its harm.
    """
    try:  # import it once, before the forks
        import deepspeed.utils.zero_to_fp32  # noqa: F401
        import picklescan.scanner  # noqa: F401
        import torch
    except ImportError as error:
        raise click.ClickException(f"{error.name} is not installed: pip install -e '.[dev]', or make attacks") from None

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="dsconv-attacks-") as temporary:
        top = Path(temporary)
        found = places(top)
        files = {place.title: place for place in found}
        rows: dict[str, list[Attack]] = {}
        for technique, cases in TECHNIQUES.items():
            if only in (None, technique):
                rows[technique] = [
                    attack_all(case.title, top / technique / str(i), files,
                               lambda place, canary, case=case: poisoned(place.sound, case.program(canary)), raw=True)  # type: ignore[misc]
                    for i, case in enumerate(cases)
                ]  # fmt: skip
        boxes = (
            {
                "zip and other containers": [
                    attack_all(
                        box.title,
                        top / "containers" / str(i),
                        files,
                        lambda place, canary, box=box: box.make(
                            records_of(place.sound), whole(call(glob("os", "system"), touch(canary)))
                        ),  # type: ignore[misc]
                        raw=False,
                    )
                    for i, box in enumerate(CONTAINERS)
                ]
            }
            if only is None
            else {}
        )
        sound = {"sound files": sound_files(found, top / "sound")}
        count, taken = everywhere(found, top / "canary") if only is None else (0, [])
        if list_all:
            for technique, attacks in (rows | boxes | sound).items():
                for attack in attacks:
                    click.echo(
                        f"{technique}: {attack.title}: "
                        + ", ".join(f"{tool}: {attack.outcome(tool)}" for tool in TOOLS)
                    )
        show(rows)
        show(boxes)
        show(sound)
        taken += [
            f"refused, though sound: {attack.title}"
            for attack in sound["sound files"]
            if attack.outcome("dsconv") != "read it"
        ]
        ran = [
            a.title
            for group in (rows | boxes).values()
            for a in group
            if "RAN" in (a.outcome("dsconv"), a.outcome("dsconv, .bin"))
        ]
        missed = [a for group in rows.values() for a in group if a.outcome("pickle.load") == "RAN"]
        unseen = Counter(attack.outcome("picklescan") for attack in missed)
        click.echo(f"\nOf {len(missed)} programs that ran under Python, picklescan called {dict(unseen)}")
        click.echo(
            f"dsconv: every program in each of {len(found)} kinds of file: {count:,} files, {len(taken)} failures"
        )
        canaries = ran + (["everywhere"] if (top / "canary").exists() else [])
        harmed = downloads(top / "downloads", only)
        for line in [*taken, *canaries, *harmed]:
            click.echo(f"FAILURE: {line}", err=True)
    sys.exit(1 if taken or canaries or harmed else 0)


def downloads(folder: Path, only: str | None) -> list[str]:
    """Make each download, run its commands, print a row for each class, and return the broken promises."""
    found = []
    click.echo(f"\n{'dsconv: downloads':36}{'tried':>7}{'held':>12}")
    for name, made in CLASSES.items():
        if only not in (None, name):
            continue
        wrong = {d.title: faults(d, folder / name / str(at)) for at, d in enumerate(made)}
        click.echo(f"  {name:34}{len(made):>7}{sum(not lines for lines in wrong.values()):>12}")
        found += [f"{title}: {line}" for title, lines in wrong.items() for line in lines]
    return found


if __name__ == "__main__":
    main()
