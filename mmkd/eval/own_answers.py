"""A student's own answers to held-out prompts: how likely its teacher finds what it says, and how it says it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor

from mmkd.data.teacher_view import TeacherView
from mmkd.errors import UserError
from mmkd.generation.generator import RowError, Sampling
from mmkd.generation.row_answers import row_generator
from mmkd.losses.divergences import entropy, reverse_kl
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.run import load_rows_of
from mmkd.results.compared import Metric

from .answer_readings import AnswerReader, answered_rows
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
    def _teacher(self) -> AnswerReader:
        model = self.teacher.load(self.settings.dtype, device_of(self.settings))
        return AnswerReader(model, self.teacher.processing_class)

    def measure(self, folder: Path | str) -> tuple[dict[str, float], Items]:
        """The numbers of a saved model, and (total, count) of each answer. Raises UserError for other vocabularies."""
        student = find_model(str(folder))
        device = device_of(self.settings)
        ours = AnswerReader(student.load(self.settings.dtype, device), student.processing_class)
        items = read_own_answers(ours, self._teacher, self.rows, self.tokens, self.view)
        return means_of(items), items


def read_own_answers(
    student: AnswerReader,
    teacher: AnswerReader,
    rows: Dataset,
    tokens: int = TOKENS,
    view: TeacherView | None = None,
) -> Items:
    """(total, count) of each answer to the prompts of rows, by the name of the number.

    Raises UserError for rows with images, for models of different vocabularies, and for an answer that does not fit
    the teacher's context.
    """
    _check_rows(rows)
    if student.tokenizer.get_vocab() != teacher.tokenizer.get_vocab():
        raise UserError(
            "Student and teacher have different vocabularies, so that the teacher cannot read the student's own "
            "answers token by token. Leave this measure out, or name a teacher of the student's vocabulary.",
            because="not built",
        )
    asked = answered_rows(rows)
    seen = asked if view is None else answered_rows(rows, view)
    generator = row_generator(student.model, student.processing_class, _BATCH, own_settings=False)
    answers = generator.generate([(text.prompt, text.tools) for text in asked], Sampling(tokens, temperature=1.0))
    items: Items = {name: [] for name in METRICS}
    for ours, theirs, own in zip(asked, seen, answers, strict=True):
        assert not isinstance(own, RowError), "a model in this process refuses nothing"
        (answer,) = own
        log_probs = [side.log_probs(text, answer.ids) for side, text in ((student, ours), (teacher, theirs))]
        if log_probs[0] is None or log_probs[1] is None:
            raise UserError(
                f"An answer of {len(answer.ids)} tokens does not fit into the teacher's context behind the prompt "
                "that it reads. Leave --own_answers out, or shorten the teacher_view or the prompts."
            )
        for name, total in _sums(log_probs[0], log_probs[1], answer.ids).items():
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


def _sums(
    student: Float[Tensor, "token vocab"], teacher: Float[Tensor, "token vocab"], ids: Sequence[int]
) -> Mapping[str, float]:
    """Sums over the tokens of an answer, in nats or of tokens."""
    # Rows of the head beyond the shared tokens mean nothing.
    size = min(student.shape[-1], teacher.shape[-1])
    student, teacher = student[:, :size], teacher[:, :size].to(student.device)
    said: Int[Tensor, "token 1"] = torch.tensor(ids, device=student.device)[:, None]
    sums = {
        "own_teacher_nats": -teacher.gather(1, said),
        "own_kl": reverse_kl(student, teacher),
        "own_agreement": (student.argmax(-1) == teacher.argmax(-1)).double(),
        "own_entropy": entropy(student),
    }
    return {name: values.double().sum().item() for name, values in sums.items()}
