"""Guards on the student's own answers: what counts as a bad one, when they warn and stop, and that resume goes on."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from mmkd.methods.kd import KDConfig, KDTrainer
from mmkd.training.answers import Rollout
from mmkd.training.guard_settings import Limits, RolloutGuards, warnings_of
from mmkd.training.rollout_guards import SUMS, RolloutWatch, sums_of
from mmkd.training.rollout_signs import in_other_script, repeats_itself
from mmkd.training.rollouts import Mixed, RolloutPrompt
from tests.helpers import Build, losses_of

GOOD = {"rollouts": 10, "ended": 9, "repeated": 0, "other_script": 0, "tokens": 100, "answer_tokens": 100}
STEP = {**GOOD, "entropy": 50.0, "entropy_tokens": 100}


def step(**changes: float) -> dict[str, float]:
    sums = {**STEP, **changes}
    return {name: sums[name] for name in SUMS}


def watch(value: Any, *sums: dict[str, float], every: int = 1) -> tuple[RolloutWatch, list[str]]:
    """What a watch said of steps, as "step name"."""
    own = RolloutWatch(RolloutGuards.of(value))
    said = [f"{number} {warned.name}" for number, each in enumerate(sums) for warned in own.look(each, number, every)]
    return own, said


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"endet": {}}, "knows ended, repeated"),
        ({"ended": 0.5}, "ended is 0.5; give warn and stop"),
        ({"ended": {"warm": 0.5}}, "give warn and stop"),
        ({"ended": {"warn": 1}}, "from 0 to below 1"),
        ({"repeated": {"warn": 0}}, "above 0 up to 1"),
        ({"repeated": {"warn": 0.5, "stop": 0.2}}, "end before it warns"),
        ({"entropy": {"warn": 0.1, "stop": 0.5}}, "end before it warns"),
        ({"length": {"stop": 0.5}}, "above 1 up to inf"),
        ({"length": {"against": "teacher"}}, "choose one of start, data"),
        ({"other_script": {"stop": True}}, "stop is True"),
        ({"steps": 0}, "whole number of 1 or more"),
        ("{ended", "no JSON"),
        ([1], "write a mapping"),
    ],
)
def test_limits_without_meaning_are_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RolloutGuards.of(value)


def test_limits_keep_their_defaults_where_they_are_not_named() -> None:
    guards = RolloutGuards.of('{"repeated": {"stop": 0.9}, "entropy": null, "ended": {"stop": 0.5}}')
    assert guards.limits["repeated"] == Limits(0.2, 0.9)
    # The default's warning would come after the stop.
    assert guards.limits["ended"] == Limits(0.5, 0.5)
    assert guards.limits["length"] == RolloutGuards().limits["length"]
    assert "entropy" not in guards.limits
    assert "ended" not in RolloutGuards.of(None, ends=False).limits
    with pytest.raises(ValueError, match="continue plain text"):
        RolloutGuards.of({"ended": {"warn": 0.1}}, ends=False)
    with pytest.raises(ValueError, match="would never speak"):
        KDConfig("x", on_policy_fraction=1.0, max_steps=5, rollout_guards={"steps": 10}, report_to="none")


def test_an_answer_repeats_itself_by_its_sequences_of_four_tokens() -> None:
    assert repeats_itself([5] * 16)
    assert repeats_itself([1, 2, 3, 4, 5] * 5)
    assert not repeats_itself(list(range(40)) + list(range(20)))
    assert not repeats_itself([5] * 15)


@pytest.mark.parametrize(
    ("text", "known", "other"),
    [
        ("Der Hund schläft", "Where is the dog?", False),
        ("собака спит", "Where is the dog?", True),
        ("собака спит", "Translate into Russian: dog. Собака", False),
        ("the dog, 狗狗狗", "Where is the dog?", True),
        ("𝐱 = 12, ｆｕｌｌ", "Where is the dog?", False),
        ("日本語", "これはなんですか", False),
        ("これは犬です", "狗在哪里", True),
        ("12 + 4", "Where is the dog?", False),
        ("собака", "12 + 4", False),
    ],
)
def test_scripts_are_those_of_letters(text: str, known: str, other: bool) -> None:
    assert in_other_script(text, known) is other


def test_a_rank_may_have_no_rollouts(tokenizer: PreTrainedTokenizerFast) -> None:
    assert {*sums_of(Mixed([], [], 0.0), tokenizer, 8).values()} == {0}
    prompt = RolloutPrompt(0, 0, 1, [5], {}, answer=[6, 7, 8])
    sums = sums_of(Mixed([prompt], [Rollout([9] * 20 + [1], True)], 0.0), tokenizer, 2)
    assert sums == {"rollouts": 1, "ended": 1, "repeated": 1, "other_script": 0, "tokens": 21, "answer_tokens": 2}


def test_guards_warn_once_and_again_after_they_were_silent() -> None:
    bad, good = step(repeated=10), step()
    own, said = watch({"steps": 2}, good, good, bad, bad, good, good, bad)
    assert said == ["2 repeated", "6 repeated"]
    assert own.values()["repeated"] == 0.5


def test_shares_are_of_all_answers_of_the_last_steps() -> None:
    own, _ = watch(
        {"steps": 2}, step(), step(rollouts=1, ended=0), step(rollouts=0, ended=0), step(rollouts=3, ended=3)
    )
    assert own.values()["ended"] == 3 / 4


def test_lengths_drift_in_both_directions() -> None:
    for tokens in (25, 400):
        _, said = watch({"steps": 2}, *[step()] * 2, *[step(tokens=tokens)] * 2)
        assert said == ["3 length"]
    _, said = watch({"steps": 1, "length": {"against": "data"}}, step(answer_tokens=20))
    assert said == ["0 length"]


def test_entropy_is_compared_with_the_first_ones_that_were_measured() -> None:
    silent = step(entropy_tokens=0, entropy=0)
    series = [silent, step(), silent, step(), silent, step(entropy=1), silent, step(entropy=2)]
    own, said = watch({"steps": 4}, *series, every=2)
    assert said == ["7 entropy"]
    assert own.values()["entropy"] == pytest.approx(0.03)


def test_a_guard_that_stops_names_the_last_checkpoint_before_it_warned() -> None:
    own, _ = watch({"steps": 1, "repeated": {"stop": 0.9}}, step(), step(repeated=3))
    own.stop(1, {})
    own.look(step(repeated=10), 2)
    with pytest.raises(ValueError, match=r"100% of the student's answers repeated.* at repeated 0\.9.*from one"):
        own.stop(2, {0: "one", 1: "two"})
    with pytest.raises(ValueError, match="No checkpoint was saved before it warned"):
        own.stop(2, {2: "three"})


def test_a_watch_goes_on_from_its_state() -> None:
    series = [step(repeated=number, tokens=90 + number, entropy=50 - 5 * number) for number in range(8)]
    whole, _ = watch({"steps": 3}, *series)
    first, _ = watch({"steps": 3}, *series[:4])
    second = RolloutWatch(RolloutGuards.of({"steps": 3}))
    second.restore(json.loads(json.dumps(first.state())))
    for number, sums in enumerate(series[4:], start=4):
        second.look(sums, number)
    assert second.state() == whole.state()
    assert second.values() == whole.values()


def test_entropy_is_that_of_the_tokens_which_the_student_said(build: Build, completions: Dataset) -> None:
    settings: dict[str, Any] = {"rollout_max_tokens": 6, "max_steps": 2}
    trainer: Any = build(KDTrainer, completions, on_policy_fraction=1.0, **settings)
    trainer.train()
    assert losses_of(trainer, "rollout_entropy") == [pytest.approx(e) for e in losses_of(trainer, "student_entropy")]
    half: Any = build(KDTrainer, completions, on_policy_fraction=0.5, **settings)
    half.train()
    assert losses_of(half, "rollout_entropy") != losses_of(half, "student_entropy")
    (last,) = half._watch.entropies
    assert last["entropy"] / last["entropy_tokens"] == pytest.approx(losses_of(half, "rollout_entropy")[0])


def test_a_run_logs_warns_stops_and_goes_on(
    build: Build, completions: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {
        "on_policy_fraction": 0.5,
        "rollout_max_tokens": 6,
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    guards = {"steps": 1, "length": {"warn": 1.01, "against": "data"}, "other_script": None}
    whole: Any = build(KDTrainer, completions, rollout_guards=guards, **settings)
    whole.train()
    assert len(losses_of(whole, "rollouts_repeated")) == len(losses_of(whole, "rollouts_other_script")) == 6
    assert "those they are compared with, the data's answers (mean of 1 steps)" in caplog.text
    assert warnings_of(whole.state.log_history)[0].startswith("step ")
    logged = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert warnings_of(logged) == warnings_of(whole.state.log_history)
    resumed: Any = build(KDTrainer, completions, rollout_guards=guards, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert resumed._watch.state() == whole._watch.state()
    assert torch.equal(resumed._entropy, whole._entropy)
    stopping = {"steps": 1, "length": {"stop": 1.01, "against": "data"}}
    trainer: Any = build(KDTrainer, completions, rollout_guards=stopping, **settings)
    with pytest.raises(ValueError, match="rollout_guards stops the run at length"):
        trainer.train()
