"""Compare what dsconv says about configs with what DeepSpeed and transformers do, in one launch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dsconv.zero_utils import config_keys as keys
from dsconv.zero_utils.config_recipes import RECIPES
from tests.fixtures import config_cases, config_running, gloo

# Keys that are read when their feature runs, not with the config, and the file that has to name them.
READ_LATER = {
    "": {"data_parallel_size": "__init__.py", "allgather_size": "runtime/zero/config.py"},
    "pipeline": {"use_reentrant": "runtime/pipe/engine.py"},
    "data_efficiency.data_sampling.curriculum_learning": {"data_cluster_path": "runtime/data_pipeline/constants.py"},
    "data_efficiency.data_sampling.dynamic_batching": {"metrics_path": "runtime/data_pipeline/constants.py"},
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """Return the folder of the launch, and how each of its cases failed."""
    folder = tmp_path_factory.mktemp("configs")
    return folder, gloo.outcomes("config_running", config_running.CASES, folder)


def facts_of(launched: tuple[Path, dict[str, str]], case: str, file: str = "facts.json") -> Any:
    folder, failures = launched
    assert not failures[case], failures[case]
    return json.loads((folder / case / file).read_text())


@pytest.fixture(scope="module")
def tables(launched: tuple[Path, dict[str, str]]) -> dict[str, Any]:
    found: dict[str, Any] = facts_of(launched, "tables")
    return found


@pytest.mark.parametrize("section", [name for name, section in keys.SECTIONS.items() if section.strict])
def test_the_keys_of_a_section_that_pydantic_reads(section: str, tables: dict[str, Any]) -> None:
    assert section not in tables["not strict"]
    assert keys.SECTIONS[section].keys == set(tables["fields"][section])


def test_these_are_all_sections_that_pydantic_reads(tables: dict[str, Any]) -> None:
    assert set(tables["fields"]) == {name for name, section in keys.SECTIONS.items() if section.strict}


@pytest.mark.parametrize("section", [name for name, section in keys.SECTIONS.items() if not section.strict])
def test_the_keys_of_a_section_that_deepspeed_asks_for(section: str, tables: dict[str, Any]) -> None:
    import deepspeed

    source = Path(deepspeed.__file__).parent
    later = READ_LATER.get(section, {})
    for key, file in later.items():
        text = (source / file).read_text()
        assert f'"{key}"' in text or f"'{key}'" in text, (key, file)
    removed = {key.rpartition(".")[2] for key in keys.REMOVED if key.rpartition(".")[0] == section}
    assert keys.SECTIONS[section].keys == (set(tables["asked"][section]) - removed) | set(later)


def test_the_files_that_sections_name_exist() -> None:
    import deepspeed

    source = Path(deepspeed.__file__).parent
    for section in keys.SECTIONS.values():
        assert any((source / word.strip(",;")).is_file() for word in section.source.split()), section.source


def test_removed_and_deprecated_keys(tables: dict[str, Any]) -> None:
    assert set(keys.REMOVED) == set(tables["removed"])
    deprecated = {key for key in keys.DEPRECATED if key.startswith("zero_")}
    assert {f"zero_optimization.{name}" for name in tables["deprecated"]} == deprecated


def test_the_keys_of_one_stage() -> None:
    zero = keys.SECTIONS["zero_optimization"].keys
    assert {*keys.ONLY_STAGE3, *keys.ONLY_STAGES_1_2} <= zero
    assert {key for key in zero if key.startswith("stage3_")} <= set(keys.ONLY_STAGE3)


def test_the_names_of_optimizers(tables: dict[str, Any]) -> None:
    assert set(keys.DEEPSPEED_OPTIMIZERS) == set(tables["optimizers"])
    assert set(keys.TORCH_OPTIMIZERS) == set(tables["torch optimizers"]) - {"Optimizer"}
    supported = {name.lower().removeprefix("fused").removeprefix("deepspeedcpu") for name in tables["zero optimizers"]}
    assert set(keys.ZERO_OPTIMIZERS) - {"muon"} == supported - {"zenflowcpuadam", "muonwithauxadam"}


def test_the_names_of_schedulers(tables: dict[str, Any]) -> None:
    assert set(keys.SCHEDULER_PARAMS) == set(tables["schedulers"]) == set(keys.CHOICES["scheduler.type"])


@pytest.mark.parametrize("name", keys.SCHEDULER_PARAMS)
def test_the_parameters_of_a_scheduler(name: str, tables: dict[str, Any]) -> None:
    known, needed = keys.SCHEDULER_PARAMS[name]
    assert known == set(tables["schedulers"][name]["known"])
    assert needed == set(tables["schedulers"][name]["needed"])


def test_the_dtypes_of_autocast(tables: dict[str, Any]) -> None:
    expected = {name for name in tables["autocast dtypes"] if "int8" not in name}
    assert set(keys.CHOICES["torch_autocast.dtype"]) == expected


@pytest.mark.parametrize("number", range(len(config_cases.CASES)), ids=lambda n: f"{n}-{config_cases.CASES[n].key}")
def test_deepspeed_refuses_what_the_lint_says_that_it_refuses(
    number: int, launched: tuple[Path, dict[str, str]]
) -> None:
    """DeepSpeed refuses at the same place, and accepts the other configs."""
    refused_by = config_cases.CASES[number].refused_by
    refused = facts_of(launched, "verdicts")[number]
    expected = None if refused_by == "elsewhere" else refused_by
    assert (refused and refused.partition(":")[0]) == expected, refused


def test_auto_is_filled_as_the_trainer_fills_it(launched: tuple[Path, dict[str, str]]) -> None:
    _, failures = launched
    assert not failures["trainer"], failures["trainer"]


def test_every_recipe_that_a_cpu_can_run_is_run() -> None:
    assert set(config_running.RUNNABLE) == set(RECIPES) - {"zero3-nvme"}


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", config_running.RUNNABLE)
def test_a_recipe_trains_and_does_what_it_asks_for(name: str, rank: int, launched: tuple[Path, dict[str, str]]) -> None:
    found = facts_of(launched, "recipes", f"facts-{rank}.json")[name]
    assert not found["left auto"]
    for fact in ("stage", "offloads the optimizer", "offloads parameters", "dtype"):
        is_so, asked = found[fact]
        assert is_so == asked, fact
    assert found["batch"] == 4
    assert found["losses"][-1] < found["losses"][0]
    assert found["lr"] < 1e-2
