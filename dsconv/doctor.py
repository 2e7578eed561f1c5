"""Report what is installed, what the machine has, and what works here. It belongs in every bug report."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from dsconv._version import __version__
from dsconv.errors import DsconvError, UnsafeError

PACKAGES = (
    "torch",
    "safetensors",
    "numpy",
    "zlib-ng",
    "deepspeed",
    "transformers",
    "accelerate",
    "peft",
    "huggingface_hub",
    "fsspec",
    "aiohttp",
    "s3fs",
    "gcsfs",
    "zstandard",
)
# What needs a network, a GPU or ranks to be tried: the modules that it imports, and the extra that installs them.
FEATURES = {
    "the Hub (org/model, --push-to-hub)": (("huggingface_hub",), "hub"),
    "https:// and other stores": (("fsspec", "aiohttp"), "remote"),
    "s3://": (("fsspec", "s3fs"), "s3"),
    "gs://": (("fsspec", "gcsfs"), "gs"),
    "loading into ZeRO-3 (load_zero3)": (("deepspeed", "transformers"), "train"),
    "loading into TP and DTensors (load_tp)": (("transformers",), "train"),
}
EVIL = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."


def diagnose(folder: Path) -> dict[str, Any]:
    """Return versions, devices, free bytes and the results of the checks.

    torch, transformers and DeepSpeed are imported, which takes some seconds. A check that fails is reported, not
    raised; ``tried`` says of each whether the real thing was tried, or the packages only imported.

    Args:
        folder: A folder whose free bytes are reported, besides those of other folders that dsconv writes to.
    """
    cuda = _cuda()
    return {
        "dsconv": __version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": {"cores": len(os.sched_getaffinity(0)), "memory_bytes": _memory_bytes(), "accelerators": cuda},
        "free_bytes": {
            str(path): _free_bytes(path)
            for path in dict.fromkeys((folder.absolute(), Path(tempfile.gettempdir()), _hub_cache()))
        },
        "works": [
            *_core(),
            *(_tried(what, modules, extra, run) for what, (modules, extra, run) in TRIED.items()),
            *(_imported(what, modules, extra) for what, (modules, extra) in FEATURES.items()),
        ],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cuda() -> list[str]:
    """Return the accelerators that torch sees; none if it cannot be imported, which a check reports."""
    try:
        import torch

        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    except Exception:  # noqa: BLE001 - a broken driver fails in many ways
        return []


def _hub_cache() -> Path:
    home = os.environ.get("HF_HOME") or "~/.cache/huggingface"
    return Path(os.environ.get("HF_HUB_CACHE") or Path(home) / "hub").expanduser()


def _free_bytes(path: Path) -> int | None:
    """Return the free bytes of the file system that holds ``path``, or will hold it."""
    for near in (path, *path.parents):
        if near.exists():
            return shutil.disk_usage(near).free
    return None


def _check(what: str, run: Callable[[], str | None], fix: str = "") -> dict[str, Any]:
    began = time.monotonic()
    try:
        problem = run()
    except Exception as error:  # noqa: BLE001 - every failure is reported
        problem = f"{type(error).__name__}: {error}"
    return {
        "what": what,
        "works": problem is None,
        "tried": True,
        "seconds": round(time.monotonic() - began, 3),
        "problem": problem,
        "fix": fix if problem else "",
    }


def _core() -> list[dict[str, Any]]:
    """Check the real thing in small: a file is merged and compared, and one that would run code is
    refused.
    """
    return [
        _check("merging, casting and verifying a checkpoint", _merge, "pip install --force-reinstall dsconv-toolkit"),
        _check(
            "refusing a pickle that would run code",
            _refuse,
            "do not use this installation, and report it (SECURITY.md)",
        ),
    ]


def _merge() -> str | None:
    from dsconv.convert.merge import merge
    from dsconv.convert.verify import verify

    with _sample() as file:
        output = file.parent / "out"
        merge(file, output)
        if not verify(file, output).equal:
            return "the merged tensors differ from the saved ones"
        merge(file, output, dtype="bf16", force=True)
        return (
            None if verify(file, output, allow_cast=True).equal else "tensors that are cast differ from the saved ones"
        )


@contextlib.contextmanager
def _sample() -> Iterator[Path]:
    """Yield a file of safetensors with a tensor of 1,000 numbers."""
    header = json.dumps({"weight": {"dtype": "F32", "shape": [10, 100], "data_offsets": [0, 4000]}}).encode()
    with tempfile.TemporaryDirectory(prefix="dsconv-doctor-") as folder:
        file = Path(folder) / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<1000f", *range(1000)))
        yield file


def _refuse() -> str | None:
    from dsconv.checkpoint.pickles import machine

    try:
        machine.load(EVIL, Path("doctor.pkl"), lambda pid: None)
    except UnsafeError:
        return None
    except DsconvError as error:
        return f"refused, but as {type(error).__name__}: {error}"
    return "it was read"


def _read_tensor() -> str | None:
    from dsconv.checkpoint.opening import open_checkpoint

    with _sample() as file:
        read = open_checkpoint(file)["weight"].read(slice(2, 3))
        return None if read.tolist() == [[float(value) for value in range(200, 300)]] else "it reads other values"


def _zstd() -> str | None:
    import zstandard

    packed = zstandard.ZstdCompressor().compress(b"dsconv" * 100)
    return None if zstandard.ZstdDecompressor().decompress(packed) == b"dsconv" * 100 else "it returns other bytes"


# What is tried here: the modules that it imports, the extra that installs them, and the trial.
TRIED: dict[str, tuple[tuple[str, ...], str, Callable[[], str | None]]] = {
    "tensors in Python (entry.read())": (("torch",), "torch", _read_tensor),
    "DCP chunks compressed with zstd": (("zstandard",), "zstd", _zstd),
}


def _tried(what: str, modules: tuple[str, ...], extra: str, trial: Callable[[], str | None]) -> dict[str, Any]:
    return _check(what, lambda: _import(modules) or trial(), f"pip install 'dsconv-toolkit[{extra}]'")


def _imported(what: str, modules: tuple[str, ...], extra: str) -> dict[str, Any]:
    found = _check(what, lambda: _import(modules), f"pip install 'dsconv-toolkit[{extra}]'")
    return {**found, "tried": False}


def _import(modules: tuple[str, ...]) -> str | None:
    """Import ``modules``; return which are not installed."""
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout, which is for the report
        for name in modules:
            importlib.import_module(name)
    return None
