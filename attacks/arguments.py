"""Programs that call an allowed function with harmful arguments, or that call one function through another."""

from __future__ import annotations

from attacks.payload import (
    CANARY_MODULE,
    FROM_TYPE,
    SYSTEM,
    TENSOR_CLASS,
    Hostile,
    argv,
    own_name,
    touch,
)
from dsconv.errors import DsconvError, MalformedError
from tests.checkpoint.building import call, glob, lst, number, storage, tensor, text, tup, whole

SHARDED = "torch.distributed._shard.sharded_tensor.api"
INDIRECT = [
    Hostile(
        "getattr of a module by name",
        lambda c: whole(
            call(
                call(glob("builtins", "getattr"), call(glob("builtins", "__import__"), text("os")), text("system")),
                touch(c),
            )
        ),
        "builtins.__import__",
    ),
    Hostile(
        "getattr of a class that files name, for something else than what they ask",
        lambda c: whole(call(glob("__builtin__", "getattr"), glob(SHARDED, "ShardedTensor"), text("__init__"))),
        "builtins.getattr",
        real=False,
    ),
    Hostile(
        "getattr of a class as a call",
        lambda c: whole(
            call(
                call(glob("__builtin__", "getattr"), glob(SHARDED, "ShardedTensor"), text("ProcessGroupState")),
                touch(c),
            )
        ),
        "ShardedTensor.ProcessGroupState",
        real=False,
    ),
    Hostile(
        "a tensor without storage rebuilt by itself",
        lambda c: whole(
            call(glob("torch._utils", "_rebuild_wrapper_subclass"), glob("torch.distributed.tensor", "DTensor"))
        ),
        "torch._utils._rebuild_wrapper_subclass",
        real=False,
    ),
    Hostile(
        "copyreg.__newobj__ of a process",
        lambda c: whole(call(glob("copyreg", "__newobj__"), glob("subprocess", "Popen"), argv(c))),
        "subprocess.Popen",
        real=False,
    ),
    Hostile(
        "copyreg._reconstructor of a process",
        lambda c: whole(
            call(glob("copyreg", "_reconstructor"), glob("subprocess", "Popen"), glob("builtins", "object"), b"N")
        ),
        "subprocess.Popen",
        real=False,
    ),
    Hostile(
        "copyreg._reconstructor of itself",
        lambda c: whole(
            call(glob("copyreg", "_reconstructor"), glob("copyreg", "_reconstructor"), glob("builtins", "object"), b"N")
        ),
        "copyreg._reconstructor",
        real=False,
    ),
    Hostile(
        "copyreg._reconstructor of text",
        lambda c: whole(call(glob("copyreg", "_reconstructor"), text("os"), b"N", b"N")),
        "copyreg._reconstructor",
        real=False,
    ),
    Hostile(
        "NEWOBJ of copyreg.__newobj__",
        lambda c: whole(glob("copyreg", "__newobj__"), tup(touch(c)), b"\x81"),
        "copyreg.__newobj__",
        real=False,
    ),
    Hostile(
        "a partial is called",
        lambda c: whole(call(call(glob("functools", "partial"), SYSTEM, touch(c)))),
        "os.system",
    ),
    Hostile(
        "an attrgetter is called",
        lambda c: whole(
            call(
                call(
                    call(glob("operator", "attrgetter"), text("system")),
                    call(glob("builtins", "__import__"), text("os")),
                ),
                touch(c),
            )
        ),
        "operator.attrgetter",
    ),
    Hostile(
        "an object of an unknown class is called",
        lambda c: whole(call(glob(CANARY_MODULE, "Evil") + b")\x81", touch(c))),
        CANARY_MODULE,
    ),
    Hostile("text is called", lambda c: whole(call(text("os.system"), touch(c))), "'os.system'", real=False),
    Hostile("a dtype is called", lambda c: whole(call(glob("torch", "float32"), touch(c))), "float32", real=False),
    Hostile(
        "a storage class is called",
        lambda c: whole(call(glob("torch", "FloatStorage"), number(1 << 40))),
        "StorageKind",
        real=False,
    ),
    Hostile("INST of an unknown class", lambda c: f"(i{CANARY_MODULE}\nstrike\n.".encode(), f"{CANARY_MODULE}.strike"),
    Hostile(
        "OBJ of an unknown class", lambda c: b"(" + glob(CANARY_MODULE, "Evil") + b"N" + b"o.", f"{CANARY_MODULE}.Evil"
    ),
]
ALLOWED_WITH_HOSTILE_ARGUMENTS = [
    Hostile(
        "a tensor subclass rebuilt by os.system",
        lambda c: whole(call(FROM_TYPE, SYSTEM, TENSOR_CLASS, tup(touch(c)), b"N")),
        "os.system",
    ),
    Hostile(
        "a tensor subclass rebuilt by torch.hub.load",
        lambda c: whole(call(FROM_TYPE, glob("torch.hub", "load"), TENSOR_CLASS, tup(text(c)), b"N")),
        "rebuilt by something unknown",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a tensor subclass rebuilt by an unknown function",
        lambda c: whole(call(FROM_TYPE, glob(CANARY_MODULE, "strike"), TENSOR_CLASS, b")", b"N")),
        "rebuilt by something unknown",
        MalformedError,
    ),
    Hostile(
        "a tensor subclass rebuilt by itself",
        lambda c: whole(call(FROM_TYPE, FROM_TYPE, TENSOR_CLASS, b")", b"N")),
        "rebuilt by something unknown",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a tensor subclass that is a function",
        lambda c: whole(
            call(FROM_TYPE, glob("torch._utils", "_rebuild_tensor_v2"), glob("collections", "OrderedDict"), b")", b"N")
        ),
        "without a class",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a tensor of a class instead of a storage",
        lambda c: whole(tensor(of=glob(CANARY_MODULE, "Evil"))),
        "storage",
        MalformedError,
    ),
    Hostile(
        "a storage of an unknown class",
        lambda c: whole(tup(text("storage"), glob(CANARY_MODULE, "Evil"), text("0"), text("cpu"), number(4)), b"Q"),
        CANARY_MODULE,
        DsconvError,
    ),
    Hostile(
        "a storage whose name leaves the folder",
        lambda c: whole(storage("../../etc/passwd")),
        "passwd",
        MalformedError,
        real=False,
    ),
    Hostile(
        "bytes of a huge number",
        lambda c: whole(call(glob("builtins", "bytes"), number(1 << 45))),
        "bytes",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a bytearray of a huge number",
        lambda c: whole(call(glob("builtins", "bytearray"), number(1 << 45))),
        "bytes",
        MalformedError,
        real=False,
    ),
    Hostile(
        "an OrderedDict of a range",
        lambda c: whole(call(glob("collections", "OrderedDict"), call(glob("builtins", "range"), number(1 << 45)))),
        "pairs",
        MalformedError,
        real=False,
    ),
    Hostile(
        "an OrderedDict of text",
        lambda c: whole(call(glob("collections", "OrderedDict"), text("abcd"))),
        "pairs",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a set of lists",
        lambda c: whole(call(glob("builtins", "set"), lst(lst()))),
        "list as a dictionary key",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a dictionary keyed by a list", lambda c: whole(b"}]Ns"), "list as a dictionary key", MalformedError, real=False
    ),
    Hostile(
        "_codecs.encode into a codec that is a module",
        lambda c: whole(call(glob("_codecs", "encode"), text("x"), own_name(c))),
        "text",
        MalformedError,
        real=False,
    ),
    Hostile(
        "_codecs.encode into a codec that is an object",
        lambda c: whole(call(glob("_codecs", "encode"), text("x"), glob(CANARY_MODULE, "Evil"))),
        "text",
        MalformedError,
    ),
    Hostile(
        "a torch.Size of an unknown object",
        lambda c: whole(call(glob("torch", "Size"), glob(CANARY_MODULE, "Evil"))),
        "torch.Size",
        MalformedError,
    ),
    Hostile(
        "a torch.Size below zero",
        lambda c: whole(call(glob("torch", "Size"), lst(number(-1)))),
        "torch.Size",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a ZeRO stage by an object",
        lambda c: whole(call(glob("deepspeed.runtime.zero.config", "ZeroStageEnum"), glob(CANARY_MODULE, "Evil"))),
        CANARY_MODULE,
        MalformedError,
        real=False,
    ),
    Hostile(
        "a fragment_address with text",
        lambda c: whole(call(glob("deepspeed.utils.tensor_fragment", "fragment_address"), text("a"), text("b"))),
        "fragment_address",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a plain value made with keywords",
        lambda c: whole(glob("torch", "Size"), b")}", text("x"), b"Ns\x92", protocol=4),
        "keywords",
        MalformedError,
        real=False,
    ),
    Hostile(
        "too few arguments for a tensor",
        lambda c: whole(call(glob("torch._utils", "_rebuild_tensor_v2"))),
        "corrupt",
        MalformedError,
        real=False,
    ),
    Hostile(
        "a call without a tuple",
        lambda c: whole(glob("collections", "OrderedDict"), b"]R"),
        "tuple",
        MalformedError,
        real=False,
    ),
]
