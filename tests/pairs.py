"""Tiny trainings of dual encoders, which tests share."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from datasets import Dataset, Features, Image, Value
from torch import Tensor

from mmkd.commands.main import main
from mmkd.methods.clip_kd.clip_config import ContrastiveKDConfig
from mmkd.methods.clip_kd.clip_trainer import ContrastiveKDTrainer
from mmkd.models.dual_encoder import DualEncoder, load_dual_encoder
from mmkd.teachers.pair_scorers import PairScorer
from tests.dual_encoders import caption, make_clip, photo

EVERY_TERM: dict[str, Any] = {
    "clip_weight": 0.7,
    "logit_kl_weight": 0.5,
    "affinity_weight": 0.1,
    "feature_mse_weight": 3.0,
    "icl_weight": 0.4,
    "affinity_scale": 5.0,
}
ORDERS: dict[str, Any] = {
    "ranking": "pld",
    "ranking_weight": 0.3,
    "ranking_negatives": 3,
    "hard_negatives": "teacher",
    "hard_negatives_weight": 0.2,
    "hard_negatives_count": 3,
}
"""The terms of the order of wrong answers, which those of all ranks are."""


def captioned(count: int, first: int = 0, captions: int = 24) -> Dataset:
    """Pictures of noise with captions, of which there are so many different ones."""
    numbers = range(first, first + count)
    rows = [{"image": photo(number), "text": caption(number % captions)} for number in numbers]
    return Dataset.from_list(rows, features=Features({"image": Image(), "text": Value("string")}))


def text_pairs(count: int) -> Dataset:
    """Pairs of texts."""
    return Dataset.from_list([{"text": f"the {caption(number)}", "pair": caption(number)} for number in range(count)])


def student_and_teacher(folder: Path) -> tuple[DualEncoder, DualEncoder]:
    """A CLIP of 8 x 8 pixels, and a wider and deeper one of 12 x 12."""
    student = load_dual_encoder(str(make_clip(folder / "student", seed=0)))
    return student, load_dual_encoder(str(make_clip(folder / "teacher", seed=1, layers=2, width=20, image_size=12)))


def clip_kd(folder: Path, trainer: dict[str, Any] | None = None, **settings: Any) -> ContrastiveKDTrainer:
    """A trainer of a tiny CLIP with one teacher, of batches of 8 pairs."""
    usual: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 8, "learning_rate": 1e-2}
    # Adam makes steps of rounding errors where the gradient is 0, as that of the bias of keys is.
    usual |= {"optim": "sgd", "logging_steps": 1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
    args = ContrastiveKDConfig(output_dir=str(folder / "out"), **{**usual, "seed": 3, **settings})
    # Of several ranks only the first one writes models.
    with PartialState().main_process_first():
        student, teacher = student_and_teacher(folder)
    given: dict[str, Any] = {"model": student, "teachers": teacher, "train_dataset": captioned(24)}
    return ContrastiveKDTrainer(args=args, **{**given, **(trainer or {})})


class WordsInCommon(PairScorer):
    """A scorer of pairs of texts without a model: the words that both have, and how long they are."""

    def __init__(self) -> None:
        super().__init__("words", batch_size=4)

    def score(self, pairs: Sequence[tuple[Any, str]]) -> Tensor:
        """The words that two texts share, less a little for the characters that they differ by."""
        shared = [len(set(first.split()) & set(text.split())) for first, text in pairs]
        lengths = [abs(len(first) - len(text)) for first, text in pairs]
        return torch.tensor(shared) - torch.tensor(lengths) / 10

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the scores."""
        return {"scorer": "words"}


ADAPTER: dict[str, Any] = {"r": 4, "lora_alpha": 16}
"""A LoRA adapter of every linear layer of a dual encoder."""

MASKED: dict[str, Any] = {"per_device_train_batch_size": 4, "inherit": "auto", "inherit_target": 0.5, **EVERY_TERM}
"""Masks that are learnt on the way."""

SCORED: dict[str, Any] = {"ranking": "pld", "ranking_teacher": "words", "ranking_weight": 0.3, "ranking_negatives": 3}
"""The order of a slow scorer, which `WordsInCommon` is in tests."""


def cached_teacher(folder: Path) -> str:
    """A cache of what the teacher of `clip_kd` says of the pairs of `captioned(24)`."""
    rows = []
    for number in range(24):
        photo(number).save(folder / f"{number}.png")
        rows.append({"image": str(folder / f"{number}.png"), "text": caption(number)})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    student_and_teacher(folder)
    recipe: dict[str, Any] = {"method": "clip_kd", "data": str(folder / "rows.jsonl"), "output_dir": "out"}
    recipe |= {name: str(folder / name) for name in ("student", "teacher")}
    recipe |= {"teacher_cache": str(folder / "cache"), "cache_embedding_dtype": "float32"}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    assert main(["cache", "build", str(path)]) == 0
    return str(folder / "cache")


def sums_of(folder: Path) -> dict[str, float]:
    """The sum of each weight of a student that a training has left."""
    model: Any = load_dual_encoder(str(folder)).model
    return {name: float(own.detach().double().sum()) for name, own in model.named_parameters()}
