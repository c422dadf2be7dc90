"""Which key belongs to which group of the key reference, and which keys have no use in a recipe.

A table and not metadata of the fields: transformers' and trl's parsers hand metadata on to argparse.
"""

GROUPS = {
    "method": "Method",
    "teacher": "Teacher",
    "student": "Student",
    "data": "Data",
    "training": "Training",
    "cache": "Cache",
    "publishing": "Publishing",
    "other": "Other keys of transformers and TRL",
}
"""Group -> its title, in the order in which groups are listed."""

OWN_KEYS = {
    "method": (
        "method ce_weight combine on_policy_fraction rollouts interleaved_top_k rollout_max_tokens "
        "rollout_temperature rollout_top_p rollout_batch_size rollout_prompt_tokens rollout_truncated rollout_rows "
        "rollout_patience rollout_guards rollout_token_weights importance_gamma rollout_prefix rollout_server "
        "rollout_server_folder rollout_ahead reward reward_columns reward_weight reward_clip sparse_density "
        "sparse_from"
    ),
    "teacher": (
        "teacher teacher_revision teacher_dtype teacher_attn_implementation teacher_load_in_4bit teacher_load_in_8bit "
        "teacher_cache teacher_tail teacher_top_k teacher_server teacher_server_model teacher_server_signal "
        "teacher_server_dtype teacher_server_recheck teacher_api teacher_api_model teacher_api_key_env "
        "teacher_concurrency teacher_timeout teachers teacher_column teacher_view privileged_dropout "
        "teacher_max_length teacher_model_init_kwargs self_teacher ema_decay ema_every"
    ),
    "student": (
        "student student_init student_layers student_intermediate_size student_num_attention_heads "
        "student_num_key_value_heads student_hidden_size student_num_experts student_expert_intermediate_size "
        "student_vision_num_hidden_layers student_vision_intermediate_size student_vision_num_attention_heads "
        "student_vision_hidden_size target_params target_latency prune_importance prune_layer_importance "
        "prune_calibration_rows student_vision_tower student_vision_layer trainable student_quantization "
        "student_quantization_group student_quantization_activations student_quantization_skip"
    ),
    "data": "data max_train_rows max_eval_rows on_bad_row",
    "training": "dry_run stages schedule accelerate_config env chunk_size precise_logits",
    "cache": (
        "job cache_signal cache_hidden_dtype cache_tail_draws cache_shard_rows cache_batch_tokens on_error "
        "max_skipped shard engine cache_workers cache_worker_cpus cache_worker_gpus cache_samples "
        "cache_max_new_tokens cache_keep_truncated cache_temperature cache_top_p cache_seed cache_keep cache_verifier "
        "cache_gold_column cache_verifier_columns cache_json_schema cache_majority cache_judge_server "
        "cache_judge_model cache_judge_key_env cache_judge_min cache_max_think_tokens cache_thoughts cache_pairs"
    ),
}
"""Group -> the keys that mmkd itself gives every method. What a method declares belongs to the group `method`."""

UPSTREAM_KEYS = {
    "student": (
        "dtype attn_implementation model_revision trust_remote_code use_peft lora_r lora_alpha lora_dropout "
        "lora_target_modules lora_modules_to_save lora_target_parameters use_rslora use_dora load_in_4bit "
        "load_in_8bit bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage model_init_kwargs"
    ),
    "data": (
        "max_length truncation_mode packing packing_strategy eval_packing padding_free pad_to_multiple_of "
        "completion_only_loss assistant_only_loss chat_template_path eos_token dataset_text_field dataset_num_proc "
        "shuffle_dataset dataloader_num_workers"
    ),
    "training": (
        "output_dir num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps "
        "per_device_eval_batch_size learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args "
        "weight_decay max_grad_norm bf16 fp16 activation_checkpointing activation_checkpointing_kwargs "
        "activation_offloading torch_compile use_cpu seed data_seed eval_strategy eval_steps eval_on_start do_train "
        "do_eval save_strategy save_steps save_total_limit save_only_model load_best_model_at_end "
        "metric_for_best_model resume_from_checkpoint logging_steps report_to run_name project disable_tqdm log_level"
    ),
    "publishing": "push_to_hub hub_model_id hub_private_repo hub_strategy hub_token hub_revision hub_always_push",
}
"""Group -> the keys of transformers and trl that belong to it, after mmkd's own. The rest is `other`."""

_PYTHON = "It is for compute_metrics, which can be set in Python only."
_CLASSIFIER = "A Trainer of classifiers reads it; the losses here compute their own measures."
_SFT_LOSS = "It changes SFT's own loss, which distillation replaces; setting it is an error."

UNUSED = {
    "fsdp": "Setting it is an error: set accelerate_config to fsdp2, which also shards the teacher.",
    "fsdp_config": "Setting it is an error: set accelerate_config to fsdp2 or to a configuration of your own.",
    "gradient_checkpointing": "The old name of activation_checkpointing, which still works.",
    "gradient_checkpointing_kwargs": "The old name of activation_checkpointing_kwargs, which still works.",
    "visual_mismatch": "The old name of visual_tokens, which still works: error is same.",
    "pad_token": "Deprecated by TRL. Without it the tokenizer's own padding token is used.",
    "local_rank": "Launchers set it.",
    "do_predict": "Setting it is an error: nothing predicts after a training. Use `mmkd eval`.",
    "teacher_model_init_kwargs": "It is for Python. A recipe has teacher_dtype, teacher_revision and the like.",
    "include_for_metrics": _PYTHON,
    "batch_eval_metrics": _PYTHON,
    "loss_type": _SFT_LOSS,
    "label_smoothing_factor": _SFT_LOSS,
    "prediction_loss_only": _CLASSIFIER,
    "eval_do_concat_batches": _CLASSIFIER,
    "eval_accumulation_steps": _CLASSIFIER,
    "eval_use_gather_object": _CLASSIFIER,
    "label_names": _CLASSIFIER,
    "dataset_kwargs": "It is for rows that are tokenised already, which a data recipe does not give.",
    "remove_unused_columns": "Data recipes give the columns that are needed, and no others.",
    "length_column_name": "Rows have no column of lengths.",
    "lora_task_type": "Its default fits every student that takes an adapter here.",
}
"""Key -> why no recipe needs it. The key reference hides these, and still finds them by name."""

HELP = {
    "output_dir": "Folder of the run: checkpoints, the student, logs and the recipe. Each run needs one of its own.",
    "resume_from_checkpoint": "true goes on from the newest complete checkpoint in output_dir, or begins when there "
    "is none. A path goes on from that checkpoint.",
    "do_train": "false trains nothing and evaluates the student as it is. Default in a recipe: true.",
    "do_eval": "false skips the evaluation at the end of training. Default in a recipe: evaluate when the data has "
    "held-out rows.",
    "per_device_train_batch_size": "Rows per step on each device. Rows per update are this times "
    "gradient_accumulation_steps times the number of devices.",
    "gradient_accumulation_steps": "Steps whose gradients are summed before the weights are updated. Use it for a "
    "larger batch in the same memory; the loss is the same as with one large batch.",
    "per_device_eval_batch_size": "Rows per step on each device during evaluation.",
    "learning_rate": "Peak learning rate. 1e-5 to 5e-5 suits full training of a pretrained student, 1e-4 to 2e-4 "
    "suits LoRA, and 1e-3 suits a pruned or new student.",
    "num_train_epochs": "Passes over the training rows. max_steps wins over it.",
    "max_steps": "Number of updates. -1 (default) trains for num_train_epochs.",
    "warmup_steps": "Updates during which the learning rate rises from 0. Below 1 it is a share of all updates.",
    "max_length": "Longest row in tokens; longer ones are cut. null cuts nothing.",
    "packing": "Lay several rows end to end in one sequence of max_length. It saves padding when rows are short. Rows "
    "with images cannot be packed.",
    "completion_only_loss": "Learn from the completion and not from the prompt. Default: yes for rows with a prompt.",
    "assistant_only_loss": "Learn from the assistant's turns only. Works with any chat template. Default: "
    "false, which learns from every turn.",
    "chat_template_path": "Jinja file, or model whose chat template the student uses. Needed for conversations when "
    "the student's tokenizer has no template.",
    "dataloader_num_workers": "Processes that prepare batches beside the training. 2 to 8 help when rows have images.",
    "dtype": "Type of the student's weights. Default: float32, which mixed precision (bf16: true) needs to keep small "
    "updates.",
    "bf16": "Compute in bfloat16 and keep the type of the weights. Halves the memory of activations. Default: true "
    "unless fp16 is set (dho: false). A CPU without instructions for it computes in float32 and says so.",
    "activation_checkpointing": "Compute activations again in the backward pass. Saves most of their memory and costs "
    "about a third more time. Default: true (dho: false).",
    "model_revision": "Branch, tag or commit of the student. Default: main.",
    "trust_remote_code": "Run code that comes with student, teacher or tokenizer from the Hub. Default: false, since "
    "that code can do anything.",
    "use_peft": "Train a LoRA adapter instead of the whole student.",
    "load_in_4bit": "Quantise the frozen weights of the student to 4 bits. Needs use_peft: true (QLoRA).",
    "load_in_8bit": "Quantise the frozen weights of the student to 8 bits. Needs use_peft: true.",
    "report_to": "Trackers to log to: wandb, tensorboard, trackio, mlflow, several of them, or none.",
    "push_to_hub": "Publish the student with a card on the Hub. `mmkd push` does the same after the run.",
    "hub_model_id": "Repository to publish in, such as ORG/NAME. Default: the name of output_dir.",
    "attn_implementation": "Attention of the student, such as flash_attention_2. Default: transformers' choice.",
    "lora_r": "Rank of LoRA. A higher one learns more and takes more memory.",
    "lora_alpha": "Scale of LoRA: its update is multiplied by lora_alpha / lora_r.",
    "lora_dropout": "Dropout of LoRA's input.",
    "lora_target_modules": "Layers that get LoRA, such as q_proj v_proj, or all-linear. Default: PEFT's choice "
    "for the student's architecture.",
    "lora_target_parameters": "Parameters that get LoRA by their own names, such as those of experts.",
    "lora_modules_to_save": "Modules that are trained whole beside LoRA, such as embed_tokens lm_head.",
    "use_rslora": "Scale LoRA's update by lora_alpha / sqrt(lora_r), which suits high ranks.",
    "use_dora": "Use DoRA, which learns length and direction of weights apart. Helps at low ranks and is slower.",
    "bnb_4bit_quant_type": "Kind of 4-bit numbers: nf4 (default) or fp4.",
    "use_bnb_nested_quant": "Quantise the scales of 4-bit weights too. Saves about 0.4 bits per weight.",
    "bnb_4bit_quant_storage": "Type in which 4-bit weights are stored. FSDP needs the type of the other weights.",
    "truncation_mode": "Which end of a row that is too long is kept: keep_start (default) or keep_end, which TRL "
    "deprecates.",
    "packing_strategy": "How rows are packed. bfd (default): fit whole rows and cut what is too long. bfd_split: "
    "split what is too long. wrapped: fill every sequence, and cut rows anywhere; for plain text.",
    "eval_packing": "Pack the held-out rows too. Default: as packing.",
    "padding_free": "Lay the rows of a batch end to end instead of padding them. Needs flash attention.",
    "pad_to_multiple_of": "Pad sequences to a multiple of this many tokens.",
    "eos_token": "Token that ends a turn or a text. Default: the tokenizer's.",
    "dataset_text_field": "Column of plain text. Default: text.",
    "dataset_num_proc": "Processes that prepare the rows before training.",
    "shuffle_dataset": "Shuffle the rows once before they are packed. Batches are drawn in random order anyway.",
    "lr_scheduler_type": "How the learning rate changes after the warm-up: linear (default), cosine, constant, ...",
    "lr_scheduler_kwargs": "Options of the schedule, such as {num_cycles: 2}.",
    "optim": "Optimizer. Default: AdamW. adamw_8bit and paged_adamw_8bit (bitsandbytes) take a quarter of its memory.",
    "optim_args": "Options of the optimizer, as name=value,name=value.",
    "weight_decay": "Weight decay of the optimizer. Biases and norms have none.",
    "max_grad_norm": "Clip the norm of the gradient to this. 0 turns clipping off.",
    "fp16": "Compute in float16. Only for GPUs without bfloat16.",
    "activation_checkpointing_kwargs": "Options of activation checkpointing, such as {every_n_layers: 2}.",
    "activation_offloading": "Move activations to the memory of the CPU. Saves GPU memory and is slower.",
    "torch_compile": "Compile the layers of student and teacher with torch.compile. Pays off in long runs.",
    "use_cpu": "Train on the CPU even if there is a GPU.",
    "seed": "Seed of the student's new weights, of dropout and of the order of rows.",
    "data_seed": "Seed of the order of rows. Default: seed.",
    "eval_strategy": "When to evaluate during training: no (default), steps or epoch.",
    "eval_steps": "Updates between evaluations, for eval_strategy: steps. Below 1 it is a share of all updates.",
    "eval_on_start": "Evaluate before the first update too, which shows what training has changed.",
    "save_strategy": "When to save a checkpoint: no, steps (default), epoch or best.",
    "save_steps": "Updates between checkpoints. Below 1 it is a share of all updates.",
    "save_total_limit": "Number of checkpoints to keep; older ones are deleted. Default: all.",
    "save_only_model": "Save checkpoints without the optimizer's state: smaller, but no run can go on from them.",
    "load_best_model_at_end": "Keep the best checkpoint as the student, by metric_for_best_model.",
    "metric_for_best_model": "Measure by which checkpoints are compared. Default: loss.",
    "logging_steps": "Updates between two lines of the log. Below 1 it is a share of all updates.",
    "run_name": "Name of the run in trackers. Default: chosen by the tracker.",
    "project": "Name of the project in trackio.",
    "disable_tqdm": "Show no progress bars.",
    "log_level": "Level of transformers' messages: debug, info, warning, error, critical or passive (default).",
    "hub_private_repo": "Make the repository private. Default: as the owner's settings say, which is public for most.",
    "hub_strategy": "When to publish: end, every_save (default), checkpoint or all_checkpoints.",
    "hub_token": "Refused, since records and cards repeat a recipe: use `hf auth login`, or HF_TOKEN in the shell.",
    "hub_revision": "Branch to publish to. Default: main.",
    "hub_always_push": "Wait for an unfinished upload before the next one, instead of leaving the next one out.",
    "model_init_kwargs": "Further keyword arguments of from_pretrained for the student.",
}
"""Key of transformers or trl -> what it means here, where their own help says less or something else."""


def group_of(name: str, own: bool) -> str | None:
    """The group of a key of mmkd (None where the table lacks it) or of another library."""
    tables = OWN_KEYS if own else UPSTREAM_KEYS
    group = next((group for group, names in tables.items() if name in names.split()), None)
    return group if own or group is not None else "other"


def rank_of(name: str, group: str, own: bool) -> int:
    """Where a key stands among those of its group, from 1; 0 in the group `other`, whose order is upstream's."""
    names = (OWN_KEYS if own else UPSTREAM_KEYS).get(group, "").split()
    return names.index(name) + 1 if name in names else 0
