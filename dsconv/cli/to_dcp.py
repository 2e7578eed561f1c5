"""``dsconv to-dcp``."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import click

from dsconv.cli import console
from dsconv.cli.console import Dtype, Size, command
from dsconv.names.marks import FRAMEWORKS, STORED

if TYPE_CHECKING:
    from dsconv.convert.dcp_writer import DcpReport


@command("to-dcp", epilog="""\b
Example:
  dsconv to-dcp merged/ checkpoint/
  dsconv to-dcp merged/ checkpoint-0/pytorch_model_fsdp_0/ --prefix model.
  dsconv to-dcp checkpoints/ moved/ --optimizer""")  # fmt: skip
@click.argument("checkpoint", type=click.Path(), metavar="CKPT")
@click.argument("output", type=click.Path(), metavar="OUT")
@click.option(
    "--prefix",
    default="",
    metavar="KEY.",
    help="Put KEY. before every name, as the trainer's key of its model.",
)
@click.option(
    "--names",
    type=click.Choice([STORED, *FRAMEWORKS]),
    default="stored",
    show_default=True,
    help="Keep the names, or give a framework's to a model.",
)
@click.option(
    "--optimizer",
    is_flag=True,
    help="Write the optimizer too, with the fp32 masters as the parameters.",
)
@click.option(
    "--layout",
    type=click.Choice(["torch", "accelerate", "torchtitan"]),
    default="torch",
    show_default=True,
    help="With --optimizer: whose loader takes both: torch's state-dict API, accelerate's load_state, torchtitan's.",
)
@click.option("--tag", "-t", metavar="TAG", help="Checkpoint to read (default: the one that 'latest' names).")
@console.ITEM
@console.FOLLOW_LINKS
@click.option(
    "--dtype",
    type=Dtype(),
    help="Cast floats, once, to nearest even (default: as stored).",
)
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True, help="Largest file.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--force", is_flag=True, help="Replace a DCP checkpoint that OUT already holds.")
@click.option(
    "--fsync/--no-fsync",
    default=None,
    help="Flush the output to the disk (default: yes).",
)
@click.option(
    "--workers", type=click.IntRange(1, 256), metavar="N", help="Copying threads (default: one a core, at most 8)."
)
@console.PART
@console.JSON
@console.QUIET
@console.DEBUG
def to_dcp(checkpoint: str, output: str, as_json: bool, quiet: bool, debug: bool, **options: Any) -> None:
    """Convert a checkpoint of any format to a DCP directory.

    torch.distributed.checkpoint.load reads OUT into plain, FSDP2 and tensor-parallel models, on any number of ranks.
    """
    from dsconv.convert.dcp_writer import to_dcp as convert

    began = time.monotonic()
    with console.progress(quiet or as_json) as progress:
        try:
            report = convert(checkpoint, output, progress=progress, **options)
        except ValueError as error:
            if type(error) is ValueError:  # dsconv's own errors are ValueErrors too
                raise click.UsageError(str(error)) from None
            raise
    seconds = time.monotonic() - began
    if not console.show_report(report, seconds, as_json, quiet):
        return
    if report.plan:
        left = [(title, "left") for title in ("file", "tensor", "dtype", "shape")]
        right = [(title, "right") for title in ("offset", "bytes", "chunks", "pieces")]
        rows = [
            (row["file"], row["name"], *console.plan_cells(row), f"{row['chunks']:,}", f"{row['pieces']:,}")
            for row in report.plan
        ]
        console.long_table([*left, *right], rows, "--json lists all of them")
    total = (
        f"{console.count(report.tensors, 'tensor')}, {console.count(report.parameters, 'parameter')},"
        f" {console.size(report.nbytes)}"
    )
    end = "nothing was written (--dry-run)" if report.dry_run else f"{seconds:.2f} s"
    console.say(f"{total} in {console.count(len(report.files), 'file')}, {end}")
    is_megatron = options["names"] == "megatron"
    for alias, name in () if is_megatron else report.ties.items():
        console.say(f"{alias} is tied to {name}, stored once")
    if report.layout:
        states = ", ".join(report.states)
        console.say(f"optimizer: {states} in {console.count(report.parameter_groups, 'parameter group')}")
    if not report.dry_run:
        console.say(_how_to_load(report, is_megatron))


def _how_to_load(report: DcpReport, is_megatron: bool) -> str:
    if is_megatron:
        folder = f"{report.output}/{report.files[0].partition('/')[0]}"
        return (
            f'load it with megatron.core.dist_checkpointing.load(sharded_state_dict, "{folder}"), or --load'
            f" {report.output}"
        )
    if report.layout == "accelerate":
        return f'load it with accelerator.load_state("{report.output}")'
    if report.layout == "torchtitan":
        return (
            f'load it with checkpoint.initial_load_path = "{report.output}", initial_load_model_only = false and'
            ' exclude_from_loading = ["dataloader"] in torchtitan'
        )
    keys = '{"model": …, "optim": …}' if report.layout else "state_dict"
    return f'load it with torch.distributed.checkpoint.load({keys}, checkpoint_id="{report.output}")'
