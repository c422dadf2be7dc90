"""The files of a cache of answers that say which of them were kept, beside the answers themselves."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SUMMARY, PAIRS_RECIPE = "traces.json", "pairs.yaml"
KEPT, PAIRS = "kept", "pairs"
"""Folders of the rows that are kept, and of pairs for DPO."""


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What was kept and why the rest was not; None where no answers were chosen."""
    path = folder / SUMMARY
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def summary_lines(summary: Mapping[str, Any]) -> list[str]:
    """What was kept and why the rest was not, a line for each split."""
    lines = []
    for split, facts in summary["splits"].items():
        text = (
            f"{split}: {facts['kept']:,} of {facts['answers']:,} answers are kept, for {facts['prompts_kept']:,} of "
            f"{facts['prompts']:,} prompts"
        )
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in facts["reasons"].items())
        known = facts["right"] + facts["wrong"]
        text += f". Rejected: {reasons}" if reasons else ""
        text += f". Right: {facts['right'] / known:.1%} of {known:,}" if known else ""
        text += f". Pairs: {facts['pairs']:,}" if facts["pairs"] else ""
        lines.append(f"{text}.")
    return lines


def chosen_by(summary: Mapping[str, Any]) -> str:
    """How answers were chosen, in words."""
    verifier, judge = (summary["verdicts"].get(kind) for kind in ("verifier", "judge"))
    facts = [f"keep {summary['keep']}", f"thoughts {summary['thoughts']}"]
    if verifier is not None:
        package = f" (math-verify {verifier['math-verify']})" if "math-verify" in verifier else ""
        facts.append(f"verifier {verifier['name']}{package}")
    facts += [f"judge {judge['judge']}"] if judge is not None else []
    return ", ".join(facts)


def published(folder: Path) -> dict[str, Path]:
    """The files about kept answers that go to the Hub with a cache, by their place there."""
    names = [folder / name for name in (SUMMARY, PAIRS_RECIPE)]
    rows = [path for kind in (KEPT, PAIRS) for path in sorted((folder / kind).glob("*/*.parquet"))]
    return {path.relative_to(folder).as_posix(): path for path in [*names, *rows] if path.is_file()}


def parquet_configs(folder: Path) -> list[dict[str, Any]]:
    """The configurations by which the Hub shows kept answers and pairs."""
    configs = []
    for kind in (KEPT, PAIRS):
        paths = sorted((folder / kind).glob("*/*.parquet"))
        files = [{"split": path.stem, "path": path.relative_to(folder).as_posix()} for path in paths]
        configs += [{"config_name": kind, "data_files": files}] if files else []
    return configs
