"""Interleaved rollouts (speculative knowledge distillation, arXiv:2410.11325): a teacher replaces unlikely tokens.

The student proposes each token. One that is not among the teacher's K most likely is replaced by one that is sampled
from these. With K = the whole vocabulary the answers are the student's own, with K = 1 the teacher's greedy ones.
"""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmkd.models.backbone import base_of
from mmkd.models.load import positions_of
from mmkd.seams.decoding_seam import Decoding

from .generator import Advance, Answer, RowError, Sampling
from .local_generation import LocalGenerator, seed_of, speaking

Asked = TypeVar("Asked")


@dataclass(frozen=True)
class LikelyTokens:
    """The teacher's most likely tokens at some places and their log-probs, the most likely first."""

    ids: Int[Tensor, "place outcome"]
    log_probs: Float[Tensor, "place outcome"]

    def replace(
        self, proposed: Int[Tensor, "place"], temperature: float, draws: torch.Generator
    ) -> tuple[Int[Tensor, "place"], Bool[Tensor, "place"]]:
        """The proposed tokens, those that are not likely replaced by ones sampled from these; and which those are."""
        if temperature:
            # Of all places, so that how many are replaced does not move the numbers of later ones.
            chosen = torch.multinomial((self.log_probs / temperature).softmax(-1), 1, generator=draws)
        else:
            chosen = self.log_probs.argmax(-1, keepdim=True)
        replaced = ~(self.ids == proposed[:, None]).any(-1)
        return torch.where(replaced, self.ids.gather(-1, chosen)[:, 0], proposed), replaced


class InterleavedGenerator(LocalGenerator[Asked]):
    """A student and a teacher in this process, each with a cache and a prompt of its own, token by token.

    Args:
        student: the generator of the student alone, whose settings these are.
        teacher: the model that judges proposals.
        read_by_teacher: what the teacher reads of the prompts of a batch, padded on the left.
        vocab_size: the first tokens, which both know.
        top_k: among how many of the teacher's tokens a proposal must be.
        whole_teacher: entered before the teacher reads anything: there weights that ranks share are whole on each.
    """

    def __init__(
        self,
        student: LocalGenerator[Asked],
        teacher: Any,
        read_by_teacher: Callable[[list[Asked]], Mapping[str, Any]],
        vocab_size: int,
        top_k: int,
        whole_teacher: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ):
        vars(self).update(vars(student))
        self.teacher, self.read_by_teacher, self.whole_teacher = teacher, read_by_teacher, whole_teacher
        self.vocab_size, self.top_k = vocab_size, top_k
        self.limit = positions_of(teacher.config)
        self._draws = torch.Generator()

    def generate(
        self, prompts: Sequence[Asked], sampling: Sampling, samples: int = 1, advance: Advance = lambda tokens: None
    ) -> list[list[Answer] | RowError]:
        # Apart from the student's random numbers, which are then those of answers without a teacher.
        self._draws = torch.Generator(self.teacher.device).manual_seed(seed_of(f"{sampling.seed} replaced"))
        with self.whole_teacher(), speaking(self.teacher):
            return super().generate(prompts, sampling, samples, advance)

    def continued(self, prompts: list[Asked], sampling: Sampling, samples: int) -> list[list[Answer]]:
        """The answers to the prompts of one batch."""
        student, teacher = self._decoding(prompts, sampling, samples)
        width, steps = student.ids.shape[1], []
        alive = torch.ones_like(student.ids[:, 0], dtype=torch.bool)
        with self.autocast():
            while alive.any():
                scores = student.processed(student.logits())
                proposed = (
                    torch.multinomial(scores.softmax(-1), 1)[:, 0] if sampling.temperature else scores.argmax(-1)
                )
                likely = self._likely(teacher.logits())
                tokens, replaced = likely.replace(proposed.to(likely.ids), sampling.temperature, self._draws)
                tokens = tokens.to(proposed)
                steps.append(replaced.to(alive) & alive)
                student.append(torch.where(alive, tokens, self.tokens.pad))
                # The student's padding may be a token that the teacher does not know.
                teacher.append(torch.where(alive, tokens, 0))
                alive &= ~(student.ended() | teacher.ended().to(alive))
        answers = []
        for ids, replaced in zip(student.ids[:, width:].tolist(), torch.stack(steps, 1).tolist(), strict=True):
            answer = self._answer(ids)
            answers.append(dataclasses.replace(answer, replaced=replaced[: len(answer.ids)]))
        return [answers[first : first + samples] for first in range(0, len(answers), samples)]

    def _decoding(self, prompts: list[Asked], sampling: Sampling, samples: int) -> tuple[Decoding, Decoding]:
        ours, device = self.read(prompts), self.teacher.device
        theirs = {
            name: value.to(device) if isinstance(value, Tensor) else value
            for name, value in self.read_by_teacher(prompts).items()
        }
        config = self.configured(sampling, samples, ours["input_ids"].shape[1])
        own = copy.deepcopy(config)
        if self.limit is not None:
            own.max_new_tokens = max(1, min(config.max_new_tokens or 1, self.limit - theirs["input_ids"].shape[1]))
        return Decoding(base_of(self.model), ours, config), Decoding(self.teacher, theirs, own)

    def _likely(self, logits: Float[Tensor, "batch vocab"]) -> LikelyTokens:
        """The teacher's most likely tokens, of those that an answer may hold."""
        logits = logits[:, : self.vocab_size]
        silenced = [token for token in self.tokens.silenced if token < logits.shape[1]]
        logits[:, silenced] = -torch.inf
        top = logits.log_softmax(-1).topk(min(self.top_k, logits.shape[1] - len(silenced)), dim=-1)
        return LikelyTokens(top.indices, top.values)
