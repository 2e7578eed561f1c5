"""The names of the files of a DeepSpeed checkpoint, and where a checkpoint's folder is.

Sources, DeepSpeed 0.19.8 ``runtime/engine.py``: ``_get_ckpt_name``, ``_get_rank_zero_ckpt_name``,
``_get_expert_ckpt_name``, ``_get_optimizer_ckpt_name``; ``runtime/pipe/module.py`` ``ckpt_layer_path``. Older releases
wrote no underscore before ``optim_states`` (``_get_all_zero_checkpoint_names`` still tries that).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from dsconv.errors import CheckpointNotFoundError, MalformedError

OPTIMIZER = re.compile(r"(?P<bf16>bf16_)?zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_?optim_states\.pt")
ZERO3_MODEL = re.compile(r"zero_pp_rank_(?P<dp>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt")
MODEL = re.compile(r"mp_rank_(?P<mp>\d+)_model_states\.pt")
LAYER = re.compile(r"layer_(?P<layer>\d+)-model(_(?P<mp>\d+)-model)?_states\.pt")
LAYERS_OF_TRANSFORMERS = (
    "dsconv_layers_of_transformers"  # client state of dsconv's engine: a pipeline's layers keep the model's names
)
EXPERT = re.compile(r"(layer_(?P<layer>-?\d+)_)?expert_(?P<expert>\d+)_mp_rank_(?P<mp>\d+)_model_states\.pt")
EXPERT_OPTIMIZER = re.compile(r"expp_rank_(?P<ep>\d+)_mp_rank_(?P<mp>\d+)_optim_states\.pt")
MAX_TAG_BYTES = 4096


@dataclass
class TagFolder:
    """A tag's folder and its shard files by kind; ranks are ints, ``optimizer`` and ``zero3`` are keyed (mp, dp)."""

    path: Path
    tag: str
    save_dir: Path
    optimizer: dict[tuple[int, int], Path] = field(default_factory=dict)
    zero3: dict[tuple[int, int], Path] = field(default_factory=dict)
    model: dict[int, Path] = field(default_factory=dict)
    layers: list[Path] = field(default_factory=list)
    experts: list[Path] = field(default_factory=list)
    expert_optimizers: dict[int, Path] = field(default_factory=dict)  # by expert-parallel rank; stage 0 only
    warnings: list[str] = field(default_factory=list)

    @property
    def mp_ranks(self) -> list[int]:
        """The model-parallel ranks that have files here, in order."""
        return sorted({mp for mp, _ in (*self.optimizer, *self.zero3)} | set(self.model))

    @property
    def files(self) -> list[Path]:
        """All files that were found."""
        by_rank = (*self.optimizer.values(), *self.zero3.values(), *self.model.values())
        return [*by_rank, *self.layers, *self.experts, *self.expert_optimizers.values()]

    def of_rank(self, mp: int) -> TagFolder:
        """The files of one model-parallel rank."""
        return TagFolder(
            self.path,
            self.tag,
            self.save_dir,
            {key: path for key, path in self.optimizer.items() if key[0] == mp},
            {key: path for key, path in self.zero3.items() if key[0] == mp},
            {mp: self.model[mp]} if mp in self.model else {},
        )


def holds_states(folder: Path) -> bool:
    """Whether DeepSpeed shard files lie right in ``folder``."""
    return folder.is_dir() and any(
        pattern.fullmatch(name.name) for name in folder.iterdir() for pattern in (MODEL, ZERO3_MODEL, OPTIMIZER)
    )


def find_tag_folder(path: Path, tag: str | None = None) -> TagFolder | None:
    """The tag folder that ``path`` means: a save dir, a tag dir, or a Trainer's ``checkpoint-N``.

    Returns None where there is nothing of DeepSpeed. Raises CheckpointNotFoundError where the tag that was asked for,
    or that ``latest`` names, is not there, and where there are several and none was chosen.
    """
    if tag is not None:
        chosen = path / _checked_tag(tag, path)
        if not holds_states(chosen):
            raise CheckpointNotFoundError(f"{path}: no checkpoint of tag {tag!r}{_others(path)}")
        return scan(chosen, tag, path)
    if (path / "latest").is_file():
        tag = _checked_tag(read_latest(path / "latest"), path / "latest")
        if not holds_states(path / tag):
            raise CheckpointNotFoundError(
                f"{path / 'latest'} names {tag!r}, and {path / tag} holds no checkpoint{_others(path)}"
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
    nested = sorted(p.name for p in path.glob("checkpoint-*") if (p / "latest").is_file()) if path.is_dir() else []
    if nested:
        raise CheckpointNotFoundError(
            f"{path} holds several training checkpoints: give one of them, such as {path / nested[-1]}"
        )
    return None


def tags_in(path: Path) -> list[str]:
    return sorted((p.name for p in path.iterdir() if holds_states(p)), key=_natural) if path.is_dir() else []


def read_latest(path: Path) -> str:
    if path.stat().st_size > MAX_TAG_BYTES:
        raise MalformedError(f"{path} has {path.stat().st_size} bytes; expected the name of a tag")
    try:
        return path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise MalformedError(f"{path} is not text; expected the name of a tag") from None


def _checked_tag(tag: str, where: Path) -> str:
    if not tag or tag in (".", "..") or "\0" in tag or tag.startswith("/") or ".." in Path(tag).parts:
        raise MalformedError(f"{where}: {tag!r} is not the name of a tag inside the folder")
    return tag


def _others(path: Path) -> str:
    tags = tags_in(path)
    return f"; choose one with --tag: {', '.join(tags[-8:])}" if tags else "; no tag folder was found there"


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def scan(folder: Path, tag: str, save_dir: Path) -> TagFolder:
    """Sort the files of a tag folder by kind. Where a bf16 and a plain optimizer file claim one rank, the newer
    wins.
    """
    found = TagFolder(folder, tag, save_dir)
    for path in sorted(folder.iterdir()):
        name = path.name
        if match := OPTIMIZER.fullmatch(name):
            key = (int(match["mp"]), int(match["dp"]))
            rival = found.optimizer.get(key)
            if rival is not None:
                older, path = sorted((rival, path), key=lambda p: p.stat().st_mtime_ns)
                found.warnings.append(f"{older.name} left aside: {path.name} is newer and of the same rank")
            found.optimizer[key] = path
        elif match := ZERO3_MODEL.fullmatch(name):
            found.zero3[int(match["mp"]), int(match["dp"])] = path
        elif match := MODEL.fullmatch(name):
            found.model[int(match["mp"])] = path
        elif LAYER.fullmatch(name):
            found.layers.append(path)
        elif EXPERT.fullmatch(name):
            found.experts.append(path)
        elif match := EXPERT_OPTIMIZER.fullmatch(name):
            found.expert_optimizers[int(match["ep"])] = path
    return found
