"""Patterns of an adapter_config.json: as PEFT reads them, or refused where matching could take exponential time."""

from __future__ import annotations

import re
import time

import pytest

from dsconv.convert.adapters.patterns import by_pattern, ends, require_few
from dsconv.errors import DsconvError

LAYER = "base.model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    "pattern",
    ["q_proj", r".*\.layers\.\d+\..*(q|v|gate|down)_proj", "^base.model.layers.10.self_attn.q_proj", "k_proj",
     ".*(self_attn|mlp).*(q_proj|up_proj)", "layers.1[0-9].self_attn.q_proj", "layers.1?0.*q_proj"],
)  # fmt: skip
def test_what_people_write_is_read_as_peft_does(pattern: str) -> None:
    assert by_pattern({pattern: 4}, LAYER, 8) == (4 if re.match(rf"(.*\.)?({pattern})$", LAYER) else 8)


@pytest.mark.parametrize(
    "pattern",
    ["(a+)+b", "(a|a)*b", "(a|aa)+b", "(a?){50}a{50}b", "(a|a)" * 30 + "b", "a?" * 30 + "b", ".*" * 20 + "b", "[z-a]",
     r"(.*)\1", "(?=.*a)b", "(", "a" * 2000, "(" * 500 + ")" * 500, "(?:(?:a*)*)*b", "a{1,9}" * 20 + "b"],
)  # fmt: skip
def test_what_could_take_exponential_time_is_refused(pattern: str) -> None:
    began = time.process_time()
    with pytest.raises(DsconvError, match=r"^adapter_config\.json: "):
        by_pattern({pattern: 4}, "a" * 60, 8)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("name", [LAYER, "a", "", "a.", ".a", "..", "a..b"])
def test_the_ends_of_a_name_are_what_peft_compares(name: str) -> None:
    found = set(ends(name))
    for target in {*found, "", "q_proj", "proj", "a", "b", ".b", "layers.10.self_attn.q_proj"}:
        assert (target in found) == (name == target or name.endswith(f".{target}"))


def test_patterns_for_each_of_many_layers_are_refused() -> None:
    few = {"rank_pattern": dict.fromkeys(map(str, range(1000)), 8), "alpha_pattern": None}
    require_few(few, 1000)
    for config, layers in ((few, 100_000), ({"alpha_pattern": dict.fromkeys(map(str, range(5000)), 8)}, 1)):
        with pytest.raises(DsconvError, match=r"^adapter_config\.json: (rank|alpha)_pattern has [15],000 patterns"):
            require_few(config, layers)
