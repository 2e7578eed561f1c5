"""Compare the drop-in functions with DeepSpeed's own ones, and test the checkpoints on which DeepSpeed's fail."""

from __future__ import annotations

import inspect
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dsconv import DsconvError, compat
from tests.fixtures import gloo
from tests.trained import Trained, load_safetensors, same

NAMES = [
    "atoi",
    "convert_zero_checkpoint_to_fp32_state_dict",
    "convert_zero_checkpoint_to_state_dict",
    "get_checkpoint_files",
    "get_fp32_state_dict_from_zero_checkpoint",
    "get_model_state_file",
    "get_model_state_files",
    "get_optim_files",
    "load_state_dict_from_zero_checkpoint",
    "natural_keys",
    "parse_model_states",
    "parse_optim_states",
    "to_torch_tensor",
    "zero3_partitioned_param_info",
]
# The checkpoints that the official functions read: no 0-d or frozen weights at stage 1, and no stage 0.
READABLE = [
    "llama_tied-z3-bf16-w3",
    "llama_groups-z2-bf16-w4",
    "llama_frozen-z3-bf16-w2",
    "llama_frozen-z2-fp32-w3",
    "t5-z2-bf16-w2",
    "gpt2-z3-fp32-w3",
    "mixtral-z3-bf16-w2",
    "llama_lora-z2-bf16-w2",
    "odd-z3-bf16-w2",
]


def official() -> Any:
    from deepspeed.utils import zero_to_fp32

    zero_to_fp32.debug = False
    zero_to_fp32.device = torch.device("cpu")
    return zero_to_fp32


@pytest.mark.parametrize("name", NAMES)
def test_the_signatures_are_the_official_ones(name: str) -> None:
    ours, theirs = (inspect.signature(getattr(module, name)) for module in (compat, official()))
    assert list(ours.parameters) == list(theirs.parameters)
    defaults = [str(p.default).removeprefix("torch.") for p in ours.parameters.values()]
    assert defaults == [str(p.default).removeprefix("torch.") for p in theirs.parameters.values()]


def test_every_public_name_of_the_official_modules_is_there() -> None:
    from deepspeed.utils import zero_to_torch

    for module in (official(), zero_to_torch):
        names = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", module.__name__) == module.__name__
        }
        imported = {name for name in names if inspect.ismodule(getattr(module, name)) or name.isupper()}
        missing = {name for name in names - imported if not hasattr(compat, name)}
        assert missing <= {"logger"}, missing
    assert official().OUTPUT_DTYPE_NAMES == compat.OUTPUT_DTYPE_NAMES
    assert compat.device == official().device
    assert set(compat.__all__) <= {*dir(compat), "device", "OUTPUT_DTYPE_NAMES"}


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert same(ours[name], tensor), name


@pytest.mark.parametrize("lazy", [False, True])
@pytest.mark.parametrize("case", READABLE)
def test_get_state_dict(case: str, lazy: bool, trained: Callable[[str], Trained]) -> None:
    made = trained(case)
    for exclude in (False, True):
        theirs = official().get_fp32_state_dict_from_zero_checkpoint(
            str(made.checkpoint), exclude_frozen_parameters=exclude
        )
        ours = compat.get_fp32_state_dict_from_zero_checkpoint(
            made.checkpoint, exclude_frozen_parameters=exclude, lazy_mode=lazy
        )
        if lazy:
            assert all(t.shape == theirs[name].shape and t.dtype == theirs[name].dtype for name, t in ours.items())
            ours = {name: tensor.contiguous() for name, tensor in ours.items()}
        if case.startswith("odd"):  # the official function leaves out parameters without elements
            ours = {name: tensor for name, tensor in ours.items() if name in theirs or tensor.numel()}
        equal(ours, theirs)


def test_tied_names_share_one_tensor(trained: Callable[[str], Trained]) -> None:
    found = compat.get_fp32_state_dict_from_zero_checkpoint(trained("llama_tied-z3-bf16-w3").checkpoint)
    assert found["lm_head.weight"] is found["model.embed_tokens.weight"]


def load_bin(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.bin")):
        found |= torch.load(path, weights_only=True)
    return found


@pytest.mark.parametrize("size", [None, "5GB", "8KB"])
@pytest.mark.parametrize("case", ["llama_tied-z3-bf16-w3", "llama_frozen-z2-bf16-w2"])
def test_convert_to_bin(case: str, size: str | None, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained(case)
    for module, out in ((official(), "theirs"), (compat, "ours")):
        module.convert_zero_checkpoint_to_fp32_state_dict(
            str(made.checkpoint), str(tmp_path / out), max_shard_size=size
        )
    equal(load_bin(tmp_path / "ours"), load_bin(tmp_path / "theirs"))
    sharded = (tmp_path / "ours" / "pytorch_model.bin.index.json").exists()
    assert sharded == (tmp_path / "theirs" / "pytorch_model.bin.index.json").exists() == (size == "8KB")
    if not sharded:
        assert [path.name for path in (tmp_path / "ours").iterdir()] == ["pytorch_model.bin"]


def test_convert_to_safetensors_replaces_an_earlier_output(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained("llama_frozen-z3-bf16-w2")
    for _ in range(2):
        compat.convert_zero_checkpoint_to_fp32_state_dict(made.checkpoint, tmp_path / "out", safe_serialization=True)
    made.check(load_safetensors(tmp_path / "out"), torch.float32)


@pytest.mark.parametrize("case", ["llama_tied-z3-bf16-w3", "odd-z1-bf16-w2", "llama_groups-z0-bf16-w2"])
def test_load_into_a_model(case: str, trained: Callable[[str], Trained]) -> None:
    from tests.fixtures import models

    made = trained(case)
    model = models.build(case.split("-")[0], frozen=False, stage=made.facts["case"]["stage"])
    assert compat.load_state_dict_from_zero_checkpoint(model, made.checkpoint) is model
    state = model.state_dict()
    for name, expected in made.truth.items():
        assert same(state[name], expected.to(state[name].dtype)), name


def test_errors_are_ours(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    with pytest.raises(DsconvError, match="no checkpoint of tag 'nope'"):
        compat.get_fp32_state_dict_from_zero_checkpoint(trained("llama_tied-z3-bf16-w3").checkpoint, tag="nope")
    with pytest.raises(FileNotFoundError):
        compat.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    with pytest.raises(DsconvError):
        compat.convert_zero_checkpoint_to_fp32_state_dict(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flipped_bit_is_an_error(copied: Callable[[str], Path], trained: Callable[[str], Trained]) -> None:
    """The official function silently returns a wrong model. Ours names the file."""
    save_dir = copied("gpt2-z3-fp32-w3")
    from dsconv import open_checkpoint

    extent = open_checkpoint(save_dir)["transformer.wte.weight"].pieces[0].extent
    data = bytearray(extent.record.path.read_bytes())
    data[extent.offset_bytes + 3] ^= 0x40
    extent.record.path.write_bytes(bytes(data))
    wrong = official().get_fp32_state_dict_from_zero_checkpoint(str(save_dir))
    assert not same(wrong["transformer.wte.weight"], trained("gpt2-z3-fp32-w3").truth["transformer.wte.weight"])
    with pytest.raises(DsconvError, match="CRC-32"):
        compat.get_fp32_state_dict_from_zero_checkpoint(save_dir)


@pytest.mark.parametrize("case", ["llama_frozen-z2-bf16-w2", "llama_frozen-z3-bf16-w2", "llama_tied-z3-bf16-w3"])
def test_single_files_are_parsed_as_the_official_functions_do(case: str, trained: Callable[[str], Trained]) -> None:
    save_dir = trained(case).checkpoint
    folder = save_dir / (save_dir / "latest").read_text().strip()
    for ours, theirs in (
        (compat.get_optim_files, official().get_optim_files),
        (compat.get_model_state_files, official().get_model_state_files),
        (lambda path: compat.get_model_state_file(path, 3 if "z3" in case else 2),
         lambda path: official().get_model_state_file(path, 3 if "z3" in case else 2)),
    ):  # fmt: skip
        assert ours(folder) == theirs(str(folder))
    files = compat.get_model_state_files(folder)
    for mine, other in zip(compat.parse_model_states(files), official().parse_model_states(files), strict=True):
        equal(mine.buffers, other.buffers)
        assert [dict(group) for group in mine.param_shapes] == [dict(group) for group in other.param_shapes]
        assert (mine.shared_params, mine.ds_version) == (other.shared_params, other.ds_version)
        assert mine.frozen_param_shapes == other.frozen_param_shapes
        assert (mine.frozen_param_fragments is None) == (other.frozen_param_fragments is None)
        equal(mine.frozen_param_fragments or {}, other.frozen_param_fragments or {})
    optim = compat.get_optim_files(folder)
    stage, world, groups, paddings = compat.parse_optim_states(optim, folder)
    theirs = official().parse_optim_states(optim, str(folder))
    assert (stage, world, paddings) == (theirs[0], theirs[1], theirs[3])
    for flat, official_flat in zip(groups, theirs[2], strict=True):
        assert all(same(a, b) for a, b in zip(flat, official_flat, strict=True))
    with pytest.raises(ValueError, match=r"Expected [23] of"):
        compat.parse_optim_states(optim[:-1], folder)
    with pytest.raises(ValueError, match="not a"):
        compat.parse_optim_states(files, folder)
    with pytest.raises(FileNotFoundError, match="can't find"):
        compat.get_optim_files(save_dir)


@pytest.mark.parametrize("safe", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, "bf16", "torch.bfloat16"])
def test_convert_to_another_dtype(dtype: Any, safe: bool, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained("llama_frozen-z2-bf16-w2")
    for module, out in ((official(), "theirs"), (compat, "ours")):
        module.convert_zero_checkpoint_to_state_dict(
            str(made.checkpoint), str(tmp_path / out), dtype, safe_serialization=safe
        )
    read = load_safetensors if safe else load_bin
    equal(read(tmp_path / "ours"), read(tmp_path / "theirs"))


def test_the_command_line_of_zero_to_torch(trained: Callable[[str], Trained], tmp_path: Path) -> None:
    arguments = [str(trained("llama_tied-z3-bf16-w3").checkpoint), str(tmp_path / "out"), "--dtype", "float16"]
    compat.main([*arguments, "--safe_serialization", "--max_shard_size", "5GB", "-d"])
    assert {tensor.dtype for tensor in load_safetensors(tmp_path / "out").values()} == {torch.float16}
    with pytest.raises(SystemExit):
        compat.main([*arguments[:3], "int8"])
    with pytest.raises(ValueError, match="Unsupported output dtype"):
        compat.convert_zero_checkpoint_to_state_dict(arguments[0], arguments[1], dtype="int8")
    with pytest.raises(ValueError, match="Unsupported output dtype"):
        compat.to_torch_tensor({}, dtype=torch.float64)


def test_lazy_tensors_are_used_like_tensors(trained: Callable[[str], Trained]) -> None:
    made = trained("llama_tied-z3-bf16-w3")
    lazy = compat.get_fp32_state_dict_from_zero_checkpoint(made.checkpoint, lazy_mode=True)
    name = "model.layers.0.mlp.down_proj.weight"
    tensor, whole = lazy[name], lazy[name].contiguous()
    assert isinstance(tensor, compat.GatheredTensor)
    assert (tensor.size(), tensor.size(0), tensor.dim(), tensor.ndim) == (whole.size(), len(whole), 2, 2)
    assert (tensor.numel(), tensor.nelement(), tensor.nbytes) == (whole.numel(), whole.numel(), whole.nbytes)
    assert (tensor.is_floating_point(), tensor.device, len(tensor)) == (True, whole.device, len(whole))
    assert same(tensor.to(torch.bfloat16), whole.to(torch.bfloat16))
    for method in ("half", "clone", "t"):
        assert same(getattr(tensor, method)(), getattr(whole, method)())
    assert same(tensor.detach().cpu().float(), whole)
    assert same(tensor[0], whole[0])
    assert same(torch.cat([tensor, tensor]), torch.cat([whole, whole]))
    assert (tensor.numpy() == whole.numpy()).all()
    empty = compat.to_torch_tensor(lazy, return_empty_tensor=True, dtype="fp16")
    read = compat.to_torch_tensor(lazy, dtype=torch.float16)
    assert {n: (t.shape, t.dtype) for n, t in empty.items()} == {n: (t.shape, t.dtype) for n, t in read.items()}
    assert read["lm_head.weight"] is read["model.embed_tokens.weight"]
    assert same(read[name], whole.half())
    equal(compat.to_torch_tensor(lazy), compat.get_fp32_state_dict_from_zero_checkpoint(made.checkpoint))


def test_a_tag_may_be_a_path(trained: Callable[[str], Trained]) -> None:
    save_dir = trained("llama_tied-z3-bf16-w3").checkpoint
    tag = (save_dir / "latest").read_text().strip()
    expected = compat.get_fp32_state_dict_from_zero_checkpoint(save_dir)
    for given in (tag, Path(tag), save_dir / tag, f"{tag}/"):
        equal(compat.get_fp32_state_dict_from_zero_checkpoint(save_dir, given), expected)


def test_errors_are_those_that_callers_already_catch(
    copied: Callable[[str], Path], tmp_path: Path, trained: Callable[[str], Trained]
) -> None:
    save_dir = copied("llama_tied-z3-bf16-w3")
    folder = save_dir / (save_dir / "latest").read_text().strip()
    sorted(folder.glob("*optim_states.pt"))[1].unlink()
    with pytest.raises(ValueError, match="optim"):
        compat.get_fp32_state_dict_from_zero_checkpoint(save_dir)
    with pytest.raises(ValueError, match=str(tmp_path)):  # there is no `latest`
        compat.get_fp32_state_dict_from_zero_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError):
        compat.get_fp32_state_dict_from_zero_checkpoint(save_dir, tag="nope")


ON_RANKS = """
import os, sys
import torch.distributed as dist
from dsconv import compat
save_dir, out, group = sys.argv[1:]
if group == "group":
    dist.init_process_group("gloo")
for safe in (True, False):
    compat.convert_zero_checkpoint_to_fp32_state_dict(save_dir, f"{out}-{safe}", safe_serialization=safe)
    assert any(os.scandir(f"{out}-{safe}"))
"""


@pytest.mark.parametrize("group", ["group", "none"])
def test_a_conversion_on_every_rank_succeeds(group: str, trained: Callable[[str], Trained], tmp_path: Path) -> None:
    made = trained("llama_tied-z3-bf16-w3")
    command = [sys.executable, "-c", ON_RANKS, str(made.checkpoint), str(tmp_path / "out"), group]
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    common = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "3"}
    ranks = [
        subprocess.Popen(command, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE)
        for rank in range(3)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=120)
        assert rank.returncode == 0, errors.decode()
    made.check(load_safetensors(tmp_path / "out-True"), torch.float32)
    equal(load_bin(tmp_path / "out-False"), compat.get_fp32_state_dict_from_zero_checkpoint(made.checkpoint))


def test_experts_that_ranks_would_join_wrongly_are_refused_as_deepspeed_does() -> None:
    folder = gloo.ensure("moe", ["mixtral-z3-fp32-w2-ep2"])["mixtral-z3-fp32-w2-ep2"]
    files = compat.get_model_state_files(next((folder / "ckpt").glob("global_step*")))
    for caught in (NotImplementedError, ValueError, DsconvError):
        with pytest.raises(caught, match=r"joining the partitions of all ranks.*ds_to_universal.py"):
            compat.parse_model_states(files)
    with pytest.raises(NotImplementedError):
        official().parse_model_states(files)
    assert compat.get_fp32_state_dict_from_zero_checkpoint(folder / "ckpt")
