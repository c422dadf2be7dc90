"""`mmkd report`: a run on one page, as self-contained HTML and as Markdown."""

import base64
import html
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from markupsafe import Markup

from mmkd import __version__
from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.results.markdown_text import cell, fenced, said
from mmkd.results.scores import items_of, scores_of
from mmkd.results.tables import markdown, tables
from mmkd.training.guard_settings import warnings_of
from mmkd.units import readable_time

from .curves import draw
from .run_samples import make_samples
from .runs import RunFiles, read_run, tokens_of, with_parts
from .samples import ReportSample, samples_of
from .summary import summary_of

HTML, MARKDOWN, FIGURES = "report.html", "report.md", "report-figures"


@dataclass(frozen=True)
class Table:
    """A table with cells of text."""

    title: str
    header: Sequence[str]
    lines: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """Tables under one heading, with a remark."""

    title: str
    tables: Sequence[Table] = field(default_factory=list)
    note: str = ""

    @property
    def id(self) -> str:
        """The id of its heading."""
        return self.title.lower().replace(" ", "-")


def write_report(
    folder: Path,
    output: Path | None = None,
    comparison: Path | None = None,
    samples: int | None = None,
    trust_remote_code: bool = False,
) -> tuple[Path, Path]:
    """The paths of the HTML and the Markdown page of a run, written to `output` or the run's own folder.

    `samples` is the number of held-out questions that student and teacher answer; None for a few, if there are no
    samples yet, the run is finished and its models are small. They are kept in the run's folder.
    `trust_remote_code`: whether code that comes with these models may run.

    May be called at any time during a run. Raises UserError for a folder without a training or comparison.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("A report draws with matplotlib, which is not installed: pip install 'mmkd[plot]'.")
    run = read_run(folder, comparison)
    reason = ""
    if samples or not samples_of(run):
        reason = make_samples(run, samples, trust_remote_code)
    facts = page_facts(run, reason)
    output = output or folder
    for figure in facts["figures"]:
        write_file(output / FIGURES / f"{figure['name']}.svg", figure["svg"])
    for name in (HTML, MARKDOWN):
        write_file(output / name, render(name, facts))
    return output / HTML, output / MARKDOWN


def render(name: str, facts: Mapping[str, Any]) -> str:
    """One of the pages, report.html or report.md, of a run's facts."""
    environment = ImmutableSandboxedEnvironment(
        autoescape=name == HTML, undefined=StrictUndefined, keep_trailing_newline=True
    )
    environment.filters |= {"cell": cell, "code": _code, "said": said, "fenced": fenced}
    template = files("mmkd.publish").joinpath(name.replace("report", "report_page")).read_text(encoding="utf-8")
    return environment.from_string(template).render(**facts)


def page_facts(run: RunFiles, without_samples: str = "") -> dict[str, Any]:
    """The variables of the templates; `without_samples` says why there are none, or not all."""
    record = run.record
    records = run.stages or ({"": record} if record else {})
    figures = [
        {
            "name": figure.name,
            "title": figure.title,
            "words": figure.words,
            "several": figure.plots > 1,
            "svg": figure.svg.decode(),
            "encoded": base64.b64encode(figure.svg).decode(),
        }
        for figure in draw(run)
    ]
    samples = samples_of(run)
    return {
        "title": f"{'Comparison' if run.comparison is not None else 'Run'} {run.name}",
        "state": run.state,
        "written": datetime.now(UTC).isoformat(" ", "seconds"),
        "version": __version__,
        "warnings": _warnings(run),
        "summary": summary_of(run),
        "sections": [section for section in _sections(run) if section.tables or section.note],
        "closing": [Section("Data", _data(records)), Section("Versions", _versions(run))],
        "figures": figures,
        "folder": FIGURES,
        "samples": samples,
        "samples_note": _samples_note(samples, without_samples),
        "recipes": [_recipe(name, record) for name, record in records.items() if "keys" in record],
    }


def _samples_note(samples: Sequence[ReportSample], reason: str) -> str:
    first = "The first ones of each kind, not chosen ones." if samples else ""
    return f"{first} {reason}".strip() or "There are none."


def _recipe(stage: str, record: Mapping[str, Any]) -> dict[str, str]:
    """A recipe as it was run, with its origin."""
    note = f"{record.get('recipe', '')} with its flags, started on {record['started']}."
    keys = yaml.safe_dump(record["keys"], sort_keys=False, allow_unicode=True)
    return {"title": f"Stage {stage}", "note": f"Stage {stage}: {note}" if stage else note, "keys": keys}


def _training(run: RunFiles) -> list[Table]:
    """Data, steps, tokens and time of each training, and their sums for a run in stages or rounds."""
    tables = []
    for name, parts in run.lines.items():
        lines = [
            [part.name, str(part.record.get("method", "")), part.data, *_counts(part.steps, part.tokens, part.seconds)]
            for part in parts
            if part.log
        ]
        if len(lines) > 1:
            seconds = [part.seconds for part in parts if part.seconds is not None]
            steps = sum(part.steps for part in parts)
            lines.append(["all", "", "", *_counts(steps, tokens_of(parts), sum(seconds) if seconds else None)])
        if lines:
            title = name if len(run.lines) > 1 else ""
            header = ["training", "method", "data", "steps", "supervised tokens", "time"]
            tables.append(_without_empty_columns(Table(title, header, lines)))
    return tables


def _without_empty_columns(table: Table) -> Table:
    """The table without columns that say nothing, such as tokens of a run over classes."""
    kept = [place for place in range(len(table.header)) if any(line[place] for line in table.lines)]
    lines = [[line[place] for place in kept] for line in table.lines]
    return Table(table.title, [table.header[place] for place in kept], lines)


def _counts(steps: int, tokens: int | None, seconds: float | None) -> list[str]:
    time = "" if seconds is None else readable_time(seconds)
    return [f"{steps:,}", "" if tokens is None else f"{tokens:,}", time]


def _sections(run: RunFiles) -> list[Section]:
    sections = []
    if run.comparison is not None:
        page = markdown(run.comparison).strip()
        compared = [Table(*cells) for cells in tables(run.comparison)]
        sections.append(Section("Comparison", compared, page.rpartition("\n\n")[2]))
    sections.append(Section("Training", _training(run)))
    sections += [Section("Benchmarks", _benchmarks(run.results)), Section("Measurements", _measures(run.results))]
    return sections


def _warnings(run: RunFiles) -> list[str]:
    warnings = []
    for name, result in run.results.items():
        weights = [path for path in Path(result["folder"]).parent.glob("*.safetensors")]
        newest = max((path.stat().st_mtime for path in weights), default=0.0)
        if newest > Path(result["folder"], "results.json").stat().st_mtime:
            warnings.append(f"The weights of {name} were written after its results: evaluate it again.")
    warnings += dict.fromkeys(text for part in run.own_parts for text in part.record.get("cautions", []))
    for part in run.own_parts:
        place = f"In {part.name}, " if len(run.own_parts) > 1 else "In "
        warnings += [f"{place}{warning}." for warning in warnings_of(part.log)]
    return warnings


def _benchmarks(results: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for name, result in results.items():
        for score in (score for entry in result["tasks"].values() for score in scores_of(entry)):
            sign = "↑" if score["higher_is_better"] else "↓"
            row = rows.setdefault(
                (score["task"], f"{score['metric'].removesuffix(',none')} {sign}", items_of(score)), {}
            )
            row[name] = f"{score['value']:.4f}" + ("" if score["stderr"] is None else f" ± {score['stderr']:.4f}")
    names = [name for name, result in results.items() if result["tasks"]]
    lines = [[*key, *(row.get(name, "") for name in names)] for key, row in rows.items()]
    return [Table("", ["task", "metric", "items", *names], lines)] if lines else []


def _measures(results: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """One table per model with all numbers of all measurements, of student and teacher if both were measured."""
    tables = []
    for name, result in results.items():
        lines = []
        for entry in result["measures"].values():
            values = entry["values"]
            sides = {side: _numbers(values.get(side, {})) for side in ("student", "teacher")}
            if not any(sides.values()):
                sides["student"] = _numbers(values)
            for key in dict.fromkeys([*sides["student"], *sides["teacher"]]):
                lines.append([entry["measure"], key, *(sides[side].get(key, "") for side in sides)])
        if lines:
            tables.append(Table(name, ["measure", "", "student", "teacher"], lines))
    return tables


def _numbers(values: Any) -> dict[str, str]:
    if not isinstance(values, Mapping):
        return {}
    flat = {key: value for key, value in values.items() if isinstance(value, int | float | str)}
    for measurement in values.get("speed") or []:
        batch = measurement["batch_size"]
        flat |= {f"{key}, batch {batch}": value for key, value in measurement.items() if key != "batch_size"}
    return {key: _number(value) for key, value in flat.items()}


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value or "")


def _data(records: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """The data of all stages, each once."""
    facts = [recipe for record in records.values() if "data" in record for recipe in with_parts(record["data"])]
    lines = [
        [
            recipe["name"],
            recipe["license"] or "not stated",
            recipe["source"] or recipe["homepage"] or "",
            recipe.get("answers", ""),
        ]
        for recipe in facts
    ]
    unique = [list(line) for line in dict.fromkeys(map(tuple, lines))]
    header = ["data recipe", "licence", "source", "answers of a teacher"]
    return [_without_empty_columns(Table("", header, unique))] if unique else []


def _versions(run: RunFiles) -> list[Table]:
    machine = run.record.get("machine") or (run.comparison or {}).get("machine")
    if not machine:
        return []
    facts = {key: value for key, value in machine.items() if key != "versions"} | machine["versions"]
    return [Table("", ["package or fact", "value"], [[key, str(value)] for key, value in facts.items()])]


def _code(text: str) -> Markup:
    """HTML of text in which `...` is code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text)))
