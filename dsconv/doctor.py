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
from collections.abc import Callable
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
# What needs more than the core: the modules that it imports, and the extra that installs them.
FEATURES = {
    "the Hub (org/model, --push-to-hub)": (("huggingface_hub",), "hub"),
    "https:// and other stores": (("fsspec", "aiohttp"), "remote"),
    "s3://": (("fsspec", "s3fs"), "s3"),
    "gs://": (("fsspec", "gcsfs"), "gs"),
    "DCP chunks compressed with zstd": (("zstandard",), "zstd"),
    "tensors in Python (entry.read())": (("torch",), "torch"),
    "loading into ZeRO-3 (load_zero3)": (("deepspeed", "transformers"), "train"),
    "loading into TP and DTensors (load_tp)": (("transformers",), "train"),
}
EVIL = b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."


def diagnose(folder: Path) -> dict[str, Any]:
    """Return versions, devices, free bytes and the results of the checks.

    Torch and the modules in FEATURES are imported, which takes some seconds. A check that fails is reported, not
    raised.

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
        "works": [*_core(), *(_feature(what, modules, extra) for what, (modules, extra) in FEATURES.items())],
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
        "seconds": round(time.monotonic() - began, 3),
        "problem": problem,
        "fix": fix if problem else "",
    }


def _core() -> list[dict[str, Any]]:
    """Check the real thing in small: a file is merged and compared, and one that would run code is
    refused.
    """
    return [
        _check("merging and verifying a checkpoint", _merge, "pip install --force-reinstall dsconv-toolkit"),
        _check(
            "refusing a pickle that would run code",
            _refuse,
            "do not use this installation, and report it (SECURITY.md)",
        ),
    ]


def _merge() -> str | None:
    from dsconv.convert.merge import merge
    from dsconv.convert.verify import verify

    header = json.dumps({"weight": {"dtype": "F32", "shape": [10, 100], "data_offsets": [0, 4000]}}).encode()
    with tempfile.TemporaryDirectory(prefix="dsconv-doctor-") as folder:
        file, output = Path(folder) / "model.safetensors", Path(folder) / "out"
        file.write_bytes(struct.pack("<Q", len(header)) + header + struct.pack("<1000f", *range(1000)))
        merge(file, output)
        return None if verify(file, output).equal else "the merged tensors differ from the saved ones"


def _refuse() -> str | None:
    from dsconv.checkpoint.pickles import machine

    try:
        machine.load(EVIL, Path("doctor.pkl"), lambda pid: None)
    except UnsafeError:
        return None
    except DsconvError as error:
        return f"refused, but as {type(error).__name__}: {error}"
    return "it was read"


def _feature(what: str, modules: tuple[str, ...], extra: str) -> dict[str, Any]:
    def run() -> str | None:
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        if missing:
            return f"{' and '.join(missing)} not installed"
        with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed logs to stdout, which is for the report
            for name in modules:
                importlib.import_module(name)
        return None

    return _check(what, run, f"pip install 'dsconv-toolkit[{extra}]'")
