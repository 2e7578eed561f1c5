"""DeepSpeed configs to start from, with a reason for every key. The tests run each but the NVMe one.

"auto" is filled by transformers' Trainer, or by ``DSConfig.resolved``. Sizes count elements, not bytes.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """A config as rows of (dotted key, value, reason), in the order in which it is written."""

    name: str
    summary: str
    rows: tuple[tuple[str, Any, str], ...]

    @property
    def config(self) -> dict[str, Any]:
        """The config as a new dict."""
        config: dict[str, Any] = {}
        for key, value, _ in self.rows:
            *sections, name = key.split(".")
            node = config
            for section in sections:
                node = node.setdefault(section, {})
            node[name] = copy.deepcopy(value)
        return config

    @property
    def comments(self) -> dict[str, str]:
        """The reason for each key."""
        return {key: why for key, _, why in self.rows}


_BATCH = (
    ("train_micro_batch_size_per_gpu", "auto", "samples per forward pass on one rank, as many as memory allows"),
    ("gradient_accumulation_steps", "auto", "micro-batches per step"),
    ("train_batch_size", "auto", "micro-batch × accumulation × ranks; DeepSpeed refuses any other number"),
)
_TRAINING = (
    ("bf16.enabled", "auto", "half the memory of fp32 and no loss scaling; on GPUs without bf16 (V100, T4) use fp16"),
    ("optimizer.type", "AdamW", "DeepSpeed's own: fused on the GPU, DeepSpeedCPUAdam if the optimizer is offloaded"),
    ("optimizer.params.lr", "auto", "the learning rate"),
    ("optimizer.params.betas", "auto", "Adam's decay rates"),
    ("optimizer.params.eps", "auto", "Adam's epsilon"),
    ("optimizer.params.weight_decay", "auto", "decoupled weight decay"),
    ("scheduler.type", "WarmupDecayLR", "linear up, then linear down to 0, like the Trainer's default schedule"),
    ("scheduler.params.warmup_min_lr", 0, "from 0"),
    ("scheduler.params.warmup_max_lr", "auto", "the peak learning rate; keep it equal to optimizer.params.lr"),
    ("scheduler.params.warmup_num_steps", "auto", "steps of warm-up; DeepSpeed takes at least 2"),
    ("scheduler.params.warmup_type", "linear", "DeepSpeed's default is log, which no other trainer has"),
    ("scheduler.params.total_num_steps", "auto", "all steps; WarmupDecayLR does not start without it"),
    ("gradient_clipping", "auto", "DeepSpeed 0.19 clips at 1.0 if this is left out; 0 turns clipping off"),
)
_COMMON = (*_BATCH, *_TRAINING)
_STAGE1 = ("zero_optimization.stage", 1, "optimizer states are partitioned: 12 bytes per parameter become 12 / ranks")
_STAGE2 = (
    "zero_optimization.stage",
    2,
    "optimizer states and gradients are partitioned; parameters are whole on each rank",
)
_STAGE3 = (
    "zero_optimization.stage",
    3,
    "parameters are partitioned too, and gathered layer by layer, for models that fit in no other way",
)
_OVERLAP = (
    "zero_optimization.overlap_comm",
    True,
    "reduce gradients during the backward pass; costs a second bucket",
)
_BUCKET2 = (
    "zero_optimization.reduce_bucket_size",
    200_000_000,
    "elements reduced at once; smaller saves memory, larger saves calls",
)
_GATHER2 = ("zero_optimization.allgather_bucket_size", 200_000_000, "elements of updated parameters sent at once")
_CONTIGUOUS = (
    "zero_optimization.contiguous_gradients",
    True,
    "one buffer for gradients: no fragmentation in the backward pass",
)
_BUCKETS3 = (
    ("zero_optimization.reduce_bucket_size", "auto", "hidden_size²: the gradients of one matrix"),
    (
        "zero_optimization.stage3_prefetch_bucket_size",
        "auto",
        "0.9 × hidden_size²: the parameters that are fetched ahead of use",
    ),
    (
        "zero_optimization.stage3_param_persistence_threshold",
        "auto",
        "10 × hidden_size: norms and biases stay whole, since they are not worth a gather",
    ),
)
_SAVE16 = (
    "zero_optimization.stage3_gather_16bit_weights_on_model_save",
    False,
    (
        "true makes save_model gather all weights in rank 0's memory; dsconv zero-to-fp32 merges the checkpoint"
        " afterwards without that"
    ),
)
_OPTIMIZER_CPU = (
    (
        "zero_optimization.offload_optimizer.device",
        "cpu",
        "optimizer states and their step move to the host: 12 bytes per parameter / ranks of GPU memory",
    ),
    (
        "zero_optimization.offload_optimizer.pin_memory",
        True,
        "page-locked, for full speed; use false if ulimit -l or memory is short",
    ),
)
_PARAMETERS_CPU = (
    (
        "zero_optimization.offload_param.device",
        "cpu",
        "parameters wait on the host too, and come to the GPU layer by layer",
    ),
    ("zero_optimization.offload_param.pin_memory", True, "page-locked, as above"),
)

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "zero1",
            "For models of which only Adam's states do not fit. Needs the least communication; works with pipelines.",
            (
                *_COMMON,
                _STAGE1,
                _BUCKET2,
                _GATHER2,
            ),
        ),
        Recipe(
            "zero2",
            "The usual choice while parameters fit on each GPU.",
            (
                *_COMMON,
                _STAGE2,
                _OVERLAP,
                _CONTIGUOUS,
                _BUCKET2,
                _GATHER2,
            ),
        ),
        Recipe(
            "zero2-offload-cpu",
            "zero2 with the optimizer on the host, for one or a few GPUs.",
            (
                *_COMMON,
                _STAGE2,
                *_OPTIMIZER_CPU,
                _OVERLAP,
                _CONTIGUOUS,
                _BUCKET2,
                _GATHER2,
            ),
        ),
        Recipe(
            "zero3",
            "For models whose parameters do not fit on one GPU, but on all of them together.",
            (
                *_COMMON,
                _STAGE3,
                _OVERLAP,
                _CONTIGUOUS,
                *_BUCKETS3,
                _SAVE16,
            ),
        ),
        Recipe(
            "zero3-offload-cpu",
            "zero3 with optimizer and parameters on the host: slow, but the model may be as large as host memory.",
            (
                *_COMMON,
                _STAGE3,
                *_OPTIMIZER_CPU,
                *_PARAMETERS_CPU,
                _OVERLAP,
                _CONTIGUOUS,
                *_BUCKETS3,
                _SAVE16,
            ),
        ),
        Recipe(
            "zero3-nvme",
            "zero3 with optimizer and parameters on NVMe. It needs libaio and a compiler, and the tests do not run it.",
            (
                *_COMMON,
                _STAGE3,
                (
                    "zero_optimization.offload_optimizer.device",
                    "nvme",
                    "on disk; DeepSpeed 0.19.8 cannot resume such a run, so write cpu if you need to",
                ),
                (
                    "zero_optimization.offload_optimizer.nvme_path",
                    "/local_nvme",
                    "a folder on a local disk of each node; change it",
                ),
                (
                    "zero_optimization.offload_optimizer.buffer_count",
                    5,
                    "at least the number of optimizer states: Adam has 4 with gradients",
                ),
                (
                    "zero_optimization.offload_optimizer.pipeline_read",
                    True,
                    "read the next tile while this one is stepped",
                ),
                (
                    "zero_optimization.offload_optimizer.pipeline_write",
                    True,
                    "write the last tile while this one is stepped",
                ),
                ("zero_optimization.offload_optimizer.pin_memory", True, "page-locked, for full speed"),
                ("zero_optimization.offload_param.device", "nvme", "parameters on disk too"),
                ("zero_optimization.offload_param.nvme_path", "/local_nvme", "as above"),
                (
                    "zero_optimization.offload_param.buffer_size",
                    100_000_000,
                    "elements; at least the largest parameter / ranks",
                ),
                (
                    "zero_optimization.offload_param.max_in_cpu",
                    1_000_000_000,
                    "parameter elements that stay in host memory",
                ),
                ("zero_optimization.offload_param.pin_memory", True, "page-locked, for full speed"),
                (
                    "zero_optimization.sub_group_size",
                    1_000_000_000,
                    "elements updated at a time; lower it if the step runs out of host memory",
                ),
                _OVERLAP,
                _CONTIGUOUS,
                *_BUCKETS3,
                _SAVE16,
                ("aio.block_size", 1_048_576, "bytes per request; measure yours with ds_nvme_tune"),
                ("aio.queue_depth", 8, "requests in flight"),
                ("aio.intra_op_parallelism", 1, "threads per request"),
                ("aio.single_submit", False, "submit requests together"),
                ("aio.overlap_events", True, "collect finished requests while submitting"),
            ),
        ),
        Recipe(
            "long-context",
            "For long sequences, whose activations fill the memory. Use it with gradient checkpointing.",
            (
                *_COMMON,
                _STAGE3,
                *_OPTIMIZER_CPU,
                ("zero_optimization.overlap_comm", False, "its buffers are worth more as activations"),
                _CONTIGUOUS,
                *_BUCKETS3,
                (
                    "zero_optimization.stage3_max_live_parameters",
                    100_000_000,
                    "parameters that are whole at a time: a layer or two, not 1e9",
                ),
                (
                    "zero_optimization.stage3_max_reuse_distance",
                    100_000_000,
                    "release parameters between forward and backward",
                ),
                _SAVE16,
                (
                    "seq_parallel_communication_data_type",
                    "bf16",
                    "for Ulysses, ParallelismConfig(sp_backend='deepspeed'); the default is fp32",
                ),
                (
                    "activation_checkpointing.partition_activations",
                    True,
                    "only for deepspeed.checkpointing, as Megatron uses it",
                ),
                (
                    "activation_checkpointing.cpu_checkpointing",
                    True,
                    "as above; elsewhere use gradient_checkpointing=True",
                ),
            ),
        ),
    )
}
