"""What the Hub's client raises while something is pushed, as one sentence that says what to do."""

from __future__ import annotations

from typing import Any

from dsconv.checkpoint.storage.hub import connection
from dsconv.errors import RemoteError

AGAIN = "run it again to go on: what has arrived is not sent again"
MAX_SAID = 300


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that the Hub answered with, or None.

    The client may have wrapped the error (huggingface_hub ``_upload_lfs_files``).
    """
    response = _response(error)
    status = getattr(response, "status_code", None)
    return status if isinstance(status, int) else None


def explain(repo: str, revision: str | None, error: Exception) -> RemoteError:
    """Return the error to raise. The Hub also answers 401 for a repository that is missing, or is another user's."""
    endpoint = connection()["endpoint"] or "https://huggingface.co"
    status, said = status_of(error), _said(error)
    if status == 401:
        why = (
            "the Hub does not accept the token, or gives it no access: set HF_TOKEN to one with write access"
            f" ({endpoint}/settings/tokens)"
        )
    elif status == 403:
        why = (
            "the token may not write there: set HF_TOKEN to one with write access to it, or push with --create-pr"
            f" ({said})"
        )
    elif status == 404:
        at = f" or no revision {revision!r} of it" if revision else ""
        why = f"no such repository{at} on the Hub ({endpoint}), or it is another's and private ({said})"
    elif status in (409, 412):
        why = f"the repository changed while this ran ({said}): see what came in, and run it again"
    elif status == 429:
        why = f"the Hub asks for fewer requests ({said}): wait some minutes, and {AGAIN}"
    elif status is not None and status >= 500:
        why = f"the Hub ({endpoint}) failed with {status} ({said}): {AGAIN}"
    elif status is not None or isinstance(error, ValueError):
        why = f"the Hub refused it{f' ({status})' if status else ''}: {said}"
    else:
        why = f"the Hub ({endpoint}) cannot be reached: {type(error).__name__}: {said}; {AGAIN}"
    return RemoteError(f"{repo}: {why}")


def _response(error: BaseException) -> Any:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        if (response := getattr(current, "response", None)) is not None:
            return response
        current = current.__cause__ or current.__context__
    return None


def _said(error: BaseException) -> str:
    """Return what the server said, else the innermost error's own words.

    It is one line, without addresses: a signature may be in them.
    """
    while error.__cause__ is not None and getattr(error, "response", None) is None:
        error = error.__cause__
    words = str(getattr(error, "server_message", None) or error).split()
    shown = " ".join(word for word in words if "://" not in word)[:MAX_SAID].rstrip(".:")
    return shown or type(error).__name__
