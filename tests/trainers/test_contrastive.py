"""The data's answers and the student's own in one step: rows added for rollouts, and a divergence for each side."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset

from mmkd.losses.divergences import skew_kl, skew_reverse_kl
from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDConfig, KDTrainer
from mmkd.methods.kd_contrastive import own_share
from mmkd.teachers.batch import Batch
from mmkd.teachers.several import SeveralTeachers
from tests.helpers import Build, losses_of, near
from tests.vlms import vision_rows

PAIRED: dict[str, Any] = {"on_policy_fraction": 1.0, "rollout_rows": "add", "rollout_max_tokens": 8}
GREEDY: dict[str, Any] = {**PAIRED, "rollout_temperature": 0.0}


def first(trainer: Any) -> Batch:
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))[0][0]


def sequences(batch: Batch) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each sequence, whether in a row of its own or end to end."""
    view = batch.student
    if "position_ids" in view.inputs:
        starts = (view.inputs["position_ids"][0] == 0).nonzero()[:, 0].tolist()
        spans = [(0, start, end) for start, end in zip(starts, [*starts[1:], view.labels.shape[1]], strict=True)]
    else:
        spans = [(row, 0, int(length)) for row, length in enumerate(view.inputs["attention_mask"].sum(1))]
    ids, labels = view.inputs["input_ids"], view.labels
    return [(ids[row, a:b].tolist(), labels[row, a:b].tolist()) for row, a, b in spans]


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rows_stand_beside_their_rollouts(build: Build, completions: Dataset, free: bool, fraction: float) -> None:
    """The data's rows as they were, then the student's answers to some, as if they had replaced these."""
    settings = {**GREEDY, "on_policy_fraction": fraction, "padding_free": free, "max_length": None}
    plain = sequences(next(iter(build(KDTrainer, completions, **settings).get_train_dataloader())))
    added = first(build(KDTrainer, completions, **settings))
    replaced = sequences(first(build(KDTrainer, completions, **{**settings, "rollout_rows": "replace"})))
    both = sequences(added)
    assert both[:4] == plain
    assert both[4:] == [row for row, data in zip(replaced, plain, strict=True) if row != data]
    assert len(both) == 4 + 4 * fraction
    rollout = added.student.rollout
    assert rollout is not None
    assert int(rollout.own.sum()) == sum(label != -100 for _, labels in both[4:] for label in labels)


@pytest.mark.parametrize("kind", ["packing", "view", "alm", "routed", "vision"])
def test_added_rows_are_taught_like_others(
    build: Build, completions: Dataset, foreign: Path, vlms: dict[str, Path], tiny: dict[str, Path], kind: str
) -> None:
    """Half of the rows twice, and a step's loss that of the same rows in two micro-batches."""
    settings: dict[str, Any] = {**GREEDY, "max_steps": 2}
    models: dict[str, Any] = {}
    rows, cls = completions, KDTrainer
    if kind == "packing":
        settings |= {"packing": True, "max_length": 64}
    if kind == "view":
        settings |= {"padding_free": True, "max_length": None, "teacher_view": {"template": "Think. {prompt}"}}
    if kind == "alm":
        models, cls = {"teacher": str(foreign)}, ALMTrainer
        settings |= {"chunks": "all", "tau": 5.0}
    if kind == "routed":
        rows = completions.add_column("domain", ["a" if row % 3 else "b" for row in range(24)])
        teachers = {"a": str(tiny["teacher"]), "b": str(tiny["student"])}
        models["teacher"] = SeveralTeachers(teachers, column="domain")
    if kind == "vision":
        settings |= {"assistant_only_loss": True}
        rows, models = vision_rows([1] * 8), {"model": str(vlms["student"]), "teacher": str(vlms["teacher"])}
    runs = []
    for size, steps in ((4, 1), (2, 2)):
        whole: Any = build(
            cls, rows, trainer=models, **settings, per_device_train_batch_size=size, gradient_accumulation_steps=steps
        )
        whole.train()
        runs.append([*losses_of(whole), *losses_of(whole, "grad_norm")])
    assert runs[0] == near(runs[1])


# The divergence


def test_each_side_has_its_divergence_its_count_and_its_weight(build: Build, completions: Dataset) -> None:
    settings = {**GREEDY, "divergence": "contrastive", "skew": 0.2, "contrastive_share": 0.3}
    trainer: Any = build(KDTrainer, completions, **settings)
    batch = first(trainer)
    loss = float(trainer.compute_loss(trainer.model.train(), batch).detach())
    view, rollout = batch.student, batch.student.rollout
    assert rollout is not None
    with torch.no_grad():
        ours = trainer.model(**view.inputs).logits.log_softmax(-1)[:, :-1]
        theirs = trainer.teacher.model(**view.inputs).logits.log_softmax(-1)[:, :-1, : ours.shape[-1]]
    own = rollout.own[:, 1:] & view.supervised
    data = ~rollout.own[:, 1:] & view.supervised
    expected = 0.7 * skew_kl(ours, theirs, 0.2)[data].mean() + 0.3 * skew_reverse_kl(ours, theirs, 0.2)[own].mean()
    assert loss == pytest.approx(float(expected), rel=1e-4)


def test_accumulation_does_not_change_the_contrast(build: Build, completions: Dataset) -> None:
    settings = {**GREEDY, "divergence": "contrastive", "contrastive_share_end": 0.75, "max_steps": 3}
    runs = []
    for size, steps in ((4, 1), (1, 4)):
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer: Any = build(KDTrainer, completions, **settings, **sizes)
        trainer.train()
        names = ("loss", "grad_norm", "divergence_data", "divergence_own")
        runs.append([value for name in names for value in losses_of(trainer, name)])
    assert len(runs[0]) == 12
    assert runs[0] == near(runs[1])


def test_an_evaluation_has_the_datas_answers_alone(build: Build, completions: Dataset) -> None:
    runs = []
    for divergence in ("contrastive", "skew_kl"):
        trainer: Any = build(
            KDTrainer, completions, trainer={"eval_dataset": completions}, **GREEDY, divergence=divergence
        )
        runs.append(trainer.evaluate()["eval_loss"])
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


def test_the_share_moves_over_the_first_half() -> None:
    args = SimpleNamespace(contrastive_share=0.5, contrastive_share_end=0.75)
    assert [own_share(args, step, 8) for step in (0, 2, 4, 8)] == [0.5, 0.625, 0.75, 0.75]
    assert own_share(SimpleNamespace(contrastive_share=0.5, contrastive_share_end=None), 3, 8) == 0.5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_policy_fraction": 0.0, "rollout_rows": "replace"}, "there are none of these"),
        ({"rollout_rows": "replace"}, "which replace all of them"),
    ],
)
def test_a_contrast_without_one_side_is_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    whole = {**PAIRED, "divergence": "contrastive", **settings}
    with pytest.raises(ValueError, match=message):
        KDConfig(output_dir=str(tmp_path), bf16=False, report_to="none", **whole)
