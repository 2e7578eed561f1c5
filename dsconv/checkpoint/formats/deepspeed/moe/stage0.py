"""MoE checkpoints without ZeRO: weights in ``module`` and the expert files, fp32 masters in ``expp_rank_N`` files.

Each expert-parallel rank of the largest such group writes its optimizer's state (DeepSpeed
``runtime/engine.py`` ``_save_moe_checkpoint``). Its masters have no names: ``unnamed_masters`` finds whose each is,
among the weights that the rank holds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from dsconv.checkpoint.formats.copies import same
from dsconv.checkpoint.formats.deepspeed.model_states import warn_of_absent
from dsconv.checkpoint.formats.deepspeed.moe import autoep
from dsconv.checkpoint.formats.deepspeed.moe.experts import (
    LOCAL,
    MARK,
    Assembly,
    ExpertLayer,
    NativeLayer,
    contents_of,
    owner_of,
    role_of,
    warn_of_lost,
)
from dsconv.checkpoint.formats.deepspeed.rank_map import build_checkpoint
from dsconv.checkpoint.formats.deepspeed.unnamed_masters import Ambiguous, MasterSlot, groups_of, match_known_masters
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.pieces import slice_pieces
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.torchfile.file import TorchFile
from dsconv.checkpoint.transfer.reading import Sources
from dsconv.errors import MissingShardError
from dsconv.text import count as counted
from dsconv.text import quote
from dsconv.zero_utils.tag_folder import TagFolder

MIN_TIED_NUMEL = 64  # shorter weights may be equal by chance, or because they are all ones


def read_moe_stage0(folder: TagFolder, found: autoep.Experts, warnings: list[str]) -> Checkpoint:
    """Read the tensor map of a checkpoint with expert files and without ZeRO.

    Raises:
        MissingShardError: An optimizer file is missing.
        UnsupportedError: Which master belongs to which weight cannot be determined.
    """
    states, layers, tensors = found.states, found.layers, found.tensors
    if states.param_shapes and not folder.own_weights:
        raise MissingShardError(
            f"{folder.path}: {states.path.name} is from a ZeRO run, whose fp32 weights lie in *_optim_states.pt; there"
            f" are none. Copy them from the nodes that wrote them, or take the model's own 16-bit weights, which are"
            " here, with dsconv merge --weights 16bit"
        )
    entries = states.module_entries(exclude=set(), ties=states.ties())
    weights = Assembly()
    for tensor in tensors:
        weights.add(tensor.share, tensor.tensor.dtype, tensor.pieces, tensor.file.path)
    entries.update((entry.name, entry) for entry in weights.entries(role_of(states)))
    # Stage 0 does not say what was frozen.
    entries = {
        name: entry if entry.role == "buffer" else replace(entry, role="parameter") for name, entry in entries.items()
    }
    optimizers = [] if folder.own_weights else _optimizers(folder, found)
    masters = _Masters(folder, found, entries, weights, warnings).read(optimizers)
    entries.update(masters)
    if folder.own_weights:
        warn_of_absent(states, entries, warnings)
    warn_of_lost(states, layers, entries, warnings)
    files = [*(optimizers if masters else ()), *(tensor.file for tensor in tensors)]
    stage = states.stage if folder.own_weights else 0
    kind = f"{f'ZeRO-{stage}' if stage else 'DeepSpeed stage 0'}, {found.naming.kind}"
    kind += ", 16-bit weights" if folder.own_weights else ""
    contents = contents_of(states, kind, stage, layers, found.naming.renamed(entries), files, warnings)
    return build_checkpoint(folder, states, contents)


def _optimizers(folder: TagFolder, found: autoep.Experts) -> list[TorchFile]:
    """Return the optimizer file of each expert-parallel rank.

    The main file repeats rank 0's state, which shows that there must be some.
    """
    has_masters = bool(groups_of(found.states.optimizer, {}))
    ranks = range(1 + max(folder.expert_optimizers, default=0 if has_masters else -1))
    missing = [rank for rank in ranks if rank not in folder.expert_optimizers]
    if missing:
        raise MissingShardError(_lacks(folder, missing[0]))
    return [TorchFile(folder.expert_optimizers[rank]) for rank in ranks]


def _lacks(folder: TagFolder, rank: int) -> str:
    return (
        f"{folder.path}: missing expp_rank_{rank}_mp_rank_00_optim_states.pt, which holds the fp32 masters of that"
        " expert-parallel rank's experts. Copy it from the node that wrote it"
    )


@dataclass
class _Masters:
    """The masters of all ranks' optimizer files, by the names of the weights.

    ``entries`` are all weights and buffers; ``weights`` those that expert files hold. ``stacked`` collects masters of
    AutoEP's tensors, to which several ranks contribute; ``unknown`` counts masters of no weight that was saved.
    """

    folder: TagFolder
    experts: autoep.Experts
    entries: dict[str, TensorEntry]
    weights: Assembly
    warnings: list[str]
    found: dict[str, TensorEntry] = field(default_factory=dict)
    stacked: Assembly = field(default_factory=Assembly)
    unknown: int = 0

    def read(self, files: list[TorchFile]) -> dict[str, TensorEntry]:
        """Return the entries that are read from masters; none where the optimizers have none."""
        stacked_names = {tensor.share.name for tensor in self.experts.tensors if tensor.share.region is not None}
        whole = {
            name: entry
            for name, entry in self.entries.items()
            if entry.role == "parameter" and name not in stacked_names and not self.experts.naming.is_second(name)
        }
        ties = _ties({name: entry for name, entry in whole.items() if MARK not in name})
        alone = {name: entry for name, entry in whole.items() if name not in ties}
        for ep_rank, file in enumerate(files):
            self._read_rank(ep_rank, len(files), file, alone)
        self.found.update((entry.name, entry) for entry in self.stacked.entries(lambda name: "parameter"))
        self._need_all(whole, len(files))
        for name, owner in ties.items():
            if owner in self.found:
                self.found[name] = replace(self.found[owner], name=name, aliases=whole[name].aliases)
        if self.unknown:
            self.warnings.append(
                f"left out {counted(self.unknown, 'fp32 master')} of an optimizer file, of which no weight was saved"
            )
        lacking = [name for name in (*whole, *stacked_names) if name not in self.found]
        if self.found and lacking:
            self.warnings.append(
                f"{counted(len(lacking), 'parameter', 'has')} no fp32 master in the optimizer files, the first"
                f" {quote(lacking[0])}: the 16-bit weights were taken"
            )
        return self.found

    def _read_rank(self, ep_rank: int, ep_size: int, file: TorchFile, whole: dict[str, TensorEntry]) -> None:
        optimizer = file.root.get("optimizer") if isinstance(file.root, dict) else None
        layers = self.experts.layers
        stacks = {
            name: entry
            for layer in layers
            if isinstance(layer, autoep.AutoEPLayer)
            for name, entry in layer.stacks(ep_rank, self.experts.tensors)
        }
        # A rank holds its share of each layer's experts, if all layers are spread over all these ranks.
        mine = {name: entry for name, entry in whole.items() if _is_local(layers, name, ep_rank, ep_size)}
        try:
            matched, missed = match_known_masters(file, optimizer, _in_module_order(mine | stacks, layers))
        except Ambiguous:
            if len(mine) == len(whole):
                raise
            matched, missed = {}, -1
        if missed and len(mine) < len(whole):
            matched, missed = match_known_masters(file, optimizer, _in_module_order(whole | stacks, layers))
        self.unknown = max(self.unknown, missed)
        for name, slot in matched.items():
            self._add(name, slot, ep_rank, file, whole)

    def _add(self, name: str, slot: MasterSlot, ep_rank: int, file: TorchFile, whole: dict[str, TensorEntry]) -> None:
        master, layer = slot.master, owner_of(self.experts.layers, name)
        if master is None:
            return
        layout = partial(file.pieces, master)
        layout()  # bounds are proved now, not when the bytes are wanted
        if isinstance(layer, autoep.AutoEPLayer):
            for share in layer.shares(name, master.shape, ep_rank, len(layer.placement)):
                pieces = partial(slice_pieces, layout, share.start, share.numel, share.region, name)
                self.stacked.add(share, master.dtype, pieces, file.path)
        elif name not in self.found:
            old = whole[name]
            self.found[name] = TensorEntry(name, master.dtype, old.shape, layout, old.aliases, old.role)

    def _need_all(self, whole: dict[str, TensorEntry], files: int) -> None:
        """Raise MissingShardError if some experts of a layer have a master of a tensor and others lack it."""
        partly = [name for name, parts in self.stacked.parts.items() if set(parts) != set(self.weights.parts[name])]
        matches = {name: LOCAL.fullmatch(name) for name in whole}
        have = {(match["layer"], match["rest"]) for name, match in matches.items() if match and name in self.found}
        partly += [
            name
            for name, match in matches.items()
            if match and name not in self.found and (match["layer"], match["rest"]) in have
        ]
        if partly:
            raise MissingShardError(f"{_lacks(self.folder, files)} (no master of {quote(partly[0])} was found)")


def _is_local(layers: Iterable[ExpertLayer], name: str, ep_rank: int, ep_size: int) -> bool:
    """Return whether rank ``ep_rank`` of ``ep_size`` holds a weight: all but the experts of other ranks."""
    match = LOCAL.fullmatch(name)
    layer = next((layer for layer in layers if isinstance(layer, NativeLayer) and layer.owns(name)), None)
    if match is None or layer is None or layer.experts % ep_size:
        return True
    return int(match["expert"]) // (layer.experts // ep_size) == ep_rank


def _in_module_order(weights: dict[str, TensorEntry], layers: Iterable[ExpertLayer]) -> dict[str, TensorEntry]:
    """Return weights in the order in which optimizer groups list them.

    That is the module's, with experts behind the other weights of their MoE layer. AutoEP puts its routers last.
    """
    autoep_paths = {layer.path for layer in layers if isinstance(layer, autoep.AutoEPLayer)}

    def layer_of(name: str) -> str | None:
        """Return the module of the MoE layer whose expert has the weight."""
        path, mark, _ = name.partition(MARK)
        if mark:
            return path
        path, _, leaf = name.rpartition(".experts.")
        return path if path in autoep_paths and leaf in autoep.WEIGHTS else None

    owners = {name: layer_of(name) for name in weights}
    last: dict[str, int] = {}  # the place of the last other weight of each MoE layer
    for number, name in enumerate(weights):
        parts = name.split(".") if owners[name] is None else []
        last.update((".".join(parts[:end]), number) for end in range(1, len(parts)))
    places: dict[str, tuple[int, int]] = {}
    for number, (name, owner) in enumerate(owners.items()):
        is_router = any(name.startswith(f"{path}.router.") for path in autoep_paths)
        place = number if owner is None else last.get(owner, number)
        places[name] = (len(weights) if is_router else place, number)
    return {name: weights[name] for name in sorted(weights, key=places.__getitem__)}


def _ties(whole: dict[str, TensorEntry]) -> dict[str, str]:
    """Return the owner of each weight that is another one under a second name.

    These checkpoints hold tied weights twice, and do not say that they are tied. Two weights outside of experts are
    taken for one if all their bytes are equal, unless they are as short or as uniform as weights that are equal by
    chance: norms of ones, biases of zeros.
    """
    classes: dict[tuple[object, ...], list[TensorEntry]] = {}
    for entry in whole.values():
        record = entry.pieces[0].extent.record if entry.pieces else None
        if record is not None and record.crc32 is not None and entry.numel >= MIN_TIED_NUMEL:
            key = (entry.shape, entry.dtype.name, record.nbytes, record.crc32)
            classes.setdefault(key, []).append(entry)
    found: dict[str, str] = {}
    with Sources() as sources:
        for first, *others in classes.values():
            for other in others:
                if same(first, 0, other, 0, first.numel, sources) and not _is_uniform(first, sources):
                    found[other.name] = first.name
    return found


def _is_uniform(entry: TensorEntry, sources: Sources) -> bool:
    """Return whether an element of a weight is equal to the next one, all over its beginning."""
    count = min(entry.numel, MIN_TIED_NUMEL)
    half = count // 2
    return same(entry, 0, entry, half, half, sources)
