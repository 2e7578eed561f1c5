"""Which fp32 master belongs to which weight, where the optimizer keeps masters without names."""

from __future__ import annotations

from collections.abc import Mapping

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.checkpoint.torchfile.file import TorchFile, is_contiguous, read_extent

Weights = Mapping[str, tuple[TorchFile, TensorRef]]


def match_masters(
    states: ModuleStates, weights: Weights, entries: Mapping[str, TensorEntry], warnings: list[str]
) -> dict[str, TensorRef]:
    """The fp32 masters in the optimizer of ``states`` by name, of ``entries`` whose weights are ``weights``, in their
    order.

    Empty where there are none or they cannot be told apart.
    """
    optimizer = states.optimizer
    if not isinstance(optimizer, dict):
        return {}
    groups = optimizer.get("fp32_groups")
    flat = optimizer.get("fp32_groups_flat")
    names = [name for name, entry in entries.items() if entry.role == "parameter"]
    if isinstance(groups, list) and groups:
        tensors = [t for group in groups if isinstance(group, list) for t in group if isinstance(t, TensorRef)]
        matched = _match(states.file, weights, names, tensors)
    elif isinstance(flat, list) and all(isinstance(t, TensorRef) for t in flat):
        matched = _match_flat(states.file, weights, names, flat)
    else:
        return {}
    if matched is None:
        warnings.append(
            "the fp32 masters in the optimizer's state could not be matched to the parameters: the module's own weights"
            " were taken"
        )
        return {}
    return matched


def agrees(file: TorchFile, weights: Weights, name: str, master: TensorRef) -> bool:
    """Whether the first elements of a master in ``file``, cast, are the weight's."""
    holder, weight = weights[name]
    if (
        weight.shape != master.shape
        or not is_contiguous(weight.shape, weight.strides)
        or not is_contiguous(master.shape, master.strides)
    ):
        return weight.shape == master.shape
    count = min(consistency.SAMPLES * 4, weight.numel)
    high = consistency.decode(read_extent(file.extent(master, 0, count)), master.dtype)
    low = consistency.decode(read_extent(holder.extent(weight, 0, count)), weight.dtype)
    if high is None or low is None:
        return True
    return all(consistency.cast(h, weight.dtype) == w or h != h for h, w in zip(high, low, strict=True))


def _match(
    file: TorchFile, weights: Weights, names: list[str], tensors: list[TensorRef]
) -> dict[str, TensorRef] | None:
    """Give each master the next parameter, in the order of ``names``, of its shape and values; None where one finds
    none.
    """
    free = dict.fromkeys(names)
    matched: dict[str, TensorRef] = {}
    position = 0
    index = {name: i for i, name in enumerate(names)}
    for master in tensors:
        candidates = [name for name in free if agrees(file, weights, name, master)]
        if not candidates:
            return None
        name = next((c for c in candidates if index[c] >= position), candidates[0])
        matched[name] = master
        del free[name]
        position = index[name] + 1
    return matched


def _match_flat(
    file: TorchFile, weights: Weights, names: list[str], flats: list[TensorRef]
) -> dict[str, TensorRef] | None:
    """The same for groups flattened into one tensor each: walk the names and cut the group as it goes."""
    matched: dict[str, TensorRef] = {}
    free = list(names)
    for flat in flats:
        offset = 0
        while offset < flat.numel:
            for name in free:
                shape, numel = weights[name][1].shape, weights[name][1].numel
                if not numel or offset + numel > flat.numel:
                    continue
                view = TensorRef(flat.storage, flat.dtype, flat.offset + offset, shape, row_major(shape))
                if agrees(file, weights, name, view):
                    matched[name] = view
                    free.remove(name)
                    offset += numel
                    break
            else:
                return None
    return matched


def row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return tuple(strides)
