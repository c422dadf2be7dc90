"""Tiny vision towers, their pictures, and trainings of them, which tests share."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import CLIPVisionConfig, CLIPVisionModel, Dinov2Config, Dinov2Model
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from mmkd.methods.tower_kd.tower_config import TowerKDConfig
from mmkd.methods.tower_kd.tower_trainer import TeacherTower, TowerKDTrainer
from tests.classes import pictures
from tests.helpers import VISION

TEACHER: dict[str, Any] = {**VISION, "hidden_size": 24, "num_hidden_layers": 3, "initializer_range": 0.3}


def pixels_of(side: int) -> ViTImageProcessorPil:
    """Makes images of so many pixels a side."""
    return ViTImageProcessorPil(size={"height": side, "width": side})


def clip_tower(seed: int = 0, **sizes: Any) -> CLIPVisionModel:
    """A random CLIP tower of 2 x 2 patches."""
    torch.manual_seed(seed)
    return CLIPVisionModel(CLIPVisionConfig(**{**VISION, "initializer_range": 0.3, **sizes}))


def dino_tower(seed: int = 0, side: int = 12) -> Dinov2Model:
    """A random DINOv2 of patches of 4 pixels, of another resolution than `clip_tower`'s."""
    torch.manual_seed(seed)
    config = Dinov2Config(hidden_size=20, num_hidden_layers=2, num_attention_heads=2, image_size=side, patch_size=4)
    config.initializer_range = 0.3
    return Dinov2Model(config)


def teachers() -> dict[str, TeacherTower]:
    """Two teachers of other widths, depths, classes and resolutions."""
    clip = TeacherTower(clip_tower(1, **{**TEACHER, "hidden_size": 24}), pixels_of(8), 3.0)
    return {"clip": clip, "dino": TeacherTower(dino_tower(2), pixels_of(12))}


def tower_kd(
    folder: Path | str, trainer: dict[str, Any] | None = None, rows: Dataset | None = None, **settings: Any
) -> TowerKDTrainer:
    """A trainer of a tiny tower with one teacher, two rows per step."""
    usual = {"max_steps": 3, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1}
    # Adam makes steps of rounding errors where the gradient is 0, as that of the bias of keys is.
    usual |= {"optim": "sgd"}
    usual |= {"report_to": "none", "save_strategy": "no", "disable_tqdm": True, "augmentation": "none", "seed": 3}
    args = TowerKDConfig(output_dir=str(folder), **{**usual, **settings})
    torch.manual_seed(0)
    given: dict[str, Any] = {
        "model": clip_tower(),
        "teachers": TeacherTower(clip_tower(1, **TEACHER), pixels_of(8)),
        "train_dataset": pictures(4) if rows is None else rows,
        "processing_class": pixels_of(8),
    }
    return TowerKDTrainer(args=args, **{**given, **(trainer or {})})
