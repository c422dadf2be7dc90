"""METHODS: the one table of methods."""

from .alm import ALMTrainer
from .base import DistillationTrainer
from .kd import KDTrainer
from .llava_kd import LLaVAKDTrainer
from .sft import SFTBaselineTrainer
from .taid import TAIDTrainer

METHODS: dict[str, type[DistillationTrainer]] = {
    trainer.method: trainer for trainer in (SFTBaselineTrainer, KDTrainer, TAIDTrainer, ALMTrainer, LLaVAKDTrainer)
}
"""Name in a recipe -> trainer; its `config_class` holds the keys the recipe may set."""
