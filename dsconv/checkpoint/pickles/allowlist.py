"""What a pickle may name and call.

dsconv never imports or calls what a file names. ``CONSTRUCTORS`` maps exact (module, name) pairs to functions of
``constructors`` that build plain data or keep the arguments. Any other name becomes an ``OpaqueClass``, which labels
data. Nothing is run either way, so the rules below do not protect dsconv: they tell a user that a file would harm
whoever opens it with another reader.

- A name of Python's own library is refused unless it is listed here. ``os.system`` need not be called to be refused.
- A name of any other library may label data. Objects of it are made without a call (NEWOBJ).
- A call of such a name is refused, except one like ``Stage(2)``: what is named as a class is, called with one plain
  value. So does Python pickle the members of enumerations (``is_member``).

The pairs were read from files that torch 2.13, DeepSpeed 0.10 to 0.19.8, transformers and peft wrote;
docs/safety.md lists who writes which.
"""

from __future__ import annotations

import builtins
import re
import sys
from typing import Any

from dsconv.checkpoint.map import dtypes
from dsconv.checkpoint.map.dtypes import DType
from dsconv.checkpoint.pickles import constructors
from dsconv.checkpoint.pickles.kept_classes import KEPT
from dsconv.checkpoint.pickles.values import Opaque, OpaqueClass, StorageKind

_EXCEPTIONS = tuple(
    name for name, kind in vars(builtins).items() if isinstance(kind, type) and issubclass(kind, BaseException)
)
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
    ("builtins", "type"): constructors.type_of_none,
    ("__builtin__", "type"): constructors.type_of_none,
    ("functools", "partial"): constructors.partial,
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
    "builtins": ("complex", "slice", "range", *_EXCEPTIONS),
    "__builtin__": ("complex", "slice", "range", "xrange", *_EXCEPTIONS),
    "exceptions": _EXCEPTIONS,
    "array": ("array", "_array_reconstructor"),
    "collections": ("deque", "ChainMap", "UserDict", "UserList", "UserString"),
    "datetime": ("date", "datetime", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "uuid": ("UUID", "SafeUUID"),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "_io": ("BytesIO", "StringIO"),
    "io": ("BytesIO", "StringIO"),
    "types": ("SimpleNamespace", "GenericAlias"),
    "random": ("Random",),
    "re": ("compile", "_compile"),
    "time": ("struct_time",),
    "ipaddress": ("IPv4Address", "IPv6Address", "IPv4Network", "IPv6Network"),
    "logging": ("getLogger",),
    "operator": ("getitem", "itemgetter"),
    "_operator": ("getitem", "itemgetter"),
    "http": ("HTTPStatus",),
    "itertools": ("count", "repeat"),
    "signal": ("Signals", "Handlers"),
    "string": ("Template",),
    "zoneinfo": ("ZoneInfo", "ZoneInfo._unpickle"),
    "torch": ("device", "Generator"),
    "torch._C": ("Generator",),
    "torch.serialization": ("_get_layout",),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("_reconstruct", "scalar"),
    "numpy._core.multiarray": ("_reconstruct", "scalar"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "numpy.random._pickle": ("__generator_ctor", "__bit_generator_ctor", "__randomstate_ctor"),
    "numpy.random.bit_generator": ("__pyx_unpickle_SeedSequence",),
    "numpy.ma.core": ("_mareconstruct",),
    "pandas._libs.tslibs.timestamps": ("_unpickle_timestamp",),
    "pandas._libs.tslibs.timedeltas": ("_timedelta_unpickle",),
    "torch.distributed.checkpoint.metadata": ("_MEM_FORMAT_ENCODING",),
    "torch.distributed._shard.sharded_tensor.metadata": ("MEM_FORMAT_ENCODING",),
}.items():
    for _name in _names:
        CONSTRUCTORS[_module, _name] = constructors.Inert(f"{_module}.{_name}")
# Tensors that are not a view of one storage. A format refuses them where it expects a weight.
for _name in (
    "_rebuild_sparse_tensor",
    "_rebuild_sparse_csr_tensor",
    "_rebuild_nested_tensor",
    "_rebuild_qtensor",
    "_rebuild_device_tensor_from_cpu_tensor",
    "_rebuild_device_tensor_from_numpy",
    "_rebuild_meta_tensor_no_storage",
):
    CONSTRUCTORS["torch._utils", _name] = constructors.unread_tensor(f"torch._utils.{_name}")

# These make an object from the class that is their argument, without running its __init__.
OBJECT_MAKERS = {
    ("copyreg", "_reconstructor"),
    ("copy_reg", "_reconstructor"),
    ("copyreg", "__newobj__"),
    ("copy_reg", "__newobj__"),
}
# Names of Python's own that files hold as data: the base of a plain object, the factory of a defaultdict, the type that
# a setting has, the function of a partial.
LABELS = {
    (module, name)
    for module, names in {
        **dict.fromkeys(
            ("builtins", "__builtin__"),
            (
                *("object", "bool", "dict", "list", "int", "str", "float", "tuple", "long", "unicode"),
                *("Ellipsis", "NotImplemented", "abs", "len", "min", "print", "round", "sum"),
            ),
        ),
        "argparse": ("Namespace",),  # the attributes of which are read: see KEPT
        "typing": ("Any", "Union", "Optional", "Literal", "List", "Dict", "Tuple", "Set", "Callable"),
        "math": ("sqrt", "exp", "log", "log2", "log10", "log1p", "sin", "cos", "tan", "tanh", "pow", "floor", "ceil"),
    }.items()
    for name in names
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


# Modules and classes that run something when they are called with one text: a program, a file, a connection.
HARMFUL_MODULES = {
    *(
        "builtins",
        "code",
        "ctypes",
        "importlib",
        "marshal",
        "os",
        "pickle",
        "posix",
        "pty",
        "runpy",
        "subprocess",
        "sys",
    )
}
HARMFUL_CLASS = re.compile(
    r"(Popen|Process|Command|Shell|Console|Interpreter|Importer|Loader|Unpickler|Archive|File|Reader|Writer|Template|Thread"
    r"|Timer|Client|Server|Connection|Socket|Session|Executor|Runner|Compiler|Library|CDLL|DLL)$",
    re.IGNORECASE,
)
MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
CLASS = re.compile(r"_?[A-Z]\w*(\._?[A-Z]\w*)*", re.ASCII)
MAX_MEMBER_ITEMS = 1000  # or characters


def is_member(cls: OpaqueClass, args: tuple[Any, ...]) -> bool:
    """Return whether a call reads like the member of an enumeration, such as ``Stage(2)``.

    Python pickles a member as a call of its class with its value (CPython 3.10 to 3.14 ``enum.py`` ``__reduce_ex__``).
    The class must be named as PEP 8 says, must not be one of ``KEPT``, whose objects are never made so, nor one that
    runs something when it is called with a text. The value must be data or a class, or a container of them.
    """
    return (
        len(args) == 1
        and _is_value(args[0])
        and (cls.module, cls.name) not in KEPT
        and MODULE.fullmatch(cls.module) is not None
        and CLASS.fullmatch(cls.name) is not None
        and HARMFUL_MODULES.isdisjoint(cls.module.split("."))
        and HARMFUL_CLASS.search(cls.name) is None
    )


def _is_value(value: Any) -> bool:
    if isinstance(value, (str, bytes, list, tuple, set, frozenset, dict)) and len(value) > MAX_MEMBER_ITEMS:
        return False
    if isinstance(value, dict):
        return all(_is_plain(item) for pair in value.items() for item in pair)
    return all(map(_is_plain, value)) if isinstance(value, (list, tuple, set, frozenset)) else _is_plain(value)


def _is_plain(value: Any) -> bool:
    if isinstance(value, OpaqueClass):
        return CLASS.fullmatch(value.name) is not None or (value.module, value.name) in LABELS
    return value is None or isinstance(value, (int, float, str, bytes, DType, Opaque))


def makes_objects(cls: OpaqueClass) -> bool:
    """Return whether ``cls`` is a function that makes an object of the class in its first argument."""
    return (cls.module, cls.name) in OBJECT_MAKERS


def belongs_to_python(module: str) -> bool:
    """Return whether ``module`` is Python's own. No checkpoint needs a name there that CONSTRUCTORS does not list."""
    return module.partition(".")[0] in STANDARD_MODULES
