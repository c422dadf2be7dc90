"""Teachers of alm, which read in tokens of their own: what each can tell, and how it is fitted to the data."""

from collections.abc import Iterable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Bool, Int
from torch import Tensor, nn

from mmkd.alignment.nearest_tokens import nearest_tokens
from mmkd.alignment.pieces import boundary_mask, set_sha256
from mmkd.alignment.spans import Aligner
from mmkd.errors import UserError
from mmkd.losses.chunks import chunk_log_probs
from mmkd.losses.likelihood import token_log_probs
from mmkd.models.backbone import base_of, full_head
from mmkd.models.load import tokenizer_of
from mmkd.preparation.aligned_sides import AlignedSide
from mmkd.preparation.labelling import Labelling
from mmkd.preparation.pairs import teacher_sequences
from mmkd.teachers.batch import Reading, View
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.server import LabelServerTeacher, ServerTeacher
from mmkd.teachers.signals import ChunkSignal, DenseSignal, LabelSignal
from mmkd.teachers.teacher import DenseTeacher, Teacher
from mmkd.training.teaching import load_teacher

from .alm_config import ALMConfig
from .alm_readings import TeacherReader

PROJECTION = "alm_projection"


def asked(teacher: Teacher) -> Teacher:
    """The teacher as alm asks it: a server that generates tells the log-probs of the text's own tokens alone."""
    return LabelServerTeacher(teacher) if isinstance(teacher, ServerTeacher) else teacher


def check_told(teacher: Teacher, args: ALMConfig) -> None:
    """Raises UserError where a teacher of log-probs does not tell enough for the settings."""
    if isinstance(teacher, CachedTeacher) and teacher.signal_type is LabelSignal:
        _check_cached_log_probs(teacher, args)
    if isinstance(teacher, ServerTeacher) and args.needs_boundaries:
        raise UserError(
            f"chunks: {args.chunks} needs more of the teacher than its most likely tokens, and a server of text tells "
            "no more. Serve the teacher's hidden states (teacher_server_signal: hidden), or set chunks: all or "
            "space.",
            because="upstream",
        )
    if isinstance(teacher, ServerTeacher) and args.needs_hidden:
        raise UserError(
            "hidden_weight and the baselines uld and mined need the teacher's hidden states, and a server that "
            "generates tells its most likely tokens only. Serve the hidden states (teacher_server_signal: hidden), or "
            "use a local teacher.",
            because="upstream",
        )


def _check_cached_log_probs(teacher: CachedTeacher, args: ALMConfig) -> None:
    if args.needs_boundaries and teacher.boundaries is None:
        raise UserError(
            f"chunks: {args.chunks} needs the teacher's probability of a word's end, and the cache "
            f"{teacher.cache.folder} holds those of the text's own tokens only. Build it again with this recipe in "
            "another folder, which keeps both, or set chunks: all or space.",
            because="meaning",
        )
    if args.needs_hidden:
        raise UserError(
            "hidden_weight and the baselines uld and mined need the teacher's hidden states, which a cache of "
            "log-probs has not. Build one with cache_signal: hidden, or remove teacher_cache.",
            because="meaning",
        )


@dataclass(frozen=True)
class PairedTeacher:
    """A teacher over its own tokens, with what follows from its tokenizer."""

    name: str
    teacher: Teacher[Any]
    aligner: Aligner
    boundaries: Bool[Tensor, "vocab"]
    """Its tokens that begin a word."""
    nearest: Int[Tensor, "vocab"] | None
    """The token of the student that is paired with each of its own, for the baseline mined."""
    projection: str
    """The student's module that maps hidden states to its width, where these are compared."""

    @property
    def saved_as(self) -> str:
        """The name of its projection's weights in their file."""
        return self.projection if self.name else "weight"

    def read(self, reading: Reading, asked: View, args: ALMConfig) -> ChunkSignal:
        """How likely it finds each chunk of a batch; `asked` is the view, without rows that need not be read."""
        alignment = reading.alignment
        assert alignment is not None
        signal = self.teacher.ask(asked, asked.supervised)
        if isinstance(signal, LabelSignal):
            log_probs, boundary = signal.log_probs, signal.boundary_log_probs
        else:
            assert isinstance(signal, DenseSignal)
            boundaries = self.boundaries if args.needs_boundaries else None
            labels = asked.labels[:, 1:][asked.supervised]
            with torch.no_grad():
                log_probs, boundary = token_log_probs(
                    signal.hidden, signal.head, labels, boundaries, chunk_size=args.chunk_size
                )
        return ChunkSignal(
            chunk_log_probs(log_probs, alignment.teacher_chunk, len(alignment)),
            alignment,
            None if boundary is None else after(boundary, alignment.teacher_next),
            signal if isinstance(signal, DenseSignal) and args.needs_hidden else None,
            self.name,
        )


def projection_of(number: int, name: str) -> str:
    """The student's module with the projection for a teacher, one of several if it has a name."""
    return f"{PROJECTION}_{number}" if name else PROJECTION


def add_projections(student: Any, teachers: Iterable[PairedTeacher], device: torch.device, wrapped: bool) -> None:
    """Gives a student the projections of its hidden states. Raises UserError where FSDP or DeepSpeed wraps it."""
    if wrapped:
        raise UserError(
            "hidden_weight learns a projection, which FSDP and DeepSpeed do not know. Set it to 0.",
            because="not built",
        )
    for paired in teachers:
        widths = full_head(student).weight.shape[1], width_of(paired.teacher)
        # A part of the student, so that optimizer and ranks treat it like all others; files keep it apart.
        base_of(student).add_module(paired.projection, nn.Linear(*widths, bias=False, device=device))


def after(boundary: Tensor, following: Int[Tensor, "chunk"]) -> Tensor:
    """The log-prob of a boundary after each chunk: that of the place of the following token, certain without one."""
    if not len(boundary):
        return boundary.new_zeros(len(following))
    return boundary[following.clamp(min=0)].where(following >= 0, 0)


def fitted(
    teacher: Any,
    args: ALMConfig,
    reader: TeacherReader,
    splits: Mapping[str, Any],
    column: str | None,
    place: tuple[str, str, torch.device],
) -> PairedTeacher:
    """A teacher over its own tokens, for which `reader` prepared these rows; one that is named or a model is loaded.

    `column` names the teacher of each row, where not all teach all; `place` are its name, that of its projection, and
    the device. Leaves what it is given as it is. Raises UserError for a cache of other rows, of other settings, or
    with the probabilities of another set of tokens.
    """
    assert reader.aligner is not None
    aligner = reader.aligner.aligner
    boundaries = boundary_mask(aligner.teacher)
    name, projection, device = place
    if isinstance(teacher, CachedTeacher):
        _check_cache(teacher, reader, splits, None if column is None else (column, name), boundaries)
    nearest = None
    if args.objective == "mined":
        ours, theirs = ([side[index] for index in range(len(side))] for side in (aligner.student, aligner.teacher))
        nearest = torch.from_numpy(nearest_tokens(ours, theirs)).to(device)
    whole = _over_own_tokens(teacher, args, reader.rows.labelling)
    return PairedTeacher(name, whole, aligner, torch.from_numpy(boundaries).to(device), nearest, projection)


def _over_own_tokens(teacher: Any, args: ALMConfig, reader: Labelling) -> Teacher[Any]:
    tokenizer: Any = tokenizer_of(reader.processing_class)
    if not isinstance(teacher, Teacher):
        model = load_teacher(teacher, args)
        return LocalTeacher(model, min(len(tokenizer), full_head(model).vocab_size))
    if isinstance(teacher, CachedTeacher):
        return teacher if teacher.states is None else teacher.over_tokens(len(tokenizer))
    if isinstance(teacher, ServerTeacher | HiddenServerTeacher):
        # Servers are compared with the tokenizer that reads for them.
        teacher = copy(teacher)
        teacher.tokenizer = teacher.tokenizer or tokenizer
        teacher.max_length = teacher.max_length or reader.args.max_length
    if isinstance(teacher, DenseTeacher):
        return teacher.over_tokens(min(len(tokenizer), teacher.vocab_size))
    return asked(teacher)


def aligned_sides(
    teachers: Mapping[str, PairedTeacher], readers: Mapping[str, TeacherReader]
) -> dict[str, AlignedSide]:
    """What each teacher makes of a batch; teachers in this process that read alike have one side between them."""
    sides: dict[str, AlignedSide] = {}
    shared: dict[str, AlignedSide] = {}
    for name, paired in teachers.items():
        reader, teacher = readers[name], paired.teacher
        assert reader.aligner is not None
        cached = teacher if isinstance(teacher, CachedTeacher) else None
        side = AlignedSide(reader.rows.collator, reader.aligner, cached, teacher.served, reader.prefix)
        sides[name] = side if cached is not None or teacher.served else shared.setdefault(reader.prefix, side)
    return sides


def _check_cache(
    teacher: CachedTeacher,
    reader: TeacherReader,
    splits: Mapping[str, Any],
    own: tuple[str, str] | None,
    boundaries: Bool[np.ndarray, "vocab"],
) -> None:
    teacher.check(reader.facts)
    for name, dataset in splits.items():
        if isinstance(dataset, Dataset) and f"{reader.prefix}input_ids" in dataset.column_names:
            teacher.check_sequences(teacher_sequences(dataset, reader.prefix, own), name)
    if teacher.boundaries not in (None, set_sha256(boundaries)):
        raise UserError(
            f"The cache {teacher.cache.folder} holds the probability of the end of a word for another set of tokens "
            "than those that begin a word of this teacher's. Build it again with this recipe in another folder."
        )


def width_of(teacher: Teacher) -> int:
    """The size of a teacher's hidden states."""
    if isinstance(teacher, CachedTeacher):
        assert teacher.states is not None
        return teacher.states.codec.width
    assert isinstance(teacher, DenseTeacher)
    return teacher.nothing().hidden.shape[1]
