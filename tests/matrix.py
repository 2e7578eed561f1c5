"""Write docs/matrix.md: what each trainer saves, whether it is merged exactly, and whether the output loads.

``python -m tests.matrix docs/matrix.md`` merges the suite's checkpoints, which the trainers' real code wrote, compares
every tensor with the trained one, and loads the outputs with transformers or PEFT. ``--section NAME`` prints one part.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import dsconv
from dsconv.errors import DsconvError
from tests.fixtures import gloo, peft_methods, peft_runs, zero
from tests.fixtures.kept import KEPT, PEFT, Kept
from tests.trained import Trained, load_safetensors, same

NONE = "–"


@dataclass(frozen=True)
class Row:
    """A fixture's checkpoint and how to merge it. ``where`` is the path in its folder; "" is the path that Trained
    takes.
    """

    trainer: str
    saves: str
    maker: str
    case: str
    where: str = ""
    options: dict[str, Any] = field(default_factory=dict)


def deepspeed() -> Iterator[Row]:
    names = {
        "llama_tied": "Llama, tied embeddings",
        "llama_frozen": "Llama, frozen layers",
        "gpt2": "GPT-2",
        "t5": "T5",
        "mixtral": "Mixtral",
    }
    for stage in range(4):
        for model, said in names.items():
            yield Row(f"DeepSpeed, ZeRO-{stage}" if stage else "DeepSpeed, no ZeRO", f"{said}, bf16, 2 ranks", "zero",
                      f"{model}-z{stage}-bf16-w2")  # fmt: skip
    cases = zero.CASES
    for name, case in cases.items():
        if case.options.driver == "trainer":
            yield Row("the Trainer with DeepSpeed", name, "zero", name)
    for name in ("llama-tp2-z0-bf16", "llama-tp2-z1-bf16", "llama-tp2-z3-bf16"):
        yield Row("DeepSpeed AutoTP", name, "autotp", name)
    for name in ("pp2-z0-bf16", "pp2-z1-bf16"):
        yield Row("DeepSpeed PipelineModule", name, "pipeline", name)
    for name in ("z1-fp32-w2-ep1", "z0-fp32-w2-ep2"):
        yield Row("deepspeed.moe", name, "moe", name)


def torch_engines() -> Iterator[Row]:
    said = {
        "fsdp2-w3": ("FSDP2", "DCP"), "fsdp1-w3": ("FSDP1", "DCP"), "hsdp-w4": ("HSDP", "DCP"), "tp-w3": ("TP", "DCP"),
        "fsdp2_tp-w4": ("FSDP2 × TP", "DCP"), "mesh3-w4": ("a mesh of three dimensions", "DCP"),
        "zstd-w3": ("FSDP2", "DCP, zstd"),
        "wrapped-w3": ("FSDP2, compiled and checkpointed", "DCP"), "titan-w3": ("torchtitan", "DCP steps"),
        "accelerate-w3": ("accelerate FSDP2", "DCP"), "trainer-w2": ("the Trainer with FSDP", "DCP"),
        "tied-w3": ("FSDP2, tied", "DCP"),
        "hf-w3": ("FSDP2", "safetensors shards"), "hf_tp-w4": ("FSDP2 × TP", "safetensors shards"),
        "hf_transformers-w4": ("transformers", "save_pretrained(distributed_checkpoint=True)"),
    }  # fmt: skip
    for case, (trainer, saves) in said.items():
        yield Row(trainer, saves, "dcp", case, "ckpt")
    ranks = {
        "verl-fsdp2-w4": ("verl, FSDP2", "global_step_7"), "verl-hsdp-w4": ("verl, HSDP", "global_step_7/actor"),
        "verl-fsdp1-mesh-w4": ("verl, FSDP1", "global_step_7/actor"), "fsdp2-tp-w4": ("FSDP2 × TP", "."),
        "fsdp1-sharded-w3": ("FSDP1, sharded", "."),
    }  # fmt: skip
    for case, (trainer, where) in ranks.items():
        yield Row(trainer, "a .pt file per rank", "rankfiles", case, where)


def merged_row(row: Row | Kept) -> str:
    """Merge a row's checkpoint and return its line of the table."""
    if isinstance(row, Kept):
        made, source, options = Trained(row.path), row.source, row.merge_options()
    else:
        made = Trained(gloo.ensure(row.maker, [row.case])[row.case])
        source, options = made.folder / row.where if row.where else made.checkpoint, row.options
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        try:
            report = dsconv.merge(source, out, fsync=False, **options)
        except DsconvError as error:
            return f"| {row.trainer} | {row.saves} | refused: {type(error).__name__} | {NONE} |"
        try:
            merged = load_safetensors(out)
            if isinstance(row, Kept):
                row.take_head(merged)
            stored_once = {alias: name for alias, name in report.ties.items() if alias not in made.tied}
            again = {alias: merged[name] for alias, name in stored_once.items() if alias in made.truth}
            made.check(merged | again, row.cast if isinstance(row, Kept) else None)
            exact = f"yes, {report.tensors} tensors"
        except AssertionError as error:
            exact = f"no: {str(error).splitlines()[0][:80]}"
        return (
            f"| {row.trainer} | {row.saves} | {exact} | {loads(report, out, row if isinstance(row, Kept) else None)} |"
        )


def loads(report: dsconv.MergeReport, out: Path, kept: Kept | None) -> str:
    """Load the output with the class that the report names, and return the result as text."""
    if report.loadable is None:
        return f"{NONE} (no config.json)" if "config.json" not in report.sidecars else NONE
    if not report.loadable:
        return f"no: {len(report.missing)} missing, {len(report.unexpected)} unexpected (said)"
    name = report.loads_with.partition(".")[0]
    if name == PEFT:
        return name if kept is not None and kept.peft_loads(out) else "no (not said)"
    import transformers

    _, info = getattr(transformers, name).from_pretrained(out, output_loading_info=True)
    wrong = [key for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for key in info[kind]]
    return f"no: {wrong[0]} (not said)" if wrong else name


def peft_row(method: str) -> str:
    """Return the table row of a PEFT method: ``--adapter`` from each engine, and ``--fold-lora``."""
    cells = [peft_cell(method, engine, where) for engine in peft_runs.ENGINES for where in places(engine)]
    folded = NONE
    if method.startswith("lora"):
        folded = fold_cell(method, "zero3")
    return f"| {method} | {' | '.join(cells)} | {folded} |"


def places(engine: str) -> tuple[str, ...]:
    return ("ckpt", "saved") if engine == "fsdp2" else ("ckpt",)


def peft_cell(method: str, engine: str, where: str) -> str:
    """Compare ``--adapter`` with PEFT's own file, and load it into the base with PEFT."""
    from peft import PeftModel

    case = f"{method}-{engine}"
    if case not in peft_runs.CASES:
        return "not trained by PEFT"
    folder = gloo.ensure("peft_runs")[case]
    name = "default" if method == "lora-two" and where == "ckpt" else None
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        try:
            dsconv.merge(folder / where, out, adapter=True, adapter_name=name, config_from=folder / "peft", fsync=False)
        except DsconvError as error:
            return f"refused: {str(error).partition(': ')[2][:60]}…" if where == "ckpt" else NONE
        ours, theirs = load_safetensors(out), load_safetensors(folder / "peft")
        if set(ours) != set(theirs) or not all(same(ours[key], theirs[key]) for key in theirs):
            return "no"
        base = peft_methods.base_model(peft_methods.METHODS[method])
        try:
            PeftModel.from_pretrained(base, str(out))
        except Exception as error:  # noqa: BLE001 - the table says it
            return f"equal; PEFT does not load its own: {type(error).__name__}"
    return "yes"


def fold_cell(method: str, engine: str) -> str:
    """Compare ``--fold-lora`` with ``merge_and_unload``."""
    from peft import PeftModel

    folder = gloo.ensure("peft_runs")[f"{method}-{engine}"]
    base = peft_methods.base_model(peft_methods.METHODS[method])
    expected = PeftModel.from_pretrained(base, str(folder / "peft")).merge_and_unload().state_dict()
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out"
        name = "default" if method == "lora-two" else None
        dsconv.merge(folder / "ckpt", out, fold_lora=True, adapter_name=name, config_from=folder / "peft", fsync=False)
        ours = load_safetensors(out)
        return "yes" if all(same(tensor, expected[key]) for key, tensor in ours.items()) else "no"


HEAD = """# The matrix: what trainers save, merged exactly, and loaded

Made by `python -m tests.matrix docs/matrix.md` with peft {peft}, transformers {transformers}, DeepSpeed {deepspeed}
and torch {torch}. Every checkpoint was written by the trainer's real code (tests/fixtures, or tests/data with the
script that made it). "yes" means that every tensor was compared with the training's own, bit for bit, under its own
name; the last column is the class that loaded the output with no weight missing and none too many.
"""
SECTIONS: dict[str, Callable[[], Iterator[Row | Kept]]] = {
    "DeepSpeed": deepspeed,
    "torch": torch_engines,
    "Other trainers": lambda: iter(KEPT),
}


def lines(section: str) -> Iterator[str]:
    """Yield the lines of one section."""
    if section == "PEFT":
        yield "## PEFT: `--adapter` against `save_pretrained`, `--fold-lora` against `merge_and_unload`"
        yield ""
        yield "| method | ZeRO-2 | ZeRO-3 | FSDP2, DCP | FSDP2, PEFT's saved names | folded (ZeRO-3) |"
        yield "|---|---|---|---|---|---|"
        yield from (peft_row(method) for method in peft_methods.METHODS)
        return
    yield f"## {section}"
    yield ""
    yield "| trainer | saves | merged exactly | loads with |"
    yield "|---|---|---|---|"
    yield from (merged_row(row) for row in SECTIONS[section]())


def main() -> int:
    """Write the table."""
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("output", type=Path, nargs="?")
    parser.add_argument("--section", choices=[*SECTIONS, "PEFT"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = [options.section] if options.section else [*SECTIONS, "PEFT"]
    text = HEAD.format(**{name: version(name) for name in ("peft", "transformers", "deepspeed", "torch")})
    for section in chosen:
        text += "\n" + "\n".join(lines(section)) + "\n"
    if options.output is None:
        sys.stdout.write(text)
    else:
        options.output.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
