"""Teachers of alm, which read in tokens of their own: what each can tell, and how it is fitted to the data."""

from collections.abc import Mapping
from copy import copy
from typing import Any

import numpy as np
from datasets import Dataset
from jaxtyping import Bool

from mmkd.alignment.pieces import set_sha256
from mmkd.errors import UserError
from mmkd.models.backbone import full_head
from mmkd.models.load import tokenizer_of
from mmkd.preparation.labelling import Labelling
from mmkd.preparation.pairs import teacher_sequences
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.server import LabelServerTeacher, ServerTeacher
from mmkd.teachers.signals import LabelSignal
from mmkd.teachers.teacher import DenseTeacher, Teacher
from mmkd.training.preparing import preparation_of
from mmkd.training.teaching import load_teacher

from .alm_config import ALMConfig


def asked(teacher: Teacher) -> Teacher:
    """The teacher as alm asks it: a server that generates tells the log-probs of the text's own tokens alone."""
    return LabelServerTeacher(teacher) if isinstance(teacher, ServerTeacher) else teacher


def check_told(teacher: Teacher, args: ALMConfig) -> None:
    """Raises UserError where a teacher of log-probs does not tell enough for the settings."""
    if isinstance(teacher, CachedTeacher) and teacher.signal_type is LabelSignal:
        _check_cached_log_probs(teacher, args)
    if not isinstance(teacher, ServerTeacher) or not (args.needs_boundaries or args.needs_hidden):
        return
    what = f"chunks: {args.chunks} needs" if args.needs_boundaries else "hidden_weight, uld and mined need"
    otherwise = "or set chunks: all or space" if args.needs_boundaries else "or use a local teacher"
    raise UserError(
        f"{what} more of the teacher than its most likely tokens, which are all that a server that generates tells. "
        f"Serve the teacher's hidden states (teacher_server_signal: hidden), {otherwise}.",
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


def fitted(
    teacher: Any,
    args: ALMConfig,
    reader: Labelling,
    splits: Mapping[str, Any],
    boundaries: Bool[np.ndarray, "vocab"],
) -> Teacher:
    """A teacher over its own tokens, by which `reader` prepared these rows; one that is named or a model is loaded.

    `boundaries` are its tokens that begin a word. Leaves what it is given as it is. Raises UserError for a cache of
    other rows, of other settings, or with the probabilities of another set of tokens.
    """
    tokenizer: Any = tokenizer_of(reader.processing_class)
    if not isinstance(teacher, Teacher):
        model = load_teacher(teacher, args)
        return LocalTeacher(model, min(len(tokenizer), full_head(model).vocab_size))
    if isinstance(teacher, CachedTeacher):
        _check_cache(teacher, reader, splits, boundaries)
        return teacher if teacher.states is None else teacher.over_tokens(len(tokenizer))
    if isinstance(teacher, ServerTeacher | HiddenServerTeacher):
        # Servers are compared with the tokenizer that reads for them.
        teacher = copy(teacher)
        teacher.tokenizer = teacher.tokenizer or tokenizer
        teacher.max_length = teacher.max_length or reader.args.max_length
    if isinstance(teacher, DenseTeacher):
        return teacher.over_tokens(min(len(tokenizer), teacher.vocab_size))
    return asked(teacher)


def _check_cache(
    teacher: CachedTeacher, reader: Labelling, splits: Mapping[str, Any], boundaries: Bool[np.ndarray, "vocab"]
) -> None:
    teacher.check(preparation_of(reader.processing_class, reader.args, reader.chat_template))
    for name, dataset in splits.items():
        if isinstance(dataset, Dataset) and "teacher_input_ids" in dataset.column_names:
            teacher.check_sequences(teacher_sequences(dataset), name)
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
