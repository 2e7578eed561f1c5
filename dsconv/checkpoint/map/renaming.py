"""A checkpoint under other names: renamed as a whole, or freed of the names that wrappers put into it.

``torch.compile``, activation checkpointing, FSDP, Lightning and DDP wrap a module in another one, whose attribute then
stands in every name: ``_orig_mod.model.norm.weight``. The model itself has no such part, so a loader of the plain model
would not find the weight.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.map.training import Training

# The attribute under which each wrapper keeps the module: ``torch/_dynamo/eval_frame.py``
# ``OptimizedModule``, ``torch/distributed/algorithms/_checkpoint/checkpoint_wrapper.py``,
# ``torch/distributed/fsdp/_common_utils.py``; Lightning 2.6 ``lightning_fabric/wrappers.py``.
WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_forward_module")
# DDP's attribute is a plain word that a model may use too: it is a wrapper's only where every name begins with it, the
# rule of torch's ``consume_prefix_in_state_dict_if_present`` (``torch/nn/modules/utils.py``).
OUTER = "module."


@dataclass(frozen=True)
class Unwrapped:
    """The parts that wrappers put into the names of a model, and how to remove them.

    ``removed`` are the parts that are taken out, each with its dot; ``names`` maps each name that changes to its new
    one.
    """

    removed: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)

    def __call__(self, name: str) -> str:
        """Return ``name`` without the wrappers' parts; it need not be one of the names that they were found in."""
        if name in self.names or not self.removed:
            return self.names.get(name, name)
        inner = ".".join(part for part in name.split(".") if f"{part}." not in self.removed or part == OUTER[:-1])
        return inner.removeprefix(OUTER) if OUTER in self.removed else inner


def unwrap(names: Iterable[str], outer: bool = True) -> Unwrapped:
    """Find the parts of ``names`` that only wrappers put there.

    A wrapper's own attribute is taken out wherever it stands in a name, ``module.`` only where all names begin with it.
    Nothing is taken out where two names would become one.

    Args:
        names: All tensor names of one model.
        outer: Whether to look for ``module.`` too.
    """
    given = list(dict.fromkeys(names))
    current = {name: name for name in given}
    inner = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in given}
    removed: list[str] = []
    if all(inner.values()) and len(set(inner.values())) == len(given):
        found = {part for name in given for part in name.split(".") if part in WRAPPERS}
        removed = [f"{part}." for part in WRAPPERS if part in found]
        current = inner
    if outer and current and all(name.startswith(OUTER) and name != OUTER for name in current.values()):
        current = {name: short.removeprefix(OUTER) for name, short in current.items()}
        removed.append(OUTER)
    return Unwrapped(tuple(removed), {name: short for name, short in current.items() if name != short})


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """Return ``checkpoint`` with some of its tensors, and their optimizer states, under other names.

    Args:
        checkpoint: The checkpoint; it is not changed.
        names: The new name of each tensor that gets one, by its old name. Aliases (tied names) stay as they are.
    """

    def named(entry: TensorEntry) -> TensorEntry:
        return replace(entry, name=names.get(entry.name, entry.name))

    training = checkpoint.training
    entries = {names.get(name, name): named(entry) for name, entry in checkpoint.items()}
    return Checkpoint(
        checkpoint.path,
        checkpoint.format,
        entries,
        folder=checkpoint.folder,
        step=checkpoint.step,
        world=checkpoint.world,
        info=checkpoint.info,
        warnings=checkpoint.warnings,
        sources=checkpoint.sources,
        is_deepspeed=checkpoint.is_deepspeed,
        training=(lambda: _renamed_training(training(), names)) if training is not None else None,
        no_training=checkpoint.no_training,
    )


def _renamed_training(training: Training, names: Mapping[str, str]) -> Training:
    old = {new: name for name, new in names.items()}
    states = {
        names.get(name, name): {
            state: replace(entry, name=f"{names.get(name, name)}/{state}") for state, entry in of_name.items()
        }
        for name, of_name in training.states.items()
    }
    return replace(
        training,
        states=states,
        steps={names.get(name, name): step for name, step in training.steps.items()},
        module={
            names.get(name, name): replace(entry, name=names.get(name, name)) for name, entry in training.module.items()
        },
        cut=lambda name: training.cut(old.get(name, name)),
        members=tuple(tuple(names.get(name, name) for name in group) for group in training.members),
        stored={names.get(name, name): stored for name, stored in training.stored.items()},
    )
