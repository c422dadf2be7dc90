"""Write the corpus of the quickstart: the Python language reference that ships with CPython, as JSONL rows of text.

Writes train.jsonl and eval.jsonl, which data_recipes/python_docs.yaml reads. Topics are split by a hash of their
names, so every run on the same Python gives the same files. Licence of the text: PSF-2.0.
"""

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from pydoc_data.topics import topics

from mmkd.files import write_file

OUTPUT_DIR = Path(".cache/mmkd/python_docs")
SHORT, LONG = 1000, 1500
HELD_OUT_ONE_IN = 10
# Shorter paragraphs ("Example:") recur in many topics and reveal nothing of the eval rows.
DISTINCT = 60

_UNDERLINE = re.compile(r"^(.+)\n([*=\-~^\"])\2+$", re.MULTILINE)


def is_held_out(topic: str) -> bool:
    """Whether a topic belongs to eval: about one in ten, by a hash of its name."""
    return int(hashlib.sha256(topic.encode()).hexdigest(), 16) % HELD_OUT_ONE_IN == 0


def paragraphs(text: str) -> list[str]:
    """The paragraphs of a topic: headings without underlines, and with indentation, which code needs."""
    parts = re.split(r"\n\s*\n", _UNDERLINE.sub(r"\1", text))
    return [part.strip("\n").rstrip() for part in parts if part.strip()]


def cut(parts: Iterable[str]) -> list[str]:
    """Rows of whole paragraphs: up to LONG characters, unless one paragraph is longer, and rarely below SHORT."""
    rows: list[str] = []
    for part in parts:
        joined = f"{rows[-1]}\n\n{part}" if rows else part
        if rows and (len(joined) <= LONG or len(rows[-1]) < SHORT / 2):
            rows[-1] = joined
        else:
            rows.append(part)
    # A short rest of a topic is appended to the row before.
    if len(rows) > 1 and len(rows[-1]) < SHORT / 4:
        rows[-2:] = ["\n\n".join(rows[-2:])]
    return rows


def make_rows(texts: Mapping[str, str]) -> dict[str, list[dict[str, str]]]:
    """{"train": rows, "eval": rows}, each row with its topic and text, and no paragraph in both.

    The reference repeats whole sections under several topics ("compound" holds all of "try"), so that a paragraph is
    written only once. Eval comes first, so that paragraphs held out are not in train.
    """
    seen: set[str] = set()
    rows: dict[str, list[dict[str, str]]] = {"eval": [], "train": []}
    for split, held_out in (("eval", True), ("train", False)):
        for topic in sorted(topic for topic in texts if is_held_out(topic) is held_out):
            fresh = []
            for part in paragraphs(texts[topic]):
                words = " ".join(part.split())
                if len(words) < DISTINCT or words not in seen:
                    fresh.append(part)
                    seen.add(words)
            # A topic that mostly repeats others leaves only fragments, which are dropped.
            if 4 * sum(map(len, fresh)) > len(texts[topic]):
                rows[split] += [{"topic": topic, "text": text} for text in cut(fresh)]
    return rows


def write_jsonl(path: Path, rows: Iterable[Mapping[str, str]]) -> None:
    """Writes the rows, one JSON object per line. An interrupted run leaves the old file unchanged."""
    write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main(arguments: list[str] | None = None) -> None:
    """Writes both files and prints their numbers of rows and characters."""
    parser = argparse.ArgumentParser(description="Write the quickstart's corpus from Python's own reference.")
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help=f"where to write (default: {OUTPUT_DIR})")
    output_dir = parser.parse_args(arguments).output_dir
    rows = make_rows(topics)
    for split in ("train", "eval"):
        path = output_dir / f"{split}.jsonl"
        write_jsonl(path, rows[split])
        characters = sum(len(row["text"]) for row in rows[split])
        names = {row["topic"] for row in rows[split]}
        print(f"{path}: {len(rows[split])} rows, {characters:,} characters, {len(names)} topics")
