"""Rows of text whose answers a teacher reads behind another prompt: made tokens for it beside the student's.

The teacher reads the very tokens of the student's answers; only what stands before them is its own.
"""

import hashlib
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
from datasets import Dataset, IterableDataset
from jaxtyping import Int
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_config import SFTConfig

from mmkd.data.left_out import LeftOut
from mmkd.data.teacher_view import TeacherView
from mmkd.errors import UserError
from mmkd.models.load import tokenizer_of
from mmkd.seams.trl_seam import first_process_first

from .labelling import Labelling
from .paired_streams import packed_stream, paired_stream
from .pairs import TEACHER, numbered, packed, paired

logger = logging.getLogger(__name__)

_OTHERWISE = "mmkd_otherwise"
_LOOKED_AT = 64
"""Rows of a stream in which the two ways to write an answer are compared before training."""

Tokens = tuple[Int[np.ndarray, "token"], Int[np.ndarray, "token"]]
"""Ids and labels of a row."""
Read = Callable[[Any], Any]
"""Rows -> these as tokens and labels."""


def prefixes_of(views: Mapping[str, TeacherView]) -> dict[str, str]:
    """What begins the names of the columns that each teacher reads, by its name; equal views share them."""
    distinct = list(dict.fromkeys(views.values()))
    return {name: _prefix(distinct.index(view)) for name, view in views.items()}


def _prefix(number: int) -> str:
    return f"{TEACHER}{number}_" if number else TEACHER


@dataclass(frozen=True)
class TeacherPrompts:
    """Makes rows tokens for the student and, in columns of their own, for teachers with other prompts.

    Args:
        views: those of the teachers; equal ones are read once.
        labelling: makes rows tokens.
        dropout: the share of rows for which teachers read the student's prompt.
        longest: tokens of a teacher's longest row; rows that are longer are left out and counted. None: any number.
        rollout: tokens of an answer that the student may give itself, for which a teacher's row needs room too.
        kept: columns of the data that the rows keep.
    """

    views: Sequence[TeacherView]
    labelling: Labelling
    dropout: float = 0.0
    longest: int | None = None
    rollout: int = 0
    kept: Sequence[str] = ()

    @classmethod
    def of(cls, views: Iterable[TeacherView], labelling: Labelling, args: Any, kept: Sequence[str] = ()) -> Self:
        """By the settings of a training."""
        longest, rollout = args.teacher_max_length, args.longest_rollout
        return cls(list(views), labelling, args.privileged_dropout, longest, rollout, kept)

    def beside(
        self, rows: Any, args: SFTConfig, packing: bool, formatting_func: Callable[..., str] | None, split: str
    ) -> Any:
        """The rows of a split as all sides read them, cut and packed by the student's tokens.

        Raises UserError for rows on which a view has no meaning.
        """
        columns = get_dataset_column_names(rows)
        if f"{TEACHER}input_ids" in columns:
            return rows
        self._check(rows, columns, args, packing, split)
        alone = copy(args)
        alone.shuffle_dataset = False
        settings = {"args": alone, "packing": False, "formatting_func": formatting_func, "split": split}
        ours = partial(self.labelling.prepare, **settings)
        whole = copy(alone)
        # The student's answer decides where the teacher's row ends.
        whole.max_length = None
        plain = formatting_func is not None or {"messages", "prompt"}.isdisjoint(columns)
        theirs = {
            _prefix(number): self._reader(view, whole, plain, f"{split} (teacher's)")
            for number, view in enumerate(dict.fromkeys(self.views))
        }
        how = {"prefixes": list(theirs), "plain": plain, "dropout": self.dropout, "seed": args.seed}
        how |= {"max_length": args.max_length, "keeps_end": args.truncation_mode == "keep_end"}
        if isinstance(rows, Dataset):
            told = self._spliced(self._paired(rows, ours, theirs), how, split)
        else:
            told = self._stream(paired_stream(rows, {"": ours, **theirs}, self._carried(columns)), how, split)
        if args.shuffle_dataset:
            told = told.shuffle(seed=args.seed)
        if not packing:
            return told
        told = packed(told, args) if isinstance(told, Dataset) else packed_stream(told, args)
        # As trl does, before and after.
        return told.shuffle(seed=args.seed) if args.shuffle_dataset else told

    def _check(self, rows: Any, columns: Sequence[str], args: SFTConfig, packing: bool, split: str) -> None:
        for view in self.views:
            view.check(columns, split)
            if view.images_column is not None:
                raise UserError(
                    f"teacher_view.images_column is {view.images_column!r}, and the student reads no images, so that "
                    "its rows are text. Give the rows a column `images`, empty where the student sees none.",
                    because="not built",
                )
        if "input_ids" in columns:
            raise UserError(
                f"The {split} data is tokenised for the student already, so that teacher_view cannot give the teacher "
                "another prompt. Pass its text.",
                because="meaning",
            )
        if packing and args.packing_strategy != "bfd":
            raise UserError(
                f"packing_strategy: {args.packing_strategy} makes sequences that begin within a row, where there is "
                "no prompt that the teacher could read otherwise. Set packing_strategy: bfd, or packing: false.",
                because="meaning",
            )
        learns_prompt = "messages" in columns and not self.labelling.assistant_only
        learns_prompt |= "prompt" in columns and not (self.labelling.completion_only or self.labelling.assistant_only)
        if learns_prompt:
            advice = "completion_only_loss: true" if "prompt" in columns else "assistant_only_loss: true"
            raise UserError(
                "The student learns from the tokens of its prompts too, and with teacher_view the teacher reads "
                f"others. Set {advice}.",
                because="meaning",
            )

    def _reader(self, view: TeacherView, args: SFTConfig, plain: bool, split: str) -> Read:
        """What makes tokens of rows as the teacher reads them; of plain text, of what stands before it."""
        prepare = partial(self.labelling.prepare, args=args, packing=False, formatting_func=None, split=split)
        settings = {"view": view, "tokenizer": tokenizer_of(self.labelling.processing_class)}

        def read(rows: Any) -> Any:
            if not isinstance(rows, Dataset):
                return rows.map(_prefix_tokens, fn_kwargs=settings) if plain else prepare(rows.map(view.rewrite))
            with first_process_first():
                told = (
                    rows.map(_prefix_tokens, fn_kwargs=settings)
                    if plain
                    else rows.map(view.rewrite, features=rows.features)
                )
            return told if plain else prepare(told)

        return read

    def _paired(self, rows: Dataset, ours: Read, theirs: Mapping[str, Read]) -> Dataset:
        known = numbered(rows)
        sides = {prefix: read(known) for prefix, read in theirs.items()}
        return paired(ours(known), sides, {name: rows[name][:] for name in self._carried(rows.column_names)})

    def _carried(self, columns: Sequence[str]) -> list[str]:
        return [name for name in self.kept if name in columns]

    def _spliced(self, rows: Dataset, how: Mapping[str, Any], split: str) -> Dataset:
        with first_process_first():
            told = rows.map(_splice, fn_kwargs=dict(how))
        otherwise = int(np.sum(told.with_format("numpy")[_OTHERWISE][:]))
        _say_otherwise(otherwise, len(told), split)
        told = told.remove_columns(_OTHERWISE)
        if self.longest is None:
            return told
        is_short, left_out = _Short(self.longest, self.rollout, how["prefixes"]), LeftOut(split)
        kept = [row for row, tokens in enumerate(told) if is_short(tokens)]  # pyright: ignore[reportArgumentType]
        for row in {*range(len(told))} - {*kept}:
            left_out.add(row, is_short.reason)
        left_out.warn(len(told))
        if not kept:
            raise UserError(
                f"The teacher's prompt and answer are longer than teacher_max_length {self.longest} in all "
                f"{len(told)} {split} rows. Raise teacher_max_length, or shorten teacher_view."
            )
        return told.select(kept) if len(kept) < len(told) else told

    def _stream(self, rows: IterableDataset, how: Mapping[str, Any], split: str) -> IterableDataset:
        told = rows.map(_splice, fn_kwargs=dict(how))
        first = list(told.take(_LOOKED_AT))
        _say_otherwise(sum(row[_OTHERWISE] for row in first), len(first), f"{split} (its first rows)")
        told = told.map(dict, remove_columns=[_OTHERWISE])
        return (
            told if self.longest is None else told.filter(_Short(self.longest, self.rollout, how["prefixes"], split))
        )


def _splice(
    row: Mapping[str, Any],
    prefixes: Sequence[str],
    plain: bool,
    dropout: float,
    seed: int,
    max_length: int | None,
    keeps_end: bool,
) -> dict[str, Any]:
    student: Tokens = np.asarray(row["input_ids"]), np.asarray(row["labels"])
    told: dict[str, Any] = {_OTHERWISE: False}
    dropped = dropout > 0 and _share_of(student[0], seed) < dropout
    for prefix in prefixes:
        teacher: Tokens = np.asarray(row[f"{prefix}input_ids"]), np.asarray(row[f"{prefix}labels"])
        if dropped:
            ids, labels, otherwise = *student, False
        elif plain:
            ids, labels, otherwise = *_after(teacher[0], *student), False
        else:
            ids, labels, otherwise = spliced(student, teacher, max_length, keeps_end)
        told |= {f"{prefix}input_ids": ids.tolist(), f"{prefix}labels": labels.tolist()}
        told[_OTHERWISE] |= otherwise
    return told


def spliced(
    student: Tokens, teacher: Tokens, max_length: int | None, keeps_end: bool
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The teacher's row with the student's answers in the place of its own, and whether these were others.

    `student` is cut to max_length at its end, or with `keeps_end` at its start; `teacher` is whole. Raises UserError
    where the two have not the same number of answers.
    """
    ids, labels = student
    ours, theirs = answers_in(labels), answers_in(teacher[1])
    is_cut = max_length is not None and len(ids) >= max_length
    if len(theirs) < len(ours) or (len(theirs) > len(ours) and not is_cut):
        raise UserError(
            f"A row has {len(ours)} answers for the student and {len(theirs)} behind the teacher's prompt: the chat "
            f"template marks them otherwise there. The student reads {ids.tolist()[:40]}, the teacher "
            f"{teacher[0].tolist()[:40]} (first tokens)."
        )
    from_end = keeps_end and is_cut
    first = len(theirs) - len(ours) if from_end else 0
    # What the student lost before its first answer, the teacher still reads.
    parts, marks, place = (
        [teacher[0][: theirs[first].start]],
        [np.full(theirs[first].start, -100)],
        theirs[first].start,
    )
    otherwise = False
    for number, (own, other) in enumerate(zip(ours, theirs[first:], strict=False)):
        parts.append(teacher[0][place : other.start])
        marks.append(np.full(other.start - place, -100))
        answer, answer_labels = ids[own], labels[own].copy()
        if own.start == 0:
            # Nothing predicts a row's first token.
            answer_labels[0] = -100
        whole, lost = teacher[0][other], (other.stop - other.start) - (own.stop - own.start)
        if from_end and number == 0 and own.start == 0 and lost > 0 and np.array_equal(whole[lost:], answer):
            answer, answer_labels = whole, np.concatenate([np.full(lost, -100), answer_labels])
        ends_cut = is_cut and own.stop == len(ids)
        otherwise |= not np.array_equal(whole[: len(answer)] if ends_cut else whole, answer)
        parts.append(answer)
        marks.append(answer_labels)
        place = other.stop
    end = ours[-1].stop if ours else 0
    parts.append(ids[end:])
    marks.append(np.full(len(ids) - end, -100))
    return np.concatenate(parts), np.concatenate(marks), otherwise


def answers_in(labels: Int[np.ndarray, "token"]) -> list[slice]:
    """The runs of labelled tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], labels != -100, [False]]).astype(np.int8)))
    return [slice(start, stop) for start, stop in edges.reshape(-1, 2).tolist()]


def needed_tokens(labels: Int[np.ndarray, "token"], rollout: int) -> int:
    """The tokens of a row whose last answer may be one of the student's with so many tokens."""
    answers = answers_in(labels) if rollout else []
    return max(len(labels), answers[-1].start + rollout if answers else 0)


def _after(
    before: Int[np.ndarray, "token"], ids: Int[np.ndarray, "token"], labels: Int[np.ndarray, "token"]
) -> tuple[np.ndarray, np.ndarray]:
    """A plain text after what stands before it."""
    twice = int(len(before) > 0 and len(ids) > 0 and before[0] == ids[0] and labels[0] == -100)
    labels = labels.copy()
    labels[:1] = -100
    silent = np.full(len(before), -100)
    return np.concatenate([before, ids[twice:]]), np.concatenate([silent, labels[twice:]])


def _prefix_tokens(row: Mapping[str, Any], view: TeacherView, tokenizer: Any) -> dict[str, list[int]]:
    ids = tokenizer(view.prefix(row))["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return {"input_ids": ids, "labels": [-100] * len(ids)}


def _share_of(ids: Int[np.ndarray, "token"], seed: int) -> float:
    """A number from 0 to 1 that follows from a row and the seed, and is spread evenly over rows."""
    digest = hashlib.blake2b(np.ascontiguousarray(ids, dtype=np.int64).tobytes(), digest_size=8, salt=_salt(seed))
    return int.from_bytes(digest.digest(), "little") / 2**64


def _salt(seed: int) -> bytes:
    return int(seed).to_bytes(8, "little")


def _say_otherwise(rows: int, of: int, split: str) -> None:
    if rows:
        logger.warning(
            f"{split}: in {rows} of {of} rows the chat template, or a token across the end of the prompt, would write "
            "the answer in other tokens behind the teacher's prompt. The teacher reads the student's tokens there."
        )


class _Short:
    """Whether what teachers read of a row is short enough. Of a stream's `split` the first that is not is said."""

    def __init__(self, longest: int, rollout: int, prefixes: Sequence[str], split: str | None = None) -> None:
        self.longest, self.rollout, self.prefixes, self.split = longest, rollout, prefixes, split
        self.reason = f"whose teacher's prompt and answer are longer than teacher_max_length {longest}"

    def __call__(self, row: Mapping[str, Any]) -> bool:
        short = all(self._tokens(row[f"{prefix}labels"]) <= self.longest for prefix in self.prefixes)
        if not short and self.split is not None:
            logger.warning(f"{self.split}: rows {self.reason} are left out of the stream.")
            self.split = None
        return short

    def _tokens(self, labels: Sequence[int]) -> int:
        """How many there may be: those of the row, or of its prompt with an answer of the student's own."""
        return needed_tokens(np.asarray(labels), self.rollout)
