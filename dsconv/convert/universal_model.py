"""The model-states file of a universal checkpoint whose source was no run of DeepSpeed's and has none.

DeepSpeed's loader takes the engine's counters and the state of the learning-rate schedule from it
(``runtime/engine.py`` ``_load_checkpoint``), dsconv's the names, groups and shapes of the parameters, frozen weights
and buffers. The file has the form of stages 1 and 2 (``_common_checkpoint_state``).
"""

from __future__ import annotations

from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.training import SmallTensor, Training
from dsconv.convert.pickling import size
from dsconv.convert.torch_writer import Streamed, TorchArchive
from dsconv.convert.universal_files import StateFile, Stream
from dsconv.errors import UnsupportedError
from dsconv.text import quote

MODEL_STATES = "mp_rank_00_model_states.pt"
FORMAT_VERSION = "0.19.8"  # the release of DeepSpeed whose form is written
OF_STAGE3 = ("exp_avg", "exp_avg_sq")  # runtime/zero/stage3.py load_hp_checkpoint_state_from_checkpoint_dir_stage3
RESERVED = {"fp32", "step"}  # files beside those of the states
OTHERWISE = "dsconv merge converts the weights alone"


def require_loadable(checkpoint: Checkpoint, training: Training) -> list[str]:
    """Refuse a training state that DeepSpeed's loaders would load in part, or as another one.

    They keep one step count and one set of states for each parameter group (``runtime/base_optimizer.py``
    ``load_hp_checkpoint_state_from_checkpoint_dir``), and stage 3 one step count for all of them.

    Args:
        checkpoint: The source.
        training: Its optimizer's side.

    Returns:
        Warnings.

    Raises:
        UnsupportedError: A state has no place in a universal checkpoint, or parameters differ in their steps or states.
    """
    where = f"{checkpoint.path}: the optimizer"
    if training.left_out:
        raise UnsupportedError(
            f"{where} keeps {', '.join(map(quote, training.left_out))}, which is not of one value a weight; a universal"
            f" checkpoint has no place for it. {OTHERWISE}"
        )
    groups = len(training.param_groups)
    if len(training.members) != groups:
        raise UnsupportedError(
            f"{where} has {groups} parameter groups, and the checkpoint does not say which parameters are in which."
            f" {OTHERWISE}"
        )
    names = [name for group in training.members for name in group]
    if not any(training.states.get(name) for name in names):
        raise UnsupportedError(f"{where} keeps no state of any parameter. {OTHERWISE}")
    first = next(name for name in names if training.states.get(name))
    kinds, step = training.states[first].keys(), training.steps.get(first)
    if taken := RESERVED & kinds:
        raise UnsupportedError(
            f"{where} keeps a state called {quote(min(taken))}, which is the name of another file there. {OTHERWISE}"
        )
    for name in names:
        states = training.states.get(name, {})
        if states.keys() != kinds:
            odd = min(states.keys() ^ kinds)
            has, lacks = (name, first) if odd in states else (first, name)
            raise UnsupportedError(
                f"{where} keeps {quote(odd)} of {quote(has)} and not of {quote(lacks)} (which may never have had a"
                f" gradient); DeepSpeed keeps the same states of all parameters. {OTHERWISE}"
            )
        if training.steps.get(name) != step:
            raise UnsupportedError(
                f"{where} has taken {_number(training.steps.get(name))} steps with {quote(name)} and {_number(step)}"
                f" with {quote(first)}; DeepSpeed counts steps for all parameters together. {OTHERWISE}"
            )
    if set(kinds) == set(OF_STAGE3) and step is not None:
        return []
    kept = ", ".join((*sorted(kinds), *(("no step count",) if step is None else ())))
    return [
        (
            f"the optimizer keeps {kept}: DeepSpeed loads that at stages 1 and 2 only. At stage 3 it loads exp_avg,"
            " exp_avg_sq and a step count, whatever there is"
        )
    ]


def _number(step: Any) -> Any:
    return step.number if isinstance(step, SmallTensor) else step


def model_states(checkpoint: Checkpoint, training: Training) -> StateFile:
    """Return the model-states file.

    Args:
        checkpoint: The source.
        training: Its optimizer's side, which ``require_loadable`` accepted.

    Raises:
        UnsupportedError: The state of the schedule holds something else than plain values.
    """
    counters = dict(training.counters())
    entries = list(checkpoint.values())
    roles = {name: entry.role for name, entry in training.module.items()}
    value = {
        "module": {entry.name: Streamed(entry.dtype, entry.shape) for entry in entries},
        "buffer_names": [name for name, role in roles.items() if role == "buffer"],
        "optimizer": None,
        "param_shapes": [{name: size(checkpoint[name].shape) for name in group} for group in training.members],
        "frozen_param_shapes": None,
        "frozen_param_fragments": None,
        "shared_params": checkpoint.ties,
        "lr_scheduler": counters.pop("lr_scheduler", None),
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": [],
        **counters,
        "dp_world_size": max(1, checkpoint.world.get("ranks", 1)),
        "mp_world_size": 1,
        "ds_config": {},
        "ds_version": FORMAT_VERSION,
    }
    archive = TorchArchive(MODEL_STATES.removesuffix(".pt"), value)
    streams = tuple(Stream(entry, entry.dtype, ("module", entry.name)) for entry in entries)
    return StateFile(MODEL_STATES, archive, streams)
