"""easy-VQA as rows: what the pictures show, as far as their questions tell, and nothing held out in training."""

from pathlib import Path

import pytest

from scripts.make_easy_vqa import is_held_out, rows, what_it_shows


@pytest.mark.parametrize(
    "question, answer",
    [
        ("is there a red shape?", "yes"),
        ("is a red shape present?", "yes"),
        ("is no red shape present?", "no"),
        ("is there not a red shape in the image?", "no"),
        ("does the image not contain a red shape?", "no"),
        ("what is the color of the circle?", "red"),
        ("what is the red shape?", "circle"),
    ],
)
def test_every_kind_of_question_tells_the_colour(question: str, answer: str) -> None:
    other = ("what shape is present?", "circle", 7)
    assert what_it_shows([(question, answer, 7), other]) == {7: "a red circle"}


@pytest.mark.parametrize(
    "question, answer",
    [
        ("is there a blue shape?", "no"),
        ("is no blue shape present?", "yes"),
        ("does the image not contain a blue shape?", "yes"),
    ],
)
def test_a_denial_tells_nothing(question: str, answer: str) -> None:
    assert what_it_shows([(question, answer, 7), ("what shape is present?", "circle", 7)]) == {}


def test_rows_are_conversations_about_one_picture() -> None:
    row = rows([("is there a circle?", "no", 3)], Path("images"))[0]
    assert row["images"] == ["images/3.png"]
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text"]
    assert row["messages"][1]["content"][0]["text"] == "no"


def test_about_one_picture_in_ten_is_held_out() -> None:
    assert 0.08 < sum(map(is_held_out, range(4000))) / 4000 < 0.12
