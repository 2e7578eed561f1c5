"""A DeepSpeed config, read once and never changed: its values, what is wrong with them, and "auto" resolved.

It does what transformers ``HfDeepSpeedConfig`` and ``HfTrainerDeepSpeedConfig`` (``integrations/deepspeed.py``,
accelerate ``utils/deepspeed.py``) do, without global state and without DeepSpeed. The Trainer and
``deepspeed.initialize`` take what ``to_dict()`` returns."""

from __future__ import annotations

import base64
import binascii
import copy
import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dsconv.errors import CheckpointNotFoundError, ConfigMismatchError, MalformedError
from dsconv.urls import local_path
from dsconv.zero_utils import config_auto, config_lint
from dsconv.zero_utils.config_auto import Mismatch, TrainingValues
from dsconv.zero_utils.config_keys import lookup
from dsconv.zero_utils.config_lint import Finding

MAX_CONFIG_BYTES = 16 << 20  # a config has kilobytes; a checkpoint given by mistake is not read whole
MAX_DEPTH = 64  # of nested objects; DeepSpeed's own keys need 6
SHOWN_SOURCE = 60


@dataclass(frozen=True)
class DSConfig:
    """A DeepSpeed config. ``source`` is the path that it was read from, or "ds_config"; see ``DSConfig.read``."""

    source: str
    _values: dict[str, Any]
    _read_findings: tuple[Finding, ...] = field(default=(), repr=False)

    @classmethod
    def read(cls, source: str | os.PathLike[str] | Mapping[str, Any] | DSConfig) -> DSConfig:
        """Read a config.

        Args:
            source: A dict, which is copied, a path, JSON text, or base64 of JSON, as DeepSpeed takes them. A file may
            be
                Hjson, as DeepSpeed's own reader allows, if the package hjson is installed.

        Raises:
            CheckpointNotFoundError: The file does not exist.
            MalformedError: The text is not a JSON object.
        """
        if isinstance(source, DSConfig):
            return source
        name, values = "ds_config", source
        findings: list[Finding] = []
        if not isinstance(source, Mapping):
            name, text = _text_of(source)
            values, findings = _parse(name, text)
        if not isinstance(values, Mapping):
            raise MalformedError(f"{name}: the DeepSpeed config is {type(values).__name__}; expected an object, {{…}}")
        if _is_deep(values, MAX_DEPTH):
            raise MalformedError(f"{name}: the DeepSpeed config is nested more than {MAX_DEPTH} deep")
        return cls(name, _plain(values), tuple(findings))

    def get(self, key: str, default: Any = None) -> Any:
        """Return a copy of the value at ``"a.b.c"``, or ``default`` if the config does not have it."""
        return copy.deepcopy(lookup(self._values, key, default))

    def to_dict(self) -> dict[str, Any]:
        """Return a copy for ``HfDeepSpeedConfig``, ``TrainingArguments(deepspeed=…)`` or ``deepspeed.initialize``."""
        return copy.deepcopy(self._values)

    @property
    def stage(self) -> int:
        """The ZeRO stage, 0 if the config does not ask for one. Raises MalformedError if the value is not a stage."""
        stage = config_lint.stage_of(self._values)
        if stage is None:
            raise MalformedError(
                f"{self.source}: zero_optimization.stage is {self.get('zero_optimization.stage')!r}; expected 0, 1, 2"
                " or 3, as a number"
            )
        return stage

    @property
    def is_zero1(self) -> bool:
        """Return whether the ZeRO stage is 1."""
        return self.stage == 1

    @property
    def is_zero2(self) -> bool:
        """Return whether the ZeRO stage is 2."""
        return self.stage == 2

    @property
    def is_zero3(self) -> bool:
        """Return whether the ZeRO stage is 3."""
        return self.stage == 3

    @property
    def is_offload(self) -> bool:
        """Return whether the optimizer or parameters are offloaded to the CPU or NVMe at stage 2 or 3.

        This is the definition of ``HfDeepSpeedConfig``. DeepSpeed offloads the optimizer at stage 1 too, which
        transformers does not count."""
        devices = [
            lookup(self._values, f"zero_optimization.{name}.device") for name in ("offload_optimizer", "offload_param")
        ]
        return self.stage in (2, 3) and any(device in ("cpu", "nvme") for device in devices)

    @property
    def dtype(self) -> str:
        """The dtype in which the model runs: "bfloat16", "float16" or "float32", as torch names them.

        Raises MalformedError if it is still "auto": resolve it first.
        """
        for section, dtype in (("bf16", "bfloat16"), ("bfloat16", "bfloat16"), ("fp16", "float16")):
            if section == "bfloat16" and "bf16" in self._values:
                continue
            enabled = lookup(self._values, f"{section}.enabled")
            if enabled == "auto":
                raise MalformedError(
                    f'{self.source}: {section}.enabled is "auto"; resolve the config to know its dtype'
                )
            if enabled:
                return dtype
        return "float32"

    @property
    def auto_keys(self) -> list[str]:
        """The dotted keys that are still "auto"."""
        return config_auto.autos(self._values)

    def lint(self, world_size: int | None = None) -> list[Finding]:
        """Return what is wrong with the config, errors first (see ``config_lint``).

        ``world_size`` is the number of processes, if known.
        """
        found = [*self._read_findings, *config_lint.lint(self._values, world_size)]
        return sorted(found, key=lambda finding: config_lint.SEVERITIES.index(finding.severity))

    def filled(self, values: TrainingValues) -> tuple[DSConfig, list[Mismatch]]:
        """Return the config with ``values`` in place of "auto", and where the config contradicts them."""
        filled = self.to_dict()
        mismatches = config_auto.fill(filled, values)
        return DSConfig(self.source, filled, self._read_findings), mismatches

    def resolved(self, values: TrainingValues) -> DSConfig:
        """Return the config with ``values`` in place of "auto", as the Trainer resolves it.

        Raises:
            ConfigMismatchError: The config contradicts ``values``; the message lists every place.
        """
        resolved, mismatches = self.filled(values)
        if mismatches:
            told = "; ".join(map(str, mismatches))
            raise ConfigMismatchError(f'{self.source}: {told}. Make them equal, or write "auto" in the config')
        return resolved


def _is_deep(value: Any, depth: int) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return depth == 0 or any(_is_deep(child, depth - 1) for child in inner)


def _plain(source: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _plain(value) if isinstance(value, Mapping) else copy.deepcopy(value) for key, value in source.items()}


def _text_of(source: str | os.PathLike[str]) -> tuple[str, str]:
    """Return (what to call it, the text) of a path, JSON text or base64."""
    text = os.fspath(source)
    if isinstance(source, str) and text.lstrip().startswith("{"):
        return "ds_config", text
    path = local_path(text, "a DeepSpeed config")
    try:
        there = text != "" and path.exists()
    except (OSError, ValueError):  # a text too long for a path, or with a zero byte
        there = False
    if there:
        try:
            if path.stat().st_size > MAX_CONFIG_BYTES:
                raise MalformedError(f"{path}: {path.stat().st_size} bytes; a DeepSpeed config is a small text file")
            return str(path), path.read_text(encoding="utf-8")
        except OSError as error:
            raise CheckpointNotFoundError(f"{path}: the DeepSpeed config cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise MalformedError(f"{path}: the DeepSpeed config is not text in UTF-8") from None
    if isinstance(source, str):
        try:
            decoded = base64.b64decode(text, altchars=b"-_", validate=True).decode("utf-8")
        except (binascii.Error, ValueError):
            decoded = ""
        if decoded.lstrip().startswith("{"):
            return "ds_config", decoded
    shown = text if len(text) <= SHOWN_SOURCE else f"{text[: SHOWN_SOURCE - 1]}…"
    raise CheckpointNotFoundError(
        f"{shown}: no such file, and neither JSON nor base64 of JSON; expected a DeepSpeed config"
    )


def _parse(name: str, text: str) -> tuple[Any, list[Finding]]:
    """Return the values of JSON or Hjson text, and findings about the text itself."""
    repeated: list[str] = []

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(key for key, times in Counter(key for key, _ in items).items() if times > 1)
        return dict(items)

    findings = []
    try:
        values = json.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        values = _parse_hjson(name, text, pairs, error)
        fix = "Remove the comments and trailing commas."
        findings.append(
            Finding("warning", "", "This is Hjson: DeepSpeed reads it, transformers and accelerate do not.", fix)
        )
    for key in repeated:
        message = "The key is written twice: DeepSpeed refuses that in a file, and others take the last."
        findings.insert(0, Finding("error", key, message, "Remove one of them."))
    return values, findings


def _parse_hjson(name: str, text: str, pairs: Any, error: Exception) -> Any:
    if not text.strip():
        raise MalformedError(f"{name}: the DeepSpeed config is empty; expected an object, {{…}}")
    try:
        import hjson
    except ImportError:
        raise MalformedError(
            f"{name}: the DeepSpeed config is not JSON: {error} (for Hjson: pip install hjson)"
        ) from None
    try:
        return hjson.loads(text, object_pairs_hook=pairs)
    except (ValueError, RecursionError):
        raise MalformedError(f"{name}: the DeepSpeed config is not JSON: {error}") from None
