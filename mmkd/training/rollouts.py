"""On-policy distillation: the student answers some of a batch's prompts itself, for the teacher to judge."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain, islice
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from mmkd.errors import UserError
from mmkd.generation.generator import Generator, Prompt, RowError, Sampling
from mmkd.generation.local_generation import (
    AnswerTokens,
    LocalGenerator,
    by_number,
    prompt_inputs,
    seed_of,
    silenced_tokens,
    up_to_stop,
)
from mmkd.models.backbone import base_of
from mmkd.models.load import positions_of
from mmkd.models.sharded_weights import whole_on_every_rank
from mmkd.teachers.batch import Batch
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.several import parts_of

from .answers import Placed, Rollout, answer_starts, prompts_of, same_place, with_answers
from .laid_rows import Lay, laid_again, taken_apart
from .rollout_config import RolloutConfig
from .rows_again import with_rows_again

Collate = Callable[[Sequence[Mapping[str, Any]]], Batch]
Read = Callable[[Batch, Mapping[int, Placed]], Batch]
"""(micro-batch with rollouts in place, these by their row) -> the micro-batch as the teacher reads it."""

# Share of rollouts from which on they count as "all": one that happens to end does not hide that the others never do.
NEARLY_ALL = 0.95
_LOOKED_AT = 64


@dataclass(frozen=True)
class RolloutPrompt:
    """A prompt of a batch: the row it is of, and where its answer begins."""

    batch: int
    row: int
    start: int
    ids: list[int]
    example: Mapping[str, Any]
    answer: list[int] = field(default_factory=list[int])
    """What the data answers."""
    of_teachers: Mapping[str, list[int]] = field(default_factory=dict[str, list[int]])
    """What teachers with the student's tokens read in the place of `ids`, by name, where they read something else."""
    route: int | None = None
    """The number of the row's teacher, where rows name theirs."""

    def followed_by(self, answer: list[int]) -> "RolloutPrompt":
        """The prompt and the beginning of an answer, for who is asked by tokens."""
        theirs = {name: [*ids, *answer] for name, ids in self.of_teachers.items()}
        return replace(self, ids=[*self.ids, *answer], of_teachers=theirs)


@dataclass(frozen=True)
class Asked:
    """An accumulated batch and those of its prompts that the student answers."""

    step: int
    batches: Sequence[Batch]
    single: list[Batch]
    """The same with each sequence in a row of its own."""
    prompts: list[RolloutPrompt]


@dataclass(frozen=True)
class Mixed:
    """What became of the rows that were answered."""

    prompts: list[RolloutPrompt]
    rollouts: list[Rollout]
    seconds: float
    staleness: int = 0
    """How many optimizer steps the student has taken since it answered."""

    def of(self, batch: int) -> dict[int, Placed]:
        """The rollouts of one micro-batch by their row."""
        pairs = zip(self.prompts, self.rollouts, strict=True)
        return {prompt.row: Placed(prompt.start, rollout) for prompt, rollout in pairs if prompt.batch == batch}

    def reports(self, device: torch.device) -> dict[str, tuple[Tensor, Tensor | float]]:
        """What the logs say of them."""
        facts, rollouts = self.facts, len(self.rollouts)
        # Where the other reports are: they are reduced together, by NCCL perhaps, which knows no others.
        counts = dict(zip(facts, torch.tensor(list(facts.values()), device=device), strict=True))
        return {
            **{f"rollouts_{kind}": (counts[kind], rollouts) for kind in ("ended", "truncated", "empty")},
            "rollout_length": (counts["tokens"], rollouts),
            "rollout_tokens": (counts["tokens"], 1),
            "rollout_seconds": (torch.tensor(self.seconds, device=device), 1),
            "rollout_staleness": (torch.tensor(self.staleness * rollouts, device=device), rollouts),
        }

    def totals(self, summed: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, int]:
        """The facts of all ranks together."""
        facts = self.facts
        return dict(zip(facts, summed(torch.tensor(list(facts.values()), device=device)).tolist(), strict=True))

    @property
    def facts(self) -> dict[str, int]:
        """How many rollouts there are, how many of which kind, and their tokens."""
        return {
            "rollouts": len(self.rollouts),
            "ended": sum(rollout.ended for rollout in self.rollouts),
            "truncated": sum(not rollout.ended for rollout in self.rollouts),
            "empty": sum(rollout.empty for rollout in self.rollouts),
            "tokens": sum(len(rollout.ids) for rollout in self.rollouts),
        }


def student_tokens(model: Any, tokenizer: Any, vocab_size: int, text_only: bool) -> AnswerTokens:
    """What ends an answer of a student and what it must not hold; `text_only` leaves out what stands for no text.

    Raises UserError for a student that cannot end an answer.
    """
    tokens = AnswerTokens.of(base_of(model), tokenizer)
    if not tokens.stops:
        raise UserError(
            "The student has no token that ends an answer. Set eos_token, or on_policy_fraction: 0.", because="meaning"
        )
    special = set(tokenizer.all_special_ids) - set(tokens.stops) if text_only else set()
    return replace(tokens, silenced=sorted({*silenced_tokens(base_of(model), vocab_size), *special}))


def student_generator(
    model: Any,
    tokenizer: Any,
    tokens: AnswerTokens,
    collate: Collate | None,
    accelerator: Accelerator,
    args: RolloutConfig,
) -> LocalGenerator[RolloutPrompt]:
    """The student itself, which is asked with the very rows that it is trained on, or without `collate` by tokens."""

    def inputs(prompts: list[RolloutPrompt]) -> Mapping[str, Any]:
        if collate is None:
            return prompt_inputs(tokenizer, [Prompt(prompt.ids) for prompt in prompts])
        batch = collate([prompt.example for prompt in prompts])
        return prompts_of(batch.student, [prompt.start for prompt in prompts], tokens.pad)

    def batches(prompts: Sequence[RolloutPrompt]) -> list[list[int]]:
        # Prompts of like length share a batch, in an order that says nothing about how the batch was cut.
        order = sorted(range(len(prompts)), key=lambda place: (len(prompts[place].ids), place))
        return by_number(order, args.rollout_batch_size)

    positions = positions_of(base_of(model).config)
    return LocalGenerator(
        model,
        tokenizer,
        inputs,
        batches,
        tokens,
        positions,
        autocast=lambda: accelerator.autocast(),
        whole=lambda: whole_on_every_rank(model, accelerator),
    )


class Rollouts:
    """Puts the student's answers into accumulated batches.

    Args:
        generator: who generates, by the student as it is now; all ranks ask it together.
        tokens: where its answers end, and what fills rows up.
        args: the run's settings.
        rank, ranks: this process among those that share a batch.
        hand_over: lets the generator speak with the student as it is now.
        lay: collates single rows, where batches hold rows end to end.
        collate: makes a batch of rows that were read before, where they do not.
    """

    def __init__(
        self,
        generator: Generator[RolloutPrompt],
        tokens: AnswerTokens,
        args: RolloutConfig,
        rank: int,
        ranks: int,
        hand_over: Callable[[], None] = lambda: None,
        lay: Lay | None = None,
        collate: Collate | None = None,
    ):
        self.generator, self.tokens, self.args = generator, tokens, args
        self.hand_over, self.lay, self.collate = hand_over, lay, collate
        self.rank, self.ranks = rank, ranks
        self._bad_steps = 0

    def mix(
        self, batches: Sequence[Batch], step: int, read: Read = lambda batch, placed: batch
    ) -> tuple[list[Batch], Mixed]:
        """The micro-batches of an optimizer step with the student's answers in some of their rows.

        Which rows, and the random numbers behind the answers, follow from the seed and the step alone. How a batch is
        cut into micro-batches and ranks does not change the rows.
        """
        begun = time.monotonic()
        self.hand_over()
        asked = self.ask(batches, step)
        rollouts = self.answer(asked)
        return self.put(asked, Mixed(asked.prompts, rollouts, time.monotonic() - begun), read)

    def ask(self, batches: Sequence[Batch], step: int) -> Asked:
        """Which prompts of a step's batches the student answers."""
        single = list(batches) if self.lay is None else [taken_apart(batch) for batch in batches]
        return Asked(step, batches, single, self._prompts(single, step))

    def answer(self, asked: Asked) -> list[Rollout]:
        """The answers by whom the generator speaks with."""
        return self._answered(asked.prompts, seed_of(repr((self.args.seed, "answers", asked.step, self.rank))))

    def put(self, asked: Asked, mixed: Mixed, read: Read = lambda batch, placed: batch) -> tuple[list[Batch], Mixed]:
        """The micro-batches with the answers in the place of what stood in these rows, or in rows of their own."""
        batches = []
        for number, (batch, single) in enumerate(zip(asked.batches, asked.single, strict=True)):
            placed = mixed.of(number)
            if placed and self.args.rollout_rows == "add":
                single, placed = with_rows_again(single, placed, self.collate)
            answered = read(self._with(single, placed), placed) if placed else batch
            batches.append(laid_again(answered, self.lay) if placed and self.lay is not None else answered)
        return batches, mixed

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

    def _answered(self, prompts: Sequence[RolloutPrompt], seed: int) -> list[Rollout]:
        args, rollouts = self.args, []
        sampling = Sampling(args.rollout_max_tokens, args.rollout_temperature, args.rollout_top_p, seed)
        for prompt, answers in zip(prompts, self.generator.generate(prompts, sampling), strict=True):
            if isinstance(answers, RowError):
                raise UserError(f"The rollout server refused a prompt: {answers.reason}")
            room = None if not args.max_length else args.max_length - prompt.start
            ids, ended = up_to_stop(answers[0].ids[:room], self.tokens.stops)
            log_probs, replaced = answers[0].log_probs, answers[0].replaced
            log_probs = None if log_probs is None else log_probs[: len(ids)]
            rollouts.append(Rollout(ids, ended, log_probs, None if replaced is None else replaced[: len(ids)]))
        return rollouts

    def _prompts(self, batches: Sequence[Batch], step: int) -> list[RolloutPrompt]:
        fraction = self.args.on_policy_fraction
        offset = seed_of(repr((self.args.seed, "rows", step))) / 2**32
        starts_of = [answer_starts(batch.student, self.args.rollout_prompt_tokens) for batch in batches]
        prompts, before = [], self._rows_before([len(starts) for starts in starts_of])
        for number, (batch, starts) in enumerate(zip(batches, starts_of, strict=True)):
            for row, start in enumerate(starts):
                # The row's place in the batch of all micro-batches and ranks.
                place = before[number] + row
                chosen = math.floor((place + 1) * fraction + offset) > math.floor(place * fraction + offset)
                if chosen and start is not None:
                    ids, answer = batch["input_ids"][row, :start].tolist(), batch["labels"][row, start:]
                    answer = answer[answer != -100].tolist()
                    prompt = RolloutPrompt(number, row, start, ids, batch.rows[row], answer)
                    prompts.append(self._as_teachers_read(prompt, batch))
        return prompts

    def _as_teachers_read(self, prompt: RolloutPrompt, batch: Batch) -> RolloutPrompt:
        """The prompt with what teachers read of it, where they take part in answering."""
        if self.args.rollouts == "student":
            return prompt
        theirs = {}
        for name, reading in batch.readings.items():
            start = same_place(batch.student, reading.view, prompt.row, prompt.start)
            theirs[name] = reading.view["input_ids"][prompt.row, :start].tolist()
        route = batch.student.route
        return replace(prompt, of_teachers=theirs, route=None if route is None else int(route[prompt.row, 0]))

    def _rows_before(self, rows: list[int]) -> list[int]:
        """How many rows of all ranks stand before each micro-batch of this one, which has so many."""
        # Only packs hold different numbers of rows.
        everyone = gather_object([rows]) if self.args.packing else [rows] * self.ranks
        counts = list(chain.from_iterable(zip(*everyone, strict=True)))
        return list(accumulate(counts, initial=0))[self.rank :: self.ranks][: len(rows)]

    def _with(self, batch: Batch, placed: Mapping[int, Placed]) -> Batch:
        multiple: Any = self.args.pad_to_multiple_of
        return with_answers(batch, placed, pad_id=self.tokens.pad, multiple=multiple, learnt=self._learnt)

    def _learnt(self, rollout: Rollout) -> int:
        """How many of its first tokens are learnt from."""
        if self.args.rollout_truncated == "drop" and not rollout.ended:
            return 0
        share = self.args.rollout_prefix if self.args.rollout_token_weights == "prefix" else 1
        return math.ceil(share * len(rollout.ids))


def check_rollouts(teacher: Any) -> None:
    """Raises UserError for a teacher that cannot judge answers."""
    if any(isinstance(part, CachedTeacher) for part in parts_of(teacher)):
        raise UserError(
            "A teacher_cache holds the teacher's words about the data's answers, not about what the student will say. "
            "Set on_policy_fraction: 0, or use the teacher itself (remove teacher_cache) or a teacher_server.",
            because="meaning",
        )


def check_prompts(args: RolloutConfig, data: Any, collate: Collate, vision: bool, laid: bool) -> None:
    """Raises UserError when none of the first rows has a prompt, or one that would cut an image.

    `laid` says that `collate` lays rows end to end.
    """
    if vision and args.rollout_prompt_tokens is not None:
        raise UserError(
            "rollout_prompt_tokens would cut rows within their images. Remove it, and map the data to prompt and "
            "completion.",
            because="meaning",
        )
    examples = [dict(row) for row in islice(data, _LOOKED_AT)]
    batches = (collate([row]) for row in examples)
    views = ((taken_apart(batch) if laid else batch).student for batch in batches)
    if all(start is None for view in views for start in answer_starts(view, args.rollout_prompt_tokens)):
        raise UserError(
            f"None of the first {len(examples)} rows has a prompt that the student could answer: all of their tokens "
            "are supervised. Map the data to prompt and completion, set assistant_only_loss: true for messages, or "
            "rollout_prompt_tokens for plain text."
        )
