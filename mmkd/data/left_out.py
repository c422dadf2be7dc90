"""Rows of a data set that a run does not use, counted by reason and reported in a log message."""

import logging
from collections import defaultdict

logger = logging.getLogger(__name__)

_SHOWN = 3


class LeftOut:
    """The rows of one split that are left out, by reason."""

    def __init__(self, split: str) -> None:
        self.split = split
        self.rows: dict[str, list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return sum(map(len, self.rows.values()))

    def add(self, row: int, reason: str) -> None:
        """Adds a row, counted from 0; `reason` continues "left out: 2 ...", for example "without completion"."""
        self.rows[reason].append(row)

    def describe(self, of: int) -> str:
        """The rows left out of `of` rows, by reason, in one line."""
        reasons = "; ".join(f"{len(rows)} {reason} ({_listed(rows)})" for reason, rows in self.rows.items())
        return f"{len(self)} of {of} {self.split} rows are left out: {reasons}."

    def warn(self, of: int) -> None:
        """Logs one warning about all rows left out, if there are any."""
        if self.rows:
            logger.warning(self.describe(of))


def _listed(rows: list[int]) -> str:
    # Rows of a shuffled data set are added in any order.
    shown = ", ".join(map(str, sorted(rows)[:_SHOWN]))
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"
