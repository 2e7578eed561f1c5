"""``dsconv config``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from dsconv.cli import console
from dsconv.cli.console import Dtype, command
from dsconv.errors import EXIT_MISMATCH, EXIT_UNREADABLE, MalformedError

if TYPE_CHECKING:
    from dsconv.zero_utils.config import DSConfig
    from dsconv.zero_utils.config_recipes import Recipe

STYLES = {"error": "red", "warning": "yellow", "info": "cyan"}


@command(epilog="""\b
Example:
  dsconv config ds.json
  dsconv config ds.json --model org/model --world 8 --micro-batch 2 --lr 2e-5
  dsconv config --recipe zero3-offload-cpu > ds.json

Exit code 3 if DeepSpeed would refuse the config or it cannot be read, 5 if it
contradicts the options.""")  # fmt: skip
@click.argument("ds_config", required=False, metavar="[DS_JSON]")
@click.option(
    "--recipe", metavar="NAME", help="Print a recipe as JSON, and its comments on stderr, instead of reading DS_JSON."
)
@click.option("--list-recipes", is_flag=True, help="List the recipes.")
@click.option(
    "--model", metavar="MODEL", help="Folder, config.json or org/model; its hidden size gives the bucket sizes."
)
@click.option("--world", "world_size", type=click.IntRange(1), metavar="N", help="Number of processes.")
@click.option(
    "--micro-batch",
    "per_device_train_batch_size",
    type=click.IntRange(1),
    metavar="N",
    help="Samples per forward pass on one rank.",
)
@click.option(
    "--grad-accum", "gradient_accumulation_steps", type=click.IntRange(1), metavar="N", help="Micro-batches per step."
)
@click.option("--lr", "learning_rate", type=float, metavar="X", help="Learning rate.")
@click.option("--betas", type=(float, float), metavar="B1 B2", help="Adam's decay rates.")
@click.option("--eps", "adam_epsilon", type=float, metavar="X", help="Adam's epsilon.")
@click.option("--weight-decay", type=float, metavar="X", help="Weight decay.")
@click.option("--max-grad-norm", type=float, metavar="X", help="Gradient clipping.")
@click.option("--dtype", type=Dtype(), help="Training precision.")
@click.option("--steps", "num_training_steps", type=click.IntRange(1), metavar="N", help="Number of steps.")
@click.option(
    "--warmup-steps", type=click.FloatRange(0), metavar="N", help="Steps of warm-up, or below 1 a share of --steps."
)
@console.JSON
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors; see the exit code.")
@console.DEBUG
@click.pass_context
def config(
    context: click.Context,
    /,
    ds_config: str | None,
    recipe: str | None,
    list_recipes: bool,
    model: str | None,
    betas: tuple[float, float] | None,
    dtype: str | None,
    as_json: bool,
    quiet: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Check a DeepSpeed config and fill in its "auto" values.

    The report names what DeepSpeed would refuse or silently ignore, and what to write instead. The options are the
    values that "auto" gets, as transformers fills it in, and that the config must agree with. DeepSpeed need not be
    installed.
    """
    from dsconv.checkpoint.hidden_size import read_hidden_size
    from dsconv.zero_utils.config import DSConfig
    from dsconv.zero_utils.config_auto import TrainingValues
    from dsconv.zero_utils.config_recipes import RECIPES

    if list_recipes:
        _list_recipes(as_json)
        return
    if recipe is not None and recipe not in RECIPES:
        raise click.UsageError(f"There is no recipe {recipe!r}. The recipes are {', '.join(RECIPES)}.")
    source = ds_config if recipe is None else RECIPES[recipe].config
    if source is None or (ds_config and recipe):
        raise click.UsageError("Give either DS_JSON or --recipe NAME (--list-recipes lists the names).")
    console.quiet_downloads(quiet or as_json)
    values = TrainingValues(
        **options,
        adam_beta1=betas[0] if betas else None,
        adam_beta2=betas[1] if betas else None,
        bf16=None if dtype is None else dtype == "bf16",
        fp16=None if dtype is None else dtype == "fp16",
        hidden_size=read_hidden_size(model) if model else None,
    )
    read = DSConfig.read(source)
    resolved, mismatches = read.filled(values)
    if recipe is not None:
        _show_recipe(RECIPES[recipe], resolved.to_dict(), as_json, quiet)
    else:
        findings = read.lint(options["world_size"])
        report = {
            "source": read.source,
            "stage": _value(resolved, "stage"),
            "offload": _value(resolved, "is_offload"),
            "dtype": _value(resolved, "dtype"),
            "findings": [vars(finding) for finding in findings],
            "mismatches": [vars(mismatch) for mismatch in mismatches],
            "auto": resolved.auto_keys,
            "resolved": resolved.to_dict(),
        }
        if as_json:
            console.show_json(report)
        elif not quiet:
            _show(report)
        errors = sum(finding.severity == "error" for finding in findings)
        if (errors or mismatches) and not as_json:
            wrong = [
                console.count(number, noun)
                for number, noun in ((errors, "error"), (len(mismatches), "mismatch"))
                if number
            ]
            console.say(f"Error: {' and '.join(wrong)} in {read.source}", err=True)
        if errors and not mismatches:
            context.exit(EXIT_UNREADABLE)
    if mismatches:
        context.exit(EXIT_MISMATCH)


def _value(config: DSConfig, what: str) -> Any:
    """Return a property of the config; None if it is malformed, which a finding reports, or still "auto"."""
    try:
        return getattr(config, what)
    except MalformedError:
        return None


def _show(report: dict[str, Any]) -> None:
    from dsconv.zero_utils.config_auto import AUTO_KEYS

    stage = "no ZeRO" if report["stage"] == 0 else f"ZeRO-{'?' if report['stage'] is None else report['stage']}"
    offload = ", offload" if report["offload"] else ""
    console.say(f"{report['source']}: {stage}{offload}, {report['dtype'] or 'precision not known yet'}")
    for finding in report["findings"]:
        severity = finding["severity"]
        console.say(finding["key"] or "the file", label=f"{severity:<8}", fg=STYLES[severity])
        console.say(f"         {finding['message']} {finding['fix']}")
    for mismatch in report["mismatches"]:
        console.say(mismatch["key"], label="mismatch", fg="red")
        console.say(
            f"         The config has {mismatch['found']}, but {mismatch['argument']} is {mismatch['expected']}."
        )
    if report["auto"]:
        console.say('Still "auto"; the Trainer will set:')
        for key in report["auto"]:
            console.say(f"  {key}: {AUTO_KEYS.get(key, 'nothing')}")
    console.say_text(json.dumps(report["resolved"], indent=2))


def _show_recipe(recipe: Recipe, config: dict[str, Any], as_json: bool, quiet: bool) -> None:
    if as_json:
        console.show_json(
            {"recipe": recipe.name, "summary": recipe.summary, "config": config, "comments": recipe.comments}
        )
        return
    console.say_text(json.dumps(config, indent=2))
    if not quiet:
        width = max(map(len, recipe.comments))
        console.say("", f"{recipe.name}: {recipe.summary}", err=True)
        for key, why in recipe.comments.items():
            console.say(f"  {key:<{width}}  {why}", err=True)


def _list_recipes(as_json: bool) -> None:
    from dsconv.zero_utils.config_recipes import RECIPES

    if as_json:
        console.show_json({"recipes": {recipe.name: recipe.summary for recipe in RECIPES.values()}})
    else:
        for recipe in RECIPES.values():
            console.say(f"{recipe.name:<18} {recipe.summary}")
