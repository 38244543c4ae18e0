"""The keys that DeepSpeed reads from its configuration, as tables.

DeepSpeed passes over a mistyped key in silence, so a recipe is compared with these tables before anything
starts. They are written out here because importing DeepSpeed takes seconds and looks for a device; a test
compares them with what the installed DeepSpeed reads.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["integer", "number", "boolean", "string", "object", "any"]

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")

TOP_LEVEL: dict[str, Kind] = {
    "train_batch_size": "integer",
    "train_micro_batch_size_per_gpu": "integer",
    "gradient_accumulation_steps": "integer",
    "managed_gradient_accumulation": "boolean",
    "optimizer": "object",
    "scheduler": "object",
    "zero_optimization": "object",
    "zero_allow_untested_optimizer": "boolean",
    "zero_force_ds_cpu_optimizer": "boolean",
    "fp16": "object",
    "bf16": "object",
    "torch_autocast": "object",
    "data_types": "object",
    "gradient_clipping": "number",
    "gradient_allreduce_op": "string",
    "gradient_predivide_factor": "number",
    "prescale_gradients": "boolean",
    "communication_data_type": "string",
    "seq_parallel_communication_data_type": "string",
    "disable_allgather": "boolean",
    "steps_per_print": "integer",
    "dump_state": "boolean",
    "disable_python_gc": "boolean",
    "wall_clock_breakdown": "boolean",
    "memory_breakdown": "boolean",
    "log_level": "string",
    "vocabulary_size": "integer",
    "dataloader_drop_last": "boolean",
    "activation_checkpointing": "object",
    "aio": "object",
    "autotuning": "object",
    "checkpoint": "object",
    "comet": "object",
    "comms_logger": "object",
    "compile": "object",
    "csv_monitor": "object",
    "data_efficiency": "object",
    "data_parallel_size": "integer",
    "datastates_ckpt": "any",
    "expert_parallel": "object",
    "flops_profiler": "object",
    "hybrid_engine": "object",
    "pipeline": "object",
    "sequence_parallel_size": "integer",
    "tensor_parallel": "object",
    "tensorboard": "object",
    "timers": "object",
    "use_data_before_expert_parallelism": "boolean",
    "wandb": "object",
    "weight_quantization": "object",
}
"""Keys at the top level and the JSON type of their values."""

_MONITOR = frozenset({"enabled", "output_path", "job_name"})

SECTIONS: dict[str, frozenset[str]] = {
    "optimizer": frozenset({"type", "params"}),
    "scheduler": frozenset({"type", "params"}),
    "zero_optimization": frozenset(
        {
            "stage",
            "contiguous_gradients",
            "reduce_scatter",
            "reduce_bucket_size",
            "use_multi_rank_bucket_allreduce",
            "allgather_partitions",
            "allgather_bucket_size",
            "overlap_comm",
            "compute_grad_norm",
            "load_from_fp32_weights",
            "elastic_checkpoint",
            "offload_param",
            "offload_optimizer",
            "zenflow",
            "sub_group_size",
            "cpu_offload_param",
            "cpu_offload_use_pin_memory",
            "cpu_offload",
            "stage3_prefetch_bucket_size",
            "stage3_param_persistence_threshold",
            "stage3_model_persistence_threshold",
            "stage3_max_live_parameters",
            "stage3_max_reuse_distance",
            "stage3_gather_16bit_weights_on_model_save",
            "stage3_module_granularity_threshold",
            "stage3_use_all_reduce_for_fetch_params",
            "stage3_allgather_sequential",
            "stage3_gather_fp16_weights_on_model_save",
            "ignore_unused_parameters",
            "legacy_stage1",
            "round_robin_gradients",
            "parameter_alignment",
            "zero_hpz_partition_size",
            "zero_quantized_weights",
            "zero_quantized_nontrainable_weights",
            "zero_quantized_gradients",
            "memory_efficient_linear",
            "pipeline_loading_checkpoint",
            "override_module_apply",
            "log_trace_cache_warnings",
            "enable_sanity_checks",
            "save_muon_momentum_buffer_in_memory",
            "leaf_module",
        }
    ),
    "zero_optimization.offload_param": frozenset(
        {"device", "nvme_path", "buffer_count", "buffer_size", "max_in_cpu", "pin_memory"}
    ),
    "zero_optimization.offload_optimizer": frozenset(
        {
            "device",
            "nvme_path",
            "buffer_count",
            "pin_memory",
            "pipeline_read",
            "pipeline_write",
            "fast_init",
            "ratio",
            "super_offload",
            "cpuadam_cores_perc",
        }
    ),
    "zero_optimization.leaf_module": frozenset({"classes", "names", "name_suffixes"}),
    "fp16": frozenset(
        {
            "enabled",
            "auto_cast",
            "loss_scale",
            "initial_scale_power",
            "loss_scale_window",
            "hysteresis",
            "consecutive_hysteresis",
            "min_loss_scale",
            "fp16_master_weights_and_grads",
        }
    ),
    "bf16": frozenset(
        {
            "enabled",
            "immediate_grad_update",
            "check_grad_overflow",
            "bf16_master_weights_and_grads",
            "bf16_optimizer_states",
        }
    ),
    "data_types": frozenset({"grad_accum_dtype", "param_dtype", "buffer_dtype", "keep_in_fp32_modules"}),
    "torch_autocast": frozenset({"enabled", "dtype", "lower_precision_safe_modules"}),
    "activation_checkpointing": frozenset(
        {
            "partition_activations",
            "number_checkpoints",
            "contiguous_memory_optimization",
            "synchronize_checkpoint_boundary",
            "profile",
            "cpu_checkpointing",
        }
    ),
    "aio": frozenset(
        {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"}
    ),
    "checkpoint": frozenset(
        {
            "tag_validation",
            "load_universal",
            "use_node_local_storage",
            "parallel_write",
            "checkpoint_serialization",
            "writer",
        }
    ),
    "comms_logger": frozenset({"enabled", "prof_all", "prof_ops", "verbose", "debug"}),
    "flops_profiler": frozenset(
        {
            "enabled",
            "recompute_fwd_factor",
            "profile_step",
            "module_depth",
            "top_modules",
            "detailed",
            "output_file",
        }
    ),
    "timers": frozenset({"throughput"}),
    "timers.throughput": frozenset({"enabled", "synchronized"}),
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "wandb": frozenset({"enabled", "group", "team", "project"}),
    "comet": frozenset(
        {
            "enabled",
            "samples_log_interval",
            "project",
            "workspace",
            "api_key",
            "experiment_name",
            "experiment_key",
            "online",
            "mode",
        }
    ),
}
"""Keys of the sections whose keys are checked; sections that are not listed are passed on as they are."""

REMOVED: frozenset[str] = frozenset(
    {
        "amp",
        "compression_training",
        "curriculum_learning",
        "eigenvalue",
        "elasticity",
        "graph_harvesting",
        "nebula",
        "progressive_layer_drop",
        "quantize_training",
        "sparse_attention",
        "sparse_gradients",
        "zero_optimization.mics_shard_size",
        "zero_optimization.mics_hierarchical_params_gather",
        "zero_optimization.zeropp_loco_param",
    }
)
"""Keys of earlier releases that DeepSpeed itself refuses."""

RENAMED: dict[str, str] = {
    "bfloat16": "bf16",
    "zero_optimization.cpu_offload": "zero_optimization.offload_optimizer",
    "zero_optimization.cpu_offload_param": "zero_optimization.offload_param",
    "zero_optimization.cpu_offload_use_pin_memory": "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
    "zero_optimization.prefetch_bucket_size": "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.param_persistence_threshold": "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.model_persistence_threshold": "zero_optimization.stage3_model_persistence_threshold",
    "zero_optimization.max_live_parameters": "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.max_reuse_distance": "zero_optimization.stage3_max_reuse_distance",
}
"""Old or internal names, and the names to write instead."""

Fixed: TypeAlias = dict[str, tuple[object, str]]

FIXED: Fixed = {
    "gradient_allreduce_op": ("mean", "losses are scaled for gradients that are averaged over ranks"),
    "managed_gradient_accumulation": (True, "the end of the accumulation window starts the step"),
    "sequence_parallel_size": (1, "every rank holds other examples"),
    "tensor_parallel.autotp_size": (0, "every rank holds whole layers"),
    "expert_parallel.enabled": (False, "every rank holds whole layers"),
    "data_efficiency.enabled": (False, "the run orders its own data"),
    "disable_allgather": (False, "updated partitions must reach every rank"),
}
"""Settings that dsso cannot work with: path -> (the only value that works, why)."""

FIXED_FOR_METHODS: Fixed = {
    "prescale_gradients": (False, "factors are on the scale of gradients averaged after the reduction"),
    "gradient_predivide_factor": (1.0, "factors are on the scale of gradients averaged after the reduction"),
    "torch_autocast.enabled": (False, "curvature is measured in the model's own precision"),
    "compile.deepcompile": (False, "curvature is measured by hooks, which compilation drops"),
    "hybrid_engine.enabled": (False, "curvature is measured by hooks, which the hybrid engine replaces"),
    "fp16.auto_cast": (False, "curvature is measured in the model's own precision"),
    "fp16.fp16_master_weights_and_grads": (False, "updates are applied to fp32 master weights"),
    "bf16.bf16_master_weights_and_grads": (False, "updates are applied to fp32 master weights"),
    "zero_optimization.legacy_stage1": (False, "the map of partitions of the current stage 1 is needed"),
    "zero_optimization.elastic_checkpoint": (False, "the method's state is checkpointed on its own"),
    "zero_optimization.zenflow": (None, "all gradients must be current when the step starts"),
    "zero_optimization.zero_hpz_partition_size": (1, "partitions must span all ranks"),
    "zero_optimization.zero_quantized_weights": (False, "curvature is measured at the weights as they are"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "frozen weights must stay as they are"),
    "zero_optimization.zero_quantized_gradients": (False, "gradients are needed in full precision"),
}
"""Settings that baselines can work with, and methods of dsso cannot."""

WITHOUT_DEEPSPEED: frozenset[str] = frozenset(
    {
        *BATCH_KEYS,
        "optimizer",
        "scheduler",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "fp16",
        "bf16",
        "data_types",
        "gradient_clipping",
        "activation_checkpointing",
        "data_parallel_size",
        "dataloader_drop_last",
        "steps_per_print",
        "log_level",
        "vocabulary_size",
        *(path.partition(".")[0] for path in FIXED),
    }
)
"""Keys that keep their meaning under another engine, change nothing in a run, or are checked on their own."""

OFF: dict[str, object] = {"gradient_predivide_factor": 1.0}
"""Values besides null, false, an empty section and `"enabled": false` that switch nothing on."""

ZERO_WITHOUT_DEEPSPEED: Fixed = {
    "zero_optimization.offload_param.device": ("none", "nothing is offloaded"),
    "zero_optimization.offload_optimizer.device": ("none", "nothing is offloaded"),
    "zero_optimization.zenflow": (None, "all gradients are current when the step starts"),
    "zero_optimization.zero_hpz_partition_size": (1, "shards span all ranks"),
    "zero_optimization.zero_quantized_weights": (False, "weights travel as they are"),
    "zero_optimization.zero_quantized_nontrainable_weights": (False, "weights travel as they are"),
    "zero_optimization.zero_quantized_gradients": (False, "gradients travel as they are"),
    "bf16.bf16_master_weights_and_grads": (False, "updates are applied to fp32 master weights"),
    "bf16.bf16_optimizer_states": (False, "the optimizer's state is kept in fp32"),
}
"""Settings of ZeRO that would change what is computed or where it lies: path -> (the only value, what holds)."""
