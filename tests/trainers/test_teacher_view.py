"""A teacher that reads another prompt: the same answers, whatever stands before them, wherever the teacher runs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from mmkd.errors import UserError
from mmkd.losses.divergences import forward_kl
from mmkd.methods.kd import KDTrainer
from mmkd.methods.sft import SFTBaselineTrainer
from mmkd.methods.taid import TAIDTrainer
from scripts.make_tiny_models import sentences
from tests.helpers import Build, losses_of, steps

SAME: dict[str, Any] = {"template": "{prompt}"}
HINT: dict[str, Any] = {"template": "{hint} {prompt}", "columns": ["hint"]}


@pytest.fixture
def hinted(completions: Dataset) -> Dataset:
    """Prompts and completions, with a column that only the teacher reads."""
    return completions.add_column("hint", sentences(24, seed=5))  # pyright: ignore[reportCallIssue]


@pytest.fixture
def talks(chats: Dataset) -> Dataset:
    """Conversations with the same column, of which some have two answers."""
    rows = [
        {"messages": messages * (1 + number % 2), "hint": hint}
        for number, (messages, hint) in enumerate(zip(chats["messages"], sentences(24, seed=5), strict=True))
    ]
    return Dataset.from_list(rows)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"padding_free": True, "max_length": None},
        {"packing": True},
        {"max_length": 24},
        {"ce_weight": 0.3, "temperature": 2.0},
    ],
    ids=str,
)
def test_the_students_own_prompt_is_plain_kd_bit_for_bit(
    build: Build, hinted: Dataset, settings: dict[str, Any]
) -> None:
    plain = steps(build(KDTrainer, hinted, **settings))
    assert steps(build(KDTrainer, hinted, teacher_view=SAME, **settings)) == plain
    assert steps(build(KDTrainer, hinted, teacher_view=HINT, **settings)) != plain


def test_conversations_and_other_methods_bit_for_bit(build: Build, talks: Dataset) -> None:
    learnt = {"assistant_only_loss": True, "max_length": 96}
    for method in (KDTrainer, TAIDTrainer, SFTBaselineTrainer):
        plain = build(method, talks, **learnt)
        same = build(method, talks, teacher_view=SAME, **learnt)
        told = build(method, talks, teacher_view=HINT, **learnt)
        assert steps(same) == steps(plain)
        assert losses_of(same, "kl") == losses_of(plain, "kl")
        steps(told)
        assert losses_of(told, "kl") != losses_of(plain, "kl")


def test_the_loss_is_that_of_two_prompts_made_by_hand(build: Build, hinted: Dataset, tiny: dict[str, Path]) -> None:
    rows = hinted.select(range(4))
    trainer = build(KDTrainer, rows, teacher_view=HINT, max_steps=1)
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(4)])
    losses = trainer.forward(trainer.model, batch, lambda read: trainer.losses_of(read, trainer.ask(batch)))
    student, teacher = (AutoModelForCausalLM.from_pretrained(tiny[role]).eval() for role in ("student", "teacher"))
    tokenizer = AutoTokenizer.from_pretrained(tiny["student"])
    by_hand = torch.zeros(())
    for row in rows:
        assert isinstance(row, dict)
        asked = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"][len(asked) :]
        told = tokenizer(f"{row['hint']} {row['prompt']}")["input_ids"]
        ours, theirs = (
            model(torch.tensor([[*before, *answer]])).logits[0, len(before) - 1 : -1].log_softmax(-1)
            for model, before in ((student, asked), (teacher, told))
        )
        by_hand += forward_kl(ours, theirs).sum()
    assert losses.totals["token"].item() == pytest.approx(by_hand.item(), rel=1e-4)


def test_a_stream_and_rows_at_hand_give_the_same_batches(build: Build, hinted: Dataset) -> None:
    at_hand = build(KDTrainer, hinted, teacher_view=HINT)
    streamed = build(KDTrainer, hinted.to_iterable_dataset(), teacher_view=HINT)
    rows = list(streamed.train_dataset)
    assert len(rows) == len(at_hand.train_dataset)
    for row, other in zip(rows, at_hand.train_dataset, strict=True):
        assert {name: row[name] for name in other} == {**other}


def test_plain_text_stands_after_what_the_teacher_reads(build: Build, texts: Dataset) -> None:
    rows = texts.add_column("topic", sentences(24, seed=6))  # pyright: ignore[reportCallIssue]
    trainer = build(KDTrainer, rows, teacher_view={"template": "{topic} ", "columns": ["topic"]})
    row = trainer.train_dataset[0]
    before = trainer.processing_class(rows[0]["topic"] + " ")["input_ids"]
    assert row["teacher_input_ids"] == [*before, *row["input_ids"]]
    assert row["teacher_labels"] == [*[-100] * (len(before) + 1), *row["labels"][1:]]
    steps(trainer)


def test_answers_are_cut_on_both_sides_and_rows_beyond_the_teachers_length_are_counted(
    build: Build, hinted: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    whole = build(KDTrainer, hinted, teacher_view=HINT)
    lengths = sorted(len(ids) for ids in whole.train_dataset["teacher_input_ids"])
    limit = lengths[len(lengths) // 2]
    trainer = build(KDTrainer, hinted, teacher_view=HINT, teacher_max_length=limit, max_length=24)
    for row in trainer.train_dataset:
        ours, theirs = ([index for index in row[name][1:] if index != -100] for name in ("labels", "teacher_labels"))
        assert ours == theirs
        assert len(row["teacher_input_ids"]) <= limit
    steps(trainer)
    few = build(KDTrainer, hinted, teacher_view=HINT, teacher_max_length=limit)
    left_out = sum(length > limit for length in lengths)
    assert len(few.train_dataset) == 24 - left_out
    assert f"{left_out} whose teacher's prompt and answer are longer than teacher_max_length {limit}" in caplog.text


def test_on_policy_the_students_answer_stands_behind_both_prompts(build: Build, hinted: Dataset) -> None:
    own: dict[str, Any] = {"on_policy_fraction": 1.0, "rollout_max_tokens": 6, "max_steps": 2}
    for more in ({}, {"packing": True}):
        settings = {**own, **more}
        plain = steps(build(KDTrainer, hinted, **settings))
        assert steps(build(KDTrainer, hinted, teacher_view=SAME, **settings)) == plain
        told = build(KDTrainer, hinted, teacher_view=HINT, **settings)
        seen: list[Any] = []
        ask = told.ask
        told.ask = lambda batch, ask=ask, seen=seen: seen.append(batch) or ask(batch)
        steps(told)
        batch = seen[-1]
        ours, theirs = batch.student, batch.teacher_view()
        assert torch.equal(ours.labels[:, 1:][ours.supervised], theirs.labels[:, 1:][theirs.supervised])
        assert theirs.labels.numel() > ours.labels.numel()


def test_dropout_gives_the_teacher_the_students_prompt_in_the_same_rows(build: Build, hinted: Dataset) -> None:
    trainer = build(KDTrainer, hinted, teacher_view=HINT, privileged_dropout=0.5)
    same = [row["teacher_input_ids"] == row["input_ids"] for row in trainer.train_dataset]
    assert 4 < sum(same) < 20
    again = build(KDTrainer, hinted.select(range(6, 24)), teacher_view=HINT, privileged_dropout=0.5)
    assert [row["teacher_input_ids"] == row["input_ids"] for row in again.train_dataset] == same[6:]
    other = build(KDTrainer, hinted, teacher_view=HINT, privileged_dropout=0.5, seed=7)
    assert [row["teacher_input_ids"] == row["input_ids"] for row in other.train_dataset] != same
    everywhere = build(KDTrainer, hinted, teacher_view=HINT, privileged_dropout=1.0)
    assert steps(everywhere) == steps(build(KDTrainer, hinted))


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ("talks", {"teacher_view": HINT}, "assistant_only_loss: true"),
        ("hinted", {"teacher_view": HINT, "completion_only_loss": False}, "completion_only_loss: true"),
        ("hinted", {"teacher_view": {"system": "Think."}}, "plain text"),
        ("hinted", {"teacher_view": HINT, "packing": True, "packing_strategy": "wrapped"}, "packing_strategy"),
        ("hinted", {"teacher_view": {"template": "{x}", "columns": ["x"]}}, "'x', which the train rows"),
        ("hinted", {"privileged_dropout": 0.5}, "there is no teacher_view"),
        ("hinted", {"teacher_max_length": 20}, "without a teacher_view"),
        ("hinted", {"teacher_view": HINT, "teacher_max_length": 2}, "in all 24 train rows"),
    ],
)
def test_what_a_view_cannot_be_about_is_refused(
    build: Build, request: pytest.FixtureRequest, data: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        build(KDTrainer, request.getfixturevalue(data), **settings)


def test_a_view_without_a_teacher_is_refused(build: Build, hinted: Dataset) -> None:
    with pytest.raises(UserError, match="there is no teacher"):
        build(SFTBaselineTrainer, hinted, trainer={"teacher": None}, teacher_view=HINT)
