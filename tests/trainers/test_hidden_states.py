"""A teacher whose last hidden states are served teaches what the same model teaches in this process."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from mmkd.methods.kd import KDTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.served_head import head_of_checkpoint
from tests.helpers import Build, losses_of
from tests.teachers.fake_vllm import ServedStates, fake_vllm


@pytest.fixture
def served(tiny: dict[str, Path]) -> Iterator[HiddenServerTeacher]:
    model = AutoModelForCausalLM.from_pretrained(tiny["teacher"]).eval()
    with fake_vllm(ServedStates, served=model, max_model_len=512) as fake:
        teacher = HiddenServerTeacher(fake.url, head_of_checkpoint(str(tiny["teacher"])))
        with teacher.client:
            yield teacher


@pytest.mark.parametrize(
    ("trainer", "settings"),
    [
        (KDTrainer, {"divergence": "reverse_kl", "temperature": 2.0}),
        (KDTrainer, {"divergence": "adaptive_kl", "packing": True}),
        (KDTrainer, {"divergence": "jsd", "combine": "gradmag", "ce_weight": 0.5}),
        (TAIDTrainer, {}),
    ],
    ids=lambda value: value.method if isinstance(value, type) else "-".join(map(str, value.values())),
)
def test_losses_are_those_of_a_local_teacher(
    build: Build, completions: Any, tiny: dict[str, Path], served: HiddenServerTeacher, trainer: Any, settings: Any
) -> None:
    losses = []
    for teacher in (str(tiny["teacher"]), served):
        trained = build(trainer, completions, {"teacher": teacher}, max_steps=2, **settings)
        trained.train()
        losses.append(losses_of(trained) + losses_of(trained, "grad_norm"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
