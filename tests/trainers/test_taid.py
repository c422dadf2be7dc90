"""TAID: the authors' schedule traces and training run, and a schedule that only optimizer steps move."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from mmkd.losses.divergences import entropy, forward_kl, interpolated_log_probs
from mmkd.methods.taid import TAIDConfig, TAIDSchedule, TAIDTrainer
from tests.helpers import Build, losses_of

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "TAID_losses.npz")


@pytest.mark.parametrize("trace", ["default", "fast", "cap", "linear"])
def test_schedule_follows_the_authors_traces(trace: str) -> None:
    t_start, t_end, alpha, beta, disable = GOLDEN[f"trace_{trace}__hp"].tolist()
    schedule = TAIDSchedule(t_start, t_end, alpha, beta, adaptive=not disable)
    for step, loss in enumerate(GOLDEN["trace_losses"].tolist()):
        schedule.update(loss, step, 40)
        assert schedule.t == pytest.approx(GOLDEN[f"trace_{trace}__t"][step], rel=1e-5)
        if step:  # the authors' first call returns before it has a momentum
            assert schedule.momentum == pytest.approx(GOLDEN[f"trace_{trace}__momentum"][step], rel=1e-5, abs=1e-7)
            # The authors keep t in fp32, which delta is the small remainder of: alpha * sigmoid * (1 - t).
            assert schedule.delta == pytest.approx(GOLDEN[f"trace_{trace}__delta_t"][step], rel=1e-4)


def test_six_steps_are_those_of_the_authors() -> None:
    """SGD with lr 5 on the logits themselves, t_start .4, alpha .05, beta .9: losses, t and final logits."""
    logits = torch.tensor(GOLDEN["student_logits"]).requires_grad_()
    teacher = torch.tensor(GOLDEN["teacher_logits"]).log_softmax(-1)
    mask = torch.tensor(GOLDEN["mask"]).bool()
    schedule = TAIDSchedule(0.4, 1.0, 0.05, 0.9)
    for step in range(6):
        student = logits.log_softmax(-1)
        target = interpolated_log_probs(student, teacher, schedule.t)
        loss = (forward_kl(student, target) + entropy(target))[mask].mean()
        assert loss.item() == pytest.approx(GOLDEN["e2e__loss"][step], rel=1e-5)
        (gradient,) = torch.autograd.grad(loss, logits)
        logits = (logits - 5 * gradient).detach().requires_grad_()
        schedule.update(loss.item(), step, 6)
        assert schedule.t == pytest.approx(GOLDEN["e2e__t_after"][step], rel=1e-5)
    torch.testing.assert_close(logits.detach(), torch.tensor(GOLDEN["e2e__final_logits"]), rtol=1e-4, atol=1e-6)


@given(losses=st.lists(st.floats(0.01, 10), min_size=1, max_size=50), alpha=st.floats(0, 1), beta=st.floats(0, 0.99))
def test_t_never_moves_back_or_past_its_end(losses: list[float], alpha: float, beta: float) -> None:
    schedule = TAIDSchedule(0.2, 0.9, alpha, beta)
    previous = schedule.t
    for step, loss in enumerate(losses):
        schedule.update(loss, step, len(losses))
        assert previous <= schedule.t <= 0.9
        previous = schedule.t


def test_short_runs_are_linear_whatever_the_loss() -> None:
    """METHODS.md 3.4: with t_end 1 and at most 1 / alpha steps, the adaptive part is never ahead of the line."""
    for losses in (np.linspace(5, 0.1, 400), np.full(400, 2.0)):
        schedule = TAIDSchedule(0.4, 1.0, 5e-4, 0.99)
        for step, loss in enumerate(losses.tolist()):
            schedule.update(loss, step, 400)
            assert schedule.t == pytest.approx(0.4 + 0.6 * step / 400, abs=1e-3)


def test_evaluation_does_not_move_t(build: Build, texts: Dataset) -> None:
    settings = {"taid_alpha": 0.5, "taid_beta": 0.5, "max_steps": 4}
    plain = build(TAIDTrainer, texts, **settings)
    plain.train()
    watched = build(
        TAIDTrainer, texts, trainer={"eval_dataset": texts}, eval_strategy="steps", eval_steps=1, **settings
    )
    watched.train()
    train_logs = [entry for entry in watched.state.log_history if "loss" in entry]
    assert [entry["taid_t"] for entry in train_logs] == losses_of(plain, "taid_t")[:4]
    t = watched.schedule.t  # pyright: ignore[reportAttributeAccessIssue]
    watched.evaluate()
    assert watched.schedule.t == t  # pyright: ignore[reportAttributeAccessIssue]


def test_t_moves_once_per_optimizer_step(build: Build, texts: Dataset) -> None:
    calls: list[tuple[int, float]] = []

    class Spy(TAIDTrainer):
        def step_ended(self, means: dict[str, float]) -> None:
            calls.append((self.state.global_step, means["progress_loss"]))
            super().step_ended(means)

    build(Spy, texts, max_steps=3, per_device_train_batch_size=1, gradient_accumulation_steps=4).train()
    single = calls.copy()
    calls.clear()
    build(Spy, texts, max_steps=3, per_device_train_batch_size=4).train()
    assert [step for step, _ in single] == [0, 1, 2]
    assert [loss for _, loss in single] == pytest.approx([loss for _, loss in calls], rel=1e-4)


def test_a_step_without_tokens_leaves_t_alone(build: Build) -> None:
    empty, row = {"input_ids": [5, 6, 7], "labels": [-100] * 3}, {"input_ids": [5, 6, 7], "labels": [5, 6, 7]}
    data = Dataset.from_list([row, empty, row, empty])
    settings: dict[str, Any] = {"max_length": None, "max_steps": 4, "per_device_train_batch_size": 1}
    trainer: Any = build(TAIDTrainer, data, train_sampling_strategy="sequential", t_start=0.2, **settings)
    trainer.train()
    assert losses_of(trainer)[1] == losses_of(trainer)[3] == 0
    assert trainer.schedule.t == pytest.approx(0.2 + 0.8 * 2 / 4)


def test_progress_that_overflows_is_still_a_step() -> None:
    schedule = TAIDSchedule(0.2, 1.0, 0.1, 0.5)
    for step, loss in enumerate((3.0, 0.0, 3.0)):
        schedule.update(loss, step, 3)
    assert 0.2 <= schedule.t <= 1


def test_progress_by_kl_or_cross_entropy(build: Build, texts: Dataset) -> None:
    kl = build(TAIDTrainer, texts, progress_measure="kl", max_steps=1)
    kl.train()
    assert losses_of(kl, "progress_loss")[0] == pytest.approx(losses_of(kl, "loss")[0], rel=1e-5)
    cross_entropy = build(TAIDTrainer, texts, max_steps=1)
    cross_entropy.train()
    assert losses_of(cross_entropy, "progress_loss")[0] > losses_of(cross_entropy, "loss")[0] + 0.1


@pytest.mark.parametrize("restored", [False, True])
def test_a_resumed_run_goes_on_with_its_schedule(build: Build, texts: Dataset, tmp_path: Path, restored: bool) -> None:
    """Also where the Trainer makes the checkpoint's callbacks anew."""
    settings: dict[str, Any] = {"taid_alpha": 0.5, "restore_callback_states_from_checkpoint": restored}
    whole: Any = build(TAIDTrainer, texts, save_strategy="steps", save_steps=2, **settings)
    whole.train()
    resumed: Any = build(TAIDTrainer, texts, output_dir=str(tmp_path / "resumed"), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name in ("loss", "taid_t", "taid_momentum"):
        assert losses_of(resumed, name) == pytest.approx(losses_of(whole, name), rel=1e-5)


def test_a_second_training_starts_its_schedule_anew(build: Build, texts: Dataset) -> None:
    trainer: Any = build(TAIDTrainer, texts, max_steps=3)
    trainer.train()
    first = losses_of(trainer, "taid_t")[0]
    trainer.train()
    assert losses_of(trainer, "taid_t")[0] == first


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"t_start": 0.8, "t_end": 0.5}, "t_start is 0.8 and t_end 0.5"),
        ({"t_end": 1.2}, "t_end is 1.2"),
        ({"taid_alpha": -1.0}, "taid_alpha is -1.0"),
        ({"taid_beta": 1.0}, "taid_beta is 1.0"),
        ({"ce_weight": 1.0}, "ce_weight is 1"),
        ({"progress_measure": "loss"}, "progress_measure is 'loss'"),
    ],
)
def test_schedules_that_cannot_be(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=reason):
        TAIDConfig(output_dir=str(tmp_path), bf16=False, **settings)
