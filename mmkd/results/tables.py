"""Tables of a comparison, for the console and in Markdown, from the same cells."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mmkd.units import readable_size, with_noun

from .markdown_text import cell

Cells = tuple[str, list[str], list[list[str]]]
"""Title, header, lines."""


# The measures of own answers have tables of their own: one with all columns fits no terminal.
_OF_OWN_ANSWERS = "own_"


def table_console() -> Console:
    """As wide as the terminal. What goes to a file gets 120 columns, in which the tables need no folding."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def show(comparison: Mapping[str, Any], console: Console) -> None:
    """Prints a comparison."""
    for title, header, lines in tables(comparison):
        show_table(header, lines, console, title)
    console.print(_footer(comparison))
    for verdict in comparison.get("verdicts", []):
        console.print(verdict, style="bold", highlight=False)


def markdown(comparison: Mapping[str, Any]) -> str:
    """A comparison as a Markdown page."""
    parts = [
        (f"### {title}\n\n" if title else "") + markdown_table(header, lines)
        for title, header, lines in tables(comparison)
    ]
    picture = [f"![{comparison['picture']}]({comparison['picture']})"] if "picture" in comparison else []
    return "\n\n".join([*comparison.get("verdicts", []), *parts, *picture, _footer(comparison)]) + "\n"


def show_table(header: Sequence[str], lines: Iterable[Sequence[str]], console: Console, title: str = "") -> None:
    """Prints one table."""
    table = Table(*header, title=title or None, title_justify="left")
    for line in lines:
        table.add_row(*line)
    console.print(table)


def markdown_table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """One table in Markdown."""
    return "\n".join(f"| {' | '.join(map(cell, line))} |" for line in (header, ["---"] * len(header), *lines))


def tables(comparison: Mapping[str, Any]) -> list[Cells]:
    """The tables of a comparison; empty tables are left out."""
    rows, items = comparison["rows"], comparison.get("items", "tokens")
    baseline = comparison.get("baseline", "SFT")
    candidates = [
        _numbers("", rows, "metrics", items),
        _numbers("The models' own answers", rows, "metrics", items, own_answers=True),
        _further(rows),
        _numbers("Benchmarks", rows, "tasks", items),
        _against("Percent of the teacher kept", rows, "retention", lambda value: f"{value:.1f} %"),
        _against(f"Gain over {baseline}, positive is better", rows, "gain_over_sft", _gain),
        _against(
            f"Gain over {baseline} on own answers, positive is better", rows, "gain_over_sft", _gain, own_answers=True
        ),
        _against(
            "Benchmark answers that flipped against the teacher", rows, "flips", lambda value: f"{100 * value:.1f} %"
        ),
        _costs(rows, items),
    ]
    return [(title, header, lines) for title, header, lines in candidates if lines and len(header) > 1]


def _numbers(title: str, rows: Sequence[Mapping[str, Any]], key: str, items: str, own_answers: bool = False) -> Cells:
    names = [name for name in rows[0][key] if all(name in row[key] for row in rows)]
    names = [name for name in names if name.startswith(_OF_OWN_ANSWERS) == own_answers]
    titles = [rows[0][key][name]["title"] for name in names]
    trained = key == "metrics" and not own_answers
    own = ["parameters", f"{items} seen"] if trained else []
    last = [f"{items}/s"] if trained else []
    lines = []
    for row in rows:
        cells = [_spread(row[key][name]) for name in names]
        if trained:
            tokens = f"{row['tokens'][0]:,}" if row["cost"] else ""
            speed = f"{row['cost']['tokens_per_second']:.0f}" if row["cost"] else ""
            cells = [f"{row['parameters'] / 1e6:.1f} M", tokens, *cells, speed]
        lines.append([row["name"], *cells])
    return title, ["model", *own, *titles, *last] if names or own else ["model"], lines


def _further(rows: Sequence[Mapping[str, Any]]) -> Cells:
    """What is known of some rows only."""
    chosen = [row for row in rows if row.get("further")]
    titles = {name: metric["title"] for row in chosen for name, metric in row["further"].items()}
    lines = [
        [row["name"], *(_spread(row["further"][name]) if name in row["further"] else "" for name in titles)]
        for row in chosen
    ]
    return "Further measures", ["model", *titles.values()], lines


def _against(title: str, rows: Sequence[Mapping[str, Any]], key: str, cell: Any, own_answers: bool = False) -> Cells:
    chosen = [row for row in rows if row[key] and row["role"] != "teacher"]
    names = list(dict.fromkeys(name for row in chosen for name in row[key]))
    names = [name for name in names if name.startswith(_OF_OWN_ANSWERS) == own_answers]
    titles = [_title(chosen[0], name) for name in names]
    lines = [[row["name"], *(cell(row[key][name]) if name in row[key] else "" for name in names)] for row in chosen]
    return title, ["model", *titles], lines


def _title(row: Mapping[str, Any], name: str) -> str:
    return {**row["metrics"], **row["tasks"]}[name]["title"]


def _gain(gain: Mapping[str, Any]) -> str:
    return f"{gain['gain']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]"


def _costs(rows: Sequence[Mapping[str, Any]], items: str) -> Cells:
    chosen = [row for row in rows if row["cost"]]
    cached = any(row["cache"] for row in chosen)
    unit = chosen[0]["cost"]["unit"] if chosen else ""
    lines = []
    for row in chosen:
        asked = row["cost"]["teacher_tokens"]
        cells = [row["name"], f"{row['cost']['hours']:.3g}", "" if asked is None else f"{asked:,.0f}"]
        lines.append([*cells, *([_cache(row["cache"])] if cached else [])])
    return "Cost of a training", ["model", unit, "teacher tokens", *(["cache"] if cached else [])], lines


def _cache(cache: Mapping[str, Any] | None) -> str:
    if cache is None:
        return ""
    size = f"{readable_size(cache['bytes'])}, {cache['bytes_per_token']:.0f} bytes per token"
    return f"{cache['tokens']:,} tokens, {size}, built in {cache['hours']:.2f} hours"


def _spread(metric: Mapping[str, Any]) -> str:
    return f"{metric['mean']:.3f}" if metric["std"] is None else f"{metric['mean']:.3f} ± {metric['std']:.3f}"


def _footer(comparison: Mapping[str, Any]) -> str:
    seeds, facts = comparison["seeds"], comparison["machine"]
    spread = ", mean ± standard deviation" if len(seeds) > 1 else ""
    gains = any(row["gain_over_sft"] for row in comparison["rows"])
    between = "; intervals: 95 %, paired bootstrap over held-out items and seeds" if gains else ""
    on = f" Measured on {comparison['measured_on']}." if comparison.get("measured_on") else ""
    where = facts["processor"] if facts["device"] == "cpu" else facts["device"]
    machine = f"{where}, {with_noun(facts['threads'], 'thread')}, torch {facts['versions']['torch']}"
    return f"Seeds {seeds}{spread}{between}. {machine}.{on}{_equal_time(comparison)}"


def _equal_time(comparison: Mapping[str, Any]) -> str:
    """By how much trainings are longer than their recipes say."""
    factors = comparison.get("steps_times")
    if factors is None:
        return ""
    times = [f"{name} {' or '.join(f'{factor:.2f}' for factor in own)}" for name, own in factors.items()]
    return f" All trained for the same time; steps are those of the recipes times: {', '.join(times)}."
