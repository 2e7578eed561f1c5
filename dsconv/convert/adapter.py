"""LoRA and other PEFT adapters out of a training checkpoint, as a folder that ``PeftModel.from_pretrained`` loads.

PEFT names an adapter's tensors with the adapter's name inside (``lora_A.default.weight``) and saves them without it
(peft 0.21 ``utils/save_and_load.py`` ``get_peft_model_state_dict``); whole modules that were trained lie under
``modules_to_save.<adapter>.``.
"""

from __future__ import annotations

import re
from pathlib import Path

from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.map.tensors import Checkpoint
from dsconv.convert.plan import Plan, find_config, make_plan
from dsconv.convert.sidecars import read_json
from dsconv.errors import CheckpointNotFoundError, MalformedError

STEM = "adapter_model"
CONFIG = "adapter_config.json"
# Parameters of PEFT's methods whose name is followed by the adapter's.
ADAPTER_PART = re.compile(
    r"\.((?:lora|vera|loha|hada|lokr|oft|boft|ia3|hra|randlora|adalora|bone|miss|vblora|fourierft|prompt)_\w+)\.(\w+)(?=\.|$)"
)
SAVED_MODULE = re.compile(r"\.modules_to_save\.(\w+)\.")


def adapter_name(name: str) -> tuple[str, str] | None:
    """(the name to save under, the adapter's name) of a tensor that belongs to an adapter; None for any other."""
    if match := SAVED_MODULE.search(name):
        return name[: match.start()] + "." + name[match.end() :], match[1]
    if match := ADAPTER_PART.search(name):
        return name[: match.end(1)] + name[match.end(2) :], match[2]
    return None


def adapter_plan(
    checkpoint: Checkpoint, folders: list[Path], dtype: DType | None, max_shard_bytes: int
) -> tuple[Plan, dict[str, bytes]]:
    """The plan of an adapter folder, and the files beside it.

    Raises CheckpointNotFoundError when there is no adapter_config.json, which holds what the weights do not say (alpha,
    task type, base model); MalformedError when the checkpoint has no adapter, or has several.
    """
    named = {name: adapter_name(name) for name in checkpoint}
    adapters = sorted({found[1] for found in named.values() if found})
    if not adapters:
        raise MalformedError(
            f"{checkpoint.path}: no tensor belongs to a PEFT adapter (no lora_A, modules_to_save …); merge without"
            " --adapter"
        )
    if len(adapters) > 1:
        raise MalformedError(
            f"{checkpoint.path}: holds {len(adapters)} adapters ({', '.join(adapters)}); --adapter writes one"
        )
    config = find_config(folders, CONFIG)
    if config is None:
        raise CheckpointNotFoundError(
            f"{checkpoint.path}: no {CONFIG} beside the checkpoint; it holds what the weights do not (alpha, base"
            " model). Name the folder that has it with --config-from (PeftModel.save_pretrained writes it)"
        )
    if not isinstance(read_json(config), dict):
        raise MalformedError(f"{config}: not JSON")
    new_names = {name: found[0] for name, found in named.items() if found}
    plan = make_plan(
        checkpoint,
        dtype=dtype,
        max_shard_bytes=max(max_shard_bytes, checkpoint.nbytes * 2),
        rename=new_names.get,
        stem=STEM,
    )
    return plan, {CONFIG: config.read_bytes()}
