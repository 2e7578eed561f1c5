"""Repositories of the Hugging Face Hub: ``org/model`` is read through the Hub's cache.

A repository's root lists what the Hub lists, and a file is downloaded into the cache when somebody opens it. What is in
the cache is not downloaded again. (``hf://org/model`` is read in place instead, by range requests: ``remote.py``.)
huggingface_hub does the work; it reads ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_OFFLINE`` and ``HF_HOME``. The first
three are passed to it here as well, since it reads them only when it is imported.
"""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote, unquote

from dsconv.checkpoint.storage.local import OpenFile
from dsconv.checkpoint.storage.paths import Bounds, SourcePath
from dsconv.errors import CheckpointNotFoundError, DsconvError, RemoteError, UnsupportedError
from dsconv.text import quote as shown

REPO = re.compile(r"[a-zA-Z0-9]([\w.-]{0,94}\w)?/[a-zA-Z0-9]([\w.-]{0,94}\w)?", re.ASCII)
SCHEME = "hf://"
# What from_pretrained may want beside the weights: configuration, tokenizer, code. Indexes belong to weights.
BESIDE = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja", "*.spm", "*.py", "tokenizer*", "vocab*")
NOT_BESIDE = "*.index.json"
MAX_BESIDE_BYTES = 200 << 20
DOWNLOADS_AT_ONCE = 8  # as many as huggingface_hub's snapshot_download
TRUE = ("1", "on", "yes", "true")
COMMIT = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")
MAX_NAME_CHARS, MAX_PART_BYTES = 1024, 255  # of a file's name; a longer one has no place in the cache


def is_repo(path: str | os.PathLike[str]) -> bool:
    """Return whether ``path`` is written as a repository's id (``org/model``) and is nothing on this disk.

    Where ``org`` is a folder here, a name that is not in it was mistyped, and the Hub is not asked.
    """
    text = os.fspath(path) if isinstance(path, str) else ""
    if not REPO.fullmatch(text) or "--" in text or ".." in text:
        return False
    return not Path(text).exists() and not Path(text.partition("/")[0]).exists()


def lies_on_hub(path: str) -> bool:
    """Return whether ``path`` is a repository's id or an ``hf://`` URL."""
    return path.startswith(SCHEME) or is_repo(path)


def with_revision(url: str, revision: str) -> str:
    """Return the URL ``hf://org/model/…`` at a revision.

    Raises:
        UnsupportedError: The path is no such URL, or it names a revision already.
    """
    parts = url.removeprefix(SCHEME).split("/")
    if not url.startswith(SCHEME) or len(parts) < 2 or "@" in url:
        raise UnsupportedError(f"{url}: --revision is for the Hub: give org/model or hf://org/model")
    return SCHEME + "/".join([parts[0], f"{parts[1]}@{quote(revision, safe='')}", *parts[2:]])


def connection() -> dict[str, Any]:
    """Return the endpoint and the token that the environment names."""
    return {"endpoint": os.environ.get("HF_ENDPOINT") or None, "token": os.environ.get("HF_TOKEN") or None}


@dataclass(frozen=True)
class HubStat:
    """What the Hub says of a path; the names are those of ``os.stat_result``."""

    st_size: int
    st_mtime_ns: int = 0


class HubPath(SourcePath):
    """A path in the cache's folder of a repository: the Hub says what is there, and an opened file is downloaded.

    As text it is where the file lies in the cache once it is there, so any program can read it after that.
    """

    root_of: HubRoot

    def stat(self, *, follow_symlinks: bool = True) -> HubStat:  # type: ignore[override]
        """Raises CheckpointNotFoundError."""
        size = self.root_of.sizes.get(self.root_of.name_of(self) or "")
        if size is None and not self.is_dir():
            raise CheckpointNotFoundError(f"{self}: no such file in {self.root_of.repo}")
        return HubStat(size or 0)

    def exists(self) -> bool:
        return self.is_file() or self.is_dir()

    def is_file(self) -> bool:
        return self.root_of.name_of(self) in self.root_of.sizes

    def is_dir(self) -> bool:
        return self.root_of.name_of(self) in self.root_of.folders

    def resolve(self, strict: bool = False) -> HubPath:
        return self.absolute()

    def iterdir(self) -> Generator[HubPath, None, None]:
        for name in sorted(self.root_of.folders.get(self.root_of.name_of(self) or "", ())):
            yield self / name

    def glob(self, pattern: str) -> Iterator[HubPath]:  # type: ignore[override]  # the options of later Pythons
        """Yield the paths below this one that match; ``**`` is not supported."""
        first, _, rest = pattern.partition("/")
        for path in self.iterdir():
            if fnmatch.fnmatchcase(path.name, first):
                if not rest:
                    yield path
                elif path.is_dir():
                    yield from path.glob(rest)

    def rglob(self, pattern: str) -> Iterator[HubPath]:  # type: ignore[override]  # the options of later Pythons
        yield from self.glob(pattern)
        for path in self.iterdir():
            if path.is_dir():
                yield from path.rglob(pattern)

    def open_for_reading(self) -> OpenFile:
        """Open the file, after downloading it. Raises CheckpointNotFoundError, RemoteError."""
        self.root_of.fetch([self])
        return super().open_for_reading()


class HubRoot:
    """The root of a repository at one commit. It implements ``Root`` (``roots.py``).

    Attributes:
        repo: The repository's id.
        path: The commit's folder in the cache, as a ``HubPath``.
        sizes: {name: size in bytes} of every file of the repository; names are relative, with ``/``.
        folders: {name: names that lie right in it} of every folder; the top has the name ``.``.
    """

    def __init__(self, repo: str, revision: str | None, sha: str, sizes: dict[str, int], api: Any) -> None:
        self.repo = repo
        self.revision = revision
        self.path = HubPath(_cache_folder(repo) / "snapshots" / sha)
        self.path.root_of = self
        self.path.bounds = Bounds(Path(self.path), follow_links=False)
        self.info = {"repo": repo, "revision": sha}
        self.warnings: list[str] = []
        self.sizes = sizes
        self.folders: dict[str, set[str]] = {".": set()}
        for name in sizes:
            inner = PurePath(name)
            while inner.name:
                self.folders.setdefault(str(inner.parent), set()).add(inner.name)
                inner = inner.parent
        self._api = api
        self._note_revision(sha)

    def name_of(self, path: Path) -> str | None:
        """Return the name of a path within the repository; None if it lies outside."""
        try:
            return PurePath(path).relative_to(PurePath(self.path)).as_posix()
        except ValueError:
            return None

    def fetch(self, paths: Iterable[Path]) -> None:
        """Download the files among ``paths`` that the cache does not hold, several at once.

        Raises:
            RemoteError: The Hub or the network fails.
        """
        names = [name for path in paths if (name := self.name_of(path)) in self.sizes and name is not None]
        wanted = [name for name in dict.fromkeys(names) if not Path(os.fspath(self.path), name).exists()]
        if not wanted:
            return
        try:
            with ThreadPoolExecutor(min(DOWNLOADS_AT_ONCE, len(wanted))) as pool:
                list(pool.map(self._download, wanted))
        except Exception as error:  # noqa: BLE001 - the client's own errors, httpx2's, and the system's
            raise explain(self.repo, self.revision, error) from None

    def fetch_beside(self, folders: Iterable[Path]) -> None:
        """Download the configuration, the tokenizer and the code that lie right in ``folders``."""
        self.fetch(
            path
            for folder in folders
            for path in (self.path / (self.name_of(folder) or "..")).iterdir()
            if path.is_file()
            and path.stat().st_size <= MAX_BESIDE_BYTES
            and any(fnmatch.fnmatchcase(path.name, pattern) for pattern in BESIDE)
            and not fnmatch.fnmatchcase(path.name, NOT_BESIDE)
        )

    def nothing_found(self, expected: str) -> DsconvError:
        return CheckpointNotFoundError(
            f"{self.repo}: no weights at the top of this repository: {expected}; for a checkpoint in one of its"
            f" folders, give {SCHEME}{self.repo}/FOLDER"
        )

    def _download(self, name: str) -> None:
        self._api.hf_hub_download(self.repo, name, revision=self.path.name)

    def _note_revision(self, sha: str) -> None:
        """Write into the cache which commit the revision is, as the Hub's client does, for runs without network."""
        if self.revision == sha:
            return
        note = _cache_folder(self.repo) / "refs" / (self.revision or "main")
        with contextlib.suppress(OSError):  # the cache may be read-only
            note.parent.mkdir(parents=True, exist_ok=True)
            unfinished = note.with_name(f"{note.name}.{os.getpid()}")
            unfinished.write_text(sha)
            unfinished.replace(note)


class CachedRoot:
    """The root of what the cache holds of a repository, where the Hub cannot be asked. It implements ``Root``."""

    def __init__(self, repo: str, revision: str | None, folder: Path, why: str) -> None:
        self.repo = repo
        self.revision = revision
        self.path = SourcePath(folder)
        self.path.bounds = Bounds(folder, follow_links=False)
        self.why = why
        self.info = {"repo": repo, "revision": folder.name}
        self.warnings: list[str] = []

    def fetch(self, paths: Iterable[Path]) -> None: ...

    def fetch_beside(self, folders: Iterable[Path]) -> None: ...

    def nothing_found(self, expected: str) -> DsconvError:
        return _not_cached(self.repo, self.revision, self.why)


def open_repo(repo: str, revision: str | None) -> HubRoot | CachedRoot:
    """Return the root of a repository: what the Hub lists, or what the cache holds where the Hub cannot be asked.

    Raises:
        RemoteError: The Hub or the network fails and the cache does not help, or there is no such repository.
        CheckpointNotFoundError: huggingface_hub is not installed.
    """
    api = _api(repo)
    if _offline():
        return _cached(api, repo, revision, "HF_HUB_OFFLINE is set")
    try:
        info = api.model_info(repo, revision=revision, files_metadata=True)
    except Exception as error:  # noqa: BLE001 - the client's own errors, httpx2's, and the system's
        said = explain(repo, revision, error)
        if not _is_of_the_network(error):
            raise said from None
        root = _cached(api, repo, revision, str(said))
        root.warnings.append(f"{said}; took what the cache has")
        return root
    sizes = {file.rfilename: file.size for file in info.siblings or [] if _stays_inside(file.rfilename)}
    counted = {name: size if type(size) is int and size >= 0 else 0 for name, size in sizes.items()}
    return HubRoot(repo, revision, require_commit(repo, info.sha), counted, api)


def require_commit(repo: str, sha: Any) -> str:
    """Return the commit that the server named, which becomes a folder's name. Raises RemoteError for any other text."""
    if not isinstance(sha, str) or not COMMIT.fullmatch(sha):
        endpoint = connection()["endpoint"] or "https://huggingface.co"
        raise RemoteError(f"{repo}: {endpoint} does not answer as the Hub does: it calls a commit {shown(sha)}")
    return sha


def fetch_config(repo: str, revision: str | None = None) -> Path:
    """Return a repository's ``config.json`` in the cache; nothing else is downloaded. Raises as ``open_repo`` does."""
    api = _api(repo)
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return Path(api.hf_hub_download(repo, "config.json", revision=revision, local_files_only=_offline()))
    except LocalEntryNotFoundError as error:  # no answer, and nothing in the cache
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        why = "HF_HUB_OFFLINE is set" if _offline() else str(explain(repo, revision, cause))
        raise RemoteError(f"{repo}: the cache holds no config.json of {_named(repo, revision)}, and {why}") from None
    except EntryNotFoundError:
        raise CheckpointNotFoundError(f"{_named(repo, revision)} has no config.json") from None
    except Exception as error:  # noqa: BLE001 - the client's own errors, httpx2's, and the system's
        raise explain(repo, revision, error) from None


def explain_absence(url: str) -> None:
    """Raise the error that ``org/model`` gives where nothing lies at ``hf://org/model``: fsspec hides the reason.

    Raises:
        RemoteError: The repository is private, gated or missing, or has no such revision.
    """
    repo, revision = repo_of(url)
    if not repo or _offline():
        return
    try:
        _api(repo).model_info(repo, revision=revision)
    except Exception as error:  # noqa: BLE001 - the client's own errors, httpx2's, and the system's
        raise explain(repo, revision, error) from None


def repo_of(url: str) -> tuple[str, str | None]:
    """Return the repository and the revision of a URL ``hf://org/model@revision/…``; "" where it names none."""
    parts = url.removeprefix(SCHEME).split("/")
    if not url.startswith(SCHEME) or len(parts) < 2:
        return "", None
    name, _, revision = parts[1].partition("@")
    return f"{parts[0]}/{name}", unquote(revision) or None


def explain(repo: str, revision: str | None, error: Exception) -> RemoteError:
    """Return the error that says, in one sentence, why the Hub did not give what was asked for."""
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


def _api(repo: str) -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise CheckpointNotFoundError(
            f"{repo}: no such file or folder; to read it from the Hub: pip install 'dsconv-toolkit[hub]'"
        ) from None
    return huggingface_hub.HfApi(**connection(), library_name="dsconv")


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE


def _cache_folder(repo: str) -> Path:
    """Return the folder of a repository in the cache (huggingface_hub 2.3 ``file_download.repo_folder_name``)."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().absolute() / f"models--{repo.replace('/', '--')}"


def _stays_inside(name: Any) -> bool:
    """Return whether a file's name, which the server chose, is a relative path without ``..`` that a disk can hold."""
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or "\0" in name:
        return False
    path = PurePath(name)
    try:
        too_long = any(len(os.fsencode(part)) > MAX_PART_BYTES for part in path.parts)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return name == path.as_posix() and not path.is_absolute() and ".." not in path.parts and not too_long


def _cached(api: Any, repo: str, revision: str | None, why: str) -> CachedRoot:
    """Return the root of the snapshot in the cache. Whether all files are there, the format's reader finds."""
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        folder = Path(api.snapshot_download(repo, revision=revision, local_files_only=True))
    except IncompleteSnapshotError as error:  # the repository has more files, such as weights of another kind
        folder = Path(error.snapshot_path)
    except LocalEntryNotFoundError:
        raise _not_cached(repo, revision, why) from None
    return CachedRoot(repo, revision, folder, why)


def _not_cached(repo: str, revision: str | None, why: str) -> RemoteError:
    return RemoteError(f"{repo}: the cache holds no weights of {_named(repo, revision)}, and {why}")


def _named(repo: str, revision: str | None) -> str:
    return f"{repo} at revision {revision}" if revision else repo


def _is_of_the_network(error: Exception) -> bool:
    """Return whether the Hub could not be asked, or was not able to answer; 4xx are answers."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return not isinstance(status, int) or status >= 500 or status == 429
