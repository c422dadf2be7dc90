"""B16: steps of LLaVA-KD on models in the shape of a published pair, beside what `mmkd plan` says of them.

The configs and processors are the published ones, the weights random and the pictures noise. The recipe's own trainer
takes a few steps; the first one is not counted.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _measure import arguments, report
from datasets import disable_progress_bars
from transformers import AutoConfig, AutoModelForImageTextToText, TrainerCallback
from transformers.utils import logging

from mmkd.data.load_data import load_data
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.models.load import load_processing_class
from mmkd.preflight.estimate import count_teacher, count_work, memory_of, shape_of
from mmkd.preflight.facts import render, student_side, take_sample, teacher_side
from mmkd.preflight.hardware import GIB, this_device
from mmkd.recipe.recipe import Recipe
from mmkd.shipped import find_recipe
from tests.published_vlms import write_checkpoint, write_tiny_model
from tests.trainers.test_published_pairs import picture

SIZES = [(640, 480), (336, 500), (512, 512), (480, 640)]
ANSWER = "Noise of many colors, in which nobody has found a cat yet. "


class Stopwatch(TrainerCallback):
    """Seconds of each optimizer step, with the device's work done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.start = _now()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(_now() - self.start)


def main() -> None:
    parser = arguments(__doc__, dtypes=["bfloat16"])
    parser.add_argument("--pair", default="qwen2.5_vl_7b_to_3b", help="a recipe of llava_kd")
    parser.add_argument("--batch", type=int, default=1, help="rows of a step, each with one picture")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    disable_progress_bars()
    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        recipe = written_recipe(Path(folder), args)
        row = measured(recipe, args) | planned(recipe, args)
    row["used / planned GiB"] = row["GiB"] and row["GiB"] / row["planned GiB"]
    row["utilisation"] = row["TFLOPs"] / row["measured TFLOPS"] / row["s"]
    report(
        "b16",
        args.device,
        {f"One step of {args.pair}": [row]},
        settings={name: value for name, value in vars(args).items() if name != "dtype"},
    )


def written_recipe(folder: Path, args: Any) -> Recipe:
    """The last stage of the pair's recipe, with models and rows in this folder."""
    stage = Recipe.read(str(find_recipe(f"llava_kd/{args.pair}"))).stage("DFT")
    for role in ("teacher", "student"):
        name = stage.keys[role].split("/")[-1]
        write_tiny_model(name, folder / role, 0) if args.quick else write_checkpoint(name, folder / role)
    rows = []
    for number in range(args.batch * args.steps):
        picture(*SIZES[number % len(SIZES)], seed=number).save(folder / f"{number}.png")
        asked = {"from": "human", "value": "<image>\nWhat do you see here? Answer in detail."}
        told = {"from": "gpt", "value": ANSWER * 2}
        rows.append({"image": str(folder / f"{number}.png"), "conversations": [asked, told]})
    (folder / "rows.json").write_text(json.dumps(rows))
    bf16 = args.device == "cuda"
    return stage.with_(
        teacher=str(folder / "teacher"),
        student=str(folder / "student"),
        data=str(folder / "rows.json"),
        output_dir=str(folder / "run"),
        teacher_dtype="bfloat16" if bf16 else "float32",
        bf16=bf16,
        use_cpu=args.device == "cpu",
        per_device_train_batch_size=args.batch,
        gradient_accumulation_steps=1,
        max_steps=args.steps,
        max_eval_rows=None,
        dataloader_num_workers=0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def planned(recipe: Recipe, args: Any) -> dict[str, Any]:
    """What the preflight counts of a step."""
    run = recipe.parse()
    student, sample = student_side(run), take_sample(run)
    shape = shape_of(run, sample, render(run, student, sample))
    teacher = count_teacher(run, teacher_side(run), shape, args.device)
    work = count_work(run, student, teacher, shape, args.device)
    device = this_device(torch.bfloat16 if args.device == "cuda" else torch.float32)
    return {
        "planned GiB": sum(memory_of(work, "ddp", 1).values()) / GIB,
        "TFLOPs": work.flops / 1e12,
        "measured TFLOPS": device.flops / 1e12,
    }


def measured(recipe: Recipe, args: Any) -> dict[str, Any]:
    """Seconds and memory of a step. The models have no weights on disk, so that they are made and not loaded."""
    run, models, processors = recipe.parse(), {}, {}
    for role, dtype in (("student", torch.float32), ("teacher", getattr(torch, run.arguments.teacher_dtype))):
        folder = str(getattr(run.arguments, role))
        with torch.device(args.device):
            models[role] = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
        processors[role] = load_processing_class(folder, role)
    watch = Stopwatch()
    trainer = LLaVAKDTrainer(
        models["student"],
        models["teacher"],
        run.training,
        train_dataset=load_data(run.arguments.data)["train"],
        processing_class=processors["student"],
        teacher_processing_class=processors["teacher"],
        callbacks=[watch],
    )
    trainer.train()
    memory = torch.cuda.max_memory_allocated() / GIB if args.device == "cuda" else None
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"step": recipe.keys["method"], "s": min(watch.seconds[1:]), "GiB": memory, "loss": losses[-1]}


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
