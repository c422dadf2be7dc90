"""What the student will see: how rows become sequences, as facts to compare and as the sequences themselves."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from trl.trainer.sft_config import SFTConfig

from mmkd.cache.sequence_keys import segments
from mmkd.data.teacher_view import TeacherView
from mmkd.models.load import tokenizer_of
from mmkd.preparation.row_views import RowView

_READ = 1000


def preparation_of(
    processing_class: PreTrainedTokenizerBase | ProcessorMixin,
    args: SFTConfig,
    template: str | None = None,
    view: TeacherView | None = None,
) -> dict[str, Any]:
    """Everything besides the data that decides the token ids and masks of a run; long values as sha256.

    `template` is the chat template in use when it is not that of the processing class, `view` that of a teacher that
    does not read what the student reads.
    """
    image_processor = getattr(processing_class, "image_processor", None)
    settings: Any = args
    told = view and RowView(view, settings.privileged_dropout, settings.seed, settings.teacher_max_length)
    return {
        "tokenizer": _sha256(_tokenizer_json(tokenizer_of(processing_class))),
        "eos_token": str(tokenizer_of(processing_class).eos_token),
        "chat_template": _sha256(template or processing_class.chat_template),
        "image_processor": None if image_processor is None else _sha256(image_processor.to_json_string()),
        "max_length": args.max_length,
        "truncation_mode": args.truncation_mode,
        "completion_only_loss": args.completion_only_loss,
        "assistant_only_loss": args.assistant_only_loss,
        # Strategies that keep sequences whole give the same ones as no packing.
        "packing": args.packing_strategy if args.packing and args.packing_strategy != "bfd" else None,
        # Not where there is none, so that caches of earlier versions stay what they are.
        **({} if told is None else {"teacher_view": told.facts}),
    }


class Located(NamedTuple):
    """A sequence of a prepared data set: a span of one of its rows."""

    row: int
    span: slice
    ids: Int[np.ndarray, "token"]
    supervised: Bool[np.ndarray, "token"]


def sequences_of(dataset: Dataset, prefix: str = "") -> Iterator[Located]:
    """Every sequence of a prepared data set, as the side reads it whose columns have this prefix.

    Packed rows are taken apart.
    """
    names = {f"{prefix}{name}": name for name in ("input_ids", "labels", "seq_lengths")}
    columns = [column for column in names if column in dataset.column_names]
    first = 0
    own = dataset.select_columns(columns).rename_columns({column: names[column] for column in columns})
    for batch in own.with_format("numpy").iter(_READ):
        rows: Any = batch
        for number, (ids, labels) in enumerate(zip(rows["input_ids"], rows["labels"], strict=True)):
            starts = [0]
            if "seq_lengths" in rows:
                starts = np.cumsum([0, *rows["seq_lengths"][number][:-1]]).tolist()
            for span in segments(starts, len(ids)):
                supervised = labels[span] != -100
                supervised[:1] = False
                yield Located(first + number, span, ids[span], supervised)
        first += len(rows["input_ids"])


def _tokenizer_json(tokenizer: Any) -> str:
    if not tokenizer.is_fast:
        return json.dumps(sorted(tokenizer.get_vocab().items()))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    # Set anew by every call.
    for key in ("truncation", "padding"):
        content.pop(key, None)
    return json.dumps(content, sort_keys=True)


def _sha256(text: Any) -> str | None:
    return None if text is None else hashlib.sha256(json.dumps(text, sort_keys=True).encode()).hexdigest()
