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
from mmkd.recipe.recipe import Recipe

from .draft import Draft, counted
from .init_answers import Answers
from .init_tasks import TASKS
from .memory_fit import LORA, Fit, Looked, fit_tokens, savings

_LONGEST = 2048
"""Tokens of a row beyond which rows are cut unless the user raises it: attention and activations grow with it."""


def draft_tokens(answers: Answers, console: Console) -> tuple[Draft, Fit]:
    """The recipe of answers, and how it fits the device. Raises UserError for data and models that do not go together.

    Loads configs, tokenizers and a sample of rows, and no weights.
    """
    draft = Draft()
    method = answers.task.method
    _models(draft, answers)
    draft.set("data", "data", answers.data)
    draft.set("training", "output_dir", answers.output_dir, "The student, its checkpoints and its logs.")
    run = Recipe.of(draft.keys, answers.output).parse()
    sample = take_sample(run)
    columns = sample.rows["train"].column_names
    _check_columns(answers, columns)
    student, teacher = student_side(run), teacher_side(run)
    method, why = _method(answers, student, teacher, console)
    draft.set("models", "method", method, why)
    if set(columns) == {"prompt"}:
        # Such rows can be read by nothing else.
        run = Recipe.of({**draft.keys, "on_policy_fraction": 1.0}, answers.output).parse()
    rendered = render(run, student, sample)
    looked = Looked(student, teacher, sample, rendered)
    longest = max((len(row.ids) for row in rendered.usable), default=0)
    if not longest:
        raise UserError(f"No row of {answers.data} can be used. `mmkd data preview {answers.data}` shows why.")
    limit = min([_LONGEST, *(limit for side in (student, teacher) if (limit := positions_of(side.config)))])
    length = min(limit, 64 * math.ceil((longest + 1) / 64))
    cut = f"; longer rows are cut at this, and {longest:,} would cut none of them" if longest > length else ""
    draft.set(
        "data",
        "max_length",
        length,
        f"Tokens of a row. The longest of {len(rendered.usable)} sampled rows has {longest:,}{cut}.",
    )
    if "messages" in columns:
        draft.set("data", "assistant_only_loss", True, "Learn what the assistant says, and not what it is asked.")
    _learnt(draft, answers, method, columns, looked)
    rows = sample.totals["train"]
    most = 32 if answers.device.kind != "cpu" else 8
    if rows is not None:
        # A run of a handful of steps learns little: small data get small batches.
        most = min(most, max(4, 2 ** int(math.log2(max(1, rows // 16)))))
    fit = fit_tokens(Recipe.of(draft.keys, answers.output), looked, answers.device, _tries(answers, method), most)
    _memory(draft, answers, fit, most)
    _training(draft, answers, fit, sample)
    return draft, fit


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


def _method(answers: Answers, student: Side, teacher: Side, console: Console) -> tuple[str, str]:
    """The method for two tokenizers, and why."""
    method = answers.task.method
    try:
        tokens = shared_tokens(student.tokenizer, teacher.tokenizer, student.rows, teacher.rows)
    except UserError:
        if method not in ("alm", "comd"):
            console.print(
                Text(
                    f"{student.name} and {teacher.name} have different tokenizers, so the method is alm: it compares "
                    "how likely both find the same text. (Task other-tokenizer.)",
                    style="yellow",
                )
            )
            method = "alm"
        if student.is_vision and method == "alm":
            raise UserError(
                f"{student.name} and {teacher.name} have different tokenizers, and alm is for text. Name two models "
                "of one family, such as the suggested ones.",
                because="not built",
            ) from None
        return method, _METHODS[method]
    if method == "alm":
        console.print(
            Text(f"Both have the same {tokens:,} tokens: `method: kd` would compare them one by one.", style="yellow")
        )
    return method, _METHODS[method]


_METHODS = {
    "kd": "The student learns the teacher's distribution over every next token.",
    "llava_kd": "The student learns the teacher's distribution over the answer and at the visual tokens, and how "
    "these relate.",
    "alm": "Student and teacher have different tokenizers: chunks of text that end a token on both are compared.",
    "comd": "In each round the student's failures decide what the teacher is asked next.",
}


def _check_columns(answers: Answers, columns: list[str]) -> None:
    """Raises UserError for rows that the task cannot learn from."""
    task, images = answers.task.name, "images" in columns
    if task == "vlm" and not images:
        raise UserError(
            f"{answers.data} has no pictures (its rows have {', '.join(columns)}), which task vlm learns from. Choose "
            "task text, or data with pictures."
        )
    if images and task not in ("vlm", "comd", "on-policy", "served-teacher"):
        raise UserError(f"{answers.data} has pictures, and task {task} is about text. Choose task vlm.")
    if set(columns) == {"prompt"} and task not in ("on-policy", "comd"):
        raise UserError(
            f"{answers.data} has prompts and no answers, which task {task} learns from. Choose task on-policy or "
            "comd, or let the teacher write answers first: `mmkd cache build RECIPE --job generate`."
        )


def _learnt(draft: Draft, answers: Answers, method: str, columns: list[str], looked: Looked) -> None:
    """The keys of the method."""
    if answers.task.name == "on-policy":
        prompts = set(columns) == {"prompt"}
        draft.set(
            "method",
            "on_policy_fraction",
            1.0 if prompts else 0.5,
            "The data has prompts only, so that the student answers all of them."
            if prompts
            else "Share of the prompts that the student answers itself; the others have the data's answers.",
        )
        room = int(draft.keys["max_length"]) // 2
        draft.set(
            "method", "rollout_max_tokens", min(128, max(1, room)), "A student goes wrong early: short ones will do."
        )
        if "text" in columns:
            draft.set(
                "method", "rollout_prompt_tokens", max(1, min(64, room)), "Plain text: so much of it is continued."
            )
    if method == "kd" and "divergence" not in draft.keys:
        draft.set(
            "method",
            "divergence",
            "forward_kl",
            "Covers all that the teacher would say; safest for small students. "
            "Try jsd or reverse_kl against rambling.",
        )
        draft.set("method", "temperature", 1.0)
    if method == "llava_kd":
        _visual(draft, looked)
    if method == "alm":
        draft.set("method", "ce_weight", 0.1, "A little of the data's own text keeps the student's spelling right.")
    if method == "comd":
        _rounds(draft, answers, "images" in columns)


def _visual(draft: Draft, looked: Looked) -> None:
    student, teacher = looked.student.config, looked.teacher and looked.teacher.config
    towers = [getattr(config.vision_config, "image_size", None) for config in (student, teacher) if config]
    patches = [getattr(config.vision_config, "patch_size", None) for config in (student, teacher) if config]
    if len({*map(str, towers)}) > 1 or len({*map(str, patches)}) > 1:
        draft.set(
            "method",
            "visual_mismatch",
            "pool",
            "The two cut pictures into different numbers of tokens: the finer one is averaged.",
        )


def _rounds(draft: Draft, answers: Answers, images: bool) -> None:
    served = answers.server is not None
    draft.set("method", "rounds", 2, "After the first, which learns the teacher's answers to your own questions.")
    assessor = "agreement" if images else "rouge" if served else "likelihood"
    draft.set(
        "method",
        "assessor",
        assessor,
        "Finds what the student fails at. `judge` lets the teacher rate both answers, which needs one of 7B or more.",
    )
    draft.set(
        "method",
        "augmentor",
        "templates" if images else "model",
        "New questions are questions of yours about other pictures."
        if images
        else "The teacher writes new questions like those that the student fails at.",
    )
    draft.set("method", "new_instructions", 256, "New questions per round.")
    room = max(1, int(draft.keys["max_length"]) // 2)
    draft.set("method", "answer_max_new_tokens", min(256, room), "Longer answers are left out.")
    draft.set("method", "held_out_metric", "rouge", "How held-out answers are compared with yours.")


def _tries(answers: Answers, method: str) -> list[dict[str, Any]]:
    """What may be saved to fit the device."""
    cache: dict[str, Any] | None = None
    if answers.task.name != "on-policy" and answers.server is None and method == "kd":
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


def _training(draft: Draft, answers: Answers, fit: Fit, sample: Sample) -> None:
    rows, columns = sample.totals["train"], sample.rows["train"].column_names
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
    has_eval = "eval" in sample.rows and columns != ["prompt"]
    schedule(draft, rows, fit.batch * draft.keys["gradient_accumulation_steps"], epochs, has_eval)


def _learning_rate(answers: Answers, saved: Mapping[str, Any]) -> tuple[float, str]:
    if "use_peft" in saved:
        return 2e-4, f"For LoRA ({LORA['lora_target_modules']})."
    if answers.student is None:
        return 3e-4, "A cut student has to find its way back, which takes larger steps than a whole one."
    if answers.task is TASKS["vlm"]:
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
