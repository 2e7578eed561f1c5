"""Build a transformers model under torch's parallelism: tensor-parallel by its plan, with FSDP2 or DDP."""

from __future__ import annotations

import copy
from typing import Any

import torch

from dsconv.engine.models import Source, build
from dsconv.engine.options import RunOptions
from dsconv.errors import InconsistentCheckpointError, UnsupportedError
from dsconv.loaders.stream import stream_into
from dsconv.text import count


def build_replicated(options: RunOptions, source: Source, fresh: bool, device: torch.device) -> Any:
    """Wrap a model that every rank holds whole in DistributedDataParallel."""
    from torch.nn.parallel import DistributedDataParallel

    model = build(source, options.seed, torch.float32, fresh).to(device)
    _checkpoint_activations(model, options)
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def build_sharded(options: RunOptions, source: Source, fresh: bool, device: torch.device) -> Any:
    """Shard a model with tensor parallelism and then, layer by layer, with FSDP2.

    Random weights are drawn whole on every rank, so that they do not depend on the layout. Otherwise the model is built
    on the meta device, and each rank allocates only its own shards, which dsconv's loader or DCP fills. Without
    ``layout.fsdp`` the shards of FSDP2 are whole replicas, whose gradients are averaged.

    Args:
        options: The run.
        source: The model.
        fresh: Whether the run starts from the model's weights.
        device: The device of this rank.

    Raises:
        UnsupportedError: The model's plan cannot shard it.
        InconsistentCheckpointError: The checkpoint lacks weights of the model.
    """
    layout = options.layout
    whole = fresh and source.checkpoint is None
    model = build(source, options.seed, torch.float32, False).to(device) if whole else _on_meta(source)
    mesh = _meshes(model, options, device)
    _checkpoint_activations(model, options)
    _shard(model, mesh, options)
    if not whole:
        model.to_empty(device=device)
        _compute_buffers(model)
        if fresh:
            report = stream_into(model, source.checkpoint, strict=False)  # type: ignore[arg-type]
            lacking = [*report.missing, *report.mismatched]
            if lacking:
                raise InconsistentCheckpointError(
                    f"{options.model} lacks {count(len(lacking), 'tensor')} of the model, the first {lacking[0]}:"
                    f" --backend native starts from all of a model's weights or from none, since {layout.label()}"
                    " cannot draw some of them"
                )
    return model.train()


def _on_meta(source: Source) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(source.config), dtype=torch.float32, attn_implementation="sdpa"
        )


def _meshes(model: Any, options: RunOptions, device: torch.device) -> Any:
    """Shard the model by its tensor-parallel plan and return the mesh for FSDP2, which includes context parallelism."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed import DistributedConfig, initialize_distributed_mesh

    layout = options.layout
    samples = layout.dp * layout.cp
    if layout.tp == 1:
        return init_device_mesh(device.type, (samples,), mesh_dim_names=("fsdp",))
    _check_plan(model, options)
    sizes = {"fsdp_size": samples} if layout.fsdp else {"dp_replicate_size": samples}
    _, manager = initialize_distributed_mesh(DistributedConfig(tp_size=layout.tp, **sizes))
    if manager is None:
        raise UnsupportedError(f"--tp {layout.tp}: transformers made no mesh for {options.model}")
    _untie(model)
    try:
        type(model).maybe_distribute_model(model, DistributedConfig(tp_size=layout.tp), manager)
    except ValueError as error:
        raise UnsupportedError(f"--tp {layout.tp}: transformers cannot shard {options.model}: {error}") from None
    model.tie_weights()
    return manager.get_mesh("fsdp" if layout.fsdp else ("dp_replicate", "fsdp"))


def _untie(model: Any) -> None:
    """Give each module its own parameter, which transformers (5.24 ``apply_tensor_parallelism``) needs to shard it."""
    first = {name for name, _ in model.named_parameters()}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in first:
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, torch.nn.Parameter(parameter.detach(), parameter.requires_grad))


def _check_plan(model: Any, options: RunOptions) -> None:
    """Raise UnsupportedError for what transformers (``distributed/tensor_parallel.py``) shards or sums wrongly."""
    layout, text = options.layout, model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None) or layout.tp
        if heads % layout.tp:
            raise UnsupportedError(f"--tp {layout.tp} does not divide the model's {heads} {name}")
    styles = set((model.tp_plan or {}).values())
    packed = sorted(style for style in styles if style.startswith("packed"))
    if packed:  # torch's DCP cannot save their strided shards
        raise UnsupportedError(
            f"--tp {layout.tp}: the plan of a {model.config.model_type} uses {packed[0]}, whose shards DCP cannot save"
        )
    if "replicated_with_grad_allreduce" in styles and options.accumulation > 1:
        raise UnsupportedError(  # its hook sums the accumulated gradient again after each micro-batch
            f"--tp {layout.tp}: a {model.config.model_type} has norms whose accumulated gradients transformers sums"
            " over the tensor-parallel ranks again after each micro-batch: use --micro-batch"
            f" {options.micro_batch * options.accumulation}"
        )


def _checkpoint_activations(model: Any, options: RunOptions) -> None:
    if options.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _shard(model: Any, mesh: Any, options: RunOptions) -> None:
    """Make one FSDP2 group for each layer and one for the rest. With bf16, shards and sums of gradients stay fp32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy()
    if options.dtype == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    layers = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)


def _compute_buffers(model: Any) -> None:
    """Compute the buffers that no checkpoint holds, after the meta device (transformers
    ``distributed/mixin.py``).
    """
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()
