"""Compute what training with ZeRO holds in memory and writes to disk.

Three figures answer different questions. ``ideal_bytes`` is the ZeRO paper's (arXiv 1910.02054, section 3).
``deepspeed_figure`` is what DeepSpeed's own estimators print. ``held`` is what DeepSpeed allocates for a
transformer under AdamW, as read in ``runtime/zero/{stage_1_and_2,stage3,bf16_optimizer}.py`` and
``runtime/fp16/unfused_optimizer.py`` and counted on real engines. All sizes are bytes of one rank unless the name says
otherwise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from dsconv.zero_utils.activations import Decoder, activation_bytes
from dsconv.zero_utils.partition import group_numel, overlapping_numel, share_numel

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
ADAM_BYTES = 8  # exp_avg and exp_avg_sq, fp32
MASTER_BYTES = 4
OFFLOADS = ("none", "cpu", "nvme")
# runtime/zero/offload_config.py, DeepSpeed: buffers that swapping to NVMe keeps in CPU memory.
NVME_PARAM_BUFFERS, NVME_PARAM_BUFFER_NUMEL, NVME_OPTIMIZER_BUFFERS = 5, 100_000_000, 4


@dataclass(frozen=True)
class ModelSizes:
    """The sizes of a model.

    Attributes:
        name: The model's name.
        parameters: (elements, whether AutoTP shards it) of each parameter in the model's order, tied ones once.
        largest_layer_numel: The most elements that a single module holds itself.
        decoder: The shape from which activations follow; None if the configuration is not a decoder's.
    """

    name: str
    parameters: tuple[tuple[int, bool], ...]
    largest_layer_numel: int
    decoder: Decoder | None

    @property
    def numel(self) -> int:
        """The number of elements of all parameters."""
        return sum(numel for numel, _ in self.parameters)

    def of_tp_rank(self, tp: int) -> list[int]:
        """Return the elements of each parameter on the tensor-parallel rank that holds the most."""
        return [share_numel(numel, tp) if cut else numel for numel, cut in self.parameters]


@dataclass(frozen=True)
class Job:
    """The hardware, the batch, and the sizes of ``zero_optimization``.

    The defaults of the sizes are DeepSpeed's (runtime/zero/config.py). ``fp32_grads`` means that
    ``data_types.grad_accum_dtype`` is fp32; ``accumulation`` counts micro-batches per step.
    """

    nproc: int = 8  # ranks per node, one GPU each
    nodes: int = 1
    dtype: str = "bf16"
    fp32_grads: bool = False
    seq_len: int = 4096
    micro_batch: int = 1
    accumulation: int = 1
    reduce_bucket_numel: int = 500_000_000
    persistence_numel: int = 100_000
    live_numel: int = 1_000_000_000
    sub_group_numel: int = 1_000_000_000

    @property
    def world(self) -> int:
        """The number of ranks."""
        return self.nproc * self.nodes


@dataclass(frozen=True)
class Setting:
    """A way to train. ``offload`` moves the optimizer, and at stage 3 the parameters too."""

    stage: int
    offload: str = "none"
    tp: int = 1
    checkpointing: bool = False

    @property
    def cost(self) -> tuple[int, int, bool, int]:
        """A key that orders settings, the cheapest first.

        It prefers no offload to CPU to NVMe, then less TP, then no recomputation, then the lower stage. Stages 0 to 2
        send 2Ψ a step and stage 3 sends 3Ψ (ZeRO paper, section 7); recomputing costs another forward, a third more
        arithmetic; TP puts collectives into every layer; offload puts the bus, then the disk, into every step.
        """
        return OFFLOADS.index(self.offload), self.tp, self.checkpointing, self.stage

    def __str__(self) -> str:
        parts = [
            f"ZeRO-{self.stage}",
            f"TP {self.tp}" * (self.tp > 1),
            f"offload to {self.offload}" * (self.offload != "none"),
        ]
        return ", ".join(part for part in [*parts, "activation checkpointing" * self.checkpointing] if part)


@dataclass(frozen=True)
class Held:
    """Bytes of one rank, by what holds them.

    ``buffers`` are communication buckets and parameters that are gathered for a moment. ``step`` is what the
    optimizer's step adds; activations are freed by then, so the peak counts the larger of both."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int
    step: int
    activations: int = 0
    cpu: int = 0
    nvme: int = 0

    @property
    def peak(self) -> int:
        """The most bytes of the GPU at any moment."""
        return self.parameters + self.optimizer + max(self.gradients + self.buffers + self.activations, self.step)


def settings(job: Job, tps: tuple[int, ...] = (1,)) -> list[Setting]:
    """Return every setting that DeepSpeed can run, the cheapest first.

    NVMe needs stage 3. Without ZeRO, gradients accumulate in the model's dtype only (runtime/engine.py
    ``_do_optimizer_sanity_check``).
    """
    pairs = [(0, "none"), *((stage, offload) for stage in (1, 2, 3) for offload in ("none", "cpu")), (3, "nvme")]
    if job.fp32_grads and job.dtype != "fp32":
        pairs.remove((0, "none"))
    found = [Setting(stage, offload, tp, again) for stage, offload in pairs for tp in tps for again in (False, True)]
    return sorted(found, key=lambda setting: setting.cost)


def ideal_bytes(model: ModelSizes, job: Job, setting: Setting) -> int:
    """Return the model states of a rank, wherever they are kept: 2Ψ + 2Ψ + 12Ψ in 16 bits, 4Ψ + 4Ψ + 8Ψ in fp32.

    Stage 1 divides the optimizer's by the data-parallel degree, stage 2 the gradients too, stage 3 all; TP divides Ψ.
    """
    item = ITEM_BYTES[job.dtype]
    psi, dp = model.numel / setting.tp, job.world // setting.tp
    states = (item, 4 if job.fp32_grads else item, ADAM_BYTES + (MASTER_BYTES if item == 2 else 0))
    sharded_from = (3, 2, 1)
    return round(
        sum(
            psi * nbytes / (dp if setting.stage >= first else 1)
            for nbytes, first in zip(states, sharded_from, strict=True)
        )
    )


def deepspeed_figure(model: ModelSizes, job: Job, setting: Setting) -> tuple[int, int] | None:
    """Return (bytes of a GPU, bytes of a node's CPU) as DeepSpeed estimates; None if it has no estimator.

    ``estimate_zero2_model_states_mem_needs`` of runtime/zero/stage_1_and_2.py and
    ``estimate_zero3_model_states_mem_needs`` of stage3.py (with zero.Init). They assume 16-bit training, know
    neither TP nor NVMe, and leave out activations and buckets.
    """
    if setting.stage < 2 or setting.tp > 1 or setting.offload == "nvme":
        return None
    psi, world = model.numel, job.world
    factor = 1.5  # their additional_buffer_factor
    if setting.stage == 2:
        if setting.offload == "cpu":
            return 2 * psi, int(psi * max(4 * world, 16) * factor)
        return 2 * psi + int(18 * psi / world), int(psi * 4 * job.nproc * factor)
    largest = 4 * model.largest_layer_numel
    if setting.offload == "cpu":
        return largest, int(psi * 18 * (1 / job.nodes) * factor)
    return largest + int(18 * psi / world), int(model.largest_layer_numel * 4 * job.nproc * factor)


def held(model: ModelSizes, job: Job, setting: Setting) -> Held:
    """Return what DeepSpeed allocates on the rank that holds the most.

    The model's buffers, CUDA's context, workspaces and fragmentation are not counted.
    """
    rule = _stage0 if setting.stage == 0 else _stage3 if setting.stage == 3 else _stage12
    states = rule(model.of_tp_rank(setting.tp), job, setting)
    if model.decoder is None:
        return states
    shape = (job.micro_batch, job.seq_len, ITEM_BYTES[job.dtype], setting.tp, setting.checkpointing)
    return replace(states, activations=activation_bytes(model.decoder, *shape))


def _stage0(numels: list[int], job: Job, setting: Setting) -> Held:
    """Count FP16_UnfusedOptimizer: a master of each parameter, and at the step an fp32 gradient beside the 16-bit
    one.
    """
    item, psi = ITEM_BYTES[job.dtype], sum(numels)
    low = item == 2
    optimizer = psi * (ADAM_BYTES + MASTER_BYTES * low)
    return Held(psi * item, psi * item, optimizer, 0, psi * (item + 4 * low))


def _stage12(numels: list[int], job: Job, setting: Setting) -> Held:
    """Count one flat, padded group; even fp32 parameters have fp32 masters.

    Stage 1 keeps whole gradients until backward has ended. Stage 2 keeps those of every parameter that reaches into the
    partition (``grads_in_partition``), a second time while it accumulates, and in fp32 the partition once. The step
    makes fp32 gradients of the partition after the 16-bit ones are freed. With offload, the CPU also has fp32
    gradients, a 16-bit copy of the partition and a buffer for the largest parameter, and the GPU has such a buffer too.
    """
    item, dp = ITEM_BYTES[job.dtype], job.world // setting.tp
    padded = group_numel(sum(numels), dp)
    share, psi, largest = padded // dp, sum(numels), max(numels, default=0)
    reaching = overlapping_numel(numels, share)
    optimizer = share * (ADAM_BYTES + MASTER_BYTES)
    fp32_grads = job.fp32_grads and item == 2
    bucket = job.reduce_bucket_numel * item
    if setting.offload == "none" and setting.stage == 1 and fp32_grads:  # BF16_Optimizer: fp32 gradients, no bucket
        return Held(padded * item, padded * 4 + psi * item, optimizer, 0, padded * 4 + psi * item)
    accumulating = job.accumulation > 1
    if setting.offload == "none":
        stage2 = share * 4 if fp32_grads else reaching * item * (2 if accumulating else 1)
        return Held(padded * item, psi * item if setting.stage == 1 else stage2, optimizer, bucket, share * 4)
    cpu = optimizer + share * (4 + item) + largest * item
    if setting.stage == 2 and accumulating:
        cpu += reaching * item
    gradients = psi * item if setting.stage == 1 else 0
    return Held(padded * item, gradients, 0, bucket + largest * item, largest * item, cpu=cpu)


def _stage3(numels: list[int], job: Job, setting: Setting) -> Held:
    """Count parameters that are sharded into ceil(numel / ranks) each.

    Those up to the threshold also stay whole, and others do for a while. The bucket and the gradients' flat buffer are
    allocated at the start; the step makes fp32 gradients of one sub-group
    at a time. What is gathered at a moment is bounded by the larger of ``stage3_max_live_parameters``
    and the largest parameter.
    """
    item, dp = ITEM_BYTES[job.dtype], job.world // setting.tp
    share, psi = sum(share_numel(numel, dp) for numel in numels), sum(numels)
    persistent = sum(numel for numel in numels if numel <= job.persistence_numel)
    gathered = 0 if dp == 1 else max(persistent, min(psi, max(job.live_numel, max(numels, default=0) + persistent)))
    grads = share * (4 if job.fp32_grads else item)
    optimizer, sub_group = share * (ADAM_BYTES + MASTER_BYTES), min(share, job.sub_group_numel)
    bucket = job.reduce_bucket_numel * item
    if setting.offload == "none":
        return Held(share * item, grads, optimizer, bucket + gathered * item, grads + bucket + sub_group * 4)
    if setting.offload == "cpu":
        return Held(0, 0, 0, bucket + gathered * item, bucket, cpu=share * item + grads + optimizer + share * 4)
    swapping = NVME_PARAM_BUFFERS * NVME_PARAM_BUFFER_NUMEL * item + NVME_OPTIMIZER_BUFFERS * sub_group * 4
    return Held(
        0, 0, 0, bucket + gathered * item, bucket, cpu=grads + swapping, nvme=share * item + optimizer + share * 4
    )


def checkpoint_bytes(model: ModelSizes, job: Job, setting: Setting) -> int:
    """Return the bytes of tensors that ``save_checkpoint`` writes on all ranks together.

    Pickles and zip directories add kilobytes to each file. Stages 0 to 2 write the weights in the model's dtype once
    per TP rank, stage 3 never. Masters and Adam's states are always written once; in fp32 without ZeRO the weights are
    the masters.
    """
    item, dp = ITEM_BYTES[job.dtype], job.world // setting.tp
    numels = model.of_tp_rank(setting.tp)
    psi = sum(numels)
    masters = ADAM_BYTES + MASTER_BYTES
    if setting.stage == 0:
        each = psi * (item + ADAM_BYTES + (MASTER_BYTES if item == 2 else 0))
    elif setting.stage == 3:
        each = sum(share_numel(numel, dp) for numel in numels) * dp * masters
    else:
        each = psi * (item + masters)
    return each * setting.tp
