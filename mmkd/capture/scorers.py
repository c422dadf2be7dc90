"""Who answers for the teacher while a cache is built: a model in this process, or vLLM servers."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Bool
from transformers import PreTrainedModel

from mmkd.cache.codec import TokenScores
from mmkd.generation.generator import Advance
from mmkd.models.load import positions_of
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.vllm_client import RowError, ScoreRequest, TopK, VLLMClient

from .scoring import score_labels, score_tokens
from .sequences import PreparedSequences, TokenSequence, UnusableRow


@dataclass(frozen=True)
class ScoreFormat:
    """What is asked about every supervised token."""

    kind: str
    k: int
    m: int
    vocab_size: int
    boundaries: Bool[np.ndarray, "vocab"] | None = None
    """The tokens that begin a word, where the probability of a word's end is kept."""


class Scorer(ABC):
    """Scores sequences. What it says of one must not depend on which others it is asked about elsewhere."""

    teacher_seconds: float = 0.0
    """Time spent in the teacher itself."""

    @abstractmethod
    def score(self, sequences: Sequence[TokenSequence], advance: Advance) -> list[TokenScores | UnusableRow]:
        """The scores of each sequence's supervised tokens, in the order of the sequences."""


class LocalScorer(Scorer):
    """A model in this process, which reads sequences of like length together."""

    def __init__(
        self, model: PreTrainedModel, prepared: PreparedSequences, score_format: ScoreFormat, batch_tokens: int
    ):
        self.teacher = LocalTeacher(model, score_format.vocab_size)
        self.device = Accelerator().device
        self.teacher.place(self.device)
        self.positions = positions_of(model.config)
        self.prepared, self.score_format, self.batch_tokens = prepared, score_format, batch_tokens

    def score(self, sequences: Sequence[TokenSequence], advance: Advance) -> list[TokenScores | UnusableRow]:
        answers: list[TokenScores | UnusableRow | None] = [
            too_long(len(sequence.ids), self.positions) for sequence in sequences
        ]
        fitting = [place for place, answer in enumerate(answers) if answer is None]
        for batch in batches([len(sequences[place].ids) for place in fitting], self.batch_tokens):
            places = [fitting[place] for place in batch]
            asked = [sequences[place] for place in places]
            scores = self._score_batch(asked)
            parts = scores.split([int(sequence.supervised.sum()) for sequence in asked])
            for place, part in zip(places, parts, strict=True):
                answers[place] = part
            advance(sum(len(sequence.ids) for sequence in asked))
        return [answer for answer in answers if answer is not None]

    def _score_batch(self, sequences: list[TokenSequence]) -> TokenScores:
        device, score_format = self.device, self.score_format
        inputs, supervised = self.prepared.batch(sequences)
        inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in inputs.items()}
        supervised = supervised.to(device)
        start = time.perf_counter()
        signal = self.teacher.ask(inputs, supervised)
        self.teacher_seconds += time.perf_counter() - start
        if score_format.kind == "log_probs":
            boundaries = score_format.boundaries
            mask = None if boundaries is None else torch.from_numpy(boundaries)
            return score_labels(signal, inputs["input_ids"][:, 1:][supervised], mask)
        # From the key, so that a sequence has the same draws whichever batch or machine it is in.
        offsets = [
            np.random.default_rng(int.from_bytes(sequence.key, "little")).random(int(sequence.supervised.sum()))
            for sequence in sequences
        ]
        return score_tokens(signal, score_format.k, score_format.m, np.concatenate(offsets))


class ServerScorer(Scorer):
    """vLLM over HTTP."""

    def __init__(self, client: VLLMClient, score_format: ScoreFormat):
        self.client, self.score_format = client, score_format

    def score(self, sequences: Sequence[TokenSequence], advance: Advance) -> list[TokenScores | UnusableRow]:
        answers: list[TokenScores | UnusableRow] = []
        questions = map(question_of, sequences)
        replies = self.client.score(questions, self.score_format.k, self.score_format.vocab_size)
        start = time.perf_counter()
        for sequence, reply in zip(sequences, replies, strict=True):
            self.teacher_seconds += time.perf_counter() - start
            answers.append(UnusableRow(reply.reason) if isinstance(reply, RowError) else self._scores(reply))
            advance(len(sequence.ids))
            start = time.perf_counter()
        return answers

    def _scores(self, answer: TopK) -> TokenScores:
        if self.score_format.kind == "log_probs":
            return TokenScores.of_labels(answer.label_log_probs)
        nothing = np.zeros((len(answer.ids), 0), dtype=np.int32)
        mass = np.exp(answer.log_probs.astype(np.float64)).sum(-1)
        tail = np.log1p(-np.minimum(mass, 1 - np.finfo(np.float32).eps)).astype(np.float32)
        return TokenScores(answer.ids, answer.log_probs, nothing, tail)


def too_long(tokens: int, positions: int | None) -> UnusableRow | None:
    """Why a teacher made for so many positions cannot read so many tokens; None where it can."""
    if positions is None or tokens <= positions:
        return None
    return UnusableRow(
        f"It has {tokens} tokens, and the teacher is made for {positions} (max_position_embeddings). Lower max_length."
    )


def question_of(sequence: TokenSequence) -> ScoreRequest:
    """A sequence as a question to a server: its ids, and what it is asked with about images."""
    return ScoreRequest.of(sequence.ids, sequence.supervised, sequence.served)


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places of sequences of like length whose padded tokens stay within a budget; the longest come first."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > budget:
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
