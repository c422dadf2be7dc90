"""What is wrong with the data, said before a step is taken."""

from collections.abc import Mapping
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from trl.data_utils import is_conversational, is_conversational_from_value
from trl.trainer.sft_config import SFTConfig

from mmkd.errors import UserError
from mmkd.models.backbone import base_of, devices_of
from mmkd.precision import cpu_multiplies, say_float32
from mmkd.seams.transformers_seam import balances_experts

from .prompt_rows import is_prompt_alone
from .vision_checks import check_no_videos


def check_training_data(train: Any, evaluation: Any, args: SFTConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError for missing or empty data and for messages without a chat template to render them."""
    if train is None:
        raise UserError("There is no train_dataset; distillation needs text for the teacher to judge.")
    parts = {"train": train, **(evaluation if isinstance(evaluation, dict) else {"eval": evaluation})}
    for name, dataset in parts.items():
        if dataset is None:
            continue
        row = next(iter(dataset), None)
        if row is None:
            raise UserError(f"The {name} data set is empty; check the data recipe's splits and filters.")
        check_no_videos(row, name)
        if is_prompt_alone(row):
            raise UserError(
                f"The rows of the {name} data are prompts without answers to learn from or to judge. Add a column "
                "`completion`, let the teacher answer them (`job: generate`), or train on what the student answers "
                "(on_policy_fraction: 1, without evaluation).",
                because="meaning",
            )
        templated = is_conversational(row) or is_conversational_from_value(row)
        if templated and tokenizer.chat_template is None and args.chat_template_path is None:
            raise UserError(
                f"The {name} data set holds messages but the student's tokenizer has no chat template. Set "
                "chat_template_path to a Jinja file or to a model whose template the student should use (the teacher)."
            )


def check_held_out(evaluation: Any, args: SFTConfig) -> None:
    """Raises UserError for evaluations during training without rows to evaluate on."""
    if evaluation is None and args.eval_strategy != "no":
        raise UserError(
            f"eval_strategy is {IntervalStrategy(args.eval_strategy).value}, but the data has no rows for evaluation. "
            "Hold some out (in a data recipe: eval_rows, eval_fraction or splits: {eval: ...}; in Python: "
            "eval_dataset), or set eval_strategy: no.",
            because="meaning",
        )


def check_layout(args: SFTConfig, row: Mapping[str, Any], vision: bool, is_processor: bool) -> None:
    """Raises UserError for settings that rows like this one cannot have; `vision`: they have images."""
    if vision and not is_processor:
        raise UserError(
            "The rows have images and the student has a tokenizer only. Use a vision-language model, or leave the "
            "columns `image` and `images` out of the data.",
            because="meaning",
        )
    for key in ("packing", "padding_free"):
        if vision and getattr(args, key):
            raise UserError(f"Rows with images cannot be laid end to end. Set {key}: false.", because="not built")
    if vision and args.max_length is not None and args.truncation_mode == "keep_end":
        raise UserError(
            "truncation_mode: keep_end would cut the images off rows, which stand in their prompts. Set it to "
            "keep_start, or max_length: null.",
            because="meaning",
        )
    if args.padding_free and not args.packing and not vision and args.max_length is not None:
        raise UserError(
            "padding_free does not cut rows to max_length. Set packing: true, or max_length: null for rows that are "
            "short enough already.",
            because="not built",
        )
    if (
        args.assistant_only_loss
        and row
        and not (is_conversational(dict(row)) or is_conversational_from_value(dict(row)))
    ):
        raise UserError(
            "assistant_only_loss needs conversations, and the data is plain text. Set assistant_only_loss: false, or "
            "map the data to messages.",
            because="meaning",
        )


def check_student(trainer: Any) -> None:
    """Raises UserError for students that a trainer over tokens cannot distil into."""
    if trainer.aux_loss_enabled and not balances_experts(base_of(trainer.model)):
        raise UserError(
            f"{type(base_of(trainer.model)).__name__} is a mixture of experts whose load-balancing loss transformers "
            "does not give apart from its logits. Set router_aux_loss_coef: 0 to train it without.",
            because="upstream",
        )
    if isinstance(trainer.model, PeftModel) and trainer.model.active_peft_config.is_prompt_learning:
        raise UserError(
            "Prompt learning adds positions that the teacher does not have. Use LoRA instead.", because="not built"
        )
    if trainer.get_cp_size() * trainer.get_sp_size() > 1:
        raise UserError(
            "Context and sequence parallelism cut a sequence between ranks; the teacher would see fragments. Set "
            "their sizes to 1 and shard with FSDP or ZeRO-3.",
            because="not built",
        )
    if len(devices_of(trainer.model)) > 1:
        raise UserError(
            "The student is spread over several devices by device_map. Load it without device_map and shard it "
            "with accelerate_config zero3 or fsdp2.",
            because="not built",
        )


def without_emulated_bf16(args: TrainingArguments) -> bool:
    """Turns bf16 off where the CPU would only emulate it, and returns whether it was on.

    It may come from the recipe, from TRL's default, or from an accelerate config (`mixed_precision`).
    """
    asked = args.bf16 or args.bf16_full_eval or args.mixed_precision == "bf16"
    if not asked or not args.use_cpu or cpu_multiplies(torch.bfloat16):
        return False
    args.bf16 = args.bf16_full_eval = False
    args.mixed_precision = "no"
    return True


def check_precision(args: TrainingArguments, emulated_bf16: bool) -> None:
    """Says where `without_emulated_bf16` turned bf16 off.

    Raises UserError for fp16 on a CPU, where accelerate would train in fp32 and say nothing.
    """
    if args.fp16 and args.device.type == "cpu":
        raise UserError(
            "fp16 trains on a GPU, and this is a CPU. Set bf16: true, or neither of them for fp32.", because="upstream"
        )
    if emulated_bf16:
        say_float32()


def check_supervision(
    raw: Dataset | IterableDataset, prepared: Dataset | IterableDataset, max_length: int | None
) -> None:
    """Raises UserError when preparation left no token to learn from."""
    if not isinstance(prepared, Dataset) or not isinstance(raw, Dataset):
        return
    if len(prepared) == 0:
        raise UserError(
            f"None of the {len(raw)} rows has a supervised token within max_length {max_length}: the prompts fill it, "
            "or every label is -100. Raise max_length or shorten the prompts."
        )
    rows: Any = prepared.with_format("numpy").select_columns("labels")
    if not any((row["labels"] != -100).any() for row in rows):
        raise UserError(
            "No row has a supervised token: every label is -100. Check the completion or assistant masks of the data."
        )


def check_stream(batches: int, accumulation: int, step: int) -> None:
    """Raises UserError when a stream ends after fewer micro-batches than one step takes, before any step."""
    if step == 0:
        raise UserError(
            f"The train data is a stream of {batches} batches, and gradient_accumulation_steps {accumulation} takes "
            "as many for one step. Lower it or per_device_train_batch_size, or bring more rows."
        )
