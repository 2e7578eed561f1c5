"""Names of wrappers are removed where a wrapper added them, and kept where they belong to the model."""

from __future__ import annotations

import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from dsconv.checkpoint.map.renaming import WRAPPERS, unwrap


def parameter_names(module: torch.nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def test_real_wrappers_leave_the_names_of_the_model() -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Sequential(torch.nn.Linear(3, 2)))
    names = parameter_names(plain)
    wrapped = torch.nn.Sequential(plain[0], checkpoint_wrapper(plain[1]))
    found = unwrap(parameter_names(torch.compile(torch.nn.DataParallel(wrapped), backend="eager")))
    assert found.removed == ("_orig_mod.", "_checkpoint_wrapped_module.", "module.")
    assert [found(name) for name in found.names] == names


def test_every_wrapper_is_taken_out_wherever_it_stands() -> None:
    for wrapper in WRAPPERS:
        found = unwrap([f"{wrapper}.a.weight", f"b.{wrapper}.weight", "c.weight"])
        assert found.names == {f"{wrapper}.a.weight": "a.weight", f"b.{wrapper}.weight": "b.weight"}
        assert found.removed == (f"{wrapper}.",)
        assert found("c.weight") == "c.weight"


def test_a_child_called_module_stays() -> None:
    """``module`` belongs to a wrapper only if every name begins with it."""
    assert not unwrap(["module.weight", "head.weight"]).names
    assert unwrap(["module.weight", "module.module.weight"]).names == {
        "module.weight": "weight",
        "module.module.weight": "module.weight",
    }


def test_nothing_is_taken_out_where_two_names_would_be_one() -> None:
    assert not unwrap(["a._orig_mod.weight", "a.weight"]).names


def test_a_name_that_is_nothing_else_stays() -> None:
    assert not unwrap(["_orig_mod", "a._orig_mod.weight"]).names
