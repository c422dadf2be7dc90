"""Interleaved rollouts: with all tokens likely they are the student's, else the teacher rules unlikely tokens out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from mmkd.generation.interleaved import LikelyTokens
from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDTrainer
from mmkd.teachers.batch import ONLY
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.several import SeveralTeachers
from mmkd.training.interleaved_rollouts import BlockGenerator
from tests.helpers import Build, losses_of
from tests.teachers.fake_vllm import ServedLogProbs, fake_vllm
from tests.trainers.served_student import ServedStudent
from tests.vlms import make_llava, vision_rows

ALL: dict[str, Any] = {"on_policy_fraction": 1.0, "rollout_max_tokens": 8, "rollouts": "interleaved"}
GREEDY: dict[str, Any] = {**ALL, "rollout_temperature": 0.0, "interleaved_top_k": 100}
EVERY_TOKEN = 100_000


def mixed(trainer: Any) -> Any:
    """The first batch with its rollouts."""
    return trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))[0][0]


def same(first: Any, second: Any) -> bool:
    return all(
        torch.equal(*pair)
        for pair in [
            (first["input_ids"], second["input_ids"]),
            (first["labels"], second["labels"]),
            (first.student.rollout.own, second.student.rollout.own),
        ]
    )


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_with_all_tokens_likely_the_student_speaks_alone(build: Build, completions: Dataset, top_p: float) -> None:
    settings = {**ALL, "rollout_top_p": top_p, "interleaved_top_k": EVERY_TOKEN, "rollout_batch_size": 3}
    both = mixed(build(KDTrainer, completions, **settings))
    alone = mixed(build(KDTrainer, completions, **{**settings, "rollouts": "student"}))
    assert same(both, alone)


def test_images_are_read_by_both(build: Build, tmp_path: Path) -> None:
    models = {"model": str(make_llava(tmp_path / "student")), "teacher": str(make_llava(tmp_path / "teacher", seed=3))}
    settings = {"assistant_only_loss": True, "max_length": 128, **ALL, "interleaved_top_k": EVERY_TOKEN}
    rows = vision_rows([1, 2, 0, 3])
    both = mixed(build(KDTrainer, rows, trainer=models, **settings))
    assert same(both, mixed(build(KDTrainer, rows, trainer=models, **{**settings, "rollouts": "student"})))
    trainer: Any = build(KDTrainer, rows, trainer=models, **{**settings, "interleaved_top_k": 2})
    batch = mixed(trainer)
    told = {name: value for name, value in batch.student.inputs.items()}
    with torch.no_grad():
        likely = trainer.teacher.model(**told).logits[:, :-1].topk(2).indices
    places = batch.student.supervised
    assert (likely[places] == batch["labels"][:, 1:][places][:, None]).any(-1).all()


def reference(student: Any, teacher: Any, ids: list[int], read: list[int], k: int) -> tuple[list[int], list[bool]]:
    """A greedy interleaved answer, each token by a pass over everything before it; the teacher has read `read`."""
    prompts = {student: ids, teacher: read}
    said, replaced = list[int](), list[bool]()
    while len(said) < 8 and said[-1:] != [1]:
        with torch.no_grad():
            ours, theirs = (
                model(input_ids=torch.tensor([own + said])).logits[0, -1] for model, own in prompts.items()
            )
        token = int(ours.argmax())
        replaced.append(token not in theirs.topk(k).indices.tolist())
        said.append(int(theirs.argmax()) if replaced[-1] else token)
    return said, replaced


def test_a_token_that_is_not_likely_is_the_teachers(build: Build, completions: Dataset) -> None:
    trainer: Any = build(KDTrainer, completions, **GREEDY)
    batch = mixed(trainer)
    student, teacher = trainer.model.eval(), trainer.teacher.model
    seen = []
    for row, labels in enumerate(batch["labels"]):
        start = int((labels != -100).nonzero()[0])
        ids = batch["input_ids"][row, :start].tolist()
        said, replaced = reference(student, teacher, ids, ids, 100)
        assert batch["input_ids"][row, start : start + len(said)].tolist() == said
        assert (~batch.student.rollout.own[row, start : start + len(said)]).tolist() == replaced
        assert not batch.student.rollout.own[row, :start].any()
        seen += replaced
    assert {*seen} == {True, False}


@pytest.mark.parametrize("laid", [{}, {"packing": True, "max_length": 200}])
def test_a_teacher_judges_behind_its_own_prompt(build: Build, completions: Dataset, laid: dict[str, Any]) -> None:
    view = {"template": "the red dog saw {prompt}"}
    trainer: Any = build(KDTrainer, completions, teacher_view=view, **GREEDY, **laid)
    asked: list[Any] = []
    generate = trainer.rollouts.generator.generate

    def spied(prompts: Any, *settings: Any) -> Any:
        asked.append(list(zip(prompts, answers := generate(prompts, *settings), strict=True)))
        return answers

    trainer.rollouts.generator.generate = spied
    mixed(trainer)
    student, teacher = trainer.model.eval(), trainer.teacher.model
    for prompt, (answer,) in asked[0][:3]:
        read = prompt.of_teachers[ONLY]
        assert trainer.processing_class.decode(read).startswith("the red dog saw ")
        assert (answer.ids, answer.replaced) == reference(student, teacher, prompt.ids, read, 100)


@pytest.mark.parametrize("laid", [{}, {"padding_free": True, "max_length": None}])
def test_a_teacher_judges_plain_text_behind_its_own_beginning(
    build: Build, texts: Dataset, laid: dict[str, Any]
) -> None:
    rows = texts.add_column("topic", ["the red dog saw"] * len(texts))  # pyright: ignore[reportCallIssue]
    view = {"template": "{topic} ", "columns": ["topic"]}
    trainer: Any = build(KDTrainer, rows, teacher_view=view, rollout_prompt_tokens=4, **GREEDY, **laid)
    batch = mixed(trainer)
    student, teacher = trainer.model.eval(), trainer.teacher.model
    single, theirs = (side.inputs["input_ids"][0].tolist() for side in (batch.student, batch.teacher_view()))
    before = len(trainer.processing_class("the red dog saw ")["input_ids"])
    said, replaced = reference(student, teacher, single[:4], theirs[: before + 4], 100)
    assert single[4 : 4 + len(said)] == said
    assert (~batch.student.rollout.own[0, 4 : 4 + len(said)]).tolist() == replaced


def test_tokens_are_replaced_by_the_teachers_at_its_odds() -> None:
    likely = LikelyTokens(
        torch.tensor([[7, 5, 9]]).repeat(20_000, 1), torch.tensor([0.5, 0.2, 0.1]).log().repeat(20_000, 1)
    )
    proposed = torch.tensor([5, 6]).repeat(10_000)
    tokens, replaced = likely.replace(proposed, 0.5, torch.Generator().manual_seed(0))
    assert torch.equal(replaced, proposed == 6)
    assert (tokens[~replaced] == 5).all()
    shares = torch.tensor([(tokens[replaced] == token).float().mean() for token in (7, 5, 9)])
    assert (shares - torch.tensor([25.0, 4.0, 1.0]) / 30).abs().max() < 4 * (0.25 / 10_000) ** 0.5


def test_every_token_is_likely_and_a_run_says_how_many_were_replaced(build: Build, completions: Dataset) -> None:
    trainer: Any = build(KDTrainer, completions, **{**ALL, "interleaved_top_k": 100, "max_steps": 2})
    batch = mixed(trainer)
    assert same(batch, mixed(trainer))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        likely = trainer.teacher.model(**inputs).logits[:, :-1].topk(100).indices
    places = batch.student.supervised
    assert (likely[places] == batch["labels"][:, 1:][places][:, None]).any(-1).all()
    trainer.train()
    assert 0 < losses_of(trainer, "rollouts_replaced")[0] < 1


def test_blocks_that_a_teacher_judges_give_the_same_answers(
    build: Build, completions: Dataset, tiny: dict[str, Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Whoever proposes them, and whoever judges: a server, several teachers that agree."""
    expected = mixed(build(KDTrainer, completions, **GREEDY))
    served: Any = AutoModelForCausalLM.from_pretrained(tiny["teacher"])
    serving = {"max_model_len": 256, "tokenizer": tokenizer}
    with (
        fake_vllm(ServedLogProbs, served=served, **serving) as teacher,
        fake_vllm(ServedStudent, **serving) as student,
    ):
        settings = {**GREEDY, "rollout_server": [student.url]}
        several = SeveralTeachers({"a": str(tiny["teacher"]), "b": str(tiny["teacher"])})
        trainers: list[Any] = [
            build(KDTrainer, completions, trainer={"teacher": ServerTeacher(teacher.url, k=100)}, **GREEDY),
            build(KDTrainer, completions, trainer={"teacher": several}, **GREEDY),
            build(KDTrainer, completions, **settings),
        ]
        for trainer in trainers:
            assert isinstance(trainer.rollouts.generator, BlockGenerator)
            assert same(mixed(trainer), expected)
        # Of what the server's student said itself it also knew how likely that was.
        rollout = mixed(trainers[-1]).student.rollout
        assert (rollout.log_probs[rollout.own] < 0).all()
        assert (rollout.log_probs[~rollout.own] == 0).all()
        with pytest.raises(ValueError, match=r"asked for 20 tokens only\. Set teacher_top_k: 100"):
            build(KDTrainer, completions, trainer={"teacher": ServerTeacher(teacher.url, k=20)}, **GREEDY)


def test_a_teacher_with_other_tokens_cannot_judge_single_ones(build: Build, completions: Dataset) -> None:
    with pytest.raises(ValueError, match="method alm has tokens of its own"):
        build(ALMTrainer, completions, **GREEDY)
