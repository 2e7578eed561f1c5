"""Downloads that do harm without running a program: links, special files, wrong types, escape sequences, and costs.

Each is a folder and the commands that a user runs on it. ``attacks/judging.py`` runs them and reports every broken
promise.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.checkpoint.building import (
    call,
    colliding_pairs,
    glob,
    lst,
    number,
    pt_records,
    tensor,
    text,
    tup,
    whole,
    zip_bytes,
)
from tests.servers.hostile import Answer, serving

SECRET = b"SECRET-7f3a9d"  # it is in files outside the download, and must not appear anywhere else
SECRET_VALUE = 666.0  # in somebody else's weights
ESCAPES = "\x1b]0;owned\x07\x1b[2J\x1b[31m\x9b31m\u202egnp.\u2066\x7f\r\n\x08"


@dataclass(frozen=True)
class Download:
    """``make`` writes the download to ``box/ckpt``; each of ``commands`` is then run in ``box``."""

    title: str
    make: Callable[[Path], None]
    commands: tuple[str, ...] = ("inspect ckpt", "merge ckpt out --no-fsync")
    answer: Answer | None = None  # of a web server, whose address stands for {url} in the commands

    @contextlib.contextmanager
    def serving(self) -> Iterator[str]:
        """Give the address of the server while it runs; "" if there is none."""
        if self.answer is None:
            yield ""
        else:
            with serving(self.answer) as (url, _):
                yield url


def safetensors(tensors: dict[str, float], extra: dict[str, str] | None = None) -> bytes:
    """Return a safetensors file of float32 vectors with one element each."""
    header: dict[str, object] = {"__metadata__": extra} if extra else {}
    for at, name in enumerate(tensors):
        header[name] = {"dtype": "F32", "shape": [1], "data_offsets": [4 * at, 4 * at + 4]}
    raw = json.dumps(header, ensure_ascii=False).encode("utf-8", "surrogatepass")
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw + struct.pack(f"<{len(tensors)}f", *tensors.values())


def folder(box: Path, **files: bytes | str) -> Path:
    """Write ``box/ckpt`` with the named files (``_`` stands for ``.``) and return it."""
    made = box / "ckpt"
    made.mkdir(exist_ok=True)
    for name, data in files.items():
        (made / name.replace("_", ".")).write_bytes(data if isinstance(data, bytes) else data.encode())
    return made


def weights(box: Path) -> Path:
    """Write a download of one sound tensor."""
    return folder(box, model_safetensors=safetensors({"a": 1.0}))


def pickled(box: Path, *parts: bytes, **storages: bytes) -> Path:
    """Write a ``pytorch_model.bin`` around a pickle."""
    made = folder(box)
    (made / "pytorch_model.bin").write_bytes(zip_bytes(pt_records(whole(*parts), **storages)))
    return made


# Links ---------------------------------------------------------------------------------------------------------------


def link(name: str, to: str, sound: bool = True) -> Callable[[Path], None]:
    """Make a download in which ``name`` is a link to the secret, to another place, or to itself."""

    def make(box: Path) -> None:
        made = weights(box) if sound else folder(box)
        path = made / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(to)

    return make


def linked_shard(box: Path) -> None:
    weight_map = {"a": "one.safetensors", "b": "two.safetensors"}
    made = folder(box)
    (made / "one.safetensors").write_bytes(safetensors({"a": 1.0}))
    (made / "two.safetensors").symlink_to("../outside/weights.safetensors")
    (made / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def linked_output(name: str) -> Callable[[Path], None]:
    """Make a sound download, and put a link into the output folder where dsconv keeps its own files."""

    def make(box: Path) -> None:
        weights(box)
        path = box / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(Path("/".join([".."] * (len(Path(name).parts)))) / "outside")

    return make


def linked_tag(box: Path) -> None:
    made = folder(box, latest="step")
    (made / "step").symlink_to("../outside")


LINKS = [
    *(
        Download(f"{name} is a link to a private file", link(name, "../outside/secret"))
        for name in ("tokenizer.model", "tokenizer.json", "config.json", "generation_config.json", "vocab.txt")
    ),
    Download("config.json is a link to /proc/self/environ", link("config.json", "/proc/self/environ")),
    Download("the weights are a link to another's", link("model.safetensors", "../outside/weights.safetensors")),
    Download("a shard of the index is a link to another's", linked_shard),
    Download("latest is a link to a private file", link("latest", "../outside/secret", sound=False)),
    Download("the tag's folder is a link to another folder", linked_tag),
    Download(".metadata is a link to a private file", link(".metadata", "../outside/secret", sound=False)),
    Download("config.json is a link to itself", link("config.json", "config.json")),
    Download("the weights are a link to /dev/zero", link("model.safetensors", "/dev/zero")),
    Download("config.json is a link to /dev/zero", link("config.json", "/dev/zero")),
    Download("the folder holds itself", link("inner", ".")),
    Download("OUT's hidden folder is a link", linked_output(".dsconv-partial"), ("merge ckpt out --no-fsync",)),
    Download(
        "OUT's hidden folder is a link, of to-dcp", linked_output(".dsconv-partial"), ("to-dcp ckpt out --no-fsync",)
    ),
    Download(
        "a mistyped source, and OUT's hidden folder is a link", linked_output(".dsconv-partial"), ("merge no out",)
    ),
    Download("the lock in OUT's hidden folder is a link", linked_output(".dsconv-partial/lock"), ("merge ckpt out",)),
    Download(
        "an older model in OUT is a link", linked_output("model.safetensors"), ("merge ckpt out --force --no-fsync",)
    ),
]

# Special files -------------------------------------------------------------------------------------------------------


def special(name: str, kind: str, sound: bool = True) -> Callable[[Path], None]:
    """Make a download in which ``name`` is not a regular file."""

    def make(box: Path) -> None:
        path = (weights(box) if sound else folder(box)) / name
        path.unlink(missing_ok=True)
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            where = Path.cwd()  # a socket's path may have at most 108 bytes
            os.chdir(path.parent)
            try:
                with socket.socket(socket.AF_UNIX) as made:
                    made.bind(path.name)
            finally:
                os.chdir(where)

    return make


NAMES = ("model.safetensors", "config.json", "tokenizer.model", "model.safetensors.index.json", "pytorch_model.bin",
         "latest", ".metadata", "adapter_config.json")  # fmt: skip
SPECIAL = [
    *(Download(f"{name} is a pipe that nobody writes to", special(name, "pipe")) for name in NAMES),
    *(Download(f"{name} is a folder", special(name, "folder")) for name in NAMES),
    *(Download(f"{name} is a socket", special(name, "socket")) for name in ("model.safetensors", "config.json")),
]

# Types ---------------------------------------------------------------------------------------------------------------

INDEX = "model.safetensors.index.json"


def indexed(text: str) -> Callable[[Path], None]:
    """Make a download of one shard with this index, which gives it another name."""

    def make(box: Path) -> None:
        made = folder(box)
        (made / "one.safetensors").write_bytes(safetensors({"a": 1.0}))
        (made / INDEX).write_text(text)

    return make


def configured(text: str | bytes) -> Callable[[Path], None]:
    def make(box: Path) -> None:
        (weights(box) / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())

    return make


def of_pickle(*parts: bytes) -> Callable[[Path], None]:
    """Make a ``pytorch_model.bin`` from a pickle and one storage."""
    return lambda box: _none(pickled(box, *parts, _0=bytes(16)))


def model_states(**fields: bytes) -> Callable[[Path], None]:
    """Make a DeepSpeed checkpoint at stage 0 whose model states hold these fields, given as opcodes."""
    sound = {
        "module": b"}(" + text("w") + tensor() + text("v") + tensor() + b"u",
        "dp_world_size": number(1),
        "mp_world_size": number(1),
        "global_steps": number(1),
        "ds_version": text("0.19.8"),
        "buffer_names": b"]",
        "param_shapes": b"]",
        "shared_params": b"}",
    }

    def make(box: Path) -> None:
        made = folder(box, latest="step")
        (made / "step").mkdir()
        pairs = b"".join(text(name) + value for name, value in {**sound, **fields}.items())
        data = zip_bytes(pt_records(whole(b"}(", pairs, b"u"), _0=bytes(16)))
        (made / "step" / "mp_rank_00_model_states.pt").write_bytes(data)

    return make


CIRCLE = b"}(" + text("a") + text("b") + text("b") + text("a") + b"u"
TYPES = [
    Download("config.json is a number", configured("3")),
    Download("config.json is no UTF-8", configured(b"\xff\xfe{\x00")),
    Download("config.json has an integer of 100,000 digits", configured(f'{{"vocab_size": {"9" * 100_000}}}')),
    Download("config.json is nested 100,000 deep", configured('{"a":' * 100_000 + "1" + "}" * 100_000)),
    Download(
        "config.json has NaN for a size", configured('{"architectures": ["LlamaForCausalLM"], "vocab_size": NaN}')
    ),
    Download("the index is a list", indexed("[]")),
    Download("the index maps a name to a number", indexed('{"weight_map": {"a": 3}}')),
    Download("the index leaves the folder", indexed('{"weight_map": {"a": "../outside/weights.safetensors"}}')),
    Download("the index names an absolute path", indexed('{"weight_map": {"a": "/etc/passwd"}}')),
    Download("a tensor is called __metadata__", of_pickle(b"}", text("__metadata__"), tensor(), b"s")),
    Download("a tensor's name is a surrogate", of_pickle(b"}", b"X\x03\x00\x00\x00\xed\xa0\x80", tensor(), b"s")),
    Download("a tensor's name is a number", of_pickle(b"}", number(3), tensor(), b"s")),
    Download(
        "a tensor has 2,000 dimensions", of_pickle(b"}", text("a"), tensor(shape=[1] * 2000, strides=[1] * 2000), b"s")
    ),
    Download("a tensor of negative size", of_pickle(b"}", text("a"), tensor(shape=[-4], strides=[1]), b"s")),
    Download("a list that holds itself", of_pickle(b"}", text("a"), b"]q\x00h\x00a", b"s")),
    Download("shared_params runs in a circle", model_states(shared_params=CIRCLE)),
    Download("buffer_names is a number", model_states(buffer_names=number(7))),
    Download("the world is of 2**60 ranks", model_states(dp_world_size=number(1 << 60))),
    Download(
        "a pattern that Python cannot compile",
        model_states(
            universal_checkpoint_info=b"}(" + text("vocabulary_parameter_patterns") + lst(text("[z-a]")) + b"u"
        ),
        ("inspect ckpt", "to-universal ckpt out --no-fsync"),
    ),
]

# The terminal --------------------------------------------------------------------------------------------------------


def named(box: Path) -> None:
    folder(box, model_safetensors=safetensors({f"a{ESCAPES}": 1.0, "b" * 3000: 2.0}, {"k": ESCAPES}))


def odd_latest(box: Path) -> None:
    folder(box, latest=f"step{ESCAPES}")


def odd_files(box: Path) -> None:
    made = weights(box)
    (made / f"tokenizer{ESCAPES.replace('/', '')}.json").write_text("{}")
    (made / "config.json").write_text(json.dumps({"architectures": [ESCAPES], "model_type": ESCAPES, "dtype": ESCAPES}))
    (made / "dsconv.manifest.json").write_text(json.dumps({"ties": {ESCAPES: ESCAPES}, "warnings": [ESCAPES]}))


def odd_class(box: Path) -> None:
    pickled(box, b"}", text("a"), call(glob("my\x1b[2J", "Class\x9b")), b"s")


EVERY = (
    "inspect ckpt --all",
    "merge ckpt out --dry-run",
    "merge ckpt out --no-fsync",
    "verify ckpt outside",
    "to-dcp ckpt out2 --dry-run",
)
TERMINAL = [
    Download("names of tensors hold escapes", named, EVERY),
    Download("latest holds escapes", odd_latest, ("inspect ckpt", "zero-to-fp32 ckpt out")),
    Download("files' names and configurations hold escapes", odd_files, EVERY),
    Download("a class's name holds escapes", odd_class, ("inspect ckpt", "merge ckpt out --no-fsync")),
]

# Costs ---------------------------------------------------------------------------------------------------------------


def sparse(name: str, nbytes: int, head: bytes = b"") -> Callable[[Path], None]:
    """Make a download in which ``name`` is a file of ``nbytes`` that takes no room on the disk."""

    def make(box: Path) -> None:
        path = weights(box) / name
        path.write_bytes(head)
        os.truncate(path, nbytes)

    return make


def doubled(box: Path) -> None:
    """Nest 60 pairs, each of which holds the next pair twice: 2**60 leaves in 400 bytes."""
    parts = [b"q" + bytes([at]) + b"h" + bytes([at]) + b"\x86" for at in range(60)]
    pickled(box, b"}", text("a"), b"N", *parts, b"s")


def shared_offsets(box: Path) -> None:
    """Make a .metadata of 10,000 chunks whose offsets are one shared tuple of 100,000 numbers."""
    home = b"ctorch.distributed.checkpoint."

    def made_of(name: bytes, state: bytes) -> bytes:
        return home + name + b"\n)\x81}(" + state + b"ub"

    offsets = tup(*[b"K\x00"] * 100_000) + b"q\x01"
    info = made_of(b"filesystem\n_StorageInfo", text("relative_path") + text("__0_0.distcp") + text("offset") + b"K\x00"
                   + text("length") + b"K\x00")  # fmt: skip
    rows = [offsets + b"0"]
    rows.append(info + b"q\x020")
    keys = [
        made_of(b"metadata\nMetadataIndex", text("fqn") + text(f"{at:x}") + text("offset") + b"h\x01") + b"h\x02"
        for at in range(10_000)
    ]
    fields = text("state_dict_metadata") + b"}" + text("storage_data") + b"}(" + b"".join(keys) + b"u"
    folder(box).joinpath(".metadata").write_bytes(
        b"\x80\x02" + b"".join(rows) + made_of(b"metadata\nMetadata", fields) + b"."
    )


def colliding(box: Path) -> None:
    pairs = [tup(number(first), number(second)) + b"N" for first, second in colliding_pairs(12_000)]
    pickled(box, b"}(", *pairs, b"u")


def many_tensors(box: Path) -> None:
    names = {f"layer.{at}.weight": 0.0 for at in range(30_000)}
    folder(box, model_safetensors=safetensors(names))


COSTS = [
    Download("a million empty sets", lambda box: _none(pickled(box, b"](", b"\x8f" * 1_000_000, b"e"))),
    Download("a million empty dictionaries", lambda box: _none(pickled(box, b"](", b"}" * 1_000_000, b"e"))),
    Download("300,000 empty lists in lists", lambda box: _none(pickled(box, b"]" * 300_000, b"a" * 299_999))),
    Download("a tuple of two of a tuple of two, 60 times", doubled),
    Download("one tuple of 100,000 offsets, shared by 10,000 chunks", shared_offsets),
    Download("12,000 keys of one hash", colliding),
    Download("a memo of two billion", lambda box: _none(pickled(box, b"]", b"r\xff\xff\xff\x7f"))),
    Download("a string of 2 GB, says the pickle", lambda box: _none(pickled(box, b"B\xff\xff\xff\x7fabc"))),
    Download("an integer of 2 GB, says the pickle", lambda box: _none(pickled(box, b"\x8b\xff\xff\xff\x7f\x01"))),
    Download("config.json of 3 GB, in a hole", sparse("config.json", 3 << 30, b"{")),
    Download("latest of 3 GB, in a hole", sparse("latest", 3 << 30, b"a")),
    Download("a header of 2 GB, in a hole", sparse("model.safetensors", 3 << 30, struct.pack("<Q", 2 << 30))),
    Download("a manifest of 3 GB, in a hole", sparse("dsconv.manifest.json", 3 << 30, b"{")),
    Download("an index of 3 GB, in a hole", sparse(INDEX, 3 << 30, b"{")),
    Download("a .bin of 3 GB, in a hole", sparse("pytorch_model.bin", 3 << 30, b"PK\x03\x04")),
    Download("30,000 tensors of four bytes", many_tensors),
]


def _none(path: Path) -> None:
    """Call a maker and drop what it returns."""
