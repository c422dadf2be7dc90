"""METHODS: the one table of methods."""

from .base import DistillationTrainer
from .kd import KDTrainer
from .sft import SFTBaselineTrainer
from .taid import TAIDTrainer

METHODS: dict[str, type[DistillationTrainer]] = {
    trainer.method: trainer for trainer in (SFTBaselineTrainer, KDTrainer, TAIDTrainer)
}
"""Name in a recipe -> trainer; its `config_class` holds the keys the recipe may set."""
