"""``push``: a folder of safetensors to the Hugging Face Hub, checked before it goes and compared after it has arrived.

huggingface_hub's ``upload_folder`` (2.4) does the work: what the Hub has already is not sent again, so a push that was
cut off is resumed by running it again. All of a model goes in one commit (beyond 250 files, in several), which is
refused by the Hub where the revision has moved since it was looked at.

The client reads its environment when it is imported; ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` are read
here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsconv.checkpoint.storage.hub import REPO, TRUE, connection
from dsconv.checkpoint.storage.local import is_remote
from dsconv.checkpoint.storage.roots import as_path
from dsconv.checkpoint.transfer.copy import default_workers
from dsconv.convert.hub_errors import explain, status_of
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.model_card import CARD, make_card
from dsconv.convert.progress import Progress
from dsconv.convert.push_files import File, check_and_hash, check_names, files_of, open_model, read_manifest
from dsconv.errors import DsconvError, MismatchError, OutputError, RemoteError, UnsafeError

# The weights of an earlier push that this one does not replace: from_pretrained may take them for the model's.
STALE = re.compile(r"(?P<stem>model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
CONFLICTS = (409, 412)


@dataclass
class PushReport:
    """What a push did, or with ``dry_run`` would do. ``files``: [{file, bytes, sha256}], with the card once it is made;
    sizes are
    in bytes. ``commit`` is the one that holds the files; ``changed`` is False where the Hub had all of them.
    ``checked`` is False where there was no manifest to check against, or it was not to be. ``left_out`` are files of
    the folder that do not go.
    """

    folder: str
    repo: str
    revision: str
    nbytes: int
    files: list[dict[str, Any]]
    left_out: list[str]
    private: bool = False
    created: bool = False
    checked: bool = False
    changed: bool = False
    commit: str | None = None
    url: str | None = None
    pull_request: str | None = None
    deleted: list[str] = field(default_factory=list)
    dry_run: bool = False
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def push(
    folder: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    check: bool = True,
    dry_run: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> PushReport:
    """Push a folder of safetensors to the model repository ``repo`` (``org/model``), which is made if need be.

    The folder must be what its manifest says, unless ``check`` is False: files, sizes, and the CRC-32 of each tensor. A
    branch ``revision`` is made if need be. ``progress`` is called with (phase, bytes done, bytes in all), from any
    thread.

    Raises DsconvError: CheckpointNotFoundError or MalformedError where the folder is no model; MismatchError where it
    is not what its manifest says, or what arrived is not what was sent; UnsafeError for a link out of the folder, and
    where ``private`` was asked for and the repository is public; RemoteError where the Hub or the network fails.
    ValueError for a ``repo`` that is none, and for ``create_pr`` with a ``revision``.
    """
    check_repo(repo)
    if create_pr and revision is not None:
        raise ValueError("a pull request is made against the main branch: leave out the revision, or create_pr")
    root = as_path(folder)
    model = open_model(root)
    manifest = read_manifest(root)
    files, left_out = files_of(root)
    if manifest is not None and check:
        check_names(root, model, files, manifest)
    rows: list[dict[str, Any]] = [{"file": file.name, "bytes": file.nbytes} for file in files]
    report = PushReport(
        str(root),
        repo,
        revision or "main",
        sum(file.nbytes for file in files),
        rows,
        left_out,
        private,
        dry_run=dry_run,
    )
    if manifest is None:
        report.warnings.append(f"{root} has no {MANIFEST}: there was nothing to check the files against")
    if dry_run:
        return report
    api = open_api(repo)
    with _one_sentence(report), _silent_client():
        there = _look(api, repo, revision)
        _require_private(there, private)
        digests = check_and_hash(
            root, model, files, manifest if check else None, workers or default_workers(), progress
        )
        report.checked = manifest is not None and check
        for row in rows:
            row["sha256"] = digests[row["file"]]
        there = (
            there if there is not None and there.sha is not None else _make(api, repo, revision, private, there, report)
        )
        _require_private(there, private)
        report.private = there.private
        listed = {name: digest for name, digest in digests.items() if name != CARD}
        sizes = {file.name: file.nbytes for file in files}
        card = make_card(_existing_card(api, there, root, report), repo, root, model, manifest, sizes, listed)
        data = card.encode(errors="surrogateescape")
        report.files = [row for row in rows if row["file"] != CARD]
        report.files.append({"file": CARD, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()})
        report.nbytes = sum(row["bytes"] for row in report.files)
        with _shelf(files, data) as shelf:
            _upload(api, there, shelf, report, create_pr, commit_message or _message(root, manifest))
    return report


def prepare(repo: str, output: Path) -> None:
    """Find out before a merge what would stop its push: see ``push``. OutputError where the output is not on this
    disk.
    """
    check_repo(repo)
    if is_remote(output):
        raise OutputError(f"{output}: --push-to-hub pushes what lies on this disk; merge to a folder here")
    open_api(repo)


def push_merged(output: Path, repo: str, private: bool, progress: Progress | None) -> dict[str, Any]:
    """Push what a merge has put in place; where the Hub fails, say that the merge has not."""
    try:
        return push(output, repo, private=private, progress=progress).to_dict()
    except (RemoteError, UnsafeError) as error:
        raise type(error)(
            f"{error}. The model is whole in {output}; to push it: dsconv push {output} {repo}{' --private' * private}"
        ) from None


def check_repo(repo: str) -> None:
    """Raise ValueError unless ``repo`` is written as a repository is."""
    if not REPO.fullmatch(repo) or "--" in repo or ".." in repo:
        raise ValueError(f"{repo!r}: a repository of the Hub is written org/model")


def open_api(repo: str) -> Any:
    """The Hub's client. Raises RemoteError where it is not installed, not to be used (HF_HUB_OFFLINE), or has no
    token.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise RemoteError(f"{repo}: pushing to the Hub needs huggingface_hub: pip install 'dsconv[hub]'") from None
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE:
        raise RemoteError(f"{repo}: HF_HUB_OFFLINE is set, and a push needs the Hub: unset it")
    given = connection()
    token = given["token"] or huggingface_hub.get_token()
    if not token:
        raise RemoteError(f"{repo}: there is no token to write with: set HF_TOKEN, or log in with: hf auth login")
    return huggingface_hub.HfApi(endpoint=given["endpoint"], token=token, library_name="dsconv")


@dataclass(frozen=True)
class _Repository:
    """A repository at a revision: its head (None where the repository has no such branch yet) and the files there."""

    repo: str
    revision: str | None
    sha: str | None
    private: bool
    names: frozenset[str]


def _look(api: Any, repo: str, revision: str | None) -> _Repository | None:
    """The repository as it is, or None where there is none, or none that this token may see."""
    from huggingface_hub import errors

    try:
        info = api.model_info(repo, revision=revision)
    except errors.RevisionNotFoundError:
        if not _is_branch(revision):
            raise
        return _Repository(repo, revision, None, bool(api.model_info(repo).private), frozenset())
    except errors.RepositoryNotFoundError:
        if revision is not None and not _is_branch(revision):
            raise
        return None
    return _Repository(
        repo, revision, info.sha, bool(info.private), frozenset(file.rfilename for file in info.siblings or [])
    )


def _is_branch(revision: str | None) -> bool:
    """Whether ``revision`` can be made: neither a commit nor a reference such as that of a pull request."""
    return revision is not None and not revision.startswith("refs/") and not COMMIT.fullmatch(revision)


def _require_private(there: _Repository | None, private: bool) -> None:
    if private and there is not None and not there.private:
        raise UnsafeError(
            f"{there.repo} is there already and is public: make it private in its settings on the Hub, or leave out"
            " --private"
        )


def _make(
    api: Any, repo: str, revision: str | None, private: bool, there: _Repository | None, report: PushReport
) -> _Repository:
    """Make the repository, or its branch, or both, and look at it."""
    if there is None:
        api.create_repo(repo, private=private or None, repo_type="model", exist_ok=True)
        report.created = True
    if revision is not None and revision != "main":
        api.create_branch(repo, branch=revision, exist_ok=True)
    made = _look(api, repo, revision)
    if made is None or made.sha is None:
        raise RemoteError(f"{repo}: was made on the Hub, and cannot be seen there yet: run it again")
    return made


def _existing_card(api: Any, there: _Repository, folder: Path, report: PushReport) -> str | None:
    """The README.md that the card goes into: the folder's, else the repository's."""
    on_hub = None
    if CARD in there.names:
        on_hub = _read_text(Path(api.hf_hub_download(there.repo, CARD, revision=there.sha)))
    if not (folder / CARD).is_file():
        return on_hub
    text = _read_text(folder / CARD)
    if on_hub is not None:
        from dsconv.convert.model_card import SECTION

        lost = (
            {line.strip() for line in SECTION.sub("", on_hub).splitlines()}
            - {line.strip() for line in text.splitlines()}
            - {""}
        )
        if lost:
            report.warnings.append(
                f"the folder's {CARD} replaces the Hub's, of which it lacks {len(lost)} lines; they stay in the"
                " repository's history"
            )
    return text


def _read_text(path: Path) -> str:
    return path.read_bytes().decode(errors="surrogateescape")


@contextlib.contextmanager
def _shelf(files: Iterable[File], card: bytes) -> Iterator[Path]:
    """A folder of links to what goes, and the card: ``upload_folder`` takes a folder, and the user's is not written
    to.
    """
    with tempfile.TemporaryDirectory(prefix="dsconv-push-") as name:
        shelf = Path(name)
        for file in files:
            if file.name != CARD:
                place = shelf / file.name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(file.path.resolve())
        (shelf / CARD).write_bytes(card)
        yield shelf


def _upload(api: Any, there: _Repository, shelf: Path, report: PushReport, create_pr: bool, message: str) -> None:
    names = {row["file"] for row in report.files}
    stems = {match["stem"] for name in names if (match := STALE.fullmatch(name))}
    stale = [name for name in there.names - names
             if name == MANIFEST or ((match := STALE.fullmatch(name)) and match["stem"] in stems)]  # fmt: skip
    digests = {row["file"]: row["sha256"] for row in report.files}
    report.commit, report.url = there.sha, f"{api.endpoint}/{there.repo}/commit/{there.sha}"
    if names <= there.names and not stale and not _differences(api, there.repo, str(there.sha), shelf, digests):
        return
    if create_pr:  # by ourselves: ``upload_folder`` opens another one each time that it is run again
        pull = api.create_pull_request(there.repo, title=message, description="Pushed with dsconv.")
        report.pull_request, report.revision = pull.url, pull.git_reference
        there = _look(api, there.repo, report.revision) or there
    try:
        commit = api.upload_folder(
            repo_id=there.repo,
            folder_path=shelf,
            commit_message=message,
            revision=there.revision,
            parent_commit=there.sha,
            delete_patterns=sorted(stale) or None,  # none of these names has a character that a pattern gives a meaning
        )
        oid = commit.oid
    except Exception as error:
        landed = _landed(api, there, error, shelf, digests)
        if landed is None:
            raise
        oid = landed
    wrong = _differences(api, there.repo, oid, shelf, digests)
    if wrong:
        raise MismatchError(f"{there.repo}: after the push, the Hub's commit {oid} differs: {'; '.join(wrong[:5])}")
    report.commit, report.changed, report.deleted = oid, True, sorted(stale)
    report.url = f"{api.endpoint}/{there.repo}/commit/{oid}"


def _landed(api: Any, there: _Repository, error: Exception, shelf: Path, digests: dict[str, str]) -> str | None:
    """The commit of an upload that failed, if the Hub has all of it: the answer to a commit may be lost on its way.

    The client may have sent the commit again then, and that is refused, since the head has moved.
    """
    if status_of(error) not in (None, *CONFLICTS):
        return None
    try:
        now = _look(api, there.repo, there.revision)
        if now is None or now.sha in (None, there.sha) or _differences(api, there.repo, str(now.sha), shelf, digests):
            return None
    except Exception:  # noqa: BLE001 - the network is still gone, and the first error says so
        return None
    return now.sha


def _differences(api: Any, repo: str, commit: str, shelf: Path, digests: dict[str, str]) -> list[str]:
    """What the Hub has at ``commit`` that is not what is on the shelf: large files by sha256, small ones by git's
    own hash.
    """
    names = list(digests)
    found = {file.path: file for start in range(0, len(names), 500)
             for file in api.get_paths_info(repo, names[start : start + 500], revision=commit)}  # fmt: skip
    wrong = []
    for name in names:
        file = found.get(name)
        if file is None:
            wrong.append(f"{name} is not there (does the repository's .gitignore name it?)")
        elif file.lfs is not None:
            if file.lfs.sha256 != digests[name]:
                wrong.append(f"{name} has the sha256 {file.lfs.sha256} and was {digests[name]} when it was checked")
        elif file.blob_id != _git_hash(shelf / name):
            wrong.append(f"{name} is another file")
    return wrong


def _git_hash(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _message(folder: Path, manifest: dict[str, Any] | None) -> str:
    source = (manifest or {}).get("source", {})
    step = source.get("step")
    return (
        f"Step {step} of a {source.get('format')} checkpoint"
        if isinstance(step, int)
        else f"Push {folder.resolve().name}"
    )


@contextlib.contextmanager
def _one_sentence(report: PushReport) -> Iterator[None]:
    try:
        yield
    except DsconvError:
        raise
    except Exception as error:  # noqa: BLE001 - the client's own, httpx2's, hf_xet's and the system's
        if isinstance(error, OSError) and error.filename and status_of(error) is None:  # of this disk
            raise
        said = explain(report.repo, None if report.revision == "main" else report.revision, error)
        if report.pull_request is not None:
            said = RemoteError(
                f"{said}. The pull request is open: push with --revision {report.revision} to go on with it"
            )
        raise said from None


@contextlib.contextmanager
def _silent_client() -> Iterator[None]:
    """Keep the client's log, which names each request that it tries again, to errors."""
    from huggingface_hub import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
