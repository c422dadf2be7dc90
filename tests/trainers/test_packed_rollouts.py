"""Rollouts in rows that lie end to end: the student answers each of them, and they are laid anew."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDConfig, KDTrainer
from mmkd.methods.taid import TAIDTrainer
from mmkd.teachers.batch import Batch
from mmkd.teachers.several import SeveralTeachers
from mmkd.training.laid_rows import laid_again, taken_apart
from tests.helpers import Build, losses_of

GREEDY: dict[str, Any] = {
    "on_policy_fraction": 0.5,
    "rollout_max_tokens": 8,
    "rollout_temperature": 0.0,
    "max_length": None,
}


def steps(trainer: Any) -> list[tuple[float, ...]]:
    trainer.train()
    names = ("loss", "grad_norm", "rollout_tokens", "supervised_tokens")
    return list(zip(*(losses_of(trainer, name) for name in names), strict=True))


def mixed(trainer: Any) -> Batch:
    iterator = iter(trainer.get_train_dataloader())
    return trainer.get_batch_samples(iterator, 1, torch.device("cpu"))[0][0]


@pytest.mark.parametrize("kind", ["kd", "taid", "alm", "routed"])
def test_padding_free_gives_the_losses_of_padded_rows(
    build: Build, completions: Dataset, foreign: Path, tiny: dict[str, Path], kind: str
) -> None:
    cls: Any = {"taid": TAIDTrainer, "alm": ALMTrainer}.get(kind, KDTrainer)
    settings: dict[str, Any] = {**GREEDY, "max_steps": 3, "pad_to_multiple_of": 8}
    models: dict[str, Any] = {}
    rows = completions
    if kind == "alm":
        models["teacher"] = str(foreign)
        settings |= {"chunks": "all", "tau": 5.0}
    if kind == "routed":
        rows = completions.add_column("domain", ["a" if row % 3 else "b" for row in range(24)])
        teachers = {"a": str(tiny["teacher"]), "b": str(tiny["student"])}
        models["teacher"] = SeveralTeachers(teachers, column="domain")
    padded, free = (steps(build(cls, rows, trainer=models, padding_free=free, **settings)) for free in (False, True))
    assert free == [pytest.approx(step, rel=1e-4) for step in padded]


@pytest.mark.parametrize("cls", [KDTrainer, ALMTrainer])
def test_each_packed_row_is_answered(build: Build, completions: Dataset, foreign: Path, cls: Any) -> None:
    """What follows each prompt is what the student says to it alone, and the loss that of the rows apart."""
    settings = {**GREEDY, "on_policy_fraction": 1.0, "packing": True, "max_length": 64, "max_steps": 1}
    settings |= {"chunks": "all", "tau": 5.0} if cls is ALMTrainer else {}
    models = {"teacher": str(foreign)} if cls is ALMTrainer else {}
    trainer: Any = build(cls, completions, trainer=models, per_device_train_batch_size=2, **settings)
    (packed,) = list(trainer.get_train_dataloader())[:1]
    batch, apart = mixed(trainer), taken_apart(packed)
    starts = (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    assert len(starts) == len(apart.row_lengths) > 2
    model = trainer.model.eval()
    for row, (start, end) in enumerate(zip(starts, [*starts[1:], batch["labels"].shape[1]], strict=True)):
        begin = int((apart["labels"][row] != -100).nonzero()[0])
        ids = apart["input_ids"][row, :begin].tolist()
        while len(ids) < min(begin + 8, 64) and ids[-1] != 1:
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert batch["input_ids"][0, start:end].tolist() == ids
        assert batch["labels"][0, start:end].tolist() == [-100] * begin + ids[begin:]
    model.train()
    rows = [
        {"input_ids": batch["input_ids"][0, start:end].tolist(), "labels": batch["labels"][0, start:end].tolist()}
        for start, end in zip(starts, [*starts[1:], batch["labels"].shape[1]], strict=True)
    ]
    student = taken_apart(replace(batch, rows=rows)).student
    padded = replace(batch, student=replace(student, inputs=student.inputs))
    losses = [float(trainer.compute_loss(model, side)) for side in (batch, padded)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_rows_taken_apart_are_laid_as_they_were(build: Build, texts: Dataset) -> None:
    trainer: Any = build(
        KDTrainer, texts, packing=True, rollout_prompt_tokens=2, **{**GREEDY, "max_length": 64}, pad_to_multiple_of=16
    )
    (packed,) = list(trainer.get_train_dataloader())[:1]
    again = laid_again(taken_apart(packed), trainer.rollouts.lay)
    assert packed.student.inputs.keys() == again.student.inputs.keys()
    for name, value in packed.items():
        assert torch.equal(torch.as_tensor(again[name]), torch.as_tensor(value)), name


def test_packs_that_cut_rows_are_refused(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**GREEDY, "max_length": 64, "packing": True, "packing_strategy": "wrapped"}
    with pytest.raises(ValueError, match="cuts rows wherever a pack is full"):
        KDConfig(output_dir=str(tmp_path), bf16=False, report_to="none", **settings)
