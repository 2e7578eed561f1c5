"""Find weights that lie in a model's folder and that nobody reads, such as a value head beside an adapter.

transformers and PEFT read one form of the weights, and so does dsconv. A trainer may put more beside it: TRL 0.11
``models/modeling_base.py`` ``PreTrainedModelWrapper.save_pretrained`` writes a value head as ``pytorch_model.bin``
beside PEFT's ``adapter_model.safetensors``, and LLaMA-Factory writes ``value_head.safetensors``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from dsconv.checkpoint.formats.huggingface.safetensors import read_file
from dsconv.checkpoint.formats.huggingface.torch_bin import SUFFIXES, StateDict
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.checkpoint.storage.hub import HubPath
from dsconv.checkpoint.storage.local import is_remote
from dsconv.errors import DsconvError
from dsconv.text import count

WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)")
# What trainers keep beside weights and is none, models that accelerate numbers (--item chooses), and Meta's and
# Mistral's own form of the same weights.
NO_OTHER = re.compile(
    r"(optimizer|scheduler|lr_scheduler|scaler|sampler|rng_state|random_states|training_args|trainer_state|consolidated)"
    r".*|(model|pytorch_model)_\d+\..*"
)
MAX_FILES = 64


def unread_weights(checkpoint: Checkpoint) -> list[str]:
    """Return a warning for each file of a Hugging Face folder whose weights are not those of the checkpoint.

    A file of which no tensor has a name of the checkpoint's holds other weights. One that shares names is another form
    of the same save, which may name tied weights twice and keep masks: there, only a matrix counts. Only a folder of
    the local disk is looked at: elsewhere, what is not wanted is not fetched.

    Args:
        checkpoint: What was read; a single file, or a format other than transformers' and PEFT's, gives no warning.
    """
    if not checkpoint.sources or not all(WEIGHTS.fullmatch(source.name) for source in checkpoint.sources):
        return []
    folder = checkpoint.sources[0].parent
    if checkpoint.path != folder or is_remote(folder) or isinstance(folder, HubPath):
        return []
    known = {name for entry in checkpoint.values() for name in (entry.name, *entry.aliases)}
    known |= {f"{prefix}{name}" for prefix in checkpoint.info.get("removed_prefixes", ()) for name in known}
    warnings = []
    for path in _others(checkpoint, folder):
        try:
            entries = _entries(path)
        except (DsconvError, OSError):  # no weights, or a file that nothing here needs
            continue
        new = [entry for entry in entries if not known.intersection((entry.name, *entry.aliases))]
        is_another_form = len(new) < len(entries)
        lost = [entry for entry in new if entry.dtype.floating and (len(entry.shape) in (2, 3) or not is_another_form)]
        if lost:
            what = count(len(lost), "tensor")
            warnings.append(
                f"{path.name} was not read: it holds {what} that {checkpoint.sources[0].name} does not, the first"
                f" {safe_repr(lost[0].name)} of shape {list(lost[0].shape)}. Merge {path} by itself to have them"
            )
    return warnings


def _entries(path: Path) -> list[TensorEntry]:
    return list((read_file(path) if path.suffix == ".safetensors" else StateDict(path).entries()).values())


def _others(checkpoint: Checkpoint, folder: Path) -> Iterator[Path]:
    taken = {source.name for source in checkpoint.sources}
    found = 0
    for path in sorted(folder.iterdir()):
        if path.suffix not in (".safetensors", *SUFFIXES) or path.name in taken or NO_OTHER.fullmatch(path.name):
            continue
        if not path.is_file():
            continue
        found += 1
        if found > MAX_FILES:
            return
        yield path
