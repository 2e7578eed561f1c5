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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dsconv.checkpoint.storage.hub import REPO, TRUE, connection
from dsconv.checkpoint.storage.local import is_remote, read_small
from dsconv.checkpoint.transfer.copy import default_workers
from dsconv.convert.hub_errors import explain, status_of
from dsconv.convert.manifest import MANIFEST
from dsconv.convert.model_card import CARD, make_card, section_of
from dsconv.convert.progress import Progress
from dsconv.convert.push_files import check_and_hash, check_names, files_of, open_model, read_manifest
from dsconv.convert.push_upload import PushReport, Repository, look, shelf_of, upload
from dsconv.errors import DsconvError, OutputError, RemoteError, UnsafeError, require_packages
from dsconv.text import count
from dsconv.urls import local_path


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
    """Push a folder of safetensors to the model repository ``repo``, which is made if need be.

    Args:
        folder: must be what its manifest says, unless ``check`` is False: files, sizes, and the CRC-32 of each tensor.
        repo: ``org/model``.
        private: make the repository a private one, and refuse one that is there and public.
        revision: a branch, which is made if need be (default: main).
        create_pr: open a pull request instead of writing to the branch.
        commit_message: that of the commit (default: says where the model came from).
        check: compare the folder with its manifest.
        dry_run: push nothing, and report what would be pushed.
        workers: the number of threads that read files (default: one per core, at most 8).
        progress: called with (phase, bytes done, bytes in all), from any thread.

    Raises:
        DsconvError: CheckpointNotFoundError or MalformedError where the folder holds no model; MismatchError where it
            is not what its manifest says, or what arrived is not what was sent; UnsafeError for a link out of the
            folder, and where ``private`` was asked for and the repository is public; RemoteError where the Hub or the
            network fails; MissingPackageError where huggingface_hub is not installed.
        ValueError: ``repo`` is not written as a repository is, or ``create_pr`` is given with a ``revision``.
    """
    check_repo(repo)
    if create_pr and revision is not None:
        raise ValueError("a pull request is made against the main branch: leave out the revision, or create_pr")
    root = local_path(folder, "the folder that is pushed")
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
        there = look(api, repo, revision)
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
        with shelf_of(files, data) as shelf:
            upload(api, there, shelf, report, create_pr, commit_message or _message(root, manifest))
    return report


def prepare(repo: str, output: Path) -> None:
    """Find out before a merge what would stop its push.

    Raises:
        OutputError: The output is not on this disk.
        MissingPackageError: huggingface_hub is not installed.
        RemoteError: The Hub must not be used, or there is no token.
    """
    check_repo(repo)
    if is_remote(output):
        raise OutputError(f"{output}: --push-to-hub pushes what lies on this disk; merge to a folder here")
    open_api(repo)


def push_merged(output: Path, repo: str, private: bool, progress: Progress | None) -> dict[str, Any]:
    """Push what a merge has put into place. Where the Hub fails, the error says that the merge did not."""
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
    """Return the Hub's client.

    Raises:
        MissingPackageError: huggingface_hub is not installed.
        RemoteError: the Hub must not be used (HF_HUB_OFFLINE), or there is no token.
    """
    require_packages("pushing to the Hub", "hub", "huggingface_hub")
    import huggingface_hub

    if os.environ.get("HF_HUB_OFFLINE", "").lower() in TRUE:
        raise RemoteError(f"{repo}: HF_HUB_OFFLINE is set, and a push needs the Hub: unset it")
    given = connection()
    token = given["token"] or huggingface_hub.get_token()
    if not token:
        raise RemoteError(f"{repo}: there is no token to write with: set HF_TOKEN, or log in with: hf auth login")
    return huggingface_hub.HfApi(endpoint=given["endpoint"], token=token, library_name="dsconv")


def _require_private(there: Repository | None, private: bool) -> None:
    if private and there is not None and not there.private:
        raise UnsafeError(
            f"{there.repo} already exists and is public: make it private in its settings on the Hub, or leave out"
            " --private"
        )


def _make(
    api: Any, repo: str, revision: str | None, private: bool, there: Repository | None, report: PushReport
) -> Repository:
    """Make the repository, or its branch, or both, and look at it."""
    if there is None:
        api.create_repo(repo, private=private or None, repo_type="model", exist_ok=True)
        report.created = True
    if revision is not None and revision != "main":
        api.create_branch(repo, branch=revision, exist_ok=True)
    made = look(api, repo, revision)
    if made is None or made.sha is None:
        raise RemoteError(f"{repo}: was created on the Hub, but cannot be seen there yet: run it again")
    return made


def _existing_card(api: Any, there: Repository, folder: Path, report: PushReport) -> str | None:
    """Return the README.md that the card goes into: the folder's, else the repository's."""
    on_hub = None
    if CARD in there.names:
        on_hub = _read_text(Path(api.hf_hub_download(there.repo, CARD, revision=there.sha)))
    if not (folder / CARD).is_file():
        return on_hub
    text = _read_text(folder / CARD)
    if on_hub is not None:
        place = section_of(on_hub) or (0, 0)
        lost = (
            {line.strip() for line in (on_hub[: place[0]] + on_hub[place[1] :]).splitlines()}
            - {line.strip() for line in text.splitlines()}
            - {""}
        )
        if lost:
            report.warnings.append(
                f"the folder's {CARD} replaces the Hub's, of which it lacks {count(len(lost), 'line')}; they stay in"
                " the repository's history"
            )
    return text


def _read_text(path: Path) -> str:
    return read_small(path).decode(errors="surrogateescape")


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
