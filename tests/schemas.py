"""The JSON Schemas in docs/schemas of what ``--json`` prints: they are made from the report classes and checked against
output.

``make schemas`` writes them. A field that is renamed, removed or given another type needs a new version here; a field
that is added does not.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jsonschema
from pydantic import TypeAdapter

from dsconv.checkpoint.summary import OptimizerSummary
from dsconv.convert.compare import VerifyReport
from dsconv.convert.dcp_writer import DcpReport
from dsconv.convert.diff import DiffReport
from dsconv.convert.merge import MergeReport
from dsconv.convert.push_upload import PushReport
from dsconv.convert.universal_writer import UniversalReport
from dsconv.convert.values import ValuesReport
from dsconv.engine.running import RunReport
from dsconv.engine.validation_report import ValidationReport

FOLDER = Path(__file__).resolve().parent.parent / "docs" / "schemas"
Schema = dict[str, Any]

TEXT: Schema = {"type": "string"}
WHOLE: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
YES: Schema = {"type": "boolean"}
TEXTS: Schema = {"type": "array", "items": TEXT}


def maybe(schema: Schema) -> Schema:
    return {"anyOf": [schema, {"type": "null"}]}


def many(schema: Schema) -> Schema:
    return {"type": "array", "items": schema}


def table(schema: Schema) -> Schema:
    """Return the schema of an object whose keys are names from the checkpoint or similar."""
    return {"type": "object", "additionalProperties": schema}


def fields(**properties: Schema) -> Schema:
    """Return the schema of an object with exactly these fields."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def of(report: type, **more: Schema) -> Schema:
    """Return the schema of a report class, all of whose fields are printed, and of what its command adds."""
    made = TypeAdapter(report).json_schema(mode="serialization")
    for part in (made, *made.get("$defs", {}).values()):
        for schema in part["properties"].values():
            schema.pop("title", None)
            schema.pop("default", None)
        part.update(required=list(part["properties"]), additionalProperties=False)
        part.pop("title", None)
    made["properties"] |= more
    made["required"] += more
    return made


def _diff() -> Schema:
    made = of(DiffReport, equal=YES, seconds=NUMBER)
    distance = made["$defs"]["Distance"]
    distance["properties"]["changed_fraction"] = NUMBER
    distance["required"].append("changed_fraction")
    for name in ("max_abs", "max_relative", "l2"):
        distance["properties"][name] = maybe(NUMBER)  # null stands for infinity, which JSON does not have
    return made


def _inspect() -> Schema:
    tensor = fields(
        name=TEXT, dtype=TEXT, shape=many(WHOLE), role=TEXT, bytes=WHOLE, pieces=WHOLE, aliases=TEXTS
    )  # fmt: skip
    of_values = of(ValuesReport, problems=TEXTS)
    one = fields(
        schema=TEXT, path=TEXT, format=TEXT, trainer=TEXT, content=TEXT, names=TEXT, step=maybe(WHOLE),
        world=table(WHOLE), info={"type": "object"}, parameters=WHOLE, bytes=WHOLE, ties=table(TEXT), warnings=TEXTS,
        files=many(fields(name=TEXT, bytes=WHOLE)), tensors=many(tensor), values={"$ref": "#/$defs/ValuesReport"},
    )  # fmt: skip
    one["required"].remove("values")
    optimizer = of(OptimizerSummary)
    one["properties"]["optimizer"] = maybe({"$ref": "#/$defs/OptimizerSummary"})
    one["required"].append("optimizer")
    several = fields(schema=TEXT, path=TEXT, models=table(WHOLE))
    return {
        "anyOf": [one, several],
        "$defs": {**of_values.pop("$defs"), "ValuesReport": of_values, "OptimizerSummary": optimizer},
    }


def _config() -> Schema:
    finding = fields(severity=TEXT, key=TEXT, message=TEXT, fix=TEXT)
    mismatch = fields(key=TEXT, found={}, argument=TEXT, expected={})
    checked = fields(
        schema=TEXT, source=TEXT, stage=maybe(WHOLE), offload=maybe(YES), dtype=maybe(TEXT), findings=many(finding),
        mismatches=many(mismatch), auto=TEXTS, resolved={"type": "object"},
    )  # fmt: skip
    recipe = fields(schema=TEXT, recipe=TEXT, summary=TEXT, config={"type": "object"}, comments=table(TEXT))
    return {"anyOf": [checked, recipe, fields(schema=TEXT, recipes=table(TEXT))]}


def _estimate() -> Schema:
    sizes = fields(**{name: maybe(WHOLE) for name in GPU})
    setting: Schema = {
        "type": "object",
        "properties": {"gpu": sizes, "cpu": WHOLE, "cpu_per_node": WHOLE, "nvme_per_node": WHOLE, "checkpoint": WHOLE},
        "required": ["gpu", "cpu", "cpu_per_node", "nvme_per_node", "checkpoint"],
    }
    anything: Schema = {"type": "object"}
    return fields(model=anything, job=anything, settings=many(setting), limit=maybe(WHOLE), fit=maybe(setting))


GPU = ("parameters", "gradients", "optimizer", "buffers", "activations", "step", "peak")


def _doctor() -> Schema:
    check = fields(what=TEXT, works=YES, tried=YES, seconds=NUMBER, problem=maybe(TEXT), fix=TEXT)
    devices = fields(cores=WHOLE, memory_bytes=WHOLE, accelerators=TEXTS)
    return fields(
        dsconv=TEXT, python=TEXT, system=TEXT, packages=table(maybe(TEXT)), devices=devices,
        free_bytes=table(maybe(WHOLE)), works=many(check),
    )  # fmt: skip


@functools.cache
def schemas() -> dict[str, Schema]:
    """Return {name/version: schema}. The name is the command's, but ``merge`` also serves zero-to-fp32, ``train`` also
    resume, and ``error`` every command.
    """
    made = {
        "merge/1": of(MergeReport, seconds=NUMBER),
        "to-universal/1": of(UniversalReport, seconds=NUMBER),
        "to-dcp/1": of(DcpReport, seconds=NUMBER),
        "inspect/1": _inspect(),
        "verify/1": of(VerifyReport, equal=YES, seconds=NUMBER),
        "diff/1": _diff(),
        "push/1": of(PushReport, seconds=NUMBER),
        "config/1": _config(),
        "estimate/1": _estimate(),
        "train/1": of(RunReport),
        "validate/1": of(ValidationReport),
        "doctor/1": _doctor(),
        "error/1": fields(error=TEXT, type=TEXT, exit_code=WHOLE),
    }
    for name, schema in made.items():
        if "properties" in schema:
            schema["properties"] = {"schema": {"const": f"dsconv.{name}"}, **schema["properties"]}
            schema["required"] = ["schema", *schema["required"]]
        for form in schema.get("anyOf", ()):
            form["properties"]["schema"] = {"const": f"dsconv.{name}"}
        schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
        schema["title"] = f"dsconv.{name}"
    return made


def file_of(name: str) -> Path:
    return FOLDER / f"{name.replace('/', '.')}.json"


def text_of(schema: Schema) -> str:
    return json.dumps(schema, indent=1, sort_keys=True) + "\n"


def check(printed: Any) -> None:
    """Raise unless what ``--json`` printed follows the schema that it names."""
    name = printed["schema"].removeprefix("dsconv.")
    jsonschema.validate(printed, json.loads(file_of(name).read_text()))


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for each, made_of in schemas().items():
        file_of(each).write_text(text_of(made_of))
