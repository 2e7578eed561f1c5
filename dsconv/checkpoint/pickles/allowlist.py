"""What a pickle may name and call.

dsconv never imports or calls what a file names. ``CONSTRUCTORS`` maps exact (module, name) pairs to functions of
``constructors`` that build plain data. Any other name becomes an ``OpaqueClass``, which labels data and cannot be
called. The pairs were read from files that torch 2.13 and DeepSpeed 0.10 to 0.19.8 wrote; docs/safety.md lists who
writes which.
"""

from __future__ import annotations

import sys
from typing import Any

from dsconv.checkpoint.map import dtypes
from dsconv.checkpoint.pickles import constructors
from dsconv.checkpoint.pickles.values import OpaqueClass, StorageKind

CONSTRUCTORS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): constructors.ordered_dict,
    ("collections", "defaultdict"): constructors.default_dict,
    ("collections", "Counter"): constructors.ordered_dict,
    ("torch", "Size"): constructors.size,
    ("torch._utils", "_rebuild_tensor"): constructors.rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): constructors.rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): constructors.rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): constructors.rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): constructors.rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type"): constructors.rebuild_from_type,
    ("torch._tensor", "_rebuild_from_type_v2"): constructors.rebuild_from_type,
    ("torch.storage", "UntypedStorage"): StorageKind(None),
    ("deepspeed.runtime.zero.config", "ZeroStageEnum"): constructors.zero_stage,
    ("deepspeed.utils.tensor_fragment", "fragment_address"): constructors.fragment_address,
    ("_codecs", "encode"): constructors.encode,
    ("builtins", "getattr"): constructors.nested_class,
    ("__builtin__", "getattr"): constructors.nested_class,
    ("builtins", "set"): constructors.make_set,
    ("builtins", "frozenset"): constructors.make_set,
    ("__builtin__", "set"): constructors.make_set,
    ("__builtin__", "frozenset"): constructors.make_set,
    ("builtins", "bytes"): constructors.make_bytes,
    ("__builtin__", "bytes"): constructors.make_bytes,
    ("builtins", "bytearray"): constructors.make_bytes,
    ("__builtin__", "bytearray"): constructors.make_bytes,
}
for _module in ("torch", "torch.cuda", "torch.storage"):
    for _name, _dtype in dtypes.STORAGE_CLASSES.items():
        CONSTRUCTORS[_module, _name] = StorageKind(dtypes.BY_NAME[_dtype])
for _name, _dtype_value in dtypes.BY_NAME.items():
    CONSTRUCTORS["torch", _name] = _dtype_value
# Harmless values that dsconv has no use for: the arguments are kept and nothing is built.
for _module, _names in {
    "builtins": ("complex", "slice", "range"),
    "__builtin__": ("complex", "slice", "range", "xrange"),
    "collections": ("deque",),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "uuid": ("UUID", "SafeUUID"),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "_io": ("BytesIO",),
    "io": ("BytesIO",),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "random": ("Random",),
    "torch": ("device", "Generator"),
    "torch.serialization": ("_get_layout",),
    "torch._utils": ("_rebuild_device_tensor_from_numpy", "_rebuild_meta_tensor_no_storage"),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "torch.distributed.checkpoint.metadata": ("_MEM_FORMAT_ENCODING",),
    "torch.distributed._shard.sharded_tensor.metadata": ("MEM_FORMAT_ENCODING",),
}.items():
    for _name in _names:
        CONSTRUCTORS[_module, _name] = constructors.inert(f"{_module}.{_name}")

# These make an object from the class that is their argument, without running its __init__.
OBJECT_MAKERS = {
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("copyreg", "__newobj__"),
    ("copy_reg", "__newobj__"),
}
# Files name these as data: the base of a plain object, the factory of a defaultdict.
BASE_CLASSES = {
    (module, name)
    for module in ("builtins", "__builtin__")
    for name in ("object", "bool", "dict", "list", "int", "str", "float", "tuple", "long", "unicode")
}
# sys.stdlib_module_names lacks Python 2's names and, on some platforms, the C modules behind the standard library.
STANDARD_MODULES = frozenset(sys.stdlib_module_names) | {
    "__builtin__",
    "copy_reg",
    "commands",
    "nt",
    "posix",
    "os2",
    "ce",
}


def makes_objects(cls: OpaqueClass) -> bool:
    """Return whether ``cls`` is a function that makes an object of the class in its first argument."""
    return (cls.module, cls.name) in OBJECT_MAKERS


def belongs_to_python(module: str) -> bool:
    """Return whether ``module`` is Python's own. No checkpoint needs a name there that CONSTRUCTORS does not list."""
    return module.partition(".")[0] in STANDARD_MODULES
