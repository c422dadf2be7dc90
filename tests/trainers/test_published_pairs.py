"""Recipes of published pairs: tiny models train with the real processors; doctor and plan pass the true sizes."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from PIL import Image

from mmkd.commands.main import main
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.models.parts import part_of
from mmkd.recipe.recipe import Recipe
from mmkd.shipped import find_recipe, recipe_root, summary_of
from tests.helpers import Build, losses_of
from tests.published_vlms import write_checkpoint, write_tiny_model
from tests.trainers.test_llava_kd import one_batch

TOKENS = {
    "qwen3_vl_8b_to_2b": (72, 72),
    "qwen2.5_vl_7b_to_3b": (10, 10),
    "smolvlm2_2.2b_to_500m": (576, 729),
    "smolvlm2_2.2b_to_256m": (576, 729),
    "internvl3.5_8b_to_1b": (768, 768),
    "gemma3_12b_to_4b": (256, 256),
    "llava_onevision_7b_to_0.5b": (1093, 1093),
}
"""Recipe -> the visual tokens of a picture of 128 x 64 pixels, the student's and the teacher's."""

ALIKE = {"smolvlm2_2.2b_to_256m": "smolvlm2_2.2b_to_500m"}


PICTURES = [(640, 480), (336, 500), (224, 224), (480, 640)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def stage(recipe: str, name: str) -> Recipe:
    return Recipe.read(str(find_recipe(f"llava_kd/{recipe}"))).stage(name)


def write_data(recipe: str, folder: Path) -> None:
    """The files that the data recipes of a recipe read, with a few pictures in many rows."""
    for name in ("DPT", "DFT"):
        data = yaml.safe_load((recipe_root("data_recipes") / f"{stage(recipe, name).keys['data']}.yaml").read_text())
        (folder / data["image_folder"]).mkdir(parents=True)
        for number, size in enumerate(PICTURES):
            picture(*size, seed=number).save(folder / data["image_folder"] / f"{number}.png")
        rows = [
            {
                "image": f"{number % len(PICTURES)}.png",
                "conversations": [
                    {"from": "human", "value": f"<image>\nWhat is this, the {number}th?"},
                    {"from": "gpt", "value": f"Noise of kind {7 * number}."},
                ],
            }
            for number in range(data["eval_rows"] + 40)
        ]
        (folder / data["data_files"]["train"]).write_text(json.dumps(rows))


@pytest.mark.slow
@pytest.mark.parametrize("recipe", TOKENS)
def test_doctor_and_plan_pass_the_recipe_of_a_pair(recipe: str, monkeypatch, tmp_path: Path, capsys) -> None:
    """With the true configs, in a folder where their Hub ids are folders without weights."""
    monkeypatch.chdir(tmp_path)
    keys = stage(recipe, "DFT").keys
    for name in (keys["teacher"], keys["student"]):
        write_checkpoint(name.split("/")[-1], tmp_path / name)
    write_data(recipe, tmp_path)
    hardware = re.fullmatch(r"(\d+) GPUs? of 80 GB", summary_of(f"llava_kd/{recipe}.yaml").hardware)
    assert hardware is not None
    assert main(["plan", f"llava_kd/{recipe}", "--gpu", "A100-80GB", "--gpus", hardware[1]]) == 0
    assert main(["doctor", f"llava_kd/{recipe}"]) == 0
    findings = re.findall(r"^  (warning|problem) +(\S+(?: \S+)*)  ", capsys.readouterr().out, re.MULTILINE)
    # This machine lacks the memory. Where the sides differ in a picture's tokens, the context of an answer does too.
    unequal = {("warning", "chat template")} if len({*TOKENS[recipe]}) > 1 else set()
    assert {*findings} <= {("warning", "memory")} | unequal


@pytest.mark.parametrize(
    "recipe", [pytest.param(name, marks=[pytest.mark.slow] if name in ALIKE else []) for name in TOKENS]
)
def test_tiny_models_of_a_pair_train_with_its_processors(recipe: str, build: Build, tmp_path: Path) -> None:
    keys = stage(recipe, "DFT").keys
    models = {
        name: str(write_tiny_model(keys[key].split("/")[-1], tmp_path / key, seed))
        for seed, (name, key) in enumerate({"model": "student", "teacher": "teacher"}.items())
    }
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]},
    ]
    data = Dataset.from_list([{"messages": messages, "images": [picture(128, 64)]}])
    settings = {name: keys[name] for name in ("assistant_only_loss", "max_length")}
    settings |= {name: keys[name] for name in ("visual_tokens",) if name in keys}
    size = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "max_steps": 1, "learning_rate": 1e-2}
    trainer: Any = build(LLaVAKDTrainer, data, trainer=models, **settings, **size)
    batch = one_batch(trainer, 1)
    assert tuple(int(view.images[0, 1]) for view in (batch.student, batch.teacher_view())) == TOKENS[recipe]
    if recipe.startswith("smolvlm2"):
        runs = [view.image_runs.tolist() for view in (batch.student, batch.teacher_view())]
        assert runs == [[64] * 9, [81] * 9], "a tile is pooled by itself"
    before = {name: weights.detach().clone() for name, weights in trainer.model.named_parameters()}
    trainer.train()
    assert losses_of(trainer, "visual_kl")[0] > 0
    moved = {
        part_of(name) for name, now in trainer.model.named_parameters() if not torch.equal(now.cpu(), before[name])
    }
    assert moved == {"vision_tower", "connector", "language_model"}
