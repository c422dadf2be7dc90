"""The options of a data recipe under `filters`."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mmkd.errors import UserError


@dataclass(frozen=True)
class DataFilters:
    """Which rows stay. Lengths are in characters of the answer: the text, the completion, or all assistant turns."""

    min_chars: int | None = field(
        default=None, metadata={"help": "Leave out rows whose answer has fewer characters.", "yaml": int}
    )
    max_chars: int | None = field(
        default=None, metadata={"help": "Leave out rows whose answer has more characters.", "yaml": int}
    )
    equals: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "{source column: value}. Leave out rows with another value.", "yaml": dict},
    )
    drop_empty: bool = field(
        default=True,
        metadata={"help": "Leave out rows with an empty answer, from which nothing can be learnt.", "yaml": bool},
    )
    dedupe: bool = field(
        default=False,
        metadata={
            "help": "Leave out rows that equal an earlier row or a held-out one. Off by default, since it reads "
            "all rows.",
            "yaml": bool,
        },
    )

    def __post_init__(self) -> None:
        """Raises UserError for lengths that no answer has."""
        for key in ("min_chars", "max_chars"):
            if (getattr(self, key) or 0) < 0:
                raise UserError(f"filters.{key} is {getattr(self, key)}; a length is 0 or more.")
        if self.min_chars is not None and self.max_chars is not None and self.min_chars > self.max_chars:
            raise UserError(
                f"filters: min_chars {self.min_chars} is above max_chars {self.max_chars}, so no row stays; swap them."
            )
