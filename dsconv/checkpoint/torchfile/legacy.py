"""Read torch's older file format, which is not a zip. torch.save wrote it before 1.6, and still does on request.

Five pickles follow each other: a magic number, the protocol's version, the machine's properties, the object, and the
keys of its storages in order. Then comes each storage: its number of elements in eight bytes, and its bytes. There are
no checksums (``torch/serialization.py`` ``_legacy_save`` and ``_legacy_load``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dsconv.checkpoint.map.tensors import Record
from dsconv.checkpoint.pickles.machine import MAX_PICKLE_BYTES, Machine
from dsconv.checkpoint.pickles.values import OpaqueClass, StorageKind, StorageRef, safe_repr
from dsconv.checkpoint.storage.local import OpenFile
from dsconv.checkpoint.torchfile.zip import Archive
from dsconv.errors import MalformedError, UnsupportedError
from dsconv.text import quote

MAGIC = 0x1950A86A20F9469CFC6C
MAGIC_BYTES = b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"  # as a pickle of protocol 2 and later spells it
PROTOCOL = 1001
HEAD_BYTES = 32  # protocol 4 puts a frame of 11 bytes before it
FIRST_READ_BYTES = 1 << 20
MAX_KEY_CHARS = 100  # of a storage's name; torch numbers them


def is_legacy(file: OpenFile) -> bool:
    """Return whether the file begins with the pickle of the magic number."""
    return MAGIC_BYTES in file.read(0, min(HEAD_BYTES, file.nbytes))


def storage_of(pid: Any, path: Any) -> StorageRef:
    """Return the storage of a persistent id, in either format.

    Args:
        pid: What the pickle gives as the persistent id.
        path: The file, for messages.

    Raises:
        ValueError: ``pid`` is not the id of a storage.
        UnsupportedError: It names a class of storage that dsconv does not read.
    """
    if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
        raise ValueError("a persistent id that is not a storage's")
    _, kind, key, _, numel = pid[:5]
    if not isinstance(key, str) or len(key) > MAX_KEY_CHARS or type(numel) is not int or numel < 0:
        raise ValueError("a storage id of the wrong types")
    if isinstance(kind, OpaqueClass):
        raise UnsupportedError(f"{path}: storage {quote(key)} is a {kind}, which dsconv does not read")
    if not isinstance(kind, StorageKind):
        raise ValueError("a storage id without a storage class")
    return StorageRef(key, kind.dtype, numel)


@dataclass
class Pickles:
    """The content of the pickles at the start of a file.

    Attributes:
        root: The object that was saved.
        keys: The keys of its storages, in the order in which they follow.
        storages: The storages by their keys.
        position: Where the first storage begins.
        machine: The machine that read the object.
    """

    root: Any
    keys: Any
    storages: dict[str, StorageRef]
    position: int
    machine: Machine


def read(file: OpenFile) -> tuple[Machine, Any, Archive]:
    """Return the machine that read the object, the object, and the records of its storages.

    The records have the names that they would have in a zip (``data/KEY``).

    Raises:
        MalformedError: The file is truncated, or its storages do not follow each other.
        UnsupportedError: It was saved on a big-endian machine, or holds views of storages.
        UnsafeError: It calls what no checkpoint needs.
    """
    pickles = _pickles(file)
    keys, storages, position = pickles.keys, pickles.storages, pickles.position
    records: dict[str, Record] = {}
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
        or set(keys) != set(storages)
        or len(set(keys)) != len(keys)
    ):
        raise MalformedError(
            f"{file.path}: lists the storages {safe_repr(keys)}; its object has {safe_repr(list(storages))}"
        )
    for key in keys:
        storage = storages[key]
        nbytes = storage.numel * (storage.dtype.itemsize if storage.dtype else 1)
        numel = int.from_bytes(file.read(position, 8), "little")
        if numel != storage.numel:
            raise MalformedError(
                f"{file.path}: storage {quote(key)} should have {storage.numel} elements, the file says {numel}"
            )
        position += 8
        if position + nbytes > file.nbytes:
            raise MalformedError(
                f"{file.path}: truncated: storage {quote(key)} needs {nbytes} bytes at offset {position}, found"
                f" {file.nbytes - position}"
            )
        records[f"data/{key}"] = Record(file.path, position, nbytes, None, f"data/{key}")
        position += nbytes
    if position != file.nbytes:
        raise MalformedError(f"{file.path}: {file.nbytes - position} bytes follow the last storage")
    return pickles.machine, pickles.root, Archive(file.path, "", records, checksummed=False)


def _pickles(file: OpenFile) -> Pickles:
    """Read the pickles at the start of the file.

    Only reading the pickles tells how long they are, so more of the file is read until they end.
    """
    limit = min(file.nbytes, MAX_PICKLE_BYTES)
    nbytes = min(limit, FIRST_READ_BYTES)
    while True:
        try:
            return _parse(file, file.read(0, nbytes))
        except MalformedError:  # the start of a file is a truncated pickle until enough of it has been read
            if nbytes == limit:
                raise
        nbytes = min(limit, nbytes * 8)


def _parse(file: OpenFile, data: bytes) -> Pickles:
    storages: dict[str, StorageRef] = {}

    def persistent(pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 2 and pid[0] == "module":  # a module's class with its source
            return pid[1]
        storage = storage_of(pid, file.path)
        if pid[5:] and pid[5] is not None:
            raise UnsupportedError(
                f"{file.path}: storage {quote(storage.key)} is a view of another, as torch before 0.4 wrote; save it"
                " again"
            )
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"storage {safe_repr(storage.key)} with two types or sizes")
        return storage

    machines: list[Machine] = []
    values: list[Any] = []
    for what in (
        "the magic number",
        "the protocol's version",
        "the machine's properties",
        "the object",
        "the list of storages",
    ):
        machine = Machine(data, file.path, persistent, what, machines[-1].position if machines else 0)
        values.append(machine.run())
        machines.append(machine)
    magic, protocol, system, root, keys = values
    if magic != MAGIC or protocol != PROTOCOL:
        raise MalformedError(
            f"{file.path}: not torch's legacy format: magic number {safe_repr(magic)}, version {safe_repr(protocol)}"
        )
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise UnsupportedError(f"{file.path}: saved on a big-endian machine; dsconv reads little-endian files")
    return Pickles(root, keys, storages, machines[-1].position, machines[3])
