"""What a batch knows of its rollouts, token by token: which tokens they are, and how likely they were."""

from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from mmkd.methods.kd import KDTrainer
from mmkd.teachers.batch import Batch
from tests.helpers import Build
from tests.teachers.fake_vllm import fake_vllm
from tests.trainers.served_student import ServedStudent

HALF: dict[str, Any] = {"on_policy_fraction": 0.5, "rollout_max_tokens": 8, "rollout_temperature": 0.0}


def mixed(trainer: Any) -> Batch:
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))[0][0]


@pytest.mark.parametrize("drop", ["keep", "drop"])
def test_tokens_of_rollouts_are_known_in_padded_rows(build: Build, completions: Dataset, drop: str) -> None:
    trainer: Any = build(KDTrainer, completions, **HALF, rollout_truncated=drop)
    view = mixed(trainer).student
    assert view.rollout is not None
    answered = view.rollout.own.any(1)
    assert answered.sum() == 2
    lengths = view.inputs["attention_mask"].sum(1)
    for row in answered.nonzero()[:, 0].tolist():
        places = view.rollout.own[row].nonzero()[:, 0]
        assert places.tolist() == list(range(int(places[0]), int(lengths[row])))
        # Those that do not end are rollouts, too, where nothing is learnt from them.
        learnt = (view.labels[row] != -100).nonzero()[:, 0]
        assert learnt.tolist() in ([places.tolist()] if drop == "keep" else [places.tolist(), []])
    assert view.rollout.log_probs is None
    assert view.rollout.advantages is None
    part = view.of_rows(answered)
    assert part.rollout is not None
    assert torch.equal(part.rollout.own, view.rollout.own[answered])


def test_tokens_of_rollouts_are_known_in_rows_laid_end_to_end(build: Build, completions: Dataset) -> None:
    settings = {**HALF, "max_length": None, "per_device_train_batch_size": 4}
    padded, laid = (mixed(build(KDTrainer, completions, padding_free=free, **settings)) for free in (False, True))
    assert padded.student.rollout is not None
    assert laid.student.rollout is not None
    real = padded.student.inputs["attention_mask"].bool()
    assert laid.student.rollout.own.shape == laid.student.labels.shape
    assert torch.equal(laid.student.rollout.own[0, : int(real.sum())], padded.student.rollout.own[real])


@pytest.mark.parametrize("free", [False, True])
def test_a_server_says_how_likely_its_tokens_were(
    build: Build, completions: Dataset, tokenizer: PreTrainedTokenizerFast, free: bool
) -> None:
    """As likely as the student finds them."""
    with fake_vllm(ServedStudent, max_model_len=256, tokenizer=tokenizer) as fake:
        trainer: Any = build(
            KDTrainer, completions, **HALF, rollout_server=[fake.url], padding_free=free, max_length=None
        )
        view = mixed(trainer).student
        assert {request["logprobs"] for request in fake.requests if "prompt_logprobs" not in request} == {0}
    assert view.rollout is not None
    assert view.rollout.log_probs is not None
    own = view.rollout.own[:, 1:]
    with torch.no_grad():
        log_probs = trainer.model.eval()(**view.inputs).logits.log_softmax(-1)[:, :-1]
    expected = log_probs.gather(-1, view.inputs["input_ids"][:, 1:, None])[..., 0]
    torch.testing.assert_close(view.rollout.log_probs[:, 1:][own], expected[own], rtol=0, atol=1e-4)
    assert not view.rollout.log_probs[~view.rollout.own].any()
