"""Does the output load? Its names and shapes are compared with the architecture that its config.json names.

There are three ways, and the cheapest comes first. The architecture's source in transformers is read without importing
it, which takes milliseconds. Where that is not enough, for instance for models whose weights transformers renames or
fuses, transformers itself builds the model on the meta device, in a process of its own that runs beside the copy.
Without transformers nothing is claimed.

A config.json may come from anybody. That process looks for modules where this one does and never in the current folder,
reaches no network, and has limits of memory and time. A configuration that names code, or many more layers than the
output has tensors, is not tried at all.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsconv.checkpoint.storage.plain_json import load_json
from dsconv.convert.adapters.methods import is_peft_model
from dsconv.convert.plan import Plan
from dsconv.names.choosing import advice_of
from dsconv.text import count, quote

if TYPE_CHECKING:
    import subprocess

    from dsconv.checkpoint.formats.huggingface.skeleton import Skeleton

MAX_CONFIG_BYTES = 8 << 20
PROBE_SECONDS = 60
NOT_TRIED = "config.json names code of its own, or more layers than there are tensors"
NOT_INSTALLED = "that needs torch and transformers (pip install 'dsconv-toolkit[train]')"
MAX_ARCHITECTURE = 200  # characters of a class's name
# Keys that say how many parts a model has, and how many there may be where the output has fewer tensors.
COUNTS = re.compile(r"^(?!.*(size|dim|width|capacity|token)).*(layer|block|depth|expert|stage)")
MIN_COUNT = 1000
# Keys with which a configuration names code: modules of its own folder and kernels of the Hub.
NAMES_CODE = re.compile(r"auto_map|_implementation$|^use_kernels$|^kernel_config$")


@dataclass(frozen=True)
class Loading:
    """Whether ``from_pretrained`` finds the weights that its architecture has, and no others.

    Attributes:
        loadable: None if it was not found out.
        call: What loads it, as one writes it in Python; "" where that is not known.
        missing: Names that the architecture has and the output has not, or in another shape.
        unexpected: Names that the output has and the architecture has not.
        problem: What is wrong and which option fixes it; "" if nothing is.
        unchecked: Why it was not found out; "" if it was, or if there is no config.json.
    """

    loadable: bool | None = None
    call: str = ""
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    problem: str = ""
    unchecked: str = ""


SCORES = {"score.weight", "score.bias"}

# What transformers answered in this process: a watcher and a script ask the same of each checkpoint of a run.
_answers: dict[str, dict[str, Any]] = {}
MAX_ANSWERS = 64


class LoadingCheck:
    """A comparison that was begun, and may go on in a process of its own while the output is written.

    Args:
        plan: What is written.
        files: {name: content} of the files beside the weights.
        output: The folder's name, for what is said.
    """

    def __init__(self, plan: Plan, files: Mapping[str, bytes], output: str) -> None:
        self._plan = plan
        self._output = output
        self._folder = output.rstrip("/").rpartition("/")[2] if "://" in output else output  # of a copy on a disk
        self._shapes = {tensor.name: tensor.entry.shape for tensor in plan.placed}
        self._stack = contextlib.ExitStack()
        self._process: subprocess.Popen[str] | None = None
        self._loading: Loading | None = None
        if "adapter_config.json" in files and plan.shards[0].filename.startswith("adapter_model"):
            self._loading = Loading(True, f'PeftModel.from_pretrained(base, "{self._folder}")')
            return
        self._config = _parse(files.get("config.json"))
        self._architecture = _architecture(self._config)
        self._is_guess = self._architecture is None
        if self._is_guess:
            self._try_architectures(files.get("config.json"))
            return
        if not is_tried(self._config, len(self._shapes)):
            self._loading = Loading(unchecked=NOT_TRIED)
            return
        from dsconv.checkpoint.formats.huggingface.skeleton import read_skeleton

        skeleton = read_skeleton(self._config)
        if skeleton is not None:
            self._loading = self._judge(*compare(skeleton, self._shapes))
        elif _has("torch") and _has("transformers"):
            self._ask_transformers(files["config.json"])
        else:
            self._loading = Loading(unchecked=NOT_INSTALLED)

    def __enter__(self) -> LoadingCheck:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.communicate()
        self._stack.close()

    @property
    def known(self) -> bool:
        """Return whether the answer is there already."""
        return self._loading is not None

    def result(self) -> Loading:
        """Return the answer, after waiting for it."""
        if self._loading is None and self._process is not None:
            import subprocess

            try:
                text, _ = self._process.communicate(timeout=PROBE_SECONDS)
                answer = json.loads(text.strip().splitlines()[-1])
            except (subprocess.TimeoutExpired, ValueError, IndexError):
                answer = {"error": f"transformers gave no answer in {PROBE_SECONDS} seconds"}
            if "error" not in answer and len(_answers) < MAX_ANSWERS:
                _answers[self._question] = answer
            self._loading = self._answered(answer)
        return self._loading or Loading()

    def _try_architectures(self, config: bytes | None) -> None:
        """Take the class of the model_type that all weights fit: a file without ``architectures`` claims no other."""
        kind = self._config.get("model_type")
        if config is None:
            self._loading = Loading()
            return
        from dsconv.checkpoint.formats.huggingface.auto_classes import architectures_of
        from dsconv.checkpoint.formats.huggingface.skeleton import read_skeleton

        is_known = isinstance(kind, str) and is_tried(self._config, len(self._shapes))
        candidates = list(architectures_of(str(kind))) if is_known else []
        if not self._config:
            why = "config.json is not one of a model"
        elif not isinstance(kind, str):
            why = "config.json has no architectures and no model_type"
        elif not is_known:
            why = NOT_TRIED
        elif not _has("transformers"):
            why = NOT_INSTALLED
        elif not candidates:
            why = f"config.json has no architectures, and transformers has no model_type {quote(kind)}"
        else:
            why = f"config.json has no architectures, and of transformers' {quote(kind)} classes none has these weights"
        untold = []
        for name in candidates:
            skeleton = read_skeleton({**self._config, "architectures": [name]})
            if skeleton is None:
                untold.append(name)
            elif not any(compare(skeleton, self._shapes)):
                self._architecture = name
                self._loading = self._judge([], [], [])
                return
        if candidates[:1] == untold[:1] != [] and _has("torch") and _has("transformers"):
            self._architecture = candidates[0]
            self._ask_transformers(config)
        else:
            self._loading = Loading(unchecked=why)

    def _ask_transformers(self, config: bytes) -> None:
        asked = f"{self._architecture} {sorted(self._shapes.items())} ".encode() + config
        import hashlib

        self._question = hashlib.sha256(asked).hexdigest()
        if self._question in _answers:
            self._loading = self._answered(_answers[self._question])
            return
        import subprocess  # only a model whose source does not tell needs a process
        import tempfile

        folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="dsconv-loading-")))
        try:
            (folder / "config.json").write_bytes(config)
            for shard in self._plan.shards:
                with open(folder / shard.filename, "wb") as file:
                    file.write(shard.header)
                    file.truncate(shard.nbytes)  # a hole: the data are not looked at
            if (index := self._plan.index()) is not None:
                (folder / self._plan.index_name).write_bytes(index)
        except OSError as error:
            self._loading = Loading(unchecked=f"a temporary folder cannot be written: {error.strerror}")
            return
        with contextlib.suppress(OSError):  # of a system without room for one more process, nothing is claimed
            self._process = subprocess.Popen(
                [sys.executable, "-m", "dsconv.convert.loading_probe", str(folder), str(self._architecture)],
                cwd=folder,  # with -m, Python looks for modules in the current folder first
                env=_environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            return
        self._loading = Loading(unchecked="no process could be started for transformers")

    def _answered(self, answer: dict[str, Any]) -> Loading:
        if "error" in answer:
            return Loading(unchecked=str(answer["error"]))
        if self._is_guess and (answer["missing"] or answer["unexpected"] or answer["mismatched"]):
            return Loading(unchecked=f"config.json has no architectures, and {self._architecture} has other weights")
        return self._judge([*answer["missing"], *answer["mismatched"]], answer["unexpected"], answer["mismatched"])

    def _judge(self, missing: list[str], unexpected: list[str], mismatched: list[str]) -> Loading:
        architecture = str(self._architecture)
        from dsconv.checkpoint.formats.huggingface.auto_classes import auto_class

        auto = auto_class(architecture, str(self._config.get("model_type")))
        call = f'{auto}.from_pretrained("{self._folder}")'
        if not missing and not unexpected:
            return Loading(True, call)
        parts = []
        if missing:
            what = "missing" if not mismatched else "missing or of another shape"
            parts.append(f"{len(missing)} of its weights are {what} (first {quote(missing[0])})")
        if unexpected:
            parts.append(f"it has no place for {count(len(unexpected), 'tensor')} (first {quote(unexpected[0])})")
        if mismatched and len(mismatched) == len(missing) and not unexpected:
            advice = (
                "That config.json is of a model of other sizes: name the model's own folder with --config-from, or"
                " correct its config.json (vocab_size, if tokens were added)"
            )
        else:
            advice = _advice(self._shapes, missing, unexpected)
        problem = f"{self._output} does not load as {architecture}, which its config.json names: {' and '.join(parts)}"
        return Loading(False, call, missing, unexpected, f"{problem}. {advice}")


def is_tried(config: Mapping[str, Any], tensors: int) -> bool:
    """Return whether a model may be built from a configuration: it names no code and no more parts than there are.

    Args:
        config: The parsed config.json.
        tensors: How many tensors the output has.
    """
    most = max(MIN_COUNT, tensors)
    waiting: list[tuple[str, Any]] = list(config.items())
    while waiting:
        key, value = waiting.pop()
        if value is not None and NAMES_CODE.search(key):
            return False
        if isinstance(value, (int, float)) and value > most and COUNTS.search(key):
            return False
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            waiting += ((key, one) for one in value)
    return True


def _environment() -> dict[str, str]:
    """Return the environment of the process that builds the model."""
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if os.path.isabs(path)),  # noqa: PTH117 - a text
        "PYTHONSAFEPATH": "1",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def compare(skeleton: Skeleton, shapes: Mapping[str, tuple[int, ...]]) -> tuple[list[str], list[str], list[str]]:
    """Return the names that are missing (or of another shape), those that are unexpected, and those of another shape.

    Args:
        skeleton: What the architecture has.
        shapes: {name: shape} of the tensors in the output.
    """
    found = _with_prefix(skeleton, shapes)
    missing = set(skeleton.shapes) - set(found)
    for name, owner in skeleton.tied.items():
        if owner in found:
            missing.discard(name)
        elif name in found:
            missing.discard(owner)
    for name, owner in skeleton.tied.items():  # several names of one tensor
        if owner in skeleton.shapes and owner not in missing:
            missing.discard(name)
    if skeleton.unneeded is not None:
        missing = {name for name in missing if not skeleton.unneeded.search(name)}
    unexpected = [name for name in found if name not in skeleton.shapes]
    if skeleton.ignored is not None:
        unexpected = [name for name in unexpected if not skeleton.ignored.search(name)]
    mismatched = sorted(
        name for name, shape in found.items()
        if (wanted := skeleton.shapes.get(name)) is not None and wanted != tuple(shape)
    )  # fmt: skip
    return sorted(missing | set(mismatched)), sorted(unexpected), mismatched


def _with_prefix(skeleton: Skeleton, shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, tuple[int, ...]]:
    """Return ``shapes`` under the model's own names: transformers loads the part without a head into one with a
    head.
    """
    prefix = skeleton.prefix
    if not prefix:
        return shapes
    has = any(name.startswith(prefix) for name in skeleton.shapes)
    given = any(name.startswith(prefix) for name in shapes)
    if has and not given:
        return {prefix + name if prefix + name in skeleton.shapes else name: shape for name, shape in shapes.items()}
    if given and not has:
        return {name.removeprefix(prefix): shape for name, shape in shapes.items()}
    return shapes


def _advice(shapes: Mapping[str, tuple[int, ...]], missing: list[str], unexpected: list[str]) -> str:
    """Return the option that fixes it."""
    if any(0 in shape for shape in shapes.values()):
        return "Some tensors are empty: this file was saved without gathering ZeRO-3's partitions. Merge the checkpoint"
    if is_peft_model(shapes):
        return "These are the names of a PEFT model: use --adapter for the adapter, or --fold-lora for a plain model"
    if foreign := advice_of(shapes, unexpected):
        return foreign
    if missing == ["lm_head.weight"] and "score.weight" in unexpected and {"score.bias", *unexpected} <= SCORES:
        # transformers modeling_layers.py: GenericForTokenClassification's has a bias, the other's none
        auto = "TokenClassification" if "score.bias" in unexpected else "SequenceClassification"
        return (
            "In the place of lm_head it has a head that scores, as critics and reward models do: load it with"
            f" AutoModelFor{auto}.from_pretrained(…, num_labels={shapes['score.weight'][0]})"
        )
    wanted = set(missing)
    groups: dict[str, list[str]] = {}
    for name in unexpected:
        for prefix in _prefixes(name):
            if name.removeprefix(prefix) in wanted:
                groups.setdefault(prefix, []).append(name)
    if groups:
        prefix = max(groups, key=lambda one: len(groups[one]))
        rest = [name for name in unexpected if not name.startswith(prefix)]
        if not rest:
            return f"Use --strip-prefix {prefix}"
        return f"The model's own names follow {quote(prefix)}: use --include '{prefix}*' --strip-prefix {prefix}"
    if missing and not unexpected:
        return (
            "The checkpoint does not hold them (frozen weights may have been left out when it was saved): take them"
            " from the base model"
        )
    if unexpected and not missing:
        return "from_pretrained leaves them out: load them yourself, or leave them out with --exclude"
    return "Name the model's own folder with --config-from, or rename tensors with --rename"


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    for length in range(1, min(4, len(parts))):
        yield ".".join(parts[:length]) + "."


def _parse(data: bytes | None) -> dict[str, Any]:
    if data is None or len(data) > MAX_CONFIG_BYTES:
        return {}
    try:
        found = load_json(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _architecture(config: Mapping[str, Any]) -> str | None:
    named = config.get("architectures")
    first = named[0] if isinstance(named, list) and named else None
    kind = config.get("model_type")
    is_name = isinstance(first, str) and len(first) <= MAX_ARCHITECTURE and first.isidentifier()
    return first if is_name and isinstance(kind, str) else None


def _has(package: str) -> bool:
    return package in sys.modules or find_spec(package) is not None
