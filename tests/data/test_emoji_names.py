"""Emoji with their names: which there are, and in which split."""

import json
from pathlib import Path

import pytest
from datasets import load_dataset
from PIL import Image

from mmkd.errors import UserError
from mmkd.prepare.caption_models import LONGEST, SIZES, make_clip, make_tokenizer
from mmkd.prepare.emoji_names import make_emoji_names, named_emoji, split_of, write_captioned


def test_names_are_words_without_flags() -> None:
    content = {
        "🥇": {"en": ":1st_place_medal:", "status": 2},
        "👋🏽": {"en": ":waving_hand_medium_skin_tone:", "status": 2},
        "🇦🇫": {"en": ":Afghanistan:", "status": 2},
        "☎": {"en": ":telephone:", "status": 4},
        "🏳️‍🌈": {"en": ":rainbow_flag:", "status": 2},
    }
    assert [name for _, name in named_emoji(json.dumps(content))] == [
        "1st place medal",
        "waving hand medium skin tone",
        "rainbow flag",
    ]


def test_all_skin_tones_are_in_one_split() -> None:
    tones = ("light", "medium-light", "medium", "medium-dark", "dark")
    names = [f"gesture {number}" for number in range(200)]
    for name in names:
        assert {split_of(f"{name} {tone} skin tone") for tone in tones} == {split_of(name)}
        assert split_of(f"{name} light skin tone dark skin tone") == split_of(name)
    splits = [split_of(name) for name in names]
    assert 120 < splits.count("train") < 190
    assert {*splits} == {"train", "validation", "test"}


def test_a_font_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="apt-get install fonts-noto-color-emoji"):
        make_emoji_names(tmp_path, tmp_path / "out")


def test_pictures_are_read_back_as_written(tmp_path: Path) -> None:
    write_captioned(tmp_path / "train.parquet", [(Image.new("RGB", (4, 4), "red"), "a red square")])
    (row,) = load_dataset("parquet", data_files=str(tmp_path / "train.parquet"), split="train")
    assert row["text"] == "a red square"  # pyright: ignore
    assert row["image"].getpixel((0, 0)) == (255, 0, 0)  # pyright: ignore


def test_students_are_a_fourth_and_a_tenth_and_texts_are_read_at_their_end() -> None:
    tokenizer = make_tokenizer(["a blue circle", "a red circle", "woman firefighter"] * 3)
    models = {name: make_clip(size, tokenizer)[0] for name, size in SIZES.items()}
    # Of the size with the whole vocabulary.
    counts = {name: model.num_parameters() for name, model in models.items()}
    assert counts["teacher"] > 3.5 * counts["quarter"] > 7 * counts["tenth"]
    model = models["tenth"].eval()
    ids = tokenizer(["a blue circle", "a red circle"], padding=True, return_tensors="pt")
    assert ids["input_ids"].shape[1] <= LONGEST  # pyright: ignore
    blue, red = model.get_text_features(**ids).pooler_output  # pyright: ignore
    assert not blue.allclose(red)
    hidden = model.text_model(**ids).last_hidden_state[0]
    end = ids["input_ids"][0].tolist().index(tokenizer.eos_token_id)  # pyright: ignore
    assert model.text_projection(hidden[end]).allclose(blue, atol=1e-6)
