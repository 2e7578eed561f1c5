"""Which ``AutoModelFor…`` of transformers loads an architecture, read from its source without importing it."""

from __future__ import annotations

import re
from functools import cache, lru_cache
from importlib.util import find_spec
from pathlib import Path

# If several classes load an architecture, people use these.
PREFERRED = (
    "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM",
    "AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM", "AutoModelForSpeechSeq2Seq", "AutoModelForImageClassification", "AutoModel",
)  # fmt: skip
# The class by the end of an architecture's name, for use without transformers.
ENDINGS = {
    "ForCausalLM": "AutoModelForCausalLM", "LMHeadModel": "AutoModelForCausalLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification", "ForMaskedLM": "AutoModelForMaskedLM",
    "ForTokenClassification": "AutoModelForTokenClassification",
    "ForQuestionAnswering": "AutoModelForQuestionAnswering",
}  # fmt: skip


def auto_class(architecture: str, kind: str) -> str:
    """Return the class whose ``from_pretrained`` to call: an Auto class if one loads it, else the architecture itself.

    Args:
        architecture: The architecture that config.json names.
        kind: Its model_type.
    """
    text = _source()
    if text is None:
        return next((auto for ending, auto in ENDINGS.items() if architecture.endswith(ending)), architecture)
    item = re.compile(rf'\("{re.escape(kind)}",\s*\(?[^)]*"{re.escape(architecture)}"')
    found = set()
    for match in item.finditer(text):
        table = text.rfind("_NAMES", 0, match.start())  # MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict(
        mapping = text[text.rfind("\n", 0, table) + 1 : table]
        if used := text.find(f"_model_mapping = {mapping}\n", match.end()) + 1:
            found.add(text[text.rfind("class ", 0, used) + 6 : text.rfind("(", 0, used)])
    return next((auto for auto in PREFERRED if auto in found), architecture)


@lru_cache(maxsize=64)
def architectures_of(kind: str) -> tuple[str, ...]:
    """Return the classes that Auto classes have for a model_type, those of the classes that people use first."""
    text = _source()
    if text is None:
        return ()
    item = re.compile(rf'\("{re.escape(kind)}",\s*"(\w+)"\)')
    found = []
    for auto in PREFERRED:
        if (
            mapping := re.search(rf"class {auto}\(_BaseAutoModelClass\):.*?_model_mapping = (\w+)", text, re.DOTALL)
        ) is None:
            continue
        begin = re.search(rf"^{mapping[1]}_NAMES\b.*= OrderedDict\(", text, re.MULTILINE)
        if begin and (match := item.search(text, begin.end(), text.find("\n)", begin.end()))):
            found.append(match[1])
    return tuple(dict.fromkeys(found))


@cache
def _source() -> str | None:
    spec = find_spec("transformers")
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        path = Path(spec.submodule_search_locations[0]) / "models" / "auto" / "modeling_auto.py"
        return path.read_text(encoding="utf-8")
    except OSError:
        return None
