"""What a resumed run has counted is what an uninterrupted one has, whatever steps were logged and saved."""

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers.trainer_callback import TrainerCallback

from mmkd.methods.kd import KDTrainer
from mmkd.preparation.collation import BAD_ROWS
from mmkd.publish.runs import read_log
from mmkd.training.checkpoint_files import CHECKSUMS
from mmkd.training.counts import CountingTrainer
from mmkd.training.interrupt import InterruptCallback
from tests.classes import dho
from tests.helpers import Build

# A checkpoint at steps 3 and 6, logs at 4 and 8, and an end that is neither.
STEPS = {"max_steps": 7, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3}

CLOCK = ("seconds", "per_second", "eta_minutes", "runtime", "train_loss", "max_steps", "total_flos")
"""What differs from run to run, or is of one session by the Trainer's own rule."""


class End(TrainerCallback):
    """Ends a run at the beginning of a step as `kill -9` does, or after one as Ctrl-C does."""

    def __init__(self, killed_before: int | None = None, interrupt: InterruptCallback | None = None, after: int = 0):
        self.killed_before, self.interrupt, self.after = killed_before, interrupt, after

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.killed_before:
            raise RuntimeError("killed")
        if self.interrupt is not None:
            self.interrupt.asked = state.global_step + 1 == self.after


def facts(folder: Path) -> list[dict[str, Any]]:
    """The log of a run without what a clock says."""
    return [{key: value for key, value in one.items() if not key.endswith(CLOCK)} for one in read_log(folder)]


@pytest.fixture
def whole(build: Build, texts: Dataset, tmp_path: Path) -> list[dict[str, Any]]:
    """The log of a run without an interruption."""
    folder = tmp_path / "whole"
    build(KDTrainer, texts, **{**STEPS, "output_dir": str(folder)}).train()
    return facts(folder)


def test_killed_and_resumed_logs_the_same(build: Build, texts: Dataset, tmp_path: Path, whole: Any) -> None:
    """Killed after a logged step that no checkpoint knows: its line is replaced by the one of the resumed run."""
    with pytest.raises(RuntimeError, match="killed"):
        build(KDTrainer, texts, trainer={"callbacks": [End(killed_before=6)]}, **STEPS).train()
    assert [one["step"] for one in facts(tmp_path / "run")] == [4]
    build(KDTrainer, texts, **STEPS).train(resume_from_checkpoint=True)
    assert facts(tmp_path / "run") == [pytest.approx(one) for one in whole]
    assert whole[-1]["supervised_tokens"] > whole[0]["supervised_tokens"]


@pytest.mark.parametrize("step", [2, 5])
def test_interrupted_and_resumed_logs_the_same(
    build: Build, texts: Dataset, tmp_path: Path, whole: Any, step: int
) -> None:
    """Ctrl-C at a step that is neither logged nor saved."""
    interrupt = InterruptCallback()
    callbacks = [End(interrupt=interrupt, after=step), interrupt]
    build(KDTrainer, texts, trainer={"callbacks": callbacks}, **STEPS).train()
    assert facts(tmp_path / "run")[-1]["step"] == step
    trainer = build(KDTrainer, texts, **STEPS)
    resumed = trainer.train(resume_from_checkpoint=True)
    assert facts(tmp_path / "run") == [pytest.approx(one) for one in whole]
    seconds = [one["training_seconds"] for one in read_log(tmp_path / "run") if "training_seconds" in one]
    assert seconds == sorted(seconds)
    # The loss that training returns is that of its own steps, as the Trainer has it.
    assert 0 < resumed.training_loss < 3 * whole[0]["loss"]
    assert CountingTrainer.state_name not in (trainer.state.stateful_callbacks or {})


def test_a_checkpoint_of_before_counts_goes_on_from_what_it_logged(
    build: Build, texts: Dataset, tmp_path: Path, whole: Any
) -> None:
    build(KDTrainer, texts, **{**STEPS, "max_steps": 6}).train()
    checkpoint = tmp_path / "run" / "checkpoint-6"
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    del state["stateful_callbacks"][CountingTrainer.state_name]
    (checkpoint / "trainer_state.json").write_text(json.dumps(state))
    (checkpoint / CHECKSUMS).unlink()
    trainer = build(KDTrainer, texts, **STEPS)
    trainer.train(resume_from_checkpoint=True)
    last = facts(tmp_path / "run")[-1]
    assert whole[0]["supervised_tokens"] < last["supervised_tokens"] < whole[-1]["supervised_tokens"]


def test_a_second_training_counts_from_zero(build: Build, texts: Dataset, tmp_path: Path, whole: Any) -> None:
    trainer = build(KDTrainer, texts, **STEPS)
    for _ in range(2):
        trainer.train()
        assert facts(tmp_path / "run")[-1]["supervised_tokens"] == whole[-1]["supervised_tokens"]


def test_what_was_counted_is_logged_after_a_last_evaluation(
    build: Build, texts: Dataset, tmp_path: Path, whole: Any
) -> None:
    settings = {**STEPS, "eval_strategy": "steps", "eval_steps": 7}
    build(KDTrainer, texts, trainer={"eval_dataset": texts}, **settings).train()
    evaluated, last = facts(tmp_path / "run")[-2:]
    assert evaluated["eval_ce"] > 0
    assert "supervised_tokens" not in evaluated
    assert last["supervised_tokens"] == whole[-1]["supervised_tokens"]


def test_rows_that_were_left_out_are_counted_over_a_resume(build: Build, texts: Dataset, tmp_path: Path) -> None:
    class LeavesOut(KDTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
            self._record({BAD_ROWS[0]: (loss.detach() * 0 + 2, 1)})
            return loss

    build(LeavesOut, texts, **{**STEPS, "max_steps": 6}).train()
    build(LeavesOut, texts, **STEPS).train(resume_from_checkpoint=True)
    assert [one[BAD_ROWS[0]] for one in facts(tmp_path / "run") if BAD_ROWS[0] in one] == [8, 14]


def test_classifiers_go_on_with_their_means(tmp_path: Path) -> None:
    dho(tmp_path / "whole", **STEPS).train()
    with pytest.raises(RuntimeError, match="killed"):
        dho(tmp_path / "run", {"callbacks": [End(killed_before=6)]}, **STEPS).train()
    dho(tmp_path / "run", **STEPS).train(resume_from_checkpoint=True)
    (logged,), (expected,) = ([one for one in facts(tmp_path / run) if "loss" in one] for run in ("run", "whole"))
    assert logged == pytest.approx(expected)


def test_ranks_count_together_over_a_resume(ranks: dict[str, list[dict[str, Any]]]) -> None:
    """The checkpoint has what both have seen; resumed, one of them goes on from it."""
    folders = [ranks[name][0]["folder"] for name in ("kd counted", "kd counted resumed")]
    whole, resumed = ([one for one in facts(folder) if "eval_loss" not in one] for folder in folders)
    assert resumed == [pytest.approx(one, rel=1e-5) for one in whole]
    assert whole[-1]["supervised_tokens"] > whole[0]["supervised_tokens"] > 0
