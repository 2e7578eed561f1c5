"""A DeepSpeed model-states file: names, shapes, buffers, frozen weights, and the 16-bit module.

The keys are those of ``_common_checkpoint_state`` in DeepSpeed 0.19.8 ``runtime/engine.py``; the user's
``client_state`` lies among them at the top level and is not looked at.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import Instance, TensorRef, safe_repr
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import MalformedError, MissingShardError, UnsupportedError

T = TypeVar("T")


@dataclass
class ModuleStates:
    """One model-states file. ``param_shapes`` is a dict a parameter group, in the order of the flat data."""

    file: TorchFile
    module: dict[str, Any]
    buffer_names: list[str]
    param_shapes: list[dict[str, tuple[int, ...]]]
    frozen_shapes: dict[str, tuple[int, ...]]
    frozen_fragments: dict[str, Any]
    shared_params: dict[str, str]
    optimizer: Any
    step: int | None
    ds_version: str | None
    raw: dict[str, Any] = field(repr=False, default_factory=dict)

    @property
    def path(self) -> Path:
        return self.file.path

    def ties(self) -> dict[str, list[str]]:
        """{owner: its aliases}, from shared_params and from tensors of ``module`` that are one view of one storage."""
        owner_of: dict[str, str] = {}
        trainable = {name for group in self.param_shapes for name in group}
        groups: dict[str, list[str]] = {}
        for name, tensor in self.module.items():
            if isinstance(tensor, TensorRef) and tensor.numel:
                groups.setdefault(tensor.view_key, []).append(name)
        for names in groups.values():
            owner = next(
                (n for n in names if n in trainable), next((n for n in names if n not in self.shared_params), names[0])
            )
            owner_of.update((name, owner) for name in names if name != owner and name not in trainable)
        owner_of.update((alias, owner) for alias, owner in self.shared_params.items() if alias not in trainable)
        result: dict[str, list[str]] = {}
        for alias, owner in owner_of.items():
            while owner in owner_of and owner_of[owner] != alias:
                owner = owner_of[owner]
            result.setdefault(owner, []).append(alias)
        return result

    def module_entries(
        self, exclude: Set[str], ties: dict[str, list[str]], only: Set[str] | None = None
    ) -> dict[str, TensorEntry]:
        """Entries of the tensors that ``module`` itself holds: buffers, and at stages 0 to 2 the frozen weights."""
        aliases = {alias for names in ties.values() for alias in names}
        buffers = set(self.buffer_names)
        entries = {}
        for name, tensor in self.module.items():
            if isinstance(tensor, Instance):
                raise UnsupportedError(
                    f"{self.file.path}: {safe_repr(name)} is a {tensor.cls}, which dsconv does not read in DeepSpeed's"
                    " files"
                )
            if (
                not isinstance(tensor, TensorRef)
                or name in exclude
                or name in aliases
                or (only is not None and name not in only)
            ):
                continue
            role = "buffer" if name in buffers else "frozen"
            layout = partial(self.file.pieces, tensor)
            layout()  # bounds are proved now, not when the bytes are wanted
            entries[name] = TensorEntry(name, tensor.dtype, tensor.shape, layout, tuple(ties.get(name, ())), role)
        return entries

    def in_module_order(self, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
        """``entries`` in the order of the model's own state dict; names it lacks follow."""
        order = {name: i for i, name in enumerate(self.module)}
        return dict(sorted(entries.items(), key=lambda item: order.get(item[0], len(order))))


def refuse_missing_experts(states: ModuleStates) -> None:
    """Raise MissingShardError where the model has experts in files of their own; called where there are no such files.

    ``num_experts`` is written with expert files only (DeepSpeed 0.19.8 ``runtime/engine.py`` ``_save_moe_checkpoint``).
    """
    if states.raw.get("num_experts"):
        raise MissingShardError(
            f"{states.path} is of a model with experts, which lie in files of their own"
            " (layer_0_expert_0_mp_rank_00_model_states.pt and so on); there are none. Copy them from the nodes that"
            " wrote them"
        )


def require(mapping: Any, key: str, kind: type[T], path: Path) -> T:
    """``mapping[key]``, which must be of ``kind``; otherwise MalformedError."""
    value = mapping.get(key) if isinstance(mapping, dict) else None
    if not isinstance(value, kind):
        found = "nothing" if value is None else type(value).__name__
        raise MalformedError(f"{path}: not what its name says: expected a {kind.__name__} under {key!r}, found {found}")
    return value


def _shapes(value: Any, what: str, path: Path) -> dict[str, tuple[int, ...]]:
    if not isinstance(value, dict):
        raise MalformedError(f"{path}: {what} is a {type(value).__name__}; expected names and shapes")
    for name, shape in value.items():
        if (
            not isinstance(name, str)
            or not isinstance(shape, tuple)
            or not all(type(n) is int and n >= 0 for n in shape)
        ):
            raise MalformedError(f"{path}: {what} holds {safe_repr(name)} with shape {safe_repr(shape)}")
    return value


def read_module_states(path: Path) -> ModuleStates:
    """Raises MalformedError where the file is not a model-states file, UnsafeError where it wants to run code."""
    file = TorchFile(path)
    root = file.root
    if not isinstance(root, dict):
        raise MalformedError(f"{path}: not a model-states file: it holds a {type(root).__name__}")
    module = root.get("module")
    if module is None and "module" in root:
        module = {}
    if not isinstance(module, dict):
        raise MalformedError(f"{path}: not a model-states file: it has no 'module'")
    groups = root.get("param_shapes") or []
    if isinstance(groups, dict):  # releases before 0.4 wrote one group bare
        groups = [groups]
    shared = root.get("shared_params") or {}
    if isinstance(shared, (list, tuple)):  # and pairs instead of a mapping
        shared = dict(shared)
    if not isinstance(shared, dict) or not all(isinstance(k, str) and isinstance(v, str) for k, v in shared.items()):
        raise MalformedError(f"{path}: shared_params is not a mapping of names to names")
    step, version = root.get("global_steps"), root.get("ds_version")
    return ModuleStates(
        file=file,
        module=module,
        buffer_names=[name for name in root.get("buffer_names") or [] if isinstance(name, str)],
        param_shapes=[_shapes(group, "param_shapes", path) for group in groups],
        frozen_shapes=_shapes(root.get("frozen_param_shapes") or {}, "frozen_param_shapes", path),
        frozen_fragments=root.get("frozen_param_fragments") or {},
        shared_params=shared,
        optimizer=root.get("optimizer"),
        step=step if isinstance(step, int) else None,
        ds_version=version if isinstance(version, str) else None,
        raw=root,
    )
