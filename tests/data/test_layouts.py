"""Rows of every layout that people file come out as TRL's columns, alike in Python and in data recipes."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from datasets import Dataset, Features, Image, IterableDataset, Json, List, Value
from PIL import Image as PILImage

from mmkd.data.layouts import canonical
from mmkd.data.load_data import load_data
from mmkd.errors import UserError

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
OTHER_CALL = {"type": "function", "function": {"name": "zip", "arguments": {"code": 150, "exact": 3.141592653589793}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf_cache")
    Path("img").mkdir()
    for number in range(3):
        Path(f"img/{number}.png").write_bytes(png(number))


def png(number: int) -> bytes:
    """A picture of one colour, which tells its number."""
    file = io.BytesIO()
    PILImage.new("RGB", (4, 4), (number * 50, 0, 0)).save(file, "PNG")
    return file.getvalue()


def turn(role: str, content: Any, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def text(said: str) -> dict[str, Any]:
    return {"type": "text", "text": said}


ASKED, SAID = turn("user", "q"), turn("assistant", "a")
CHAT = {"messages": [ASKED, SAID]}
APART = {"prompt": [ASKED], "completion": [SAID]}
PICTURE = {"type": "image", "text": None}
"""What is left of an image's part where all parts of a data set have the same keys."""


def recipe(rows: list[dict[str, Any]], **keys: Any) -> str:
    """A data recipe of these rows, without `columns` unless given."""
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    told = {"source": "json", "data_files": {"train": "rows.jsonl"}, "shuffle_seed": None, **keys}
    Path("mine.yaml").write_text(yaml.safe_dump(told))
    return "./mine.yaml"


def by_python(rows: list[dict[str, Any]]) -> Any:
    return canonical(Dataset.from_list(rows))


def by_recipe(rows: list[dict[str, Any]]) -> Any:
    return load_data(recipe(rows))["train"]


def by_stream(rows: list[dict[str, Any]]) -> Any:
    return list(canonical(IterableDataset.from_generator(lambda: iter(rows))))


def seen(row: dict[str, Any]) -> list[int]:
    """The numbers of the pictures of a row."""
    images = [one if isinstance(one, PILImage.Image) else opened(one) for one in row["images"]]
    return [one.convert("RGB").getpixel((0, 0))[0] // 50 for one in images]  # pyright: ignore


def opened(stored: dict[str, Any]) -> PILImage.Image:
    return PILImage.open(io.BytesIO(stored["bytes"]) if stored["bytes"] is not None else stored["path"])


LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "text": ({"text": "a"}, {"text": "a"}),
    "messages": (CHAT, CHAT),
    "prompt and completion": ({"prompt": "q", "completion": "a"}, {"prompt": "q", "completion": "a"}),
    "prompt and completion of messages": (
        {"prompt": [ASKED], "completion": [SAID]},
        {"prompt": [ASKED], "completion": [SAID]},
    ),
    "a text and a list of messages": (
        {"prompt": "q", "completion": [SAID]},
        {"prompt": [ASKED], "completion": [SAID]},
    ),
    "ShareGPT": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, CHAT),
    "ShareGPT with a system column": (
        {"system": "s", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"messages": [turn("system", "s"), ASKED, SAID]},
    ),
    "conversations of role and content": ({"conversations": [ASKED, SAID]}, CHAT),
    "roles of other formats": ({"messages": [turn("human", "q"), turn("gpt", "a")]}, CHAT),
    "Alpaca": ({"instruction": "do", "input": "this", "output": "a"}, {**APART, "prompt": [turn("user", "do\nthis")]}),
    "Alpaca without input": ({"instruction": "q", "input": "", "output": "a"}, APART),
    "Alpaca with history": (
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": [["x", "y"]]},
        {"prompt": [turn("system", "s"), turn("user", "x"), turn("assistant", "y"), ASKED], "completion": [SAID]},
    ),
    "a question and an answer": ({"id": "7", "question": "q", "answer": "a"}, APART),
    "a question, an answer and a system message": (
        {"system": "s", "question": "q", "answer": "a"},
        {"prompt": [turn("system", "s"), ASKED], "completion": [SAID]},
    ),
    "preferences": ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "completion": "a"}),
    "preferences of conversations": (
        {"prompt": "q", "chosen": [ASKED, SAID], "rejected": [ASKED, turn("assistant", "b")]},
        CHAT,
    ),
    "an OpenAI batch": (
        {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", **CHAT}},
        CHAT,
    ),
    "an OpenAI batch with its answer": (
        {
            "custom_id": "1",
            "body": {"model": "m", "messages": [ASKED]},
            "response": {"status_code": 200, "body": {"choices": [{"index": 0, "message": SAID}]}},
        },
        APART,
    ),
    "an OpenAI preference": (
        {
            "input": {"messages": [ASKED], "tools": TOOLS, "parallel_tool_calls": True},
            "preferred_output": [SAID],
            "non_preferred_output": [turn("assistant", "b")],
        },
        {**APART, "tools": TOOLS},
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("read", [by_python, by_recipe, by_stream])
def test_every_layout_is_recognised(name: str, read: Any) -> None:
    row, ours = LAYOUTS[name]
    found = read([row, row])
    assert len(found) == 2
    assert {key: found[1][key] for key in ours} == ours
    assert not {"messages", "text", "prompt", "completion", "conversations", "chosen"} & set(found[1]) - ours.keys()


def test_what_was_recognised_and_left_unread_is_said(caplog: pytest.LogCaptureFixture) -> None:
    by_python([LAYOUTS["preferences"][0]] * 3)
    assert caplog.messages == [
        "train: rows are read as prompt and chosen, without rejected.",
        "train: 3 rows read as prompt and chosen (prompt, chosen).",
    ]


@pytest.mark.parametrize("read", [by_python, by_recipe])
@pytest.mark.parametrize(
    "row",
    [
        {"id": 1, "question": "q", "answer": "a", "context": "which part of the question is this?"},
        {"question": "q", "query": "q2", "answer": "a"},
        {"titel": "x", "inhalt": "y"},
        {"custom_id": "1", "response": {"body": {"choices": [{"message": SAID}]}}},
    ],
)
def test_rows_that_can_be_read_in_several_ways_are_refused_by_their_columns(read: Any, row: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no layout is known with the columns " + ", ".join(row)):
        read([row] * 2)


def test_columns_of_the_recipe_come_first() -> None:
    rows = [{"messages": [ASKED, SAID], "text": "t"}]
    assert load_data(recipe(rows, columns={"text": "text"}))["train"][0] == {"text": "t"}


# Messages are kept whole


@pytest.mark.parametrize("read", [by_python, by_recipe, by_stream])
def test_tool_calls_reach_the_rows_as_the_file_has_them(read: Any) -> None:
    rows = [
        {"messages": [ASKED, turn("assistant", "", tool_calls=[CALL]), turn("tool", "12", name="weather"), SAID]},
        {"messages": [ASKED, turn("assistant", "", tool_calls=[OTHER_CALL])]},
    ]
    found = read([{**row, "tools": TOOLS} for row in rows])
    # No argument of the other tool is null here, as it is in a table of objects.
    assert [row["messages"] for row in found] == [row["messages"] for row in rows] or read is by_stream
    assert found[0]["messages"][1]["tool_calls"][0]["function"] == CALL["function"]
    assert found[1]["messages"][1]["tool_calls"][0]["function"]["arguments"].keys() == {"code", "exact"}
    assert found[1]["tools"] == TOOLS


def test_tools_as_json_text_and_arguments_as_openai_writes_them() -> None:
    call = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    found = by_python([{"messages": [ASKED, turn("assistant", None, tool_calls=[call])], "tools": json.dumps(TOOLS)}])
    assert found[0]["messages"][1] == turn("assistant", None, tool_calls=[CALL])
    assert found[0]["tools"] == TOOLS


def test_sharegpt_calls_of_tools_become_tool_calls() -> None:
    talk = [("human", "q"), ("function_call", json.dumps(CALL["function"])), ("observation", "12"), ("gpt", "a")]
    row = {"conversations": [{"from": one, "value": said} for one, said in talk], "tools": json.dumps(TOOLS)}
    found = by_recipe([row])[0]
    assert found["messages"] == [ASKED, turn("assistant", "", tool_calls=[CALL]), turn("tool", "12"), SAID]
    assert found["tools"] == TOOLS


@pytest.mark.parametrize("read", [by_python, by_recipe])
def test_thoughts_names_and_other_keys_stay(read: Any) -> None:
    chat = [turn("user", "q", name="Ida"), turn("assistant", "a", reasoning_content="r", weight=1, mine={"x": [1]})]
    assert read([{"messages": chat}, CHAT])[0]["messages"] == chat
    assert read([{"messages": chat}, CHAT])[1]["messages"] == CHAT["messages"]


@pytest.mark.parametrize("read", [by_python, by_recipe])
def test_a_weight_is_0_or_1(read: Any) -> None:
    with pytest.raises(UserError, match=r"row 1: messages\[1\].weight is 0.5; it must be 1, or 0 for a turn"):
        read([CHAT, {"messages": [ASKED, turn("assistant", "a", weight=0.5)]}])
    # Others' turns are never learnt from, whatever they weigh.
    chat = [turn("user", "q", weight=0.5), turn("assistant", "a", weight=0.0), turn("assistant", "b", weight=1.0)]
    assert read([{"messages": chat}])[0]["messages"] == chat


def test_parts_of_text_are_text_where_there_are_no_images() -> None:
    row = {"messages": [turn("user", [text("q"), text("more")]), turn("assistant", [text("a")])]}
    assert by_python([row])[0]["messages"] == [turn("user", "q\nmore"), SAID]


def test_rows_that_are_right_are_not_copied() -> None:
    rows = Dataset.from_list([{"messages": [ASKED, SAID], "id": 1}])
    assert canonical(rows) is rows
    prepared = Dataset.from_list([{"input_ids": [1], "labels": [1], "messages": None}])
    assert canonical(prepared) is prepared


def test_lists_and_texts_of_polars() -> None:
    message = pa.struct([("role", pa.large_string()), ("content", pa.large_string())])
    table = pa.table({"messages": pa.array([[turn("human", "q"), turn("gpt", "a")]] * 2, pa.large_list(message))})
    assert canonical(Dataset(table))[1] == CHAT  # pyright: ignore[reportArgumentType]


# Images of messages


def asked_of(*images: dict[str, Any]) -> dict[str, Any]:
    return {"messages": [turn("user", [*images, text("what?")]), turn("assistant", [text("a")])]}


URL = "data:image/png;base64," + base64.b64encode(png(1)).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "img/1.png"},
        {"type": "image", "image": {"path": "img/1.png"}},
        {"type": "image", "path": "img/1.png"},
        {"type": "image", "url": URL},
        {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
        {"type": "image_url", "image_url": URL},
        {"type": "input_image", "image_url": URL},
        {"type": "image", "base64": URL.partition(",")[2]},
    ],
)
@pytest.mark.parametrize("read", [by_python, by_recipe, by_stream])
def test_images_in_parts_of_messages_are_read(part: dict[str, Any], read: Any) -> None:
    found = read([asked_of(part), asked_of(part, part)])
    assert [seen(row) for row in found] == [[1], [1, 1]]
    kinds = [[one["type"] for one in row["messages"][0]["content"]] for row in found]
    assert kinds == [["image", "text"], ["image", "image", "text"]]
    # Nothing of the picture is left for a template to write.
    assert not {"image", "image_url", "url", "base64", "path"} & set(found[1]["messages"][0]["content"][0])


def test_pictures_in_python_and_rows_of_text_beside_them() -> None:
    rows = [asked_of({"type": "image", "image": png(2)}), {"messages": [ASKED, SAID]}]
    found = by_stream(rows[:1])
    assert seen(found[0]) == [2]
    found = by_recipe([asked_of({"type": "image", "image": "img/2.png"}), CHAT])
    assert [seen(row) for row in found] == [[2], []]
    assert found[1]["messages"] == [turn("user", [text("q")]), turn("assistant", [text("a")])]


def test_images_named_in_parts_and_in_a_column_are_one() -> None:
    rows = [{**asked_of({"type": "image", "image": f"img/{i}.png"}), "images": [f"img/{i}.png"]} for i in range(2)]
    assert [seen(row) for row in by_recipe(rows)] == [[0], [1]]
    rows[1]["images"] = ["img/2.png"]
    with pytest.raises(UserError, match="train row 1: its messages bring 1 images in 1 places, and its image column"):
        by_recipe(rows)


@pytest.mark.parametrize("read", [by_python, by_recipe])
def test_llava_rows(read: Any) -> None:
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a"}]
    found = read([{"conversations": talk, "image": f"img/{i}.png"} for i in range(3)])
    assert [seen(row) for row in found] == [[0], [1], [2]]
    assert found[2]["messages"] == [turn("user", [PICTURE, text("what?")]), turn("assistant", [text("a")])]
    with pytest.raises(UserError, match="row 0: its text has the mark <image> of an image, and the rows have no im"):
        read([{"conversations": talk}])


@pytest.mark.parametrize("read", [by_python, by_recipe, by_stream])
def test_places_without_images_and_other_parts_are_refused(read: Any) -> None:
    with pytest.raises(UserError, match="row 1: its messages have places for 1 images, and the row has none"):
        read([asked_of(), asked_of({"type": "image"})])
    with pytest.raises(UserError, match=r"row 0: messages\[0\].content\[0\] is of type 'input_audio'"):
        read([asked_of({"type": "input_audio", "input_audio": {"data": "x"}})])


# Rows that lack something


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"text": None}, "without text"),
        ({"text": " \n"}, "without text"),
        ({"prompt": "q", "completion": None}, "without completion"),
        ({"prompt": None, "completion": "a"}, "without prompt"),
        ({"messages": None}, "without messages"),
        ({"messages": []}, "without messages"),
        ({"messages": [ASKED]}, "without a turn of the assistant"),
        ({"messages": [ASKED, turn("assistant", "")]}, "without an answer"),
        ({"messages": [turn("user", None), SAID]}, "with an empty message of a user"),
        ({"messages": [turn("user", " "), SAID]}, "with an empty message of a user"),
        ({"messages": [ASKED, SAID, turn("assistant", None)]}, "with a message without content"),
    ],
)
def test_rows_that_lack_a_text_are_left_out_and_counted(
    row: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    good = {"text": {"text": "a"}, "prompt": {"prompt": "q", "completion": "a"}}.get(next(iter(row)), CHAT)
    assert list(by_python([good, row, good, row])) == [good, good]
    assert caplog.messages == [f"2 of 4 train rows are left out: 2 {reason} (rows 1, 3)."]
    caplog.clear()
    assert by_stream([good, row, good]) == [good, good]
    assert caplog.messages == [f"1 of 2 train rows are left out: 1 {reason} (row 1)."]
    assert list(by_recipe([good, row])) == [good]
    with pytest.raises(UserError, match=f"1 of 1 train rows are left out: 1 {reason}"):
        canonical(Dataset.from_list([row], features=Dataset.from_list([good]).features))


def test_a_call_of_a_tool_is_an_answer() -> None:
    row = {"messages": [ASKED, turn("assistant", "", tool_calls=[CALL])]}
    assert len(by_recipe([row])) == len(by_python([row])) == 1


@pytest.mark.parametrize("read", [by_recipe, by_stream])
@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([ASKED, {"role": "assistant", "mine": 1}], r"messages\[1\] has no '?content'?"),
        ([ASKED, turn("asistant", "a")], "'asistant'.*'assistant'"),
        ([ASKED, {"content": "a"}], "have no 'role'|has no role"),
        ([ASKED, "a"], r"messages\[1\] is text, not an object"),
        ([turn("user", 3), SAID], r"messages\[0\].content is a number"),
    ],
)
def test_what_is_no_message_is_an_error_with_its_row(messages: list[Any], reason: str, read: Any) -> None:
    with pytest.raises(ValueError, match=f"train row 1: .*({reason})"):
        read([CHAT, {"messages": messages}])


def test_row_numbers_are_those_of_the_source() -> None:
    rows = Dataset.from_list([CHAT, {"messages": [ASKED, turn("asistant", "a")]}, CHAT])
    with pytest.raises(UserError, match="train row 1: "):
        canonical(rows.shuffle(seed=3))
    with pytest.raises(ValueError, match="train row 1: "):
        load_data(recipe(list(rows), shuffle_seed=5))  # pyright: ignore[reportArgumentType]


def test_rows_that_cannot_be_read_are_skipped_where_asked(caplog: pytest.LogCaptureFixture) -> None:
    rows = Dataset.from_list([CHAT, {"messages": [ASKED, turn("asistant", "a")]}])
    assert list(canonical(rows, skip=True)) == [CHAT]
    assert "1 of 2 train rows are left out: 1 that cannot be read: messages[1] has the role" in caplog.text


@pytest.mark.parametrize("read", [by_python, by_recipe])
def test_a_column_that_says_which_answers_were_cut_stays(read: Any) -> None:
    assert [row["truncated"] for row in read([{**CHAT, "truncated": True}, {**CHAT, "truncated": None}])] == [
        True,
        None,
    ]
    asked = {"question": "q", "answer": "a", "truncated": "length"}
    assert read([asked])[0] == {**APART, "truncated": "length"}


def test_a_column_of_recipes_says_which_answers_were_cut() -> None:
    columns = {"messages": "messages", "truncated": "why"}
    row = {**CHAT, "why": "length"}
    assert load_data(recipe([row], columns=columns))["train"][0] == {**CHAT, "truncated": "length"}
    with pytest.raises(UserError, match=r"columns.truncated reads 'why', which holds .*, and must say true or false"):
        load_data(recipe([{**row, "why": ["length"]}], columns=columns))
    part = {"source": "json", "data_files": {"train": "rows.jsonl"}}
    recipe([row])
    Path("a.yaml").write_text(yaml.safe_dump({**part, "columns": columns}))
    Path("b.yaml").write_text(yaml.safe_dump({**part, "columns": {"messages": "messages"}}))
    mixture = [{"data": "./a.yaml", "weight": 0.5}, {"data": "./b.yaml", "weight": 0.5}]
    Path("both.yaml").write_text(yaml.safe_dump({"mixture": mixture}))
    assert {row["truncated"] for row in load_data("./both.yaml")["train"]} == {None, "length"}  # pyright: ignore


def test_a_mixture_of_rows_with_and_without_tools() -> None:
    part = {"source": "json", "columns": {"messages": "messages"}}
    for name, row in {
        "a": CHAT,
        "b": {"messages": [ASKED, turn("assistant", "", tool_calls=[CALL])], "tools": TOOLS},
    }.items():
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
        Path(f"{name}.yaml").write_text(yaml.safe_dump({**part, "data_files": {"train": f"{name}.jsonl"}}))
    mixture = [{"data": "./a.yaml", "weight": 0.5}, {"data": "./b.yaml", "weight": 0.5}]
    Path("both.yaml").write_text(yaml.safe_dump({"mixture": mixture}))
    rows = load_data("./both.yaml")["train"]
    assert rows.features["messages"] == List(Json())
    assert sorted(len(row["messages"][1]) for row in rows) == [2, 2, 3, 3]  # pyright: ignore
    assert sorted(row["tools"] is not None for row in rows) == [False, False, True, True]  # pyright: ignore


def mixture_of(**rows: dict[str, Any]) -> str:
    for name, row in rows.items():
        Path(f"{name}.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row))
        part = {"source": "json", "data_files": {"train": f"{name}.jsonl"}}
        Path(f"{name}.yaml").write_text(yaml.safe_dump(part))
    Path("both.yaml").write_text(
        yaml.safe_dump({"mixture": [{"data": f"./{name}.yaml", "weight": 1} for name in rows]})
    )
    return "./both.yaml"


def test_parts_of_a_mixture_become_messages_where_one_has_them(caplog: pytest.LogCaptureFixture) -> None:
    alpaca = {"instruction": "q", "input": "", "output": "a"}
    rows = load_data(mixture_of(a=alpaca, b=CHAT))["train"]
    assert list(rows) == [CHAT] * 4
    assert "all become messages. Set assistant_only_loss: true" in caplog.text
    picture = {"image": "img/1.png"}
    rows = load_data(mixture_of(a={**alpaca, **picture}, b=asked_of({"type": "image", "image": "img/2.png"})))["train"]
    assert sorted(seen(row)[0] for row in rows) == [1, 1, 2, 2]  # pyright: ignore
    for row in ({"prompt": "q", "completion": "a"}, {"text": "t"}):
        with pytest.raises(UserError, match="parts of a mixture are of different kinds: messages, "):
            load_data(mixture_of(a=CHAT, b=row))


def test_texts_of_preferences_without_prompts_are_refused_with_the_way_out() -> None:
    rows = [{"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}]
    with pytest.raises(
        UserError, match=r"columns chosen, rejected\. `chosen` is a text here.*columns: {text: chosen}"
    ):
        by_python(rows)


def test_pictures_are_not_decoded_on_the_way() -> None:
    broken = [{"bytes": b"no picture", "path": None}]
    features = Features(
        {"conversations": List({"from": Value("string"), "value": Value("string")}), "images": List(Image())}
    )
    talk = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "a"}]
    rows = Dataset.from_list([{"conversations": talk, "images": broken}], features=features)
    found = canonical(rows).with_format("arrow")[0]
    assert found["images"].to_pylist() == [broken]
