"""Several teachers of alm, with tokenizers of their own: mixed they add up, routed each teaches its rows."""

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from mmkd.methods.alm import ALMTrainer
from mmkd.teachers.several import SeveralTeachers
from tests.helpers import Build, losses_of, near, steps

SETTINGS: dict[str, Any] = {"chunks": "all", "tau": 5.0, "max_steps": 2, "max_length": 128}


@pytest.fixture
def pair(tiny: dict[str, Path], foreign: Path) -> dict[str, str]:
    """A teacher with the student's tokenizer, and one with its own and a chat template of its own."""
    return {"a": str(tiny["teacher"]), "b": str(foreign)}


@pytest.fixture
def teach(build: Build) -> Any:
    """`teach(routed, teacher, key=value, ...)`: a trainer of the tiny student."""

    def make(data: Dataset, teacher: Any, **settings: Any) -> Any:
        return build(ALMTrainer, data, trainer={"teacher": teacher}, **{**SETTINGS, **settings})

    return make


@pytest.mark.parametrize(
    "settings",
    [{}, {"chunks": "merge", "ce_weight": 0.3}, {"objective": "uld", "combine": "gradmag", "ce_weight": 0.5}],
)
def test_the_same_teacher_twice_is_that_teacher(
    teach: Any, routed: Dataset, pair: dict[str, str], settings: dict[str, Any]
) -> None:
    twice = SeveralTeachers({"a": pair["b"], "b": pair["b"]}, {"a": 0.3, "b": 0.7})
    assert steps(teach(routed, twice, **settings)) == near(steps(teach(routed, pair["b"], **settings)))


@pytest.mark.parametrize(
    "settings",
    [{"chunks": "merge"}, {"chunks": "unbiased", "ce_weight": 0.2}, {"objective": "mined"}, {"packing": True}],
)
def test_mixed_losses_are_weighted_means(
    teach: Any, routed: Dataset, pair: dict[str, str], settings: dict[str, Any]
) -> None:
    """Each teacher's chunks are counted for themselves."""
    settings = {**settings, "max_steps": 1}
    mixed = teach(routed, SeveralTeachers(pair, {"a": 1, "b": 3}), **settings)
    alone = {name: teach(routed, folder, **settings) for name, folder in pair.items()}
    a, b = (steps(trainer)[0] for trainer in alone.values())
    assert a != pytest.approx(b, rel=1e-3)
    assert steps(mixed)[0] == pytest.approx(0.25 * a + 0.75 * b, rel=1e-4)
    for name, trainer in alone.items():
        assert losses_of(mixed, f"chunk_gap_{name}") == near(losses_of(trainer, "chunk_gap"))


@pytest.mark.parametrize("layout", [{}, {"packing": True}])
def test_routed_rows_learn_from_their_teacher_alone(
    teach: Any, routed: Dataset, pair: dict[str, str], layout: dict[str, Any]
) -> None:
    whole = teach(routed, SeveralTeachers(pair, column="domain"), chunks="merge", **layout).evaluate(routed)
    for name, folder in pair.items():
        own = routed.filter(lambda row, name=name: row["domain"] == name)
        found = teach(own, folder, chunks="merge", **layout).evaluate(own)
        for report in ("chunk_gap", "chunk_kl"):
            assert whole[f"eval_{report}_{name}"] == pytest.approx(found[f"eval_{report}"], rel=1e-4)


@pytest.mark.parametrize("column", [None, "domain"])
def test_batches_change_nothing(teach: Any, routed: Dataset, pair: dict[str, str], column: str | None) -> None:
    def train(**settings: Any) -> list[float]:
        settings = {"chunks": "merge", "ce_weight": 0.2, **settings}
        return steps(teach(routed, SeveralTeachers(pair, column=column), **settings))

    expected = near(train())
    assert train(per_device_train_batch_size=1, gradient_accumulation_steps=4) == expected
    assert train(padding_free=True, max_length=None, pad_to_multiple_of=64) == expected


def test_every_teacher_has_a_projection(teach: Any, routed: Dataset, pair: dict[str, str], tmp_path: Path) -> None:
    """They are learnt, kept in checkpoints, and taken up again."""
    settings = {"hidden_weight": 0.5, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = teach(routed, SeveralTeachers(pair), **settings)
    whole.train()
    resumed = teach(routed, SeveralTeachers(pair), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert losses_of(resumed)[-2:] == losses_of(whole)[-2:]


@pytest.mark.parametrize("column", [None, "domain"])
def test_rollouts_are_judged_by_several(teach: Any, routed: Dataset, pair: dict[str, str], column: str | None) -> None:
    settings = {"on_policy_fraction": 0.5, "rollout_max_tokens": 6, "rollout_patience": 0}
    for layout in ({}, {"packing": True}):
        trainer = teach(routed, SeveralTeachers(pair, column=column), **settings, **layout)
        trainer.train()
        assert losses_of(trainer, "rollout_length")
        assert all(0 < loss < float("inf") for loss in losses_of(trainer))


def test_two_ranks_see_what_one_sees(teach: Any, routed: Dataset, pair: dict[str, str], ranks: Any) -> None:
    data = routed.remove_columns("domain").add_column("domain", routed["domain"])  # pyright: ignore[reportCallIssue]
    settings = {"chunks": "merge", "tau": 1.0, "max_steps": 4, "learning_rate": 1e-2}
    expected = near(steps(teach(data, SeveralTeachers(pair, column="domain"), **settings)))
    for rank in ranks["alm routed ddp"]:
        assert [loss for loss, _ in rank["steps"]] + [norm for _, norm in rank["steps"]] == expected


def test_streams_of_teachers_with_other_tokens_are_refused(teach: Any, routed: Dataset, pair: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="several teachers with tokens of their own"):
        teach(routed.to_iterable_dataset(), SeveralTeachers(pair))
