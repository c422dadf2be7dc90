"""The exported students of a comparison: for each row and format, what it costs to ship it so."""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.errors import UserError
from mmkd.export.exported import Exported
from mmkd.export.formats import ExportSpec
from mmkd.files import write_file
from mmkd.results.tables import markdown_table, show_table, table_console

from .export_student import export
from .student_to_export import ExportOptions

MEASURES = {"perplexity": "perplexity", "student_perplexity": "of the student", "kl": "KL from the student"}
MEASURES |= {"top1_agreement": "same top-1", "tokens_per_second": "tok/s"}

HEADER = ("student", "format", "MB", *MEASURES.values(), "runtime")

_EXPORTED = ("student", "control", "baseline")
"""The rows whose students are exported: what was trained."""


def compare_exported(
    comparison: Mapping[str, Any], specs: Sequence[ExportSpec], options: ExportOptions, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """For each trained row of a comparison and each format, the means over seeds of its check.

    Raises UserError as `export` does, and for a comparison without students that write.
    """
    rows = [row for row in comparison["rows"] if row["role"] in _EXPORTED]
    if not rows:
        raise UserError(
            "The comparison has no trained student, so that there is nothing to export.", because="meaning"
        )
    lines: list[dict[str, Any]] = []
    for row in rows:
        seeds = [
            export(folder, specs, options, lambda text, row=row: say(f"{row['name']}, {text}"))
            for folder in row["folders"]
        ]
        lines += [_line(row["name"], of_seeds) for of_seeds in zip(*seeds, strict=True)]
    return lines


def add_to_comparison(lines: Sequence[Mapping[str, Any]], path: Path, page: Path) -> None:
    """Writes the lines into a comparison's file, and a table of them to its page."""
    comparison = json.loads(path.read_text(encoding="utf-8"))
    write_file(path, json.dumps({**comparison, "exported": list(lines)}, indent=1, ensure_ascii=False) + "\n")
    table = markdown_table(HEADER, map(_cells, lines))
    write_file(page, f"{page.read_text(encoding='utf-8')}\n### Exported students\n\n{table}\n")


def show_compared(lines: Sequence[Mapping[str, Any]]) -> None:
    """Prints a line for each row and format."""
    show_table(HEADER, map(_cells, lines), table_console(), "Exported students")


def _line(name: str, seeds: Sequence[Exported]) -> dict[str, Any]:
    checks = [each.check for each in seeds]
    known = [measure for measure in MEASURES if all(measure in check for check in checks)]
    return {
        "student": name,
        "format": seeds[0].name,
        "bytes": seeds[0].record["bytes"],
        "runtime": checks[0].get("runtime", ""),
        "seeds": len(seeds),
        **{measure: statistics.fmean(check[measure] for check in checks) for measure in known},
        "folders": [str(each.folder) for each in seeds],
    }


def _cells(line: Mapping[str, Any]) -> list[str]:
    numbers = [f"{line[measure]:.4g}" if measure in line else "" for measure in MEASURES]
    return [line["student"], line["format"], f"{line['bytes'] / 1e6:.1f}", *numbers, line["runtime"]]
