"""Who generates interleaved rollouts: both models here, token by token, or blocks of tokens that a teacher judges."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch.nn.utils.rnn import pad_sequence

from mmkd.errors import UserError
from mmkd.generation.generator import Advance, Answer, Generator, Prompt, RowError, Sampling
from mmkd.generation.interleaved import InterleavedGenerator, LikelyTokens
from mmkd.generation.local_generation import (
    AnswerTokens,
    LocalGenerator,
    by_number,
    prompt_inputs,
    seed_of,
    up_to_stop,
)
from mmkd.models.sharded_weights import is_sharded, whole_on_every_rank
from mmkd.teachers.batch import ONLY, Batch, Reading, View
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.server import ServerTeacher
from mmkd.teachers.several import asked, parts_of

from .answers import prompts_of, same_place
from .likely_tokens import likely_tokens
from .rollouts import Collate, RolloutPrompt

BLOCK = 8
"""Tokens that the student proposes before a teacher is asked about them."""

Judge = Callable[[Sequence[RolloutPrompt], Sequence[list[int]]], LikelyTokens]
"""(prompts, tokens proposed after each) -> what the teacher finds likely at these, one prompt after the other."""


@dataclass
class Growing:
    """An answer in the making."""

    prompt: RolloutPrompt
    ids: list[int] = field(default_factory=list[int])
    replaced: list[bool] = field(default_factory=list[bool])
    log_probs: list[float] = field(default_factory=list[float])
    """Of the tokens that a server proposed; 0 for those that replaced one."""
    ended: bool = False

    @property
    def asked(self) -> RolloutPrompt:
        """Its prompt with what is said so far, as the prompt of what comes next."""
        return self.prompt.followed_by(self.ids)

    def take(self, proposal: Answer, room: int, replacement: int | None, stops: Sequence[int]) -> None:
        """Takes so many proposed tokens, and after them the one that replaces the next."""
        self.ids += proposal.ids[:room]
        self.replaced += [False] * room
        self.log_probs += (proposal.log_probs or [])[:room]
        if replacement is not None:
            self.ids.append(replacement)
            self.replaced.append(True)
            self.log_probs += [0.0] if proposal.log_probs is not None else []
        self.ended = not self.ids or self.ids[-1] in stops

    @property
    def answer(self) -> Answer:
        """The whole of it."""
        log_probs = self.log_probs if len(self.log_probs) == len(self.ids) else None
        return Answer("", self.ids, "stop" if self.ended else "length", log_probs, self.replaced)


class BlockGenerator(Generator[RolloutPrompt]):
    """The student proposes blocks of tokens, of which the teacher keeps those up to the first that it finds unlikely.

    It replaces that one, and the student goes on from there: as `InterleavedGenerator`, whoever runs the two models,
    but without caches between blocks.

    Args:
        student: proposes, asked by the tokens of prompts.
        judge: the teacher.
        tokens: where answers end.
        batch_size: answers that are judged at a time.
        whole: entered once, before anything is read.
    """

    def __init__(
        self,
        student: Generator[RolloutPrompt],
        judge: Judge,
        tokens: AnswerTokens,
        batch_size: int,
        whole: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        self.student, self.judge, self.tokens = student, judge, tokens
        self.batch_size, self.whole = batch_size, whole

    def generate(
        self, prompts: Sequence[RolloutPrompt], sampling: Sampling, samples: int = 1, advance: Advance = lambda _: None
    ) -> list[list[Answer] | RowError]:
        copies: list[list[Answer | RowError]] = []
        with self.whole():
            for copy in range(samples):
                # Servers draw by the seed alone: copies of a prompt would get the same answers.
                seed = seed_of(f"{sampling.seed} copy {copy}")
                copies.append(self._said(prompts, replace(sampling, seed=seed)))
        answers: list[list[Answer] | RowError] = []
        for own in zip(*copies, strict=True):
            refused = next((answer for answer in own if isinstance(answer, RowError)), None)
            said = [answer for answer in own if isinstance(answer, Answer)]
            advance(sum(len(answer.ids) for answer in said))
            answers.append(said if refused is None else refused)
        return answers

    def _said(self, prompts: Sequence[RolloutPrompt], sampling: Sampling) -> list[Answer | RowError]:
        """An answer to each prompt."""
        answers = [Growing(prompt) for prompt in prompts]
        refused: dict[int, RowError] = {}
        draws = torch.Generator().manual_seed(seed_of(f"{sampling.seed} replaced"))
        places = list(range(len(answers)))
        while places:
            seed = seed_of(f"{sampling.seed} block {max(len(answers[place].ids) for place in places)}")
            asked_now = [answers[place].asked for place in places]
            replies = self.student.generate(asked_now, replace(sampling, max_new_tokens=BLOCK, seed=seed))
            proposals: dict[int, Answer] = {}
            for place, reply in zip(places, replies, strict=True):
                if isinstance(reply, RowError):
                    refused[place] = reply
                else:
                    proposals[place] = reply[0]
            for batch in by_number(proposals, self.batch_size):
                self._judge([(answers[place], proposals[place]) for place in batch], sampling, draws)
            places = [
                place
                for place in proposals
                if not answers[place].ended and len(answers[place].ids) < sampling.max_new_tokens
            ]
        return [refused.get(place, answer.answer) for place, answer in enumerate(answers)]

    def _judge(self, batch: Sequence[tuple[Growing, Answer]], sampling: Sampling, draws: torch.Generator) -> None:
        """Has the answers take what the teacher keeps of their proposals."""
        blocks = [
            up_to_stop(proposal.ids[: sampling.max_new_tokens - len(own.ids)], self.tokens.stops)[0]
            for own, proposal in batch
        ]
        likely = self.judge([own.asked for own, _ in batch], blocks)
        proposed = torch.tensor([token for block in blocks for token in block], dtype=torch.long)
        tokens, replaced = likely.replace(proposed, sampling.temperature, draws)
        ends = list(accumulate(map(len, blocks), initial=0))
        for (own, proposal), start, end in zip(batch, ends, ends[1:], strict=False):
            kept = next((place for place in range(start, end) if replaced[place]), end)
            own.take(proposal, kept - start, int(tokens[kept]) if kept < end else None, self.tokens.stops)


@dataclass(frozen=True)
class TokenJudge:
    """A teacher that is asked about tokens, as in a step: any but a cache. Rows with images it cannot be asked about.

    Args:
        ask: what the teacher says of a batch.
        top_k, vocab_size: how many tokens are likely, of how many.
        tokens: what answers must not hold.
    """

    ask: Callable[[Batch], Any]
    top_k: int
    vocab_size: int
    tokens: AnswerTokens

    @torch.no_grad()
    def __call__(self, prompts: Sequence[RolloutPrompt], blocks: Sequence[list[int]]) -> LikelyTokens:
        student = self._view([prompt.ids for prompt in prompts], blocks)
        routes = [prompt.route for prompt in prompts]
        if all(route is not None for route in routes):
            student = replace(student, route=torch.tensor(routes)[:, None])
        names = prompts[0].of_teachers if prompts else {}
        readings = {
            name: Reading(self._view([prompt.of_teachers[name] for prompt in prompts], blocks)) for name in names
        }
        batch = Batch(student, torch.tensor([len(row) for row in student.labels]), readings)
        signal = self.ask(batch)
        likely = likely_tokens(signal, self.top_k, self.vocab_size, self.tokens.silenced, student.supervised)
        return LikelyTokens(likely.ids.cpu(), likely.log_probs.cpu())

    def _view(self, prompts: Sequence[list[int]], blocks: Sequence[list[int]]) -> View:
        rows = [torch.tensor([*prompt, *block]) for prompt, block in zip(prompts, blocks, strict=True)]
        ids = pad_sequence(rows, batch_first=True, padding_value=self.tokens.pad)
        places = torch.arange(ids.shape[1])
        lengths = torch.tensor([len(row) for row in rows])[:, None]
        answers = (places >= lengths - torch.tensor([len(block) for block in blocks])[:, None]) & (places < lengths)
        mask = (places < lengths).long()
        return View({"input_ids": ids, "attention_mask": mask}, ids.masked_fill(~answers, -100))


def interleaved(
    trainer: Any, student: Generator[RolloutPrompt], tokens: AnswerTokens, collate: Collate | None
) -> Generator[RolloutPrompt]:
    """Who generates the interleaved rollouts of a trainer whose student answers as `student` does.

    `collate` makes batches of rows as both models read them; without it they read the tokens of prompts. Raises
    UserError where the teacher cannot judge single tokens.
    """
    args, teacher, tokenizer = trainer.args, trainer.teacher, trainer.student_side.tokenizer
    both_here = type(teacher) is LocalTeacher and isinstance(student, LocalGenerator)
    _check(trainer, both_here)
    if both_here:
        assert isinstance(student, LocalGenerator)
        read = partial(_as_teacher_reads, tokenizer, tokens, collate)
        whole = partial(whole_on_every_rank, teacher.model, trainer.accelerator)
        return InterleavedGenerator(student, teacher.model, read, trainer.vocab_size, args.interleaved_top_k, whole)

    def ask(batch: Batch) -> Any:
        return asked(teacher, batch.to(trainer.accelerator.device), trainer.ask_teacher)

    judge, whole = TokenJudge(ask, args.interleaved_top_k, trainer.vocab_size, tokens), nullcontext
    if isinstance(student, LocalGenerator):
        # Blocks go on from tokens that no row holds, and ranks ask for different numbers of blocks.
        whole, student = student.whole, copy(student)
        student.inputs = partial(_tokens_alone, tokenizer)
        student.whole = nullcontext
    return BlockGenerator(student, judge, tokens, args.rollout_batch_size, whole)


def _tokens_alone(tokenizer: Any, prompts: Sequence[RolloutPrompt]) -> Mapping[str, Any]:
    return prompt_inputs(tokenizer, [Prompt(prompt.ids) for prompt in prompts])


def _as_teacher_reads(
    tokenizer: Any, tokens: AnswerTokens, collate: Collate | None, prompts: Sequence[RolloutPrompt]
) -> Mapping[str, Any]:
    """The prompts as a teacher here reads them, which may be others than the student's."""
    if collate is None:
        return prompt_inputs(tokenizer, [Prompt(prompt.of_teachers.get(ONLY, prompt.ids)) for prompt in prompts])
    batch = collate([prompt.example for prompt in prompts])
    theirs = batch.teacher_view()
    starts = [same_place(batch.student, theirs, row, prompt.start) for row, prompt in enumerate(prompts)]
    inputs = prompts_of(theirs, starts, tokens.pad)
    # The student's padding may be a token that the teacher does not know.
    return {**inputs, "input_ids": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, 0)}


def _check(trainer: Any, both_here: bool) -> None:
    args, sharded = trainer.args, is_sharded(trainer.accelerator)
    if not trainer.one_vocabulary:
        raise UserError(
            f"rollouts: interleaved lets the teacher judge each token of the student, and the teacher of method "
            f"{trainer.method} has tokens of its own. Set rollouts: student, or use kd or taid with a teacher of the "
            "student's tokenizer.",
            because="meaning",
        )
    if trainer.student_side.labelling.vision and not both_here:
        raise UserError(
            "rollouts: interleaved goes on with answers about images only where student and the one teacher run in "
            "this process. Set rollouts: student, or remove rollout_server, teacher_server and further teachers.",
            because="not built",
        )
    for part in parts_of(trainer.teacher):
        if isinstance(part, ServerTeacher) and part.k < args.interleaved_top_k:
            raise UserError(
                f"interleaved_top_k is {args.interleaved_top_k}, and the teacher's server is asked for {part.k} "
                f"tokens only. Set teacher_top_k: {args.interleaved_top_k} or more, or lower interleaved_top_k.",
                because="meaning",
            )
        here = not part.served
        if args.rollout_ahead and here:
            raise UserError(
                "rollout_ahead generates while a batch trains, and the teacher that judges interleaved rollouts is in "
                "this process and busy then. Set rollout_ahead: 0, serve the teacher, or set rollouts: student.",
                because="not built",
            )
        if sharded and here and not (both_here and trainer.accelerator.distributed_type == DistributedType.FSDP):
            raise UserError(
                "rollouts: interleaved needs the teacher whole on every rank, where ranks ask it at different times. "
                "Use accelerate_config ddp or zero2, serve the teacher, or set rollouts: student.",
                because="not built",
            )
