"""List the keys that a DeepSpeed config may have, by section,.

``tests/zero_utils/test_config_real.py`` compares these tables with the DeepSpeed that is installed, so they do not rot.
A section's name is its dotted path, ``""`` the top level. What is below a section that is not listed
(``optimizer.params``, ``tensor_parallel.partition_config``, …) is free: its keys are another function's arguments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Section:
    """The keys that a section has, the upstream file that reads it, and whether DeepSpeed refuses any other key.

    ``strict`` sections are pydantic models with ``extra="forbid"`` (``runtime/config_utils.py``); in others an
    unknown key is silently ignored.
    """

    source: str
    keys: frozenset[str]
    strict: bool = False


def _section(source: str, keys: str, strict: bool = False) -> Section:
    return Section(source, frozenset(keys.split()), strict)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


STAGE3 = _words(
    """prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters
    max_reuse_distance gather_16bit_weights_on_model_save module_granularity_threshold
    use_all_reduce_for_fetch_params allgather_sequential"""
)  # each of them has the alias stage3_…, which is how they are written

SECTIONS: dict[str, Section] = {
    "": _section(
        "runtime/config.py, runtime/constants.py; sequence_parallel_size, data_parallel_size: deepspeed/__init__.py",
        """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps
        managed_gradient_accumulation steps_per_print dump_state disable_python_gc disable_allgather
        wall_clock_breakdown memory_breakdown log_level communication_data_type
        seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op
        gradient_clipping zero_optimization allgather_size zero_allow_untested_optimizer
        zero_force_ds_cpu_optimizer fp16 bf16 bfloat16 torch_autocast data_types optimizer scheduler
        activation_checkpointing comms_logger tensorboard wandb csv_monitor comet flops_profiler autotuning
        hybrid_engine pipeline data_efficiency checkpoint aio dataloader_drop_last datastates_ckpt
        weight_quantization compile timers tensor_parallel expert_parallel use_data_before_expert_parallelism
        vocabulary_size sequence_parallel_size data_parallel_size""",
    ),
    "zero_optimization": _section(
        "runtime/zero/config.py DeepSpeedZeroConfig",
        f"""stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce
        allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights
        elastic_checkpoint offload_param offload_optimizer zenflow sub_group_size cpu_offload_param
        cpu_offload_use_pin_memory cpu_offload {" ".join(STAGE3)} {" ".join(f"stage3_{key}" for key in STAGE3)}
        stage3_gather_fp16_weights_on_model_save ignore_unused_parameters legacy_stage1 round_robin_gradients
        parameter_alignment zero_hpz_partition_size zero_quantized_weights zero_quantized_nontrainable_weights
        zero_quantized_gradients memory_efficient_linear pipeline_loading_checkpoint override_module_apply
        log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory leaf_module""",
        strict=True,
    ),
    "zero_optimization.offload_param": _section(
        "runtime/zero/offload_config.py DeepSpeedZeroOffloadParamConfig",
        "device nvme_path buffer_count buffer_size max_in_cpu pin_memory",
        strict=True,
    ),
    "zero_optimization.offload_optimizer": _section(
        "runtime/zero/offload_config.py DeepSpeedZeroOffloadOptimizerConfig",
        "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio super_offload"
        " cpuadam_cores_perc",
        strict=True,
    ),
    "zero_optimization.zenflow": _section(
        "runtime/zenflow/zenflow_config.py ZenFlowConfig",
        """topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio
        full_warm_up_rounds pt_reserved_cores_perc steps_per_epoch""",
        strict=True,
    ),
    "zero_optimization.leaf_module": _section(
        "runtime/zero/leaf_module_config.py DeepSpeedZeroLeafModuleConfig", "classes names name_suffixes", strict=True
    ),
    "fp16": _section(
        "runtime/precision_config.py DeepSpeedFP16Config",
        """enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads""",
        strict=True,
    ),
    "bf16": _section(
        "runtime/precision_config.py DeepSpeedBF16Config",
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states",
        strict=True,
    ),
    "torch_autocast": _section(
        "runtime/config.py get_torch_autocast_enabled …",
        "enabled dtype lower_precision_safe_modules",
    ),
    "data_types": _section(
        "runtime/config.py _initialize_params",
        "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
    ),
    "optimizer": _section("runtime/config.py get_optimizer_name …", "type params legacy_fusion"),
    "scheduler": _section("runtime/config.py get_scheduler_name …", "type params"),
    "activation_checkpointing": _section(
        "runtime/activation_checkpointing/config.py",
        """partition_activations number_checkpoints contiguous_memory_optimization
        synchronize_checkpoint_boundary profile cpu_checkpointing""",
    ),
    "comms_logger": _section(
        "comm/config.py CommsLoggerConfig",
        "enabled prof_all prof_ops verbose debug",
        strict=True,
    ),
    "tensorboard": _section("monitor/config.py TensorBoardConfig", "enabled output_path job_name", strict=True),
    "wandb": _section("monitor/config.py WandbConfig", "enabled group team project", strict=True),
    "csv_monitor": _section("monitor/config.py CSVConfig", "enabled output_path job_name", strict=True),
    "comet": _section(
        "monitor/config.py CometConfig",
        "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode",
        strict=True,
    ),
    "flops_profiler": _section(
        "profiling/config.py", "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"
    ),
    "autotuning": _section(
        "autotuning/config.py",
        """enabled fast results_dir exps_dir overwrite start_profile_step end_profile_step metric metric_path tuner_type
        tuner_early_stopping tuner_num_trials arg_mappings model_info model_info_path mp_size max_train_batch_size
        min_train_batch_size max_train_micro_batch_size_per_gpu min_train_micro_batch_size_per_gpu
        num_tuning_micro_batch_sizes""",
    ),
    "autotuning.model_info": _section("autotuning/constants.py", "profile num_params hidden_size num_layers"),
    "hybrid_engine": _section(
        "runtime/config.py HybridEngineConfig",
        """enabled max_out_tokens inference_tp_size release_inference_cache pin_parameters tp_gather_partition_size
        enable_cuda_graph""",
        strict=True,
    ),
    "pipeline": _section(
        "runtime/config.py get_pipeline_config, runtime/pipe/engine.py",
        "stages partition seed_layers activation_checkpoint_interval pipe_partitioned grad_partitioned use_reentrant",
    ),
    "data_efficiency": _section("runtime/data_pipeline/config.py", "enabled seed data_sampling data_routing"),
    "data_efficiency.data_sampling": _section(
            "runtime/data_pipeline/config.py",
            "enabled num_epochs num_workers pin_memory curriculum_learning dynamic_batching",
    ),
    "data_efficiency.data_sampling.curriculum_learning": _section(
        "runtime/data_pipeline/config.py, data_sampling/data_sampler.py", "enabled data_cluster_path curriculum_metrics"
    ),
    "data_efficiency.data_sampling.dynamic_batching": _section(
        "runtime/data_pipeline/config.py, data_sampling/variable_batch_size_and_lr.py",
        "enabled lr_scaling_method min_batch_size max_batch_size sequence_picking_order max_tokens verbose"
        " metrics_path",
    ),
    "data_efficiency.data_routing": _section("runtime/data_pipeline/config.py", "enabled random_ltd"),
    "checkpoint": _section(
        "runtime/config.py, runtime/model_checkpointing/config.py",
        "tag_validation load_universal use_node_local_storage parallel_write checkpoint_serialization writer",
    ),
    "checkpoint.parallel_write": _section("runtime/config.py get_checkpoint_parallel_write_pipeline", "pipeline_stage"),
    "checkpoint.writer": _section(
        "runtime/model_checkpointing/config.py",
        "type io_buffer_size io_buffer_double show_statistics data_parallel decoupled io_multiplier",
    ),
    "aio": _section(
            "runtime/swap_tensor/aio_config.py",
            "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
    ),
    "weight_quantization": _section(
        "inference/config.py WeightQuantConfig",
        "enabled num_bits q_type q_groups quantized_initialization post_init_quant",
        strict=True,
    ),
    "compile": _section(
        "compile/config.py CompileConfig",
        """deepcompile autoep_non_moe free_activation free_activation_threshold offload_activation
        offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log offload_parameters
        sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors
        keep_all_input_tensors passes""",
        strict=True,
    ),
    "timers": _section("utils/config.py", "throughput"),
    "timers.throughput": _section(
        "utils/config.py DeepSpeedThroughputTimerConfig",
        "enabled synchronized",
        strict=True,
    ),
    "tensor_parallel": _section(
        "runtime/tensor_parallel/config.py TPTrainingConfig",
        """dtype autotp_size tp_overlap_comm vocab_parallel_lm_head vocab_parallel_ce_backend tensor_parallel tp
        injection_policy_tuple partition_config preset_model keep_module_on_host replace_with_kernel_inject
        kernel_inject""",
        strict=True,
    ),
    "tensor_parallel.tp": _section(
        "runtime/tensor_parallel/config.py TPConfig", "tp_size tp_grain_size mpu tp_group", strict=True
    ),
    "expert_parallel": _section(
        "module_inject/auto_ep_config.py parse_autoep_config",
        """enabled autoep_size expert_tensor_parallel_size validate_folding_routing async_split_plan preset_model
        moe_layer_pattern expert_pattern router_pattern use_grouped_mm disable_triton_grouped_mm route_norm route_scale
        score_apply combine_impl row_weighting_impl gate_up_impl comm_backend comm_num_sm comm_qp_margin
        comm_max_tokens_per_rank num_expert_groups num_limited_groups score_func top_k load_balance_coeff
        routed_scaling_factor expert_w1 expert_w2 expert_w3 num_experts_attr top_k_attr has_shared_experts
        shared_experts_pattern shared_experts_gate_pattern expert_activation""",
    ),
}  # fmt: skip
SECTIONS["bfloat16"] = SECTIONS["bf16"]  # the old name, read if there is no bf16 (runtime/precision_config.py)
SECTIONS["tensor_parallel.tensor_parallel"] = SECTIONS["tensor_parallel.tp"]

# What DeepSpeed refuses with "has been removed" (runtime/config.py _REMOVED_TOP_LEVEL_CONFIG_KEYS,
# _REMOVED_ZERO_CONFIG_KEYS), and what to use instead.
REMOVED = {
    "nebula": "Remove it: checkpoints are written by torch.save; checkpoint.writer has the faster writers.",
    "compression_training": (
        "Remove it; quantize with a library of its own, such as torchao, before or after the training."
    ),
    "amp": 'Use "bf16": {"enabled": true}, "fp16": {"enabled": true} or "torch_autocast".',
    "quantize_training": "Remove it; quantize with a library of its own, such as torchao.",
    "sparse_gradients": "Remove it: gradients of torch.nn.Embedding(sparse=True) are reduced sparsely without a key.",
    "eigenvalue": "Remove it: it served quantize_training, which is gone too.",
    "sparse_attention": "Remove it; choose a sparse or flash attention in the model, such as attn_implementation=.",
    "elasticity": (
        "Set train_batch_size, train_micro_batch_size_per_gpu and gradient_accumulation_steps; to resume on another "
        "number of ranks: dsconv to-universal and checkpoint.load_universal."
    ),
    "graph_harvesting": 'Remove it; "compile": {"deepcompile": true} is what compiles a training step now.',
    "curriculum_learning": "Move it to data_efficiency.data_sampling.curriculum_learning.",
    "progressive_layer_drop": "Remove it: nothing took its place.",
    "zero_optimization.mics_shard_size": (
        "Use zero_optimization.zero_hpz_partition_size: the ranks of a node keep a second partition."
    ),
    "zero_optimization.mics_hierarchical_params_gather": "Remove it; see zero_optimization.zero_hpz_partition_size.",
    "zero_optimization.zeropp_loco_param": "Remove it: zero_quantized_gradients works without error feedback.",
}

# Deprecated keys that still work (runtime/zero/config.py, runtime/precision_config.py), and what to write.
DEPRECATED = {
    "zero_optimization.cpu_offload": 'Write "offload_optimizer": {"device": "cpu"}.',
    "zero_optimization.cpu_offload_param": 'Write "offload_param": {"device": "cpu"}.',
    "zero_optimization.cpu_offload_use_pin_memory": "Write pin_memory in offload_optimizer and offload_param.",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "Write stage3_gather_16bit_weights_on_model_save.",
    "bfloat16": "Write bf16: transformers and accelerate do not know the old name.",
    "allgather_size": "Write zero_optimization.allgather_bucket_size.",
}

# Keys of older releases that DeepSpeed no longer knows, and what they are called now.
RENAMED = {
    "aio.thread_count": "intra_op_parallelism",
    "fp32_allreduce": 'communication_data_type: "fp32"',
}

# Keys that are read at stage 3 only (runtime/engine.py _configure_zero_optimizer,
# runtime/zero/partition_parameters.py), and at stages 1 and 2 only.
ONLY_STAGE3 = _words(
    f"""{" ".join(STAGE3)} {" ".join(f"stage3_{key}" for key in STAGE3)}
    stage3_gather_fp16_weights_on_model_save sub_group_size zero_hpz_partition_size zero_quantized_weights
    zero_quantized_nontrainable_weights zero_quantized_gradients memory_efficient_linear
    pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks
    save_muon_momentum_buffer_in_memory leaf_module"""
)
ONLY_STAGES_1_2 = _words(
    "round_robin_gradients parameter_alignment ignore_unused_parameters use_multi_rank_bucket_allreduce"
    " allgather_bucket_size"
)

_DTYPE_NAMES = _words("fp32 float32 float torch.float32 fp16 float16 half torch.float16 bf16 bfloat16 torch.bfloat16")
# Keys that take one of a few values (case aside where DeepSpeed folds it: runtime/config.py,
# model_checkpointing/config.py).
CHOICES: dict[str, tuple[str, ...]] = {
    "communication_data_type": ("fp32", "fp16", "bf16"),
    "seq_parallel_communication_data_type": ("fp32", "fp16", "bf16"),
    "gradient_allreduce_op": ("mean", "sum"),
    "zero_optimization.offload_param.device": ("none", "cpu", "nvme"),
    "zero_optimization.offload_optimizer.device": ("none", "cpu", "nvme"),
    "checkpoint.tag_validation": ("warn", "ignore", "fail"),
    "checkpoint.writer.type": ("mock", "python", "fast"),
    "torch_autocast.dtype": _DTYPE_NAMES,
    "scheduler.type": ("LRRangeTest", "OneCycle", "WarmupLR", "WarmupDecayLR", "WarmupCosineLR"),
}

# runtime/config.py DEEPSPEED_OPTIMIZERS, in any case of letters; the classes of torch.optim, as they are spelt there;
# and of both, those that ZeRO takes without zero_allow_untested_optimizer (runtime/zero/utils.py
# ZERO_SUPPORTED_OPTIMIZERS).
DEEPSPEED_OPTIMIZERS = _words("adagrad adam adamw lamb lion muadam muadamw musgd muon")
TORCH_OPTIMIZERS = _words(
    "ASGD Adadelta Adafactor Adagrad Adam AdamW Adamax LBFGS Muon NAdam RAdam RMSprop Rprop SGD SparseAdam"
)
ZERO_OPTIMIZERS = _words("adagrad adam adamw lion muon")
REMOVED_OPTIMIZERS = _words("onebitadam zerooneadam onebitlamb")

# The arguments of the schedulers (runtime/lr_schedules.py); the last step is the engine's own. Those without a default:
# needed.
_WARMUP = "warmup_num_steps warmup_type last_batch_iteration "
SCHEDULER_PARAMS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    name: (frozenset(keys.split()), frozenset(needed.split()))
    for name, keys, needed in (
        (
            "LRRangeTest",
            """lr_range_test_min_lr lr_range_test_step_size lr_range_test_step_rate lr_range_test_staircase
            last_batch_iteration""",
            "",
        ),
        (
            "OneCycle",
            """cycle_min_lr cycle_max_lr decay_lr_rate cycle_first_step_size cycle_second_step_size
            cycle_first_stair_count cycle_second_stair_count decay_step_size cycle_momentum cycle_min_mom
            cycle_max_mom decay_mom_rate last_batch_iteration""",
            "cycle_min_lr cycle_max_lr",
        ),
        ("WarmupLR", _WARMUP + "warmup_min_lr warmup_max_lr", ""),
        ("WarmupDecayLR", _WARMUP + "warmup_min_lr warmup_max_lr total_num_steps", "total_num_steps"),
        ("WarmupCosineLR", _WARMUP + "warmup_min_ratio cos_min_ratio total_num_steps", "total_num_steps"),
    )
}


def lookup(values: object, key: str, default: Any = None) -> Any:
    """Return the value at ``"a.b.c"`` of nested mappings, or ``default`` if a part of the path is missing."""
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return default
        values = values[part]
    return values
