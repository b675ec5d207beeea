"""Other names of config fields: those of other frameworks and of earlier versions, for hints.

From the trainers and model configs of Hugging Face, and from the config files of MaxText, torchtitan and Levanter.
"""

FORMER: dict[str, dict[str, str]] = {}
"""New by old names of the renamed fields of a class: `"TrainConfig": {"old": "new"}`.

Records with the old names are read. `_ALIASES` has them, too, for hints on the command line and in config files.
"""

_ALIASES = {
    "train.steps": ("max_steps", "num_train_steps", "num_steps", "training_steps", "total_steps", "iterations")
    + ("num_train_epochs", "num_epochs", "max_epochs", "n_epochs", "epochs"),
    "train.global_batch": ("batch_size", "global_batch_size", "global_batch_size_to_train_on", "train_batch_size")
    + ("per_device_batch_size", "per_device_train_batch_size", "local_batch_size", "micro_batch_size"),
    "train.accumulate": ("gradient_accumulation_steps", "grad_accum", "accumulation_steps", "microbatches"),
    "train.eval_every": ("eval_steps", "eval_interval", "steps_per_eval", "eval_freq"),
    "optim.peak_lr": ("lr", "learning_rate", "max_lr", "base_lr", "init_lr"),
    "optim.clip_norm": ("max_grad_norm", "max_norm", "grad_clip", "gradient_clipping_threshold", "clip_grad"),
    "optim.ema_decay": ("ema", "ema_rate"),
    "optim.optimizer": ("optim_type", "opt_type", "optimizer_name"),
    "optim.optimizer.weight_decay": ("weight_decay", "wd", "adam_weight_decay"),
    "optim.optimizer.b1": ("beta1", "adam_beta1", "adam_b1"),
    "optim.optimizer.b2": ("beta2", "adam_beta2", "adam_b2"),
    "optim.schedule": ("lr_scheduler", "lr_scheduler_type", "lr_schedule", "scheduler", "lr_schedule_type"),
    "optim.schedule.warmup_steps": ("warmup", "num_warmup_steps", "warmup_steps", "warmup_ratio"),
    "model.num_layers": ("layers", "n_layer", "n_layers", "num_hidden_layers", "num_decoder_layers", "depth"),
    "model.hidden_size": ("hidden_size", "d_model", "n_embd", "dim", "emb_dim", "base_emb_dim", "width", "embed_dim"),
    "model.layers.mixer.num_heads": ("heads", "n_head", "n_heads", "num_attention_heads", "num_query_heads"),
    "model.layers.mixer.num_kv_heads": ("n_kv_heads", "num_key_value_heads", "kv_heads"),
    "model.layers.mixer.num_key_heads": ("linear_num_key_heads",),
    "model.layers.mixer.num_value_heads": ("linear_num_value_heads",),
    "model.layers.mixer.key_head_dim": ("linear_key_head_dim",),
    "model.layers.mixer.value_head_dim": ("linear_value_head_dim",),
    "model.layers.mixer.conv_width": ("linear_conv_kernel_dim",),
    "model.layers.mlp.dim": ("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "base_mlp_dim"),
    "model.vocab_size": ("vocab", "vocabulary_size", "n_vocab"),
    "model.layers.mixer.rope.theta": ("rope_theta", "rope_max_timescale", "rotary_base"),
    "model.tie_embeddings": ("tie_word_embeddings", "logits_via_embedding"),
    "model.attention_kernel": ("flash_attention", "attn_implementation"),
    "objective": ("dpo",),
    "adapter": ("lora", "qlora", "peft", "peft_config"),
    "adapter.rank": ("lora_rank", "lora_r"),
    "adapter.alpha": ("lora_alpha",),
    "adapter.targets": ("target_modules", "lora_target_modules"),
    "adapter.dora": ("use_dora",),
    "model.remat": ("gradient_checkpointing", "activation_checkpoint", "remat_policy", "activation_checkpointing"),
    "model.norm.eps": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "normalization_layer_epsilon"),
    "data.seq_len": ("block_size", "seq_length", "sequence_length", "max_seq_len", "max_length", "context_length")
    + ("max_target_length", "train_seq_len", "n_positions", "max_position_embeddings"),
    "data.store": ("dataset", "dataset_path", "dataset_name", "data_path", "train_file"),
    "precision.compute": ("dtype", "bf16", "fp16", "torch_dtype", "mixed_precision", "compute_dtype"),
    "precision.params": ("weight_dtype", "param_dtype", "params_dtype"),
    "precision.quantize": ("quantization", "fp8", "int8"),
    # `num_devices` is here because a framework that configures only the number of devices shards parameters over them.
    "mesh.fsdp": ("ici_fsdp_parallelism", "data_parallel_shard_degree", "dp_shard", "num_devices"),
    "mesh.replica": ("dcn_data_parallelism", "data_parallel_replicate_degree", "dp_replicate", "num_slices"),
    "mesh.tensor": ("ici_tensor_parallelism", "tensor_parallel_degree", "tensor_parallel_size", "tp", "tp_size"),
    "mesh.stage": ("ici_pipeline_parallelism", "pipeline_parallel_degree", "pipeline_parallel_size", "pp", "pp_size"),
    "mesh.context": ("ici_context_parallelism", "context_parallel_degree", "context_parallel_size", "cp", "cp_size"),
    "mesh.expert": ("ici_expert_parallelism", "expert_parallel_degree", "expert_parallel_size", "ep", "ep_size"),
    "checkpoint.save_every": ("save_steps", "save_interval", "checkpoint_period", "checkpoint_interval"),
    "checkpoint.local": ("local_checkpoint_directory",),
    "checkpoint.local_every": ("local_checkpoint_period",),
    "checkpoint.keep_last": ("save_total_limit", "max_to_keep", "keep_latest_k"),
    "track.log_every": ("logging_steps", "log_interval", "log_freq", "log_period"),
    "name": ("run_name", "experiment_name"),
    "root": ("output_dir", "base_output_directory", "dump_folder"),
    "seed": ("random_seed", "data_seed", "init_weights_seed"),
    "init": ("load_parameters_path", "initial_load_path", "model_name_or_path", "resume_from_checkpoint")
    + ("resume", "finetune", "pretrained", "load_from", "warm_start"),
}
# What other frameworks have and jaxinfra has not, and what to use instead.
ABSENT: dict[str, str] = {
    **dict.fromkeys(("ppo", "grpo", "rlhf", "orpo", "kto"), "objective=dpo, which learns preferences"),
}
# Aliases whose value cannot be taken over: it counts something else than the field (epochs, a share of the steps, the
# batch of a device), or only switches something on or off.
_OF_OTHER_VALUES = frozenset(
    ("num_train_epochs", "num_epochs", "max_epochs", "n_epochs", "epochs", "warmup_ratio", "max_position_embeddings")
    + ("per_device_batch_size", "per_device_train_batch_size", "local_batch_size", "micro_batch_size", "output_dir")
    + ("bf16", "fp16", "fp8", "int8", "gradient_checkpointing", "activation_checkpointing", "num_slices", "dpo")
    + ("flash_attention", "attn_implementation", "lora", "qlora", "peft", "peft_config", "target_modules")
    + ("lora_target_modules",)
)
_PATHS = {alias: path for path, aliases in _ALIASES.items() for alias in aliases}


def path_of_alias(name: str) -> str | None:
    """Returns the path of the field of a `Run` that other frameworks call `name`; None for other names."""
    return _PATHS.get(_normalized(name))


def override_of_alias(name: str, value: str) -> str | None:
    """Returns the override `path=value` for a field that other frameworks call `name`; None for other names.

    The word VALUE stands in place of a value that is missing, or that means something else here.
    """
    path = path_of_alias(name)
    can_take_over = value and _normalized(name) not in _OF_OTHER_VALUES
    return path and f"{path}={value if can_take_over else 'VALUE'}"


def _normalized(name: str) -> str:
    """Returns the last part of a dotted name as an alias is written: `warmup_steps` for `optim.Warmup-Steps`."""
    return name.rpartition(".")[2].lower().replace("-", "_")
