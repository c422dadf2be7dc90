"""Rows of a run's data as batches of a model, before there is a trainer: what pruning looks at."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import PreTrainedTokenizerBase

from mmkd.data.image_columns import image_column
from mmkd.data.images import UnusableRow, read_row
from mmkd.data.layouts import canonical
from mmkd.data.load_data import load_data
from mmkd.errors import UserError
from mmkd.models.load import tokenizer_of
from mmkd.preparation.prepared_rows import PreparedRows
from mmkd.preparation.prompt_rows import with_open_answers
from mmkd.training.preparing import sequences_of

from .recipe import Run


def calibration_batches(run: Run, processing_class: Any, rows: int, split: str = "train") -> list[dict[str, Any]]:
    """Model inputs with labels: so many rows of a split, spread evenly over it and prepared as for training.

    `processing_class` gets the chat template and the tokens of the recipe. Raises UserError where nothing is left.
    """
    arguments, training = run.arguments, run.training
    dataset = _rows(run)[split]
    count = min(rows, len(dataset))
    chosen = dataset.select([round(i * (len(dataset) - 1) / max(count - 1, 1)) for i in range(count)])
    ready = image_column(canonical(chosen, split))
    if training.answers_everything:
        ready = with_open_answers(ready)
    prepared = PreparedRows.of(training, processing_class, ready, judges_template=False)
    size = training.per_device_train_batch_size
    if prepared.labelling.vision:
        batches = list(_of_images(prepared.train, prepared.collator, size))
    else:
        batches = list(_of_text(prepared.train, tokenizer_of(processing_class), size))
    batches = [batch for batch in batches if bool((batch["labels"][:, 1:] != -100).any())]
    if not batches:
        raise UserError(
            f"None of the {count} rows of {arguments.data} has a supervised token, so that nothing can be measured on "
            "them. Look at them with `mmkd data preview`, or raise prune_calibration_rows."
        )
    return batches


def has_rows(run: Run, split: str) -> bool:
    """Whether the data have rows of a split."""
    return split in _rows(run)


def _rows(run: Run) -> DatasetDict:
    arguments = run.arguments
    train, held_out = arguments.max_train_rows, arguments.max_eval_rows
    return load_data(arguments.data, max_train_rows=train, max_eval_rows=held_out, also=run.columns_read)


def _of_text(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, size: int) -> Iterator[dict[str, Any]]:
    """Sequences of like length together, those of packed rows apart."""
    sequences = sorted(sequences_of(dataset), key=lambda each: len(each.ids))
    pad: Any = tokenizer.pad_token_id or 0
    for start in range(0, len(sequences), size):
        part = sequences[start : start + size]
        longest = len(part[-1].ids)
        ids = torch.full((len(part), longest), pad)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, sequence in enumerate(part):
            own, length = torch.tensor(sequence.ids).long(), len(sequence.ids)
            ids[row, :length], mask[row, :length] = own, 1
            labels[row, :length] = own.where(torch.tensor(sequence.supervised), -100)
        yield {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _of_images(dataset: Dataset, collator: Any, size: int) -> Iterator[dict[str, Any]]:
    examples: list[Mapping[str, Any]] = []
    for row in dataset:
        example: Any = row
        read = read_row(example, collator.image_columns)
        if not isinstance(read, UnusableRow):
            examples.append(read)
    for start in range(0, len(examples), size):
        yield dict(collator([dict(example) for example in examples[start : start + size]]))
