"""METHODS: the one table of methods."""

from .base import DistillationTrainer
from .kd import KDTrainer
from .llava_kd import LLaVAKDTrainer
from .sft import SFTBaselineTrainer
from .taid import TAIDTrainer

METHODS: dict[str, type[DistillationTrainer]] = {
    trainer.method: trainer for trainer in (SFTBaselineTrainer, KDTrainer, TAIDTrainer, LLaVAKDTrainer)
}
"""Name in a recipe -> trainer; its `config_class` holds the keys the recipe may set."""
