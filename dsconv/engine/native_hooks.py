"""Compress DDP's gradients with torch's communication hooks, and save what PowerSGD remembers between steps."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from dsconv.engine.options import RunOptions

POWERSGD_RANK = 1  # torch's default


class Hook:
    """Register ``options.hook`` on a DDP model. Only PowerSGD has a state."""

    def __init__(self, model: Any, options: RunOptions) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

        self.powersgd: Any = None
        if options.hook == "bf16":
            model.register_comm_hook(dist.group.WORLD, default_hooks.bf16_compress_hook)
        elif options.hook == "powersgd":
            self.powersgd = powerSGD_hook.PowerSGDState(
                dist.group.WORLD,
                matrix_approximation_rank=POWERSGD_RANK,
                start_powerSGD_iter=max(2, options.steps // 10),  # torch advises against compressing the first tenth
            )
            model.register_comm_hook(self.powersgd, powerSGD_hook.powerSGD_hook)

    def state(self) -> dict[str, torch.Tensor]:
        """Return what PowerSGD keeps on this rank for the next step: unsent errors, the last P and Q, its generator.

        See torch ``powerSGD_hook.py``. Other hooks give an empty mapping.
        """
        if self.powersgd is None:
            return {}
        found = {
            f"{name}.{index}": tensor for name in _MEMORIES for index, tensor in getattr(self.powersgd, name).items()
        }
        import numpy

        _, keys, place, _, _ = self.powersgd.rng.get_state(legacy=True)
        return {
            **found,
            "rng": torch.from_numpy(keys.astype(numpy.int64)),
            "counts": torch.tensor([self.powersgd.iter, int(place)]),
        }

    def restore(self, state: dict[str, torch.Tensor], device: torch.device) -> None:
        """Restore what ``state`` returned on this rank."""
        import numpy

        for name in _MEMORIES:
            getattr(self.powersgd, name).clear()
        for key, tensor in state.items():
            name, _, index = key.partition(".")
            if name in _MEMORIES:
                getattr(self.powersgd, name)[int(index)] = tensor.to(device)
        self.powersgd.iter, place = (int(count) for count in state["counts"])
        self.powersgd.rng.set_state(("MT19937", state["rng"].numpy().astype(numpy.uint32), place))


_MEMORIES = ("error_dict", "p_memory_dict", "q_memory_dict")
