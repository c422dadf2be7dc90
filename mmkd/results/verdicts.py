"""What a comparison says of a student, in a sentence."""

from collections.abc import Mapping, Sequence
from typing import Any


def verdict_of(row: Mapping[str, Any], counting: Sequence[str], baseline: str, seeds: int) -> str | None:
    """Whether a row of a comparison is better than the baseline by the first measure with an interval; None without.

    `counting` names the measures, the ones that count most first.
    """
    name = next((name for name in counting if name in row["gain_over_sft"]), None)
    if name is None:
        return None
    gain, title = row["gain_over_sft"][name], {**row["metrics"], **row["tasks"]}[name]["title"]
    number = "one seed" if seeds == 1 else f"{seeds} seeds"
    interval = f"95 % interval {gain['low']:+.3g} to {gain['high']:+.3g}, {number}"
    if gain["low"] <= 0 <= gain["high"]:
        return f"{row['name']}: no difference from {baseline} is shown in {title} ({gain['gain']:+.3g}, {interval})."
    side = "better" if gain["low"] > 0 else "worse"
    return f"{row['name']} is {side} than {baseline} in {title} by {abs(gain['gain']):.3g} ({interval})."
