"""The tables of the lab, made of the results that are kept in the repository."""

from collections.abc import Mapping
from typing import Any

from mmkd.eval.comparison_summary import METRICS

from .card import Card

_EQUAL = {"steps": "equal steps and tokens", "time": "equal time of all cores"}


def claims_table(card: Card, results: Mapping[str, Any]) -> list[str]:
    """A line per claim: the paper's number, ours with its interval, and whether it holds."""
    equals = list(results["claims"])
    head = "".join(f" at {_EQUAL[equal]} | |" for equal in equals)
    lines = [f"| claim | paper |{head}", "|---|---|" + "---|---|" * len(equals)]
    for number, claim in enumerate(card.claims):
        cells = []
        for equal in equals:
            found = results["claims"][equal][number]
            gains = "; ".join(
                f"{pair['gain']:+.3g} [{pair['low']:+.3g}, {pair['high']:+.3g}]" for pair in found["pairs"]
            )
            cells.append(f" {gains} | {_shown(found['verdict'])} |")
        lines.append(f"| {claim.claim} | {claim.paper} |" + "".join(cells))
    return lines


def lines_table(card: Card, results: Mapping[str, Any]) -> list[str]:
    """A line per training: the chosen rate, and the measure at equal steps and at equal time."""
    equals, title = list(results["lines"]), METRICS[card.metric].title
    head = "".join(f" {title} at {_EQUAL[equal]} |" for equal in equals)
    lines = [f"| line | learning rate |{head}", "|---|---|" + "---|" * len(equals)]
    for name in card.lines:
        cells = [_spread(results["lines"][equal][name]) for equal in equals]
        lines.append(f"| {name} | {results['rates'][name]['chosen']:g} |" + "".join(f" {cell} |" for cell in cells))
    return lines


def page(card: Card, results: Mapping[str, Any]) -> str:
    """The page of a card: what was run, both tables."""
    of = results["machine"]
    machine = of["device"] if of["device"] != "cpu" else f"{of['processor']}, {of['threads']} threads"
    rates = ", ".join(f"{rate:g}" for rate in card.rates)
    ran = (
        f"{len(card.seeds)} seeds; learning rates {rates}, chosen for every line on validation rows with seed "
        f"{card.search_seed}; {results['hours']:.1f} hours on {machine}. Gains in {METRICS[card.metric].title}, "
        "positive where the claim is right, with paired 95 % intervals over test rows and seeds."
    )
    parts = [f"## {card.title}", ran, "\n".join(claims_table(card, results)), "\n".join(lines_table(card, results))]
    return "\n\n".join(parts) + f"\n\n    python -m scripts.lab run {card.name}\n"


def _shown(verdict: str) -> str:
    return f"**{verdict}**" if verdict != "cannot tell" else verdict


def _spread(told: Mapping[str, Any]) -> str:
    return f"{told['mean']:.4g}" + ("" if told["std"] is None else f" ± {told['std']:.2g}")
