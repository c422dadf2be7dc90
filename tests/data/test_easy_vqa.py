"""easy-VQA as rows: what the pictures show, as far as their questions tell, and nothing held out in training."""

from pathlib import Path

import pytest
from PIL import Image

from mmkd.prepare.easy_vqa import descriptions_of, is_held_out, rows
from scripts.quickstart_vlm import SIDE, TEXT, WIDTH, contact_sheet


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
    assert descriptions_of([(question, answer, 7), other]) == {7: "a red circle"}


@pytest.mark.parametrize(
    "question, answer",
    [
        ("is there a blue shape?", "no"),
        ("is no blue shape present?", "yes"),
        ("does the image not contain a blue shape?", "yes"),
    ],
)
def test_a_denial_tells_nothing(question: str, answer: str) -> None:
    assert descriptions_of([(question, answer, 7), ("what shape is present?", "circle", 7)]) == {}


def test_rows_are_conversations_about_one_picture() -> None:
    row = rows([("is there a circle?", "no", 3)], Path("images"))[0]
    assert row["images"] == ["images/3.png"]
    assert [part["type"] for part in row["messages"][0]["content"]] == ["image", "text"]
    assert row["messages"][1]["content"][0]["text"] == "no"


def test_about_one_picture_in_ten_is_held_out() -> None:
    assert 0.08 < sum(map(is_held_out, range(4000))) / 4000 < 0.12


def test_the_contact_sheet_shows_the_pictures_and_what_is_wrong_in_red(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64), (0, 0, 200)).save(tmp_path / "7.png")
    asked = rows([("what shape is it?", "circle", 7)] * 5, tmp_path)
    sheet = contact_sheet(asked, {"student": ["circle"] * 4 + ["triangle"]})
    assert sheet.size == (4 * WIDTH, 2 * (SIDE + TEXT))
    assert sheet.getpixel((WIDTH // 2, SIDE // 2)) == (0, 0, 200)
    below = [sheet.crop((0, top + SIDE + 8, WIDTH, top + SIDE + TEXT)) for top in (0, SIDE + TEXT)]
    red = [(255, 0, 0) in {color for _, color in cell.getcolors(100_000) or []} for cell in below]
    assert red == [False, True]
