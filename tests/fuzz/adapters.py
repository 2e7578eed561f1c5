"""The fuzzer of the files beside an adapter: adapter_config.json, verl's lora_train_meta.json, and config.json.

The merge that each of them decides is planned: of the adapter alone, of a fold, and of the model as it is.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import dsconv
from dsconv.errors import DsconvError
from tests.fixtures import gloo
from tests.fuzz.fields import Document, Fields, json_bytes, plain_value
from tests.fuzz.targets import Seeds, Target
from tests.fuzz.trees import fields

CASE = "llama_lora-z2-bf16-w2"
ACTIONS: tuple[dict[str, Any], ...] = ({"adapter": True}, {"fold_lora": True}, {})


class Adapters(Fields):
    """Changes of one field of a JSON file beside an adapter, with which merges are then planned."""

    name = "adapters"
    share = 1

    def __init__(self, seeds: Seeds) -> None:
        Target.__init__(self, seeds)
        self.documents: list[Document] = []
        source = gloo.ensure("zero", [CASE])[CASE] / "ckpt"
        peft = Path(shutil.copytree(source, self.folder / "peft"))
        verl = Path(shutil.copytree(source, self.folder / "verl"))
        settings = json.loads((verl / "adapter_config.json").read_text())
        (verl / "adapter_config.json").unlink()
        meta = {"r": settings["r"], "lora_alpha": settings["lora_alpha"], "task_type": "CAUSAL_LM"}
        (verl / "lora_train_meta.json").write_text(json.dumps(meta))
        for path in (peft / "adapter_config.json", peft / "config.json", verl / "lora_train_meta.json"):
            sound = path.read_bytes()
            tree = json.loads(sound)

            def write(edits, tree=tree):  # type: ignore[no-untyped-def]
                return json_bytes(tree, edits)

            self.documents.append(Document(path, path.parent, fields(tree), tree, write, sound, plain_value))
        self.opened = {folder: dsconv.open_checkpoint(folder) for folder in (peft, verl)}
        self.kinds = [[document] for document in self.documents]
        for checkpoint in (peft, verl):
            for action in range(len(ACTIONS)):  # so that what is imported for it is imported
                with contextlib.suppress(DsconvError):
                    self.use(checkpoint, action)

    def use(self, checkpoint: Path, action: int) -> None:
        """Plan a merge, without asking transformers, which takes a process of its own."""
        opened = self.opened[checkpoint]
        with mock.patch("dsconv.convert.loadable._has", return_value=False):
            dsconv.merge(opened, self.folder / "out", dry_run=True, **ACTIONS[action % len(ACTIONS)])
