"""Rerankers and models that are asked about pairs: their scores, and the folder in which scores are kept."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, BertConfig, BertForSequenceClassification

from mmkd.cache.pair_scores import PairScores
from mmkd.errors import UserError
from mmkd.teachers.chat_api import ChatClient
from mmkd.teachers.pair_scorers import (
    IMAGE_QUESTION,
    TEXT_QUESTION,
    QuestionScorer,
    RerankerScorer,
    load_pair_scorer,
)
from mmkd.teachers.served_scorer import ServedScorer
from tests.dual_encoders import WORDS, photo, word_tokenizer
from tests.loopback import answering
from tests.teachers.vlm import make_vlm

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_reranker(folder: Path, labels: int = 1) -> Path:
    torch.manual_seed(0)
    config = BertConfig(**{**SIZES, "num_labels": labels}, vocab_size=len(WORDS), initializer_range=0.5)
    BertForSequenceClassification(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return folder


def test_a_reranker_scores_pairs_of_texts_in_their_order_whatever_the_batch(tmp_path: Path) -> None:
    scorer = load_pair_scorer(str(make_reranker(tmp_path)), batch_size=2)
    assert isinstance(scorer, RerankerScorer)
    pairs = [("a red circle", "the red circle"), ("a red circle", "blue"), ("blue", "a red circle")]
    scores = scorer.score(pairs)
    assert len(set(scores.tolist())) == 3
    alone = torch.cat([scorer.score([pair]) for pair in pairs])
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-5)
    assert scorer.score([]).shape == (0,)
    assert scorer.identity["weights"]


def test_a_vlm_gives_the_log_odds_of_yes_and_no_as_its_first_token(tmp_path: Path) -> None:
    scorer = load_pair_scorer(str(make_vlm(tmp_path)), batch_size=2)
    assert isinstance(scorer, QuestionScorer)
    assert scorer.reads_images
    pairs = [(photo(0, 40), "red circle"), (photo(1, 40), "red circle"), (photo(0, 40), "blue")]
    scores = scorer.score(pairs)
    assert len(set(scores.tolist())) == 3
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    content = [{"type": "image"}, {"type": "text", "text": IMAGE_QUESTION.format(text="red circle")}]
    prompt = scorer.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = scorer.processor(text=[prompt], images=[[photo(1, 40)]], return_tensors="pt")
    probabilities = model(**inputs).logits[0, -1].softmax(-1)
    yes, no = (probabilities[scorer.tokens[answer]].sum() for answer in (True, False))
    torch.testing.assert_close(scores[1], (yes / no).log().detach(), rtol=1e-3, atol=1e-3)
    about_texts = scorer.score([("red", "blue"), ("red", "red")])
    assert about_texts[0] != about_texts[1]


def test_models_that_cannot_score_are_named(tmp_path: Path, tiny: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="has 3 logits; a reranker has one"):
        load_pair_scorer(str(make_reranker(tmp_path / "three", labels=3)))
    with pytest.raises(UserError, match=r"and .* is a reranker"):
        load_pair_scorer(str(make_reranker(tmp_path / "one")), question="{text}?")
    with pytest.raises(UserError, match="cannot be loaded"):
        load_pair_scorer(str(tmp_path))
    scorer = load_pair_scorer(str(tiny["teacher"]))
    assert not scorer.reads_images
    with torch.no_grad():
        next(scorer.model.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="gives NaN"):
        scorer.score([("red", "blue")])


def test_a_served_model_is_asked_about_each_pair() -> None:
    asked: list[dict[str, Any]] = []

    def respond(path: str, headers: Any, body: dict[str, Any]) -> tuple[int, Any]:
        if path.endswith("/models"):
            return 200, {"data": [{"id": "vlm"}]}
        asked.append(body)
        tokens = [("Yes", -0.5), (" yes", -3.0), ("No", -1.5), ("Perhaps", -6.0)]
        if "blue" in str(body["messages"]):
            tokens = [("No", -0.1), ("Never", -5.0)]
        if "star" in str(body["messages"]):
            tokens = [("Perhaps", -0.1)]
        listed = [{"token": token, "logprob": log_prob} for token, log_prob in tokens]
        log_probs = None if "silent" in str(body["messages"]) else {"content": [{"top_logprobs": listed}]}
        return 200, {"choices": [{"message": {"content": "Yes"}, "logprobs": log_probs}]}

    with answering(respond) as url, ChatClient([url], None) as client:
        scorer = ServedScorer(client)
        scores = scorer.score([(photo(0), "red circle"), (photo(0), "blue"), (photo(0), "star")])
        expected = math.log(math.exp(-0.5) + math.exp(-3.0)) + 1.5
        # What the server does not list is at most as likely as the last that it does; neither is undecided.
        assert scores.tolist() == pytest.approx([expected, -5.0 + 0.1, 0.0])
        picture, question = asked[0]["messages"][0]["content"]
        assert picture["image_url"]["url"].startswith("data:image/")
        assert question["text"] == IMAGE_QUESTION.format(text="red circle")
        scorer.score([("red", "circle")])
        assert asked[-1]["messages"][0]["content"] == TEXT_QUESTION.format(first="red", text="circle")
        assert scorer.identity["scorer"] == "vlm"
        with pytest.raises(UserError, match="tells no log-probs of its answers"):
            scorer.score([("silent", "circle")])


def test_scores_are_kept_and_a_cut_off_record_is_dropped(tmp_path: Path) -> None:
    keys = [bytes([number]) * 16 for number in range(5)]
    with PairScores(tmp_path, {"scorer": "one"}) as first, PairScores(tmp_path, {"scorer": "one"}, rank=1) as other:
        first.add({keys[0]: 1.5, keys[1]: -2.0})
        other.add({keys[2]: 0.25})
    path = tmp_path / "rank-00000.scores"
    path.write_bytes(path.read_bytes()[:-7])
    with PairScores(tmp_path, {"scorer": "one"}) as again:
        assert again.known == {keys[0]: 1.5, keys[2]: 0.25}
        again.add({keys[3]: 3.0})
    with PairScores(tmp_path, {"scorer": "one"}) as last:
        assert last.known == {keys[0]: 1.5, keys[2]: 0.25, keys[3]: 3.0}
    with pytest.raises(UserError, match="scores of something else: scorer: 'two' here, 'one' there"):
        PairScores(tmp_path, {"scorer": "two"})
    damaged = bytearray(path.read_bytes())
    damaged[17] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=r"Record 0 of .*rank-00000.scores is damaged"):
        PairScores(tmp_path, {"scorer": "one"})


def test_scores_without_a_folder_are_in_memory(tmp_path: Path) -> None:
    with PairScores() as scores:
        scores.add({b"k" * 16: 1.0})
        assert len(scores) == 1
        assert b"k" * 16 in scores
        assert scores[b"k" * 16] == 1
