"""Rows as training sees them, for who has no model: a teacher's pass over the data, doctor, a second reading."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from mmkd.data.teacher_view import TeacherView
from mmkd.errors import UserError
from mmkd.models.load import tokenizer_of
from mmkd.seams.trl_seam import clone_template

from .labelling import Labelling
from .supervision import TokenCounts
from .teacher_prompts import TeacherPrompts


@dataclass(frozen=True)
class PreparedRows:
    """Rows as training sees them, prepared without a model."""

    labelling: Labelling
    train: Any
    evaluation: Any
    collator: Any

    @classmethod
    def of(
        cls,
        args: SFTConfig,
        processing_class: Any,
        train: Any,
        evaluation: Any = None,
        judges_template: bool = True,
        view: TeacherView | None = None,
    ) -> "PreparedRows":
        """The rows that a trainer with these arguments would train on.

        With a `view`, text has what a teacher reads of it in columns of its own. Raises UserError for a chat template
        that swallows answers, unless it is not to be judged.
        """
        settle_tokenizer(processing_class, args)
        labelling = Labelling(args, processing_class, train, judges_template)
        splits = {"train": train} if evaluation is None else {"train": train, "eval": evaluation}
        if labelling.vision:
            collator: Any = labelling.vision_labels()
            for split, rows in splits.items():
                labelling.look_at_images(rows, split)
        else:
            free = args.padding_free or (args.packing and args.packing_strategy in ("bfd", "bfd_split"))
            tokenizer: Any = tokenizer_of(processing_class)
            multiple = args.pad_to_multiple_of
            assert not isinstance(multiple, str)
            collator = DataCollatorForLanguageModeling(tokenizer.pad_token_id, free, pad_to_multiple_of=multiple)
            if not skips_preparation(args):
                packs = {
                    "train": args.packing,
                    "eval": args.packing if args.eval_packing is None else args.eval_packing,
                }
                told = None if view is None else TeacherPrompts.of([view], labelling, args)
                prepare = labelling.prepare if told is None else told.beside
                splits = {split: prepare(rows, args, packs[split], None, split) for split, rows in splits.items()}
        return cls(labelling, splits["train"], splits.get("eval"), collator)

    def count_tokens(self) -> TokenCounts | None:
        """What the train data has, images over a sample of its rows; None for a stream."""
        return self.labelling.count_tokens(self.train, self.collator if self.labelling.vision else None)


def settle_tokenizer(processing_class: Any, args: SFTConfig) -> None:
    """Gives a tokenizer or processor the chat template, EOS and padding token of the settings, as trl does.

    Raises UserError for tokens that it does not know.
    """
    tokenizer: Any = tokenizer_of(processing_class)
    if args.eos_token is not None:
        _check_token(tokenizer, "eos_token", args.eos_token)
        tokenizer.eos_token = args.eos_token
    template = args.chat_template_path
    if template is not None and os.path.isfile(template) and template.endswith((".jinja", ".j2")):
        processing_class.chat_template = Path(template).read_text(encoding="utf-8")
    elif template is not None:
        clone_template(processing_class, template)
    pad = args.pad_token or tokenizer.pad_token or tokenizer.eos_token
    _check_token(tokenizer, "pad_token", pad)
    tokenizer.pad_token = pad


def _check_token(tokenizer: Any, key: str, token: str | None) -> None:
    if token not in tokenizer.get_vocab():
        raise UserError(f"{key} is {token!r}, which the tokenizer does not know. Choose one of its special tokens.")


def skips_preparation(args: Any) -> bool:
    """Whether the rows are ready for the collator, whatever they look like."""
    return bool((args.dataset_kwargs or {}).get("skip_prepare_dataset"))
