"""Videos and audio are refused, wherever a row holds them; nothing is learnt from their text alone in silence."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import Dataset, Features, IterableDataset, Value
from datasets import List as Lists

from mmkd.data.layouts import canonical
from mmkd.data.load_data import load_data
from mmkd.preparation.row_names import RowNames
from mmkd.preparation.vision_checks import check_no_videos, check_placeholders

ANSWERED = {"prompt": "What is it?", "completion": " A cat."}
CHAT = [{"role": "user", "content": "<video>What is it?"}, {"role": "assistant", "content": "A cat."}]
COLUMNS: dict[str, tuple[dict[str, Any], str]] = {
    "LLaVA": (
        {"video": "a.mp4", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]},
        "videos in the column 'video'",
    ),
    "LLaMA-Factory": ({"videos": ["a.mp4"], "messages": CHAT}, "videos in the column 'videos'"),
    "audio": ({"audio": "a.wav", **ANSWERED}, "audio in the column 'audio'"),
    "audios": ({"audios": ["a.wav"], "messages": CHAT}, "audio in the column 'audios'"),
}


@pytest.mark.parametrize(("row", "message"), COLUMNS.values(), ids=list(COLUMNS))
def test_a_column_of_recordings_is_refused(row: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for _ in range(3)))
    for read in (
        lambda: load_data(path),
        lambda: canonical(Dataset.from_list([row] * 3)),
        lambda: canonical(IterableDataset.from_generator(lambda: iter([row]))),
    ):
        with pytest.raises(ValueError, match=message):
            read()


def test_columns_that_are_empty_or_left_out_do_no_harm(tmp_path: Path) -> None:
    path, recipe = tmp_path / "rows.jsonl", tmp_path / "rows.yaml"
    path.write_text("\n".join(json.dumps({"audio": "a.wav", "q": "What?", "a": " A cat."}) for _ in range(3)))
    recipe.write_text("source: json\ndata_files: {train: rows.jsonl}\ncolumns: {prompt: q, completion: a}\n")
    assert load_data(recipe)["train"].column_names == ["prompt", "completion"]
    features = Features(
        {"videos": Lists(Value("string")), "video": Value("string"), **dict.fromkeys(ANSWERED, Value("string"))}
    )
    rows = [{"videos": [], "video": None, **ANSWERED}, {"videos": None, "video": "", **ANSWERED}]
    assert len(canonical(Dataset.from_list(rows, features=features))) == 2
    # A row that was left out no longer counts.
    with_one = Dataset.from_list([{"audio": "a.wav", **ANSWERED}, {"audio": None, **ANSWERED}])
    assert len(canonical(with_one.select([1]))) == 1


@pytest.mark.parametrize("kind", ["video", "video_url", "audio", "input_audio"])
def test_a_part_of_a_message_is_refused(kind: str) -> None:
    said = [{"role": "user", "content": [{"type": kind, kind: "a"}, {"type": "text", "text": "What?"}]}]
    named = "videos" if "video" in kind else "audio"
    with pytest.raises(ValueError, match=rf"is of type '{kind}', and mmkd does not train on {named} yet"):
        canonical(Dataset.from_list([{"messages": said}]))
    with pytest.raises(ValueError, match=f"The train data has {named} in its messages"):
        check_no_videos({"messages": said}, "train")


@pytest.mark.parametrize("row", [{"messages": CHAT, "images": []}, {"text": "<video> A cat.", "images": []}])
def test_the_placeholder_of_a_processor_is_no_word(row: dict[str, Any]) -> None:
    processor = SimpleNamespace(image_token="<image>", video_token="<video>", boi_token=None)
    side = SimpleNamespace(seen=lambda example: example, processor=processor, view=None)
    with pytest.raises(ValueError, match="holds '<video>' in its text: mmkd does not train on videos"):
        check_placeholders(row, side, RowNames())
