"""On-policy distillation: the student answers some of a batch's prompts itself, for the teacher to judge."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import GenerationConfig

from mmkd.errors import UserError
from mmkd.generation.local_generation import seed_of, seeded, silenced_tokens, speaking, stop_tokens
from mmkd.models.backbone import base_of
from mmkd.models.load import positions_of
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.several import parts_of

from .answers import Placed, Rollout, answer_starts, prompts_of, with_answers
from .preparing import ROWS
from .rollout_config import RolloutConfig

Collate = Callable[[list[dict[str, Any]]], Any]

# Share of rollouts from which on they count as "all": one that happens to end does not hide that the others never do.
NEARLY_ALL = 0.95
_LOOKED_AT = 64


@dataclass(frozen=True)
class Question:
    """A prompt of a batch: the row it is of, and where its answer begins."""

    batch: int
    row: int
    start: int
    ids: list[int]
    example: dict[str, Any]


@dataclass(frozen=True)
class Mixed:
    """What became of the rows that were answered."""

    questions: list[Question]
    rollouts: list[Rollout]
    seconds: float

    def of(self, batch: int) -> dict[int, Placed]:
        """The rollouts of one micro-batch by their row."""
        pairs = zip(self.questions, self.rollouts, strict=True)
        return {one.row: Placed(one.start, rollout) for one, rollout in pairs if one.batch == batch}

    @property
    def facts(self) -> dict[str, int]:
        """How many rollouts there are, how many of which kind, and their tokens."""
        return {
            "rollouts": len(self.rollouts),
            "ended": sum(one.ended for one in self.rollouts),
            "truncated": sum(not one.ended for one in self.rollouts),
            "empty": sum(one.empty for one in self.rollouts),
            "tokens": sum(len(one.ids) for one in self.rollouts),
        }


@dataclass(frozen=True)
class Speech:
    """What decides where an answer ends and what it may hold, as token ids."""

    stops: list[int]
    silenced: list[int]
    pad: int

    @classmethod
    def of(cls, model: Any, tokenizer: Any, vocab_size: int, text_only: bool) -> "Speech":
        """Of a student; `text_only` silences special tokens too, which stand for no text."""
        stops = stop_tokens(base_of(model), tokenizer)
        special = set(tokenizer.all_special_ids) - set(stops) if text_only else set()
        silenced = sorted({*silenced_tokens(base_of(model), vocab_size), *special})
        return cls(stops, silenced, stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id)


class Source(ABC):
    """Who speaks for the student."""

    @abstractmethod
    def answer(self, questions: Sequence[Question], seed: int) -> list[Rollout]:
        """One rollout per question, in their order, by the student as it is now; all ranks call it together."""


class StudentSource(Source):
    """The student itself, by transformers' generate."""

    def __init__(self, model: Any, speech: Speech, collate: Collate, accelerator: Accelerator, args: RolloutConfig):
        self.model, self.speech, self.collate, self.accelerator, self.args = model, speech, collate, accelerator, args

    @torch.no_grad()
    def answer(self, questions: Sequence[Question], seed: int) -> list[Rollout]:
        size = self.args.rollout_batch_size
        # Prompts of like length share a batch, in an order that says nothing about how the batch was cut.
        order = sorted(range(len(questions)), key=lambda place: (len(questions[place].ids), place))
        found: dict[int, Rollout] = {}
        with seeded(self.model, seed), speaking(self.model):
            for first in range(0, len(order), size):
                places = order[first : first + size]
                rollouts = self._answers([questions[place] for place in places])
                found |= dict(zip(places, rollouts, strict=True))
        return [found[place] for place in range(len(questions))]

    def _answers(self, questions: Sequence[Question]) -> list[Rollout]:
        batch = self.collate([question.example for question in questions])
        inputs = prompts_of(batch, [question.start for question in questions], self.speech.pad)
        model: Any = base_of(self.model)
        inputs = {name: v.to(model.device) if isinstance(v, Tensor) else v for name, v in inputs.items()}
        width = inputs["input_ids"].shape[1]
        with self.accelerator.autocast():
            output = model.generate(**inputs, generation_config=self._generation(width))
        limit = self.args.max_length or math.inf
        return [
            rollout_of(ids[: int(min(len(ids), limit - question.start))], self.speech.stops)
            for question, ids in zip(questions, output[:, width:].tolist(), strict=True)
        ]

    def _generation(self, width: int) -> GenerationConfig:
        args, positions = self.args, positions_of(base_of(self.model).config)
        room = args.rollout_max_tokens if positions is None else positions - width
        sampled = args.rollout_temperature > 0
        return GenerationConfig(
            max_new_tokens=max(1, min(args.rollout_max_tokens, room)),
            do_sample=sampled,
            temperature=args.rollout_temperature if sampled else None,
            top_p=args.rollout_top_p if sampled else None,
            top_k=0 if sampled else None,
            eos_token_id=self.speech.stops,
            pad_token_id=self.speech.pad,
            suppress_tokens=self.speech.silenced or None,
            # Off in a student that trains with gradient checkpointing.
            use_cache=True,
        )


class Rollouts:
    """Puts the student's answers into accumulated batches.

    Args:
        source: who generates.
        args: the run's settings.
        pad: the token that fills rows up.
        rank, ranks: this process among those that share a batch.
    """

    def __init__(self, source: Source, args: RolloutConfig, pad: int, rank: int, ranks: int):
        self.source, self.args, self.pad = source, args, pad
        self.rank, self.ranks = rank, ranks
        self._bad_steps = 0

    def mix(self, batches: Sequence[Mapping[str, Any]], step: int) -> tuple[list[dict[str, Any]], Mixed]:
        """The micro-batches of an optimizer step with the student's answers in some of their rows.

        Which rows, and the random numbers behind the answers, follow from the seed and the step alone. How a batch is
        cut into micro-batches and ranks does not change the rows.
        """
        begun = time.monotonic()
        questions = self._questions(batches, step)
        rollouts = self.source.answer(questions, seed_of(repr((self.args.seed, "answers", step, self.rank))))
        found = Mixed(questions, rollouts, time.monotonic() - begun)
        return [self._with(batch, found.of(number)) for number, batch in enumerate(batches)], found

    def judge(self, totals: Mapping[str, int]) -> None:
        """Raises UserError when nearly all rollouts of all ranks have been useless for `rollout_patience` steps."""
        if not totals["rollouts"] or not self.args.rollout_patience:
            return
        kinds = ["empty"] if self.args.rollout_prompt_tokens is not None else ["empty", "truncated"]
        bad = sum(totals[kind] for kind in kinds)
        self._bad_steps = self._bad_steps + 1 if bad >= NEARLY_ALL * totals["rollouts"] else 0
        if self._bad_steps < self.args.rollout_patience:
            return
        empty = totals["empty"] >= totals["truncated"]
        what = "say nothing: their first token ends them" if empty else "do not end within rollout_max_tokens"
        advice = (
            "The student has learnt to be silent: look at the data for empty answers, lower the learning rate, or"
            if empty
            else f"Raise rollout_max_tokens ({self.args.rollout_max_tokens}) or max_length ({self.args.max_length}), "
            "see that the data's answers end with the tokenizer's eos_token,"
        )
        raise UserError(
            f"In {self._bad_steps} steps on end {bad} of {totals['rollouts']} rollouts or more {what}. {advice} train "
            "with a lower on_policy_fraction first. rollout_patience: 0 goes on all the same."
        )

    def _questions(self, batches: Sequence[Mapping[str, Any]], step: int) -> list[Question]:
        fraction = self.args.on_policy_fraction
        offset = seed_of(repr((self.args.seed, "rows", step))) / 2**32
        questions = []
        for number, batch in enumerate(batches):
            starts = answer_starts(batch, self.args.rollout_prompt_tokens)
            for row, start in enumerate(starts):
                # The row's place in the batch of all micro-batches and ranks.
                place = (number * self.ranks + self.rank) * len(starts) + row
                chosen = math.floor((place + 1) * fraction + offset) > math.floor(place * fraction + offset)
                if chosen and start is not None:
                    ids = batch["input_ids"][row, :start].tolist()
                    questions.append(Question(number, row, start, ids, batch[ROWS].examples[row]))
        return questions

    def _with(self, batch: Mapping[str, Any], placed: Mapping[int, Placed]) -> dict[str, Any]:
        if not placed:
            return dict(batch)
        multiple: Any = self.args.pad_to_multiple_of
        return with_answers(
            batch,
            placed,
            pad_id=self.pad,
            multiple=multiple,
            learn_truncated=self.args.rollout_truncated == "keep",
        )


def check_rollouts(teacher: Any, data: Any) -> None:
    """Raises UserError for rows that cannot be answered reproducibly, and for a teacher that cannot judge answers."""
    if any(isinstance(one, CachedTeacher) for one in parts_of(teacher)):
        raise UserError(
            "A teacher_cache holds the teacher's words about the data's answers, not about what the student will say. "
            "Set on_policy_fraction: 0, or use the teacher itself (remove teacher_cache) or a teacher_server."
        )
    if not hasattr(data, "__len__"):
        raise UserError(
            "The train data is a stream, of which the student cannot answer rows reproducibly. Load it whole, or set "
            "on_policy_fraction: 0."
        )


def check_prompts(args: RolloutConfig, data: Any, collate: Collate, vision: bool) -> None:
    """Raises UserError when none of the first rows has a prompt, or one that would cut an image."""
    if vision and args.rollout_prompt_tokens is not None:
        raise UserError(
            "rollout_prompt_tokens would cut rows within their images. Remove it, and map the data to prompt and "
            "completion."
        )
    examples = [dict(data[row]) for row in range(min(len(data), _LOOKED_AT))]
    if all(start is None for one in examples for start in answer_starts(collate([one]), args.rollout_prompt_tokens)):
        raise UserError(
            f"None of the first {len(examples)} rows has a prompt that the student could answer: all of their tokens "
            "are supervised. Map the data to prompt and completion, set assistant_only_loss: true for messages, or "
            "rollout_prompt_tokens for plain text."
        )


def rollout_of(ids: Sequence[int], stops: Sequence[int]) -> Rollout:
    """The tokens up to the first that ends an answer."""
    end = next((place for place, token in enumerate(ids) if token in stops), None)
    return Rollout(list(ids), False) if end is None else Rollout(list(ids[: end + 1]), True)
