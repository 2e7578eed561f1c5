"""A folder of safetensors as a destination: shards, an index, the files beside them, and the manifest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsconv._version import __version__
from dsconv.checkpoint.formats.huggingface.safetensors import ADAPTER, SINGLE
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.transfer.copy import Target
from dsconv.convert.destination import Destination, FileRange, FillingFile, OutputFile, Written
from dsconv.convert.filters import Filters
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.plan import Plan
from dsconv.convert.report import Report, tensor_row


class SafetensorsOutput(Destination):
    """The shards of a plan, what goes beside them, and a manifest with the CRC-32 of each tensor.

    Args:
        checkpoint: the source.
        plan: where each tensor goes.
        sidecars: {name: content} of the files beside the weights.
        report: takes over what the copy did, and says what else the manifest holds.
        ties: {name: the name of the tensor that holds its data}.
        filters: what was left out and renamed, which the manifest keeps.
        in_place: whether the sidecars were read from the target itself, and so may change there.
    """

    what = "a model"
    command = "merge"

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        sidecars: Mapping[str, bytes],
        report: Report,
        ties: Mapping[str, str],
        filters: Filters | None = None,
        in_place: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._plan = plan
        self._sidecars = sidecars
        self._report = report
        self._ties = ties
        self._filters = filters
        self._in_place = in_place
        self._index = plan.index()
        self._ranges: dict[str, FileRange] = {}

    @property
    def files(self) -> Sequence[OutputFile]:
        """The shards."""
        return [OutputFile(shard.filename, shard.nbytes, shard.data_bytes, shard.header) for shard in self._plan.shards]

    def targets(self, files: Mapping[str, FillingFile]) -> Iterable[tuple[str, TensorEntry, Target]]:
        """Yield the tensors of each shard in their order."""
        for shard in self._plan.shards:
            for tensor in shard.tensors:
                offset = len(shard.header) + tensor.offset_bytes
                filled = self._ranges[tensor.name] = files[shard.filename].range(offset, tensor.nbytes)
                yield shard.filename, tensor.entry, Target(tensor.name, tensor.dtype, filled.write)

    def small_files(self, written: Written) -> Mapping[str, bytes]:
        """Return the sidecars, the manifest, and the index if there are several shards."""
        self._report.note_copy(written)
        small = {**self._sidecars, MANIFEST: self._manifest(written.digests)}
        return small if self._index is None else {**small, self._plan.index_name: self._index}

    def rows(self) -> list[dict[str, Any]]:
        """Return the plan, a row for each tensor."""
        return [
            tensor_row(t.name, t.entry, t.dtype, shard.filename, t.offset_bytes)
            for shard in self._plan.shards
            for t in shard.tensors
        ]

    @property
    def commit_order(self) -> Sequence[str]:
        """The index makes the folder a model, or the only shard."""
        shards = [shard.filename for shard in self._plan.shards]
        return [*self._sidecars, MANIFEST, *shards, *([] if self._index is None else [self._plan.index_name])]

    def older(self, target: Path) -> list[str]:
        """Return the weights of an earlier model in ``target``, the index or the only shard first.

        Files beside the weights count where they hold something else than those of this output.
        """
        there = {path.name: path for path in target.iterdir()}
        names = [name for name in there if _is_weights(name)]
        names.sort(key=lambda name: (not name.endswith(".index.json"), name not in (SINGLE, ADAPTER), name))
        if self._in_place:
            return names
        return names + [name for name in self._sidecars if name in there and self._differs(there[name])]

    def _differs(self, path: Path) -> bool:
        data = self._sidecars[path.name]
        try:
            return path.is_file() and (path.stat().st_size != len(data) or path.read_bytes() != data)
        except OSError:
            return True

    def _manifest(self, digests: Mapping[str, str]) -> bytes:
        """Return ``dsconv.manifest.json``: what the output was made from, and the CRC-32 of each tensor's bytes."""
        checkpoint, report = self._checkpoint, self._report
        tensors = {
            t.name: {
                "file": shard.filename,
                "dtype": str(t.dtype),
                "shape": list(t.entry.shape),
                "crc32": f"{self._ranges[t.name].checksum.value:08x}",
                **({"source": t.entry.name} if self._filters and t.entry.name != t.name else {}),
            }
            for shard in self._plan.shards
            for t in shard.tensors
        }
        files: dict[str, dict[str, Any]] = {shard.filename: {"bytes": shard.nbytes} for shard in self._plan.shards}
        for name, digest in digests.items():
            files[name]["sha256"] = digest
        manifest = {
            "dsconv_version": __version__,
            "source": {
                "format": checkpoint.format,
                "step": checkpoint.step,
                "world": checkpoint.world,
                **checkpoint.info,
                "files": {path.name: path.stat().st_size for path in checkpoint.sources},
            },
            **({"filters": self._filters.to_dict()} if self._filters else {}),
            "ties": self._ties,
            "overflowed": report.overflowed,
            "nonfinite": report.nonfinite,
            "warnings": report.warnings,
            "files": files,
            "tensors": tensors,
        }
        return (json.dumps(manifest, indent=1) + "\n").encode()


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json")) or name == MANIFEST
