"""Compare what a merge says about loading its output with what transformers does with the same folder."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import dsconv
from dsconv.checkpoint.formats.huggingface.auto_classes import auto_class
from dsconv.checkpoint.formats.huggingface.skeleton import read_skeleton
from tests.fixtures import peft_methods
from tests.trained import Trained, load_safetensors

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 61}
# (class, settings) of models that the source decides, unlike those whose weights transformers converts.
TOLD = [
    ("LlamaForCausalLM", {**TINY, "attention_bias": True, "mlp_bias": True}),
    ("MistralForCausalLM", TINY),
    ("Qwen2ForCausalLM", {**TINY, "tie_word_embeddings": True}),
    ("Qwen3ForCausalLM", {**TINY, "head_dim": 16}),
    ("Gemma2ForCausalLM", {**TINY, "head_dim": 8}),
    ("Phi3ForCausalLM", {**TINY, "pad_token_id": 0}),
    ("GPT2LMHeadModel", {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 61}),
    ("OPTForCausalLM", {**TINY, "ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("T5ForConditionalGeneration", {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2}),
    ("BertForMaskedLM", TINY),
    ("BertForSequenceClassification", TINY),
    ("LlamaModel", TINY),
]  # fmt: skip


def build(name: str, settings: dict[str, Any]) -> nn.Module:
    import transformers

    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model: nn.Module = kind(kind.config_class(**settings))
    return model


@pytest.mark.parametrize(("name", "settings"), TOLD, ids=[name for name, _ in TOLD])
def test_the_source_gives_names_and_shapes(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = build(name, settings)
    model.save_pretrained(tmp_path / "model")
    skeleton = read_skeleton(json.loads((tmp_path / "model" / "config.json").read_text()))
    assert skeleton is not None
    assert skeleton.shapes == {key: tuple(value.shape) for key, value in model.state_dict().items()}
    report = dsconv.merge(tmp_path / "model", tmp_path / "out", fsync=False)
    assert (report.loadable, report.missing, report.unexpected) == (True, [], [])
    assert "from_pretrained(" in report.loads_with


@pytest.mark.parametrize("name", ["llama_tied", "gpt2", "t5", "mixtral", "llama_frozen"])
def test_trained_models_load_as_reported(name: str, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    """transformers fuses Mixtral's experts on loading, so transformers itself is asked."""
    report = dsconv.merge(trained(f"{name}-z3-fp32-w2").checkpoint, tmp_path / "out", fsync=False)
    assert report.loadable is True
    kind = "AutoModelForSeq2SeqLM" if name == "t5" else "AutoModelForCausalLM"
    assert report.loads_with == f'{kind}.from_pretrained("{tmp_path / "out"}")'
    assert not report.warnings


def test_transformers_is_asked_about_converted_weights(tmp_path: Path) -> None:
    """GPT-NeoX's lm_head is saved as embed_out, which only transformers' own table shows."""
    build("GPTNeoXForCausalLM", TINY).save_pretrained(tmp_path / "model")
    assert read_skeleton(json.loads((tmp_path / "model" / "config.json").read_text())) is None
    assert dsconv.merge(tmp_path / "model", tmp_path / "out", fsync=False).loadable is True
    tensors = load_safetensors(tmp_path / "model")
    del tensors["embed_out.weight"]
    report = merged(tmp_path / "model", tensors, tmp_path / "short")
    assert (report.loadable, report.unexpected) == (False, [])
    assert len(report.missing) == 1


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """Return a folder with a config.json, and a model's weights."""
    folder = tmp_path_factory.mktemp("llama")
    model = peft_methods.base_model(peft_methods.METHODS["lora"])
    model.config.save_pretrained(folder)
    return folder, {name: tensor.clone() for name, tensor in model.state_dict().items()}


def merged(folder: Path, tensors: dict[str, torch.Tensor], place: Path, **options: Any) -> dsconv.MergeReport:
    place.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "model.safetensors")
    return dsconv.merge(place, place / "out", config_from=folder, fsync=False, **options)


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (lambda name: f"pretrained_model.{name}", "--strip-prefix pretrained_model."),
        (lambda name: f"base_model.model.{name}".replace("q_proj", "q_proj.base_layer"), "--fold-lora"),
        (lambda name: name.replace("model.embed_tokens", "tok_embeddings").replace("self_attn.q_proj", "attention.wq"),
         "names of torchtitan"),
    ],
    ids=["a value head's prefix", "a PEFT model", "torchtitan"],
)  # fmt: skip
def test_names_of_another_kind(
    change: Callable[[str], str], advice: str, llama: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder, tensors = llama
    renamed = {change(name): tensor for name, tensor in tensors.items()}
    if advice == "--fold-lora":
        renamed["base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"] = torch.ones(2, 32)
    report = merged(folder, renamed, tmp_path / "a")
    assert report.loadable is False
    assert set(report.missing) <= set(tensors)
    assert set(report.unexpected) <= set(renamed)
    assert any(advice in warning and "LlamaForCausalLM" in warning for warning in report.warnings)


def test_missing_and_unexpected_weights(llama: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, tensors = llama
    short = {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}
    report = merged(folder, short, tmp_path / "short")
    assert report.loadable is False
    assert report.missing == sorted(set(tensors) - set(short))
    assert report.unexpected == []
    assert "base model" in report.warnings[0]
    more = {**tensors, "v_head.summary.weight": torch.ones(1, 32)}
    report = merged(folder, more, tmp_path / "more")
    assert (report.loadable, report.missing, report.unexpected) == (False, [], ["v_head.summary.weight"])
    other = {**tensors, "model.norm.weight": torch.ones(31)}
    report = merged(folder, other, tmp_path / "other")
    assert (report.loadable, report.missing) == (False, ["model.norm.weight"])
    assert "of a model of other sizes" in report.warnings[0]
    two = {f"{part}.{name}": tensor.clone() for part in ("actor", "critic") for name, tensor in tensors.items()}
    report = merged(folder, two, tmp_path / "two")
    assert report.loadable is False
    assert len(report.unexpected) == 2 * len(tensors)
    assert "--strip-prefix" in report.warnings[0]


def test_buffers_of_older_files_are_not_unexpected(llama: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, tensors = llama
    old = {**tensors, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    report = merged(folder, old, tmp_path / "old")
    assert (report.loadable, report.unexpected) == (True, [])


def test_a_model_without_its_head_s_prefix(tmp_path: Path) -> None:
    """transformers also loads a GPT-2 without ``transformer.``, like OpenAI's own file."""
    model = build("GPT2LMHeadModel", TOLD[6][1])
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in model.state_dict().items()}
    del tensors["lm_head.weight"]
    model.config.architectures = ["GPT2LMHeadModel"]
    model.config.save_pretrained(tmp_path / "config")
    assert merged(tmp_path / "config", tensors, tmp_path / "a").loadable is True


def test_what_is_not_known_is_not_claimed(llama: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, tensors = llama
    config = json.loads((folder / "config.json").read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"auto_map": {"AutoModel": "x.Y"}}, "names code of its own"),
        ({"architectures": ["NoSuchModel"]}, "transformers "),  # has no such model, or a busy machine gives no answer
        ({"architectures": None, "num_hidden_layers": 3}, "'llama' classes none has these weights"),
        ({"architectures": None, "model_type": "nothing"}, "no model_type 'nothing'"),
        ({"architectures": None, "model_type": None}, "no architectures and no model_type"),
    ]
    for number, (change, why) in enumerate(changes):
        (tmp_path / f"c{number}").mkdir()
        (tmp_path / f"c{number}" / "config.json").write_text(json.dumps({**config, **change}))
        report = merged(tmp_path / f"c{number}", tensors, tmp_path / f"m{number}")
        assert (report.loadable, report.missing, report.unexpected) == (None, [], [])
        assert why in report.loading_unchecked
    (tmp_path / "guessed").mkdir()
    (tmp_path / "guessed" / "config.json").write_text(json.dumps({**config, "architectures": None}))
    report = merged(tmp_path / "guessed", tensors, tmp_path / "m-guessed")
    assert (report.loadable, report.loading_unchecked) == (True, "")
    assert report.loads_with.startswith("AutoModelForCausalLM")  # the class that all weights fit


def test_without_importing_transformers(llama: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder, tensors = llama
    save_file(tensors, tmp_path / "model.safetensors")
    script = (
        "import sys, dsconv\n"
        f"r = dsconv.merge({str(tmp_path)!r}, {str(tmp_path / 'out')!r}, config_from={str(folder)!r}, fsync=False)\n"
        "assert r.loadable, r\n"
        "assert 'transformers' not in sys.modules and 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize(
    ("architecture", "kind", "expected"),
    [
        ("LlamaForCausalLM", "llama", "AutoModelForCausalLM"),
        ("T5ForConditionalGeneration", "t5", "AutoModelForSeq2SeqLM"),
        ("BertForSequenceClassification", "bert", "AutoModelForSequenceClassification"),
        ("LlamaModel", "llama", "AutoModel"),
        ("NoSuchModel", "llama", "NoSuchModel"),
    ],
)
def test_the_class_to_call(architecture: str, kind: str, expected: str) -> None:
    assert auto_class(architecture, kind) == expected


MIXTRAL = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_hidden_layers": 1, "hidden_size": 8,
    "intermediate_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2,
    "vocab_size": 16,
}  # fmt: skip


def test_modules_in_the_current_folder_are_not_imported(tmp_path: Path) -> None:
    folder = tmp_path / "downloaded"
    folder.mkdir()
    save_file({"a.weight": torch.zeros(2)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(MIXTRAL))
    for name in ("torch", "transformers", "json", "dsconv", "numpy"):
        (folder / f"{name}.py").write_text(f"open({str(tmp_path / 'run')!r}, 'w')\n")
    # pip's script starts it like this: the current folder is not on the module path.
    program = (
        f"import sys; sys.path = {[path for path in sys.path if path]!r}; from dsconv.cli import main;"
        " sys.argv = ['dsconv', 'merge', '.', '../out', '--json']; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program] if sys.version_info >= (3, 11) else [sys.executable, "-I", "-c", program],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loadable"] is False
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "hostile",
    [
        {"num_hidden_layers": 10**9},
        {"architectures": ["M" * 200_000]},
        {"text_config": {"auto_map": {"AutoModel": "evil.Model"}}},
        {"_attn_implementation": "somebody/kernel"},
        {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 10**9},
        {"architectures": None, "num_local_experts": 10**9},
    ],
    ids=str,
)
def test_a_hostile_configuration_is_not_tried(hostile: dict[str, Any], tmp_path: Path) -> None:
    save_file({"a.weight": torch.zeros(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**MIXTRAL, **hostile}))
    began = time.monotonic()
    assert dsconv.merge(tmp_path, tmp_path / "out", fsync=False).loadable is None
    assert time.monotonic() - began < 5 + 20 * ("M" * 9 in str(hostile))


def test_only_models_of_transformers_are_built(tmp_path: Path) -> None:
    from dsconv.convert.loading_probe import probe

    assert "no model pipeline" in probe(str(tmp_path), "pipeline")["error"]
    assert "no model AutoModel" in probe(str(tmp_path), "AutoModel")["error"]
