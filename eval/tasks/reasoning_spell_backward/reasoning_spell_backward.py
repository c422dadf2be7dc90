"""Whether an answer is right, as reasoning-gym scores it."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.prepare.reasoning_tasks import score


def right(row: Mapping[str, Any], responses: Sequence[str]) -> dict[str, float]:
    """1 for a response that ends in the right answer, otherwise 0."""
    return {"accuracy": score(row["task"], responses[0], row["answer"])}
