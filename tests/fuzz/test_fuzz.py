"""Break a few thousand files of every kind, in the time that a test has. ``make fuzz`` breaks a million."""

from __future__ import annotations

import contextlib
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dsconv
from dsconv.errors import DsconvError
from tests.fuzz.__main__ import input_of
from tests.fuzz.fields import Fields
from tests.fuzz.judging import OTHER, REFUSED, SAME, Failure, judged, limits
from tests.fuzz.kinds import TARGETS
from tests.fuzz.targets import Checkpoints, Seeds, Target, seeds

INPUTS = 150  # for each share of a target in a mixed run
SEARCHED = settings(
    derandomize=True, deadline=None, database=None, max_examples=40, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Seeds:
    return seeds(tmp_path_factory.mktemp("seeds"))


@pytest.mark.parametrize("kind", TARGETS, ids=lambda kind: kind.name)
def test_broken_files_are_refused_or_read_as_before(kind: type[Target], found: Seeds) -> None:
    target = kind(found)
    outcomes: Counter[str] = Counter()
    with limits():
        for number in range(INPUTS * kind.share if kind is not Checkpoints else INPUTS):
            outcomes[judged(lambda: target.judge(target.broken(input_of(target, 5, number))))] += 1  # noqa: B023
        search(target)
    # The mutations do break files, but nobody reads some of the changed fields.
    assert outcomes[REFUSED] > outcomes.total() * (1 / 8 if issubclass(kind, Fields) else 1 / 2)
    assert outcomes[SAME] + outcomes[OTHER] > 0  # some mutations are harmless
    assert not (target.covered and outcomes[OTHER])


def search(target: Target) -> None:
    """Apply the same mutations with hypothesis's choices, which it shrinks for a failing input."""

    @SEARCHED
    @given(st.randoms(use_true_random=False))
    def check(rng: Random) -> None:
        judged(lambda: target.judge(target.broken(rng)))

    check()


def test_the_judge_sees_what_must_not_happen() -> None:
    """Each kind of failure is reported, so the fuzzing cannot pass vacuously."""

    def loops() -> str:
        while True:
            pass

    def swells() -> str:
        return str(len(bytearray(1 << 30)))

    def runs() -> str:
        exec("1")
        return SAME

    def raises() -> str:
        raise KeyError("a")

    with limits():
        for wrong, says in (
            (loops, "processor time"),
            (swells, "MemoryError"),
            (runs, "ran exec"),
            (raises, "KeyError"),
        ):
            with pytest.raises(Failure, match=says):
                judged(wrong)
        assert judged(lambda: SAME) == SAME


def test_changed_bytes_are_reported(found: Seeds, tmp_path: Path) -> None:
    """A covered file that was changed together with its checksum counts as a failure."""
    from tests.checkpoint.building import Rec, zip_bytes
    from tests.fuzz.mutations import records
    from tests.fuzz.targets import ZipDamage

    target = ZipDamage(Seeds(tmp_path))
    other = [
        Rec(name, data[:-1] + b"\x01" if name.endswith("/data/0") else data) for name, data in records(target.data)
    ]
    with pytest.raises(Failure, match="other tensors"):
        judged(lambda: target.judge(zip_bytes(other)))


def test_a_tree_is_written_as_it_was_read(found: Seeds, tmp_path: Path) -> None:
    """Without an edit, the fuzzer of fields writes the same tree, and dsconv reads the same from it."""
    import dataclasses

    from tests.fuzz import trees
    from tests.fuzz.judging import tensors_of

    def shape(value: object) -> object:
        if isinstance(value, dict):
            return [(shape(key), shape(child)) for key, child in value.items()]
        if isinstance(value, (list, tuple)):
            return [type(value).__name__, *map(shape, value)]
        if dataclasses.is_dataclass(value):
            return [type(value).__name__, *(shape(getattr(value, part.name)) for part in dataclasses.fields(value))]
        return value

    target = Fields(dataclasses.replace(found, folder=tmp_path))
    before = {path: tensors_of(dsconv.open_checkpoint(path)) for path in {d.checkpoint for d in target.documents}}
    for document in target.documents:
        data = document.write({})
        if document.file.suffix == ".pt" or document.file.name == ".metadata":
            tree = trees.decode(trees.encode(document.tree, {}))
            assert shape(tree) == shape(document.tree), document.name
        document.file.write_bytes(data)
    for path, tensors in before.items():
        assert tensors_of(dsconv.open_checkpoint(path)) == tensors, path

    # What inspect says of the optimizer takes steps and settings of any type.
    values: tuple[object, ...] = ({}, [1], 1 << 2000, "x")
    for document in target.documents:
        for place in [found for name in ("step", "lr") for found in document.fields.get(name, ())[:1]]:
            for value in values:
                with contextlib.suppress(DsconvError):
                    target.judge((document, document.write({place: value}), 9))
