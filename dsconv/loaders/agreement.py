"""All ranks of a load end together: if one fails, all raise an error that names it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dsconv.errors import RankFailedError


@contextmanager
def agreement(what: str) -> Iterator[None]:
    """Run the body on every rank, then exchange the outcomes.

    A rank that failed raises its own error, and the others raise RankFailedError with its message. If a rank died, the
    exchange itself fails with torch's error: within seconds on gloo, after the timeout on NCCL.

    Args:
        what: The name of the operation, for the message.

    Raises:
        RankFailedError: Another rank failed.
    """
    import torch.distributed as dist

    error: BaseException | None = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 - raised again after the exchange
        error = caught
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        messages: list[str | None] = [None] * dist.get_world_size()
        dist.all_gather_object(messages, None if error is None else f"{type(error).__name__}: {error}")
        failed = {rank: message for rank, message in enumerate(messages) if message is not None}
        if failed and error is None:
            rank, message = next(iter(failed.items()))
            raise RankFailedError(f"{what}: rank {rank} failed{_others(failed)}: {message}")
    if error is not None:
        raise error


def _others(failed: dict[int, str]) -> str:
    return f" ({len(failed)} ranks failed)" if len(failed) > 1 else ""
