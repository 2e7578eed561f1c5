"""Models of the Hugging Face Hub as sources: ``org/model`` is downloaded into the Hub's cache, ``hf://org/model`` is
read in place.

Of a repository come the weights of one kind (safetensors before ``.bin``), their index, configuration and tokenizer,
and nothing else. What is in the cache is not downloaded again. huggingface_hub 2.4 does the work; it reads
``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and ``HF_HOME``, the first three of which are given to it here, since
it looks only when it is imported.
"""

from __future__ import annotations

import fnmatch
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dsconv.errors import CheckpointNotFoundError, RemoteError, UnsupportedError

REPO = re.compile(r"[a-zA-Z0-9]([\w.-]{0,94}\w)?/[a-zA-Z0-9]([\w.-]{0,94}\w)?", re.ASCII)
SCHEME = "hf://"
BESIDE = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.spm", "*.py", "tokenizer*", "vocab*")
MAX_BESIDE_BYTES = 200 << 20
TRUE = ("1", "on", "yes", "true")


def is_repo(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is not of this disk and is written as a repository is: ``org/model``.

    Where ``org`` is a folder here, a name that is not in it was mistyped: the Hub is not asked.
    """
    text = os.fspath(path) if isinstance(path, str) else ""
    if not REPO.fullmatch(text) or "--" in text or ".." in text:
        return False
    return not Path(text).exists() and not Path(text.partition("/")[0]).exists()


def lies_on_hub(path: str) -> bool:
    """Whether ``path`` is a repository's id or an ``hf://`` URL."""
    return path.startswith(SCHEME) or is_repo(path)


def with_revision(url: str, revision: str) -> str:
    """``hf://org/model/…`` at a revision. Raises UnsupportedError for any other path, and where it names one
    already.
    """
    parts = url.removeprefix(SCHEME).split("/")
    if not url.startswith(SCHEME) or len(parts) < 2 or "@" in url:
        raise UnsupportedError(f"{url}: --revision is of the Hub: give org/model or hf://org/model")
    return SCHEME + "/".join([parts[0], f"{parts[1]}@{quote(revision, safe='')}", *parts[2:]])


def connection() -> dict[str, Any]:
    """The endpoint and the token that the environment names."""
    return {"endpoint": os.environ.get("HF_ENDPOINT") or None, "token": os.environ.get("HF_TOKEN") or None}


def fetch(repo: str, revision: str | None) -> tuple[Path, list[str]]:
    """The folder of a repository's snapshot in the cache, completed, and warnings. Its name is the commit.

    Raises RemoteError where the Hub or the network fails and the cache does not help, CheckpointNotFoundError where
    there is no such repository or it holds no weights, UnsafeError where its index leaves the folder.
    """
    api = _api(repo)
    if _offline():
        return _cached(api, repo, revision, "HF_HUB_OFFLINE is set"), []
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
        names = [*_weights(api, repo, revision, sizes), *_beside(sizes)]
        return Path(
            api.snapshot_download(repo, revision=revision, allow_patterns=[_literal(name) for name in names])
        ), []
    except Exception as error:  # noqa: BLE001 - the client's own, httpx2's, and the system's
        if isinstance(error, (CheckpointNotFoundError, ValueError)) and not hasattr(error, "response"):
            raise
        said = _explain(repo, revision, error)
        if not _is_of_the_network(error):
            raise said from None
        return _cached(api, repo, revision, str(said)), [f"{said}; took what the cache has"]


def fetch_config(repo: str, revision: str | None = None) -> Path:
    """A repository's ``config.json`` in the cache, and nothing else of it; raises as ``fetch`` does."""
    api = _api(repo)
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(api.hf_hub_download(repo, "config.json", revision=revision, local_files_only=_offline()))
    except LocalEntryNotFoundError as error:  # no answer, and nothing in the cache
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        why = "HF_HUB_OFFLINE is set" if _offline() else str(_explain(repo, revision, cause))
        raise RemoteError(f"{repo}: the cache holds no config.json of {_named(repo, revision)}, and {why}") from None
    except EntryNotFoundError:
        raise CheckpointNotFoundError(f"{_named(repo, revision)} has no config.json") from None
    except Exception as error:  # noqa: BLE001 - the client's own, httpx2's, and the system's
        raise _explain(repo, revision, error) from None


def _api(repo: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointNotFoundError(
            f"{repo}: no such file or folder; to read it from the Hub: pip install 'dsconv[hub]'"
        ) from None
    return huggingface_hub.HfApi(**connection(), library_name="dsconv")


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE


def _kinds() -> tuple[tuple[str, str], ...]:
    """The kinds of weights, as they are looked for: (one file, its index)."""
    from dsconv.checkpoint.formats.huggingface import safetensors, torch_bin

    return (
        (safetensors.SINGLE, safetensors.INDEX),
        (torch_bin.SINGLE, torch_bin.INDEX),
        (safetensors.ADAPTER, ""),
        (torch_bin.ADAPTER, ""),
    )


def _weights(api: Any, repo: str, revision: str | None, sizes: dict[str, int]) -> list[str]:
    """The names of the weights of one kind, with their index."""
    from dsconv.checkpoint.formats.huggingface.index import weight_map_of

    for single, index in _kinds():
        if single in sizes:
            return [single]
        if index and index in sizes:
            weight_map = weight_map_of(Path(api.hf_hub_download(repo, index, revision=revision)))
            return [index, *dict.fromkeys(weight_map.values())]
    raise CheckpointNotFoundError(
        f"{repo}: no weights at the top of this repository (model.safetensors, pytorch_model.bin, adapter_model …); "
        f"for a checkpoint in it, such as DeepSpeed's, give {SCHEME}{repo}/FOLDER"
    )


def _beside(sizes: dict[str, int]) -> list[str]:
    indexes = {index for _, index in _kinds()}
    return [
        name
        for name, nbytes in sizes.items()
        if "/" not in name
        and name not in indexes
        and nbytes <= MAX_BESIDE_BYTES
        and any(fnmatch.fnmatchcase(name, p) for p in BESIDE)
    ]


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _cached(api: Any, repo: str, revision: str | None, why: str) -> Path:
    """The snapshot in the cache, if it has weights; whether all are there, the format's reader finds."""
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = Path(api.snapshot_download(repo, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:  # the repository has more files, such as weights of another kind
        folder = Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        folder = Path()
    if folder == Path() or not any((folder / name).exists() for kind in _kinds() for name in kind if name):
        raise RemoteError(f"{repo}: the cache holds no weights of {_named(repo, revision)}, and {why}")
    return folder


def _named(repo: str, revision: str | None) -> str:
    return f"{repo} at revision {revision}" if revision else repo


def _is_of_the_network(error: Exception) -> bool:
    """Whether the Hub could not be asked, or was not able to answer; 4xx are answers."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return not isinstance(status, int) or status >= 500 or status == 429


def _explain(repo: str, revision: str | None, error: Exception) -> RemoteError:
    from huggingface_hub import errors

    endpoint = connection()["endpoint"] or "https://huggingface.co"
    if isinstance(error, errors.GatedRepoError):
        why = f"is gated: accept its terms at {endpoint}/{repo} and set HF_TOKEN"
    elif isinstance(error, errors.RevisionNotFoundError):
        why = f"has no revision {revision!r} on the Hub ({endpoint})"
    elif isinstance(error, errors.RepositoryNotFoundError):
        why = f"no such file or folder, and no such repository on the Hub ({endpoint}); if it is private, set HF_TOKEN"
    else:
        said = " ".join(str(error).split())[:300]
        why = f"the Hub ({endpoint}) cannot be reached: {type(error).__name__}: {said}"
    return RemoteError(f"{repo}: {why}")
