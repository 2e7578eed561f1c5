"""``dsconv config``."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from dsconv.cli import console
from dsconv.errors import EXIT_MISMATCH, EXIT_UNREADABLE, MalformedError

if TYPE_CHECKING:
    from dsconv.zero_utils.config import DSConfig
    from dsconv.zero_utils.config_recipes import Recipe

STYLES = {"error": "red", "warning": "yellow", "info": "cyan"}


@click.command(epilog="""\b
Example:
  dsconv config ds.json
  dsconv config ds.json --model org/model --world 8 --micro-batch 2 --lr 2e-5
  dsconv config --recipe zero3-offload-cpu > ds.json

Exit code 3 where DeepSpeed would refuse the config (or it cannot be read), 5
where it says something else than the options.""")  # fmt: skip
@click.argument("ds_config", required=False, metavar="[DS_JSON]")
@click.option(
    "--recipe", metavar="NAME", help="Print this recipe as JSON, its comments on stderr, in place of reading DS_JSON."
)
@click.option("--list-recipes", is_flag=True, help="List the recipes.")
@click.option(
    "--model", metavar="MODEL", help="A folder, a config.json or org/model: its hidden size gives the bucket sizes."
)
@click.option("--world", "world_size", type=click.IntRange(1), metavar="N", help="Processes in all.")
@click.option(
    "--micro-batch",
    "per_device_train_batch_size",
    type=click.IntRange(1),
    metavar="N",
    help="Samples a rank takes at once.",
)
@click.option(
    "--grad-accum", "gradient_accumulation_steps", type=click.IntRange(1), metavar="N", help="Micro-batches a step."
)
@click.option("--lr", "learning_rate", type=float, metavar="X", help="Learning rate.")
@click.option("--betas", type=(float, float), metavar="B1 B2", help="Adam's decay rates.")
@click.option("--eps", "adam_epsilon", type=float, metavar="X", help="Adam's epsilon.")
@click.option("--weight-decay", type=float, metavar="X", help="Weight decay.")
@click.option("--max-grad-norm", type=float, metavar="X", help="Gradient clipping.")
@click.option("--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), help="Precision of the training.")
@click.option("--steps", "num_training_steps", type=click.IntRange(1), metavar="N", help="Steps in all.")
@click.option(
    "--warmup-steps", type=click.FloatRange(0), metavar="N", help="Steps of warm-up, or a share of --steps below 1."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--quiet", "-q", is_flag=True, help="Print nothing but errors; the exit code tells.")
@click.option("--debug", "-d", is_flag=True, help="On an error, print the traceback.")
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
    """Check a DeepSpeed config, and fill in its "auto" values as transformers does.

    Says what DeepSpeed would refuse, ignore in silence or not do, with what to write instead; the options are what
    "auto" becomes, and what the config must agree with. DeepSpeed need not be installed.
    """
    from dsconv.checkpoint.hidden_size import read_hidden_size
    from dsconv.zero_utils.config import DSConfig
    from dsconv.zero_utils.config_auto import TrainingValues
    from dsconv.zero_utils.config_recipes import RECIPES

    if list_recipes:
        _list_recipes(as_json)
        return
    if recipe is not None and recipe not in RECIPES:
        raise click.UsageError(f"No such recipe: {recipe}. There are: {', '.join(RECIPES)}.")
    source = ds_config if recipe is None else RECIPES[recipe].config
    if source is None or (ds_config and recipe):
        raise click.UsageError("Give one of DS_JSON and --recipe NAME (--list-recipes lists them).")
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
            "stage": _told(resolved, "stage"),
            "offload": _told(resolved, "is_offload"),
            "dtype": _told(resolved, "dtype"),
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
            click.echo(f"Error: {' and '.join(wrong)} in {read.source}", err=True)
        if errors and not mismatches:
            context.exit(EXIT_UNREADABLE)
    if mismatches:
        context.exit(EXIT_MISMATCH)


def _told(config: DSConfig, what: str) -> Any:
    """A property of the config; None where its value is malformed, which a finding tells, or still "auto"."""
    try:
        return getattr(config, what)
    except MalformedError:
        return None


def _show(report: dict[str, Any]) -> None:
    from dsconv.zero_utils.config_auto import AUTO_KEYS

    stage = "no ZeRO" if report["stage"] == 0 else f"ZeRO-{'?' if report['stage'] is None else report['stage']}"
    offload = ", offload" if report["offload"] else ""
    click.echo(f"{report['source']}: {stage}{offload}, {report['dtype'] or 'precision not known yet'}")
    for finding in report["findings"]:
        label = click.style(f"{finding['severity']:<8}", fg=STYLES[finding["severity"]] if console.colour() else None)
        click.echo(f"{label} {finding['key'] or 'the file'}\n         {finding['message']} {finding['fix']}")
    for mismatch in report["mismatches"]:
        label = click.style("mismatch", fg="red" if console.colour() else None)
        said = f"The config says {mismatch['found']}, and {mismatch['argument']} is {mismatch['expected']}."
        click.echo(f"{label} {mismatch['key']}\n         {said}")
    if report["auto"]:
        click.echo('Still "auto", and what the Trainer writes there:')
        for key in report["auto"]:
            click.echo(f"  {key}: {AUTO_KEYS.get(key, 'nothing')}")
    click.echo(json.dumps(report["resolved"], indent=2))


def _show_recipe(recipe: Recipe, config: dict[str, Any], as_json: bool, quiet: bool) -> None:
    if as_json:
        console.show_json(
            {"recipe": recipe.name, "summary": recipe.summary, "config": config, "comments": recipe.comments}
        )
        return
    click.echo(json.dumps(config, indent=2))
    if not quiet:
        width = max(map(len, recipe.comments))
        click.echo(f"\n{recipe.name}: {recipe.summary}", err=True)
        for key, why in recipe.comments.items():
            click.echo(f"  {key:<{width}}  {why}", err=True)


def _list_recipes(as_json: bool) -> None:
    from dsconv.zero_utils.config_recipes import RECIPES

    if as_json:
        console.show_json({"recipes": {recipe.name: recipe.summary for recipe in RECIPES.values()}})
    else:
        for recipe in RECIPES.values():
            click.echo(f"{recipe.name:<18} {recipe.summary}")
