"""Answers that were cut off: a student that learns their words is not to learn that they end there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import ProcessorMixin
from trl.data_utils import is_conversational, prepare_multimodal_messages

from mmkd.errors import UserError
from mmkd.models.load import tokenizer_of

from .turns import Turns

TRUNCATED = "truncated"
"""The column that says so: true, or why a server stopped."""

_CUT = ("length", "max_tokens", "true")
_WORD = "qzx"


def is_truncated(row: Mapping[str, Any]) -> bool:
    """Whether a row says that its last answer was cut off."""
    value = row.get(TRUNCATED)
    return value.strip().lower() in _CUT if isinstance(value, str) else bool(value)


@dataclass(frozen=True)
class Ending:
    """What follows the last words of every row of a data set."""

    tokenizer: Any
    text: str

    @classmethod
    def of(cls, turns: Turns, row: Mapping[str, Any], eos_token: str | None = None) -> "Ending":
        """That of rows like this one: the end of an assistant's turn, or of plain text."""
        tokenizer: Any = tokenizer_of(turns.processing_class)
        if not is_conversational(dict(row)):
            return cls(tokenizer, eos_token or tokenizer.eos_token or "")
        probe: list[Any] = [{"role": "user", "content": _WORD}, {"role": "assistant", "content": _WORD}]
        if isinstance(turns.processing_class, ProcessorMixin):
            probe = prepare_multimodal_messages(probe, images=[])
        return cls(tokenizer, turns.render(probe, {}).rpartition(_WORD)[2])

    def tokens(self, row: Mapping[str, Any], ids: Sequence[int]) -> int | None:
        """How many of a row's last tokens are its end, and no answer; None where they are something else."""
        answer = row.get("completion") or row.get("messages")
        if not self.text or (isinstance(answer, list) and answer[-1]["role"] != "assistant"):
            return 0
        for count in range(1, min(len(ids), len(self.text.encode()) + 1) + 1):
            last = self.tokenizer.decode(list(ids[-count:]), clean_up_tokenization_spaces=False)
            if last.endswith(self.text):
                return count
        return None


def unended(row: Mapping[str, Any], number: int, ending: Ending, split: str) -> dict[str, list[int]]:
    """The labels of a whole row, of which a cut answer's end is none.

    Raises UserError, with the row's number, where it cannot be told.
    """
    labels = list(row["labels"])
    if is_truncated(row):
        count = ending.tokens(row, row["input_ids"])
        if count is None:
            raise UserError(
                f"Row {number} of the {split} data is marked as truncated, and does not end as the chat template ends "
                f"other answers ({ending.text!r}). Remove the row, or use another template (chat_template_path)."
            )
        labels[len(labels) - count :] = [-100] * count
    return {"labels": labels}
