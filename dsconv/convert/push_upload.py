"""A push's upload: the repository as it is, the commit, and the comparison of what has arrived with what was sent."""

from __future__ import annotations

import contextlib
import hashlib
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dsconv.checkpoint.storage.hub import COMMIT, require_commit
from dsconv.convert.hub_errors import status_of
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.model_card import CARD
from dsconv.convert.push_files import File
from dsconv.errors import MismatchError

# The weights of an earlier push that this one does not replace: from_pretrained may take them for the model's.
STALE = re.compile(r"(?P<stem>model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
CONFLICTS = (409, 412)


@dataclass
class PushReport:
    """What a push did, or with ``dry_run`` would do. Sizes are in bytes.

    Attributes:
        files: [{file, bytes, sha256}], with the card once it is made.
        left_out: files of the folder that are not pushed.
        checked: False where there was no manifest to check against, or no check was wanted.
        changed: False where the Hub had all of the files.
        commit: the commit that holds the files.
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


@dataclass(frozen=True)
class Repository:
    """A repository at a revision: its head (None if the repository has no such branch yet) and the files there."""

    repo: str
    revision: str | None
    sha: str | None
    private: bool
    names: frozenset[str]


def look(api: Any, repo: str, revision: str | None) -> Repository | None:
    """Return the repository as it is, or None if there is none, or none that this token may see."""
    from huggingface_hub import errors

    try:
        info = api.model_info(repo, revision=revision)
    except errors.RevisionNotFoundError:
        if not is_branch(revision):
            raise
        return Repository(repo, revision, None, bool(api.model_info(repo).private), frozenset())
    except errors.RepositoryNotFoundError:
        if revision is not None and not is_branch(revision):
            raise
        return None
    return Repository(
        repo,
        revision,
        require_commit(repo, info.sha),
        bool(info.private),
        frozenset(file.rfilename for file in info.siblings or []),
    )


def is_branch(revision: str | None) -> bool:
    """Return whether ``revision`` can be made: it is neither a commit nor a reference such as that of a pull
    request.
    """
    return revision is not None and not revision.startswith("refs/") and not COMMIT.fullmatch(revision)


@contextlib.contextmanager
def shelf_of(files: Iterable[File], card: bytes) -> Iterator[Path]:
    """Make a folder of links to what is pushed, and the card: ``upload_folder`` takes a folder, and the user's own is
    not written to.
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


def upload(api: Any, there: Repository, shelf: Path, report: PushReport, create_pr: bool, message: str) -> None:
    """Upload what is on the shelf in one commit, or in a pull request, and compare what has arrived.

    ``report`` records the outcome.

    Raises:
        MismatchError: the Hub has something else than was sent.
    """
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
        there = look(api, there.repo, report.revision) or there
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


def _landed(api: Any, there: Repository, error: Exception, shelf: Path, digests: dict[str, str]) -> str | None:
    """Return the commit of an upload that failed, if the Hub has all of it: the answer to a commit may be lost on its
    way.

    The client may have sent the commit again then, and that is refused, since the head has moved.
    """
    if status_of(error) not in (None, *CONFLICTS):
        return None
    try:
        now = look(api, there.repo, there.revision)
        if now is None or now.sha in (None, there.sha) or _differences(api, there.repo, str(now.sha), shelf, digests):
            return None
    except Exception:  # noqa: BLE001 - the network is still gone, and the first error says so
        return None
    return now.sha


def _differences(api: Any, repo: str, commit: str, shelf: Path, digests: dict[str, str]) -> list[str]:
    """Return what the Hub has at ``commit`` that is not what is on the shelf.

    Large files are compared by sha256, small ones by git's own hash.
    """
    names = list(digests)
    found = {file.path: file for start in range(0, len(names), 500)
             for file in api.get_paths_info(repo, names[start : start + 500], revision=commit)}  # fmt: skip
    wrong = []
    for name in names:
        file = found.get(name)
        if file is None:
            wrong.append(f"{name} is missing (does the repository's .gitignore name it?)")
        elif file.lfs is not None:
            if file.lfs.sha256 != digests[name]:
                wrong.append(f"{name} has the sha256 {file.lfs.sha256} and was {digests[name]} when it was checked")
        elif file.blob_id != _git_hash(shelf / name):
            wrong.append(f"{name} is another file")
    return wrong


def _git_hash(path: Path) -> str:
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
