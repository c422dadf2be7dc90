"""Exported students side by side: size, speed, and how far each is from the student."""

from collections.abc import Mapping, Sequence
from typing import Any

from mmkd.export.exported import Exported
from mmkd.results.tables import markdown_table, show_table, table_console

HEADER = ("format", "MB", "load s", "prompt tok/s", "tok/s", "perplexity", "KL", "same top-1", "runtime")


def show_exported(student: Mapping[str, Any] | None, exported: Sequence[Exported]) -> None:
    """Prints a line for the student, where it was measured, and one for each runtime of each format."""
    show_table(HEADER, lines_of(student, exported), table_console())


def markdown_of(exported: Sequence[Exported]) -> str:
    """The same for a card."""
    return markdown_table(HEADER, lines_of(None, exported))


def lines_of(student: Mapping[str, Any] | None, exported: Sequence[Exported]) -> list[list[str]]:
    """The cells, by line."""
    facts = [(each.name, each.record["bytes"], check) for each in exported for check in each.checks.values()]
    if student is not None:
        perplexity = next(
            (check["student_perplexity"] for _, _, check in facts if "student_perplexity" in check), None
        )
        facts = [("student", student["bytes"], {**student, "perplexity": perplexity}), *facts]
    return [
        [
            name,
            f"{size / 1e6:.1f}",
            f"{check['load_seconds']:.2f}",
            f"{check['prompt_tokens_per_second']:.0f}",
            f"{check['tokens_per_second']:.1f}",
            *(_number(check.get(key)) for key in ("perplexity", "kl", "top1_agreement")),
            check["runtime"],
        ]
        for name, size, check in facts
    ]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
