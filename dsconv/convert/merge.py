"""``merge``: a checkpoint into a safetensors folder, streaming, whole or absent."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from dsconv._version import __version__
from dsconv.checkpoint.formats.huggingface.safetensors import ADAPTER, SINGLE
from dsconv.checkpoint.map.dtypes import DType, parse_dtype
from dsconv.checkpoint.map.tensors import Checkpoint
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.storage.roots import as_path
from dsconv.checkpoint.transfer.checksums import RunningChecksum
from dsconv.checkpoint.transfer.copy import MAX_DEFAULT_WORKERS, CopyRun, CopyStats, Target, default_workers, write_at
from dsconv.checkpoint.transfer.ordered import run_all
from dsconv.convert import adapter as peft
from dsconv.convert import sidecars
from dsconv.convert.flushing import Flusher
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.plan import DEFAULT_SHARD_SIZE, Plan, find_config, make_plan, parse_size
from dsconv.convert.staging import Staging, open_staging, refuse_existing, require_space, settle
from dsconv.convert.ties import tied_keys
from dsconv.convert.verify import verify
from dsconv.errors import DsconvError, MismatchError, OutputError


@dataclass
class MergeReport:
    """What a merge did, or with ``dry_run`` would do. Sizes are in bytes."""

    source: str
    output: str
    format: str
    step: int | None
    tensors: int
    parameters: int
    nbytes: int
    files: list[str]
    sidecars: list[str]
    ties: dict[str, str]
    dry_run: bool = False
    bytes_read: int = 0
    overflowed: dict[str, int] = field(default_factory=dict)
    verified: bool = False
    warnings: list[str] = field(default_factory=list)
    plan: list[dict[str, Any]] = field(default_factory=list)
    pushed: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def default_output(checkpoint: Checkpoint, suffix: str = "fp32") -> Path:
    """CKPT/<tag>-fp32 for a DeepSpeed save dir, else PATH-<suffix> beside the source; of a store or the Hub, in the
    current folder.
    """
    tag = checkpoint.info.get("tag")
    if repo := checkpoint.info.get("repo"):
        return Path(f"{str(repo).rpartition('/')[2]}-{suffix}")
    if is_remote(checkpoint.path):
        return Path(f"{tag or checkpoint.path.stem or 'model'}-{suffix}")
    if tag:
        return checkpoint.folder / f"{tag}-{suffix}"
    path = checkpoint.path.resolve()
    return path.parent / f"{path.stem if path.is_file() else path.name}-{suffix}"


def merge(
    source: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str] | None = None,
    *,
    tag: str | None = None,
    revision: str | None = None,
    dtype: str | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    exclude_frozen: bool = False,
    adapter: bool = False,
    config_from: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    verify_output: bool = False,
    force: bool = False,
    fsync: bool | None = None,
    sha256: bool = False,
    workers: int | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> MergeReport:
    """Merge a checkpoint into a folder of safetensors that ``from_pretrained`` loads, on the disk or in a store.

    Weights of a ZeRO checkpoint come from its fp32 masters; frozen weights and buffers keep their stored dtype. With
    ``dtype`` (fp32, bf16 or fp16) every floating tensor of 16 bits or more is cast, once, to nearest even. ``progress``
    is called with (phase, bytes done, bytes in all), from any thread. ``fsync`` (by default, true) is of the disk. The
    output is pushed to the repository ``push_to_hub``, if given: see ``push``, also of ``private``.

    Raises DsconvError: see ``open_checkpoint``; OutputError when the output exists (without ``force``), is being
    written by another run, does not fit the disk or cannot be written as asked; MismatchError when ``verify_output``
    finds a difference. ValueError for a dtype or size that is none.
    """
    wanted = parse_dtype(dtype) if dtype else None
    shard_bytes = parse_size(max_shard_size)
    if output is not None and not dry_run:
        settle(as_path(output))  # it may be the source too
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source, tag, revision)
    if output is None:
        output = default_output(
            checkpoint, "adapter" if adapter else (dtype or ("fp32" if checkpoint.is_deepspeed else "merged"))
        )
    target = as_path(output)
    config_folder = as_path(config_from) if config_from is not None else None
    near = list(dict.fromkeys([checkpoint.path, checkpoint.folder, checkpoint.folder.resolve().parent]))
    folders = [config_folder] if config_folder else near
    is_adapter = bool(checkpoint.info.get("adapter"))  # and nothing else: the file of a PEFT folder
    if adapter and not is_adapter:
        plan, extra = peft.adapter_plan(checkpoint, folders, wanted, shard_bytes)
    else:
        dropped = tied_keys(find_config(folders)) if checkpoint.ties else ()
        plan = make_plan(
            checkpoint,
            dtype=wanted,
            max_shard_bytes=max(shard_bytes, checkpoint.nbytes * 2) if is_adapter else shard_bytes,
            exclude_frozen=exclude_frozen,
            dropped_names=dropped,
            stem=peft.STEM if is_adapter else "model",
        )
        extra = _sidecar_files(config_folder, near, plan, target)
    report = _report(checkpoint, target, plan, sorted(extra), dry_run)
    if dry_run:
        report.plan = [_row(shard.filename, t) for shard in plan.shards for t in shard.tensors]
        return report
    if push_to_hub is not None:
        from dsconv.convert.push import prepare, push_merged

        prepare(push_to_hub, target)
    settle(target)
    old = _existing(target, force)
    # Of a store, workers wait more than they work.
    workers = workers or (MAX_DEFAULT_WORKERS if is_remote(checkpoint.path) else default_workers())
    if is_remote(target):
        if fsync is not None:
            raise OutputError(
                f"{target}: --fsync and --no-fsync are of local disks; leave them out: a store keeps what it"
                " acknowledges"
            )
        _merge_into_store(checkpoint, plan, target, report, extra, old, workers, sha256, progress)
        if verify_output:
            _verify_in_store(checkpoint, target, plan, report, wanted is not None, exclude_frozen or adapter, progress)
        return report
    require_space(target, plan.nbytes)
    sync = fsync is not False
    with open_staging(target, sync) as staging:
        old = _existing(target, force)  # again, now that no other run can write there
        checksums = _write(checkpoint, plan, staging, report, workers, sync, progress)
        files = [shard.filename for shard in plan.shards]
        manifest = _manifest(
            checkpoint, plan, checksums, report, _hash_files(staging, files, progress) if sha256 else {}
        )
        small = {**extra, MANIFEST: manifest}
        for name, data in small.items():
            staging.write(name, data)
        index = plan.index()
        if index is not None:
            staging.write(plan.index_name, index)
        if verify_output:
            _verify(checkpoint, staging.folder, plan, report, wanted is not None, exclude_frozen or adapter, progress)
        order = [*small, *files, *([plan.index_name] if index is not None else [])]
        staging.commit(order, (name for name in old if name not in order or name == plan.index_name or name in files))
    if push_to_hub is not None:
        report.pushed = push_merged(target, push_to_hub, private, progress)
    return report


def _merge_into_store(
    checkpoint: Checkpoint,
    plan: Plan,
    target: Path,
    report: MergeReport,
    extra: dict[str, bytes],
    old: list[str],
    workers: int,
    sha256: bool,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    from dsconv.convert.upload import open_upload

    with open_upload(target) as upload:
        checksums, digests, stats = upload.send(plan, workers, sha256, _advance(plan, progress))
        _note(report, stats)
        small = {**extra, MANIFEST: _manifest(checkpoint, plan, checksums, report, digests)}
        index = plan.index()
        files = [shard.filename for shard in plan.shards]
        placed = [*small, *files]
        obsolete = [name for name in old if name not in placed or name == plan.index_name or name in files]
        upload.commit(small, files, None if index is None else (plan.index_name, index), obsolete)


def _verify_in_store(checkpoint: Checkpoint, target: Path, plan: Plan, *rest: Any) -> None:
    """What is in a store can be read back only when it is in place: on a mismatch it is taken away again."""
    from dsconv.convert.upload import Upload

    try:
        _verify(checkpoint, as_path(str(target)), plan, *rest)
    except MismatchError:
        Upload(target).withdraw([plan.index_name, *(shard.filename for shard in plan.shards), MANIFEST])
        raise


def _verify(
    checkpoint: Checkpoint,
    folder: Path,
    plan: Plan,
    report: MergeReport,
    allow_cast: bool,
    subset: bool,
    progress: Callable[[str, int, int], None] | None,
) -> None:
    """Raise MismatchError, while the output is not in place yet, unless what was written is what the checkpoint
    holds.
    """
    renamed = {t.name: t.entry.name for t in plan.placed}
    result = verify(checkpoint, folder, allow_cast=allow_cast, subset=subset, renamed=renamed, progress=progress)
    if not result.equal:
        raise MismatchError(
            f"{report.output}: what was written differs from {checkpoint.path}: {result.summary()}. Nothing of it was"
            " kept"
        )
    report.verified = True


def _existing(target: Path, force: bool) -> list[str]:
    """The weights of an earlier model in ``target``, which ``force`` replaces. Raises OutputError without it."""
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file; the output is a folder")
    names = [p.name for p in target.iterdir() if _is_weights(p.name)] if target.is_dir() else []
    names.sort(
        key=lambda name: (not name.endswith(".index.json"), name not in (SINGLE, ADAPTER), name)
    )  # what counts first
    refuse_existing(target, names, "a model", force)
    return names


def _is_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".safetensors.index.json")) or name == MANIFEST


def _sidecar_files(config_from: Path | None, near: list[Path], plan: Plan, target: Path) -> dict[str, bytes]:
    """{name: content} of what goes beside the weights; config.json says the dtype that most of the bytes have."""
    main = main_dtype(plan)
    found = {}
    for path in sidecars.find_sidecars(
        config_from, [folder for folder in near if folder.resolve() != target.resolve()]
    ):
        data = path.read_bytes()
        found[path.name] = sidecars.with_dtype(data, main) if path.name == "config.json" else data
    return found


def main_dtype(plan: Plan) -> DType | None:
    """The floating dtype of most of the plan's bytes."""
    totals: dict[DType, int] = {}
    for tensor in plan.placed:
        if tensor.dtype.floating:
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
    return max(totals, key=lambda d: totals[d]) if totals else None


def _report(checkpoint: Checkpoint, target: Path, plan: Plan, extra: list[str], dry_run: bool) -> MergeReport:
    placed = list(plan.placed)
    ties = {
        name: t.name for t in placed for name in (t.entry.name, *t.entry.aliases) if t.entry.aliases and name != t.name
    }
    files = [shard.filename for shard in plan.shards] + ([plan.index_name] if len(plan.shards) > 1 else [])
    numel = sum(t.entry.numel for t in placed)
    source = str(checkpoint.info.get("repo") or checkpoint.path)
    return MergeReport(
        source, str(target), checkpoint.format, checkpoint.step, len(placed), numel, plan.nbytes, files, extra, ties,
        dry_run=dry_run, warnings=list(checkpoint.warnings),
    )  # fmt: skip


def _row(filename: str, tensor: Any) -> dict[str, Any]:
    return {"file": filename, "name": tensor.name, "dtype": str(tensor.dtype), "shape": list(tensor.entry.shape),
            "stored_dtype": str(tensor.entry.dtype), "offset": tensor.offset_bytes, "bytes": tensor.nbytes,
            "pieces": tensor.entry.piece_count, "role": tensor.entry.role}  # fmt: skip


def _write(
    checkpoint: Checkpoint,
    plan: Plan,
    staging: Staging,
    report: MergeReport,
    workers: int,
    fsync: bool,
    progress: Callable[[str, int, int], None] | None,
) -> dict[str, int]:
    """Write all shards into the staging folder; returns the CRC-32 of each tensor by its output name."""
    descriptors: dict[str, int] = {}
    targets: dict[str, Target] = {}
    done = 0
    report_progress = _advance(plan, progress)
    lock = threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
        report_progress(count)

    try:
        for shard in plan.shards:
            descriptor = staging.create(shard.filename, shard.nbytes)
            descriptors[shard.filename] = descriptor
            write_at(descriptor, 0, memoryview(shard.header), 0)
            for t in shard.tensors:
                write = partial(write_at, descriptor, len(shard.header) + t.offset_bytes)
                targets[t.name] = Target(t.name, t.dtype, write, RunningChecksum(t.nbytes))
        run = CopyRun(workers, {}, advance, checkpoint.stamps)
        with Flusher(list(descriptors.values()), lambda: done, fsync):
            run_all(((t.entry, targets[t.name]) for t in plan.placed), run)
            if fsync:
                for descriptor in descriptors.values():
                    os.fsync(descriptor)
    except DsconvError:  # some are OSErrors too
        raise
    except OSError as error:
        raise OutputError(
            f"{staging.target}: writing the output failed: {error.strerror}; nothing of it was kept"
        ) from None
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)
    _note(report, run.stats)
    incomplete = [name for name, target in targets.items() if not target.checksum.complete]
    assert not incomplete, f"not all of {incomplete[:3]} was written"
    return {name: target.checksum.value for name, target in targets.items()}


def _advance(plan: Plan, progress: Callable[[str, int, int], None] | None) -> Callable[[int], None]:
    """A function that counts written bytes, from any thread, and tells ``progress`` of them."""
    done, total, lock = 0, plan.data_bytes, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            current = done
        if progress is not None:
            progress("copy", current, total)

    return advance


def _note(report: MergeReport, stats: CopyStats) -> None:
    """Put into ``report`` what a run did."""
    report.bytes_read = stats.bytes_read
    report.overflowed = dict(sorted(stats.overflowed.items()))
    if report.overflowed:
        count = sum(report.overflowed.values())
        report.warnings.append(
            f"{count} values in {len(report.overflowed)} tensors are too large for the dtype and became infinite, "
            f"first in {next(iter(report.overflowed))!r}"
        )


def _hash_files(staging: Staging, names: list[str], progress: Callable[[str, int, int], None] | None) -> dict[str, str]:
    import hashlib

    total = sum(staging.path(name).stat().st_size for name in names)
    done = 0
    digests = {}
    for name in names:
        digest = hashlib.sha256()
        with open(staging.path(name), "rb", buffering=0) as file:
            while chunk := file.read(8 << 20):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress("sha256", done, total)
        digests[name] = digest.hexdigest()
    return digests


def _manifest(
    checkpoint: Checkpoint, plan: Plan, checksums: dict[str, int], report: MergeReport, digests: dict[str, str]
) -> bytes:
    """``dsconv.manifest.json``: what the output was made from and the CRC-32 of each tensor's bytes."""
    tensors = {
        t.name: {
            "file": shard.filename,
            "dtype": str(t.dtype),
            "shape": list(t.entry.shape),
            "crc32": f"{checksums[t.name]:08x}",
        }
        for shard in plan.shards
        for t in shard.tensors
    }
    files: dict[str, dict[str, Any]] = {s.filename: {"bytes": s.nbytes} for s in plan.shards}
    for name, digest in digests.items():
        files[name]["sha256"] = digest
    manifest = {
        "dsconv_version": __version__,
        "source": {
            "format": checkpoint.format,
            "step": checkpoint.step,
            "world": checkpoint.world,
            **checkpoint.info,
            "files": {p.name: p.stat().st_size for p in checkpoint.sources},
        },
        "ties": report.ties,
        "overflowed": report.overflowed,
        "warnings": report.warnings,
        "files": files,
        "tensors": tensors,
    }
    return (json.dumps(manifest, indent=1) + "\n").encode()
