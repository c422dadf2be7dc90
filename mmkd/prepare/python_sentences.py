"""Pairs of sentences of Python's language reference: neighbours, sentences of one topic, and of different topics.

Training pairs have no labels. Pairs to measure on have a score that their places give and nobody judged: 2 for
neighbours, 1 for two sentences of one passage, 0 for sentences of two passages.
"""

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path

from mmkd.files import write_file

SOURCE = Path(".cache/mmkd/python_docs")
OUTPUT_DIR = Path(".cache/mmkd/python_sentences")
TRAIN_PAIRS = 2000

_SHORTEST, _LONGEST = 5, 40
"""Words."""

Passage = list[str]


def sentences_of(text: str) -> Passage:
    """The sentences of a passage in order, without code and lists."""
    paragraphs = [part for part in text.split("\n\n") if not part.startswith((" ", "*", "-"))]
    joined = [" ".join(part.split()) for part in paragraphs]
    sentences = [sentence.strip() for part in joined for sentence in re.split(r"(?<=[.!?])\s+", part)]
    return [sentence for sentence in sentences if _SHORTEST <= len(sentence.split()) <= _LONGEST]


def scored_pairs(passages: list[Passage], seed: int) -> list[dict[str, object]]:
    """For each sentence a neighbour, another one of its passage, and one of another passage, shuffled."""
    lots, rows = random.Random(seed), list[dict[str, object]]()
    for number, passage in enumerate(passages):
        others = [sentence for other, own in enumerate(passages) if other != number for sentence in own]
        for place, sentence in enumerate(passage[:-1]):
            partners = [(passage[place + 1], 2), (lots.choice(others), 0)]
            distant = passage[:place] + passage[place + 2 :]
            partners += [(lots.choice(distant), 1)] if distant else []
            rows += [{"sentence1": sentence, "sentence2": other, "score": score} for other, score in partners]
    lots.shuffle(rows)
    return rows


def _passages(name: str) -> list[Passage]:
    lines = (SOURCE / name).read_text(encoding="utf-8").splitlines()
    return [passage for line in lines if len(passage := sentences_of(json.loads(line)["text"])) > 1]


def _written(rows: Iterable[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def make_python_sentences() -> None:
    """Writes train.jsonl, dev.jsonl and test.jsonl; the passages of the last two are not among the first."""
    train = scored_pairs(_passages("train.jsonl"), seed=0)[:TRAIN_PAIRS]
    held_out = _passages("eval.jsonl")
    unlabelled = [{key: row[key] for key in ("sentence1", "sentence2")} for row in train]
    files = {
        "train": unlabelled,
        "dev": scored_pairs(held_out[::2], seed=1),
        "test": scored_pairs(held_out[1::2], seed=2),
    }
    for name, rows in files.items():
        write_file(OUTPUT_DIR / f"{name}.jsonl", _written(rows))
