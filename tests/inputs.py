"""Inputs as users bring them: forty that are sound, and those that cannot be meant as they stand."""

import base64
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image as PILImage

from scripts.make_tiny_models import sentences
from tests.vlms import picture

COUNT = 12
ASKED, TOLD = sentences(COUNT, seed=1), sentences(COUNT, seed=2)
PAIRS = list(zip(ASKED, TOLD, strict=True))


@dataclass(frozen=True)
class Input:
    """Files of a user, the data recipe over them, and what the run's recipe says besides."""

    files: Mapping[str, Any]
    data: Mapping[str, Any] = field(default_factory=dict)
    run: Mapping[str, Any] = field(default_factory=dict)
    vision: bool = False

    def write(self, folder: Path) -> None:
        """The files and `data.yaml` in a folder."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif isinstance(content, pa.Table):
                pq.write_table(content, path)
            elif isinstance(content, str):
                path.write_text(content, encoding="utf-8")
            else:
                path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content))
        first = next(name for name in self.files if not name.startswith("img/"))
        kinds = {"csv": "csv", "parquet": "parquet", "txt": "text"}
        source = kinds.get(first.rpartition(".")[2], "json")
        keys = {"source": source, "data_files": {"train": first}, **self.data}
        keys = {key: value for key, value in keys.items() if value is not None}
        (folder / "data.yaml").write_text(yaml.safe_dump(keys, sort_keys=False, allow_unicode=True))


def turn(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def chat(question: Any, answer: Any) -> dict[str, Any]:
    return {"messages": [turn("user", question), turn("assistant", answer)]}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


def encoded(image: PILImage.Image, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return file.getvalue()


def rows(make: Any) -> list[dict[str, Any]]:
    return [make(number, question, answer) for number, (question, answer) in enumerate(PAIRS)]


def csv(columns: str, *lines: str) -> str:
    return "\n".join([columns, *lines]) + "\n"


CHATS = rows(lambda _, a, b: chat(a, b))
QA = rows(lambda _, a, b: {"q": a, "a": f" {b}"})
PICTURES = {f"img/{i}.png": encoded(picture(i)) for i in range(COUNT)}
MESSAGES = {"columns": {"messages": "messages"}}
QA_COLUMNS = {"columns": {"prompt": "q", "completion": "a"}}
WITH_IMAGES = {"columns": {"messages": "messages", "images": "image"}}
MASKED = {"assistant_only_loss": True}
SHAREGPT = rows(lambda _, a, b: {"conversations": [{"from": "human", "value": a}, {"from": "gpt", "value": b}]})
PLAIN_VLM = {"columns": {"prompt": "<image>{q}", "completion": "a", "images": "image"}}


def data_url(number: int) -> str:
    return "data:image/png;base64," + base64.b64encode(encoded(picture(number))).decode()


def seen(make: Any = None, mode: str | None = None, kind: str = "PNG", **settings: Any) -> dict[str, bytes]:
    """Pictures in another mode, format or shape, as files."""
    change = make or (lambda image: image.convert(mode))
    suffix = kind.lower()
    return {f"img/{i}.{suffix}": encoded(change(picture(i)), kind, **settings) for i in range(COUNT)}


def chat_about(form: Any) -> list[dict[str, Any]]:
    return rows(lambda i, a, b: {**chat([{"type": "image"}, text(a)], [text(b)]), "image": form(i)})


def in_parts(part: Any) -> list[dict[str, Any]]:
    return rows(lambda i, a, b: chat([part(i), text(a)], [text(b)]))


def png(i: int) -> str:
    return f"img/{i}.png"


def rotated() -> dict[str, bytes]:
    exif = PILImage.Exif()
    exif[0x0112] = 6
    return {f"img/{i}.jpeg": encoded(picture(i), "JPEG", exif=exif) for i in range(COUNT)}


def struct_table() -> pa.Table:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": encoded(picture(i)), "path": None} for i in range(COUNT)], kind)
    return pa.table({"messages": pa.array([row["messages"] for row in CHATS]), "image": images})


def large_table() -> pa.Table:
    kind = pa.large_list(pa.struct([("role", pa.large_string()), ("content", pa.large_string())]))
    return pa.table({"messages": pa.array([row["messages"] for row in CHATS], kind)})


SOUND: dict[str, Input] = {
    # Text
    "messages, the assistant's turns": Input({"t.jsonl": CHATS}, MESSAGES, MASKED),
    "messages without columns": Input({"t.jsonl": CHATS}, {}, MASKED),
    "messages, every token": Input({"t.jsonl": CHATS}, MESSAGES),
    "several turns and a system": Input(
        {
            "t.jsonl": rows(
                lambda _, a, b: {
                    "messages": [turn("system", "the cat"), *chat(a, b)["messages"], *chat(b, a)["messages"]]
                }
            )
        },
        MESSAGES,
        MASKED,
    ),
    "prompt and completion": Input({"t.jsonl": QA}, QA_COLUMNS),
    "prompt and completion without columns": Input(
        {"t.jsonl": rows(lambda _, a, b: {"prompt": a, "completion": f" {b}"})}
    ),
    "prompt and completion of messages": Input(
        {"t.jsonl": rows(lambda _, a, b: {"prompt": [turn("user", a)], "completion": [turn("assistant", b)]})},
        {"columns": {"prompt": "prompt", "completion": "completion"}},
    ),
    "lines of text": Input({"t.txt": "\n".join(ASKED) + "\n"}, {"columns": {"text": "text"}}),
    "text by a template": Input({"t.jsonl": QA}, {"columns": {"text": "{q}{a}"}}),
    "ShareGPT": Input({"t.jsonl": SHAREGPT}, {}, MASKED),
    "ShareGPT with columns": Input(
        {"t.jsonl": SHAREGPT},
        {
            "columns": {
                "messages": {
                    "column": "conversations",
                    "role_key": "from",
                    "content_key": "value",
                    "role_map": {"human": "user", "gpt": "assistant"},
                }
            }
        },
        MASKED,
    ),
    "Alpaca": Input({"t.jsonl": rows(lambda _, a, b: {"instruction": a, "input": "", "output": b})}, {}),
    "Alpaca with inputs": Input({"t.jsonl": rows(lambda _, a, b: {"instruction": a, "input": b, "output": a})}, {}),
    "question and answer": Input(
        {"t.jsonl": QA}, {"columns": {"messages": {"user": "{q}", "assistant": "{a}"}}}, MASKED
    ),
    "CSV": Input({"t.csv": csv("q,a", *(f"{a}, {b}" for a, b in PAIRS))}, QA_COLUMNS),
    "CSV with answers None and NA": Input(
        {"t.csv": csv("q,a", *(f"{a},{b}" for a, b in zip(ASKED, ["None", "NA", "null"] * 4, strict=True)))},
        QA_COLUMNS,
    ),
    "CSV of codes": Input({"t.csv": csv("q,a", *(f"{a},0{i}139" for i, a in enumerate(ASKED)))}, QA_COLUMNS),
    "CSV with quotes and lines": Input(
        {"t.csv": csv("q,a", *(f'"{a}, so\nit is","a ""{b}"""' for a, b in PAIRS))}, QA_COLUMNS
    ),
    "booleans in a template": Input(
        {"t.jsonl": rows(lambda i, a, b: {"q": a, "a": i % 2 == 0})}, {"columns": {"prompt": "q", "completion": "{a}"}}
    ),
    "one JSON array": Input({"t.json": json.dumps(QA)}, QA_COLUMNS),
    "JSON with empty lines": Input({"t.jsonl": "\n\n".join(map(json.dumps, QA)) + "\n\n"}, QA_COLUMNS),
    "Parquet": Input({"t.parquet": pa.table({"q": ASKED, "a": TOLD})}, QA_COLUMNS),
    "Parquet of polars": Input({"t.parquet": large_table()}, MESSAGES, MASKED),
    "Arabic, Chinese, emoji": Input(
        {"t.jsonl": [chat("مرحبا بالعالم", "你好，世界"), chat("नमस्ते", "👩‍👩‍👧 ok")] * 6}, MESSAGES, MASKED
    ),
    "packed": Input({"t.jsonl": QA}, QA_COLUMNS, {"packing": True, "packing_strategy": "wrapped", "max_length": 32}),
    "a mixture with domains": Input(
        {
            "t.jsonl": CHATS,
            "one.yaml": yaml.safe_dump({"source": "json", "data_files": {"train": "t.jsonl"}, **MESSAGES}),
        },
        {
            "source": None,
            "data_files": None,
            "mixture": [
                {"data": "./one.yaml", "weight": 1, "domain": "a"},
                {"data": "./one.yaml", "weight": 1, "domain": "b"},
            ],
        },
        MASKED,
    ),
    "extra columns": Input({"t.jsonl": [{**row, "id": i, "source": "me"} for i, row in enumerate(CHATS)]}, {}, MASKED),
    "the baseline": Input({"t.jsonl": CHATS}, MESSAGES, {**MASKED, "method": "sft", "teacher": None}),
    "taid": Input({"t.jsonl": CHATS}, MESSAGES, {**MASKED, "method": "taid"}),
    # Pictures
    "an images column": Input({"t.jsonl": chat_about(png), **PICTURES}, WITH_IMAGES, MASKED, True),
    "pictures and messages of strings": Input(
        {"t.jsonl": rows(lambda i, a, b: {**chat(a, b), "image": png(i)}), **PICTURES}, WITH_IMAGES, MASKED, True
    ),
    "pictures in parts": Input(
        {"t.jsonl": in_parts(lambda i: {"type": "image", "image": png(i)}), **PICTURES}, MESSAGES, MASKED, True
    ),
    "OpenAI's image_url": Input(
        {"t.jsonl": in_parts(lambda i: {"type": "image_url", "image_url": {"url": data_url(i)}})},
        MESSAGES,
        MASKED,
        True,
    ),
    "data URLs": Input({"t.jsonl": chat_about(data_url)}, WITH_IMAGES, MASKED, True),
    "base64": Input({"t.jsonl": chat_about(lambda i: data_url(i).partition(",")[2])}, WITH_IMAGES, MASKED, True),
    "LLaVA JSON": Input(
        {
            "t.jsonl": rows(
                lambda i, a, b: {
                    "image": png(i),
                    "conversations": [{"from": "human", "value": f"<image>\n{a}"}, {"from": "gpt", "value": b}],
                }
            ),
            **PICTURES,
        },
        {},
        MASKED,
        True,
    ),
    "plain text about pictures": Input(
        {"t.jsonl": rows(lambda i, a, b: {"q": a, "a": f" {b}", "image": png(i)}), **PICTURES}, PLAIN_VLM, {}, True
    ),
    "structs of bytes and path": Input({"t.parquet": struct_table()}, WITH_IMAGES, MASKED, True),
    "transparent pictures": Input({"t.jsonl": chat_about(png), **seen(mode="RGBA")}, WITH_IMAGES, MASKED, True),
    "grey pictures": Input({"t.jsonl": chat_about(png), **seen(mode="L")}, WITH_IMAGES, MASKED, True),
    "palettes": Input({"t.jsonl": chat_about(png), **seen(mode="P")}, WITH_IMAGES, MASKED, True),
    "turned photographs": Input(
        {"t.jsonl": chat_about(lambda i: f"img/{i}.jpeg"), **rotated()}, WITH_IMAGES, MASKED, True
    ),
    "rows with and without pictures": Input(
        {
            "t.jsonl": rows(
                lambda i, a, b: (
                    {**chat([{"type": "image"}, text(a)], [text(b)]), "image": png(i)}
                    if i % 2
                    else {**chat([text(a)], [text(b)]), "image": None}
                )
            ),
            **PICTURES,
        },
        WITH_IMAGES,
        MASKED,
        True,
    ),
    "LLaVA-KD": Input({"t.jsonl": chat_about(png), **PICTURES}, WITH_IMAGES, {**MASKED, "method": "llava_kd"}, True),
}

BROKEN_LINE = "\n".join([*map(json.dumps, QA[:6]), '{"q": "the cat", "a": ', *map(json.dumps, QA[6:])])

FAULTY: dict[str, Input] = {
    "broken JSON in line 7": Input({"t.jsonl": BROKEN_LINE}, QA_COLUMNS),
    "an empty file": Input({"t.jsonl": ""}, QA_COLUMNS),
    "a misspelt column": Input({"t.jsonl": QA}, {"columns": {"prompt": "qq", "completion": "a"}}),
    "a template over a column that is not there": Input(
        {"t.jsonl": QA}, {"columns": {"prompt": "{question}\n{input}", "completion": "a"}}
    ),
    "a layout nobody knows": Input({"t.jsonl": rows(lambda _, a, b: {"left": a, "right": b})}, {}),
    "a role nobody knows": Input(
        {"t.jsonl": rows(lambda _, a, b: {"messages": [turn("user", a), turn("narrator", b)]})}, MESSAGES
    ),
    "a message without content": Input(
        {"t.jsonl": [*CHATS[:5], {"messages": [turn("user", "the cat"), {"role": "assistant"}]}]}, MESSAGES
    ),
    "tool calls that the template drops": Input(
        {
            "t.jsonl": rows(
                lambda _, a, b: {
                    "messages": [
                        turn("user", a),
                        turn(
                            "assistant",
                            "",
                            tool_calls=[{"type": "function", "function": {"name": b, "arguments": {"a": a}}}],
                        ),
                    ]
                }
            )
        },
        MESSAGES,
        MASKED,
    ),
    "reasoning that the template drops": Input(
        {"t.jsonl": rows(lambda _, a, b: {"messages": [turn("user", a), turn("assistant", b, reasoning_content=a)]})},
        MESSAGES,
        MASKED,
    ),
    "answers that are all None": Input({"t.jsonl": [{"q": a, "a": None} for a in ASKED]}, QA_COLUMNS),
    "a picture that is none": Input(
        {"t.jsonl": chat_about(png), **PICTURES, "img/3.png": b"no picture"}, WITH_IMAGES, MASKED, True
    ),
    "a picture that is not there": Input(
        {"t.jsonl": chat_about(lambda i: f"img/{i + 1}.png"), **PICTURES}, WITH_IMAGES, MASKED, True
    ),
    "a truncated picture": Input(
        {
            "t.jsonl": chat_about(lambda i: f"img/{i}.jpeg"),
            **{f"img/{i}.jpeg": encoded(picture(i), "JPEG")[:-80] for i in range(COUNT)},
        },
        WITH_IMAGES,
        MASKED,
        True,
    ),
    "LLaVA rows whose pictures are missing": Input(
        {
            "t.jsonl": rows(
                lambda i, a, b: {
                    "conversations": [{"from": "human", "value": f"<image>\n{a}"}, {"from": "gpt", "value": b}]
                }
            )
        },
        {},
        MASKED,
        True,
    ),
    "pictures for a student of text": Input({"t.jsonl": chat_about(png), **PICTURES}, WITH_IMAGES, MASKED),
    "a part of a video": Input(
        {"t.jsonl": in_parts(lambda i: {"type": "video", "video": "a.mp4"})}, MESSAGES, MASKED, True
    ),
    "nothing left by max_length": Input({"t.jsonl": CHATS}, MESSAGES, {**MASKED, "max_length": 2}),
    "more positions than the student has": Input(
        {"t.jsonl": [chat("the cat " * 300, "sat on")] * 6}, MESSAGES, {**MASKED, "max_length": None}
    ),
}
