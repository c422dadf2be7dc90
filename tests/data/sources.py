"""Small sources of rows that tests of data write: every layout, in every kind of file."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

COUNT = 24


def turn(speaker: str, text: str) -> dict[str, Any]:
    return {"role": speaker, "content": text}


LAYOUTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "chat": lambda i: {"messages": [turn("user", f"asked {i}"), turn("assistant", f"told {i}")]},
    "sharegpt": lambda i: {
        "conversations": [{"from": "human", "value": f"asked {i}"}, {"from": "gpt", "value": f"told {i}"}]
    },
    "alpaca": lambda i: {"instruction": f"asked {i}", "input": "", "output": f"told {i}"},
    "prompt_completion": lambda i: {"question": f"asked {i}", "answer": f"told {i}"},
    "preference": lambda i: {"prompt": f"asked {i}", "chosen": f"told {i}", "rejected": "no"},
    "text": lambda i: {"text": f"told {i}"},
    "prompts_only": lambda i: {"question": f"asked {i}"},
    "classes": lambda i: {"text": f"told {i}", "label": "good" if i % 2 else "bad"},
}


def rows_of(kind: str, count: int = COUNT) -> list[dict[str, Any]]:
    return [LAYOUTS[kind](i) for i in range(count)]


def write_jsonl(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def png(colour: str = "red", size: int = 8) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


def write_png(path: str | Path, colour: str = "red") -> str:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(png(colour))
    return str(path)


def write_shard(path: str | Path, rows: Sequence[Mapping[str, bytes]]) -> str:
    """A WebDataset shard; a row is {ending: content}."""
    with tarfile.open(path, "w") as archive:
        for number, row in enumerate(rows):
            for ending, content in row.items():
                member = tarfile.TarInfo(f"{number:04}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return str(path)


def _json(rows: list[dict[str, Any]]) -> str:
    Path("rows.json").write_text(json.dumps(rows))
    return "rows.json"


def _csv(rows: list[dict[str, Any]]) -> str:
    lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
    Path("rows.csv").write_text("\n".join(lines) + "\n")
    return "rows.csv"


def _parquet(rows: list[dict[str, Any]]) -> str:
    Dataset.from_list(rows).to_parquet("rows.parquet")
    return "rows.parquet"


def _saved(rows: list[dict[str, Any]]) -> str:
    Dataset.from_list(rows).save_to_disk("saved")
    return "saved"


def _arrow(rows: list[dict[str, Any]]) -> str:
    _saved(rows)
    next(Path("saved").glob("*.arrow")).rename("rows.arrow")
    return "rows.arrow"


def _folder(rows: list[dict[str, Any]]) -> str:
    write_jsonl("folder/deep/a.jsonl", rows[:10])
    write_jsonl("folder/deep/b.jsonl", rows[10:])
    return "folder"


def _glob(rows: list[dict[str, Any]]) -> str:
    write_jsonl("part-0.jsonl", rows[:10])
    write_jsonl("part-1.jsonl", rows[10:])
    return "part-*.jsonl"


def _shards(rows: list[dict[str, Any]]) -> str:
    write_shard("shard-0.tar", [{"json": json.dumps(row).encode()} for row in rows[:10]])
    write_shard("shard-1.tar", [{"json": json.dumps(row).encode()} for row in rows[10:]])
    return "shard-*.tar"


CONTAINERS: dict[str, Callable[[list[dict[str, Any]]], str]] = {
    "jsonl": lambda rows: write_jsonl("rows.jsonl", rows),
    "json": _json,
    "csv": _csv,
    "parquet": _parquet,
    "arrow": _arrow,
    "saved": _saved,
    "folder": _folder,
    "glob": _glob,
    "shards": _shards,
}
NESTED = ("chat", "sharegpt")
"""Layouts that no CSV file holds."""
