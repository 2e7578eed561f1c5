"""A checkpoint, its optimizer's states too, under other names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from dsconv.checkpoint.map.tensors import Checkpoint, TensorEntry
from dsconv.checkpoint.map.training import Training


def renamed(checkpoint: Checkpoint, names: Mapping[str, str]) -> Checkpoint:
    """``checkpoint`` with each tensor that ``names`` has under its new name, {old: new}; others and tied names stay."""

    def named(entry: TensorEntry) -> TensorEntry:
        return replace(entry, name=names.get(entry.name, entry.name))

    training = checkpoint.training
    entries = {names.get(name, name): named(entry) for name, entry in checkpoint.items()}
    return Checkpoint(
        checkpoint.path,
        checkpoint.format,
        entries,
        folder=checkpoint.folder,
        step=checkpoint.step,
        world=checkpoint.world,
        info=checkpoint.info,
        warnings=checkpoint.warnings,
        sources=checkpoint.sources,
        is_deepspeed=checkpoint.is_deepspeed,
        training=(lambda: _training(training(), names)) if training is not None else None,
        no_training=checkpoint.no_training,
    )


def _training(training: Training, names: Mapping[str, str]) -> Training:
    old = {new: name for name, new in names.items()}
    states = {
        names.get(name, name): {
            state: replace(entry, name=f"{names.get(name, name)}/{state}") for state, entry in of.items()
        }
        for name, of in training.states.items()
    }
    return replace(
        training,
        states=states,
        steps={names.get(name, name): step for name, step in training.steps.items()},
        module={
            names.get(name, name): replace(entry, name=names.get(name, name)) for name, entry in training.module.items()
        },
        cut=lambda name: training.cut(old.get(name, name)),
    )
