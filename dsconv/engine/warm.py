"""What the server that forks the ranks imports once for all of them."""

import contextlib

import torch  # noqa: F401

with contextlib.suppress(ImportError):  # the native backend needs no DeepSpeed
    import deepspeed  # noqa: F401
with contextlib.suppress(ImportError):
    import transformers.models.auto.modeling_auto  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: F401

import dsconv.engine.worker  # noqa: F401
