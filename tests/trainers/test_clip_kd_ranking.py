"""Orders of wrong answers in clip_kd: rankings of teachers and rerankers, hard negatives, accumulation, refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mmkd.errors import UserError
from mmkd.losses.contrastive_losses import similarities, unit
from mmkd.losses.hard_negatives import hard_contrastive, hard_kl, hardest
from mmkd.losses.list_ranking import cprd, pld
from mmkd.methods.clip_kd.clip_config import ContrastiveKDConfig
from mmkd.preparation.pair_batches import PairSampler
from mmkd.teachers.pair_scorers import load_pair_scorer
from tests.loopback import answering
from tests.pairs import captioned, clip_kd, text_pairs
from tests.teachers.test_pair_scorers import make_reranker
from tests.teachers.vlm import make_vlm

ALONE: dict[str, Any] = {
    **dict.fromkeys(("clip_weight", "logit_kl_weight", "affinity_weight", "feature_mse_weight", "icl_weight"), 0.0),
    "max_steps": 1,
}
ROWS = torch.arange(8)
HARD: dict[str, Any] = {"hard_negatives": "teacher", "hard_negatives_count": 2}


def first_loss(trainer: Any) -> tuple[Tensor, dict[str, Any]]:
    keys = list(PairSampler(len(trainer.train_dataset), trainer.pairs_per_step, 3))[: trainer.pairs_per_step]
    batch = trainer.collate([trainer.train_dataset[key] for key in keys])
    trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    return trainer.compute_loss(trainer.model, batch), batch


def directions(trainer: Any, batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Logits of student and teacher, from images to texts and back."""
    both = []
    for encoder, inputs in ((trainer.student, batch["student"]), (trainer.teachers[""], batch["teachers"][""])):
        first = encoder.encode_images(inputs["first"])
        cosines = similarities(unit(first), unit(encoder.encode_texts(inputs["second"])))
        both.append([encoder.logit_scale * cosines.images, encoder.logit_scale * cosines.texts])
    return list(zip(*both, strict=True))


@pytest.mark.parametrize("ranking", ["cprd", "pld"])
def test_the_teachers_order_of_the_nearest_wrong_answers_is_learnt(ranking: str, tmp_path: Path) -> None:
    trainer: Any = clip_kd(tmp_path, **ALONE, ranking=ranking, ranking_negatives=3, ranking_weight=0.5)
    loss, batch = first_loss(trainer)
    expected = []
    for ours, theirs in directions(trainer, batch):
        wrong = ours.masked_fill(torch.eye(8, dtype=torch.bool), -torch.inf)
        items = wrong.topk(3).indices
        candidates = torch.cat([ROWS[:, None], items], 1)
        if ranking == "cprd":
            expected.append(cprd(ours.gather(1, items), theirs.gather(1, items), torch.ones(8, 3, dtype=torch.bool)))
        else:
            first = torch.zeros(8, dtype=torch.long)
            expected.append(pld(ours.gather(1, candidates), theirs.gather(1, candidates), first))
    assert loss.item() == pytest.approx(0.5 * torch.stack(expected).mean().item(), rel=1e-5)


def test_an_order_below_the_least_score_is_not_learnt(tmp_path: Path) -> None:
    trainer: Any = clip_kd(tmp_path, **ALONE, ranking="cprd")
    every, batch = first_loss(trainer)
    told = directions(trainer, batch)[0][1] / trainer.teachers[""].logit_scale
    middle = told[~torch.eye(8, dtype=torch.bool)].median().item()
    none, some = (
        first_loss(clip_kd(tmp_path, **ALONE, ranking="cprd", ranking_min=least))[0].item() for least in (1.0, middle)
    )
    assert none == 0
    assert none < some < every.item()


def test_hard_negatives_are_the_teachers_and_never_of_the_same_caption(tmp_path: Path) -> None:
    settings = {**ALONE, **HARD, "hard_contrast_weight": 0.0, "hard_exponent": 0.0}
    trainer: Any = clip_kd(tmp_path, {"train_dataset": captioned(24, captions=4)}, **settings)
    loss, batch = first_loss(trainer)
    same = batch["captions"][:, None] == batch["captions"]
    assert same.sum() > 8
    expected = []
    for ours, theirs in directions(trainer, batch):
        chosen = hardest(theirs, same, 2)
        assert not same.gather(1, chosen.items)[chosen.present].any()
        expected.append(hard_contrastive(ours, ROWS, chosen) + hard_kl(ours, theirs, ROWS, chosen))
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)


def test_pairs_on_which_the_student_errs_count_more(tmp_path: Path) -> None:
    settings = {**ALONE, **HARD, "hard_contrast_weight": 0.0, "hard_kl_weight": 0.0}
    even, harder, easier = (
        first_loss(clip_kd(tmp_path, **settings, hard_exponent=exponent))[0].item() for exponent in (0.0, 2.0, -2.0)
    )
    assert easier < even < harder


def test_a_served_model_teaches_an_order_and_a_training_goes_on_with_its_scores(tmp_path: Path) -> None:
    asked: list[str] = []
    limit = [40]

    def respond(path: str, headers: Any, body: dict[str, Any]) -> tuple[int, Any]:
        if path.endswith("/models"):
            return 200, {"data": [{"id": "vlm"}]}
        if len(asked) == limit[0]:
            return 401, {"error": {"message": "no more"}}
        asked.append(str(body["messages"]))
        log_prob = -0.1 - len(asked[-1]) % 7
        listed = [{"token": "yes", "logprob": log_prob}, {"token": "no", "logprob": -1.0}]
        return 200, {"choices": [{"message": {"content": "yes"}, "logprobs": {"content": [{"top_logprobs": listed}]}}]}

    settings = {**ALONE, "ranking": "pld", "ranking_negatives": 3, "ranking_cache": str(tmp_path / "scores")}
    with answering(respond) as url:
        settings |= {"ranking_server": url, "ranking_batch_size": 4, "max_steps": 2}
        with pytest.raises(UserError, match="no more"):
            clip_kd(tmp_path, **settings).train()
        trainer: Any = clip_kd(tmp_path, {"eval_dataset": captioned(8)}, **{**settings, "max_steps": 1})
        # Each part that was answered whole is kept.
        kept = len(trainer.scored.scores)
        assert 32 <= kept <= 40
        limit[0], asked[:] = -1, []
        trainer.train()
        assert 0 < len(asked) == len(trainer.scored.scores) - kept
        assert trainer.evaluate()["eval_ranking_loss"] > 0
    with pytest.raises(UserError, match="both say whose order is learnt"):
        clip_kd(tmp_path, **settings, ranking_teacher="x")


def test_a_reranker_is_asked_once_about_the_nearest_captions(tmp_path: Path) -> None:
    reranker = str(make_reranker(tmp_path / "reranker"))
    kept = {"ranking_teacher": reranker, "ranking_cache": str(tmp_path / "scores")}
    settings = {**ALONE, "ranking": "pld", "ranking_negatives": 2, **kept}
    trainer: Any = clip_kd(tmp_path, {"teachers": None}, **settings)
    loss, batch = first_loss(trainer)
    # Of 8 pairs, in both directions, with itself and two others; a caption with itself is one pair.
    assert 8 < trainer.scored.asked <= 40
    captions, scorer = batch["texts"], load_pair_scorer(reranker)
    student = trainer.student
    cosines = similarities(
        unit(student.encode_images(batch["student"]["first"])), unit(student.encode_texts(batch["student"]["second"]))
    )
    expected = []
    for of_images, ours in ((True, cosines.images), (False, cosines.texts)):
        items = torch.cat([ROWS[:, None], ours.masked_fill(torch.eye(8, dtype=torch.bool), -2).topk(2).indices], 1)
        pairs = [(row, column) if of_images else (column, row) for row in range(8) for column in items[row].tolist()]
        told = scorer.score([(captions[first], captions[second]) for first, second in pairs]).reshape(8, 3)
        expected.append(pld(student.logit_scale * ours.gather(1, items), told, torch.zeros(8, dtype=torch.long)))
    assert loss.item() == pytest.approx(torch.stack(expected).mean().item(), rel=1e-5)
    again: Any = clip_kd(tmp_path, {"teachers": None}, **settings)
    assert first_loss(again)[0].item() == loss.item()
    assert again.scored.asked == 0


def test_a_vlm_sees_the_pictures_and_a_reranker_pairs_of_texts(tmp_path: Path) -> None:
    vlm, reranker = str(make_vlm(tmp_path / "vlm")), str(make_reranker(tmp_path / "reranker"))
    asked = {"ranking": "cprd", "ranking_negatives": 1, "ranking_min": 0.0}
    seeing: Any = clip_kd(
        tmp_path, {"teachers": None}, **ALONE, **asked, ranking_teacher=vlm, per_device_train_batch_size=2
    )
    assert first_loss(seeing)[0].item() == 0
    assert seeing.scored.shows_pictures
    assert seeing.scored.asked == 4
    reading: Any = clip_kd(
        tmp_path, {"train_dataset": text_pairs(24), "teachers": None}, **ALONE, **asked, ranking_teacher=reranker
    )
    assert first_loss(reading)[0].item() == 0
    assert reading.scored._first(0, "") == "the a red circle"


def test_accumulated_batches_are_whole_ones_with_every_term(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**HARD, "ranking": "cprd", "ranking_negatives": 3, "ranking_min": 0.2}
    settings["ranking_teacher"] = str(make_reranker(tmp_path / "reranker"))
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer: Any = clip_kd(tmp_path, max_steps=2, **sizes, **settings)
        trainer.train()
        history = trainer.state.log_history
        assert {"ranking_loss", "hard_negatives_loss"} <= history[0].keys()
        runs.append([[entry["loss"], entry["grad_norm"]] for entry in history if "grad_norm" in entry])
    assert runs[0] == [pytest.approx(step, rel=1e-5) for step in runs[1]]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ranking_teacher": "x"}, "ranking_teacher is for `ranking`"),
        ({"ranking_min": 0.5}, "ranking_min is for `ranking`"),
        ({"ranking": "pld", "ranking_min": 0.5}, "ranking_min is for ranking: cprd"),
        ({"ranking": "cprd", "ranking_cache": "x"}, "for scores of a ranking_teacher"),
        ({"ranking": "cprd", "ranking_teacher": "x", "ranking_question": "Yes?"}, r"has no \{text\}"),
        ({"ranking": "lambda"}, "cprd"),
        ({"ranking": "pld", "ranking_temperature": float("nan")}, "ranking_temperature"),
        ({"hard_negatives": "teacher", "hard_negatives_count": 0}, "hard_negatives_count"),
        ({"hard_negatives": "teacher", "hard_exponent": float("nan")}, "hard_exponent"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        ContrastiveKDConfig(output_dir=str(tmp_path), **settings)


def test_orders_need_somebody_to_learn_them_from(tmp_path: Path) -> None:
    for settings in ({"ranking": "cprd"}, HARD):
        with pytest.raises(UserError, match="there is no teacher to learn from"):
            clip_kd(tmp_path, {"teachers": None}, **settings)
