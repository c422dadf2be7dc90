"""METHODS: the one table of methods."""

import importlib
from collections.abc import Iterator, Mapping
from typing import Any


class Methods(Mapping[str, type[Any]]):
    """Name in a recipe -> trainer, imported when it is asked for; its `config_class` holds the keys of the recipe."""

    def __init__(self, places: Mapping[str, str]) -> None:
        self.places = dict(places)

    def __getitem__(self, name: str) -> type[Any]:
        module, _, attribute = self.places[name].partition(":")
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


METHODS = Methods(
    {
        "sft": "mmkd.methods.sft:SFTBaselineTrainer",
        "kd": "mmkd.methods.kd:KDTrainer",
        "taid": "mmkd.methods.taid:TAIDTrainer",
        "alm": "mmkd.methods.alm:ALMTrainer",
        "llava_kd": "mmkd.methods.llava_kd:LLaVAKDTrainer",
        "comd": "mmkd.methods.comd.comd_trainer:CoMDTrainer",
        "dho": "mmkd.methods.dho.dho_trainer:DHOTrainer",
    }
)
"""`comd` is a loop around trainings of the others; its own trainer is one round of it.

All are DistillationTrainers but `dho`, which predicts classes rather than tokens and is transformers' own Trainer.
"""
