"""A DeepSpeed model-states file: names, shapes, buffers, frozen weights, and the 16-bit module.

The keys are those of ``_common_checkpoint_state`` in DeepSpeed ``runtime/engine.py``. The user's
``client_state`` lies among them at the top level and is not looked at.

Names are those of the model without its wrappers (``map/renaming.py``). DeepSpeed takes parameter names from the module
tree, where activation checkpointing leaves its mark, and the names of ``module`` from the state dict, whose hooks take
that mark out; so each list is unwrapped by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dsconv.checkpoint.formats.deepspeed.fields import Fields, Shapes
from dsconv.checkpoint.formats.deepspeed.unread import refuse_unread
from dsconv.checkpoint.map.renaming import OUTER, Unwrapped, unwrap
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef, safe_repr
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.errors import MalformedError, MissingShardError
from dsconv.text import count, quote
from dsconv.zero_utils.tag_folder import TagFolder

Ties = dict[str, list[str]]  # the aliases of each tensor that has some, by its name
PARAMETER, FROZEN, BUFFER = "parameter", "frozen", "buffer"  # roles of a TensorEntry


@dataclass
class ModuleStates:
    """One model-states file.

    ``param_shapes`` has one mapping per parameter group, in the order of the flat data. ``lists_frozen`` says whether
    the file has a list of frozen parameters: stage 0 and ZeRO-1 write none, and neither do stages 2 and 3 with
    ``exclude_frozen_parameters``. ``elsewhere`` lists parameters whose weights lie in other files, such as those of
    experts. ``stored`` gives the name in the file for each name from which a wrapper was removed.
    """

    file: TorchFile
    module: dict[str, Any]
    buffer_names: list[str]
    param_shapes: list[Shapes]
    frozen_shapes: Shapes
    frozen_fragments: dict[str, Any]
    shared_params: dict[str, str]
    optimizer: Any
    step: int | None
    ds_version: str | None
    lists_frozen: bool = True
    raw: dict[str, Any] = field(repr=False, default_factory=dict)
    elsewhere: Set[str] = frozenset()
    stored: dict[str, str] = field(repr=False, default_factory=dict)
    unwrapped: Unwrapped = field(repr=False, default_factory=Unwrapped)

    @property
    def path(self) -> Path:
        """The file's path."""
        return self.file.path

    @property
    def fields(self) -> Fields:
        """The file's fields, for those that only one kind of checkpoint has."""
        return Fields(self.path, self.raw)

    @property
    def config(self) -> dict[str, Any]:
        """The ds_config of the run; empty if none was saved."""
        found = self.raw.get("ds_config")
        return found if isinstance(found, dict) else {}

    @property
    def stage(self) -> int:
        """The ZeRO stage of the run, by its configuration; 0 where that names none."""
        section = self.config.get("zero_optimization")
        stage = section.get("stage") if isinstance(section, dict) else None
        return stage if type(stage) is int and 0 <= stage <= 3 else 0

    @property
    def universal_info(self) -> dict[str, Any] | None:
        """How tensor-parallel shards are joined, by the trainer; None if it saved nothing about that."""
        return self.fields.mapping("universal_checkpoint_info") or None

    @property
    def data_parallel(self) -> int:
        """The number of data-parallel ranks that the file names; 1 where it names none."""
        return self.fields.count("dp_world_size") or 1

    @property
    def model_parallel(self) -> int:
        """The number of ranks that the model was cut over, by what the file says; 1 where it says nothing."""
        return self.fields.count("mp_world_size") or 1

    def ties(self) -> Ties:
        """Return the aliases of each tensor that has other names.

        They come from ``shared_params`` and from tensors of ``module`` that are one view of one storage.

        Raises:
            MalformedError: ``shared_params`` runs in a circle.
        """
        owner_of: dict[str, str] = {}
        trainable = {name for group in self.param_shapes for name in group}
        views: dict[str, list[str]] = {}
        for name, tensor in self.module.items():
            if isinstance(tensor, TensorRef) and tensor.numel:
                views.setdefault(tensor.view_key, []).append(name)
        for names in views.values():
            owner = next(
                (n for n in names if n in trainable), next((n for n in names if n not in self.shared_params), names[0])
            )
            owner_of.update((name, owner) for name in names if name != owner and name not in trainable)
        owner_of.update((alias, owner) for alias, owner in self.shared_params.items() if alias not in trainable)
        result: Ties = {}
        for alias in owner_of:
            result.setdefault(self._owner(alias, owner_of), []).append(alias)
        return result

    def _owner(self, alias: str, owner_of: Mapping[str, str]) -> str:
        """Return the name at the end of the chain that begins with ``alias``."""
        passed = [alias]
        while (owner := owner_of.get(passed[-1])) is not None:
            if owner in passed:
                circle = [*passed[passed.index(owner) :], owner]
                raise MalformedError(
                    f"{self.path}: shared_params runs in a circle: {' is '.join(map(safe_repr, circle[:6]))}; the name"
                    " that owns the data is not among them"
                )
            passed.append(owner)
        return passed[-1]

    def module_entries(self, exclude: Set[str], ties: Ties, only: Set[str] | None = None) -> dict[str, TensorEntry]:
        """Return entries of the tensors that ``module`` itself holds: buffers, and at stages 0 to 2 frozen weights.

        Args:
            exclude: Names to leave out.
            ties: The aliases of ``ties()``; an alias gets no entry of its own.
            only: Where given, the only names to take.

        Raises:
            UnsupportedError: A tensor is of a class that dsconv does not read here.
        """
        aliases = {alias for names in ties.values() for alias in names}
        role = self.role_of()
        entries = {}
        for name, tensor in self.module.items():
            refuse_unread(self.path, name, tensor)
            if (
                not isinstance(tensor, TensorRef)
                or name in exclude
                or name in aliases
                or (only is not None and name not in only)
            ):
                continue
            layout = partial(self.file.pieces, tensor)
            layout()  # bounds are proved now, not when the bytes are wanted
            entries[name] = TensorEntry(name, tensor.dtype, tensor.shape, layout, tuple(ties.get(name, ())), role(name))
        return entries

    def role_of(self) -> Callable[[str], str]:
        """Return what tells the role of a tensor of ``module`` for which the optimizer holds no master.

        A buffer is one that is listed as such. All else was not trained, unless the lists and ``module`` disagree: see
        ``unlisted``.
        """
        buffers, unlisted = set(self.buffer_names), set(self.unlisted())
        return lambda name: BUFFER if name in buffers else PARAMETER if name in unlisted else FROZEN

    def unlisted(self) -> list[str]:
        """Return the tensors of ``module`` that may have been trained, though no list of parameters names them.

        Where the file lists frozen parameters, a tensor is in doubt that is in no list at all. Where it lists none
        (ZeRO-1), tensors are in doubt if parameters are listed that ``module`` lacks: they may be the same weights
        under other names, for instance those of a wrapper that dsconv does not know.
        """
        trained = {name for group in self.param_shapes for name in group}
        if not trained or not self.module:
            return []
        held = {name for name, value in self.module.items() if isinstance(value, TensorRef) and value.numel}
        if not self.lists_frozen and trained <= set(self.module) | self.elsewhere:
            return []
        listed = trained | set(self.buffer_names) | set(self.frozen_shapes)
        listed |= {alias for owner, names in self.ties().items() if owner in listed for alias in names}
        return [name for name in self.module if name in held - listed]

    def in_module_order(self, entries: dict[str, TensorEntry]) -> dict[str, TensorEntry]:
        """Return ``entries`` in the order of the model's own state dict; names that it lacks follow."""
        order = {name: i for i, name in enumerate(self.module)}
        return dict(sorted(entries.items(), key=lambda item: order.get(item[0], len(order))))


def warn_of_unlisted(
    states: ModuleStates, warnings: list[str], is_second: Callable[[str], bool] = lambda _: False
) -> None:
    """Add a warning that names tensors whose part in training the model states do not tell.

    Args:
        states: Model states of a stage whose ``module`` holds the weights (0 to 2).
        warnings: Where the warning is added.
        is_second: Tells the names under which the model holds a weight a second time.
    """
    if unlisted := [name for name in states.unlisted() if not is_second(name)]:
        warnings.append(
            f"{states.path.name} holds {count(len(unlisted), 'tensor')}, such as {quote(unlisted[0])}, that none of its"
            " lists of trained, frozen and buffer names has: what is stored is written, which may be a second, 16-bit"
            " copy of a weight that is here under another name"
        )


def warn_of_absent(states: ModuleStates, entries: Mapping[str, TensorEntry], warnings: list[str]) -> None:
    """Add a warning where weights of the model are not in the checkpoint.

    At stages 2 and 3 ``exclude_frozen_parameters`` leaves out frozen weights and their list. At stage 3 ``module`` also
    names parameters that no list has, as those that old releases did not save: it holds no elements of them.
    """
    known = set(entries) | {alias for entry in entries.values() for alias in entry.aliases}
    hollow = [
        name
        for name, value in states.module.items()
        if name not in known and isinstance(value, TensorRef) and not value.numel
    ]
    if hollow:
        warnings.append(
            f"{states.path.name} names {count(len(hollow), 'weight')}, such as {quote(hollow[0])}, whose data no file"
            " holds: missing in the output"
        )
    trained = [name for group in states.param_shapes for name, shape in group.items() if 0 not in shape]
    if lost := [name for name in trained if name not in known and name not in states.elsewhere]:
        warnings.append(
            f"{count(len(lost), 'trained weight', 'is')} only in the optimizer files, such as {quote(lost[0])}, and"
            " missing in the output"
        )
    if not states.lists_frozen and "frozen_param_shapes" in states.raw and states.stage in (2, 3):
        warnings.append(
            f"{states.path.name} was saved with exclude_frozen_parameters=True: weights that were frozen are not in the"
            " checkpoint and are missing in the output. Take them from the model that the run began with"
        )


def refuse_missing_experts(states: ModuleStates) -> None:
    """Raise MissingShardError if the model has experts in files of their own; for folders without such files.

    ``num_experts`` is written with expert files only (DeepSpeed ``runtime/engine.py`` ``_save_moe_checkpoint``).
    """
    if states.raw.get("num_experts"):
        raise MissingShardError(
            f"{states.path} is from a model with experts, which lie in files of their own"
            " (layer_0_expert_0_mp_rank_00_model_states.pt and so on); there are none. Copy them from the nodes that"
            " wrote them"
        )


def states_of(folder: TagFolder, path: Path) -> ModuleStates:
    """Return a model-states file of ``folder``, read already or now; raise as ``read_module_states`` does.

    A file of many tensors takes seconds to read, and reading it twice would double the time that opening takes.
    """
    states: ModuleStates | None = folder.read_already.pop(path, None)
    return read_module_states(path) if states is None else states


def read_module_states(path: Path) -> ModuleStates:
    """Read a model-states file.

    Args:
        path: The file.

    Returns:
        Its fields, each of its type, with names freed of wrappers.

    Raises:
        MalformedError: The file is not a model-states file, or a field is not what it should be.
        UnsafeError: The file asks for code to be run.
    """
    file = TorchFile(path, may_hold_unread=True)
    fields = Fields.of(path, file.root, "the mapping of a model-states file")
    if "module" not in fields.values:
        raise MalformedError(f"{path}: not a model-states file: it has no 'module'")
    module = fields.mapping("module")
    if not all(isinstance(name, str) for name in module):
        raise fields.wrong("module", "a state dict, whose keys are names")
    groups, frozen = fields.groups_of_shapes("param_shapes"), fields.shapes("frozen_param_shapes")
    shared, buffers = fields.ties("shared_params"), fields.names("buffer_names")
    fragments = fields.mapping("frozen_param_fragments")
    in_tree = [
        *(name for group in groups for name in group),
        *frozen,
        *buffers,
        *(name for pair in shared.items() for name in pair),
    ]
    for key in ("dp_world_size", "mp_world_size"):
        fields.count(key)
    for key in ("ds_autoep_layers", "autoep_layers"):
        fields.listing(key)
    fields.mapping("universal_checkpoint_info")
    outer = all(OUTER in unwrap(listed).removed for listed in (in_tree, module) if listed)
    names, in_module = unwrap(in_tree, outer), unwrap(module, outer)
    return ModuleStates(
        file=file,
        module=_renamed(module, in_module),
        buffer_names=[names(name) for name in buffers],
        param_shapes=[_renamed(group, names) for group in groups],
        frozen_shapes=_renamed(frozen, names),
        frozen_fragments=_renamed(fragments, names),
        shared_params={names(alias): names(owner) for alias, owner in shared.items()},
        optimizer=fields.values.get("optimizer"),
        step=fields.number("global_steps"),
        ds_version=fields.text("ds_version"),
        lists_frozen=fields.values.get("frozen_param_shapes") is not None,
        raw=file.root,
        stored={new: old for found in (in_module, names) for old, new in found.names.items()},
        unwrapped=Unwrapped(tuple(dict.fromkeys((*names.removed, *in_module.removed)))),
    )


def _renamed(values: Mapping[Any, Any], names: Unwrapped) -> dict[Any, Any]:
    return {names(name): value for name, value in values.items()}
