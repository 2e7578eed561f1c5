"""What the server that forks the ranks imports once for all of them."""

from __future__ import annotations

import contextlib


def _warm() -> None:
    import dsconv.engine.worker  # noqa: F401

    with contextlib.suppress(ImportError):  # the native backend needs no DeepSpeed
        import deepspeed  # noqa: F401
    with contextlib.suppress(ImportError):
        from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401


_warm()
