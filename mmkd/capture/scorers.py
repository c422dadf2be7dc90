"""Who answers for the teacher while a cache is built: a model in this process, or vLLM servers."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from mmkd.cache.codec import TokenScores
from mmkd.cache.state_codec import TokenStates
from mmkd.generation.generator import Advance
from mmkd.models.load import positions_of
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.signals import DenseSignal
from mmkd.teachers.vllm_client import RowError, ScoreRequest, TopK, VLLMClient

from .scoring import score_labels, score_tokens
from .sequences import PreparedSequences, TokenSequence, UnusableRow

# States that are read with the head at a time.
_STATES = 4096


@dataclass(frozen=True)
class ScoreFormat:
    """What is asked about every supervised token."""

    kind: str
    k: int
    m: int
    vocab_size: int
    boundaries: Bool[np.ndarray, "vocab"] | None = None
    """The tokens that begin a word, where the probability of a word's end is kept."""
    visual_token: int | None = None
    """The id of visual tokens, where their hidden states are kept too."""

    def asked(self, sequence: TokenSequence) -> Bool[np.ndarray, "token"]:
        """The tokens before which a state is wanted: the supervised ones, and those after visual tokens."""
        if self.visual_token is None:
            return sequence.supervised
        asked = sequence.supervised.copy()
        asked[1:] |= sequence.ids[:-1] == self.visual_token
        return asked

    def read(self, signal: DenseSignal, sequences: Sequence[TokenSequence]) -> list[TokenScores] | list[TokenStates]:
        """What is kept of a signal about the asked tokens of several sequences, which stand end to end."""
        if self.kind == "hidden":
            parts = signal.hidden.split([int(self.asked(sequence).sum()) for sequence in sequences])
            return [self._states(*part) for part in zip(parts, sequences, strict=True)]
        if self.kind == "log_probs":
            mask = None if self.boundaries is None else torch.from_numpy(self.boundaries)
            labels = torch.from_numpy(np.concatenate([sequence.ids[sequence.supervised] for sequence in sequences]))
            scores = score_labels(signal, labels.long().to(signal.hidden.device), mask)
        else:
            # From the key, so that a sequence has the same draws whichever batch or machine it is in.
            offsets = [
                np.random.default_rng(int.from_bytes(sequence.key, "little")).random(int(sequence.supervised.sum()))
                for sequence in sequences
            ]
            scores = score_tokens(signal, self.k, self.m, np.concatenate(offsets))
        return scores.split([int(sequence.supervised.sum()) for sequence in sequences])

    def _states(self, hidden: Float[Tensor, "state width"], sequence: TokenSequence) -> TokenStates:
        """The states of one sequence, those of visual tokens that predict nothing supervised behind the others."""
        predicting = torch.from_numpy(sequence.supervised[self.asked(sequence)])
        hidden = hidden.cpu()
        return TokenStates(torch.cat([hidden[predicting], hidden[~predicting]]), int((~predicting).sum()))


Scored = TokenScores | TokenStates | UnusableRow
"""What a scorer answers about a sequence."""


class Scorer(ABC):
    """Scores sequences. What it says of one must not depend on which others it is asked about elsewhere."""

    teacher_seconds: float = 0.0
    """Time spent in the teacher itself."""

    @abstractmethod
    def score(self, sequences: Sequence[TokenSequence], advance: Advance) -> Sequence[Scored]:
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

    def score(self, sequences: Sequence[TokenSequence], advance: Advance) -> Sequence[Scored]:
        answers: list[Scored | None] = [too_long(len(sequence.ids), self.positions) for sequence in sequences]
        fitting = [place for place, answer in enumerate(answers) if answer is None]
        for batch in batches([len(sequences[place].ids) for place in fitting], self.batch_tokens):
            places = [fitting[place] for place in batch]
            asked = [sequences[place] for place in places]
            for place, part in zip(places, self._score_batch(asked), strict=True):
                answers[place] = part
            advance(sum(len(sequence.ids) for sequence in asked))
        return [answer for answer in answers if answer is not None]

    def _score_batch(self, sequences: list[TokenSequence]) -> list[TokenScores] | list[TokenStates]:
        device, visual = self.device, self.score_format.visual_token
        inputs, asked = self.prepared.batch(sequences)
        if visual is not None:
            asked = asked | (inputs["input_ids"][:, :-1] == visual)
        inputs = {name: value.to(device) if hasattr(value, "to") else value for name, value in inputs.items()}
        start = time.perf_counter()
        signal = self.teacher.ask(inputs, asked.to(device))
        self.teacher_seconds += time.perf_counter() - start
        return self.score_format.read(signal, sequences)


class HiddenServerScorer(Scorer):
    """vLLM over HTTP up to the last hidden state, and the teacher's head in this process."""

    def __init__(self, teacher: HiddenServerTeacher, score_format: ScoreFormat):
        self.teacher, self.score_format = teacher.over_tokens(score_format.vocab_size), score_format
        self.device = Accelerator().device
        self.teacher.place(self.device)
        self.teacher.check()

    def score(self, sequences: Sequence[TokenSequence], advance: Advance) -> Sequence[Scored]:
        answers: list[Scored | None] = [None] * len(sequences)
        questions = (question_of(sequence, self.score_format.asked(sequence)) for sequence in sequences)
        replies = self.teacher.client.states(questions, self.teacher.dtype)
        waiting: dict[int, Tensor] = {}
        start = time.perf_counter()
        for place, (sequence, reply) in enumerate(zip(sequences, replies, strict=True)):
            self.teacher_seconds += time.perf_counter() - start
            if isinstance(reply, RowError):
                answers[place] = UnusableRow(reply.reason)
            else:
                waiting[place] = reply
            advance(len(sequence.ids))
            # Not all of a shard, whose states may be larger than the memory.
            if place == len(sequences) - 1 or sum(map(len, waiting.values())) >= _STATES:
                for asked, answer in zip(waiting, self._read(waiting, sequences), strict=True):
                    answers[asked] = answer
                waiting = {}
            start = time.perf_counter()
        # What was just answered is thrown away where the server has other weights by now.
        self.teacher.check_again()
        return [answer for answer in answers if answer is not None]

    def _read(self, waiting: Mapping[int, Tensor], sequences: Sequence[TokenSequence]) -> Sequence[Scored]:
        if not waiting:
            return []
        head = self.teacher.head.trimmed(self.score_format.vocab_size)
        hidden = torch.cat(list(waiting.values()))
        # States that are kept stay as they came; those that are read are wanted as the head is.
        kept = self.score_format.kind == "hidden"
        signal = DenseSignal(hidden if kept else hidden.to(self.device, head.weight.dtype), head)
        return self.score_format.read(signal, [sequences[place] for place in waiting])


class ServerScorer(Scorer):
    """vLLM over HTTP, whose most likely tokens are kept."""

    def __init__(self, client: VLLMClient, score_format: ScoreFormat):
        self.client, self.score_format = client, score_format

    def score(self, sequences: Sequence[TokenSequence], advance: Advance) -> Sequence[Scored]:
        answers: list[Scored] = []
        questions = (question_of(sequence, sequence.supervised) for sequence in sequences)
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


def question_of(sequence: TokenSequence, asked: Bool[np.ndarray, "token"]) -> ScoreRequest:
    """A sequence as a question to a server: its ids, and what it is asked with about images."""
    return ScoreRequest.of(sequence.ids, asked, sequence.served)


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
