"""The files of a universal checkpoint: which states go where, in which form, and what else the loader needs.

Read from DeepSpeed: ``checkpoint/ds_to_universal.py`` (names of files, keys of a state's file), and what the
loaders ask for, ``checkpoint/universal_checkpoint.py`` and ``runtime/base_optimizer.py`` (stages 1 and 2: a dict with
``param``, a ``step.pt`` per parameter, ``param_groups`` and ``ds_version`` in ``zero/optimizer_state.pt``),
``runtime/zero/stage3.py`` (``load_hp_checkpoint_state_from_checkpoint_dir_stage3``: a dict or a bare tensor,
``optimizer_state_dict`` with a step and ``param_groups``), ``runtime/engine.py`` (``_get_all_ckpt_names``: the model
states by the name of the loading stage). All of that is written, so that any stage loads the result; the official
tool's output is read by the stage it came from.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import BY_NAME
from dsconv.checkpoint.map.training import Training
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.convert.torch_writer import Streamed, TorchArchive
from dsconv.convert.universal_files import StateFile, Stream
from dsconv.convert.universal_model import FORMAT_VERSION, model_states, require_loadable
from dsconv.convert.universal_patterns import written_form
from dsconv.errors import MalformedError, UnsafeError, UnsupportedError
from dsconv.text import quote

FOLDER = "zero"
LATEST = "latest_universal"
MEMBERS = "dsconv_parameter_groups"
SETTINGS = f"{FOLDER}/optimizer_state.pt"
READS_DICTS = (
    0,
    19,
    4,
)  # stage 3 of 0.19.0 reads bare tensors only (``stage3.py`` ``load_hp_checkpoint_state``), 0.19.4 both
MAX_NAME_BYTES = 255 - len("/exp_avg_sq.pt")


@dataclass(frozen=True)
class ModelFile:
    """A model-states file, copied as it is."""

    path: str
    source: Path
    nbytes: int


@dataclass(frozen=True)
class UniversalPlan:
    """The whole content of a universal checkpoint.

    Attributes:
        states: The files in ``zero/``.
        models: The model-states files of the source, which are copied.
        links: {second name of a model-states file: its name}.
        made: The model states, where the source has none.
        warnings: What the loaders of DeepSpeed cannot do with it.
    """

    states: tuple[StateFile, ...]
    models: tuple[ModelFile, ...]
    links: Mapping[str, str]
    made: StateFile | None = None
    warnings: tuple[str, ...] = ()

    @property
    def written(self) -> tuple[StateFile, ...]:
        """The files that are not copies."""
        return self.states if self.made is None else (*self.states, self.made)

    @property
    def model_names(self) -> list[str]:
        """The names of the model-states files."""
        return [*(model.path for model in self.models), *((self.made.path,) if self.made is not None else ())]

    @property
    def nbytes(self) -> int:
        return sum(file.nbytes for file in self.written) + sum(file.nbytes for file in self.models)


def training_of(checkpoint: Checkpoint, output: str = "a universal checkpoint") -> Training:
    """Return the optimizer's side of ``checkpoint``; ``output`` is what is made of it, for messages.

    Raises:
        UnsupportedError: it holds no optimizer states, or none that are read.
    """
    if checkpoint.training is None:
        raise UnsupportedError(
            f"{checkpoint.path}: a {checkpoint.format} checkpoint; {output} is made from one of"
            " DeepSpeed's or a DCP directory that holds the optimizer's"
            f" states{': ' if checkpoint.no_training else ''}{checkpoint.no_training}"
        )
    return checkpoint.training()


def plan_universal(checkpoint: Checkpoint, training: Training, exclude_frozen: bool = False) -> UniversalPlan:
    """Lay out the universal checkpoint of ``checkpoint``.

    Raises:
        UnsafeError: a parameter's name cannot be a file's name.
        UnsupportedError: the format has no place for something that the checkpoint holds.
    """
    warnings = [] if training.model_files else require_loadable(checkpoint, training)
    # A dict says how to cut; releases that read no dicts never cut.
    uncut = checkpoint.world.get("model_parallel", 1) == 1
    flat = training.stage == 3 and uncut and _version(training.deepspeed_version) < READS_DICTS
    files: list[StateFile] = []
    for name, states in training.states.items():
        folder = _folder(training.stored.get(name, name), checkpoint)
        master, cut = checkpoint[name], training.cut(name)
        for state, entry in {"fp32": master, **states}.items():
            _check_name(state, f"{checkpoint.path}: the optimizer's state")
            shape, said, kept = written_form(cut, name, entry, checkpoint.path)
            value: Any = (
                Streamed(entry.dtype, (kept.numel,)) if flat else {**said, "param": Streamed(entry.dtype, shape)}
            )
            keys = () if flat else ("param",)
            stream = Stream(kept, entry.dtype, keys)
            files.append(StateFile(f"{folder}/{state}.pt", TorchArchive(state, value), (stream,)))
        if name in training.steps:
            files.append(StateFile(f"{folder}/step.pt", TorchArchive("step", training.steps[name])))
    float32 = BY_NAME["float32"]
    for name, entry in training.module.items():
        if exclude_frozen:
            break
        value = {"param": Streamed(float32, entry.shape)}
        files.append(
            StateFile(
                f"{_folder(training.stored.get(name, name), checkpoint)}/fp32.pt",
                TorchArchive("fp32", value),
                (Stream(entry, float32, ("param",)),),
                entry.role,
            )
        )
    files.append(StateFile(SETTINGS, TorchArchive("optimizer_state", _settings(training))))
    models = tuple(ModelFile(path.name, path, path.stat().st_size) for path in training.model_files)
    made = None if models else model_states(checkpoint, training)
    names = [model.path for model in models] if made is None else [made.path]
    return UniversalPlan(tuple(files), models, dict(_links(names)), made, tuple(warnings))


def _links(names: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield the model states of data-parallel rank 0 under the name that the other stages look for."""
    for name in sorted(names):
        other = name.removeprefix("zero_pp_rank_0_") if name.startswith("zero_pp_rank_0_") else f"zero_pp_rank_0_{name}"
        if name.startswith(("mp_rank_", "zero_pp_rank_0_")) and other not in names:
            yield other, name


def _settings(training: Training) -> dict[str, Any]:
    """Return ``optimizer_state.pt``: the keys that stages 1 and 2 read, and beside them those of stage 3."""
    step = next(iter(training.steps.values()), None)
    state = {} if step is None else {0: {"step": step}}
    settings = {**training.settings, "param_groups": training.param_groups}
    if isinstance(settings.get("group_paddings"), list):
        settings["group_paddings"] = [0] * len(settings["group_paddings"])  # the states are written without
    # The reader's own sign that the model states list no parameters; DeepSpeed looks at the rest only.
    if training.stage == 0 and training.model_files:
        settings["zero_stage"] = 0
        settings[MEMBERS] = [list(group) for group in training.members]  # nothing else tells
    version = training.deepspeed_version if training.model_files else FORMAT_VERSION
    if version is not None:
        settings.setdefault("ds_version", version)
    settings["optimizer_state_dict"] = {"state": state, "param_groups": training.param_groups}
    return settings


def _folder(name: str, checkpoint: Checkpoint) -> str:
    _check_name(name, f"{checkpoint.path}: a parameter")
    if f"{FOLDER}/{name}" == SETTINGS:
        raise MalformedError(
            f"{checkpoint.path}: a parameter is named {quote(name)}, as a file of a universal checkpoint is"
        )
    return f"{FOLDER}/{name}"


def _check_name(name: str, what: str) -> None:
    if (
        not name
        or name in (".", "..")
        or "/" in name
        or "\0" in name
        or len(name.encode("utf-8", "replace")) > MAX_NAME_BYTES
    ):
        raise UnsafeError(f"{what} is named {safe_repr(name)}, which cannot be the name of a folder; refused")


def _version(text: str | None) -> tuple[int, ...]:
    """Return (0, 19, 8) for '0.19.8+cpu', and the newest version where nothing is known."""
    match = re.match(r"(\d{1,6})\.(\d{1,6})(?:\.(\d{1,6}))?", text or "")
    return tuple(int(part or 0) for part in match.groups()) if match else READS_DICTS
