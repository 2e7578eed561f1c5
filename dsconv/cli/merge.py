"""``dsconv merge`` and ``dsconv zero-to-fp32``."""

from __future__ import annotations

import shlex
import time
from typing import Any

import click

from dsconv.cli import console
from dsconv.cli.console import Dtype, Repo, Size, command, with_options
from dsconv.text import quote

# Each option is a keyword of ``dsconv.merge``. They are grouped as --help shows them.
ARGUMENTS = (
    click.argument("checkpoint", type=click.Path(), metavar="CKPT"),
    click.argument("output", type=click.Path(), required=False, metavar="[OUT]"),
)
SOURCE_OPTIONS = (
    click.option("--tag", "-t", metavar="TAG", help="Checkpoint to read (default: the one that 'latest' names)."),
    click.option("--revision", metavar="REV", help="Branch, tag or commit of a model on the Hub (default: main)."),
    console.ITEM,
    console.FOLLOW_LINKS,
)
TENSOR_OPTIONS = (
    click.option(
        "--weights",
        type=click.Choice(["masters", "16bit"]),
        default="masters",
        show_default=True,
        help="What to read from a DeepSpeed checkpoint: fp32 masters, or the model's 16-bit weights.",
    ),
    click.option(
        "--dtype",
        type=Dtype(),
        help="Cast floats, once, to nearest even (default: as stored).",
    ),
    click.option(
        "--exclude-frozen", "--exclude_frozen_parameters", is_flag=True, help="Leave out weights that were not trained."
    ),
    click.option(
        "--include", multiple=True, metavar="GLOB", help="Write only tensors whose names match; may be repeated."
    ),
    click.option(
        "--exclude", multiple=True, metavar="GLOB", help="Leave out tensors whose names match; may be repeated."
    ),
    click.option(
        "--strip-prefix", multiple=True, metavar="P", help="Remove P from the start of names; may be repeated."
    ),
    click.option(
        "--rename",
        multiple=True,
        metavar="OLD=NEW",
        help="Rename OLD and OLD.…; * matches one part between dots; may be repeated.",
    ),
    click.option(
        "--names",
        type=click.Choice(["stored", "hf"]),
        default="stored",
        show_default=True,
        help="Keep the names, or give Hugging Face's to a torchtitan or Megatron model.",
    ),
    click.option("--adapter", is_flag=True, help="Write only the PEFT adapter, exactly as PEFT would save it."),
    click.option("--adapter-name", metavar="NAME", help="Adapter to read, if the model holds several."),
    click.option("--fold-lora", is_flag=True, help="Fold the LoRA into its base, as PEFT's merge_and_unload does."),
    click.option(
        "--base", type=click.Path(), metavar="MODEL", help="Base model for --fold-lora, if CKPT is an adapter alone."
    ),
)
OUTPUT_OPTIONS = (
    click.option(
        "--max-shard-size", "--max_shard_size", type=Size(), default="5GB", show_default=True, help="Largest file."
    ),
    click.option(
        "--config-from",
        type=click.Path(file_okay=False),
        metavar="DIR",
        help="Copy config and tokenizer from DIR, a URL or org/model (default: found beside CKPT).",
    ),
    click.option("--dry-run", is_flag=True, help="Print the plan and write nothing."),
    click.option("--verify", "verify_output", is_flag=True, help="Read the output back and compare every byte."),
    click.option("--force", is_flag=True, help="Replace a model that OUT already holds."),
    click.option("--fsync/--no-fsync", default=None, help="Flush the output to the disk (default: yes)."),
    click.option("--sha256", is_flag=True, help="Put the sha256 of each file into the manifest."),
    click.option(
        "--workers", type=click.IntRange(1, 256), metavar="N", help="Copying threads (default: one a core, at most 8)."
    ),
    console.PART,
    click.option(
        "--push-to-hub", type=Repo(), metavar="REPO", help="Push OUT to org/model on the Hub (see dsconv push)."
    ),
    click.option("--private", is_flag=True, help="With --push-to-hub, create REPO as private."),
    click.option("--safe_serialization", is_flag=True, hidden=True, help="Ignored: the output is always safetensors."),
)
DISPLAY_OPTIONS = (console.JSON, console.QUIET, console.DEBUG)
ALL_OPTIONS = (*ARGUMENTS, *SOURCE_OPTIONS, *TENSOR_OPTIONS, *OUTPUT_OPTIONS, *DISPLAY_OPTIONS)


@command("zero-to-fp32", epilog="""\b
Example:
  dsconv zero-to-fp32 checkpoints/ merged/
  dsconv zero-to-fp32 checkpoint-500/ merged/ --dtype bf16 --verify

OUT defaults to CKPT/<tag>-fp32. The spellings of DeepSpeed's zero_to_fp32.py
(--max_shard_size, --exclude_frozen_parameters, -t, -d) work too.""")  # fmt: skip
@with_options(*ALL_OPTIONS)
def zero_to_fp32(**options: Any) -> None:
    """Merge a DeepSpeed ZeRO checkpoint into safetensors.

    CKPT is a save folder, a tag folder (global_step100/) or a Trainer's checkpoint-N. The weights are the optimizer's
    fp32 masters; frozen weights and buffers keep their stored dtype.
    """
    _run(options, masters=True)


@command(epilog="""\b
Example:
  dsconv merge checkpoints/ merged/
  dsconv merge merged/ small/ --dtype bf16 --max-shard-size 2GB
  dsconv merge org/model s3://bucket/model --dtype bf16""")  # fmt: skip
@with_options(*ALL_OPTIONS)
def merge(**options: Any) -> None:
    """Merge a checkpoint of any format into safetensors.

    The format is detected. Tensors keep their stored dtype unless --dtype is given. A ZeRO checkpoint gives its fp32
    masters.
    """
    _run(options)


def _run(options: dict[str, Any], masters: bool = False) -> None:
    """Merge and print the report. ``masters`` warns if the source holds no fp32 masters."""
    from dsconv.convert import merge as convert

    source, output = options.pop("checkpoint"), options.pop("output")
    as_json, quiet = options.pop("as_json"), options.pop("quiet")
    del options["safe_serialization"], options["debug"]
    if options["private"] and options["push_to_hub"] is None:
        raise click.UsageError("--private needs --push-to-hub REPO")
    console.quiet_downloads(quiet or as_json)
    for first, needs in (("adapter_name", ("adapter", "fold_lora")), ("base", ("fold_lora",))):
        if options[first] is not None and not any(options[name] for name in needs):
            flags = " or ".join(f"--{name.replace('_', '-')}" for name in needs)
            raise click.UsageError(f"--{first.replace('_', '-')} goes with {flags}")
    if options["adapter"] and options["fold_lora"]:
        raise click.UsageError("--adapter and --fold-lora exclude each other")
    began = time.monotonic()
    with console.progress(quiet or as_json) as progress:
        report = convert.merge(source, output, progress=progress, **options)
    seconds = time.monotonic() - began
    if masters and not report.is_deepspeed and options["dtype"] is None:
        report.warnings.append(
            f"{source} is a {report.format} checkpoint, which holds no fp32 masters: its tensors keep their stored"
            " dtype. --dtype fp32 casts them"
        )
    if not console.show_report(report, seconds, as_json, quiet):
        return
    if report.dry_run:
        _show_plan(report)
        return
    size = (
        f"{console.count(report.tensors, 'tensor')}, {console.count(report.parameters, 'parameter')},"
        f" {console.size(report.nbytes)}"
    )
    console.say(
        f"{size} in {console.count(len(report.files), 'file')}, {seconds:.2f}"
        f" s{', verified' if report.verified else ''}"
    )
    if report.left_out:
        console.say(f"left out: {console.counts(report.left_out)}")
    for alias, name in report.ties.items():
        console.say(f"{alias} is tied to {name}, stored once")
    if report.sidecars:
        console.say(f"with {', '.join(report.sidecars)}")
    if report.pushed is not None:
        console.show_push(report.pushed)
    _show_loading(report, options)


def _show_loading(report: Any, options: dict[str, Any]) -> None:
    """Say how the output is loaded, or how much of it would be missing (the warning above says which).

    The last line is what to type next.
    """
    left = ", ".join(quote(name) for name in report.sidecars_left_out)
    without = f", without {left} (the warning says why)" if left else ""
    if left and report.loadable is None:
        console.say(f"written{without}")
    if report.loadable:
        copied = "once it is downloaded, " if "://" in report.output else ""  # from_pretrained reads no store
        console.say(f"{copied}loads with {report.loads_with}{without}")
    elif report.loadable is False:
        counts = f"{console.count(len(report.missing), 'weight')} missing, {len(report.unexpected)} unexpected"
        console.say(f"does not load with {report.loads_with}: {counts}{without}")
    elif report.loading_unchecked:
        console.say(f"not checked whether it loads: {report.loading_unchecked}")
    elif "config.json" not in report.sidecars and not options["adapter"]:
        console.say(
            "No config.json was found beside the checkpoint. Name the model's folder with --config-from to make OUT"
            " loadable.",
            err=True,
        )
    elif options["adapter"]:
        console.say(f'loads with PeftModel.from_pretrained(base_model, "{report.output}")')
    elif not (report.verified or options["fold_lora"] or options["revision"] or options["weights"] != "masters"):
        console.say(f"prove it with: {_verify_command(report, options)}")


def _verify_command(report: Any, options: dict[str, Any]) -> str:
    words = ["dsconv", "verify", report.source, report.output]
    words += ["--allow-cast"] if options["dtype"] is not None else []
    words += ["--subset"] if options["exclude_frozen"] else []
    words += ["--item", report.item] if report.item is not None else []
    words += ["--follow-links"] if options["follow_links"] else []
    return shlex.join(words)


def _show_plan(report: Any) -> None:
    rows, file = [], None
    for row in report.plan:
        if row["file"] != file:
            file = row["file"]
            rows.append((f"{file}:", "", "", "", "", "", ""))
        rows.append((f"  {row['name']}", *console.plan_cells(row), row["role"], f"{row['pieces']:,}"))
    left = [(title, "left") for title in ("tensor", "dtype", "shape")]
    at = [("offset", "right"), ("bytes", "right")]
    console.say("")
    console.long_table([*left, *at, ("role", "left"), ("pieces", "right")], rows, "--json lists all of them")
    console.say(
        "",
        f"{console.count(report.tensors, 'tensor')}, {console.size(report.nbytes)} in"
        f" {console.count(len(report.files), 'file')}; nothing was written (--dry-run)",
    )
    if report.left_out:
        console.say(f"left out: {console.counts(report.left_out)}")
    if report.sidecars:
        console.say(f"with {', '.join(report.sidecars)}")
