"""The folder of a DeepSpeed tag: which one is read, and the names of the files in it.

Sources, DeepSpeed ``runtime/engine.py``: ``_get_ckpt_name``, ``_get_rank_zero_ckpt_name``,
``_get_expert_ckpt_name``, ``_get_optimizer_ckpt_name``; ``runtime/pipe/module.py`` ``ckpt_layer_path``. Older releases
wrote no underscore before ``optim_states`` (``_get_all_zero_checkpoint_names`` still tries that).
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from dsconv.errors import CheckpointNotFoundError, InconsistentCheckpointError, MalformedError
from dsconv.text import natural, quote

K = TypeVar("K", bound=Hashable)

OPTIMIZER = re.compile(
    r"(?P<bf16>bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)(?P<underscore>_?)optim_states\.pt"
)
ZERO3_MODEL = re.compile(r"zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt")
MODEL = re.compile(r"mp_rank_(?P<mp>\d+)_model_states\.pt")
LAYER = re.compile(r"layer_(?P<layer>\d+)-model(_(?P<mp>\d+)-model)?_states\.pt")
# Client state of dsconv's engine: the layers of a pipeline keep the names of a transformers model.
LAYERS_OF_TRANSFORMERS = "dsconv_layers_of_transformers"
EXPERT = re.compile(r"(layer_(?P<layer>-?\d+)_)?expert_(?P<expert>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt")
EXPERT_OPTIMIZER = re.compile(r"expp_rank_(?P<ep>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
MAX_TAG_BYTES = 4096
UNIVERSAL = "zero"  # the folder of a universal checkpoint's parameters
UNIVERSAL_SETTINGS = "optimizer_state.pt"  # in it


@dataclass
class TagFolder:
    """A tag's folder and its shard files by kind.

    ``model`` has the model-parallel rank as its key, ``optimizer`` and ``zero3`` have (mp, dp), and
    ``expert_optimizers``, which only stage 0 has, the expert-parallel rank.

    ``kinds`` has the optimizer files by the form of their names, such as ``bf16_zero_pp_rank_*_optim_states.pt``. Two
    forms come from two runs. Names do not say which run wrote the model states, so ``optimizer`` is empty until one
    form is chosen; ``chosen`` says that it was. ``own_weights`` says that the model's 16-bit weights are wanted, so
    that there are no optimizer files to look for. ``read_already`` has what was read of model-states files to choose a
    form, until their reader takes it.
    """

    path: Path
    tag: str
    save_dir: Path
    optimizer: dict[tuple[int, int], Path] = field(default_factory=dict)
    zero3: dict[tuple[int, int], Path] = field(default_factory=dict)
    model: dict[int, Path] = field(default_factory=dict)
    layers: list[Path] = field(default_factory=list)
    experts: list[Path] = field(default_factory=list)
    expert_optimizers: dict[int, Path] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    kinds: dict[str, dict[tuple[int, int], Path]] = field(default_factory=dict)
    chosen: bool = False
    own_weights: bool = False
    read_already: dict[Path, Any] = field(default_factory=dict, repr=False)

    @property
    def mp_ranks(self) -> list[int]:
        """The model-parallel ranks that have files here, in order."""
        return sorted({mp for mp, _ in (*self.optimizer, *self.zero3)} | set(self.model))

    @property
    def files(self) -> list[Path]:
        """All files that were found."""
        optimizers = (path for kind in self.kinds.values() for path in kind.values())
        by_rank = (*optimizers, *self.zero3.values(), *self.model.values())
        return [*by_rank, *self.layers, *self.experts, *self.expert_optimizers.values()]

    def of_rank(self, mp: int) -> TagFolder:
        """Return the files of one model-parallel rank."""
        return replace(
            self,
            optimizer={key: path for key, path in self.optimizer.items() if key[0] == mp},
            zero3={key: path for key, path in self.zero3.items() if key[0] == mp},
            model={mp: self.model[mp]} if mp in self.model else {},
            layers=[],
            experts=[],
            expert_optimizers={},
            warnings=[],
        )

    def with_own_weights(self) -> TagFolder:
        """Return the same folder for a reader that wants the model's 16-bit weights and no optimizer."""
        return replace(self, optimizer={}, expert_optimizers={}, kinds={}, own_weights=True)


def holds_states(folder: Path) -> bool:
    """Return whether DeepSpeed shard files lie right in ``folder``."""
    return folder.is_dir() and any(
        pattern.fullmatch(name.name) for name in folder.iterdir() for pattern in (MODEL, ZERO3_MODEL, OPTIMIZER)
    )


def find_tag_folder(path: Path, tag: str | None = None) -> TagFolder | None:
    """Return the tag folder that ``path`` means: a save dir, a tag dir, or a Trainer's ``checkpoint-N``.

    Args:
        path: The folder that the user named.
        tag: The tag that the user named, or None for the one that ``latest`` names.

    Returns:
        The tag's folder, or None if there is nothing of DeepSpeed.

    Raises:
        CheckpointNotFoundError: The tag is missing, or there are several and none was chosen.
        MalformedError: ``latest`` does not hold the name of a tag.
        InconsistentCheckpointError: Two files claim to be of the same rank.
    """
    if tag is not None:
        chosen = path / _checked_tag(tag, path)
        if not holds_states(chosen):
            raise CheckpointNotFoundError(f"{path}: no checkpoint of tag {quote(tag)}{_others(path)}")
        return scan(chosen, tag, path)
    if (path / "latest").is_file():
        tag = _checked_tag(read_latest(path / "latest"), path / "latest")
        if not holds_states(path / tag):
            raise CheckpointNotFoundError(
                f"{path / 'latest'} names {quote(tag)}, and {path / tag} holds no checkpoint{_others(path)}"
            )
        return scan(path / tag, tag, path)
    if holds_states(path):
        return scan(path, path.name, path.parent)
    tags = tags_in(path)
    if len(tags) == 1:
        found = scan(path / tags[0], tags[0], path)
        found.warnings.append(f"{path} has no file 'latest': took its only checkpoint, {tags[0]}")
        return found
    if tags:
        raise CheckpointNotFoundError(f"{path} has no file 'latest'{_others(path)}")
    if nested := trainer_saves(path):
        raise CheckpointNotFoundError(
            f"{path} holds checkpoints of a training beside other files: choose one with --tag, such as --tag"
            f" {nested[-1]}, or name the model's file"
        )
    return None


def tags_in(path: Path) -> list[str]:
    """Return the names of the tag folders in ``path``, numbers in them in the order of their values."""
    return sorted((p.name for p in path.iterdir() if holds_states(p)), key=natural) if path.is_dir() else []


def trainer_saves(path: Path) -> list[str]:
    """Return the names of the ``checkpoint-N`` of DeepSpeed in a Trainer's output folder, the newest last."""
    names = [p.name for p in path.glob("checkpoint-*") if (p / "latest").is_file()] if path.is_dir() else []
    return sorted(names, key=natural)


def read_latest(path: Path) -> str:
    """Return the tag that a file ``latest`` names; raise MalformedError where it cannot be one."""
    if path.stat().st_size > MAX_TAG_BYTES:
        raise MalformedError(f"{path} has {path.stat().st_size} bytes; expected the name of a tag")
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise MalformedError(f"{path} is not text; expected the name of a tag") from None


def _checked_tag(tag: str, where: Path) -> str:
    if not tag or tag in (".", "..") or "\0" in tag or tag.startswith("/") or ".." in Path(tag).parts:
        raise MalformedError(f"{where}: {quote(tag)} is not the name of a tag inside the folder")
    return tag


def _others(path: Path) -> str:
    tags = tags_in(path) or trainer_saves(path)
    return (
        f"; choose one with --tag, or give its folder: {', '.join(tags[-8:])}"
        if tags
        else "; no tag folder was found there"
    )


def scan(folder: Path, tag: str, save_dir: Path) -> TagFolder:
    """Sort the files of a tag folder by kind.

    Raises:
        InconsistentCheckpointError: Two files claim to be of the same rank, such as mp_rank_0 and mp_rank_00.
    """
    found = TagFolder(folder, tag, save_dir)
    layers: dict[tuple[int, int], Path] = {}
    experts: dict[tuple[int, int, int], Path] = {}
    for path in sorted(folder.iterdir()):
        name = path.name
        if match := OPTIMIZER.fullmatch(name):
            form = f"{match['bf16'] or ''}zero_pp_rank_*{match['underscore']}optim_states.pt"
            _put(found.kinds.setdefault(form, {}), (int(match["mp"]), int(match["dp"])), path)
        elif match := ZERO3_MODEL.fullmatch(name):
            _put(found.zero3, (int(match["mp"]), int(match["dp"])), path)
        elif match := MODEL.fullmatch(name):
            _put(found.model, int(match["mp"]), path)
        elif match := LAYER.fullmatch(name):
            _put(layers, (int(match["layer"]), int(match["mp"] or 0)), path)
        elif match := EXPERT.fullmatch(name):
            _put(experts, (int(match["layer"] or 0), int(match["expert"]), int(match["mp"])), path)
        elif match := EXPERT_OPTIMIZER.fullmatch(name):
            _put(found.expert_optimizers, int(match["ep"]), path)
    found.layers, found.experts = list(layers.values()), list(experts.values())
    if len(found.kinds) == 1:
        found.optimizer = next(iter(found.kinds.values()))
    return found


def _put(files: dict[K, Path], rank: K, path: Path) -> None:
    if rank in files:
        raise InconsistentCheckpointError(
            f"{path} and {files[rank].name} name the same rank, so they are from two saves. Move the"
            " files of one of them to another folder"
        )
    files[rank] = path
