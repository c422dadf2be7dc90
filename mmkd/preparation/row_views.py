"""What a teacher with a view of its own reads of rows as they are in the data, for some of which it may have none."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from datasets import Dataset, IterableDataset

from mmkd.data.messages import is_learnt
from mmkd.data.teacher_view import TeacherView
from mmkd.seams.trl_seam import first_process_first

from .row_names import STORED_IMAGES, row_key

_IMAGES = ("images", STORED_IMAGES)


@dataclass(frozen=True)
class RowView:
    """A view, and for which share of rows (`dropout`) the teacher reads what the student reads all the same.

    Which rows these are follows from the seed, and from the prompts and images of the rows.
    """

    view: TeacherView
    dropout: float = 0.0
    seed: int = 0
    longest: int | None = None
    """Tokens of the longest row that the teacher reads; None: any number."""
    rollout: int = 0
    """Tokens of an answer that the student may give itself, for which the teacher's row needs room too."""

    @property
    def facts(self) -> dict[str, Any]:
        """What decides which rows the teacher reads behind its own prompt, and behind which, as JSON can say it."""
        dropout = {"dropout": {"share": self.dropout, "seed": self.seed}} if self.dropout else {}
        longest = {} if self.longest is None else {"teacher_max_length": self.longest}
        return {**self.view.facts, **dropout, **longest}

    @property
    def image_columns(self) -> tuple[str, ...]:
        """The columns with the images that are read."""
        own = self.view.images_column
        columns = () if own is None else (own,)
        return columns if columns and not self.dropout else ("images", *columns)

    def rewrite(self, row: Mapping[str, Any]) -> Mapping[str, Any]:
        """The row as the teacher reads it."""
        return row if self.dropout and self._drops(row) else self.view.rewrite(row)

    def of_data(self, rows: Dataset | IterableDataset) -> Any:
        """Rows of text as the teacher reads them."""
        if isinstance(rows, IterableDataset):
            return rows.map(self.rewrite)
        with first_process_first():
            return rows.map(self.rewrite, features=rows.features)

    def _drops(self, row: Mapping[str, Any]) -> bool:
        asked = row.get("prompt", row.get("text"))
        if "messages" in row:
            asked = list(takewhile(lambda turn: not is_learnt(turn), row["messages"]))
        # Without the answer, in whose place the student's may stand.
        key = row_key({"prompt": [self.seed, asked], **{name: row[name] for name in _IMAGES if name in row}})
        return key / 2**64 < self.dropout
