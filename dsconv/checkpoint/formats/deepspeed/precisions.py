"""Optimizer files from two runs in one tag: which of them the model states belong to.

DeepSpeed names the optimizer files of a bf16 run ``bf16_zero_pp_rank_*`` and those of other runs ``zero_pp_rank_*``
(``runtime/engine.py`` ``_get_zero_ckpt_prefix``), while the model states have one name. A run that saves under
the tag of another run, in another precision, so leaves the optimizer files of both. The model states are of the run
that saved last, and they hold its configuration. File times tell nothing: a copy gives files any time.
"""

from __future__ import annotations

from dataclasses import replace

from dsconv.checkpoint.formats.deepspeed.model_states import ModuleStates, read_module_states
from dsconv.checkpoint.pickles.values import TensorRef
from dsconv.errors import InconsistentCheckpointError
from dsconv.zero_utils.tag_folder import TagFolder

BF16 = "bf16_"
FIRST_RELEASE_WITH_PREFIX = (0, 7)  # older ones may name a bf16 run's files without it
BF16_KEYS = ("bf16", "bfloat16")  # of ds_config; the second is the spelling of old releases


def with_one_kind(folder: TagFolder) -> TagFolder:
    """Return ``folder`` with the optimizer files of the run that wrote the model states.

    Raises:
        InconsistentCheckpointError: There are optimizer files of two kinds, and the model states do not say which kind
            is theirs; or there are none of the kind that they name.
    """
    if not folder.kinds:
        return folder
    path = next(iter((*folder.model.values(), *folder.zero3.values())), None)
    states = read_module_states(path) if path is not None else None
    if states is not None:
        folder.read_already[states.path] = states
    is_bf16 = _is_bf16(states) if states is not None else None
    if len(folder.kinds) == 1:
        (form,) = folder.kinds
        if states is not None and is_bf16 is not None and form.startswith(BF16) != is_bf16 and _has_prefix(states):
            raise InconsistentCheckpointError(
                f"{folder.path}: by its configuration {states.path.name} is from a run"
                f" {'in' if is_bf16 else 'without'} bf16, whose optimizer files are called"
                f" {BF16 if is_bf16 else ''}zero_pp_rank_*; here are only {form}, which another run saved. Copy the"
                " right files from the nodes that wrote them"
            )
        return folder
    mine = [form for form in folder.kinds if is_bf16 is not None and form.startswith(BF16) == is_bf16]
    if len(mine) != 1 or states is None:
        raise InconsistentCheckpointError(
            f"{folder.path}: holds optimizer files of {len(folder.kinds)} runs ({' and '.join(folder.kinds)}), and the"
            " model states do not say which of them are theirs. Move the files of one kind to another folder"
        )
    others = [form for form in folder.kinds if form not in mine]
    found = replace(folder, optimizer=folder.kinds[mine[0]], chosen=True, warnings=list(folder.warnings))
    found.warnings.append(
        f"{' and '.join(others)} are left out: another run saved them under this tag. By its configuration,"
        f" {states.path.name} belongs to {mine[0]}"
    )
    return found


def _is_bf16(states: ModuleStates) -> bool | None:
    """Return whether the run that wrote the model states was in bf16, or None if they do not tell."""
    sections = [states.config[key] for key in BF16_KEYS if isinstance(states.config.get(key), dict)]
    said = [section.get("enabled") for section in sections if isinstance(section.get("enabled"), bool)]
    dtypes = {value.dtype.name for value in states.module.values() if isinstance(value, TensorRef) and value.numel}
    if states.config:
        told = any(said)
        trained = {name for group in states.param_shapes for name in group}
        held = {states.module[name].dtype.name for name in trained if isinstance(states.module.get(name), TensorRef)}
        held &= dtypes
        # The weights themselves must not say otherwise: bf16 runs hold bf16 weights, and others none.
        return None if held and told != ("bfloat16" in held) else told
    return "bfloat16" in dtypes if dtypes else None


def _has_prefix(states: ModuleStates) -> bool:
    """Return whether the release that wrote the model states is known to name the files of bf16 runs otherwise."""
    parts = (states.ds_version or "").split(".")[:2]
    return (
        len(parts) == 2
        and all(part.isdecimal() and len(part) < 10 for part in parts)
        and ((int(parts[0]), int(parts[1])) >= FIRST_RELEASE_WITH_PREFIX)
    )
