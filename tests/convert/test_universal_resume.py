"""Real DeepSpeed resumes from dsconv's output in other world sizes and stages, with every bit of every state."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

import dsconv
from tests.fixtures import gloo, universal
from tests.fixtures.universal_resume import Resume, run
from tests.trained import load_safetensors, same

# For each source, the world sizes and stages that load it. With True the engine also trains on, as the original did.
PLANS: dict[str, list[tuple[int, int, bool]]] = {
    "llama_groups-z0-bf16-w2": [(1, 1, False), (3, 2, False), (2, 3, False)],
    "odd-z0-fp32-w2": [(3, 1, False), (2, 2, False), (1, 3, False)],
    "llama_groups-z0-fp16-w2": [(2, 1, False), (3, 3, False)],
    "llama_frozen-z0-bf16-w2": [(1, 2, False)],
    "llama_tied-z1-bf16-w2": [
        (1, 1, False),
        (3, 1, False),
        (4, 1, False),
        (2, 1, True),
        (3, 2, False),
        (1, 3, False),
        (3, 3, False),
    ],
    "llama_groups-z1-bf16-w2-bf16opt": [(1, 1, False), (3, 1, False), (4, 2, False), (2, 1, True)],
    "llama_groups-z2-bf16-w2": [
        (1, 0, False),
        (1, 2, False),
        (3, 2, False),
        (4, 1, False),
        (2, 2, True),
        (3, 3, False),
    ],
    "odd-z2-fp32-w2": [(3, 0, False), (1, 2, False), (2, 2, True), (1, 1, False), (3, 3, False)],
    "llama_frozen-z2-bf16-w2": [(1, 2, False), (4, 2, False), (2, 3, False)],
    "llama_groups-z2-bf16-w2-roundrobin": [(1, 2, False), (3, 2, False)],
    "gpt2-z2-fp32-w2-aligned": [(3, 2, False), (1, 3, False)],
    "llama_groups-z2-fp16-w2": [(3, 0, False), (3, 2, False), (2, 2, True), (1, 3, False)],
    "llama_groups-z3-bf16-w2-subgroups": [(1, 3, False), (3, 3, False), (4, 3, False), (3, 2, False), (1, 1, False)],
    "odd-z3-fp32-w2": [(2, 0, False), (1, 3, False), (3, 3, False), (2, 3, True), (2, 2, False)],
    "llama_frozen-z3-bf16-w2": [(3, 0, False), (3, 3, False), (1, 2, False)],
    "llama_groups-z2-bf16-w2-elastic": [(3, 2, False)],
    "llama_tied-z1-bf16-w2-lion": [(3, 1, False), (2, 1, True)],
    "llama_tied-z2-bf16-w2-adagrad": [(3, 2, False), (2, 2, True)],
    "llama_tied-z1-fp32-w2-sgd": [(3, 1, False)],
    "llama_tied-z2-fp32-w2-momentum": [(1, 2, False), (2, 2, True)],
    "llama_tied-z1-bf16-w2-amsgrad": [(3, 0, False), (3, 1, False), (2, 1, True)],
    "llama_tied-z2-bf16-w1": [(4, 2, False), (1, 2, True)],
    "gpt2-z3-fp32-w1": [(3, 3, False), (1, 1, False)],
    "odd-z1-bf16-w3": [(1, 1, False), (2, 2, False)],
    "mixtral-z3-bf16-w3": [(1, 3, False), (4, 3, False), (2, 2, False)],
    "mixtral-z2-bf16-w4": [(3, 2, False), (4, 2, True), (2, 3, False)],
    "gpt2-z3-bf16-w4": [(1, 3, False), (3, 3, False), (2, 1, False)],
}
IDS = [(source, *plan) for source, plans in PLANS.items() for plan in plans]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    """Convert every source, resume from it in every planned way, and return the folders of the results."""
    root = tmp_path_factory.mktemp("resumed")
    resumes = []
    for source, folder in gloo.ensure("universal").items():
        if source not in PLANS:
            continue
        dsconv.to_universal(folder / "ckpt", root / source / "universal", fsync=False, verify_output=True)
        # Half of them load from the folder itself, and half from its parent, as with the official tool's output.
        for number, (world, stage, goes_on) in enumerate(PLANS[source]):
            path = folder / "ckpt" if stage == 0 else root / source / "universal" if number % 2 else root / source
            resumes.append(Resume(source, str(path), world, stage, goes_on))
    found = run(resumes, root)
    yield found
    shutil.rmtree(root)


@pytest.mark.parametrize(("source", "world", "stage", "goes_on"), IDS, ids=lambda value: str(value))
def test_an_engine_has_every_bit_after_loading(
    source: str, world: int, stage: int, goes_on: bool, resumed: dict[str, Path]
) -> None:
    origin = gloo.ensure("universal")[source]
    found = resumed[Resume(source, "", world, stage).name]
    assert not (found / "failed.txt").exists(), (found / "failed.txt").read_text()
    expected, loaded = load_safetensors(origin / "truth.safetensors"), load_safetensors(found / "states.safetensors")
    assert set(loaded) == set(expected)
    for name, tensor in expected.items():
        assert same(loaded[name].reshape(tensor.shape), tensor), name
    before, now = (json.loads((folder / "facts.json").read_text()) for folder in (origin, found))
    if stage:  # without ZeRO, DeepSpeed's own load_checkpoint is not used
        assert now["path"] is not None
        assert now["epoch"] == 3
    assert now["loss"] == before["loss"]
    assert now["steps"] == before["steps"]
    assert now["global_steps"] == before["global_steps"]
    assert now["loss_scale"] == before["loss_scale"]
    if stage < 3:  # DeepSpeed's stage 3 gives every group the hyperparameters of the first one
        assert now["groups"] == before["groups"]
    if goes_on:
        expected, loaded = load_safetensors(origin / "after.safetensors"), load_safetensors(found / "after.safetensors")
        for name, tensor in expected.items():
            assert same(loaded[name].reshape(tensor.shape), tensor), f"{name} after one more step"


def test_all_but_the_patterns_are_resumed() -> None:
    """Rows that only pad the vocabulary are not kept, so this case does not have every bit."""
    assert universal.CASES.keys() == PLANS.keys() | {"odd-z2-fp32-w2-patterns"}
