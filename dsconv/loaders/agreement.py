"""All ranks of a load end together: if one fails, all raise an error that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from dsconv.errors import InconsistentCheckpointError, RankFailedError
from dsconv.loaders.fingerprint import Fingerprint, differences
from dsconv.text import count


@dataclass
class Agreement:
    """What a rank tells the others at the end, besides its error: ``fingerprint``, which must be that of all ranks."""

    fingerprint: Fingerprint = field(default_factory=dict)


@contextmanager
def agreement(what: str) -> Iterator[Agreement]:
    """Run the body on every rank, then exchange the outcomes.

    A rank that failed raises its own error, and the others raise RankFailedError with its message. If a rank died, the
    exchange itself fails with torch's error: within seconds on gloo, after the timeout on NCCL.

    Args:
        what: The name of the operation, for the message.

    Raises:
        RankFailedError: Another rank failed.
        InconsistentCheckpointError: The ranks left different fingerprints. All ranks raise it.
    """
    import torch.distributed as dist

    told = Agreement()
    error: BaseException | None = None
    try:
        yield told
    except Exception as caught:  # noqa: BLE001 - raised again after the exchange
        error = caught
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        outcomes: list[tuple[str | None, Fingerprint]] = [(None, {})] * dist.get_world_size()
        message = None if error is None else f"{type(error).__name__}: {error}"
        dist.all_gather_object(outcomes, (message, told.fingerprint))
        failed = {rank: message for rank, (message, _) in enumerate(outcomes) if message is not None}
        if failed and error is None:
            rank, message = next(iter(failed.items()))
            raise RankFailedError(f"{what}: rank {rank} failed{_others(failed)}: {message}")
        found = "" if failed else differences([fingerprint for _, fingerprint in outcomes])
        if found:
            raise InconsistentCheckpointError(
                f"{what}: the ranks do not read copies of one checkpoint: {found}. Copy it to all nodes again, or read"
                " it from a folder that they share"
            )
    if error is not None:
        raise error


def _others(failed: dict[int, str]) -> str:
    return f" ({count(len(failed), 'rank')} failed)" if len(failed) > 1 else ""
