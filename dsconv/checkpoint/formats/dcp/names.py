"""Which items of a training checkpoint are the model, and what they are called there.

A checkpoint of torch.distributed.checkpoint holds whatever dictionary the trainer gave it: ``{"model": …, "optim":
…}``, ``{"app": {"model": …}}``, or, as torchtitan does it, the weights bare beside ``optimizer``, ``lr_scheduler``,
``dataloader`` and ``train_state``. The path of each item in that dictionary is known (planner_data), so nothing is
guessed from dots: ``model.model.norm.weight`` is ``model.norm.weight`` of ``model``, or it is the name itself, and its
path says which.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsconv.checkpoint.formats.huggingface.transformers_source import children_of
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.errors import UnsupportedError

Parts = tuple[str, ...]

MODEL_KEYS = (
    "model",
    "module",
    "model_state_dict",
    "model_state",
    "state_dict",
)  # in the order in which they are preferred
# What trainers call the dictionaries of the rest; and the first part of a bare name that some flatten them to.
TRAINING = re.compile(r"(optim|opt_state|lr_sched|sched|data_?load|train_state|rng|(grad_)?scaler)", re.IGNORECASE)
BARE_TRAINING = frozenset(
    {"optim", "optimizer", "optimizers", "lr_scheduler", "lr_schedulers", "dataloader", "train_state"}
)
EXTRA_STATE = "_extra_state"  # torch 2.13 torch/nn/modules/module.py _EXTRA_STATE_KEY_SUFFIX
# Names that torch.compile, FSDP1 and activation checkpointing put into the path of a parameter, and nobody else.
WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
ROOTS = ("model.", "module.", "app.model.")  # prefixes of all names that the model's own architecture may disown


@dataclass
class Names:
    """``chosen`` maps flat names to the model's own; ``left_out`` counts the other items by what holds them."""

    chosen: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, int] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)


def choose(
    tensors: Iterable[str], objects: Iterable[str], paths: Mapping[str, Parts], folder: Path, config: Path | None
) -> Names:
    """Sort the items of a checkpoint. ``paths`` are those that planner_data gives; an item that it lacks is at the top.

    Raises UnsupportedError where no tensor belongs to a model.
    """
    where = {name: paths.get(name, (name,)) for name in tensors}
    root = _root(where.values())
    names = Names()
    for name, path in where.items():
        inner = path[len(root) :]
        if path[: len(root)] != root or not inner or _is_training(path):
            _leave(names, path, root)
        elif _is_extra(inner):
            _leave(names, (EXTRA_STATE,), ())
        else:
            names.chosen[name] = ".".join(inner)
    for name in objects:
        path = paths.get(name, (name,))
        _leave(names, *(((EXTRA_STATE,), ()) if _is_extra(path) else (path, root)))
    if not names.chosen:
        raise UnsupportedError(
            f"{folder}: no tensor of a model; it holds {safe_repr(dict(names.left_out))}. "
            "Give the folder that the model's weights were saved to"
        )
    if root:
        names.removed.append(".".join(root) + ".")
    _unwrap(names)
    _remove_root(names, config)
    return names


def _leave(names: Names, path: Parts, root: Parts) -> None:
    """Count an item under the dictionary, beside the model's, that holds it."""
    shared = 0
    while shared < min(len(root), len(path) - 1) and path[shared] == root[shared]:
        shared += 1
    holder = ".".join(path[: shared + 1])
    names.left_out[holder] = names.left_out.get(holder, 0) + 1


def _is_extra(path: Parts) -> bool:
    """Whether it is, or lies in, what a module keeps beside its parameters (fp8 scales and the like, as a tensor or
    a dict).
    """
    return any(part.endswith(EXTRA_STATE) for part in path)


def _is_training(path: Parts) -> bool:
    first, dot, _ = path[0].partition(".")
    return any(TRAINING.match(part) for part in path[:-1]) or (len(path) == 1 and bool(dot) and first in BARE_TRAINING)


def _root(paths: Iterable[Parts]) -> Parts:
    """The path of the dictionary that holds the model's tensors; () for the top."""
    holders: set[Parts] = set()
    bare = False
    for path in paths:
        if _is_training(path):
            continue
        bare = bare or len(path) == 1
        holders.update(path[:depth] for depth in range(1, len(path)))
    root: Parts = ()
    while True:
        inside = [h for h in holders if h[: len(root)] == root and len(h) > len(root) and h[-1] in MODEL_KEYS]
        if not inside:
            break
        root = min(inside, key=lambda h: (len(h), MODEL_KEYS.index(h[-1])))
    tops = {h[0] for h in holders}
    if not root and not bare and len(tops) == 1:
        root = (tops.pop(),)  # one dictionary of another name, such as {"net": …}
    return root


def _unwrap(names: Names) -> None:
    """Take the wrappers' own names out, and a ``module.`` that all names begin with; not where two names would be
    one.
    """
    for label, clean in (
        ("wrappers", lambda name: ".".join(part for part in name.split(".") if part not in WRAPPERS)),
        ("module.", lambda name: name.removeprefix("module.")),
    ):
        if label == "module." and not all(name.startswith(label) and name != label for name in names.chosen.values()):
            continue
        cleaned = {flat: clean(name) for flat, name in names.chosen.items()}
        if cleaned != names.chosen and all(cleaned.values()) and len(set(cleaned.values())) == len(cleaned):
            gone = {part for name in names.chosen.values() for part in name.split(".") if part in WRAPPERS}
            names.removed += sorted(f"{part}." for part in gone) if label == "wrappers" else [label]
            names.chosen = cleaned


def _remove_root(names: Names, config: Path | None) -> None:
    """Take a prefix off that all names have and that the architecture of config.json has no place for."""
    if config is None:
        return
    for root in ROOTS:
        cleaned = {
            flat: name.removeprefix(root)
            for flat, name in names.chosen.items()
            if name.startswith(root) and name != root
        }
        if len(cleaned) == len(names.chosen):
            fits = children_of(config)
            if fits is not None and all(map(fits, cleaned.values())) and not all(map(fits, names.chosen.values())):
                names.chosen = cleaned
                names.removed.append(root)
                return
