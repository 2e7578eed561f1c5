"""``merge``: a checkpoint into a folder of safetensors, streaming, whole or absent."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsconv.checkpoint.config_files import config_folders
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import DType, DTypeName, parse_dtype, short_name
from dsconv.checkpoint.opening import open_checkpoint
from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.storage.roots import as_output, open_root
from dsconv.convert import sidecars
from dsconv.convert.adapters.choosing import STEM as ADAPTER_STEM
from dsconv.convert.adapters.choosing import AdapterOptions, Chosen, choose
from dsconv.convert.adapters.config import CONFIG as ADAPTER_CONFIG
from dsconv.convert.filters import Filters
from dsconv.convert.loadable import Loading, LoadingCheck
from dsconv.convert.parts import parse_part
from dsconv.convert.plan import DEFAULT_SHARD_SIZE, Plan, find_config, make_plan, parse_size
from dsconv.convert.progress import Progress
from dsconv.convert.report import Report
from dsconv.convert.safetensors_output import SafetensorsOutput
from dsconv.convert.staging import finish_interrupted, recover_interrupted
from dsconv.convert.ties import tied_keys, tied_pairs
from dsconv.convert.writing import WriteOptions, refuse_target, write
from dsconv.errors import MismatchError, UsageError
from dsconv.names.choosing import hint_of, with_hf_names
from dsconv.names.marks import HF, STORED
from dsconv.text import quote

if TYPE_CHECKING:
    import torch


@dataclass(kw_only=True)
class MergeReport(Report):
    """What a merge did, or with ``dry_run`` would do. Sizes are in bytes.

    ``ties`` are {name: the name that its tensor is stored under}. ``item`` is the key of the model that was taken where
    the checkpoint holds several. ``left_out`` counts, by what holds them, the items that are not the model's: an
    optimizer, counters, another model. ``sidecars_left_out`` says by name why a file beside the weights was not copied.
    ``pushed`` is what ``push`` reported.
    """

    files: list[str]
    sidecars: list[str]
    sidecars_left_out: dict[str, str] = field(default_factory=dict)
    ties: dict[str, str]
    item: str | None = None
    left_out: dict[str, int] = field(default_factory=dict)
    is_deepspeed: bool = False
    verified: bool = False
    pushed: dict[str, Any] | None = None
    loadable: bool | None = None
    loads_with: str = ""
    loading_unchecked: str = ""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)

    def note_unread(self, unread: dict[str, str]) -> None:
        """Take over which files beside the weights are not copied, with a warning for each. ``unread``: {name: why}."""
        self.sidecars_left_out = unread
        self.warnings += [f"{quote(name)} beside the checkpoint is not copied: {why}" for name, why in unread.items()]

    def note_loading(self, loading: Loading) -> None:
        """Take over whether the output loads, with a warning where it does not."""
        self.loadable, self.loads_with = loading.loadable, loading.call
        self.loading_unchecked = loading.unchecked
        self.missing, self.unexpected = loading.missing, loading.unexpected
        if loading.problem:
            self.warnings.append(loading.problem)


@dataclass(frozen=True)
class MergeOptions:
    """What is merged, and into what. ``merge`` documents each of them; a path is given as ``as_path`` makes it."""

    tag: str | None = None
    revision: str | None = None
    dtype: DType | None = None
    max_shard_bytes: int = parse_size(DEFAULT_SHARD_SIZE)
    exclude_frozen: bool = False
    filters: Filters = field(default_factory=Filters)
    adapter: AdapterOptions = field(default_factory=AdapterOptions)
    names: str = STORED
    config_from: Path | None = None
    dry_run: bool = False
    verify_output: bool = False
    push_to_hub: str | None = None
    private: bool = False
    writing: WriteOptions = field(default_factory=WriteOptions)


def default_output(checkpoint: Checkpoint, suffix: str = "fp32") -> Path:
    """Return the folder that a merge without OUT writes to.

    It is CKPT/<tag>-<suffix> for a DeepSpeed save folder, else PATH-<suffix> beside the source. For a source in a store
    or on the Hub it lies in the current folder.
    """
    tag = checkpoint.info.get("tag")
    if repo := checkpoint.info.get("repo"):
        return Path(f"{str(repo).rpartition('/')[2]}-{suffix}")
    if is_remote(checkpoint.path):
        return Path(f"{tag or checkpoint.path.stem or 'model'}-{suffix}")
    if tag:
        return Path(checkpoint.folder, f"{tag}-{suffix}")
    path = Path(checkpoint.path).resolve()
    return path.parent / f"{path.stem if path.is_file() else path.name}-{suffix}"


def merge(
    source: str | os.PathLike[str] | Checkpoint,
    output: str | os.PathLike[str] | None = None,
    *,
    tag: str | None = None,
    revision: str | None = None,
    item: str | None = None,
    follow_links: bool = False,
    weights: Literal["masters", "16bit"] = "masters",
    dtype: DTypeName | torch.dtype | None = None,
    max_shard_size: str | int = DEFAULT_SHARD_SIZE,
    exclude_frozen: bool = False,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    strip_prefix: Sequence[str] = (),
    rename: Sequence[str] | Mapping[str, str] = (),
    adapter: bool = False,
    adapter_name: str | None = None,
    fold_lora: bool = False,
    base: str | os.PathLike[str] | None = None,
    names: Literal["stored", "hf"] = "stored",
    config_from: str | os.PathLike[str] | None = None,
    dry_run: bool = False,
    verify_output: bool = False,
    force: bool = False,
    fsync: bool | None = None,
    sha256: bool = False,
    workers: int | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    part: str | None = None,
    progress: Progress | None = None,
) -> MergeReport:
    """Merge a checkpoint into a folder of safetensors that ``from_pretrained`` loads, on disk or in a store.

    Weights of a ZeRO checkpoint come from its fp32 masters; frozen weights and buffers keep their stored dtype.

    Args:
        source: a path, a URL, ``org/model`` on the Hub, or a checkpoint that is open.
        output: the folder to write (default: see ``default_output``).
        tag: the checkpoint of a save folder to take (default: what the file ``latest`` names).
        revision: the branch, tag or commit of a model on the Hub.
        item: the key of the model to take, where the checkpoint holds several.
        follow_links: read what links lead to that leave the checkpoint's folder, or ``config_from``.
        weights: of a DeepSpeed checkpoint, ``masters`` of the optimizer, or the model's own ``16bit`` weights.
        dtype: fp32, bf16 or fp16, by these names or torch's, or as a ``torch.dtype``. Every floating tensor of 16 bits
            or more is cast to it, once, to nearest even.
        max_shard_size: the size of an output file, in bytes or like ``5GB``. Only a larger tensor exceeds it.
        exclude_frozen: leave out weights that were not trained.
        include: patterns with ``*``. Only tensors whose names fit one of them are written.
        exclude: patterns. Tensors whose names fit one of them are not written.
        strip_prefix: what is removed from the beginning of names; the first that fits.
        rename: ``OLD=NEW``, where OLD is a name or the beginning of one up to a dot. See ``Filters``.
        adapter: write only the PEFT adapter, exactly as PEFT would save it.
        adapter_name: which of several adapters is written or folded.
        fold_lora: fold a LoRA into its base, as PEFT's ``merge_and_unload`` does; ``dtype`` is then the base's.
        base: the base model, where the checkpoint holds an adapter alone.
        names: ``hf`` for Hugging Face's names of a model that has those of torchtitan or Megatron-core, which
            the filters then see; ``stored`` keeps the names.
        config_from: the folder, URL or ``org/model`` whose configuration and tokenizer are copied (default: found
            beside the checkpoint).
        dry_run: write nothing, and report the plan.
        verify_output: read the output back and compare every byte, before it counts.
        force: replace a model that ``output`` already holds.
        fsync: have the output on disk before it counts as written (default: yes). A store takes None only.
        sha256: put the sha256 of each file in the manifest.
        workers: the number of copying threads (default: one per core, at most 8).
        push_to_hub: push the output to this repository, ``org/model``. See ``push``.
        private: make that repository a private one. See ``push``.
        part: ``I/N`` for part I of N, each written by a process of its own, or ``auto``. See docs/many-machines.md.
        progress: called with (phase, bytes done, bytes in all), from any thread.

    Returns:
        What was written, or with ``dry_run`` would be.

    Raises:
        DsconvError: what ``open_checkpoint`` raises; OutputError when the output exists (without ``force``), is being
            written by another run, does not fit the disk or cannot be written as asked; MismatchError when
            ``verify_output`` finds a difference.
        ValueError: the dtype or the size is not one. UsageError is one too: a filter is not written as it should be,
            fits no tensor, or goes with no adapter.
    """
    options = MergeOptions(
        tag=tag,
        revision=revision,
        dtype=parse_dtype(dtype) if dtype is not None else None,
        max_shard_bytes=parse_size(max_shard_size),
        exclude_frozen=exclude_frozen,
        filters=Filters.of(include, exclude, strip_prefix, rename),
        adapter=AdapterOptions(adapter, adapter_name, fold_lora, base, follow_links),
        names=names,
        config_from=_config_folder(config_from, follow_links) if config_from is not None else None,
        dry_run=dry_run,
        verify_output=verify_output,
        push_to_hub=push_to_hub,
        private=private,
    )
    settings = repr((item, weights, follow_links, options))
    writing = WriteOptions(force, fsync, sha256, workers, progress, parse_part(part), settings)
    options = replace(options, writing=writing)
    if part is not None and push_to_hub is not None:
        raise UsageError("--push-to-hub cannot be combined with --part: push the folder when it is whole (dsconv push)")
    if options.filters and (adapter or fold_lora):
        raise UsageError(
            "--include, --exclude, --strip-prefix and --rename cannot be combined with --adapter or --fold-lora, which"
            " write what PEFT would"
        )
    if names not in (STORED, HF):
        raise UsageError(f"names is {names!r}; expected {HF!r} or {STORED!r}")
    if names != STORED and (adapter or fold_lora):
        raise UsageError("--names cannot be combined with --adapter or --fold-lora, which write PEFT's names")
    if output is not None and not dry_run and not isinstance(source, Checkpoint) and _same(source, output):
        finish_interrupted(as_output(output))
    if not isinstance(source, Checkpoint):
        source = open_checkpoint(source, tag, revision, item, weights=weights, follow_links=follow_links)
    if output is None:
        suffix = (
            "adapter"
            if adapter
            else "folded"
            if fold_lora
            else short_name(options.dtype)
            or (weights if weights != "masters" else "fp32" if source.is_deepspeed else "merged")
        )
        if item is not None:
            suffix = re.sub(r"[^\w.-]", "_", item) + f"-{suffix}"
        output = default_output(source, suffix)
    return _merge(source, as_output(output), options)


def _config_folder(source: str | os.PathLike[str], follow_links: bool) -> Path:
    """Return the folder that ``config_from`` names, also in a store or on the Hub."""
    root = open_root(source, follow_links=follow_links)
    folder: Path = root.path
    root.fetch_beside([folder])
    return folder


def _same(source: str | os.PathLike[str], output: str | os.PathLike[str]) -> bool:
    """Return whether a merge goes into the folder that it reads."""
    try:
        return Path(source).samefile(output)
    except OSError:
        return False


def _merge(opened: Checkpoint, target: Path, options: MergeOptions) -> MergeReport:
    first = opened.sources[0].parent if opened.info.get("tag") and opened.sources else None
    of_step = [first, first.parent] if first is not None else []
    near = list(dict.fromkeys([*config_folders(of_step), opened.path, opened.folder, opened.folder.resolve().parent]))
    folders = [options.config_from] if options.config_from is not None else near
    hint = ""
    if options.names == HF:
        opened = with_hf_names(opened, find_config(folders))
    elif not (options.adapter.alone or options.adapter.fold):
        hint = hint_of(opened)
    if options.dtype is not None:
        from dsconv.convert.fp8 import dequantized

        opened = dequantized(opened, find_config(folders), options.dtype)
    chosen = choose(opened, options.adapter, near, options.config_from, options.dtype)
    checkpoint = chosen.checkpoint
    plan, extra, unread = _plan(chosen, target, options)
    report = _report(checkpoint, target, plan, sorted(extra), options.dry_run)
    report.note_unread(unread)
    if hint:
        report.warnings.append(hint)
    if options.filters and (filtered := _filtered(checkpoint, plan)):
        report.left_out["tensors that the filters leave out"] = len(filtered)
    in_place = options.config_from is None and any(folder.resolve() == target.resolve() for folder in near)
    destination = SafetensorsOutput(checkpoint, plan, extra, report, report.ties, options.filters, in_place)
    with LoadingCheck(plan, extra, str(target)) as loading:
        if loading.known:
            report.note_loading(loading.result())  # before the manifest, which has the warnings
        if report.loadable is None:
            report.warnings += chosen.warnings
        if options.dry_run:
            report.warnings += refuse_target(destination, target, options.writing)
            report.plan = destination.rows()
        else:
            _write(checkpoint, target, plan, destination, report, options)
        if not loading.known:
            report.note_loading(loading.result())
    return report


def _write(
    checkpoint: Checkpoint,
    target: Path,
    plan: Plan,
    destination: SafetensorsOutput,
    report: MergeReport,
    options: MergeOptions,
) -> None:
    if options.push_to_hub is not None:
        from dsconv.convert.push import prepare, push_merged

        prepare(options.push_to_hub, target)
    recover_interrupted(target)

    def check(folder: Path) -> None:
        _verify(checkpoint, folder, plan, report, options)

    report.note_part(write(destination, checkpoint, target, options.writing, check if options.verify_output else None))
    if options.push_to_hub is not None:
        report.pushed = push_merged(target, options.push_to_hub, options.private, options.writing.progress)


def _plan(chosen: Chosen, target: Path, options: MergeOptions) -> tuple[Plan, dict[str, bytes], dict[str, str]]:
    """Return the plan, {name: content} of the files beside the weights, and {name: why} of those that are not read."""
    checkpoint = chosen.checkpoint
    folders = [options.config_from] if options.config_from else chosen.near
    is_adapter = bool(checkpoint.info.get("adapter"))  # it holds nothing else
    dropped = tied_keys(find_config(folders)) if checkpoint.ties else ()
    names = options.filters.names(checkpoint, dropped) if options.filters else None
    plan = make_plan(
        checkpoint,
        dtype=options.dtype,
        max_shard_bytes=max(options.max_shard_bytes, checkpoint.nbytes * 2) if is_adapter else options.max_shard_bytes,
        exclude_frozen=options.exclude_frozen and not options.adapter.alone,
        dropped_names=dropped,
        rename=names.get if names is not None else None,
        stem=ADAPTER_STEM if is_adapter else "model",
    )
    if chosen.files is not None:
        return plan, chosen.files, {}
    return plan, *_sidecar_files(options.config_from, chosen, plan, target)


def _verify(checkpoint: Checkpoint, folder: Path, plan: Plan, report: MergeReport, options: MergeOptions) -> None:
    """Raise MismatchError unless what was written into ``folder`` is what the checkpoint holds."""
    from dsconv.convert.compare import CompareOptions, compare

    comparing = CompareOptions(
        allow_cast=options.dtype is not None,
        subset=options.exclude_frozen,
        renamed={t.name: t.entry.name for t in plan.placed},
        left_out=_filtered(checkpoint, plan) if options.filters else (),
        progress=options.writing.progress,
    )
    result = compare(checkpoint, open_checkpoint(folder), comparing)
    if not result.equal:
        raise MismatchError(
            f"{report.output}: what was written differs from {checkpoint.path}: {result.summary()}. Nothing was kept"
        )
    report.verified = True


def _filtered(checkpoint: Checkpoint, plan: Plan) -> set[str]:
    """Return the names of the tensors that are not written."""
    return set(checkpoint) - {tensor.entry.name for tensor in plan.placed}


def _sidecar_files(
    config_from: Path | None, chosen: Chosen, plan: Plan, target: Path
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return {name: content} of what goes beside the weights, and {name: why} of what is left out.

    config.json names the dtype that most bytes have.

    Where the files lie in the target already, config.json alone is written, with the dtype that it has to name now.
    """
    main = main_dtype(plan)
    found = {}
    if chosen.folded is not None and config_from is not None and not (config_from / "config.json").is_file():
        config_from = None  # it has the adapter's configuration
    beside = sidecars.find_sidecars(config_from, chosen.near)
    for path in beside.files:
        in_place = path.name != "config.json" and path.parent.resolve() == target.resolve()
        if in_place or (chosen.folded is not None and path.name == ADAPTER_CONFIG):
            continue
        data = path.read_bytes()
        if path.name == "config.json":
            data = sidecars.with_dtype(data, main)
            if chosen.checkpoint.info.get("dequantized"):
                data = sidecars.without_scheme(data)
            if chosen.folded and _are_untied(path, plan, chosen.folded):
                data = sidecars.untied(data)
            if chosen.vocabulary is not None:
                data = sidecars.with_vocabulary(data, path, *chosen.vocabulary)
        found[path.name] = data
    return found, beside.left_out


def _are_untied(config: Path, plan: Plan, touched: frozenset[str]) -> bool:
    """Return whether two tensors that the architecture ties are apart, and one of them is not the base's any more."""
    names = {tensor.name for tensor in plan.placed}
    return any(names.issuperset(pair) and touched.intersection(pair) for pair in tied_pairs(config).items())


def main_dtype(plan: Plan) -> DType | None:
    """Return the floating dtype that most of the plan's bytes have; None if no tensor is floating."""
    totals: dict[DType, int] = {}
    for tensor in plan.placed:
        if tensor.dtype.floating:
            totals[tensor.dtype] = totals.get(tensor.dtype, 0) + tensor.nbytes
    return max(totals, key=lambda d: totals[d]) if totals else None


def _report(checkpoint: Checkpoint, target: Path, plan: Plan, extra: list[str], dry_run: bool) -> MergeReport:
    placed = list(plan.placed)
    return MergeReport(
        source=str(checkpoint.info.get("repo") or checkpoint.path),
        output=str(target),
        format=checkpoint.format,
        step=checkpoint.step,
        tensors=len(placed),
        parameters=sum(t.entry.numel for t in placed),
        nbytes=plan.nbytes,
        files=[shard.filename for shard in plan.shards] + ([plan.index_name] if len(plan.shards) > 1 else []),
        sidecars=extra,
        ties={
            name: t.name
            for t in placed
            for name in (t.entry.name, *t.entry.aliases)
            if t.entry.aliases and name != t.name
        },
        item=checkpoint.info.get("item"),
        is_deepspeed=checkpoint.is_deepspeed,
        left_out=dict(checkpoint.info.get("left_out") or {}),
        dry_run=dry_run,
        warnings=list(checkpoint.warnings),
    )
