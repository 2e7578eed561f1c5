"""Summarise a checkpoint for people: who wrote it, what kind of model it is, and its tensors layer by layer."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.map.training import SmallTensor
from dsconv.checkpoint.pickles.values import MAX_NUMEL
from dsconv.checkpoint.storage.hub import HubPath
from dsconv.checkpoint.storage.local import is_remote
from dsconv.errors import DsconvError
from dsconv.text import MAX_MESSAGE, clean, count

# Files and folders that only one trainer writes, each with the trainer; looked for in and around the checkpoint.
MARKS = (
    ("trainer_state.json", "the Trainer of transformers"),
    ("fsdp_config.json", "verl"),
    ("latest_checkpointed_iteration.txt", "Megatron-core"),
    (".hf_metadata", "NeMo Automodel"),
    ("pytorch_model_fsdp_0", "accelerate"),
    ("optimizer_0", "accelerate"),
)
TORCHTITAN = {"train_state", "dataloader"}  # the dictionaries beside its weights
INDEX = re.compile(r"\d{1,9}")
MAX_RUNS = 4


@dataclass
class Group:
    """Tensors whose names differ in numbers alone, and which have one dtype, shape and role.

    Attributes:
        before: What all names have before the first number; the whole name of a tensor that stands alone.
        after: The rest, with a range in the place of each further number.
        indices: The first numbers, as ranges; "" for a tensor that stands alone.
        entries: The tensors.
    """

    before: str
    after: str
    indices: str
    entries: list[TensorEntry] = field(default_factory=list)

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.entries)

    @property
    def layers(self) -> tuple[str, str]:
        """What groups of the same layers share."""
        return self.before, self.indices


def trainer_of(found: Checkpoint) -> str:
    """Return who wrote a checkpoint, or "" if its files do not tell."""
    if "Lightning" in found.format:
        return "PyTorch Lightning"
    if found.format.startswith("verl"):
        return "verl"
    if set(found.info.get("left_out") or ()) >= TORCHTITAN:
        return "torchtitan"
    sources = [source.parent for source in found.sources[:1]]
    for mark, trainer in MARKS:
        for folder in dict.fromkeys([found.path, found.folder, *sources, *(source.parent for source in sources)]):
            if _exists(folder / mark) or folder.name == mark:
                return trainer
    return "DeepSpeed" if found.is_deepspeed else ""


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def content_of(found: Checkpoint) -> str:
    """Return the kind of model that the names in a checkpoint show, such as a LoRA or a value head, or ""."""
    names = [name for entry in found.values() for name in (entry.name, *entry.aliases)]
    parts = {part for name in names for part in name.split(".")}
    kinds = []
    if lora := sum(1 for name in names if "lora_" in name):
        alone = lora == len(names) or bool(found.info.get("adapter"))
        part = f"{lora:,} of {count(len(names), 'tensor')}"
        kinds.append("a LoRA adapter of PEFT" if alone else f"a LoRA run of PEFT ({part})")
    elif found.info.get("adapter") or any(name.startswith("base_model.model.") for name in names):
        kinds.append("an adapter of PEFT")
    if parts & {"v_head", "value_head"}:
        kinds.append("a value head")
    if any(INDEX.fullmatch(b) and a in ("experts", "deepspeed_experts") for n in names for a, b in _pairs(n)):
        kinds.append("a mixture of experts")
    return ", ".join(kinds)


def _pairs(name: str) -> Iterable[tuple[str, str]]:
    return itertools.pairwise(name.split("."))


def grouped(entries: Iterable[TensorEntry]) -> list[Group]:
    """Group tensors that layers repeat.

    Args:
        entries: The tensors, in the order in which they are stored.

    Returns:
        The groups in the order of their first tensors, those of the same layers together.
    """
    found: dict[tuple[tuple[str, ...], ...], list[tuple[tuple[int, ...], TensorEntry]]] = {}
    for entry in entries:
        parts = entry.name.split(".")
        numbers = tuple(int(part) for part in parts if INDEX.fullmatch(part))
        template = tuple("*" if INDEX.fullmatch(part) else part for part in parts)
        alone = (entry.name,) if entry.aliases or not numbers else ()
        kind = (entry.dtype.name, str(entry.shape), entry.role)
        found.setdefault((template, kind, alone), []).append((numbers, entry))
    groups: dict[tuple[str, str], list[Group]] = {}
    for key, members in found.items():
        for group in _split(key[0], members):
            groups.setdefault(group.layers, []).append(group)
    return [group for together in groups.values() for group in together]


def _split(template: Sequence[str], members: list[tuple[tuple[int, ...], TensorEntry]]) -> list[Group]:
    """Return one group, or one for each tensor unless they are all that their numbers allow."""
    columns = [sorted(set(column)) for column in zip(*(numbers for numbers, _ in members), strict=True)]
    if len(members) == 1 or math.prod(map(len, columns)) != len(members):
        return [Group(entry.name, "", "", [entry]) for _, entry in members]
    ranges = [ranges_of(column) for column in columns]
    at = template.index("*")
    rest = iter(ranges[1:])
    after = [next(rest) if part == "*" else part for part in template[at + 1 :]]
    return [Group(".".join(template[:at]), ".".join(after), ranges[0], [entry for _, entry in members])]


def ranges_of(numbers: Sequence[int]) -> str:
    """Return sorted numbers as ``0–3,8,10–11``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = [str(low) if low == high else f"{low}–{high}" for low, high in runs[:MAX_RUNS]]
    return ",".join(shown) + (",…" if len(runs) > MAX_RUNS else "")


@dataclass
class OptimizerSummary:
    """What a checkpoint holds of its optimizer.

    Attributes:
        states: {state, such as exp_avg: how many parameters have it}.
        parameters: How many parameters were trained.
        steps: The step counts of the parameters, each once.
        groups: {setting: value} of each parameter group, as far as values are numbers, with the number of its
            ``parameters`` where that is known.
        left_out: The states that are not of one value a weight, which no conversion takes.
        not_read: Why there is nothing else here; "" where there is.
    """

    states: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    steps: list[float] = field(default_factory=list)
    groups: list[dict[str, float]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    not_read: str = ""

    def __str__(self) -> str:
        if self.not_read:
            return f"not read: {self.not_read}"
        kinds = ", ".join((*self.states, *(f"{name} (not converted)" for name in self.left_out))) or "no states"
        steps = f", step {', '.join(f'{step:g}' for step in self.steps[:MAX_RUNS])}" if self.steps else ""
        rates = dict.fromkeys(f"{group['lr']:g}" for group in self.groups if "lr" in group)
        lr = f" with lr {', '.join(list(rates)[:MAX_RUNS])}" if rates else ""
        return f"{kinds} of {count(self.parameters, 'parameter')}{steps}, {count(len(self.groups), 'group')}{lr}"


def optimizer_of(found: Checkpoint) -> OptimizerSummary | None:
    """Return what a checkpoint holds of its optimizer; None where there is nothing to say.

    Only metadata is read. That of model-parallel ranks and of files that are not on this disk is not, since joining the
    ranks compares the states that several of them hold.
    """
    if found.training is None:
        return OptimizerSummary(not_read=found.no_training) if found.no_training else None
    if found.world.get("model_parallel", 1) > 1 or is_remote(found.path) or isinstance(found.path, HubPath):
        return None
    try:
        training = found.training()
    except DsconvError as error:
        return OptimizerSummary(not_read=clean(str(error), MAX_MESSAGE))
    states: dict[str, int] = {}
    for of in training.states.values():
        for state in of:
            states[state] = states.get(state, 0) + 1
    groups: list[dict[str, Any]] = [
        {key: value for key, value in group.items() if isinstance(key, str) and _is_number(value)}
        for group in training.param_groups
    ]
    if len(training.members) == len(groups):
        groups = [{"parameters": len(m), **group} for m, group in zip(training.members, groups, strict=True)]
    steps: Iterable[Any] = (step.number if isinstance(step, SmallTensor) else step for step in training.steps.values())
    return OptimizerSummary(
        states,
        len(training.states),
        sorted({float(step) for step in steps if _is_number(step)}),
        groups,
        list(training.left_out),
    )


def _is_number(value: object) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < MAX_NUMEL  # a larger one is no float
    return isinstance(value, float) and math.isfinite(value)
