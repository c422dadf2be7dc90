"""A teacher on disk: what it said about each sequence was written down by `mmkd cache build`."""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Bool, Int
from torch import Tensor

from mmkd.cache.codec import Codec, TokenScores
from mmkd.cache.embedding_codec import EmbeddingCodec
from mmkd.cache.manifest import differences
from mmkd.cache.sequence_keys import image_hash, segments, sequence_key
from mmkd.cache.state_codec import StateCodec, StoredStates
from mmkd.cache.store import Cache
from mmkd.errors import UserError

from .batch import ONLY, Batch, View
from .cached_states import CachedStates
from .signals import DenseSignal, LabelSignal, SparseSignal, TopKSignal
from .teacher import Teacher

logger = logging.getLogger(__name__)

TAILS = ("bucket", "unbiased", "renormalise")

Seen = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""A row of the data -> the row as a teacher reads it."""

SIGNALS: dict[str, type] = {"top_k": TopKSignal, "log_probs": LabelSignal, "hidden": DenseSignal}
"""Kind of a cache -> the signal that it holds."""


CachedSignal = SparseSignal | LabelSignal | DenseSignal
CachedAnswer = TokenScores | StoredStates
"""What a cache holds about one sequence."""


class CachedTeacher(Teacher[CachedSignal]):
    """Answers from a cache, found by the very tokens (and images) that the student sees.

    Args:
        cache: a folder that `mmkd cache build` wrote.
        tail: what stands for the tokens outside of the top-k. bucket: one outcome with the tail's mass, good with any
            divergence. unbiased: the draws from the tail that the cache holds, for the forward KL: its expected
            gradient is that of the whole distribution. renormalise: nothing, the top-k counts as all; as in other
            libraries, and the only one that can be tempered. A cache of hidden states has no tail: it gives the whole
            distribution.

    Raises UserError when the cache is incomplete or damaged, or lacks what `tail` needs.
    """

    def __init__(self, cache: Any, tail: str = "bucket"):
        self.cache = cache if isinstance(cache, Cache) else Cache(cache)
        self.tail, codec = tail, self.cache.codec
        self.states: CachedStates | None = None
        if tail not in TAILS:
            raise UserError(f"teacher_tail is {tail!r}; choose one of {', '.join(TAILS)}.")
        if isinstance(codec, StateCodec):
            if tail != "bucket":
                raise UserError(
                    f"{self.cache.folder} holds hidden states, which give the whole distribution; there is no tail "
                    f"to treat as teacher_tail: {tail} says. Remove teacher_tail.",
                    because="meaning",
                )
            self.signal_type, self.states = DenseSignal, CachedStates(self.cache)
            return
        if isinstance(codec, EmbeddingCodec):
            raise UserError(
                f"{self.cache.folder} holds embeddings of pairs, which say nothing of tokens. It is for method "
                "clip_kd; build a cache of scores for this method.",
                because="meaning",
            )
        if codec.kind == "log_probs":
            self.signal_type, self.can_temper = LabelSignal, False
            return
        if tail == "unbiased" and not codec.m:
            raise UserError(
                f"{self.cache.folder} has no draws from the tail, which teacher_tail: unbiased needs. Use bucket, or "
                "build a cache with cache_tail_draws.",
                because="meaning",
            )
        if tail != "unbiased" and not codec.k:
            raise UserError(
                f"{self.cache.folder} has draws only (top-k of 0): set teacher_tail: unbiased.", because="meaning"
            )
        self.signal_type = TopKSignal if tail == "bucket" else SparseSignal
        self.can_temper = tail == "renormalise"

    @property
    def vocab_size(self) -> int:
        """The tokens its distributions are over."""
        if self.states is not None:
            return self.states.vocab_size
        assert isinstance(self.cache.codec, Codec)
        return len(self.cache.codec.order.ids)

    @property
    def boundaries(self) -> str | None:
        """The sha256 of the set of tokens that begin a word, whose probability the cache has too; None without."""
        return self.cache.manifest.identity["signal"].get("boundaries")

    @property
    def softcap(self) -> float | None:
        """Of the head of a cache of hidden states; None without."""
        return None if self.states is None else self.states.softcap

    @property
    def sees(self) -> bool:
        """Whether a cache of hidden states has those of visual tokens, where its rows have any."""
        if self.states is None:
            return False
        has_images = self.cache.manifest.identity["preparation"]["image_processor"] is not None
        return self.states.codec.visual or not has_images

    def over_tokens(self, vocab_size: int) -> Self:
        """The same teacher over the first tokens only. A cache of hidden states alone can do so."""
        assert self.states is not None
        teacher = copy(self)
        teacher.states = self.states.over_tokens(vocab_size)
        return teacher

    def check(self, preparation: Mapping[str, Any]) -> None:
        """Raises UserError, naming the field, when sequences are prepared in another way than the cached ones."""
        different = differences(preparation, self.cache.manifest.identity["preparation"])
        if different:
            raise UserError(
                f"The cache {self.cache.folder} was built for other sequences than this run trains on: "
                f"{'; '.join(different)}. Set these as in the cache, or build a cache with this recipe.",
                because="meaning",
            )

    def check_sequences(self, sequences: Iterable[tuple[np.ndarray, np.ndarray]], name: str) -> None:
        """Raises UserError when the cache does not know all of these (ids, supervised) pairs."""
        missing = [
            number
            for number, (ids, supervised) in enumerate(sequences)
            if supervised[1:].any() and not self._knows(sequence_key(ids, supervised))
        ]
        if missing:
            raise UserError(
                f"The cache {self.cache.folder} does not know {len(missing):,} sequences of the {name} data, "
                f"the first of them number {missing[0]}: the data differs from what the cache was built on. Build it "
                "again with this recipe."
            )

    def _knows(self, key: bytes) -> bool:
        return self.cache.find(key) is not None or key in self.cache.skipped_keys

    def prepare(self, accelerator: Accelerator) -> None:
        """Says which rows have no answer. Only a head is placed: batches bring the answers with them."""
        manifest = self.cache.manifest
        if self.states is not None:
            self.states.place(accelerator.device)
        if manifest.skipped_rows() and accelerator.is_main_process:
            logger.warning("%s teaches nothing on some rows: %s", self.cache.folder, manifest.skipped_summary())

    def ask(self, inputs: View, supervised: Bool[Tensor, "batch position"]) -> CachedSignal:
        """The answers that the collator put into this view."""
        fields = inputs.targets[ONLY]
        if self.states is not None:
            return self.states.signal(fields, inputs, supervised)
        if self.signal_type is LabelSignal:
            # Of the teacher's tokens, of which `supervised` does not speak.
            return LabelSignal(**{name: tensor.view(torch.float32) for name, tensor in fields.items()})
        # Rows that an evaluation repeats to fill its last batch come last and are not supervised.
        ids, *others = [tensor[: int(supervised.sum())] for tensor in fields.values()]
        assert len(ids) == supervised.sum()
        return self.signal_type(ids, *(tensor.view(torch.float32) for tensor in others))

    def _nothing(self) -> TokenScores:
        codec = self.cache.codec
        assert isinstance(codec, Codec)
        if codec.kind == "log_probs":
            return TokenScores.of_labels(*np.zeros((1 + codec.boundaries, 0), dtype=np.float32))
        ids, draws = (np.zeros((0, width), dtype=np.int32) for width in (codec.k, codec.m))
        return TokenScores(ids, np.zeros((0, codec.k), dtype=np.float32), draws, np.zeros(0, dtype=np.float32))

    def look_up(
        self, ids: Int[np.ndarray, "token"], supervised: Bool[np.ndarray, "token"], images: Sequence[str] = ()
    ) -> CachedAnswer | None:
        """What the cache holds about a sequence, None if the teacher could not read it.

        Raises UserError for a sequence that the cache does not know.
        """
        key = sequence_key(ids, supervised, images)
        if key in self.cache.skipped_keys:
            return None
        place = self.cache.find(key)
        if place is None:
            raise UserError(
                f"The cache {self.cache.folder} does not know a sequence of this batch (first tokens "
                f"{ids[:8].tolist()}): the data or its preparation differs from what the cache was built on. Build it "
                "again with this recipe. `mmkd cache verify` tells whether its files are as they were written."
            )
        return self.cache.scores(place) if self.states is None else self.cache.states(place)

    def tensors(self, answers: Sequence[CachedAnswer]) -> dict[str, Tensor]:
        """The fields of this teacher's signal for the supervised tokens of a batch."""
        if self.states is not None:
            return self.states.tensors([answer for answer in answers if isinstance(answer, StoredStates)])
        scores = [answer for answer in answers if isinstance(answer, TokenScores)] or [self._nothing()]
        if self.signal_type is LabelSignal:
            parts: dict[str, list[Any]] = {"log_probs": [score.log_probs[:, 0] for score in scores]}
            if self.boundaries:
                parts["boundary_log_probs"] = [score.boundary_log_probs for score in scores]
            joined = {name: torch.from_numpy(np.concatenate(part)) for name, part in parts.items()}
            return {name: tensor.float().view(torch.int32) for name, tensor in joined.items()}
        if self.tail == "unbiased":
            outcomes = [_with_draws(score) for score in scores]
        else:
            outcomes = [(score.ids, score.log_probs) for score in scores]
        ids = np.concatenate([ids for ids, _ in outcomes])
        log_probs = torch.from_numpy(np.concatenate([log_probs for _, log_probs in outcomes]))
        if self.tail == "renormalise":
            log_probs = log_probs.log_softmax(-1)
        fields = {"ids": torch.from_numpy(ids), "log_probs": log_probs}
        if self.tail == "bucket":
            fields["tail_log_probs"] = torch.from_numpy(np.concatenate([score.tail_log_probs for score in scores]))
        # As integers, here and above: DeepSpeed turns all floats of a batch into its own, shorter type.
        return {name: tensor if name == "ids" else tensor.float().view(torch.int32) for name, tensor in fields.items()}


def with_targets(
    batch: Batch, examples: Sequence[Mapping[str, Any]], teacher: CachedTeacher, seen: Seen | None = None
) -> Batch:
    """The batch with what a teacher on disk said about it; the collator calls it in the data loader's workers.

    `seen` are rows with images as the teacher saw them, where it does not see what the student does. Nothing is learnt
    from sequences that it could not read when the cache was built with on_error: skip.
    """
    others = {} if seen is None else {ONLY: seen}
    return with_answers_of(batch, examples, {ONLY: teacher}, [{ONLY: teacher}] * len(examples), others)


def with_answers_of(
    batch: Batch,
    examples: Sequence[Mapping[str, Any]],
    caches: Mapping[str, CachedTeacher],
    asked: Sequence[Mapping[str, CachedTeacher]],
    seen: Mapping[str, Seen],
) -> Batch:
    """The batch with what teachers on disk hold about it, in what each of them reads.

    `asked` are by row those of the `caches` that it asks, `seen` by name the rows with images as teachers see them
    that do not see what the student does. Nothing is learnt from sequences that one of a row's teachers could not
    read.
    """
    own = [] if caches.keys() <= seen.keys() else hashed_images(examples)
    looked_up = {
        name: _Sequences.of(
            batch.readings[name].view if name in batch.readings else batch.student,
            hashed_images([seen[name](example) for example in examples]) if name in seen else own,
        )
        for name in caches
    }
    student = _Sequences.of(batch.student, [()] * len(examples))
    labels, scores = batch.student.labels.clone(), dict[str, list[CachedAnswer]]()
    for number, (row, place, span) in enumerate(student.spans):
        if not student.asked(number)[1].any():
            continue
        # Rows end to end are the sequences of one row; packed rows all ask the same teachers.
        teachers = asked[row if len(labels) == len(asked) else min(place, len(asked) - 1)]
        answers = {name: teacher.look_up(*looked_up[name].asked(number)) for name, teacher in teachers.items()}
        if any(answer is None for answer in answers.values()):
            labels[row, span] = -100
            continue
        for name, answer in answers.items():
            assert answer is not None
            scores.setdefault(name, []).append(answer)
    targets = {name: cache.tensors(scores.get(name, [])) for name, cache in caches.items()}
    # Nobody computes anything of what these would read; positions tell where its sequences begin.
    apart = {
        name: replace(
            reading,
            view=replace(
                reading.view,
                inputs={key: value for key, value in reading.view.inputs.items() if key == "position_ids"},
                targets={name: targets.pop(name)},
            ),
        )
        for name, reading in batch.readings.items()
        if name in caches
    }
    view = replace(batch.student, labels=labels, targets=targets)
    return replace(batch, student=view, readings={**batch.readings, **apart})


@dataclass(frozen=True)
class _Sequences:
    """The sequences of a view, as a cache is asked about them."""

    ids: Int[np.ndarray, "batch position"]
    supervised: Bool[np.ndarray, "batch position"]
    spans: list[tuple[int, int, slice]]
    """Row, number within the row, and tokens of each."""
    images: Sequence[Sequence[str]]
    """Hashes by row."""

    @classmethod
    def of(cls, view: View, images: Sequence[Sequence[str]]) -> Self:
        ids = view.inputs["input_ids"].numpy()
        spans = [
            (row, place, span) for row in range(len(ids)) for place, span in enumerate(spans_of_row(view.inputs, row))
        ]
        return cls(ids, view.labels.numpy() != -100, spans, images)

    def asked(self, number: int) -> tuple[np.ndarray, np.ndarray, Sequence[str]]:
        """The tokens of a sequence, which of them are supervised, and the hashes of its images."""
        row, _, span = self.spans[number]
        supervised = self.supervised[row, span].copy()
        supervised[:1] = False
        return self.ids[row, span], supervised, self.images[row]


def hashed_images(examples: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """The hashes of the images of each raw row."""
    return [[image_hash(image) for image in images_of(example)] for example in examples]


def images_of(example: Mapping[str, Any]) -> list[Any]:
    """The images of a raw row in TRL's columns."""
    if "image" in example:
        return [example["image"]]
    return list(example.get("images") or [])


def spans_of_row(inputs: Mapping[str, Any], row: int) -> Iterable[slice]:
    """The sequences of a row of a view: what lies between restarts of the positions, or all that is no padding."""
    if "position_ids" in inputs:
        positions = inputs["position_ids"][row].numpy()
        return segments(np.flatnonzero(positions == 0).tolist(), len(positions))
    present = np.flatnonzero(inputs["attention_mask"][row].numpy())
    return [slice(int(present[0]), int(present[-1]) + 1)] if len(present) else []


def _with_draws(scores: TokenScores) -> tuple[np.ndarray, np.ndarray]:
    """Top-k and draws as outcomes; equal draws, which stand side by side, are counted in the first of them."""
    draws = scores.draws
    first = np.ones(draws.shape, dtype=bool)
    first[:, 1:] = draws[:, 1:] != draws[:, :-1]
    run = np.cumsum(first, axis=1) - 1
    offset = np.arange(len(draws))[:, None] * draws.shape[1]
    counts = np.bincount((run + offset).ravel(), minlength=draws.size).reshape(draws.shape)
    with np.errstate(divide="ignore"):
        shares = np.where(first, np.log(np.take_along_axis(counts, run, axis=1)), -np.inf)
    weights = scores.tail_log_probs[:, None] - math.log(draws.shape[1]) + shares
    if not scores.ids.shape[1]:
        # What was drawn most often stands for the most likely token.
        order = np.argsort(-weights, axis=1, kind="stable")
        draws, weights = np.take_along_axis(draws, order, axis=1), np.take_along_axis(weights, order, axis=1)
    return (
        np.concatenate([scores.ids, draws], axis=1),
        np.concatenate([scores.log_probs, weights.astype(np.float32)], axis=1),
    )
