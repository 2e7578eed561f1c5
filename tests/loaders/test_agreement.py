"""Ranks whose local copies of a checkpoint differ load nothing, and all of them say so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dsconv import open_checkpoint
from dsconv.loaders.fingerprint import differences, fingerprint

RANK = """
import os, sys
import torch, torch.distributed as dist
import dsconv
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
before = [p.detach().clone() for p in model.parameters()]
try:
    dsconv.stream_into(model, sys.argv[3])
    print("loaded")
except dsconv.DsconvError as error:
    assert all(map(torch.equal, before, model.parameters()))
    print(type(error).__name__, error)
dist.barrier()
dist.destroy_process_group()
"""


def weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(4)))
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


def write(folder: Path, tensors: dict[str, torch.Tensor], torch_format: bool) -> Path:
    folder.mkdir()
    if torch_format:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(tensors, folder / "model.safetensors")
    return folder


def on_two_ranks(tmp_path: Path, copies: list[Path]) -> list[str]:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path / "store"), str(rank), str(copies[rank])],
            stdout=subprocess.PIPE, text=True, env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
        )
        for rank in range(2)
    ]  # fmt: skip
    said = [rank.communicate(timeout=120)[0].strip() for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return said


@pytest.mark.parametrize("torch_format", [False, True])
def test_an_old_copy_on_one_node_is_refused_on_all_ranks(torch_format: bool, tmp_path: Path) -> None:
    copies = [write(tmp_path / f"node{rank}", weights(rank), torch_format) for rank in range(2)]
    name = "pytorch_model.bin" if torch_format else "model.safetensors"
    for said in on_two_ranks(tmp_path, copies):
        assert said.startswith("InconsistentCheckpointError stream_into: the ranks do not read copies of one")
        assert f"rank 1 differs from rank 0 in {name}" in said


def test_equal_copies_in_different_folders_load(tmp_path: Path) -> None:
    copies = [write(tmp_path / f"node{rank}", weights(0), torch_format=False) for rank in range(2)]
    assert on_two_ranks(tmp_path, copies) == ["loaded", "loaded"]


def test_one_changed_tensor_of_many_is_seen(tmp_path: Path) -> None:
    """A run that trains only an adapter changes little, but a CRC-32 in torch's file differs, however large it is."""
    tensors = {f"w{number}": torch.zeros(1 << 16) for number in range(64)}
    first = fingerprint(open_checkpoint(write(tmp_path / "a", tensors, torch_format=True)))
    assert (
        differences([first, fingerprint(open_checkpoint(write(tmp_path / "same", tensors, torch_format=True)))]) == ""
    )
    tensors["w33"][777] = 1
    second = fingerprint(open_checkpoint(write(tmp_path / "b", tensors, torch_format=True)))
    assert differences([first, first, second]) == "rank 2 differs from rank 0 in pytorch_model.bin"
    del tensors["w0"]
    third = fingerprint(open_checkpoint(write(tmp_path / "c", tensors, torch_format=True)), "Llama")
    assert differences([first, third]) == "rank 1 differs from rank 0 in the model's class and 2 more"
