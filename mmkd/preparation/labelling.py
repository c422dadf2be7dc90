"""The part of a trainer that turns rows into tokens and labels: trl's, which supervises what the user means."""

import logging
import math
from collections.abc import Iterator, Mapping
from copy import copy
from dataclasses import fields, replace
from itertools import islice
from typing import Any, ClassVar, NamedTuple

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Int
from transformers.trainer_callback import TrainerCallback
from trl.data_utils import get_dataset_column_names, is_conversational, is_conversational_from_value
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling, SFTTrainer
from trl.trainer.utils import global_then_local_main_first

from mmkd.cache.sequence_keys import segments
from mmkd.data.images import UnusableRow, read_row
from mmkd.errors import UserError

from .checks import check_supervision
from .supervision import TokenCounts, supervised_of, teaching
from .template import TemplateReport, look_at
from .truncated import TRUNCATED, Ending, unended
from .turns import Turns, assistant_labels
from .vision_labels import VisionLabels
from .weights import check_all_weights

logger = logging.getLogger(__name__)

SAMPLED = 16
"""Rows that are looked at, at most, where looking costs: each goes through an image processor, or is downloaded."""


class SampledRow(NamedTuple):
    """The tokens of a row as training makes them, before `max_length` cuts images' rows."""

    ids: Int[np.ndarray, "token"]
    supervised: Bool[np.ndarray, "token"]


class LabellingTrainer(SFTTrainer):
    """trl's SFTTrainer; `assistant_only_loss` works with any chat template, and what is left out is counted and said.

    Raises UserError where what the assistant says cannot be told from the rest.
    """

    judges_template: ClassVar[bool] = True
    """Whether a chat template that swallows answers is refused."""

    # transformers types these as unions with None, for trainers that are still without them.
    train_dataset: Any
    processing_class: Any

    def __init__(self, *, args: SFTConfig, train_dataset: Any, **kwargs: Any):
        self._assistant_only = args.assistant_only_loss
        # Split -> what it has, where it is neither a stream nor has images.
        self.token_counts: dict[str, TokenCounts] = {}
        self._sample: tuple[Any, list[SampledRow]] = None, []
        # Split -> what the template makes of it.
        self.template_reports: dict[str, TemplateReport] = {}
        first = next(iter(train_dataset), None) if self._assistant_only else None
        if first is not None and not (is_conversational(first) or is_conversational_from_value(first)):
            raise UserError(
                "assistant_only_loss needs conversations, and the data is plain text. Set "
                "assistant_only_loss: false, or map the data to messages."
            )
        # trl refuses templates that neither mark the assistant's turns nor are known to it, and `Turns` does not.
        args.assistant_only_loss = False
        try:
            super().__init__(args=args, train_dataset=train_dataset, **kwargs)
        finally:
            args.assistant_only_loss = self._assistant_only
        if isinstance(self.data_collator, DataCollatorForVisionLanguageModeling):
            self.data_collator = self.vision_labels = self._vision_labels(self.data_collator)
            evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
            for split, rows in {"train": self.train_dataset, **evaluation}.items():
                if rows is not None:
                    if not self._assistant_only and isinstance(rows, Dataset):
                        check_all_weights(rows, split, self.completion_only_loss)
                    self._look_at(rows, self.processing_class, split)
        self.add_callback(SupervisionNote(self))

    def count_tokens(self) -> TokenCounts | None:
        """What the train data has, images over a sample of its rows; None for a stream."""
        data = self.train_dataset
        if not self._is_vision_dataset or not isinstance(data, Dataset):
            return self.token_counts.get("train")
        sample, args = self.sampled_rows(), self.args
        assert isinstance(args, SFTConfig)
        supervised = [one.supervised for one in sample]
        return TokenCounts.count(supervised, args, of=len(data) if len(sample) < len(data) else None)

    def sampled_rows(self) -> list[SampledRow]:
        """Rows of the train data where reading all of them costs: evenly spread ones with images, or a stream's first.

        Of other data none, and none that training would not take either. They are read once.
        """
        data = self.train_dataset
        if self._sample[0] is not data:
            collator = self.vision_labels if self._is_vision_dataset else None
            self._sample = data, sample_of(data, collator)
        return self._sample[1]

    def settings_given(self, args: SFTConfig) -> SFTConfig:
        """The settings as the user gave them, also while trl's constructor is kept from reading one of them."""
        given = copy(args)
        given.assistant_only_loss = self._assistant_only
        return given

    def _vision_labels(self, collator: DataCollatorForVisionLanguageModeling) -> VisionLabels:
        settings = {one.name: getattr(collator, one.name) for one in fields(collator)}
        turns = self._turns(self.processing_class) if self._assistant_only else None
        return VisionLabels(
            **{
                **settings,
                "chat_template": None if turns is None else turns.template,
                "assistant_only_loss": self._assistant_only,
                "turns": turns,
            }
        )

    def _look_at(self, rows: Any, processing_class: Any, split: str) -> None:
        report = look_at(rows, Turns(processing_class, self.chat_template), split)
        if report.error is not None and self.judges_template:
            raise UserError(report.error)
        self.template_reports[split] = report

    def _turns(self, processing_class: Any) -> Turns:
        """Who finds the assistant's turns; trl's own training template, if any, is used for everything."""
        turns = Turns.of(processing_class)
        self.chat_template = turns.template
        return turns

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        args: Any = self.args
        # trl drops them from rows with images, which its collator and ours read.
        more = (args.dataset_text_field, "tools", "chat_template_kwargs", TRUNCATED) if self._is_vision_dataset else ()
        columns += [name for name in more if name not in columns]

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        rows, alone, cut = dataset, copy(args), copy(args)
        alone.max_length, alone.shuffle_dataset, cut.packing = None, False, packing
        columns = get_dataset_column_names(dataset)
        if self._assistant_only and formatting_func is None and "input_ids" not in columns:
            settings = {
                "turns": self._turns(processing_class),
                "completion_only": self.completion_only_loss,
                "split": dataset_name,
            }
            # A stream is read in one process.
            processes = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
            with global_then_local_main_first():
                rows = rows.map(assistant_labels, with_indices=True, fn_kwargs=settings, **processes)
        elif formatting_func is None and "input_ids" not in columns:
            rows = check_all_weights(rows, dataset_name, self.completion_only_loss)
        self.template_reports[dataset_name] = TemplateReport()
        if formatting_func is None and "input_ids" not in columns:
            self._look_at(dataset, processing_class, dataset_name)
        # Tokens and labels of whole rows, which trl then cuts, packs and shuffles as it would at once.
        labelled = super()._prepare_dataset(rows, processing_class, alone, False, formatting_func, dataset_name)
        if TRUNCATED in columns and formatting_func is None and "input_ids" not in columns:
            first: Any = next(iter(dataset))
            ending = Ending.of(Turns(processing_class, self.chat_template), first, args.eos_token)
            with global_then_local_main_first():
                labelled = labelled.map(
                    unended, with_indices=True, fn_kwargs={"ending": ending, "split": dataset_name}
                )
        if isinstance(labelled, Dataset):
            self.token_counts[dataset_name] = TokenCounts.count(supervised_of(labelled), cut)
            labelled = teaching(labelled, cut, dataset_name)
            check_supervision(dataset, labelled, args.max_length)
        return super()._prepare_dataset(labelled, processing_class, args, packing, None, dataset_name)


class SupervisionNote(TrainerCallback):
    """Says once, when training begins, how much of the data is learnt from."""

    def __init__(self, trainer: LabellingTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says it in the process that speaks for all."""
        counts = self.trainer.count_tokens() if state.is_world_process_zero else None
        if counts is not None:
            # Not a warning, but the level that is shown wherever nobody has set one up.
            logger.warning("Training data: %s", counts)
        report = self.trainer.template_reports.get("train")
        if report is not None and state.is_world_process_zero:
            for warning in (*report.warnings, *filter(None, [report.note])):
                logger.warning(warning)


def sample_of(data: Any, collator: VisionLabels | None, prefix: str = "") -> list[SampledRow]:
    """Up to SAMPLED rows with images as this collator makes them, or of a stream those whose columns have the prefix.

    Of text that is no stream there is no need of a sample: the list is empty.
    """
    stream = not isinstance(data, Dataset)
    if collator is None and not stream:
        return []
    if stream:
        rows = list(islice(data, SAMPLED))
    else:
        rows = [data[row] for row in range(0, len(data), math.ceil(len(data) / SAMPLED))]
    if collator is None:
        return [one for row in rows for one in _labelled(row, prefix)]
    whole = replace(collator, max_length=None)
    return [one for row in rows if (one := _collated(row, whole)) is not None]


def _labelled(row: Mapping[str, Any], prefix: str) -> Iterator[SampledRow]:
    """A row of a stream, or what is packed into it; nothing of one that was not prepared here."""
    names = [f"{prefix}{name}" for name in ("input_ids", "labels")]
    if {*names} <= row.keys():
        ids, labels = (np.asarray(row[name]) for name in names)
        ends = np.cumsum(row.get(f"{prefix}seq_lengths", [len(ids)]))[:-1].tolist()
        for span in segments([0, *ends], len(ids)):
            yield _sampled(ids[span], labels[span])


def _collated(row: Mapping[str, Any], collator: VisionLabels) -> SampledRow | None:
    """A row with images; None for one that training would not take either."""
    example = read_row(row)
    if isinstance(example, UnusableRow):
        return None
    # Image processors say in ways of their own that an image is none for them; training says it, or skips the row.
    try:
        batch = collator([example])
    except Exception:
        return None
    present = batch["attention_mask"][0].bool()
    return _sampled(batch["input_ids"][0][present].numpy(), batch["labels"][0][present].numpy())


def _sampled(ids: Int[np.ndarray, "token"], labels: Int[np.ndarray, "token"]) -> SampledRow:
    supervised = labels != -100
    supervised[:1] = False
    return SampledRow(ids, supervised)
