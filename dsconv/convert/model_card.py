"""The model card of a pushed folder: what is known of the model, as a section of its README.md that a later push
replaces.

A README that is there keeps every line. What is added lies between two comments at its end; of the metadata block, keys
that it lacks are added after its last line (``repocard.py`` of huggingface_hub would write the block anew, and lose its
comments).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsconv._version import __version__
from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.storage.hub import is_repo
from dsconv.convert.sidecars import read_json
from dsconv.text import clean
from dsconv.text import count as counted

CARD = "README.md"
BEGIN, END = "<!-- dsconv: begin, written anew by each push -->", "<!-- dsconv: end -->"
PLAIN = re.compile(r"[A-Za-z0-9 ,()+-]*|\d+(\.\w+)*", re.ASCII)  # text in which Markdown sees nothing
# The metadata block, as the Hub finds it (huggingface_hub repocard.py REGEX_YAML_BLOCK), and what a line of plain
# YAML may be: one of these, or the block is left as it is, since keys cannot be added to `{a: b}`.
CLASS = re.compile(r"[A-Za-z_]\w{0,99}", re.ASCII)
MAX_CELL = 200
BLOCK = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$))")
YAML_LINE = re.compile(r"""\s*$|\s*\#|\s+\S|-\s|(?P<quote>["']?)(?P<key>[\w-]+)(?P=quote)\s*:(\s|$)""")


def make_card(
    existing: str | None,
    repo: str,
    folder: Path,
    model: Checkpoint,
    manifest: Mapping[str, Any] | None,
    sizes: Mapping[str, int],
    digests: Mapping[str, str],
) -> str:
    """Return README.md for ``repo``: ``existing`` with what is known of the model put in.

    Args:
        existing: the card to add to; None makes one.
        repo: the repository, ``org/model``.
        folder: the folder that is pushed.
        model: its tensors.
        manifest: that of the folder, if it has one.
        sizes: the size in bytes of each file that is pushed, by name.
        digests: the sha256 of each file, by name.
    """
    source: Mapping[str, Any] = (manifest or {}).get("source", {})
    base = base_model(folder, source, repo)
    section = f"{BEGIN}\n{_section(repo, folder, model, manifest, base, sizes, digests)}\n{END}"
    metadata = {
        "base_model": base,
        "library_name": (
            "peft" if model.info.get("adapter") else "transformers" if (folder / "config.json").is_file() else None
        ),
        "tags": ["dsconv"] if manifest is not None else None,
    }
    return merged(existing if existing is not None else f"# {repo.partition('/')[2]}\n", section, metadata)


def merged(text: str, section: str, metadata: Mapping[str, Any]) -> str:
    """Return ``text`` with ``section`` in place of an earlier one, or at its end, and with the keys of ``metadata``
    that
    it lacks.
    """
    newline = "\r\n" if "\r\n" in text else "\n"
    section = section.replace("\n", newline)
    if (place := section_of(text)) is not None:
        text = text[: place[0]] + section + text[place[1] :]
    else:
        gap = "" if not text or text.endswith(newline * 2) else newline if text.endswith("\n") else newline * 2
        text = f"{text}{gap}{section}{newline}"
    bom = "\ufeff" if text.startswith("\ufeff") else ""
    return bom + _with_metadata(text.removeprefix(bom), metadata, newline)


def section_of(text: str) -> tuple[int, int] | None:
    """Return where an earlier push's section begins and ends in a card; None if there is none."""
    begin = text.find(BEGIN)
    end = text.find(END, begin) if begin >= 0 else -1
    return (begin, end + len(END)) if end >= 0 else None


def _with_metadata(text: str, metadata: Mapping[str, Any], newline: str) -> str:
    from huggingface_hub import ModelCardData

    block = BLOCK.match(text)
    lines = [YAML_LINE.match(line) for line in block[2].splitlines()] if block else []
    if not all(lines):
        return text
    there = {line["key"] for line in lines if line}
    missing = ModelCardData(**{key: value for key, value in metadata.items() if value and key not in there})
    if not missing.to_dict():
        return text
    added = missing.to_yaml(line_break=newline)
    if block is None:
        return f"---{newline}{added}{newline}---{newline}{newline}{text}"
    return f"{block[1]}{block[2]}{newline}{added}{block[3]}{text[block.end() :]}"


def base_model(folder: Path, source: Mapping[str, Any], repo: str) -> str | None:
    """Return the repository that the model came from.

    The adapter's or model's configuration may name it, or the manifest, or None if none does.
    """
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        config = read_json(folder / name)
        found = config.get(key) if isinstance(config, dict) else None
        if isinstance(found, str) and is_repo(found) and found != repo:
            return found
    found = source.get("repo")
    return found if isinstance(found, str) and is_repo(found) and found != repo else None


def _section(
    repo: str,
    folder: Path,
    model: Checkpoint,
    manifest: Mapping[str, Any] | None,
    base: str | None,
    sizes: Mapping[str, int],
    digests: Mapping[str, str],
) -> str:
    source: Mapping[str, Any] = (manifest or {}).get("source", {})
    world = source.get("world")
    facts = {
        "base model": f"[{base}](https://huggingface.co/{base})" if base else None,
        "merged from": _cell(source["format"]) if source.get("format") else None,
        "ranks": (
            _cell(", ".join(f"{n} {str(kind).replace('_', ' ')}" for kind, n in world.items()))
            if isinstance(world, dict)
            else None
        ),
        "step": _cell(source["step"]) if source.get("step") is not None else None,
        "dtype": ", ".join(str(dtype) for dtype in dtypes(model)),
        "parameters": f"{model.numel:,} in {counted(len(model), 'tensor')}",
        "size": f"{model.nbytes:,} bytes",
    }
    made = (
        "Merged with [dsconv](https://pypi.org/project/dsconv/)"
        f" {_cell(manifest.get('dsconv_version') or __version__)}; `dsconv.manifest.json` has where each tensor lies"
        " and its CRC-32."
        if manifest is not None
        else ""
    )
    weights = min(name for name in sizes if name.endswith(".safetensors"))
    rows = [f"| {_code(name)} | {sizes[name]:,} | `{digest}` |" for name, digest in sorted(digests.items())]
    return "\n".join([
        "## The weights",
        *(["", made] if made else []),
        "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items() if value),
        "", "```python", *_loading(repo, folder, base, bool(model.info.get("adapter")), weights),
        "```",
        "", "| file | bytes | sha256 |", "|---|---:|---|", *rows,
    ])  # fmt: skip


def dtypes(model: Checkpoint) -> list[DType]:
    """Return the element types of the model, the one with the most bytes first."""
    totals: dict[DType, int] = {}
    for entry in model.values():
        totals[entry.dtype] = totals.get(entry.dtype, 0) + entry.nbytes
    return sorted(totals, key=lambda dtype: (-totals[dtype], dtype.name))


def _loading(repo: str, folder: Path, base: str | None, is_adapter: bool, weights: str) -> list[str]:
    """Return the lines that load the model, with the class that config.json names."""
    if is_adapter:
        return ["from peft import PeftModel", "from transformers import AutoModel", "",
                f'base = AutoModel.from_pretrained("{base or "…"}")  # the class that the adapter was trained on',
                f'model = PeftModel.from_pretrained(base, "{repo}")']  # fmt: skip
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        return ["from huggingface_hub import hf_hub_download", "from safetensors.torch import load_file", "",
                f'tensors = load_file(hf_hub_download("{repo}", {_python(weights)}))']  # fmt: skip
    auto_map = config.get("auto_map")
    classes = (
        [key for key in auto_map if key.startswith("AutoModel")]
        if isinstance(auto_map, dict)
        else config.get("architectures")
    )
    name = classes[-1] if isinstance(classes, list) and classes else "AutoModel"
    name = name if isinstance(name, str) and CLASS.fullmatch(name) else "AutoModel"
    trust = ", trust_remote_code=True" if auto_map else ""
    return [f"from transformers import {name}", "", f'model = {name}.from_pretrained("{repo}"{trust})']


def _cell(value: Any) -> str:
    """Return text of a file for a cell of a table; as code unless Markdown sees nothing in it."""
    text = clean(str(value), MAX_CELL)
    return text if PLAIN.fullmatch(text) else _code(text)


def _code(value: Any) -> str:
    """Return text of a file as code in a cell of a table: no link, picture, HTML or new cell comes of it."""
    text = clean(" ".join(str(value).split()), MAX_CELL).replace("`", "'").replace("|", "¦")
    return f"`{text}`" if text else ""


def _python(text: str) -> str:
    """Return text of a file as a literal of Python that ends neither the line nor the block of code."""
    return (json.dumps(text) if text.isascii() else ascii(text)).replace("`", "\\x60")
