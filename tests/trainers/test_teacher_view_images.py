"""A teacher that reads more than the student about an image: another prompt, another picture, or a picture at all."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Image, List, concatenate_datasets
from transformers import AutoProcessor

from mmkd.errors import UserError
from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDTrainer
from mmkd.methods.llava_kd import LLaVAKDTrainer
from mmkd.teachers.several import SeveralTeachers
from tests.helpers import Build, losses_of, steps
from tests.trainers.test_served_images import SETTINGS as SERVED
from tests.trainers.test_served_images import teachers, trained
from tests.vlms import picture, vision_rows

SETTINGS: dict[str, Any] = {"assistant_only_loss": True, "max_length": 128, "learning_rate": 1e-2, "max_steps": 2}
SAME = {"template": "{prompt}"}


@pytest.fixture
def teach(build: Build, vlms: dict[str, Path]) -> Any:
    """`teach(trainer class, rows, key=value, ...)`: a trainer of the tiny LLaVA models."""

    def make(cls: Any, data: Dataset, teacher: Any = None, **settings: Any) -> Any:
        models = {"model": str(vlms["student"]), "teacher": str(vlms["teacher"]) if teacher is None else teacher}
        return build(cls, data, trainer=models, **{**SETTINGS, **settings})

    return make


def with_pictures(data: Dataset, counts: list[int], seed: int = 7, name: str = "clean") -> Dataset:
    """The rows with so many pictures each in one more column."""
    pictures = [[picture(seed + 50 * row + number) for number in range(count)] for row, count in enumerate(counts)]
    column = Dataset.from_dict({name: pictures}, features=Features({name: List(Image())}))
    return concatenate_datasets([data, column], axis=1)


@pytest.mark.parametrize("cls", [KDTrainer, LLaVAKDTrainer])
def test_the_students_own_prompt_is_plain_training(teach: Any, cls: Any) -> None:
    data = vision_rows([1, 2, 0, 1])
    assert steps(teach(cls, data, teacher_view=SAME)) == steps(teach(cls, data))


HINT = {"system": "Look closely.", "template": "{prompt} Hint: {hint}", "columns": ["hint"], "images_column": "clean"}


def hinted(images: list[int], clean: list[int]) -> Dataset:
    rows = with_pictures(vision_rows(images), clean)
    return rows.add_column("hint", [f"it is {row}" for row in range(len(images))])  # pyright: ignore[reportCallIssue]


def by_hand(row: dict[str, Any]) -> dict[str, Any]:
    """What the teacher reads of a row under HINT, written out."""
    question, answer = row["messages"]
    texts = [part["text"] for part in question["content"] if part["type"] == "text"]
    shown = [{"type": "image"} for _ in row["clean"]]
    asked = [*shown, {"type": "text", "text": f"{texts[0]} Hint: {row['hint']}"}]
    system = {"role": "system", "content": [{"type": "text", "text": "Look closely."}]}
    return {"messages": [system, {"role": "user", "content": asked}, answer], "images": row["clean"]}


def divergence_by_hand(trainer: Any, data: Dataset) -> float:
    """Mean forward KL of the models' whole logits, each on its own prompt, at the answers' tokens."""
    collate = trainer.labelling.vision_labels()
    total, count = 0.0, 0
    for row in data:
        row: Any = row
        own = {"messages": row["messages"], "images": row["images"]}
        sides = []
        for model, example in ((trainer.model, own), (trainer.teacher.model, by_hand(row))):
            inputs = collate([example])
            labels = inputs.pop("labels")
            with torch.no_grad():
                logits = model(**inputs).logits[:, :-1]
            sides.append((logits[labels[:, 1:] != -100].double().log_softmax(-1), labels[labels != -100]))
        (student, ours), (teacher, theirs) = sides
        assert torch.equal(ours, theirs)
        total += float((teacher.exp() * (teacher - student)).sum())
        count += len(ours)
    return total / count


@pytest.mark.parametrize(
    ("images", "clean"),
    [([1, 2, 0, 1], [1, 2, 0, 1]), ([0, 0, 0, 0], [1, 2, 1, 0]), ([1, 1, 0, 2], [2, 0, 1, 1])],
    ids=["other pictures", "pictures that the student does not have", "more and fewer pictures"],
)
def test_the_teacher_reads_its_own_prompt_and_pictures(teach: Any, images: list[int], clean: list[int]) -> None:
    data = hinted(images, clean)
    trainer = teach(KDTrainer, data, teacher_view=HINT)
    expected = divergence_by_hand(trainer, data)
    assert trainer.evaluate(data)["eval_kl"] == pytest.approx(expected, rel=1e-4)
    plain = teach(KDTrainer, data)
    assert plain.evaluate(data)["eval_kl"] != pytest.approx(expected, rel=1e-3)


def test_the_teacher_reads_as_much_of_an_answer_as_the_student(teach: Any) -> None:
    """max_length cuts the student's rows; the teacher's longer prompt does not cost an answer its end."""
    data = hinted([1, 1, 1, 1], [2, 1, 1, 1])
    trainer = teach(KDTrainer, data)
    lengths = trainer.data_collator([dict(row) for row in trainer.train_dataset]).student.labels
    short = int((lengths != -100).cumsum(1)[:, -1].min()) // 2
    first = int((lengths != -100).float().argmax(1).max())
    trainer = teach(KDTrainer, data, teacher_view=HINT, max_length=first + short)
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    assert batch.student.labels.shape[1] == first + short
    batch.check_answers()
    assert int(batch.teacher_view().supervised.sum()) == int(batch.student.supervised.sum())


def test_visual_terms_compare_the_teachers_pictures(teach: Any) -> None:
    """Those of a teacher that sees the teacher's pictures alone, where nothing else differs."""
    data = hinted([1, 2, 0, 1], [1, 2, 0, 1])
    reports = [
        teach(LLaVAKDTrainer, data, **settings).evaluate(data)
        for settings in ({}, {"teacher_view": {"images_column": "clean"}}, {"teacher_view": SAME})
    ]
    plain, other, same = ([run[f"eval_{name}"] for name in ("visual_kl", "relation_distance")] for run in reports)
    assert same == plain
    assert all(abs(a - b) > 1e-3 for a, b in zip(plain, other, strict=True))


def test_llava_kd_compares_image_by_image(teach: Any) -> None:
    data = hinted([1, 1, 0, 2], [1, 2, 0, 2])
    with pytest.raises(UserError, match=r"Row 1 of the train data .* has 1 images for the student and 2 for the"):
        teach(LLaVAKDTrainer, data, teacher_view=HINT)
    trainer = teach(LLaVAKDTrainer, data, teacher_view=HINT, beta=0, gamma=0)
    assert trainer.evaluate(data)["eval_kl"] == pytest.approx(divergence_by_hand(trainer, data), rel=1e-4)
    assert len(steps(trainer)) == 4


ON_POLICY: dict[str, Any] = {"on_policy_fraction": 1.0, "rollout_max_tokens": 6, "rollout_patience": 0, "max_steps": 1}


@pytest.mark.parametrize("signal", ["hidden", "top_k"])
@pytest.mark.parametrize("cls", [KDTrainer, ALMTrainer])
def test_a_server_is_asked_with_the_teachers_prompt_and_pictures(
    build: Build, vlms: dict[str, Path], cls: Any, signal: str
) -> None:
    """It says what the same teacher says in this process; in method alm about the student's own answers."""
    data, settings = hinted([1, 2, 0, 1], [1, 1, 2, 1]), {"teacher_view": HINT, "max_length": 200}
    settings |= {**ON_POLICY, "chunks": "all"} if cls is ALMTrainer else {}
    reports = "chunk_gap" if cls is ALMTrainer else "loss"
    local = losses_of(trained(build, cls, vlms["student"], str(vlms["teacher"]), data, **settings), reports)
    with teachers(vlms["teacher"], signal) as (teacher, fake):
        reader = {"teacher_processing_class": AutoProcessor.from_pretrained(vlms["teacher"])}
        models = {"model": str(vlms["student"]), "teacher": teacher, **reader}
        trainer = build(cls, data, trainer=models, **{**SERVED, **settings})
        trainer.train()
        assert losses_of(trainer, reports) == pytest.approx(local, rel=1e-4)
        assert any("Look closely" in str(body) or "image_url" in str(body) for body in fake.requests)


def test_rollouts_about_pictures_are_read_behind_the_teachers_prompt(
    build: Build, vlms: dict[str, Path], teach: Any
) -> None:
    data = hinted([1, 2, 0, 1], [1, 1, 2, 1])
    trainer = teach(KDTrainer, data, teacher_view=HINT, max_length=200, **ON_POLICY)
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    student, theirs = batches[0].student, batches[0].teacher_view()
    assert torch.equal(student.labels[student.labels != -100], theirs.labels[theirs.labels != -100])
    assert int(theirs.images[:, 1].sum()) == 5 * 4
    asked = [trainer.processing_class.decode(ids) for ids in theirs["input_ids"]]
    assert all("Look closely." in text and "Hint: it is" in text for text in asked)
    settings = {"teacher_view": HINT, "max_length": 200, **ON_POLICY}
    local = losses_of(trained(build, KDTrainer, vlms["student"], str(vlms["teacher"]), data, **settings))
    with teachers(vlms["teacher"], "top_k") as (teacher, _):
        served = trained(build, KDTrainer, vlms["student"], teacher, data, **settings)
    assert losses_of(served, "rollouts_retokenised")[0] == 0
    assert losses_of(served) == pytest.approx(local, abs=1e-5)


def test_a_reward_is_told_everything_but_pictures(teach: Any, tmp_path: Path) -> None:
    path = tmp_path / "rewards.py"
    path.write_text("def short(completions, hint, **kwargs):\n    return [float(len(kwargs)) for _ in hint]\n")
    settings = {"on_policy_fraction": 1.0, "rollout_max_tokens": 4, "reward_weight": 0.5, "max_steps": 1}
    trainer = teach(
        KDTrainer, hinted([1, 0, 1, 1], [1, 1, 1, 0]), teacher_view=HINT, reward=f"{path}:short", **settings
    )
    trainer.train()
    # prompts, completion_ids and trainer_state.
    assert losses_of(trainer, "reward") == [3.0]


def test_each_of_several_teachers_has_its_own_view(teach: Any, vlms: dict[str, Path]) -> None:
    data = hinted([1, 2, 0, 1], [1, 1, 2, 1])
    folders = {"a": str(vlms["teacher"]), "b": str(vlms["fine"])}
    several = SeveralTeachers(folders, {"a": 1, "b": 3}, views={"a": HINT})
    mixed = steps(teach(KDTrainer, data, several, max_steps=1))
    told = steps(teach(KDTrainer, data, folders["a"], max_steps=1, teacher_view=HINT))
    plain = steps(teach(KDTrainer, data, folders["b"], max_steps=1))
    assert mixed[0] == pytest.approx(0.25 * told[0] + 0.75 * plain[0], rel=1e-5)


def test_a_missing_picture_of_the_teachers_is_named(teach: Any) -> None:
    data = vision_rows([1, 1, 1, 1]).add_column("clean", [["missing.png"]] * 4)  # pyright: ignore[reportCallIssue]
    view = {"images_column": "clean"}
    with pytest.raises(UserError, match=r"Row 0 of the train data .* clean\[0\]: FileNotFoundError"):
        teach(KDTrainer, data, teacher_view=view)
    with pytest.raises(UserError, match=r"no such column|do not have"):
        teach(KDTrainer, data, teacher_view={"images_column": "clear"})


def test_rows_that_are_too_long_for_the_teacher(teach: Any) -> None:
    data = hinted([1, 1, 1, 1], [1, 1, 4, 1])
    trainer = teach(KDTrainer, data, teacher_view=HINT)
    rows = [dict(row) for row in trainer.train_dataset]
    masks = trainer.data_collator(rows).teacher_view()["attention_mask"]
    settings = {"teacher_view": HINT, "teacher_max_length": int(masks.sum(1).max()) - 1}
    with pytest.raises(UserError, match=r"tokens behind the teacher's prompt, and teacher_max_length is"):
        teach(KDTrainer, data, **settings).train()
    batch = teach(KDTrainer, data, **settings, on_bad_row="skip").data_collator(rows)
    assert batch.skipped is not None
    assert batch.skipped[1] > 0
    # Rows that fit with the data's answers, but not with as long a one as the student may give.
    settings |= {"teacher_max_length": int(masks.sum(1).max()), "on_policy_fraction": 1.0, "rollout_max_tokens": 100}
    with pytest.raises(UserError, match="with room for an answer of rollout_max_tokens"):
        teach(KDTrainer, data, **settings).train()
