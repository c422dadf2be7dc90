"""New instructions: what may join the pool, and in which ratio."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from mmkd.generation.generator import Sampling
from mmkd.methods.comd.augment import (
    Candidate,
    Filter,
    ModelAugmentor,
    RandomAugmentor,
    TemplateAugmentor,
    augment,
    cleaned,
    in_ratio,
    picker,
)
from mmkd.methods.comd.comd_prompts import Prompts
from mmkd.methods.comd.instructions import ImageStore, Instruction, apart_from
from mmkd.methods.comd.reply_record import Record
from mmkd.methods.comd.similar import SimilarImages
from tests.comd.stand_ins import Scripted, instruction, nothing
from tests.vlms import picture

POOL = [instruction(text) for text in ("what is a class in python", "name three large rivers of asia")]
HELD_OUT = [instruction("how do birds find their way home")]


@pytest.mark.parametrize(
    "text, reason",
    [
        ("How do birds find their way home?", "like one that is held out"),
        ("how do birds find their way home", "held out"),
        ("what is a class in python?", "repeats the pool"),
        ("What is a good class in Python", "repeats the pool"),
        ("what is it", "too short"),
        ("word " * 30, "too long"),
        ("- name one river of europe", "begins with punctuation"),
        ("write a new instruction about rivers", "speaks of an instruction"),
    ],
)
def test_what_may_not_join(text: str, reason: str) -> None:
    fit = Filter(POOL, HELD_OUT, max_words=20)
    assert fit.accept(Candidate(instruction(text))) is None
    assert dict(fit.reasons) == {reason: 1}


def test_what_joins_is_the_pool_of_the_next() -> None:
    fit = Filter(POOL, HELD_OUT)
    one = instruction("explain how a bridge carries its load")
    assert fit.accept(Candidate(one)) is one
    assert fit.accept(Candidate(instruction("explain how a bridge carries a load"))) is None
    assert fit.accept(Candidate(None, "cut off")) is None
    assert dict(fit.reasons) == {"repeats the pool": 1, "cut off": 1}


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{number}.png" for number in range(4)]
    for number, path in enumerate(paths):
        picture(number).save(path)
    # The same pixels in another file.
    picture(0).save(tmp_path / "copy.bmp")
    return [*map(str, paths), str(tmp_path / "copy.bmp")]


def test_a_question_about_another_picture_is_another_question(pictures: list[str]) -> None:
    asked = "what shape is in the image?"
    fit = Filter([instruction(asked, images=pictures[1:2])], [instruction(asked, images=pictures[:1])])
    assert fit.accept(Candidate(instruction(asked, images=pictures[2:3]))) is not None
    # Held out is a question about these pixels, wherever they lie.
    for same in (pictures[0], pictures[4]):
        assert fit.accept(Candidate(instruction(asked, images=[same]))) is None
    assert dict(fit.reasons) == {"held out": 2}


def test_seeds_that_are_held_out_are_left_out(pictures: list[str]) -> None:
    held_out = [instruction("What is it?", images=pictures[:1])]
    seeds = [instruction("what is  it?", images=pictures[4:]), instruction("what is it?", images=pictures[1:2])]
    assert apart_from(seeds, held_out) == seeds[1:]


def model_augmentor(folder: Path, engine: Scripted) -> ModelAugmentor:
    pick = picker(True, None, 0)
    return ModelAugmentor(
        Record(folder / "record.jsonl"), engine, Prompts.read(None), Sampling(16), ImageStore(folder), pick
    )


def test_an_augmentor_that_repeats_itself_is_counted(tmp_path: Path) -> None:
    engine = Scripted(lambda question: "Instruction: list four old cities of europe")
    fit = Filter(POOL, HELD_OUT)
    found = augment(model_augmentor(tmp_path, engine), {"hard": POOL}, {"hard": 6}, fit, 0, "phase", nothing)
    assert [one.text for one in found["hard"]] == ["list four old cities of europe"]
    assert (found["hard"][0].kind, found["hard"][0].parent in {one.key for one in POOL}) == ("hard", True)
    assert fit.reasons["repeats the pool"] == 6 + 5 + 5 - 1


def test_each_try_asks_for_another_child(tmp_path: Path) -> None:
    engine = Scripted(
        lambda question: (
            f"tell me something new about thing {'abcdefghijkl'[question.sample % 1000]}{question.sample // 1000}"
        )
    )
    fit = Filter(POOL, [], max_rouge=1.0)
    found = augment(model_augmentor(tmp_path, engine), {"easy": POOL[:1]}, {"easy": 3}, fit, 0, "phase", nothing)
    assert len(found["easy"]) == 3
    assert len({question.sample for question in engine.asked}) == 3


def test_cut_and_empty_replies_are_no_instructions(tmp_path: Path) -> None:
    for reply, reason, why in (("a b c d e", "length", "cut off"), ("", "stop", "empty or refused")):
        engine = Scripted(lambda question, reply=reply: reply, finish_reason=reason)
        (candidate,) = model_augmentor(tmp_path / why, engine).make(POOL[:1], "hard", 0, "phase", nothing)
        assert candidate == Candidate(None, why)


@pytest.mark.parametrize(
    "hard, easy, ratio, expected",
    [
        (10, 10, 0.5, (4, 4)),
        (10, 2, 0.5, (2, 2)),
        (10, 10, 0.75, (6, 2)),
        (3, 10, 0.75, (3, 1)),
        (10, 10, 1.0, (8, 0)),
    ],
)
def test_the_scarcer_side_decides(hard: int, easy: int, ratio: float, expected: tuple[int, int]) -> None:
    found = {
        "hard": [instruction(f"hard one number {n}", kind="hard") for n in range(hard)],
        "easy": [instruction(f"easy one number {n}", kind="easy") for n in range(easy)],
    }
    joined = in_ratio(found, ratio, cap=8)
    kinds = [one.kind for one in joined]
    assert (kinds.count("hard"), kinds.count("easy")) == expected


def test_a_kind_without_parents_does_not_hold_up_the_other() -> None:
    found = {"hard": [instruction(f"hard one number {n}", kind="hard") for n in range(5)]}
    assert len(in_ratio(found, 0.5, cap=4)) == 4


class _Near(SimilarImages):
    def near(self, path: str, count: int) -> list[str]:
        return [other for other in self.paths if other != path][:count]


def seen(pictures: Sequence[str]) -> list[Instruction]:
    asked = ["what is the red shape?", "what is the color of it?", "is there a circle?", "is there a square?"]
    return [instruction(text, images=[path]) for text, path in zip(asked, pictures, strict=False)]


def test_templates_ask_questions_of_the_type_about_similar_pictures(tmp_path: Path, pictures: list[str]) -> None:
    pool = seen(pictures[:4])
    near = _Near([path for one in pool for path in one.images], lambda: (None, None))
    augmentor = TemplateAugmentor(pool, ImageStore(tmp_path), picker(False, near, 0), 2, 0)
    made = [one.instruction for one in augmentor.make(pool * 5, "hard", 0, "phase", nothing)]
    for parent, child in zip(pool * 5, made, strict=True):
        assert child is not None
        assert child.type_of(2) == parent.type_of(2)
        assert child.images != parent.images
        assert child.images[0] in pictures
    again = [one.instruction for one in augmentor.make(pool * 5, "hard", 0, "phase", nothing)]
    assert again == made
    assert [one.instruction for one in augmentor.make(pool * 5, "hard", 1, "phase", nothing)] != made


def test_random_pairs_come_from_the_pool(tmp_path: Path, pictures: list[str]) -> None:
    pool = seen(pictures[:4])
    for candidate in RandomAugmentor(pool, ImageStore(tmp_path), 0).make(pool * 5, "any", 0, "phase", nothing):
        assert candidate.instruction is not None
        assert candidate.instruction.text in {one.text for one in pool}
        assert candidate.instruction.images[0] in pictures


def test_without_pictures_there_is_nothing_to_pair(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"augmentor: random .* there are no pictures"):
        RandomAugmentor(POOL, ImageStore(tmp_path), 0)
    with pytest.raises(ValueError, match=r"augmentor: templates .* there are no pictures"):
        TemplateAugmentor(POOL, ImageStore(tmp_path), picker(True, None, 0), 2, 0)


@pytest.mark.parametrize(
    "reply, text",
    [
        ('New instruction: "Name a river."', "Name a river."),
        ("**Instruction:** Name a river.", "Name a river."),
        ("Question about rivers: Name one.", "Name one."),
        ("Name a river: the Nile or another.", "Name a river: the Nile or another."),
    ],
)
def test_labels_and_quotes_are_taken_off(reply: str, text: str) -> None:
    assert cleaned(reply) == text
