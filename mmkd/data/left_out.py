"""Rows that a data set has and a run does not use: counted by reason, and said."""

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
        """Leaves out a row, counted from 0; `reason` goes on after "left out: 2", such as "without completion"."""
        self.rows[reason].append(row)

    def describe(self, of: int) -> str:
        """Which of so many rows are left out, and why, in one line."""
        reasons = "; ".join(f"{len(rows)} {reason} ({_listed(rows)})" for reason, rows in self.rows.items())
        return f"{len(self)} of {of} {self.split} rows are left out: {reasons}."

    def say(self, of: int) -> None:
        """Warns once about all of them, if there are any."""
        if self.rows:
            logger.warning(self.describe(of))


def _listed(rows: list[int]) -> str:
    # Shuffled rows come in any order.
    shown = ", ".join(map(str, sorted(rows)[:_SHOWN]))
    more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
    return f"row{'s' if len(rows) > 1 else ''} {shown}{more}"
