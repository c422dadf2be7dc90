"""Write two tasks of reasoning-gym (Apache-2.0) with worked solutions, as questions and answers.

`chain_sum` adds and subtracts three numbers of one or two digits. `spell_backward` spells a word of four to six
letters backward. A solution says each step, and ends in a line with the answer. Every row is drawn from a seed of its
own; questions of the test split are in no other split, and those of validation not in train.
"""

import argparse
import importlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mmkd.files import write_file

OUTPUT_DIR = Path(".cache/mmkd/reasoning_gym")
SPLITS = {"test": 200, "validation": 100, "train": 2_000}
"""Rows of each split, in the order in which they are drawn."""

# The seed of a row is that of its data set plus its number, so that those of splits lie far apart.
_SEEDS = {"test": 2_000_000, "validation": 1_000_000, "train": 0}
# Questions that an earlier split has are drawn again, so many times the rows at most.
_DRAWN = 4

_GIVEN = re.compile(r"\banswer\b[^\n:]*?(?:\bis\b|:)[\s:]*([^\n]+)", re.IGNORECASE)


@dataclass(frozen=True)
class ReasoningTask:
    """A task of reasoning-gym as it is set here."""

    settings: Mapping[str, Any]
    work: Callable[[Mapping[str, Any]], str]
    """The steps of a solution, without the answer."""


def sum_steps(entry: Mapping[str, Any]) -> str:
    """A sum from left to right, one operation a line."""
    first, *rest = entry["metadata"]["expression"].split()
    total, lines = int(first), []
    for sign, number in zip(rest[::2], rest[1::2], strict=True):
        result = total + int(number) if sign == "+" else total - int(number)
        lines.append(f"{total} {sign} {number} = {result}")
        total = result
    return "\n".join(lines)


def letters(entry: Mapping[str, Any]) -> str:
    """The letters of a word, and the same from the last to the first."""
    word = entry["metadata"]["word"]
    return f"{' '.join(word)}\n{' '.join(reversed(word))}"


TASKS = {
    "chain_sum": ReasoningTask(
        {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2, "allow_negation": False}, sum_steps
    ),
    "spell_backward": ReasoningTask({"min_word_len": 4, "max_word_len": 6}, letters),
}


def make_reasoning_tasks(output_dir: Path) -> dict[Path, int]:
    """Writes a file per task and split; returns the number of rows of each."""
    written = {}
    for name in TASKS:
        seen: set[str] = set()
        for split, size in SPLITS.items():
            drawn = entries(name, _DRAWN * size, _SEEDS[split])
            rows = []
            for entry in drawn:
                if len(rows) < size and entry["question"] not in seen:
                    rows.append(row_of(name, entry))
                    seen.add(entry["question"])
            path = output_dir / f"{name}_{split}.jsonl"
            write_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            written[path] = len(rows)
    return written


def entries(name: str, size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Questions of a task with their answers, as reasoning-gym makes them."""
    yield from importlib.import_module("reasoning_gym").create_dataset(
        name, size=size, seed=seed, **TASKS[name].settings
    )


def row_of(name: str, entry: Mapping[str, Any]) -> dict[str, str]:
    """What is written of an entry: `completion` is the worked `solution`, whose last line holds the answer."""
    answer = str(entry["answer"])
    solution = f"{TASKS[name].work(entry)}\nAnswer: {answer}"
    return {
        "prompt": entry["question"].strip(),
        "completion": solution,
        "solution": solution,
        "answer": answer,
        "task": name,
    }


def score(name: str, text: str, answer: str) -> float:
    """1 where what a model wrote ends in a right answer for reasoning-gym's own scorer, otherwise 0.

    The scorer gives a part of the points to some wrong answers, such as half a word; here they count 0.
    """
    return float(_scorer(name)(said(text), {"answer": answer, "metadata": {}}) == 1)


def said(text: str) -> str:
    """The answer that a text gives: what follows its last "answer is" or "answer:", otherwise its last line.

    Of an equation it is the right side. Quotes around it and a full stop after it are no part of it.
    """
    lines = text.strip().splitlines() or [""]
    given = _GIVEN.findall(text)
    return (given[-1] if given else lines[-1]).rpartition("=")[2].strip(" \t.:*\"'`")


@cache
def _scorer(name: str) -> Callable[..., float]:
    return importlib.import_module("reasoning_gym").get_score_answer_fn(name)


def main(arguments: list[str] | None = None) -> None:
    """The command line of scripts/make_reasoning_tasks.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=OUTPUT_DIR, help=f"where to write (default: {OUTPUT_DIR})")
    for path, count in make_reasoning_tasks(parser.parse_args(arguments).output_dir).items():
        print(f"{path}: {count:,} rows")
