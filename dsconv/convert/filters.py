"""Choose and rename the tensors that a merge writes: ``--include``, ``--exclude``, ``--strip-prefix``, ``--rename``.

They are applied in that order, to the names that ``dsconv inspect`` shows. Each of them must do something: a pattern
that fits no tensor is refused, since it is probably a mistake. The manifest of the output keeps them, and ``dsconv
verify`` follows it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import translate
from typing import Any

from dsconv.checkpoint.map.checkpoint import Checkpoint
from dsconv.checkpoint.map.tensors import TensorEntry
from dsconv.checkpoint.pickles.schema import is_name
from dsconv.checkpoint.pickles.values import safe_repr
from dsconv.convert.ties import stored_name
from dsconv.errors import UsageError

STAR = "([^.]+)"
MAX_NOTED = 1000  # patterns of one kind in a manifest, each of which is tried on each name


@dataclass(frozen=True)
class Filters:
    """The user's filters, as given.

    Attributes:
        include: patterns with ``*`` and ``?``. Only tensors that fit one of them are written.
        exclude: patterns. Tensors that fit one of them are not written.
        strip_prefix: what is removed from the beginning of a name: the first one that fits.
        rename: ``OLD=NEW``. OLD is a name, or the beginning of one that ends before a dot; a ``*`` in it stands for one
            part between dots, and is put where NEW has a ``*``. The first one that fits is applied.
    """

    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strip_prefix: tuple[str, ...] = ()
    rename: tuple[str, ...] = ()

    @staticmethod
    def of(
        include: Iterable[str] = (), exclude: Iterable[str] = (), strip_prefix: Iterable[str] = (),
        rename: Iterable[str] | Mapping[str, str] = (),
    ) -> Filters:  # fmt: skip
        """Return the filters that a user gives: a text counts as one pattern, and a mapping as OLD=NEW.

        Raises:
            UsageError: a pattern is empty, or a rename is not written ``OLD=NEW``.
        """
        renames = [f"{old}={new}" for old, new in rename.items()] if isinstance(rename, Mapping) else _texts(rename)
        found = Filters(_texts(include), _texts(exclude), _texts(strip_prefix), tuple(renames))
        found.rules()
        return found

    @staticmethod
    def read(noted: object) -> Filters | None:
        """Return the filters that a manifest holds, or None if it holds none, or none that can be followed."""
        if not isinstance(noted, dict):
            return None
        lists = [noted.get(name, []) for name in ("include", "exclude", "strip_prefix", "rename")]
        if not all(isinstance(given, list) and all(isinstance(text, str) for text in given) for given in lists):
            return None
        if any(len(given) > MAX_NOTED for given in lists):
            return None
        try:
            return Filters.of(*lists)
        except UsageError:
            return None

    def __bool__(self) -> bool:
        return bool(self.include or self.exclude or self.strip_prefix or self.rename)

    def to_dict(self) -> dict[str, Any]:
        """Return what the manifest keeps."""
        return {name: list(given) for name, given in asdict(self).items()}

    def rules(self) -> list[tuple[re.Pattern[str], str, str]]:
        """Return (pattern, replacement, the original text) of each rename. Raises UsageError."""
        if not all((*self.include, *self.exclude, *self.strip_prefix)):
            raise UsageError("--include, --exclude and --strip-prefix take a pattern, and an empty one was given")
        rules = []
        for text in self.rename:
            old, equals, new = text.partition("=")
            if not old or not equals or not new or old.count("*") != new.count("*"):
                raise UsageError(
                    f"--rename {safe_repr(text)}: write OLD=NEW, with as many * in NEW as in OLD, such as"
                    " transformer.h.*.attn=model.layers.*.self_attn"
                )
            if any(part.count("*") > 1 for part in old.split(".")):  # matching could take forever
                raise UsageError(f"--rename {safe_repr(text)}: a part between dots has more than one *")
            fits = re.compile(STAR.join(map(re.escape, old.split("*"))) + r"(?=\.|\Z)")
            rules.append((fits, new, text))
        return rules

    def names(self, checkpoint: Checkpoint, dropped: Sequence[str] = ()) -> dict[str, str | None]:
        """Return {name in the checkpoint: name in the output, or None if the tensor is left out}.

        Args:
            checkpoint: the source. Of a tied tensor each name is tried, the one that is stored by default first.
            dropped: see ``stored_name``.

        Raises:
            UsageError: a filter fits no tensor, two tensors would have one name, or one a name that cannot be written.
        """
        unused = {("include", p) for p in self.include} | {("exclude", p) for p in self.exclude}
        unused |= {("strip-prefix", p) for p in self.strip_prefix} | {("rename", p) for p in self.rename}
        rules = self.rules()
        include, exclude = _compiled(self.include), _compiled(self.exclude)
        found: dict[str, str | None] = {}
        owners: dict[str, str] = {}
        for entry in checkpoint.values():
            kept = _kept(_names_of(entry, dropped), include, exclude, unused)
            if kept is None:
                found[entry.name] = None
                continue
            name = self._renamed(kept, rules, unused)
            if not is_name(name):
                raise UsageError(
                    f"{checkpoint.path}: {safe_repr(entry.name)} would be called {safe_repr(name)}, which cannot be a"
                    " tensor's name in safetensors: change --rename or --strip-prefix"
                )
            if name in owners:
                raise UsageError(
                    f"{checkpoint.path}: {safe_repr(owners[name])} and {safe_repr(entry.name)} would both be called"
                    f" {safe_repr(name)}: change --rename or --strip-prefix, or leave one out with --exclude"
                )
            found[entry.name] = name
            owners[name] = entry.name
        if unused:
            option, pattern = min(unused)
            some = ", ".join(safe_repr(name) for name in list(checkpoint)[:3])
            raise UsageError(
                f"{checkpoint.path}: --{option} {safe_repr(pattern)} fits no tensor; there are {len(checkpoint)}, such"
                f" as {some} (dsconv inspect lists them)"
            )
        return found

    def _renamed(
        self, name: str, rules: Sequence[tuple[re.Pattern[str], str, str]], unused: set[tuple[str, str]]
    ) -> str:
        for prefix in self.strip_prefix:
            if name.startswith(prefix) and len(name) > len(prefix):
                unused.discard(("strip-prefix", prefix))
                name = name[len(prefix) :]
                break
        for fits, new, text in rules:
            if match := fits.match(name):
                unused.discard(("rename", text))
                parts = new.split("*")
                stars = [*match.groups(), ""]
                return "".join(part + star for part, star in zip(parts, stars, strict=True)) + name[match.end() :]
        return name


def _compiled(patterns: Sequence[str]) -> dict[str, re.Pattern[str]]:
    return {pattern: re.compile(translate(pattern)) for pattern in patterns}


def _kept(
    names: Sequence[str],
    include: Mapping[str, re.Pattern[str]],
    exclude: Mapping[str, re.Pattern[str]],
    unused: set[tuple[str, str]],
) -> str | None:
    """Return the first of a tensor's names that is to be written, or None if none is."""
    kept = []
    for name in names:
        included = [pattern for pattern, fits in include.items() if fits.match(name)]
        excluded = [pattern for pattern, fits in exclude.items() if fits.match(name)]
        unused.difference_update(("include", pattern) for pattern in included)
        unused.difference_update(("exclude", pattern) for pattern in excluded)
        if (included or not include) and not excluded:
            kept.append(name)
    return kept[0] if kept else None


def _names_of(entry: TensorEntry, dropped: Sequence[str]) -> list[str]:
    first = stored_name(entry.name, entry.aliases, tuple(dropped))
    return list(dict.fromkeys((first, entry.name, *entry.aliases)))


def _texts(given: Iterable[str]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given)
