"""Tell the models of a training checkpoint apart from each other and from everything beside them.

A checkpoint is whatever nested dictionary the trainer saved: ``{"model": …, "optim": …}``, ``{"actor": …, "critic":
…}``, ``{"app": {"model": …}}``, or, as torchtitan does it, the weights bare beside ``optimizer`` and ``train_state``.
The names of the dictionaries prove nothing, because a model may have a child module called ``optim`` or ``state``. So
the structure decides:

- Everything under ``state`` beside ``param_groups`` belongs to an optimizer, wherever the two are. So do ``exp_avg``
  beside ``exp_avg_sq``, and ``state.NAME.…`` where NAME is a parameter that is stored elsewhere.
- A dictionary that holds weights is a model. Weights are matrices; vectors count only if nothing else decides.
- Bare names are one model, however many dots they have: a dot is part of a name, a dictionary is not.

Several models are never mixed: the user chooses one by its key. Left-out items are counted, and a warning names those
that may have been trained.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dsconv.checkpoint.formats.items.optimizers import optimizer_parts
from dsconv.checkpoint.formats.items.state_dicts import Leaf, Parts
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.errors import CheckpointNotFoundError, SeveralModelsError, UnsupportedError
from dsconv.text import count

# Dictionaries of these names hold a model, and their own name is not part of the names in it.
MODEL_KEYS = ("model", "module", "model_state_dict", "model_state", "state_dict")
EXTRA_STATE = "_extra_state"  # torch/nn/modules/module.py _EXTRA_STATE_KEY_SUFFIX
EXTRA_SHARD = f"{EXTRA_STATE}/shard_"  # Megatron-core 0.16 dist_checkpointing/mapping.py ShardedObject.unique_key
TOP = "."  # the key of a model whose weights lie at the top level
MAX_SHOWN = 8
FLOATS, INTEGERS = "; it may have been trained", ", and holds integers: random states, indices or counts, not weights"


@dataclass
class Items:
    """The roles of a checkpoint's items.

    Attributes:
        path: The path of the dictionary that the chosen model lies in; () for the top.
        chosen: {flat name: the model's own name} of its tensors.
        models: {key: number of tensors} of all models that the checkpoint holds.
        left_out: {what holds them: number of items} of everything that is not in ``chosen``.
        labels: {flat name: what holds it} of everything that is not in ``chosen``.
        optimizers: The flat names of what belongs to an optimizer.
        holders: {flat name: the words that lead to ``state`` and ``param_groups``} of an optimizer's items.
        removed: The prefixes that the model's names have in the file and not in ``chosen``.
        warnings: What the user must know about the choice.
    """

    path: Parts
    chosen: dict[str, str]
    models: dict[str, int]
    left_out: dict[str, int] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    optimizers: Collection[str] = ()
    holders: Mapping[str, Parts] = field(default_factory=dict)
    removed: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """The key of the chosen model, as ``models`` has it."""
        return ".".join(self.path) or TOP

    def forget(self, flat: str) -> None:
        """Remove an item from the left-out ones."""
        label = self.labels.pop(flat)
        self.left_out[label] -= 1
        if not self.left_out[label]:
            del self.left_out[label]


class _Dictionary:
    """A dictionary of the nested state dict, without optimizers and extra states."""

    def __init__(self) -> None:
        self.tensors: dict[str, Leaf] = {}  # those directly in it
        self.inside: dict[str, _Dictionary] = {}
        self.has_weights = False
        self.has_matrices = False
        self.has_floats = False

    def add(self, flat: str, leaf: Leaf) -> None:
        node, is_weight, is_matrix = self, leaf.is_weight, leaf.is_matrix
        is_float = is_weight and leaf.floating
        for part in (*leaf.path[:-1], None):
            node.has_weights |= is_weight
            node.has_matrices |= is_matrix
            node.has_floats |= is_float
            if part is not None:
                node = node.inside.setdefault(part, _Dictionary())
        node.tensors[flat] = leaf

    def at(self, path: Parts) -> _Dictionary | None:
        node: _Dictionary | None = self
        for part in path:
            node = node.inside.get(part) if node is not None else None
        return node

    def all_tensors(self) -> Iterable[tuple[str, Leaf]]:
        yield from self.tensors.items()
        for inner in self.inside.values():
            yield from inner.all_tensors()


@dataclass(frozen=True)
class _Model:
    path: Parts
    tensors: Mapping[str, Leaf]

    @property
    def key(self) -> str:
        return ".".join(self.path) or TOP


def choose_model(leaves: Mapping[str, Leaf], where: Path, item: str | None = None) -> Items:
    """Find the one model of a checkpoint, or the one that the user asks for.

    Args:
        leaves: Every item of the checkpoint, by its flat name.
        where: The file or folder, for messages.
        item: The key of the model that is wanted, as ``SeveralModelsError`` lists them: the path of its dictionary,
            joined by dots. Any other dictionary that holds weights can be named too.

    Raises:
        SeveralModelsError: It holds several models, and ``item`` is None.
        CheckpointNotFoundError: It has no such item.
        UnsupportedError: No tensor belongs to a model.
    """
    optimizers = optimizer_parts(leaves)
    tensors = {
        flat: leaf
        for flat, leaf in leaves.items()
        if leaf.is_tensor and flat not in optimizers.of and not _is_extra(leaf.path)
    }
    top = _Dictionary()
    for flat, leaf in tensors.items():
        top.add(flat, leaf)
    models = _models(top, ())
    if not models and tensors and not optimizers.of:
        models = [_Model((), tensors)]  # of scalars alone
    listed = {model.key: len(model.tensors) for model in models}
    model = _pick(models, top, where, item, leaves, optimizers.of)
    chosen = {flat: ".".join(leaf.path[len(model.path) :]) for flat, leaf in model.tensors.items()}
    items = Items(
        model.path,
        chosen,
        listed,
        optimizers=optimizers.of.keys(),
        holders=optimizers.holders,
        warnings=list(optimizers.warnings),
    )
    if model.path:
        items.removed.append(model.key + ".")
    trained: dict[tuple[str, str], list[Leaf]] = {}
    for flat, leaf in leaves.items():
        if flat in chosen:
            continue
        label = _label(leaf, model.path, optimizers.of.get(flat))
        items.labels[flat] = label
        items.left_out[label] = items.left_out.get(label, 0) + 1
        if flat in tensors and (leaf.is_weight or leaf.floating) and not any(flat in m.tensors for m in models):
            trained.setdefault((label, FLOATS if leaf.floating else INTEGERS), []).append(leaf)
    items.warnings += [
        f"left out {safe_repr(label)}, which is not part of the model {safe_repr(model.key)}{what}:"
        f" {count(len(found), 'tensor')}, the first {safe_repr('.'.join(found[0].path))} of shape"
        f" {list(found[0].shape or ())}"
        for (label, what), found in trained.items()
    ]
    return items


def _pick(
    models: list[_Model],
    top: _Dictionary,
    where: Path,
    item: str | None,
    leaves: Mapping[str, Leaf],
    optimizers: Mapping[str, str],
) -> _Model:
    if item is not None:
        return _named(models, top, where, item)
    if len(models) == 1:
        return models[0]
    if models:
        raise SeveralModelsError(where, {model.key: len(model.tensors) for model in models})
    held: dict[str, int] = {}
    for flat, leaf in leaves.items():
        label = _label(leaf, (), optimizers.get(flat))
        held[label] = held.get(label, 0) + 1
    of_model = any(leaf.is_tensor and flat not in optimizers for flat, leaf in leaves.items())
    only = ", all of it an optimizer's" if optimizers and not of_model else ""
    raise UnsupportedError(
        f"{where}: no tensor of a model; it holds {safe_repr(held)}{only}. Give the file or folder that the model's"
        " weights were saved to"
    )


def _named(models: list[_Model], top: _Dictionary, where: Path, item: str) -> _Model:
    """Return the model with the key ``item``, or all that is in the dictionary of that path."""
    exact = next((model for model in models if model.key == item), None)
    if exact is not None:
        return exact
    for path in _paths(top, item):
        node = top.at(path)
        if node is not None and node.has_weights:
            inside = _models(node, path)
            return inside[0] if len(inside) == 1 else _Model(path, dict(node.all_tensors()))
    listed = ", ".join(safe_repr(model.key) for model in models[:MAX_SHOWN]) or "none"
    raise CheckpointNotFoundError(f"{where}: no model is called {safe_repr(item)}; it holds {listed}")


def _paths(node: _Dictionary, item: str, path: Parts = ()) -> Iterable[Parts]:
    """Yield the paths of dictionaries that are ``item`` when joined by dots."""
    for part, inner in node.inside.items():
        if item == part:
            yield (*path, part)
        elif item.startswith(part + "."):
            yield from _paths(inner, item[len(part) + 1 :], (*path, part))


def _models(node: _Dictionary, path: Parts) -> list[_Model]:
    """Return the models in a dictionary, in the order in which they are stored."""
    bare = any(leaf.is_weight for leaf in node.tensors.values())
    weighty = {part: inner for part, inner in node.inside.items() if inner.has_weights}
    whole = any(leaf.is_weight and "." in leaf.path[-1] for leaf in node.tensors.values())
    if whole or any(inner.has_floats and _is_whole(part, inner) for part, inner in weighty.items()):
        # Random states, indices and counts lie beside a model. A module of integers is never beside a whole model.
        weighty = {part: inner for part, inner in weighty.items() if inner.has_floats or part in MODEL_KEYS}
    strong = {part: inner for part, inner in weighty.items() if inner.has_matrices or part in MODEL_KEYS}
    if not strong and not bare:
        strong = weighty
    elif len(strong) < len(weighty):  # a copy of a model of vectors alone, such as its moving average
        known = {(leaf.path[-1], leaf.shape) for inner in (node, *strong.values()) for leaf in inner.tensors.values()}
        strong |= {
            part: inner
            for part, inner in weighty.items()
            if any(leaf.is_weight and (leaf.path[-1], leaf.shape) in known for leaf in inner.tensors.values())
        }
    if bare:
        return [_Model(path, node.tensors), *_each(strong, path)]
    if len(strong) == 1:
        ((part, inner),) = strong.items()
        models = _models(inner, (*path, part))
        if not path or part in MODEL_KEYS or len(models) > 1 or _has_dots(models):
            return models
    if len(strong) < 2:
        return [_Model(path, dict(node.all_tensors()))] if node.has_weights and path else []
    return _each(strong, path)


def _each(dictionaries: Mapping[str, _Dictionary], path: Parts) -> list[_Model]:
    return [model for part, inner in dictionaries.items() for model in _models(inner, (*path, part))]


def _is_whole(part: str, node: _Dictionary) -> bool:
    """Return whether a dictionary is a whole model, and not a module of one that was saved as nested dictionaries."""
    return part in MODEL_KEYS or any("." in leaf.path[-1] for _, leaf in node.all_tensors())


def _has_dots(models: Iterable[_Model]) -> bool:
    """Return whether some names have dots: they are whole, and what holds them is not part of them."""
    return any("." in leaf.path[-1] for model in models for leaf in model.tensors.values())


def _is_extra(path: Parts) -> bool:
    """Return whether an item is, or lies in, what a module keeps beside its parameters (fp8 scales and the like)."""
    return any(part.endswith(EXTRA_STATE) or EXTRA_SHARD in part for part in path)


def _label(leaf: Leaf, root: Parts, optimizer: str | None) -> str:
    """Return what holds an item that is left out: the dictionary beside the model's, or the optimizer."""
    if _is_extra(leaf.path):
        return EXTRA_STATE
    shared = 0
    while shared < min(len(root), len(leaf.path) - 1) and leaf.path[shared] == root[shared]:
        shared += 1
    if optimizer is not None and shared == len(leaf.path) - 1:
        return optimizer  # of flattened names
    return ".".join(leaf.path[: shared + 1])
