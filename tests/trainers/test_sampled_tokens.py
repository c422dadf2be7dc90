"""kd on the tokens that the student sampled, on the student's top-k, and the weights of tokens of rollouts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mmkd.losses.divergences import forward_kl, reverse_kl
from mmkd.losses.sampled_kl import policy_gradient, prefix_importance, sampled_kl
from mmkd.methods.alm_config import ALMConfig
from mmkd.methods.kd import KDConfig, KDTrainer
from mmkd.methods.kd_sampled import SampledBaseline
from mmkd.methods.taid import TAIDTrainer
from mmkd.models.heads import LMHead
from mmkd.teachers.batch import Batch, RolloutTokens
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.several import SeveralTeachers
from mmkd.teachers.signals import LabelSignal
from mmkd.training.items import Supervised
from mmkd.training.token_weights import importance_weights
from tests.helpers import Build, losses_of, near, steps
from tests.teachers.fake_vllm import ServedLogProbs, fake_vllm
from tests.trainers.served_student import ServedStudent

SAMPLED: dict[str, Any] = {"divergence": "sampled_reverse_kl", "on_policy_fraction": 1.0, "rollout_max_tokens": 8}
OWN: dict[str, Any] = {"on_policy_fraction": 1.0, "rollout_max_tokens": 8}
IN_PARTS = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}


def mixed(trainer: Any, batches: int = 1) -> list[Batch]:
    """The first accumulated batch as the loss sees it, before any step."""
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), batches, torch.device("cpu"))[0]


def log_probs_of(trainer: Any, teacher: Any, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """All log-probs of the student, with gradient, and of the teacher at the supervised tokens, and these."""
    supervised, inputs = batch.student.supervised, dict(batch.student.inputs)
    student = trainer.model(**inputs).logits[:, :-1][supervised].log_softmax(-1)
    with torch.no_grad():
        judged = teacher(**inputs).logits[:, :-1][supervised].log_softmax(-1)
    return student, judged, batch.student.labels[:, 1:][supervised]


def gradients(model: Any) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def loss_and_gradients(trainer: Any, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """By the trainer's own loss of one micro-batch."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), gradients(trainer.model)


@pytest.fixture
def teacher(tiny: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny["teacher"], dtype=torch.float32).eval()


# Sampled tokens


@pytest.mark.parametrize(
    "settings", [{}, {"estimator": "k3"}, {"estimator": "k3", "sampled_as": "loss"}], ids=["k1", "k3", "k3 loss"]
)
def test_the_loss_is_the_estimate_and_its_gradient_the_surrogates(
    build: Build, completions: Dataset, teacher: Any, settings: dict[str, Any]
) -> None:
    trainer: Any = build(KDTrainer, completions, **SAMPLED, **settings)
    trainer.model.train()
    (batch,) = mixed(trainer)
    for part in trainer.callback_handler.callbacks:
        if isinstance(part, SampledBaseline):
            part.mean = 0.4
    loss, own = loss_and_gradients(trainer, batch)
    trainer.model.zero_grad()
    student, judged, labels = log_probs_of(trainer, teacher, batch)
    log_q, log_p = (side.gather(-1, labels[:, None])[:, 0] for side in (student, judged))
    estimate = sampled_kl(log_q, log_p, settings.get("estimator", "k1")).mean()
    surrogate = estimate if "sampled_as" in settings else policy_gradient(log_q, log_p, baseline=0.4)[0].mean()
    surrogate.backward()
    torch.testing.assert_close(loss, estimate.detach(), rtol=1e-4, atol=1e-6)
    for ours, expected in zip(own, gradients(trainer.model), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (KDTrainer, SAMPLED),
        (KDTrainer, {**SAMPLED, "rollout_token_weights": "importance"}),
        (KDTrainer, {**OWN, "on_policy_fraction": 0.5, "rollout_token_weights": "importance"}),
        (KDTrainer, {**OWN, "rollout_token_weights": "prefix", "student_top_k": 5, "divergence": "reverse_kl"}),
        (TAIDTrainer, {**OWN, "rollout_token_weights": "importance"}),
    ],
    ids=["sampled", "sampled importance", "forward importance", "prefix top-k", "taid importance"],
)
def test_how_a_batch_is_cut_does_not_matter(
    build: Build, completions: Dataset, cls: Any, settings: dict[str, Any]
) -> None:
    settings = {**settings, "max_length": None, "max_steps": 3}
    expected = steps(build(cls, completions, **settings))
    assert steps(build(cls, completions, **{**settings, **IN_PARTS})) == near(expected)
    assert steps(build(cls, completions, **settings, padding_free=True)) == near(expected)


def test_a_server_is_asked_for_the_sampled_tokens_alone(
    build: Build, completions: Dataset, tiny: dict[str, Path], teacher: Any, tokenizer: PreTrainedTokenizerFast
) -> None:
    settings = {**SAMPLED, "rollout_token_weights": "importance"}
    local: Any = build(KDTrainer, completions, **settings)
    expected = steps(local)
    rows, server = len(tokenizer), {"served": teacher, "tokenizer": tokenizer, "max_model_len": 256}
    with fake_vllm(ServedLogProbs, root=str(tiny["teacher"]), vocab_size=rows, cap=rows, **server) as fake:
        served: Any = build(KDTrainer, completions, trainer={"teacher": ServerTeacher(fake.url, k=rows)}, **settings)
        fake.requests.clear()
        assert steps(served) == near(expected)
        assert {request["prompt_logprobs"] for request in fake.requests} == {1}
        evaluated = served.evaluate(completions)
        assert {request["prompt_logprobs"] for request in fake.requests} == {1, rows}
    assert losses_of(served, "sampled_log_ratio") == near(losses_of(local, "sampled_log_ratio"))
    # Logs of a local teacher tell of whole distributions besides.
    assert len(losses_of(local, "kl")) == 4
    assert not losses_of(served, "kl")
    assert evaluated["eval_loss"] == pytest.approx(local.evaluate(completions)["eval_loss"], rel=1e-4)


def test_an_evaluation_compares_whole_distributions_on_the_datas_answers(build: Build, completions: Dataset) -> None:
    sampled, exact = (
        build(KDTrainer, completions, **{**OWN, "divergence": divergence})
        for divergence in ("sampled_reverse_kl", "reverse_kl")
    )
    ours, theirs = sampled.evaluate(completions), exact.evaluate(completions)
    assert ours["eval_loss"] == theirs["eval_loss"]
    assert ours["eval_kl"] == theirs["eval_kl"]


def test_the_baseline_is_the_running_mean_and_is_resumed(build: Build, completions: Dataset, tmp_path: Path) -> None:
    settings = {**SAMPLED, "max_steps": 6, "save_strategy": "steps", "save_steps": 3}
    whole: Any = build(KDTrainer, completions, **settings)
    whole.train()
    mean = None
    for value in losses_of(whole, "sampled_log_ratio"):
        mean = value if mean is None else 0.9 * mean + 0.1 * value
    (baseline,) = [part for part in whole.callback_handler.callbacks if isinstance(part, SampledBaseline)]
    assert baseline.mean == pytest.approx(mean, rel=1e-5)
    resumed = build(KDTrainer, completions, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    for name in ("loss", "grad_norm"):
        assert losses_of(resumed, name)[-3:] == losses_of(whole, name)[-3:], name
    plain = build(KDTrainer, completions, **settings, sampled_baseline="none")
    plain.train()
    first, second = (losses_of(trainer, "grad_norm")[:2] for trainer in (whole, plain))
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_only_what_the_student_sampled_is_learnt_from(build: Build, completions: Dataset) -> None:
    # Every other row has no prompt, which nobody can answer.
    rows = [dict(row) if number % 2 else {**row, "prompt": ""} for number, row in enumerate(completions.to_list())]
    trainer: Any = build(KDTrainer, Dataset.from_list(rows), **SAMPLED, **IN_PARTS, completion_only_loss=True)
    trainer.model.train()
    batches = mixed(trainer, 4)
    learnt = [int(batch.student.supervised.sum()) for batch in batches]
    own = [0 if (told := batch.student.rollout) is None else int(told.own.sum()) for batch in batches]
    assert learnt == own
    assert 0 in own
    assert sum(own) == int(trainer._counts["token"])
    assert all(loss == loss for loss in steps(trainer))


def test_a_server_that_is_asked_early_is_asked_about_sampled_tokens_alone(build: Build, completions: Dataset) -> None:
    rows = [dict(row) if number % 2 else {**row, "prompt": ""} for number, row in enumerate(completions.to_list())]
    trainer: Any = build(KDTrainer, Dataset.from_list(rows), **SAMPLED, completion_only_loss=True)
    trainer.model.train()
    (expected,) = mixed(trainer)
    batches, _ = trainer.rollouts.mix([trainer.data_collator([dict(row) for row in trainer.train_dataset])], 0)
    asked: list[Batch] = []
    trainer.teacher = ServerTeacher("http://127.0.0.1:1", k=4)
    trainer.ask = asked.append
    trainer.early_question()(batches[0])
    (batch,) = asked
    assert batch.student.rollout is not None
    assert expected.student.rollout is not None
    assert int(batch.student.supervised.sum()) == int(batch.student.rollout.own.sum()) > 0


def test_a_student_that_is_the_teacher_has_no_loss_and_no_gradient(
    build: Build, completions: Dataset, tiny: dict[str, Path]
) -> None:
    trainer = build(KDTrainer, completions, trainer={"model": str(tiny["teacher"])}, **SAMPLED, max_steps=1)
    loss, norm = steps(trainer)
    assert loss == pytest.approx(0, abs=1e-6)
    assert norm == pytest.approx(0, abs=1e-5)


def test_several_teachers_are_their_weighted_mean(
    build: Build, completions: Dataset, tiny: dict[str, Path], teacher: Any
) -> None:
    student = AutoModelForCausalLM.from_pretrained(tiny["student"], dtype=torch.float32).eval()
    several = SeveralTeachers({"a": teacher, "b": student}, weights={"a": 3, "b": 1})
    trainer: Any = build(KDTrainer, completions, trainer={"teacher": several}, **SAMPLED, max_steps=1)
    alone: Any = build(KDTrainer, completions, trainer={"teacher": teacher}, **SAMPLED, max_steps=1)
    # The second teacher is the student itself, whose log-ratio is 0.
    expected = [0.75 * value for value in steps(alone)]
    assert steps(trainer) == near(expected)
    assert losses_of(trainer, "kl_b")[0] == pytest.approx(0, abs=1e-5)


def test_rows_that_name_their_teachers_learn_from_them_alone(build: Build, routed: Dataset, teacher: Any) -> None:
    same = SeveralTeachers({"a": teacher, "b": teacher}, column="domain")
    trainer = build(KDTrainer, routed, trainer={"teacher": same}, **SAMPLED, rollout_token_weights="importance")
    alone = build(KDTrainer, routed, trainer={"teacher": teacher}, **SAMPLED, rollout_token_weights="importance")
    assert steps(trainer) == near(steps(alone))


@pytest.mark.parametrize("ahead", [0, 1])
def test_tokens_that_a_server_sampled_count_by_how_likely_they_have_become(
    build: Build, completions: Dataset, tokenizer: PreTrainedTokenizerFast, tiny: dict[str, Path], ahead: int
) -> None:
    server = {"max_model_len": 256, "tokenizer": tokenizer, "folder": str(tiny["student"])}
    with fake_vllm(ServedStudent, **server) as fake:
        settings = {**SAMPLED, "rollout_server": [fake.url], "rollout_ahead": ahead, "sampled_baseline": "none"}
        trainer: Any = build(KDTrainer, completions, **settings, clip_ratio=0.02, learning_rate=3e-2)
        steps(trainer)
    clipped = losses_of(trainer, "clipped_tokens")
    assert len(clipped) == 4
    # Tokens of the student as it is, and of the one before a step that was far too long.
    assert clipped[0] == 0
    assert (max(clipped) > 0) is bool(ahead)


# The student's top-k


def test_the_students_top_k_of_the_whole_vocabulary_is_plain_kd(
    build: Build, texts: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain, whole, narrow = (
        steps(build(KDTrainer, texts, divergence="reverse_kl", student_top_k=k)) for k in (None, len(tokenizer), 4)
    )
    assert whole == plain
    assert narrow[0] < plain[0]


def test_the_students_top_k_has_the_value_of_its_outcomes(build: Build, texts: Dataset, teacher: Any) -> None:
    trainer: Any = build(KDTrainer, texts, divergence="reverse_kl", student_top_k=4)
    trainer.model.train()
    (batch,) = mixed(trainer)
    student, judged, _ = log_probs_of(trainer, teacher, batch)
    ids = student.topk(4).indices
    sides = [
        torch.cat([s.gather(-1, ids), s.scatter(-1, ids, -torch.inf).logsumexp(-1, True)], -1)
        for s in (student, judged)
    ]
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss.detach(), reverse_kl(*sides).mean().detach(), rtol=1e-4, atol=1e-6)


# Weights


def test_importance_weighs_the_divergence_of_rollouts_and_not_that_of_the_data(
    build: Build, completions: Dataset, teacher: Any
) -> None:
    settings = {**OWN, "on_policy_fraction": 0.5, "rollout_token_weights": "importance", "importance_gamma": 2.0}
    trainer: Any = build(KDTrainer, completions, **settings)
    trainer.model.train()
    (batch,) = mixed(trainer)
    student, judged, labels = log_probs_of(trainer, teacher, batch)
    gaps = (judged - student.detach()).gather(-1, labels[:, None])[:, 0]
    rows = torch.arange(4)[:, None].expand(batch.student.supervised.shape)[batch.student.supervised]
    assert batch.student.rollout is not None
    own = batch.student.rollout.own[:, 1:][batch.student.supervised]
    weights = prefix_importance(gaps, rows, 2.0).where(own, 1)
    assert 0 < int(own.sum()) < len(own)
    expected = (weights * forward_kl(student, judged)).mean().detach()
    loss = trainer.compute_loss(trainer.model, batch)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-6)


def test_a_token_that_the_teacher_wrote_has_not_strayed(tokenizer: PreTrainedTokenizerFast) -> None:
    """Whether the log-probs of the student's own tokens came from a server, which knows none of others, or not."""
    head = LMHead(torch.randn(30, 6, generator=torch.Generator().manual_seed(0)))
    hidden, labels = torch.randn(8, 6, generator=torch.Generator().manual_seed(1)), torch.arange(8)
    answers, own = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([1, 0, 1, 1, 1, 1, 0, 1]).bool()
    signal = LabelSignal(torch.linspace(-5, -1, 8))
    sampled = head.log_probs(hidden).gather(-1, labels[:, None])[:, 0].where(own, 0)
    here, served = (
        importance_weights(
            Supervised(hidden, head, labels, rollout=RolloutTokens(own, known), answers=answers), signal, 0.5, 4
        )
        for known in (None, sampled)
    )
    torch.testing.assert_close(here, served)
    assert (here[~own] == 1).all()
    assert (here[own] >= here[3]).all()


def test_prefix_learns_from_the_beginning_of_each_rollout(build: Build, completions: Dataset) -> None:
    whole, cut = (
        mixed(build(KDTrainer, completions, **OWN, rollout_token_weights=weights))[0].student
        for weights in ("uniform", "prefix")
    )
    assert torch.equal(whole.inputs["input_ids"], cut.inputs["input_ids"])
    for row in range(4):
        everything, learnt = ((view.labels[row] != -100).nonzero()[:, 0].tolist() for view in (whole, cut))
        assert learnt == everything[: -(-3 * len(everything) // 10)]


# What has no meaning


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"on_policy_fraction": 0.5}, "the data's tokens were not"),
        ({"on_policy_fraction": 0.0}, "the data's tokens were not"),
        ({"rollout_temperature": 0.7}, "rollout_temperature is 0.7"),
        ({"rollout_top_p": 0.9}, "rollout_top_p is 0.9"),
        ({"temperature": 2.0}, "temperature is 2.0"),
        ({"rollouts": "interleaved"}, "no sample of the student's distribution"),
        ({"sampled_as": "loss"}, "does not depend on the teacher"),
        ({"student_top_k": 8}, "Remove student_top_k"),
        ({"estimator": "k2"}, "choose one of k1, k3"),
    ],
)
def test_settings_under_which_samples_estimate_nothing_are_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        KDConfig(str(tmp_path), **{**SAMPLED, **settings})


@pytest.mark.parametrize(
    "settings",
    [
        {"rollout_token_weights": "prefix"},
        {"rollouts": "interleaved"},
        {"rollout_rows": "add"},
        {"rollout_guards": {"steps": 5}},
    ],
)
def test_choices_about_rollouts_without_any_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="with on_policy_fraction: 0 there are none"):
        KDConfig(str(tmp_path), **settings)


def test_weights_of_what_is_no_token_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="about chunks of text"):
        ALMConfig(str(tmp_path), **OWN, rollout_token_weights="importance")


def test_a_teacher_that_lists_its_own_top_k_is_refused(build: Build, texts: Dataset) -> None:
    with pytest.raises(ValueError, match="lists its own most likely tokens only"):
        build(
            KDTrainer,
            texts,
            trainer={"teacher": ServerTeacher("http://127.0.0.1:1", k=4)},
            divergence="reverse_kl",
            student_top_k=4,
        )
