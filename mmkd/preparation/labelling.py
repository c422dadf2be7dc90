"""The part of training that turns rows into tokens and labels: trl's, which supervises what the user means."""

import logging
from collections.abc import Callable, Mapping
from copy import copy
from typing import Any

from datasets import Dataset
from transformers import ProcessorMixin
from transformers.trainer_callback import TrainerCallback
from trl.data_utils import get_dataset_column_names
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from mmkd.errors import UserError
from mmkd.seams.trl_seam import HookedSFTTrainer, first_process_first, prepare_rows

from .checks import check_layout, check_supervision
from .sampled import SampledRow, sample_of
from .supervision import TokenCounts, supervised_of, teaching
from .template import TemplateReport, look_at
from .truncated import TRUNCATED, Ending, unended
from .turns import Turns, assistant_labels
from .vision_labels import VisionLabels
from .weights import check_all_weights

logger = logging.getLogger(__name__)


class Labelling:
    """How rows become tokens and labels: trl's preparation, where `assistant_only_loss` works with any chat template.

    Args:
        args: the settings, as the user gave them.
        processing_class: the tokenizer or processor, whose chat template is read when rows are prepared.
        train: the rows of training; the first says what kind they are.
        judges_template: whether a chat template that swallows answers is refused.

    Raises UserError for rows that cannot be laid out as the settings ask, and where what the assistant says cannot be
    told from the rest.
    """

    def __init__(self, args: SFTConfig, processing_class: Any, train: Any, judges_template: bool = True):
        row: Mapping[str, Any] = next(iter(train), None) or {}
        self.args, self.processing_class, self.judges_template = copy(args), processing_class, judges_template
        self.assistant_only = args.assistant_only_loss
        self.completion_only = (
            {"prompt", "completion"} <= row.keys() if args.completion_only_loss is None else args.completion_only_loss
        )
        self.vision = not {"image", "images"}.isdisjoint(row)
        self.chat_template: str | None = None
        """trl's training version of the processing class' own template, once rows were prepared by it."""
        # Split -> what it has, where it is neither a stream nor has images.
        self.token_counts: dict[str, TokenCounts] = {}
        # Split -> what the template makes of it.
        self.template_reports: dict[str, TemplateReport] = {}
        self._sample: tuple[Any, list[SampledRow]] = None, []
        check_layout(args, row, self.vision, isinstance(processing_class, ProcessorMixin))

    def prepare(
        self, dataset: Any, args: SFTConfig, packing: bool, formatting_func: Callable[..., str] | None, split: str
    ) -> Any:
        """The rows of a split as tokens and labels; what is left out is counted and said."""
        rows, alone, cut = dataset, copy(args), copy(args)
        alone.max_length, alone.shuffle_dataset, cut.packing = None, False, packing
        columns = get_dataset_column_names(dataset)
        raw = formatting_func is None and "input_ids" not in columns
        if self.assistant_only and raw:
            settings = {"turns": self._turns(), "completion_only": self.completion_only, "split": split}
            # A stream is read in one process.
            processes = {"num_proc": args.dataset_num_proc} if isinstance(dataset, Dataset) else {}
            with first_process_first():
                rows = rows.map(assistant_labels, with_indices=True, fn_kwargs=settings, **processes)
        elif raw:
            rows = check_all_weights(rows, split, self.completion_only)
        self.template_reports[split] = TemplateReport()
        if raw:
            self._look_at(dataset, split)
        # Tokens and labels of whole rows, which trl then cuts, packs and shuffles as it would at once.
        labelled = self._by_trl(rows, alone, False, formatting_func, split)
        if TRUNCATED in columns and raw:
            first: Any = next(iter(dataset))
            ending = Ending.of(Turns(self.processing_class, self.chat_template), first, args.eos_token)
            with first_process_first():
                labelled = labelled.map(unended, with_indices=True, fn_kwargs={"ending": ending, "split": split})
        if isinstance(labelled, Dataset):
            self.token_counts[split] = TokenCounts.count(supervised_of(labelled), cut)
            labelled = teaching(labelled, cut, split)
            check_supervision(dataset, labelled, args.max_length)
        return self._by_trl(labelled, args, packing, None, split)

    def _by_trl(
        self, rows: Any, args: SFTConfig, packing: bool, formatting_func: Callable[..., str] | None, split: str
    ) -> Any:
        args = copy(args)
        # trl refuses templates that neither mark the assistant's turns nor are known to it, and `Turns` does not.
        args.assistant_only_loss = False
        settings = {"chat_template": self.chat_template, "completion_only": self.completion_only}
        return prepare_rows(rows, self.processing_class, args, packing, formatting_func, split, **settings)

    def given(self, args: Any) -> Any:
        """Settings as the user gave them, also while trl's constructor is kept from reading one of them."""
        given = copy(args)
        given.assistant_only_loss = self.assistant_only
        return given

    def vision_labels(self) -> VisionLabels:
        """What makes batches of rows with images."""
        turns, multiple = self._turns() if self.assistant_only else None, self.args.pad_to_multiple_of
        assert not isinstance(multiple, str)
        return VisionLabels(
            processor=self.processing_class,
            max_length=self.args.max_length,
            completion_only_loss=self.completion_only,
            pad_to_multiple_of=multiple,
            dataset_text_field=self.args.dataset_text_field,
            chat_template=None if turns is None else turns.template,
            assistant_only_loss=self.assistant_only,
            turns=turns,
        )

    def look_at_images(self, rows: Any, split: str) -> None:
        """Checks rows with images, which become tokens in the collator only."""
        if not self.assistant_only and isinstance(rows, Dataset):
            check_all_weights(rows, split, self.completion_only)
        self._look_at(rows, split)

    def _look_at(self, rows: Any, split: str) -> None:
        report = look_at(rows, Turns(self.processing_class, self.chat_template), split)
        if report.error is not None and self.judges_template:
            raise UserError(report.error)
        self.template_reports[split] = report

    def _turns(self) -> Turns:
        """Who finds the assistant's turns; trl's own training template, if any, is used for everything."""
        turns = Turns.of(self.processing_class)
        self.chat_template = turns.template
        return turns

    def sampled_rows(self, train: Any, collator: VisionLabels | None) -> list[SampledRow]:
        """Prepared rows where reading all of them costs: evenly spread ones with images, or a stream's first.

        Of other data none, and none that training would not take either. They are read once.
        """
        if self._sample[0] is not train:
            self._sample = train, sample_of(train, collator)
        return self._sample[1]

    def count_tokens(self, train: Any, collator: VisionLabels | None) -> TokenCounts | None:
        """What the prepared train data has, images over a sample of its rows; None for a stream."""
        if not self.vision or not isinstance(train, Dataset):
            return self.token_counts.get("train")
        sample = self.sampled_rows(train, collator)
        of = len(train) if len(sample) < len(train) else None
        return TokenCounts.count([row.supervised for row in sample], self.args, of=of)


class LabellingTrainer(HookedSFTTrainer):
    """trl's SFTTrainer, whose rows `Labelling` prepares.

    Raises UserError where what the assistant says cannot be told from the rest.
    """

    # transformers types these as unions with None, for trainers that are still without them.
    train_dataset: Any
    processing_class: Any

    def __init__(self, *, args: SFTConfig, train_dataset: Any, processing_class: Any, **kwargs: Any):
        self.labelling = Labelling(args, processing_class, train_dataset)
        # trl refuses templates that neither mark the assistant's turns nor are known to it, and `Turns` does not.
        args.assistant_only_loss = False
        try:
            super().__init__(args=args, train_dataset=train_dataset, processing_class=processing_class, **kwargs)
        finally:
            args.assistant_only_loss = self.labelling.assistant_only
        if isinstance(self.data_collator, DataCollatorForVisionLanguageModeling):
            self.data_collator = self.vision_labels = self.labelling.vision_labels()
            evaluation = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
            for split, rows in {"train": self.train_dataset, **evaluation}.items():
                if rows is not None:
                    self.labelling.look_at_images(rows, split)
        self.chat_template = self.labelling.chat_template
        self.add_callback(SupervisionNote(self))

    def count_tokens(self) -> TokenCounts | None:
        """What the train data has, images over a sample of its rows; None for a stream."""
        return self.labelling.count_tokens(self.train_dataset, self._collator_of_images())

    def sampled_rows(self) -> list[SampledRow]:
        """Rows of the train data where reading all of them costs; of other data none."""
        return self.labelling.sampled_rows(self.train_dataset, self._collator_of_images())

    def _collator_of_images(self) -> VisionLabels | None:
        return self.vision_labels if self.labelling.vision else None

    def columns_to_keep(self) -> list[str]:
        """Those that trl drops from rows with images, whose collator reads them."""
        args: Any = self.args
        more = [args.dataset_text_field, "tools", "chat_template_kwargs", TRUNCATED] if self.labelling.vision else []
        return [*super().columns_to_keep(), *more]

    def prepared(self, rows: Any, args: Any, packing: bool, formatting_func: Any, split: str) -> Any:
        """The rows of a split as tokens and labels."""
        return self.labelling.prepare(rows, args, packing, formatting_func, split)


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
        report = self.trainer.labelling.template_reports.get("train")
        if report is not None and state.is_world_process_zero:
            for warning in (*report.warnings, *filter(None, [report.note])):
                logger.warning(warning)
