"""Several teachers and rows with images: each reads them by its own processor, and has visual terms of its own."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mmkd.methods.kd import KDTrainer
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.teachers.several import SeveralTeachers
from tests.helpers import Build, losses_of, near, steps
from tests.vlms import vision_rows

POOLED: dict[str, Any] = {"assistant_only_loss": True, "max_length": 128, "learning_rate": 1e-2}


@pytest.fixture
def teach(build: Build, vlms: dict[str, Path]) -> Any:
    """`teach(trainer class, rows, teacher, key=value, ...)`: a trainer of the tiny LLaVA student."""

    def make(cls: Any, data: Dataset, teacher: Any, **settings: Any) -> Any:
        pooled = {"visual_mismatch": "pool"} if cls is LLaVAKDTrainer else {}
        models = {"model": str(vlms["student"]), "teacher": teacher}
        return build(cls, data, trainer=models, **{**POOLED, **pooled, **settings})

    return make


@pytest.fixture
def pair(vlms: dict[str, Path]) -> dict[str, str]:
    """A teacher with the student's processor, and one that cuts an image into four times as many tokens."""
    return {"a": str(vlms["teacher"]), "b": str(vlms["fine"])}


def rows(images: list[int]) -> Dataset:
    names = ["a" if row % 5 in (0, 1, 4) else "b" for row in range(len(images))]
    return vision_rows(images).add_column("domain", names)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("settings", [{}, {"combine": "gradmag"}])
def test_the_same_teacher_twice_is_that_teacher(teach: Any, pair: dict[str, str], settings: dict[str, Any]) -> None:
    data = rows([1, 2, 0, 1])
    twice = SeveralTeachers({"a": pair["b"], "b": pair["b"]}, {"a": 0.3, "b": 0.7})
    alone = teach(LLaVAKDTrainer, data, pair["b"], max_steps=2, **settings)
    assert steps(teach(LLaVAKDTrainer, data, twice, max_steps=2, **settings)) == near(steps(alone))


@pytest.mark.parametrize("cls", [LLaVAKDTrainer, KDTrainer])
def test_mixed_losses_are_weighted_means(teach: Any, pair: dict[str, str], cls: Any) -> None:
    """Each teacher sees its own pixels."""
    data = rows([1, 2, 0, 1])
    mixed = teach(cls, data, SeveralTeachers(pair, {"a": 1, "b": 3}), max_steps=1)
    alone = {name: teach(cls, data, folder, max_steps=1) for name, folder in pair.items()}
    a, b = (steps(trainer)[0] for trainer in alone.values())
    assert a != pytest.approx(b, rel=1e-2)
    assert steps(mixed)[0] == pytest.approx(0.25 * a + 0.75 * b, rel=1e-5)
    for report in ("kl", *(() if cls is KDTrainer else ("visual_kl", "relation_distance"))):
        for name, trainer in alone.items():
            assert losses_of(mixed, f"{report}_{name}") == near(losses_of(trainer, report))


def test_routed_rows_learn_from_their_teacher_alone(teach: Any, pair: dict[str, str]) -> None:
    data = rows([1, 2, 0, 1, 3, 1])
    whole = teach(LLaVAKDTrainer, data, SeveralTeachers(pair, column="domain")).evaluate(data)
    for name, folder in pair.items():
        own = data.filter(lambda row, name=name: row["domain"] == name)
        found = teach(LLaVAKDTrainer, own, folder).evaluate(own)
        for report in ("kl", "visual_kl", "relation_distance"):
            assert whole[f"eval_{report}_{name}"] == pytest.approx(found[f"eval_{report}"], rel=1e-4)


@pytest.mark.parametrize("column", [None, "domain"])
def test_batches_change_nothing(teach: Any, pair: dict[str, str], column: str | None) -> None:
    data = rows([1, 2, 0, 3] * 2)

    def train(**settings: Any) -> list[float]:
        return steps(teach(LLaVAKDTrainer, data, SeveralTeachers(pair, column=column), max_steps=2, **settings))

    expected = near(train())
    assert train(per_device_train_batch_size=1, gradient_accumulation_steps=4) == expected


def test_two_ranks_see_what_one_sees(teach: Any, vlms: dict[str, Path], ranks: Any) -> None:
    data = rows([1, 2, 0, 3] * 6)
    teachers = SeveralTeachers({"a": str(vlms["teacher"]), "b": str(vlms["fine"])}, column="domain")
    expected = near(steps(teach(LLaVAKDTrainer, data, teachers, max_steps=4)))
    for rank in ranks["llava_kd routed ddp"]:
        assert [loss for loss, _ in rank["steps"]] + [norm for _, norm in rank["steps"]] == expected
