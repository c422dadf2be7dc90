"""The shipped recipes of data on the Hub, on rows with their sources' documented schemas."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage

from mmkd.data.load_data import load_data

RECIPES = Path(__file__).parents[2] / "data_recipes"


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def shipped(name: str, rows: Dataset | list[dict[str, Any]]) -> Dataset:
    """The rows of a shipped recipe, whose source is replaced by a file of given rows."""
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    for key in ("config", "revision", "eval_rows", "prepare"):
        recipe.pop(key, None)
    if isinstance(rows, Dataset):
        rows.to_parquet("rows.parquet")
        recipe |= {"source": "parquet", "data_files": {"train": "rows.parquet"}}
    else:
        Path("rows.json").write_text(json.dumps(rows))
        recipe |= {"source": "json", "data_files": {"train": "rows.json"}}
    recipe |= {"splits": {"train": "train"}, "shuffle_seed": None}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe))
    return load_data("./recipe.yaml")["train"]


def picture() -> PILImage.Image:
    return PILImage.new("RGB", (4, 4), (255, 0, 0))


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


IMAGE = {"type": "image", "text": None}


@pytest.mark.parametrize("name", ["llava_pretrain_558k", "llava_mix_665k"])
def test_llava_sets(name: str) -> None:
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text())
    folder = Path(recipe["image_folder"])
    (folder / "00453").mkdir(parents=True)
    picture().save(folder / "00453" / "a.png")
    talk = [
        {"from": "human", "value": "Render a clear summary.\n<image>"},
        {"from": "gpt", "value": "a red square"},
        {"from": "human", "value": "Sure?"},
        {"from": "gpt", "value": "Yes."},
    ]
    # Rows of text alone have a model in place of an image; some ids of the file are strings, others numbers.
    rows = shipped(
        name,
        [
            {"id": "000000033471", "image": "00453/a.png", "conversations": talk},
            {"id": "wgByO4Y_0", "model": "gpt4", "conversations": talk[2:]},
            {"id": 2354786, "image": "00453/a.png", "conversations": talk[:2]},
        ],
    )
    first: Any = rows[0]
    assert first["messages"][0] == {"role": "user", "content": [text("Render a clear summary."), IMAGE]}
    assert first["messages"][3] == {"role": "assistant", "content": [text("Yes.")]}
    assert first["images"][0].size == (4, 4)
    second: Any = rows[1]
    assert second["images"] == []
    assert second["messages"][0]["content"] == [text("Sure?")]
    assert len(rows) == 3


def test_llava_onevision() -> None:
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "B"}]
    spoken = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    rows = Dataset.from_list(
        [
            {"id": "1", "image": picture(), "conversations": talk, "data_source": "ai2d(gpt4v)"},
            {"id": "2", "image": None, "conversations": spoken, "data_source": "ai2d(gpt4v)"},
        ],
        features=Features(
            {
                "id": Value("string"),
                "image": Image(),
                "conversations": List({"from": Value("string"), "value": Value("string")}),
                "data_source": Value("string"),
            }
        ),
    )
    found: Any = shipped("llava_onevision", rows)
    assert found[0]["messages"][0]["content"] == [IMAGE, text("What?")]
    assert found[1]["messages"][0]["content"] == [text("Why?")]
    assert [len(row["images"]) for row in found] == [1, 0]


@pytest.mark.parametrize("name", ["cauldron_vqav2", "cauldron_ai2d", "cauldron_textcaps"])
def test_the_cauldron(name: str) -> None:
    turns = [
        {"user": "What?", "assistant": "A cat.", "source": "x"},
        {"user": "Sure?", "assistant": "Yes.", "source": "x"},
    ]
    features = Features(
        {"images": List(Image()), "texts": List({key: Value("string") for key in ("user", "assistant", "source")})}
    )
    rows = Dataset.from_list([{"images": [picture(), picture()], "texts": turns}], features=features)
    found: Any = shipped(name, rows)[0]
    assert [message["role"] for message in found["messages"]] == ["user", "assistant", "user", "assistant"]
    assert found["messages"][0]["content"] == [IMAGE, IMAGE, text("What?")]
    assert found["messages"][2]["content"] == [text("Sure?")]
    assert len(found["images"]) == 2


def test_scienceqa() -> None:
    row = {"question": "Which?", "choices": ["one", "two"], "answer": 1, "hint": "Look.", "task": "closed choice"}
    others = ("grade", "subject", "topic", "category", "skill", "lecture", "solution")
    row |= dict.fromkeys(others, "")
    rows = [{**row, "image": picture()}, {**row, "image": None, "hint": ""}]
    features = Features(
        {
            "image": Image(),
            "question": Value("string"),
            "choices": List(Value("string")),
            "answer": Value("int8"),
            "hint": Value("string"),
            "task": Value("string"),
            **dict.fromkeys(others, Value("string")),
        }
    )
    found: Any = shipped("scienceqa", Dataset.from_list(rows, features=features))
    asked = "Which?\nA. one\nB. two\nAnswer with the letter of the right choice."
    assert found[0]["messages"][0]["content"] == [IMAGE, text(f"Look.\n{asked}")]
    assert found[0]["messages"][1]["content"] == [text("B")]
    assert found[1]["messages"][0]["content"] == [text(asked)]
    assert [len(row["images"]) for row in found] == [1, 0]


@pytest.mark.parametrize(
    "name, row",
    [
        ("gsm8k", {"question": "1 + 1?", "answer": "2\n#### 2"}),
        ("metamath", {"query": "1 + 1?", "response": "2", "type": "GSM_AnsAug", "original_question": "1 + 1?"}),
    ],
)
def test_maths(name: str, row: dict[str, str]) -> None:
    found: Any = shipped(name, [row])[0]
    answer = row.get("answer") or row["response"]
    assert found["messages"] == [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize(
    "name, columns",
    [
        (
            "cosmopedia_v2",
            {"prompt": "p", "token_length": 3, "audience": "general", "format": "story", "seed_data": "w"},
        ),
        (
            "fineweb_edu_10bt",
            {
                "id": "<urn:uuid:1>",
                "dump": "CC-MAIN-2013-20",
                "url": "http://x",
                "file_path": "s3://x",
                "language": "en",
            }
            | {"language_score": 0.9, "token_count": 3, "score": 3.1, "int_score": 3},
        ),
    ],
)
def test_texts(name: str, columns: dict[str, Any]) -> None:
    found: Any = shipped(name, [{"text": "A story.", **columns}])[0]
    assert found == {"text": "A story."}


@pytest.mark.parametrize(
    "name, columns",
    [
        ("ultrachat_200k", {"prompt": "Hi.", "prompt_id": "f0e3"}),
        ("smoltalk", {"source": "smol-magpie-ultra"}),
        ("tulu_3_sft", {"id": "oasst1_5921", "source": "ai2-adapt-dev/oasst1_converted"}),
    ],
)
def test_chats(name: str, columns: dict[str, str]) -> None:
    talk = [{"content": "Be brief.", "role": "system"}, {"content": "Hi.", "role": "user"}]
    talk += [{"content": "Hello.", "role": "assistant"}]
    features = {"messages": List({"content": Value("string"), "role": Value("string")})}
    features |= {column: Value("string") for column in columns}
    found: Any = shipped(name, Dataset.from_list([{"messages": talk, **columns}], features=Features(features)))
    assert found.column_names == ["messages"]
    assert found[0]["messages"] == talk


def test_openhermes() -> None:
    """The source is one JSON array whose rows lack most columns, and the system's words are a turn in some rows."""
    turns = [{"from": "human", "value": "Hi."}, {"from": "gpt", "value": "Hello.", "weight": None}]
    rows: list[dict[str, Any]] = [
        {"conversations": turns, "source": "airoboros2.2", "category": "orca", "skip_prompt_formatting": False},
        {"conversations": [{"from": "system", "value": "Be brief."}, *turns], "system_prompt": "", "idx": 1},
    ]
    found: Any = shipped("openhermes_2_5", rows)
    said = [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello."}]
    assert found[0]["messages"] == said
    assert found[1]["messages"] == [{"role": "system", "content": "Be brief."}, *said]


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"messages": {"user": "question", "assistant": "{a}"}}, "reads no column"),
        ({"prompt": {"user": "{q}", "assistant": "{a}"}, "completion": "a"}, "map it to `messages`"),
        ({"messages": {"column": "t", "user_key": "q"}}, "two sides of a pair"),
    ],
)
def test_mappings_that_cannot_be(columns: dict[str, Any], message: str) -> None:
    Path("a.json").write_text("[]")
    keys = {"source": "json", "data_files": {"train": "a.json"}, "columns": columns}
    Path("recipe.yaml").write_text(yaml.safe_dump(keys))
    with pytest.raises(ValueError, match=message):
        load_data("./recipe.yaml")
