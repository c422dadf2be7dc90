"""A student's own answers to held-out prompts: how likely its teacher finds what it says, and how it says it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor

from mmkd.data.prompts import model_inputs, prompt_of
from mmkd.data.teacher_view import TeacherView
from mmkd.errors import UserError
from mmkd.generation.generator import RowError, Sampling
from mmkd.generation.row_answers import row_generator
from mmkd.models.load import tokenizer_of
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.run import load_rows_of
from mmkd.results.compared import Metric

from .answer_statistics import AnswerStatistics
from .harness import Settings, device_of
from .model import EvalModel, find_model

METRICS = {
    "own_teacher_nats": Metric("teacher's nats per own token", "own_teacher_nats"),
    "own_kl": Metric("KL(student, teacher) on own answers (nats)", "own_kl"),
    "own_agreement": Metric("top-1 agreement on own answers", "own_agreement", higher_is_better=True),
    # Neither more nor less of these is better, so that they have no gain.
    "own_entropy": Metric("entropy of own answers (nats)", higher_is_better=True),
    "own_tokens": Metric("tokens of own answers"),
    "own_ended": Metric("own answers that end", "own_ended", higher_is_better=True),
    "own_repeated": Metric("repeated 4-grams of own answers", "own_repeated"),
}

Items = dict[str, list[tuple[float, float]]]

Side = tuple[Any, Any]
"""A loaded model and its tokenizer."""

TOKENS = 64
"""Of an answer, at most."""

_BATCH = 16


@dataclass(frozen=True)
class OwnAnswers:
    """Held-out prompts that students answer, one sample each at temperature 1, and the teacher who reads along."""

    rows: Dataset
    teacher: EvalModel
    view: TeacherView | None = None
    """What the teacher reads in place of the prompts."""
    tokens: int = TOKENS
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        _check_rows(self.rows)

    @classmethod
    def of(cls, recipe: Recipe, limit: int, settings: Settings, tokens: int = TOKENS) -> "OwnAnswers":
        """Of the held-out rows of a recipe and its teacher. Raises UserError for a recipe that has none."""
        run = recipe.with_(max_eval_rows=limit).parse().named()
        rows = load_rows_of(run)
        if run.arguments.teacher is None or "eval" not in rows:
            missing = "names no teacher" if run.arguments.teacher is None else "holds no rows out"
            raise UserError(
                f"{recipe.name} {missing}, and own answers are those to held-out prompts, read by a teacher. Leave "
                "--own_answers out, or name a recipe that has both with --judge.",
            )
        return cls(rows["eval"], find_model(run.arguments.teacher), run.training.view, tokens, settings)

    @cached_property
    def key(self) -> str:
        """A hash of what is asked, and of who reads it."""
        view = None if self.view is None else self.view.facts
        facts = [self.rows.to_list(), self.teacher.weights, view, self.tokens]
        return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()

    @cached_property
    def _teacher(self) -> Any:
        return self.teacher.load(self.settings.dtype, device_of(self.settings))

    def measure(self, folder: Path | str) -> tuple[dict[str, float], Items]:
        """The numbers of a saved model, and (total, count) of each answer. Raises UserError for other vocabularies."""
        student = find_model(str(folder))
        device = device_of(self.settings)
        ours: Side = (student.load(self.settings.dtype, device), student.processing_class)
        items = read_own_answers(
            ours, (self._teacher, self.teacher.processing_class), self.rows, self.tokens, self.view
        )
        return means_of(items), items


def read_own_answers(
    student: Side, teacher: Side, rows: Dataset, tokens: int = TOKENS, view: TeacherView | None = None
) -> Items:
    """(total, count) of each answer to the prompts of rows, by the name of the number.

    Raises UserError for rows with images, and for models of different vocabularies.
    """
    _check_rows(rows)
    if tokenizer_of(student[1]).get_vocab() != tokenizer_of(teacher[1]).get_vocab():
        raise UserError(
            "Student and teacher have different vocabularies, so that the teacher cannot read the student's own "
            "answers token by token. Leave this measure out, or name a teacher of the student's vocabulary.",
            because="not built",
        )
    asked = [(prompt_of(row)[0], row.get("tools")) for row in map(dict, rows)]  # pyright: ignore
    generator = row_generator(*student, _BATCH, own_settings=False)
    answers = generator.generate(asked, Sampling(tokens, temperature=1.0))
    items: Items = {name: [] for name in METRICS}
    for row, prompt, own in zip(map(dict, rows), asked, answers, strict=True):  # pyright: ignore
        assert not isinstance(own, RowError), "a model in this process refuses nothing"
        (answer,) = own
        theirs = prompt if view is None else (prompt_of(view.rewrite(row))[0], prompt[1])
        sums = _sums(_log_probs(student, prompt, answer.ids), _log_probs(teacher, theirs, answer.ids), answer.ids)
        for name, total in sums.items():
            items[name].append((total, len(answer.ids)))
        said = AnswerStatistics.of(answer, generator.tokenizer)
        facts = {"own_tokens": said.tokens, "own_ended": said.ended, "own_repeated": said.repeated}
        for name, value in facts.items():
            items[name].append((float(value), 1.0))
    return items


def _check_rows(rows: Dataset) -> None:
    if "images" in rows.column_names:
        raise UserError(
            "Own answers are measured on text, and the held-out rows have images. Leave this measure out.",
            because="not built",
        )


def means_of(items: Items) -> dict[str, float]:
    """Means per token of answers, or per answer."""
    return {name: sum(total for total, _ in own) / sum(count for _, count in own) for name, own in items.items()}


@torch.no_grad()
def _log_probs(side: Side, asked: tuple[Any, Any], ids: Sequence[int]) -> Float[Tensor, "token vocab"]:
    """What a model believes of each token of an answer to a prompt."""
    (model, processing_class), (prompt, tools) = side, asked
    start = model_inputs(processing_class, [prompt], None if tools is None else [tools])["input_ids"][0].tolist()
    whole = torch.tensor([[*start, *ids]], device=model.device)
    logits = model(input_ids=whole, use_cache=False).logits[0, len(start) - 1 : -1]
    return logits.float().log_softmax(-1)


def _sums(
    student: Float[Tensor, "token vocab"], teacher: Float[Tensor, "token vocab"], ids: Sequence[int]
) -> Mapping[str, float]:
    """Sums over the tokens of an answer, in nats or of tokens."""
    # Rows of the head beyond the shared tokens mean nothing.
    size = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student[:, :size], teacher[:, :size].to(student.device)
    said: Int[Tensor, "token 1"] = torch.tensor(ids, device=student.device)[:, None]
    probs = student.exp()
    sums = {
        "own_teacher_nats": -teacher.gather(1, said),
        "own_kl": (probs * (student - teacher)).nan_to_num(nan=0.0),
        "own_agreement": (student.argmax(-1) == teacher.argmax(-1)).double(),
        "own_entropy": -(probs * student).nan_to_num(nan=0.0),
    }
    return {name: values.double().sum().item() for name, values in sums.items()}
