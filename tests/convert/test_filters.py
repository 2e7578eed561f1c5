"""A merge leaves out and renames tensors as asked, records that in the manifest, and verify follows it."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import dsconv
from dsconv.errors import UsageError
from tests.cli.running import dsconv as command
from tests.trained import same

STATE = {
    "policy.transformer.h.0.attn.weight": torch.arange(6.0).view(2, 3),
    "policy.transformer.h.1.attn.weight": torch.arange(6.0, 12.0).view(2, 3),
    "policy.transformer.h.10.attn.weight": torch.arange(12.0, 18.0).view(2, 3),
    "policy.transformer.head.weight": torch.ones(2),
    "critic.head.weight": torch.zeros(2),
    "steps": torch.tensor(7),
}
HEAD, H = "policy.transformer.head.weight", "policy.transformer.h.{}.attn.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "source").mkdir()
    save_file(STATE, tmp_path / "source" / "model.safetensors")
    return tmp_path / "source"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"include": "critic.*"}, {"critic.head.weight": "critic.head.weight"}),
        ({"include": ["*.head.weight"], "exclude": ["critic.*"]}, {HEAD: HEAD}),
        ({"exclude": ["critic.*", "steps", "*.h.?.*"]}, {HEAD: HEAD, H.format(10): H.format(10)}),
        (
            {"include": ["policy.*"], "strip_prefix": ["policy.transformer.", "policy."], "exclude": ["*attn*"]},
            "refused: strip-prefix",
        ),
        (
            {"include": ["policy.*"], "strip_prefix": "policy.", "rename": ["transformer.h=model.layers"]},
            {"transformer.head.weight": HEAD, **{f"model.layers.{i}.attn.weight": H.format(i) for i in (0, 1, 10)}},
        ),
        (
            {"include": "*.h.*", "rename": {"policy.transformer.h.*.attn": "blocks.*.self_attn"}},
            {f"blocks.{i}.self_attn.weight": H.format(i) for i in (0, 1, 10)},
        ),
        ({"include": "steps", "rename": ["steps=global_step"]}, {"global_step": "steps"}),
        ({"rename": ["critic.head.weight=steps"]}, "refused: would both be called 'steps'"),
        ({"include": ["nothing.*"]}, "refused: --include 'nothing.*' fits no tensor; there are 6, such as"),
        ({"exclude": ["critic"]}, "refused: --exclude 'critic' fits no tensor"),
        ({"rename": ["polic=x"]}, "refused: --rename 'polic=x' fits no tensor"),
        ({"rename": ["policy.*=x"]}, "refused: write OLD=NEW, with as many \\* in NEW as in OLD"),
        ({"rename": ["policy"]}, "refused: write OLD=NEW"),
        ({"include": [""]}, "refused: an empty one was given"),
        ({"include": ["steps"], "adapter": True}, "refused: cannot be combined with --adapter or --fold-lora"),
    ],
    ids=str,
)
def test_what_is_written(options: dict[str, Any], expected: dict[str, str] | str, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    if isinstance(expected, str):
        with pytest.raises(UsageError, match=expected.removeprefix("refused: ")):
            dsconv.merge(source, out, **options)
        assert not out.exists()
        return
    report = dsconv.merge(source, out, verify_output=True, **options)
    found = load_file(out / "model.safetensors")
    assert set(found) == set(expected)
    assert all(same(found[new], STATE[old]) for new, old in expected.items())
    assert sum(report.left_out.values()) == len(STATE) - len(expected)
    manifest = json.loads((out / "dsconv.manifest.json").read_bytes())
    assert {new: manifest["tensors"][new].get("source", new) for new in found} == expected
    checked = dsconv.verify(source, out)
    assert checked.equal
    assert checked.compared == len(expected)
    assert checked.filters == manifest["filters"]
    other = {**STATE, next(iter(expected.values())): STATE[next(iter(expected.values()))] + 1}
    save_file(other, source / "model.safetensors")
    assert not dsconv.verify(source, out).equal


def test_verify_shows_what_is_missing_besides_what_was_left_out(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dsconv.merge(source, out, exclude=["critic.*"])
    (out / "model.safetensors").unlink()
    save_file({name: STATE[name] for name in list(STATE)[:3]}, out / "model.safetensors")
    report = dsconv.verify(source, out)
    assert sorted(difference.name for difference in report.differences) == [HEAD, "steps"]
    save_file({"another": torch.ones(1)}, source / "model.safetensors")  # the filters do not apply to this one
    assert not dsconv.verify(source, out).equal


def test_one_name_of_a_tied_tensor(tmp_path: Path) -> None:
    weight = torch.arange(4.0)
    torch.save({"embed.weight": weight, "head.weight": weight, "norm": torch.ones(1)}, tmp_path / "model.pt")
    for options, names in (
        ({"exclude": ["head.*"]}, {"embed.weight", "norm"}),
        ({"exclude": ["embed.*"]}, {"head.weight", "norm"}),
        ({"include": ["head.*"], "rename": ["head=lm_head"]}, {"lm_head.weight"}),
        ({"exclude": ["embed.*", "head.*"]}, {"norm"}),
    ):
        dsconv.merge(tmp_path / "model.pt", tmp_path / "out", force=True, verify_output=True, **options)  # type: ignore[arg-type]
        found = load_file(tmp_path / "out" / "model.safetensors")
        assert set(found) == names
        assert all(same(tensor, weight) for name, tensor in found.items() if name != "norm")
        assert dsconv.verify(tmp_path / "model.pt", tmp_path / "out").equal


def test_the_command(source: Path, tmp_path: Path) -> None:
    flags = ("--include", "policy.*", "--strip-prefix", "policy.", "--rename", "transformer.h=model.layers")
    ran = command("merge", source, tmp_path / "out", *flags, "--exclude", "*.h.10.*")
    assert ran.code == 0, ran.err
    assert "left out: 3 tensors that the filters leave out" in ran.out
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == {
        "transformer.head.weight",
        "model.layers.0.attn.weight",
        "model.layers.1.attn.weight",
    }
    checked = command("verify", source, tmp_path / "out")
    assert checked.code == 0
    assert (
        "as the manifest of B says: --include policy.*, --exclude *.h.10.*, --strip-prefix policy., --rename"
        in checked.out
    )
    wrong = command("merge", source, tmp_path / "other", "--include", "polcy.*")
    assert (wrong.code, "fits no tensor" in wrong.err) == (2, True)


@pytest.mark.parametrize(
    ("old", "given"),
    [
        ("steps", {"rename": {"steps": "__metadata__"}}),
        ("steps", {"rename": {"steps": "b" * 5000}}),
        ("steps", {"rename": {"steps": "\ud800"}}),
        ("model.__metadata__", {"strip_prefix": "model."}),
    ],
    ids=["reserved", "long", "no-text", "stripped"],
)
def test_a_name_that_cannot_be_written(old: str, given: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    save_file({old: torch.zeros(1)}, tmp_path / "source" / "model.safetensors")
    with pytest.raises(UsageError, match="cannot be a tensor's name in safetensors"):
        dsconv.merge(tmp_path / "source", tmp_path / "out", **given)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "noted",
    [
        {"rename": ["*" * 40 + "!=" + "*" * 40]},
        {"rename": ["*a" * 40 + "!=" + "*" * 40]},
        {"include": ["*a" * 40 + "!"]},
        {"include": ["x*"] * 1_000_000},
    ],
    ids=["stars", "apart", "globs", "many"],
)
def test_patterns_of_a_manifest_cost_no_time(noted: dict[str, list[str]], tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    state = {"a" * 200 + str(i): torch.zeros(1) for i in range(50)}
    save_file(state, tmp_path / "source" / "model.safetensors")
    dsconv.merge(tmp_path / "source", tmp_path / "out", fsync=False)
    manifest = json.loads((tmp_path / "out" / "dsconv.manifest.json").read_text())
    (tmp_path / "out" / "dsconv.manifest.json").write_text(json.dumps({**manifest, "filters": noted}))
    began = time.monotonic()
    with contextlib.suppress(UsageError):
        assert dsconv.verify(tmp_path / "source", tmp_path / "out").equal
    assert time.monotonic() - began < 5
