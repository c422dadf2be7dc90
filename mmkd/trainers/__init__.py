"""METHODS: the one table of methods."""

from typing import Any

from .alm import ALMTrainer
from .comd import CoMDTrainer
from .dho import DHOTrainer
from .kd import KDTrainer
from .llava_kd import LLaVAKDTrainer
from .sft import SFTBaselineTrainer
from .taid import TAIDTrainer

METHODS: dict[str, type[Any]] = {
    trainer.method: trainer
    for trainer in (SFTBaselineTrainer, KDTrainer, TAIDTrainer, ALMTrainer, LLaVAKDTrainer, CoMDTrainer, DHOTrainer)
}
"""Name in a recipe -> trainer; its `config_class` holds the keys the recipe may set.

`comd` is a loop around trainings of the others (`mmkd.comd`); its own trainer is one round of it.
All are DistillationTrainers but `dho`, which predicts classes rather than tokens and is transformers' own Trainer.
"""
