"""A transformers model under torch's own parallelism: tensor-parallel by its plan, FSDP2 or DDP over the
data-parallel ranks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from dsconv.engine.models import Source, build
from dsconv.engine.options import RunOptions
from dsconv.errors import InconsistentCheckpointError, UnsupportedError
from dsconv.loaders.stream import stream_into


def build_replicated(options: RunOptions, source: Source, fresh: bool, device: torch.device) -> Any:
    """DistributedDataParallel of a model that every rank has whole."""
    from torch.nn.parallel import DistributedDataParallel

    model = build(source, options.seed, torch.float32, fresh).to(device)
    _checkpoint_activations(model, options)
    return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


def build_sharded(options: RunOptions, source: Source, fresh: bool, device: torch.device) -> Any:
    """FSDP2, by layers, of what tensor parallelism leaves of the model on this rank; ``fresh``: with its first weights.

    Weights that are drawn are drawn whole on every rank, so that they do not depend on the layout. Else the model is
    made on the meta device, and each rank has memory for its own shards only, which dsconv's loader or DCP fills.
    Without ``layout.fsdp`` FSDP2's shards are whole: replicas, with their gradients averaged. Raises UnsupportedError
    for a model that its plan does not cut, InconsistentCheckpointError for a checkpoint without all of the weights.
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
                    f"{options.model} lacks {len(lacking)} tensors that the model has, the first {lacking[0]}:"
                    f" --backend native starts from all of a model's weights, or from none. {layout.label()} cannot"
                    " draw a part of them"
                )
    return model.train()


def _on_meta(source: Source) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(source.config), dtype=torch.float32, attn_implementation="sdpa"
        )


def _meshes(model: Any, options: RunOptions, device: torch.device) -> Any:
    """Cut the model by its tensor-parallel plan; the mesh that is left for FSDP2, with context parallelism folded
    in.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed import DistributedConfig, initialize_distributed_mesh

    layout = options.layout
    samples = layout.dp * layout.cp
    if layout.tp == 1:
        return init_device_mesh(device.type, (samples,), mesh_dim_names=("fsdp",))
    _check_plan(model, options)
    sizes = {"fsdp_size": samples} if layout.fsdp else {"dp_replicate_size": samples}
    _, manager = initialize_distributed_mesh(DistributedConfig(tp_size=layout.tp, **sizes))
    assert manager is not None
    _untie(model)
    try:
        type(model).maybe_distribute_model(model, DistributedConfig(tp_size=layout.tp), manager)
    except ValueError as error:
        raise UnsupportedError(f"--tp {layout.tp}: transformers cannot cut {options.model}: {error}") from None
    model.tie_weights()
    return manager.get_mesh("fsdp" if layout.fsdp else ("dp_replicate", "fsdp"))


def _untie(model: Any) -> None:
    """Give each module a parameter of its own, as transformers (5.24 ``apply_tensor_parallelism``) wants it to cut
    them.
    """
    first = {name for name, _ in model.named_parameters()}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if name not in first:
            module, _, own = name.rpartition(".")
            setattr(model.get_submodule(module), own, torch.nn.Parameter(parameter.detach(), parameter.requires_grad))


def _check_plan(model: Any, options: RunOptions) -> None:
    """Raise UnsupportedError for what transformers 5.24 (``distributed/tensor_parallel.py``) cuts or sums up
    wrongly.
    """
    layout, text = options.layout, model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(text, name, None) or layout.tp
        if heads % layout.tp:
            raise UnsupportedError(f"--tp {layout.tp} does not divide the model's {heads} {name}")
    styles = set((model.tp_plan or {}).values())
    packed = sorted(style for style in styles if style.startswith("packed"))
    if packed:  # their shards are no boxes (_StridedShard), which torch 2.13's DCP cannot save
        raise UnsupportedError(
            f"--tp {layout.tp}: the plan of a {model.config.model_type} is {packed[0]}, whose shards DCP cannot save"
        )
    if "replicated_with_grad_allreduce" in styles and options.accumulation > 1:
        raise UnsupportedError(  # its hook sums up the gradient so far again after each micro-batch
            f"--tp {layout.tp}: a {model.config.model_type} has norms whose gradients transformers sums over the"
            " tensor-parallel ranks after each micro-batch, those before included: take --micro-batch"
            f" {options.micro_batch * options.accumulation}"
        )


def _checkpoint_activations(model: Any, options: RunOptions) -> None:
    if options.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _shard(model: Any, mesh: Any, options: RunOptions) -> None:
    """One FSDP2 group a layer and one for the rest; with bf16 the shards, and the sums of gradients, stay fp32."""
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
    """Buffers that no checkpoint has, which were on the meta device (transformers 5.24 ``distributed/mixin.py``)."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True
    model.initialize_weights()
