"""Rollouts one step ahead: what a server answers while the student trains, and which student it speaks with."""

import threading
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from mmkd.methods.kd import KDConfig, KDTrainer
from mmkd.teachers.server import ServerTeacher
from tests.helpers import Build, losses_of
from tests.teachers.fake_vllm import fake_vllm
from tests.trainers.served_student import ServedStudent

SETTINGS: dict[str, Any] = {"on_policy_fraction": 0.5, "rollout_max_tokens": 8, "rollout_temperature": 0.0}
NAMES = ("loss", "grad_norm", "rollout_tokens", "rollout_staleness")


def steps(trainer: Any, **training: Any) -> list[tuple[float, ...]]:
    trainer.train(**training)
    return list(zip(*(losses_of(trainer, name) for name in NAMES), strict=True))


def test_answers_are_one_step_old(
    build: Build, completions: Dataset, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Across evaluations, an epoch's end and a resumed checkpoint; a student that stays as it is says the same."""
    settings: dict[str, Any] = {**SETTINGS, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    settings |= {"max_steps": 5, "save_strategy": "steps", "save_steps": 2}
    rows = completions.select(range(12))
    with fake_vllm(ServedStudent, max_model_len=256, tokenizer=tokenizer) as fake:
        served = {**settings, "rollout_server": [fake.url]}
        still = {**served, "learning_rate": 0.0}
        in_turn, ahead = (steps(build(KDTrainer, rows, **still, rollout_ahead=number)) for number in (0, 1))
        assert [step[:3] for step in ahead] == [pytest.approx(step[:3], rel=1e-5) for step in in_turn]
        # Three steps make an epoch.
        assert [step[3] for step in ahead] == [0, 1, 1, 0, 1]
        assert not any(step[3] for step in in_turn)

        fake.loads = 0
        whole = steps(build(KDTrainer, rows, **served, rollout_ahead=1))
        # One for the first batch of an epoch, and one for the batch ahead of each step but the last of an epoch.
        assert fake.loads == 2 + 3
        held_out = {"eval_dataset": rows.select(range(4))}
        often: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1}
        evaluated = build(KDTrainer, rows, trainer=held_out, **served, **often, rollout_ahead=1)
        assert steps(evaluated) == whole
        resumed = steps(
            build(KDTrainer, rows, **served, rollout_ahead=1),
            resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"),
        )
        assert resumed[-3:] == whole[-3:]
        fresh = steps(build(KDTrainer, rows, **served))
    assert fresh[0] == whole[0]
    assert fresh[2:] != whole[2:]


def test_a_served_teacher_is_asked_ahead_too(
    build: Build, completions: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    """While a batch trains, the teacher is asked about the next one; the losses are those of asking in turn."""
    still: dict[str, Any] = {**SETTINGS, "learning_rate": 0.0, "max_steps": 3}
    size = len(tokenizer)
    with (
        fake_vllm(ServedStudent, max_model_len=256, tokenizer=tokenizer) as student,
        fake_vllm(max_model_len=256, vocab_size=size) as teacher,
    ):
        runs = []
        for number in (0, 1):
            served = {"teacher": ServerTeacher(teacher.url, k=8, vocab_size=size)}
            trainer: Any = build(
                KDTrainer, completions, trainer=served, **still, rollout_server=[student.url], rollout_ahead=number
            )
            asked: list[str] = []
            ask = trainer.ask_teacher

            def noted(*args: Any, ask: Any = ask, asked: list[str] = asked) -> Any:
                asked.append(threading.current_thread().name)
                return ask(*args)

            trainer.ask_teacher = noted
            runs.append((steps(trainer), asked))
    (in_turn, here), (ahead, there) = runs
    assert [step[:3] for step in ahead] == [pytest.approx(step[:3], rel=1e-5) for step in in_turn]
    assert here == ["MainThread"] * 3
    assert sorted(there) == ["MainThread", "mmkd-rollouts", "mmkd-rollouts"]


def test_an_error_of_the_server_ends_the_step(
    build: Build, completions: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    with fake_vllm(ServedStudent, max_model_len=256, tokenizer=tokenizer) as fake:
        trainer = build(KDTrainer, completions, **SETTINGS, rollout_server=[fake.url], rollout_ahead=1)
        complete = fake.complete
        fake.complete = lambda body: (
            (400, {"error": {"message": "told to fail", "param": None}})
            if fake.loads > 2 and "prompt_logprobs" not in body
            else complete(body)
        )
        with pytest.raises(ValueError, match=r"refused a prompt.*told to fail"):
            trainer.train()
    assert trainer.state.global_step == 2


def test_only_a_server_answers_ahead(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without rollout_server this process answers itself"):
        KDConfig(output_dir=str(tmp_path), bf16=False, report_to="none", **SETTINGS, rollout_ahead=1)
