"""The recipe of a training over tokens, made of answers, of a sample of the data, and of the estimate of memory."""

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from mmkd.alignment.vocab import shared_tokens
from mmkd.errors import UserError
from mmkd.models.load import positions_of
from mmkd.preflight.facts import Sample, Side, render, student_side, take_sample, teacher_side
from mmkd.preflight.hardware import GIB
from mmkd.preparation.prompt_rows import prompts_only
from mmkd.recipe.recipe import Recipe

from .draft import Draft, counted
from .init_answers import Answers
from .init_tasks import OTHER_TOKENIZER, TASKS, named
from .memory_fit import LORA, Fit, Looked, fit_tokens, savings
from .token_methods import ROLLOUT_TOKENS, TOKEN_METHODS, MethodFacts, TokenMethod, set_rollouts

_LONGEST = 2048
"""Tokens of a row beyond which rows are cut unless the user raises it: attention and activations grow with it."""


def draft_tokens(answers: Answers, console: Console) -> tuple[Draft, Fit]:
    """The recipe of answers, and how it fits the device. Raises UserError for data and models that do not go together.

    Loads configs, tokenizers and a sample of rows, and no weights.
    """
    draft = Draft()
    _models(draft, answers)
    draft.set("data", "data", answers.data)
    draft.set("training", "output_dir", answers.output_dir, "The student, its checkpoints and its logs.")
    asked = TOKEN_METHODS[answers.task.method].answer_tokens
    assumed = {"answer_max_new_tokens": asked} if asked else {}
    run = Recipe.of({**draft.keys, **assumed}, answers.output).parse()
    sample = take_sample(run)
    columns = sample.rows["train"].column_names
    _check_columns(answers, columns)
    student, teacher = student_side(run), teacher_side(run)
    method = _method(answers, student, teacher, console)
    draft.set("models", "method", method.name, method.why)
    if prompts_only(columns):
        # Such rows can be read by nothing else.
        run = Recipe.of({**draft.keys, "on_policy_fraction": 1.0}, answers.output).parse()
    rendered = render(run, student, sample)
    looked = Looked(student, teacher, sample, rendered)
    longest = max((len(row.ids) for row in rendered.usable), default=0)
    if not longest:
        raise UserError(f"No row of {answers.data} can be used. `mmkd data preview {answers.data}` shows why.")
    # Without the stand-in for an answer.
    longest -= sample.assumed_answer or 0
    _length(draft, looked, longest, method.answer_tokens or (ROLLOUT_TOKENS if prompts_only(columns) else 0))
    if "messages" in columns:
        draft.set("data", "assistant_only_loss", True, "Learn what the assistant says, and not what it is asked.")
    answered = sample.assumed_answer is None and not prompts_only(columns)
    room = int(draft.keys["max_length"]) - longest
    facts = MethodFacts(student, teacher, columns, answers.server is not None, answered, room)
    if answers.task.rollouts:
        set_rollouts(draft, facts)
    method.set_keys(draft, facts)
    rows = sample.totals["train"]
    most = 32 if answers.device.kind != "cpu" else 8
    if rows is not None:
        # A run of a handful of steps learns little: small data get small batches.
        most = min(most, max(4, 2 ** int(math.log2(max(1, rows // 16)))))
    fit = fit_tokens(Recipe.of(draft.keys, answers.output), looked, answers.device, _tries(answers, method), most)
    _memory(draft, answers, fit, most)
    _training(draft, answers, fit, sample, answered)
    return draft, fit


def _length(draft: Draft, looked: Looked, longest: int, answer: int) -> None:
    """max_length, with room for an answer that a model writes."""
    sides = [side for side in (looked.student, looked.teacher) if side is not None]
    limit = min([_LONGEST, *(limit for side in sides if (limit := positions_of(side.config)))])
    length = min(limit, 64 * math.ceil((longest + answer + 1) / 64))
    sampled = f"The longest of {len(looked.rendered.usable)} sampled rows has {longest:,}"
    room = f", and room is left for a new answer of up to {answer}" if answer else ""
    cut = f"; longer rows are cut at this, and {longest:,} would cut none of them" if longest > length else ""
    draft.set("data", "max_length", length, f"Tokens of a row. {sampled}{room}{cut}.")


def _models(draft: Draft, answers: Answers) -> None:
    draft.set("models", "method", answers.task.method)
    draft.set("models", "teacher", answers.teacher)
    dtype = "Half the memory of float32, at no loss that shows."
    draft.set("models", "teacher_dtype", "bfloat16", dtype)
    if answers.server is not None:
        draft.set(
            "models",
            "teacher_server",
            [answers.server],
            "vLLM runs the teacher: scripts/serve_teacher.sh "
            f"{answers.teacher}. Of the teacher only the tokenizer is read here.",
        )
        draft.set("models", "teacher_top_k", 64, "Outcomes of each token that the server tells.")
    if answers.student is None:
        draft.set("models", "student_init", "prune", "The student begins as a copy of some of the teacher's layers.")
        draft.set("models", "student_layers", answers.keep_layers, "How many of them; spread evenly.")
    else:
        draft.set("models", "student", answers.student)


def _method(answers: Answers, student: Side, teacher: Side, console: Console) -> TokenMethod:
    """The method for two tokenizers: that of the task where it fits them."""
    method = TOKEN_METHODS[answers.task.method]
    try:
        tokens = shared_tokens(student.tokenizer, teacher.tokenizer, student.rows, teacher.rows)
    except UserError:
        if method.tokenizers == "same":
            method = TOKEN_METHODS[OTHER_TOKENIZER.method]
            console.print(
                Text(
                    f"{student.name} and {teacher.name} have different tokenizers, so the method is {method.name}. "
                    f"{method.why} (Task {OTHER_TOKENIZER.name}.)",
                    style="yellow",
                )
            )
        if student.is_vision and not method.images:
            raise UserError(
                f"{student.name} and {teacher.name} have different tokenizers, and {method.name} is for text. Name "
                "two models of one family, such as the suggested ones.",
                because="not built",
            ) from None
        return method
    if method.tokenizers == "different":
        console.print(
            Text(f"Both have the same {tokens:,} tokens: `method: kd` would compare them one by one.", style="yellow")
        )
    return method


def _check_columns(answers: Answers, columns: list[str]) -> None:
    """Raises UserError for rows that the task cannot learn from."""
    task, images = answers.task, "images" in columns
    if task.images == "needed" and not images:
        raise UserError(
            f"{answers.data} has no pictures (its rows have {', '.join(columns)}), which task {task.name} learns "
            "from. Choose task text, or data with pictures."
        )
    if images and task.images == "unread":
        raise UserError(f"{answers.data} has pictures, and task {task.name} is about text. Choose task vlm.")
    if prompts_only(columns) and not task.takes_prompts:
        takers = named([other.name for other in TASKS.values() if other.takes_prompts])
        raise UserError(
            f"{answers.data} has prompts and no answers, which task {task.name} learns from. Choose task {takers}, or "
            "let the teacher write answers first: `mmkd cache build RECIPE --job generate`."
        )


def _tries(answers: Answers, method: TokenMethod) -> list[dict[str, Any]]:
    """What may be saved to fit the device."""
    cache: dict[str, Any] | None = None
    if method.reads_cache and not answers.task.rollouts and answers.server is None:
        cache = {"teacher_cache": answers.teacher_folder}
    tries = savings(answers.device, cache, answers.teacher if answers.student is None else None)
    if answers.server is not None:
        # Its weights are elsewhere.
        tries = [{key: value for key, value in keys.items() if key != "teacher_load_in_4bit"} for keys in tries]
        tries = [keys for place, keys in enumerate(tries) if keys not in tries[:place]]
    return tries


_SAVINGS = {
    "activation_checkpointing": (
        "Computes activations again instead of keeping them: a third slower, for much less memory.",
        "All activations fit, so nothing is computed twice.",
    ),
    "teacher_load_in_4bit": ("The teacher in 4 bits (pip install 'mmkd[quant]'): it would not fit otherwise.", ""),
    "student": ("Named since a quantised teacher cannot be cut into a student.", ""),
    "teacher_cache": (
        "Teacher and student do not fit together: the teacher runs once, before training (mmkd cache build).",
        "",
    ),
    "use_peft": ("LoRA: gradients and optimizer of the whole student would not fit.", ""),
    "load_in_4bit": ("The student's own weights in 4 bits (QLoRA).", ""),
}


def _memory(draft: Draft, answers: Answers, fit: Fit, most: int) -> None:
    """Batch and savings, with what the estimate says of them."""
    rows = f"{counted(fit.batch)} at a time"
    what = f"{rows} take about {max(0.1, fit.memory / GIB):.1f} GiB on {answers.device.name} (`mmkd plan`'s estimate)."
    if not fit.fits:
        what = f"IT DOES NOT FIT: {what} Take a smaller teacher or student, or have a server run the teacher (task "
        what += "served-teacher)."
    draft.set("memory", "per_device_train_batch_size", fit.batch, what)
    draft.set("memory", "per_device_eval_batch_size", fit.batch)
    steps = max(1, most // fit.batch)
    draft.set("memory", "gradient_accumulation_steps", steps, f"Batches of {steps * fit.batch} rows per update.")
    for key, value in fit.keys.items():
        why, otherwise = _SAVINGS.get(key, ("", ""))
        draft.set("models" if key == "student" else "memory", key, value, why if value else otherwise)


def _training(draft: Draft, answers: Answers, fit: Fit, sample: Sample, answered: bool) -> None:
    rows = sample.totals["train"]
    epochs = 1 if rows is None or rows > 20_000 else 3
    total = "how many rows there are is not known" if rows is None else f"{rows:,} rows"
    draft.set("training", "num_train_epochs", epochs, f"Passes over the data: {total}.")
    rate, why = _learning_rate(answers, fit.keys)
    draft.set("training", "learning_rate", rate, why)
    draft.set("training", "lr_scheduler_type", "cosine")
    draft.set("training", "warmup_steps", 0.05, "A share of all steps.")
    if "dtype" not in fit.keys:
        draft.set("training", "dtype", "float32", "The student's weights, so that small updates are not rounded away.")
    draft.set("training", "bf16", True, "Products in bf16. A CPU without instructions for it computes in float32.")
    has_eval = "eval" in sample.rows and answered
    schedule(draft, rows, fit.batch * draft.keys["gradient_accumulation_steps"], epochs, has_eval)


def _learning_rate(answers: Answers, saved: Mapping[str, Any]) -> tuple[float, str]:
    if "use_peft" in saved:
        return 2e-4, f"For LoRA ({LORA['lora_target_modules']})."
    if answers.student is None:
        return 3e-4, "A cut student has to find its way back, which takes larger steps than a whole one."
    if answers.task.images == "needed":
        return 2e-5, "Usual for whole vision-language models."
    return 5e-5, "Usual for whole language models; halve it if the loss jumps."


def schedule(draft: Draft, rows: int | None, batch: int, epochs: float, has_eval: bool) -> None:
    """How often a run logs, evaluates and saves; the same for every method."""
    steps = None if rows is None else max(1, math.ceil(rows / batch) * epochs)
    often = 250 if steps is None else int(min(250, max(1, steps // 4)))
    draft.set("logs", "logging_steps", 10 if steps is None else int(min(10, max(1, steps // 20))))
    if has_eval:
        draft.set("logs", "eval_strategy", "steps", "Held-out rows say whether it still gets better.")
        draft.set("logs", "eval_steps", often)
    draft.set("logs", "save_strategy", "steps", "A stopped run goes on with --resume_from_checkpoint true.")
    draft.set("logs", "save_steps", often)
    draft.set("logs", "save_total_limit", 1)
    draft.set("logs", "report_to", "none", "Or wandb, tensorboard, trackio, mlflow.")
    draft.set("logs", "seed", 0)
