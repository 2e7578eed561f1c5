"""Choose what a merge writes of a PEFT model: the adapter alone, the model with the adapter folded in, or all of it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.convert.adapters.methods import is_peft_model
from dsconv.errors import SeveralModelsError

STEM = "adapter_model"


@dataclass(frozen=True)
class AdapterOptions:
    """The user's choice of what to write of a PEFT model.

    Attributes:
        alone: Write the adapter as PEFT saves it.
        name: Which of several adapters.
        fold: Fold the adapter into its base.
        base: The base model, for ``fold``, if the checkpoint holds only an adapter.
        follow_links: Whether links that leave the folder of ``base`` are read.
    """

    alone: bool = False
    name: str | None = None
    fold: bool = False
    base: str | os.PathLike[str] | None = None
    follow_links: bool = False

    def __post_init__(self) -> None:
        if self.alone and self.fold:
            raise ValueError(
                "--adapter writes the adapter alone and --fold-lora the model without one: give one of them"
            )
        if self.name is not None and not (self.alone or self.fold):
            raise ValueError("--adapter-name chooses an adapter for --adapter or --fold-lora: give one of them")
        if self.base is not None and not self.fold:
            raise ValueError("--base is the model that --fold-lora folds an adapter into")


@dataclass(frozen=True)
class Chosen:
    """What to write.

    Attributes:
        checkpoint: Its tensors.
        files: The files beside an adapter; None if a model's files go beside the weights.
        near: Where config.json and the tokenizer may lie.
        folded: The tensors that a folded adapter changed; None if none was folded in. After a fold,
            adapter_config.json does not belong beside the weights, and tied embeddings may differ.
        vocabulary: The number of tokens before and after, where a folded adapter brings resized embeddings.
        warnings: What the user should know.
    """

    checkpoint: Checkpoint
    files: dict[str, bytes] | None = None
    near: list[Path] = field(default_factory=list)
    folded: frozenset[str] | None = None
    vocabulary: tuple[int, int] | None = None
    warnings: tuple[str, ...] = ()


def choose(
    checkpoint: Checkpoint, options: AdapterOptions, near: list[Path], config_from: Path | None, dtype: DType | None
) -> Chosen:
    """Return what ``options`` ask for.

    Args:
        checkpoint: The checkpoint.
        options: What is wanted.
        near: Where the files beside the checkpoint lie.
        config_from: The folder to look in instead.
        dtype: The dtype that floats are written in, for a fold.

    Raises:
        DsconvError: What ``extract_adapter``, ``fold_lora`` and, for the base, ``open_checkpoint`` raise.
    """
    folders = [config_from] if config_from is not None else near
    if options.fold:
        base = _open_base(options)
        from dsconv.convert.folding import fold_lora  # a merge of no adapter starts without it

        folded = fold_lora(
            checkpoint, [*folders, *(near if config_from is not None else [])],
            base=base, adapter_name=options.name, dtype=dtype,
        )  # fmt: skip
        places = near if base is None else [base.path, base.folder]
        return Chosen(folded.checkpoint, near=places, folded=folded.touched, vocabulary=folded.vocabulary)
    if options.alone:
        if checkpoint.info.get("adapter") and options.name is None:
            return Chosen(checkpoint, near=near)  # the config of a PEFT folder, which is copied unchanged
        from dsconv.convert.adapters.extract import extract_adapter

        adapter = extract_adapter(checkpoint, folders, options.name)
        return Chosen(adapter.checkpoint, files=adapter.files, near=near)
    if not checkpoint.info.get("adapter") and is_peft_model(checkpoint):
        warning = (
            f"{checkpoint.path}: these are the names of a PEFT model, base and adapter in one, which neither"
            " from_pretrained nor PeftModel loads. --adapter writes the adapter alone; --fold-lora folds a LoRA into"
            " its base"
        )
        return Chosen(checkpoint, near=near, warnings=(warning,))
    return Chosen(checkpoint, near=near)


def _open_base(options: AdapterOptions) -> Checkpoint | None:
    """Open the base model, of which no command chooses one of several."""
    if options.base is None:
        return None
    try:
        return open_checkpoint(options.base, follow_links=options.follow_links)
    except SeveralModelsError as several:
        advice = "merge the base with dsconv merge and --item, and give the merged folder to --base"
        raise SeveralModelsError(several.where, several.models, advice) from None
