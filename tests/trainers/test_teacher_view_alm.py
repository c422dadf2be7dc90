"""A teacher with a tokenizer of its own that reads the same answer behind another prompt."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from mmkd.errors import UserError
from mmkd.methods.alm import ALMTrainer
from scripts.make_tiny_models import sentences
from tests.helpers import Build, steps

VIEW = {"template": "{hint} {prompt}", "columns": ["hint"]}
SAME = {"template": "{prompt}"}


@pytest.fixture
def alm(build: Build, foreign: Path) -> Any:
    """`alm(data, key=value, ...)`: a trainer of the tiny student and the foreign teacher."""

    def make(data: Any, teacher: Any = None, **settings: Any) -> Any:
        settings = {"chunks": "all", "max_steps": 2, "max_length": 256, **settings}
        return build(ALMTrainer, data, trainer={"teacher": teacher or str(foreign)}, **settings)

    return make


def asked(chat: bool = False) -> Dataset:
    questions, answers, hints = (sentences(8, seed=seed) for seed in (3, 4, 5))
    rows = []
    for question, answer, hint in zip(questions, answers, hints, strict=True):
        prompt: Any = [{"role": "user", "content": question}] if chat else question
        completion: Any = [{"role": "assistant", "content": answer}] if chat else f" {answer}"
        rows.append({"prompt": prompt, "completion": completion, "hint": hint})
    return Dataset.from_list(rows)


def rows_of(data: Dataset) -> list[Any]:
    return list(data)


def tokenizer_of_teacher(trainer: Any, data: Dataset) -> Any:
    return trainer._readings.readers(data, trainer.args)[""].rows.labelling.processing_class


def first_batch(trainer: Any) -> Any:
    return next(iter(trainer.get_train_dataloader()))


@pytest.mark.parametrize("chat", [False, True])
def test_the_students_own_prompt_is_plain_training(alm: Any, chat: bool) -> None:
    data = asked(chat)
    assert steps(alm(data, teacher_view=SAME)) == steps(alm(data))


def test_the_same_chunks_are_likely_behind_another_prompt(alm: Any) -> None:
    data = asked()
    plain, told = (alm(data, teacher_view=view) for view in (None, VIEW))
    batches = [first_batch(trainer) for trainer in (plain, told)]
    alignments = [batch.readings[""].alignment for batch in batches]
    assert all(torch.equal(getattr(alignments[0], name), getattr(alignments[1], name)) for name in vars(alignments[0]))
    view, reader = batches[1].readings[""].view, tokenizer_of_teacher(told, data)
    signal = told.ask(batches[1])
    log_probs = []
    for ids, mask, labels in zip(view["input_ids"], view["attention_mask"], view.labels, strict=True):
        tokens = ids[mask.bool()]
        text = reader.decode(tokens)
        assert any(text.startswith(f"{row['hint']} {row['prompt']}{row['completion']}") for row in rows_of(data))
        with torch.no_grad():
            own = told.teacher.model(input_ids=tokens[None]).logits[0, :-1].double().log_softmax(-1)
        own = own.gather(-1, tokens[1:, None])[:, 0]
        log_probs.append(own[labels[mask.bool()][1:] != -100])
    expected = torch.zeros(len(alignments[1]), dtype=torch.float64)
    chunk = alignments[1].teacher_chunk
    expected.index_add_(0, chunk[chunk >= 0], torch.cat(log_probs)[chunk >= 0])
    torch.testing.assert_close(signal.log_probs.double(), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(plain.ask(batches[0]).log_probs, signal.log_probs, atol=1e-3)


@pytest.mark.parametrize("chat", [False, True])
def test_a_rollout_is_read_behind_the_teachers_prompt(alm: Any, chat: bool) -> None:
    data = asked(chat)
    trainer = alm(data, teacher_view=VIEW, on_policy_fraction=1.0, rollout_max_tokens=6, max_steps=1)
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    view, reader = batches[0].readings[""].view, tokenizer_of_teacher(trainer, data)
    texts = [
        reader.decode(ids[mask.bool()]) for ids, mask in zip(view["input_ids"], view["attention_mask"], strict=True)
    ]
    questions, answers = (
        [row[name][0]["content"] if chat else row[name] for row in rows_of(data)] for name in ("prompt", "completion")
    )
    told = [f"{hint} {question}" for hint, question in zip(data["hint"], questions, strict=True)]
    assert all(any(question in text for question in told) for text in texts)
    assert not any(answer in text for text in texts for answer in answers)
    assert len(steps(trainer)) == 2


def test_a_rollout_that_the_teacher_cannot_read_to_its_end_is_told(alm: Any, caplog: Any) -> None:
    data = asked()
    longest = max(map(len, alm(data, teacher_view=VIEW).train_dataset["teacher_input_ids"]))
    settings = {"teacher_view": VIEW, "teacher_max_length": longest, "on_policy_fraction": 1.0, "max_steps": 1}
    steps(alm(data, **settings, rollout_max_tokens=1))
    assert "What is beyond is not taught" not in caplog.text
    steps(alm(data, **settings, rollout_max_tokens=48))
    assert f"than the {longest} that it reads. What is beyond is not taught" in caplog.text


def test_streams_and_packs(alm: Any) -> None:
    data = asked()
    assert steps(alm(data.to_iterable_dataset(), teacher_view=VIEW)) != steps(alm(data.to_iterable_dataset()))
    assert len(steps(alm(data, teacher_view=VIEW, packing=True, max_length=64))) == 4


def test_a_share_of_rows_is_read_as_the_student_reads_it(alm: Any) -> None:
    data = asked()
    whole, none = (alm(data, teacher_view=VIEW, privileged_dropout=share) for share in (0.0, 1.0))
    assert steps(none) == steps(alm(data))
    half = alm(data, teacher_view=VIEW, privileged_dropout=0.5)
    pairs = zip(*(trainer.train_dataset["teacher_input_ids"] for trainer in (whole, half)), strict=True)
    assert 0 < sum(ours != theirs for ours, theirs in pairs) < len(data)


def test_plain_text_is_refused(alm: Any, texts: Dataset) -> None:
    data = texts.add_column("hint", ["so"] * len(texts))  # pyright: ignore[reportCallIssue]
    with pytest.raises(UserError, match="plain text, of which alm aligns everything"):
        alm(data, teacher_view={"template": "{hint}", "columns": ["hint"]})
