"""State dicts of torch, huggingface_hub, PEFT and Lightning: every byte is compared with the live model's."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import struct
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsconv import merge, open_checkpoint, verify
from dsconv.checkpoint.formats.huggingface.torch_bin import ADAPTER, INDEX, SINGLE
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import (
    DsconvError,
    InconsistentCheckpointError,
    MalformedError,
    MissingShardError,
    SeveralModelsError,
    UnsafeError,
    UnsupportedError,
)
from tests.trained import load_safetensors, same

STORAGE = torch.arange(120, dtype=torch.float32)
TIED = torch.randn(7, 5, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
STATE: dict[str, Any] = {
    "embed.weight": TIED,
    "scalar": torch.tensor(3.25, dtype=torch.float64),
    "steps": torch.tensor(2**40 + 1),
    "mask": torch.arange(11) % 3 == 0,
    "bytes": torch.arange(256, dtype=torch.uint8),
    "wide": torch.tensor([2**63 + 5], dtype=torch.uint64),
    "fp8": torch.arange(-8, 9, dtype=torch.float32).to(torch.float8_e4m3fn),
    "none": torch.empty(0, 3),
    "none.too": torch.empty(0, 3),
    "head.weight": TIED,
    "view.rows": STORAGE.view(12, 10)[2:5],
    "view.overlapping": STORAGE[15:40],
    "view.columns": STORAGE.view(12, 10)[:, 3:6],
    "view.transposed": STORAGE.view(12, 10).t(),
    "view.expanded": STORAGE[3].expand(4, 2),
    "lonely": torch.full((3, 1, 2), -0.0, dtype=torch.float16),
}
LEGACY = {"_use_new_zipfile_serialization": False}


def check(source: Path, out: Path, truth: dict[str, Any], ties: dict[str, str] | None = None) -> None:
    """Check that reading and merging both give ``truth``, with every tied tensor once."""
    ties = ties or {}
    checkpoint = open_checkpoint(source)
    assert checkpoint.ties == ties
    assert set(checkpoint) == set(truth) - set(ties)
    for name, tensor in truth.items():
        assert same(checkpoint[name].read(), tensor), name
    merge(source, out, verify_output=True)
    merged = load_safetensors(out)
    assert set(merged) == set(checkpoint)
    for name, tensor in merged.items():
        assert same(tensor, truth[name]), name
    assert verify(source, out).equal


@pytest.mark.parametrize("form", ["zip", "legacy", "legacy protocol 4"])
@pytest.mark.parametrize("name", [SINGLE, "model.pt"])
def test_a_state_dict_of_odd_tensors(form: str, name: str, tmp_path: Path) -> None:
    forms: dict[str, dict[str, Any]] = {
        "zip": {},
        "legacy": LEGACY,
        "legacy protocol 4": {**LEGACY, "pickle_protocol": 4},
    }
    folder = tmp_path / "in"
    folder.mkdir()
    torch.save(OrderedDict(STATE), folder / name, **forms[form])
    check(folder if name == SINGLE else folder / name, tmp_path / "out", STATE, {"head.weight": "embed.weight"})
    warned = [w for w in open_checkpoint(folder / name).warnings if "without checksums" in w]
    assert bool(warned) == form.startswith("legacy")


def test_a_legacy_file_whose_pickle_is_longer_than_the_first_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsconv.checkpoint.torchfile import legacy

    monkeypatch.setattr(legacy, "FIRST_READ_BYTES", 3)
    torch.save(STATE, tmp_path / "a.pth", **LEGACY)
    check(tmp_path / "a.pth", tmp_path / "out", STATE, {"head.weight": "embed.weight"})


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Save a transformers model and its config in ``.bin`` shards, as huggingface_hub writes them."""
    from huggingface_hub import save_torch_state_dict
    from transformers import BertConfig, BertForMaskedLM

    folder = tmp_path_factory.mktemp("hub") / "model"
    torch.manual_seed(3)
    model = BertForMaskedLM(
        BertConfig(
            vocab_size=101,
            hidden_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=17,
            max_position_embeddings=9,
        )
    )
    model.config.save_pretrained(folder)
    save_torch_state_dict(model.state_dict(), folder, max_shard_size=5000, safe_serialization=False)
    return folder, {name: tensor.detach() for name, tensor in model.state_dict().items()}


def test_shards_with_an_index(sharded: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, truth = sharded
    assert len(list(folder.glob("*.bin"))) > 2
    ties = open_checkpoint(folder).ties
    assert ties  # decoder and embeddings
    check(folder, tmp_path / "out", truth, ties)
    from transformers import AutoModelForMaskedLM

    loaded = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert all(same(tensor, truth[name]) for name, tensor in loaded.state_dict().items())


def test_shards_without_an_index_are_counted(sharded: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder = shutil.copytree(sharded[0], tmp_path / "in")
    (folder / INDEX).unlink()
    found = open_checkpoint(folder)
    assert set(found) | set(found.ties) == set(sharded[1])
    assert "has no pytorch_model.bin.index.json" in found.warnings[0]
    next(iter(sorted(folder.glob("*-of-*.bin")))).unlink()
    with pytest.raises(MissingShardError, match=r"lacks 1 of \d files, such as pytorch_model-00001-of-000\d\d\.bin"):
        open_checkpoint(folder)


def damaged_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((folder / INDEX).read_text())
    edit(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


NAME = "bert.embeddings.position_embeddings.weight"
DAMAGE: dict[str, tuple[Callable[[Path], object], type[DsconvError], str]] = {
    "a shard is missing": (
        lambda f: sorted(f.glob("*.bin"))[1].unlink(),
        MissingShardError,
        r"names 1 missing file, .* 'pytorch_model-00002-of",
    ),
    "a shard is truncated": (
        lambda f: sorted(f.glob("*.bin"))[1].write_bytes(sorted(f.glob("*.bin"))[1].read_bytes()[:999]),
        MalformedError,
        r"pytorch_model-00002-of-\d+\.bin: truncated",
    ),
    "an absolute path": (
        lambda f: damaged_index(f, lambda m: m.update({NAME: "/etc/passwd"})),
        UnsafeError,
        "outside the folder",
    ),
    "a path that leaves": (
        lambda f: damaged_index(f, lambda m: m.update({NAME: "../x.bin"})),
        UnsafeError,
        "outside the folder",
    ),
    "a tensor that no file holds": (
        lambda f: damaged_index(f, lambda m: m.update(x=m[NAME])),
        MissingShardError,
        "'x'.*does not hold",
    ),
    "an index of something else": (lambda f: (f / INDEX).write_text("[]"), MalformedError, "not a JSON object"),
    "a shard with another's content": (
        lambda f: shutil.copy(min(f.glob("*.bin")), sorted(f.glob("*.bin"))[1]),
        MissingShardError,
        "does not hold it",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_shards_are_named(name: str, sharded: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    damage, kind, words = DAMAGE[name]
    folder = shutil.copytree(sharded[0], tmp_path / "in")
    damage(folder)
    with pytest.raises(kind, match=words):
        open_checkpoint(folder)


def test_one_file_beside_an_index_is_what_transformers_reads(
    sharded: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = shutil.copytree(sharded[0], tmp_path / "in")
    torch.save(STATE, folder / SINGLE)
    found = open_checkpoint(folder)
    assert "scalar" in found
    assert "both pytorch_model.bin and" in found.warnings[0]


def test_names_that_the_index_does_not_place_in_a_file_are_left_out(
    sharded: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder = shutil.copytree(sharded[0], tmp_path / "in")
    damaged_index(folder, lambda m: m.pop(NAME))
    found = open_checkpoint(folder)
    assert NAME not in found
    assert any("left out" in warning and NAME in warning for warning in found.warnings)


@pytest.mark.parametrize("under", ["state_dict", "model", "module", "model_state_dict", "weights_of_mine"])
def test_weights_under_a_key(under: str, tmp_path: Path) -> None:
    extra = {
        "epoch": 3,
        "optimizer": {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []},
        "best": torch.tensor(0.5),
    }
    torch.save({**extra, under: STATE, "global_step": 17}, tmp_path / "a.pt")
    check(tmp_path / "a.pt", tmp_path / "out", STATE, {"head.weight": "embed.weight"})
    found = open_checkpoint(tmp_path / "a.pt")
    assert (found.step, found.info["weights_under"]) == (17, under)
    assert any("left out 'best'" in warning for warning in found.warnings)


def test_objects_that_are_not_tensors_are_left_out_and_reported(tmp_path: Path) -> None:
    torch.save(
        {"w": torch.ones(3), "_extra_state": b"abc", "count": 4, "w._extra_state": None, "io": io.BytesIO(b"x")},
        tmp_path / "a.bin",
    )
    found = open_checkpoint(tmp_path / "a.bin")
    assert list(found) == ["w"]
    assert "left out 4 entries without a tensor, the first '_extra_state'" in found.warnings[0]


def test_an_optimizer_flattened_beside_bare_weights_is_counted(tmp_path: Path) -> None:
    torch.save(
        {"l.w": torch.ones(2, 2), "state.l.w.exp_avg": torch.ones(2, 2), "param_groups.l.w.lr": 0.1, "epoch": 3},
        tmp_path / "a.pt",
    )
    found = open_checkpoint(tmp_path / "a.pt")
    assert list(found) == ["l.w"]
    assert found.info["left_out"] == {"param_groups": 1, "state": 1}
    assert "left out 1 entry without a tensor, the first 'epoch'" in found.warnings[0]


def test_the_averages_of_a_lightning_callback_are_a_model_under_its_own_names(tmp_path: Path) -> None:
    weights, averages = {"model.w": torch.ones(2, 2)}, {"model.w": torch.zeros(2, 2)}
    torch.save(
        {"state_dict": weights, "callbacks": {"EMACallback": {"ema_state_dict": averages, "decay": 0.9}}},
        tmp_path / "a.ckpt",
    )
    with pytest.raises(SeveralModelsError) as caught:
        open_checkpoint(tmp_path / "a.ckpt")
    key = "callbacks.EMACallback.ema_state_dict"
    assert caught.value.models == {"state_dict": 1, key: 1}
    for item in (key, "callbacks"):
        found = open_checkpoint(tmp_path / "a.ckpt", item=item)
        assert torch.equal(found["model.w"].read(), averages["model.w"])


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


def legacy_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, **LEGACY)
    return buffer.getvalue()


def nested(depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"w": torch.ones(2)}
    for _ in range(depth):
        inner = {"a": inner}
    return inner


ONE = legacy_bytes({"w": torch.arange(5, dtype=torch.float32)})
REFUSED: dict[str, tuple[Any, type[DsconvError], str]] = {
    "several": (
        {"model": {"w": torch.ones(2)}, "module": {"w": torch.ones(2)}},
        SeveralModelsError,
        r"holds 2 models: 'model' \(1 tensor\), 'module' \(1 tensor\)",
    ),
    "both": (
        {"w": torch.ones(2), "model": {"w": torch.ones(2)}},
        SeveralModelsError,
        r"holds 2 models: '\.' \(1 tensor\), 'model' \(1 tensor\)",
    ),
    "an optimizer alone": (
        {"state": {0: {"exp_avg": torch.ones(3, 2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
        UnsupportedError,
        "no tensor of a model; it holds",
    ),
    "no tensors": ({"a": 1}, MalformedError, "not a state dict"),
    "safetensors' own name": ({"__metadata__": torch.ones(2)}, MalformedError, "which safetensors keeps for itself"),
    "half a character": ({"\ud800": torch.ones(2)}, MalformedError, "characters that UTF-8 can hold"),
    "a nest of dictionaries": (nested(40), MalformedError, "nested over 32 deep"),
    "empty": ({}, MalformedError, "the state dict is empty"),
    "a list": ([torch.ones(2)], MalformedError, "holds a list"),
    "a tensor": (torch.ones(2), MalformedError, "holds a TensorRef|expected a state dict"),
    "numbers as names": ({0: torch.ones(2)}, MalformedError, "0 is not a tensor's name"),
    "a meta tensor": ({"w": torch.ones(2), "m": torch.empty(3, device="meta")}, UnsupportedError, "'m' is a .*meta"),
    "a module": (
        torch.nn.Linear(2, 3),
        UnsupportedError,
        r"a whole torch\.nn\.modules\.linear\.Linear object.*state_dict\(\)",
    ),
    "code": ({"w": torch.ones(2), "x": Evil()}, UnsafeError, "__builtin__.print"),
}


@pytest.mark.parametrize("options", [{}, LEGACY], ids=["zip", "legacy"])
@pytest.mark.parametrize("name", REFUSED)
def test_a_file_without_a_state_dict_is_refused(
    name: str, options: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    value, kind, words = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.save(value, tmp_path / "a.pt", **options)
    with pytest.raises(kind, match=words) as caught:
        open_checkpoint(tmp_path / "a.pt")
    assert str(caught.value).startswith(f"{tmp_path / 'a.pt'}: ")
    assert "run" not in capfd.readouterr().out


PICKLES = len(ONE) - 8 - 20
BROKEN: dict[str, tuple[bytes, str]] = {
    "cut in the magic number": (ONE[:13], "truncated"),
    "cut in the object": (ONE[:150], "is truncated"),
    "cut in the count": (ONE[: PICKLES + 5], "truncated: expected 8 bytes"),
    "cut in the data": (ONE[:-1], "truncated: storage '[0-9]+' needs 20 bytes at offset [0-9]+, found 19"),
    "more at the end": (ONE + b"x", "1 bytes follow the last storage"),
    "another count": (ONE[:PICKLES] + struct.pack("<q", 6) + ONE[-20:], "should have 5 elements, the file says 6"),
    "a negative count": (ONE[:PICKLES] + struct.pack("<q", -1) + ONE[-20:], "should have 5 elements"),
    "another version": (ONE.replace(pickle.dumps(1001, 2), pickle.dumps(1002, 2), 1), "version 1002"),
    "big-endian": (ONE.replace(b"little_endianq\x02\x88", b"little_endianq\x02\x89"), "big-endian"),
    "no storages listed": (ONE[:PICKLES].rsplit(b"\x80", 1)[0] + pickle.dumps([], 2), r"lists the storages \[\]"),
    "a key twice": (ONE[:PICKLES].rsplit(b"\x80", 1)[0] + pickle.dumps(["1", "1"], 2), "lists the storages"),
    "a list of numbers": (ONE[:PICKLES].rsplit(b"\x80", 1)[0] + pickle.dumps([1], 2), "lists the storages"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_legacy_files_are_malformed(name: str, tmp_path: Path) -> None:
    data, words = BROKEN[name]
    assert data != ONE
    (tmp_path / "a.pt").write_bytes(data)
    with pytest.raises((MalformedError, UnsupportedError), match=words) as caught:
        open_checkpoint(tmp_path / "a.pt")
    assert str(tmp_path / "a.pt") in str(caught.value)


def test_every_prefix_and_flipped_byte_of_a_legacy_file_is_read_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    for end in range(len(ONE)):
        path.write_bytes(ONE[:end])
        with pytest.raises(DsconvError):
            open_checkpoint(path)
    for at in range(len(ONE) - 20):
        path.write_bytes(ONE[:at] + bytes([ONE[at] ^ 0x41]) + ONE[at + 1 :])
        with contextlib.suppress(DsconvError):
            open_checkpoint(path)


def test_a_file_of_a_deepspeed_checkpoint_is_pointed_to_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "zero_pp_rank_0_mp_rank_00_model_states.pt"
    torch.save({"module": {"w": torch.ones(2)}}, path)
    with pytest.raises(UnsupportedError, match=f"give its folder, {tmp_path}"):
        open_checkpoint(path)


def test_shards_of_two_saves_are_told_apart(tmp_path: Path) -> None:
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00003.bin"):
        torch.save({"w": torch.ones(2)}, tmp_path / name)
    with pytest.raises(InconsistentCheckpointError, match="not from one save"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model-00002-of-00003.bin").rename(tmp_path / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(InconsistentCheckpointError, match="'w' is in two of the files"):
        open_checkpoint(tmp_path)


def test_a_lightning_checkpoint(tmp_path: Path) -> None:
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.save_hyperparameters({"width": 5, "path": Path("x")})
            self.layer = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.BatchNorm1d(3))

        def training_step(self, batch: Any, index: int) -> Any:
            return self.layer(batch[0]).pow(2).mean()

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}

    torch.manual_seed(5)
    module = Module()
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(12, 5)), batch_size=4)
    quiet: dict[str, Any] = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    trainer = pl.Trainer(
        max_epochs=2, default_root_dir=tmp_path, callbacks=[pl.callbacks.ModelCheckpoint(tmp_path / "ckpt")], **quiet
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
    (saved,) = (tmp_path / "ckpt").glob("*.ckpt")
    truth = {name: tensor.detach() for name, tensor in module.state_dict().items()}
    check(saved, tmp_path / "out", truth)
    found = open_checkpoint(saved)
    assert (found.format, found.step) == ("PyTorch Lightning", 6)


@pytest.mark.parametrize("safe", [False, True], ids=["bin", "safetensors"])
def test_an_adapter_stays_an_adapter(safe: bool, tmp_path: Path) -> None:
    """``adapter_model.*`` becomes ``adapter_model.safetensors`` with its config beside it, and PeftModel loads it."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import BertConfig, BertModel

    torch.manual_seed(7)
    base = BertModel(
        BertConfig(vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=9)
    )
    model = get_peft_model(base, LoraConfig(r=3, target_modules=["query"], init_lora_weights=False))
    model.save_pretrained(tmp_path / "in", safe_serialization=safe)
    file = tmp_path / "in" / ("adapter_model.safetensors" if safe else ADAPTER)
    truth = load_safetensors(file) if safe else torch.load(file, weights_only=True)
    check(tmp_path / "in", tmp_path / "out", truth)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors", "dsconv.manifest.json"
    ]  # fmt: skip
    loaded = PeftModel.from_pretrained(BertModel(base.config), tmp_path / "out")
    before = {name: tensor for name, tensor in model.state_dict().items() if "lora_" in name}
    assert before
    assert all(same(loaded.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_legacy_deepspeed_file_is_read_like_a_zip(tmp_path: Path) -> None:
    """A legacy ``.pt`` file, as DeepSpeed's older engine wrote it, goes through the same reader as a zip."""
    torch.save(STATE, tmp_path / "a.pt", **LEGACY)
    file = TorchFile(tmp_path / "a.pt")
    assert file.root["steps"].shape == ()
    assert file.value(file.root["steps"]) == (2**40 + 1).to_bytes(8, "little")


def test_a_dictionary_that_holds_itself_and_one_that_is_shared_a_billion_times_are_refused(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.ones(2)}
    state["again"] = state
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(MalformedError, match="nested over 32 deep"):
        open_checkpoint(tmp_path / "a.pt")
    shared: dict[str, Any] = {"w": torch.ones(2)}
    for _ in range(9):
        shared = {str(i): shared for i in range(10)}
    torch.save(shared, tmp_path / "b.pt")
    with pytest.raises(MalformedError, match="referred to again and again: not a checkpoint"):
        open_checkpoint(tmp_path / "b.pt")
