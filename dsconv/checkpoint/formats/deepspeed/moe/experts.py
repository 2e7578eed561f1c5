"""Experts of a DeepSpeed MoE model: their names in the whole model, and the files that hold one expert each.

Facts read from DeepSpeed: ``runtime/engine.py`` ``_save_moe_checkpoint`` (one file per expert, named by the layer's
number among MoE layers and the expert's global id, with global names inside; the main model states leave them out) and
``moe/experts.py`` (a rank numbers its own experts from 0, in its parameters and so in ``param_shapes``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Protocol

from dsconv.checkpoint.formats.deepspeed import consistency
from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates
from dsconv.checkpoint.formats.deepspeed.rank_map import Contents, master_dtypes
from dsconv.checkpoint.formats.deepspeed.unread import refuse_unread
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.pieces import Layout
from dsconv.checkpoint.map.regions import Region
from dsconv.checkpoint.map.renaming import Unwrapped
from dsconv.checkpoint.map.tensors import Piece, TensorEntry
from dsconv.checkpoint.pickles.values import TensorRef, safe_repr
from dsconv.checkpoint.torchfile.file import TorchFile, is_contiguous
from dsconv.errors import InconsistentCheckpointError, MalformedError, MissingShardError, UnsupportedError
from dsconv.text import count as counted
from dsconv.text import quote
from dsconv.zero_utils.tag_folder import EXPERT, TagFolder

MARK = ".deepspeed_moe.experts.deepspeed_experts."
LOCAL = re.compile(r"(?P<layer>.*)\.deepspeed_moe\.experts\.deepspeed_experts\.(?P<expert>\d+)(?P<rest>\..*)")


@dataclass(frozen=True)
class Share:
    """Where elements [start, start + numel) of a rank's own tensor go: to ``region`` of tensor ``name`` of ``shape``.

    ``region`` is None for all of it.
    """

    name: str
    shape: tuple[int, ...]
    region: Region | None
    start: int
    numel: int


class ExpertLayer(Protocol):
    """One MoE layer: what its parameters are called on a rank, in expert files, and in the whole model."""

    @property
    def experts(self) -> int:
        """The number of its experts."""
        ...

    def owns(self, name: str) -> bool:
        """Return whether ``name`` is that of a tensor of the layer's experts."""
        ...

    def shares(self, name: str, shape: tuple[int, ...], ep_rank: int, ep_size: int) -> list[Share]:
        """Return where the tensor that rank ``ep_rank`` of ``ep_size`` calls ``name``, of ``shape`` there, belongs."""
        ...

    def in_file(self, key: str, shape: tuple[int, ...], expert: int) -> Share | None:
        """Return where tensor ``key`` of the file of ``expert`` belongs; None if it is not of that expert."""
        ...


@dataclass(frozen=True)
class NativeLayer:
    """A ``deepspeed.moe.layer.MoE`` whose module is ``path``: each expert's tensors are tensors of the model."""

    path: str
    experts: int

    def owns(self, name: str) -> bool:
        match = LOCAL.fullmatch(name)
        return match is not None and match["layer"] == self.path

    def shares(self, name: str, shape: tuple[int, ...], ep_rank: int, ep_size: int) -> list[Share]:
        match = LOCAL.fullmatch(name)
        local, here = int(match["expert"]) if match else 0, self.experts // ep_size
        if match is None or self.experts % ep_size or local >= here:
            raise InconsistentCheckpointError(
                f"parameter {quote(name)}: {self.path} has {self.experts} experts over {ep_size} expert-parallel ranks,"
                f" so {self.experts / ep_size:g} on each. The files are not from one save"
            )
        return [Share(f"{self.path}{MARK}{ep_rank * here + local}{match['rest']}", shape, None, 0, math.prod(shape))]

    def in_file(self, key: str, shape: tuple[int, ...], expert: int) -> Share | None:
        match = LOCAL.fullmatch(key)
        if match is None or match["layer"] != self.path or int(match["expert"]) != expert:
            return None
        return Share(key, shape, None, 0, math.prod(shape))


@dataclass(frozen=True)
class ExpertTensor:
    """One tensor of an expert file. ``key`` is its name there."""

    share: Share
    key: str
    file: TorchFile
    tensor: TensorRef

    def pieces(self) -> tuple[Piece, ...]:
        """Return the pieces that the tensor is of the whole model's."""
        return tuple(replace(piece, region=self.share.region) for piece in self.file.pieces(self.tensor))


@dataclass
class Assembly:
    """Tensors of the whole model that several ranks, or several expert files, hold together."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, DType] = field(default_factory=dict)
    parts: dict[str, dict[Region | None, Layout]] = field(default_factory=dict)

    def add(self, share: Share, dtype: DType, pieces: Layout, where: Path) -> None:
        """Add the pieces that fill the share's region. Of replicas, which hold the same, the first is taken.

        Raises:
            InconsistentCheckpointError: Another part of the tensor says another dtype or shape.
        """
        if (
            self.shapes.setdefault(share.name, share.shape) != share.shape
            or self.dtypes.setdefault(share.name, dtype) != dtype
        ):
            raise InconsistentCheckpointError(
                f"{where}: its part of tensor {quote(share.name)} is {dtype} of a tensor of shape {list(share.shape)};"
                f" other files hold {self.dtypes[share.name]} of {list(self.shapes[share.name])}. They are not from one"
                " save"
            )
        self.parts.setdefault(share.name, {}).setdefault(share.region, pieces)

    def holds(self, share: Share) -> bool:
        """Return whether the share's part of its tensor has been added."""
        return share.region in self.parts.get(share.name, {})

    def entries(self, role: Callable[[str], str]) -> Iterator[TensorEntry]:
        """Yield the tensors, whose roles ``role`` tells by name."""
        for name, parts in self.parts.items():
            yield TensorEntry(
                name, self.dtypes[name], self.shapes[name], partial(_in_turn, list(parts.values())), (), role(name)
            )


def _in_turn(parts: list[Layout]) -> tuple[Piece, ...]:
    return tuple(piece for make in parts for piece in make())


def owner_of(layers: list[ExpertLayer], name: str) -> ExpertLayer | None:
    """Return the layer whose experts have a tensor called ``name``, or None if there is none."""
    return next((layer for layer in layers if layer.owns(name)), None)


def read_layers(
    folder: TagFolder, states: ModuleStates, known: dict[int, ExpertLayer], warnings: list[str]
) -> tuple[list[ExpertLayer], list[ExpertTensor]]:
    """Return the MoE layers and what the expert files hold.

    Args:
        folder: The tag's folder.
        states: The main model states, which count each layer's experts (``num_experts``).
        known: The layers that the model states describe, by number; the names of the others are those in their files.
        warnings: A warning is added where files of more experts are ignored.

    Raises:
        MissingShardError: An expert's file is missing.
        InconsistentCheckpointError: A file holds another expert than its name says.
        UnsupportedError: The files are of an old release or of a tensor-parallel run.
    """
    counts = states.raw.get("num_experts")
    if not isinstance(counts, list) or not counts or not all(type(n) is int and n > 0 for n in counts):
        raise UnsupportedError(
            f"{folder.path}: the model states number their experts as {safe_repr(counts)}; dsconv reads the expert"
            " files of releases that count the experts of each layer"
        )
    paths: dict[tuple[int, int], Path] = {}
    surplus: list[Path] = []
    for path in folder.experts:
        match = EXPERT.fullmatch(path.name)
        if match is None or match["layer"] is None or int(match["mp"]):
            raise UnsupportedError(
                f"{path}: an expert file of an old release or of a tensor-parallel run; this version does not merge"
                " those"
            )
        place = int(match["layer"]), int(match["expert"])
        if 0 <= place[0] < len(counts) and place[1] < counts[place[0]]:
            paths[place] = path
        else:
            surplus.append(path)
    missing = [
        (layer, expert) for layer, count in enumerate(counts) for expert in range(count) if (layer, expert) not in paths
    ]
    if missing:
        names = ", ".join(f"layer_{layer}_expert_{expert}_mp_rank_00_model_states.pt" for layer, expert in missing[:4])
        raise MissingShardError(
            f"{folder.path}: lacks {len(missing)} of {counted(sum(counts), 'expert file')}:"
            f" {names}{' …' if len(missing) > 4 else ''}. Copy them from the nodes that wrote them"
        )
    if surplus:
        warnings.append(
            f"ignored {counted(len(surplus), 'expert file')} such as {surplus[0].name}: this checkpoint's layers have"
            f" {counts} experts"
        )
    layers: list[ExpertLayer] = []
    tensors: list[ExpertTensor] = []
    for number, count in enumerate(counts):
        files = [_expert_file(paths[number, expert]) for expert in range(count)]
        layer = known.get(number) or _native_layer(files[0], count, states.unwrapped)
        if any(owner_of(layers, states.unwrapped(key)) for key in files[0].root):
            raise InconsistentCheckpointError(
                f"{files[0].path} holds another layer's expert: the files of two layers were swapped or copied"
            )
        layers.append(layer)
        for expert, file in enumerate(files):
            tensors += _expert_tensors(layer, expert, file, states.unwrapped)
    states.elsewhere = {name for group in states.param_shapes for name in group if owner_of(layers, name) is not None}
    return layers, tensors


def _expert_file(path: Path) -> TorchFile:
    """Return an expert's file; raise MalformedError unless it holds a state dict."""
    file = TorchFile(path)
    if not isinstance(file.root, dict) or not all(isinstance(name, str) for name in file.root):
        raise MalformedError(f"{path}: not an expert's file: it holds a {type(file.root).__name__}")
    return file


def _native_layer(file: TorchFile, count: int, unwrapped: Unwrapped) -> NativeLayer:
    names = [unwrapped(key) for key in file.root]
    match = LOCAL.fullmatch(names[0]) if names else None
    if match is None:
        raise MalformedError(
            f"{file.path}: not an expert's file: expected names such as 'layer{MARK}0.weight', found"
            f" {safe_repr(names[:2])}"
        )
    return NativeLayer(match["layer"], count)


def _expert_tensors(layer: ExpertLayer, expert: int, file: TorchFile, unwrapped: Unwrapped) -> Iterator[ExpertTensor]:
    consistency.written_as_expert(file)
    for stored, tensor in file.root.items():
        refuse_unread(file.path, str(stored), tensor)
        if not isinstance(tensor, TensorRef):
            continue
        key = unwrapped(stored)
        share = layer.in_file(key, tensor.shape, expert)
        if share is None:
            raise InconsistentCheckpointError(
                f"{file.path} holds {quote(key)}, which does not belong to expert {expert} of this layer: that expert"
                " would appear twice. A file was copied over another's, or renamed: restore the files of one save"
            )
        if not is_contiguous(tensor.shape, tensor.strides):
            raise MalformedError(
                f"{file.path}: tensor {quote(key)} is not contiguous; DeepSpeed saves experts' tensors as copies of"
                " their own"
            )
        yield ExpertTensor(share, key, file, tensor)


def role_of(states: ModuleStates) -> Callable[[str], str]:
    """Return what tells the role of a tensor without a master.

    Buffers are listed under the names that rank 0 gives its own experts.
    """
    matches = [LOCAL.fullmatch(name) for name in states.buffer_names]
    buffers = {(match["layer"], match["rest"]) for match in matches if match}

    def role(name: str) -> str:
        match = LOCAL.fullmatch(name)
        return "buffer" if match and (match["layer"], match["rest"]) in buffers else "frozen"

    return role


def warn_of_lost(
    states: ModuleStates, layers: list[ExpertLayer], entries: dict[str, TensorEntry], warnings: list[str]
) -> None:
    """Add warnings that name what DeepSpeed did not save.

    It takes every name in a MoE module that holds the word 'expert' for an expert's, and then saves true experts only.
    """
    aliases = {alias for entry in entries.values() for alias in entry.aliases}
    lost = [n for n in states.buffer_names if n not in entries and n not in aliases and owner_of(layers, n) is None]
    if lost:
        warnings.append(
            f"DeepSpeed did not save {len(lost)} buffers, such as {quote(lost[0])}: it leaves out what lies in a MoE"
            " module under a name that holds 'expert'. They are in no file of the checkpoint"
        )
    suspects = [layer.path for layer in layers if isinstance(layer, NativeLayer) and "expert" in layer.path]
    if suspects and not states.frozen_shapes:
        warnings.append(
            f"the module {quote(suspects[0])} has 'expert' in its own name: DeepSpeed saves the gate and the experts of"
            f" such a MoE module and nothing else. What more it has (use_residual)"
            f"{' and was frozen' if states.param_shapes else ''} is in no file of the checkpoint"
        )


def contents_of(
    states: ModuleStates,
    naming_kind: str,
    stage: int,
    layers: list[ExpertLayer],
    entries: dict[str, TensorEntry],
    files: Iterable[TorchFile],
    warnings: list[str],
    ep_size: int | None = None,
) -> Contents:
    """Return the contents of a checkpoint with experts.

    Args:
        states: The main model states.
        naming_kind: What the checkpoint is, for people.
        stage: The ZeRO stage.
        layers: The MoE layers.
        entries: The tensors by the model's own names.
        files: The files that were read beside the model states.
        warnings: What was found on the way.
        ep_size: The number of expert-parallel ranks, or None if it is not known.
    """
    world = {"data_parallel": states.data_parallel, "model_parallel": 1}
    return Contents(
        states.in_module_order(entries),
        naming_kind,
        stage,
        [states.file, *files],
        warnings,
        world if ep_size is None else world | {"expert_parallel": ep_size},
        {
            "master_dtype": master_dtypes(entries),
            "parameter_groups": len(states.param_shapes),
            "experts": [layer.experts for layer in layers],
        },
        "experts have optimizer states of their own, spread over other ranks than the rest's, and this version does not"
        " convert those. Go on with as many expert-parallel ranks as saved it (AutoEP runs: or convert with DeepSpeed's"
        " ds_to_universal)",
    )
