"""What the server that forks the ranks imports once for all of them."""

import contextlib
import signal

# A scheduler signals every process of a job. The server that forks must outlive the ranks, and a rank that has not yet
# set its own handler must not die of it: the run's own process tells the ranks to stop.
signal.signal(signal.SIGTERM, signal.SIG_IGN)

import torch  # noqa: E402, F401

with contextlib.suppress(ImportError):  # the native backend needs no DeepSpeed
    import deepspeed  # noqa: F401
with contextlib.suppress(ImportError):
    import transformers.models.auto.modeling_auto  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoConfig  # noqa: F401

import dsconv.engine.worker  # noqa: E402, F401
