"""Casts give the same bits as torch, for every pair of dtypes and every kind of value. float64 is rounded once."""

from __future__ import annotations

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.transfer.casting import CASTABLE, CHUNK, Caster
from tests.trained import raw

FLOATS = sorted(CASTABLE)
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def samples(dtype: str) -> torch.Tensor:
    """Return every value of a 16-bit dtype, or for a wider one random bits and the values on and beside each rounding
    boundary.
    """
    if BY_NAME[dtype].itemsize == 2:
        return torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(getattr(torch, dtype))
    random = torch.from_numpy(np.random.default_rng(7).integers(-(1 << 31), 1 << 31, CHUNK * 3 + 32, dtype=np.int32))
    of_bfloat16 = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    of_float16 = torch.arange(-(1 << 18), 1 << 18, dtype=torch.int32) << 13
    near = [of_bfloat16 + below for below in (0, 1, 0x7FFF, 0x8000, 0x8001)]
    near += [of_float16[::3] + below for below in (0, 1, 0xFFF, 0x1000, 0x1001)]
    values = torch.cat([random, *near]).view(torch.float32)
    return values if dtype == "float32" else values[::5].double()


def cast(values: torch.Tensor, wanted: str) -> tuple[torch.Tensor, int]:
    source = BY_NAME[str(values.dtype).removeprefix("torch.")]
    out, overflowed = Caster().cast(memoryview(bytearray(raw(values))), source, BY_NAME[wanted])
    return torch.frombuffer(bytearray(out), dtype=getattr(torch, wanted)), overflowed


@pytest.mark.parametrize("wanted", FLOATS)
@pytest.mark.parametrize("stored", FLOATS)
def test_casts_equal_torch_bit_for_bit(stored: str, wanted: str) -> None:
    values = samples(stored)
    expected = values.to(getattr(torch, wanted))
    found, overflowed = cast(values, wanted)
    bits = BITS[expected.element_size()]
    same = found.view(bits) == expected.view(bits)
    if (stored, wanted) == ("float64", "bfloat16"):  # here torch's NaNs depend on the value's position
        same |= found.isnan() & expected.isnan()
    wrong = (~same).nonzero().flatten()
    assert not len(wrong), [(values[i], found[i], expected[i]) for i in wrong[:3]]
    assert overflowed == int((expected.isinf() & values.isfinite()).sum())


@pytest.mark.parametrize(("wanted", "digits", "smallest"), [("float16", 11, -24), ("bfloat16", 8, -133)])
def test_float64_is_rounded_once(wanted: str, digits: int, smallest: int) -> None:
    """Each value lies so close to a tie of the 16-bit dtype that float32 cannot tell it from the tie."""
    dtype = getattr(torch, wanted)
    generator = np.random.default_rng(11)
    values = []
    for exponent in generator.integers(smallest, 15, 400).tolist():
        step = Fraction(2) ** max(exponent - digits + 1, smallest)
        tie = step * int(generator.integers(1 << (digits - 1), 1 << digits)) + step / 2
        values += [float(tie * (1 + Fraction(sign, 1 << 45))) for sign in (-1, 1)]
    found, _ = cast(torch.tensor(values, dtype=torch.float64), wanted)
    twice = torch.tensor(values, dtype=torch.float64).to(dtype)
    steps = found.view(torch.int16)
    for position, value in enumerate(values):
        mine = found[position].double().item()
        neighbours = (steps[position] + torch.tensor([-1, 1], dtype=torch.int16)).view(dtype).double().tolist()
        assert all(abs(mine - value) < abs(other - value) for other in neighbours), (value, mine)
    assert bool((found.view(torch.int16) != twice.view(torch.int16)).any()), "torch would have given the same"


def test_the_edge_of_float16_in_float64() -> None:
    found, overflowed = cast(torch.tensor([65519.999999999, 65520.0, -65519.999999999], dtype=torch.float64), "float16")
    assert found.tolist() == [65504.0, float("inf"), -65504.0]
    assert overflowed == 1


def test_a_merge_that_casts_imports_no_torch(tmp_path: Path) -> None:
    weights = {"w": torch.randn(300, 41), "d": torch.randn(70, dtype=torch.float64), "n": torch.arange(5)}
    save_file(weights, tmp_path / "model.safetensors")
    code = (
        "import sys, dsconv; report = dsconv.merge(sys.argv[1], sys.argv[2], dtype='bf16', verify_output=True);"
        "assert report.verified; assert 'torch' not in sys.modules, 'torch was imported'"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "model.safetensors"), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert not result.returncode, result.stderr
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert raw(merged["w"]) == raw(weights["w"].bfloat16())
    assert raw(merged["n"]) == raw(weights["n"])
