"""Rows of a preview as the tokens of a student."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from datasets import Dataset, DatasetDict

from mmkd.capture.sequences import TokenSequence, UnusableRow, prepare
from mmkd.data.arrow import read_rows
from mmkd.data.image_columns import image_column
from mmkd.data.prompts import model_inputs, prompt_of
from mmkd.models.load import image_token_of, load_processing_class, tokenizer_of
from mmkd.preparation.prompt_rows import is_prompt_alone
from mmkd.training.method import BASELINE_METHOD, METHODS

from .data_preview import PreviewPiece, PreviewRow, RowReader, picture_of
from .dry_run import runs_of
from .facts import Rendered, whole


def reader_of(model: str, assistant_only: bool = True, template: str | None = None) -> RowReader:
    """Reads rows through the chat template of a Hub id or folder and the preparation of training, uncut.

    With `assistant_only`, a conversation is learnt as with assistant_only_loss; `template` is a chat_template_path.
    Raises UserError for rows that training would refuse.
    """
    return partial(_as_tokens, model=model, assistant_only=assistant_only, template=template)


def _as_tokens(rows: Dataset, model: str, assistant_only: bool, template: str | None) -> tuple[list[PreviewRow], str]:
    processing_class = load_processing_class(model, "student")
    listed = image_column(rows)
    if is_prompt_alone(rows.features):
        asked = read_rows(listed, listed.column_names)
        return [_as_prompt(row, processing_class) for row in asked], (
            "Nothing is marked: the rows have no answers to learn. The student or a teacher goes on where they end."
        )
    config: Any = METHODS[BASELINE_METHOD].trainer.config_class
    chat = "messages" in rows.column_names
    keys = {"assistant_only_loss": chat and assistant_only, "chat_template_path": template}
    args = whole(config(output_dir="preview", report_to="none", **keys))
    rendered = Rendered.of(prepare(DatasetDict({"train": rows}), args, processing_class))
    pictures: Any = listed["images"] if "images" in listed.column_names else []
    read = [
        _of_sequence(sequence, rendered, pictures[number] if pictures else [])
        for number, sequence in enumerate(rendered.sequences)
    ]
    how = f"assistant_only_loss: {'true' if assistant_only else 'false'}" if chat else "the answer, or all of a text"
    return read, f"Marked are the tokens that a run learns ({how}); {model} reads all of them."


def _of_sequence(sequence: TokenSequence | UnusableRow, rendered: Rendered, pictures: Sequence[Any]) -> PreviewRow:
    shown = [picture_of(image) for image in pictures]
    if isinstance(sequence, UnusableRow):
        return PreviewRow([PreviewPiece(sequence.reason, False)], shown, "This row cannot be used.")
    pieces = []
    for ids, supervised in runs_of(sequence.ids.tolist(), sequence.supervised.tolist()):
        pieces += [PreviewPiece(text, supervised) for text in _decoded(ids, rendered.tokenizer, rendered.image_token)]
    count = int(sequence.supervised.sum())
    return PreviewRow(pieces, shown, f"{len(sequence.ids):,} tokens, {count:,} of them learnt")


def _decoded(ids: list[int], tokenizer: Any, image_token: int | None) -> Iterator[str]:
    """The text of tokens, with one mark for the tokens of a picture."""
    place = 0
    while place < len(ids):
        is_image = ids[place] == image_token
        run = next((i for i in range(place, len(ids)) if (ids[i] == image_token) != is_image), len(ids))
        if is_image:
            yield f"<picture, {run - place:,} tokens>"
        else:
            yield str(tokenizer.decode(ids[place:run]))
        place = run


def _as_prompt(row: Mapping[str, Any], processing_class: Any) -> PreviewRow:
    pictures = [picture_of(image) for image in row.get("images") or []]
    broken = [picture for picture in pictures if isinstance(picture, str)]
    if broken:
        return PreviewRow([], pictures, "This row cannot be used.")
    question, _ = prompt_of(row)
    ids = model_inputs(processing_class, [question], [row.get("tools")])["input_ids"][0].tolist()
    texts = _decoded(ids, tokenizer_of(processing_class), image_token_of(processing_class))
    return PreviewRow([PreviewPiece(text, False) for text in texts], pictures, f"{len(ids):,} tokens")
