"""Questions with one right answer each: how often a model's greedy answer is the data's, word for word."""

import hashlib
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset

from mmkd.data.image_columns import image_column
from mmkd.data.layouts import canonical
from mmkd.data.prompts import prompt_of
from mmkd.data.sources import KINDS
from mmkd.data.table_files import read_table_files
from mmkd.errors import UserError
from mmkd.methods.comd.text import rouge_l, words
from mmkd.models.load import tokenizer_of
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.run import load_rows_of
from mmkd.recipe.stages import plan
from mmkd.results.compared import Metric

from .answer_statistics import greedy_answers
from .harness import Settings, device_of
from .model import find_model

METRICS = {
    "accuracy": Metric("accuracy", "accuracy", higher_is_better=True, of_the_model=True),
    "open_accuracy": Metric("accuracy but for yes and no", "open_accuracy", higher_is_better=True, of_the_model=True),
    "rouge_l": Metric("ROUGE-L of answers", "rouge_l", higher_is_better=True, of_the_model=True),
}

_YES_NO = ("yes", "no")
# Answers longer than so many words on average are hardly ever the data's, word for word.
_SHORT = 5
# An answer that goes on for more tokens than the longest right one is wrong, however it ends.
_MORE = 4
_BATCH = 32
# Of which the pictures are in memory.
_AT_A_TIME = 256

Items = dict[str, list[tuple[float, float]]]


@dataclass(frozen=True)
class Questions:
    """Rows that are asked."""

    rows: Dataset
    source: str
    """Where they are from, in words."""

    @classmethod
    def in_file(cls, path: Path, limit: int | None) -> "Questions":
        """The rows of a JSON or CSV file, in any layout of questions and answers."""
        if not path.is_file():
            raise UserError(f"There is no file {path}. Name a JSON or CSV file of questions with their answers.")
        kind = KINDS.get(path.suffix)
        if kind not in ("json", "csv"):
            raise UserError(f"--test is {path}, and questions are read from JSON and CSV files. Write them as .jsonl.")
        rows = read_table_files(kind, [str(path)], "test")
        return cls._of(canonical(rows, "test"), f"questions of {path}", limit)

    @classmethod
    def held_out(cls, recipe: Recipe, limit: int | None) -> "Questions":
        """The eval rows of a recipe's data, of one in stages of its last stage's."""
        own = plan(recipe)[-1].recipe if recipe.in_stages else recipe
        rows = load_rows_of((own if limit is None else own.with_(max_eval_rows=limit)).parse())
        if "eval" not in rows:
            raise UserError(
                f"The data of {recipe.name} holds no rows out, so there are no questions to compare students by. Give "
                "the data recipe an eval split, or name a file of questions with --test."
            )
        return cls._of(rows["eval"], "held-out questions", limit)

    @classmethod
    def _of(cls, rows: Dataset, source: str, limit: int | None) -> "Questions":
        rows = rows if limit is None else rows.select(range(min(limit, len(rows))))
        questions = cls(image_column(rows), f"{len(rows):,} {source}")
        unanswered = sum(not answer for answer in questions.answers)
        if unanswered:
            raise UserError(f"{unanswered} of {questions.source} have no answer to compare with. Leave them out.")
        return questions

    @cached_property
    def key(self) -> str:
        """A hash of what is asked: questions, answers and the places of pictures."""
        return hashlib.sha256(json.dumps(self.rows.to_list(), default=str).encode()).hexdigest()

    @cached_property
    def answers(self) -> list[str]:
        """The right ones."""
        rows = self.rows.remove_columns([name for name in ("images",) if name in self.rows.column_names])
        return [prompt_of(dict(row))[1].strip() for row in rows]  # pyright: ignore[reportCallIssue, reportArgumentType]

    def ask(self, folder: Path | str) -> tuple[int, list[str]]:
        """How many parameters a saved model has, and what it answers greedily."""
        model = find_model(str(folder))
        loaded = model.load("auto", device_of(Settings()))
        tokenizer: Any = tokenizer_of(model.processing_class)
        longest = max(len(ids) for ids in tokenizer(self.answers, add_special_tokens=False)["input_ids"])
        said: list[str] = []
        for start in range(0, len(self.rows), _AT_A_TIME):
            rows = self.rows.select(range(start, min(start + _AT_A_TIME, len(self.rows))))
            prompts = [prompt_of(dict(row))[0] for row in rows]  # pyright: ignore[reportCallIssue, reportArgumentType]
            tools = list(rows["tools"]) if "tools" in rows.column_names else None
            answers = greedy_answers(loaded, model.processing_class, prompts, longest + _MORE, _BATCH, tools)
            said += [answer.text.strip() for answer in answers]
        return loaded.num_parameters(), said

    def measure(self, folder: Path | str) -> tuple[int, dict[str, float], Items]:
        """Parameters, accuracies, and each question's share in them as (right, 1); of long answers ROUGE-L."""
        parameters, said = self.ask(folder)
        wanted = [words(answer) for answer in self.answers]
        if statistics.fmean(map(len, wanted)) > _SHORT:
            scores = [rouge_l(words(ours), theirs) for ours, theirs in zip(said, wanted, strict=True)]
            return parameters, {"rouge_l": statistics.fmean(scores)}, {"rouge_l": [(score, 1.0) for score in scores]}
        right = [float(ours == theirs) for ours, theirs in zip(said, self.answers, strict=True)]
        items = {"accuracy": [(value, 1.0) for value in right]}
        counts = [float(answer.lower() not in _YES_NO) for answer in self.answers]
        if 0 < sum(counts) < len(counts):
            items["open_accuracy"] = [(value * count, count) for value, count in zip(right, counts, strict=True)]
        return parameters, {name: _mean(own) for name, own in items.items()}, items


def _mean(items: Sequence[tuple[float, float]]) -> float:
    return sum(total for total, _ in items) / statistics.fmean([count for _, count in items]) / len(items)
