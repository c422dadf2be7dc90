"""Curves of a run as SVG. Lines differ in style and markers, so that they are distinct in black and white."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .runs import Part, RunFiles

POINTS = 300
"""The maximal number of points of a line."""

CHARACTER = 0.012
"""The width of a character of a stage's name, as a share of a plot's width."""

UPRIGHT = 0.06
"""The height of a character of an upright name of a stage, in inches."""

LEGEND_NAME = 36
"""The longest name in a legend of two columns, in characters."""

STYLES = [
    {"color": "#000000", "linestyle": "-", "marker": "o"},
    {"color": "#b2182b", "linestyle": "--", "marker": "s"},
    {"color": "#2166ac", "linestyle": "-.", "marker": "^"},
    {"color": "#666666", "linestyle": ":", "marker": "D"},
    {"color": "#000000", "linestyle": "--", "marker": "x"},
    {"color": "#b2182b", "linestyle": "-.", "marker": "+"},
    {"color": "#2166ac", "linestyle": ":", "marker": "v"},
    {"color": "#666666", "linestyle": "-", "marker": "*"},
]

Line = tuple[str, list[float], list[float]]
"""Name, x and y."""


@dataclass(frozen=True)
class Panel:
    """A plot of the values logged under some names; one that ends in / or _ stands for all that begin with it."""

    title: str
    unit: str
    names: tuple[str, ...]
    log_scale: bool = False


VISUAL_TERMS = ("visual_kl", "relation_distance", "visual_mse", "alignment_distance", "switch")

PANELS = (
    Panel("Loss and its terms", "", ("loss", "loss/", "eval_loss", "divergence", *VISUAL_TERMS)),
    Panel("Distances of features", "", ("feature_", "eval_feature_")),
    Panel("Factors of the loss's terms", "", ("balance/",), log_scale=True),
    Panel("KL to the teacher", "nats per token", ("kl", "eval_kl", "eval_visual_kl")),
    Panel("Top-1 agreement with the teacher", "share of tokens", ("top1_agreement", "eval_top1_agreement")),
    Panel("TAID's t", "interpolation from student to teacher", ("taid_t",)),
    Panel("Cross-entropy and entropies", "nats per token", ("ce", "eval_ce", "student_entropy", "teacher_entropy")),
    Panel(
        "The student's own answers",
        "share of answers",
        ("rollouts_ended", "rollouts_repeated", "rollouts_other_script", "rollouts_empty"),
    ),
    Panel("Reward of the student's own answers", "", ("reward", "reward_std")),
    Panel("Length of the student's own answers", "tokens", ("rollout_length",)),
    Panel("Entropy of the student on its own answers", "nats per token", ("rollout_entropy",)),
    Panel("Perplexity on held-out rows", "", ("eval_perplexity",), log_scale=True),
    Panel("Chunks of text", "nats per chunk", ("chunk_gap", "chunk_kl", "eval_chunk_gap", "eval_chunk_kl")),
    Panel("Bits per byte", "", ("bits_per_byte", "eval_bits_per_byte")),
    Panel("Accuracy", "share of rows", ("accuracy", "eval_accuracy", "eval_ce_accuracy", "eval_kd_accuracy")),
    Panel("Do the gradients of CE and KD agree?", "", ("gradient_cosine", "gradient_conflict")),
    Panel("Learning rate", "", ("learning_rate",)),
    Panel("Gradient norm", "", ("grad_norm",), log_scale=True),
)


@dataclass(frozen=True)
class Figure:
    """A drawn plot."""

    name: str
    title: str
    svg: bytes
    words: str
    """The last value of each line, for readers who cannot see the plot."""
    plots: int = 1
    """Side by side."""


@dataclass(frozen=True)
class PanelLines:
    """The lines of a panel, and the stages of the longest run: name, from, to; none for a run of one training."""

    panel: Panel
    lines: list[Line]
    spans: Sequence[tuple[str, float, float]]

    @property
    def log_scale(self) -> bool:
        """Whether a logarithmic axis is possible and shows more than a linear one."""
        values = [y for _, _, ys in self.lines for y in ys if not math.isnan(y)]
        return self.panel.log_scale and min(values) > 0 and max(values) / min(values) >= 5


def panels_of(runs: Mapping[str, Sequence[Part]]) -> list[PanelLines]:
    """The panels for which the runs have numbers; of several runs, with the main lines of each."""
    longest = max(runs.values(), key=lambda parts: sum(part.steps for part in parts), default=[])
    starts = (start for _, start in _starts(longest))
    spans = [(part.name, start, start + part.steps) for part, start in zip(longest, starts, strict=True)]
    panels = [PanelLines(panel, list(_lines(panel, runs)), spans if len(spans) > 1 else []) for panel in PANELS]
    return [panel for panel in panels if panel.lines]


def draw(run: RunFiles) -> list[Figure]:
    """All plots for which the run has numbers."""
    figures = [_draw_panel(panel) for panel in panels_of(run.lines)]
    figures += [figure for figure in (_draw_rounds(run.rounds), _draw_choice(run.choice)) if figure is not None]
    return figures


def _draw_panel(panel: PanelLines) -> Figure:
    place = (panel.panel.unit, "optimizer step", panel.lines)
    return _figure(panel.panel.title, [place], log_scale=panel.log_scale, spans=panel.spans)


def _lines(panel: Panel, runs: Mapping[str, Sequence[Part]]) -> Iterator[Line]:
    for run, parts in runs.items():
        logged = dict.fromkeys(key for part in parts for entry in part.log for key in entry)
        names = [
            key for name in panel.names for key in logged if key == name or (name[-1] in "/_" and key.startswith(name))
        ]
        # For several runs only the main lines of each: all terms would be too many.
        held_out = [name for name in names if name.startswith("eval_")][:1]
        chosen = dict.fromkeys(names if len(runs) == 1 else [*names[:1], *held_out])
        for name in chosen:
            points = [
                (start + entry["step"], float(entry[name]))
                for part, start in zip(parts, (start for _, start in _starts(parts)), strict=True)
                for entry in part.log
                if name in entry and "step" in entry
            ]
            label = name.removeprefix("eval_") + ", held out" if name.startswith("eval_") else name
            if points:
                gaps = [*_gaps(name, parts, points), *(_other_rows(parts, points) if name.startswith("eval_") else [])]
                xs, ys = zip(*sorted([*thinned(points), *gaps]), strict=True)
                yield (label if len(runs) == 1 else f"{run}: {label}"), list(xs), list(ys)


def _starts(parts: Sequence[Part]) -> Iterator[tuple[str, int]]:
    """The name of each part, and the step at which it begins in a sequence of all parts."""
    start = 0
    for part in parts:
        yield part.name, start
        start += part.steps


def _gaps(name: str, parts: Sequence[Part], points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """NaN points that interrupt a line: in the middle of each part that does not log it, between parts that do."""
    silent = [
        start + part.steps / 2
        for part, (_, start) in zip(parts, _starts(parts), strict=True)
        if not any(name in entry for entry in part.log)
    ]
    return [(x, math.nan) for x in silent if points[0][0] < x < points[-1][0]]


def _other_rows(parts: Sequence[Part], points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """NaN points that interrupt a line of held-out rows where a part begins that holds out other rows."""
    starts = [start for _, start in _starts(parts)]
    changes = [starts[number] + 0.5 for number in range(1, len(parts)) if parts[number].data != parts[number - 1].data]
    return [(x, math.nan) for x in changes if points[0][0] < x < points[-1][0]]


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most POINTS of the points, evenly spaced, including the last."""
    every = -(-len(points) // POINTS)
    return list(points[::-1][::every][::-1])


def _draw_rounds(rounds: Sequence[Mapping[str, Any]]) -> Figure | None:
    if not rounds:
        return None
    hard = [(round_["round"], round_["hard"] / round_["assessed"]) for round_ in rounds if round_.get("assessed")]
    held = [round_ for round_ in rounds if round_.get("held_out")]
    sides = {side: [(round_["round"], round_["held_out"][side]) for round_ in held] for side in ("student", "teacher")}
    pool = [(round_["round"], round_["pool"]) for round_ in rounds]
    places = [
        ("share of hard instructions", "round", _named({"hard": hard})),
        ("held out", "round", _named(sides)),
        ("instructions in the pool", "round", _named({"pool": pool})),
    ]
    return _figure("Rounds", [place for place in places if place[2]], whole=True)


def _draw_choice(choice: Mapping[str, Any] | None) -> Figure | None:
    if not choice or not choice.get("grid"):
        return None
    by_beta: dict[str, list[tuple[float, float]]] = {}
    for point in choice["grid"]:
        by_beta.setdefault(f"beta {point['beta']:g}", []).append((point["alpha"], point["accuracy"]))
    chosen = {"chosen": [(choice["alpha"], choice["accuracy"])]}
    title = "Interpolation of the two heads, on validation rows"
    return _figure(title, [("accuracy", "alpha", _named({**by_beta, **chosen}))])


def _named(lines: Mapping[str, Sequence[tuple[float, float]]]) -> list[Line]:
    return [(name, [x for x, _ in points], [y for _, y in points]) for name, points in lines.items() if points]


def _figure(
    title: str,
    places: Sequence[tuple[str, str, list[Line]]],
    log_scale: bool = False,
    spans: Sequence[tuple[str, float, float]] = (),
    whole: bool = False,
) -> Figure:
    """A figure with a plot for each of `places`: label of y, label of x, lines. `spans` are stages: name, from, to."""
    import matplotlib  # pyright: ignore[reportMissingImports]
    from matplotlib.backends.backend_svg import FigureCanvasSVG  # pyright: ignore[reportMissingImports]
    from matplotlib.figure import Figure as Canvas  # pyright: ignore[reportMissingImports]
    from matplotlib.transforms import ScaledTranslation  # pyright: ignore[reportMissingImports]

    # Text as text instead of paths: the file is smaller, and the text can be searched.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mmkd", "font.size": 9}):
        rows = max(_legend_rows(lines) for _, _, lines in places)
        upright = max((len(name) for name, _, _ in spans), default=0) if _are_upright(spans) else 0
        height = 3.1 + 0.18 * rows + UPRIGHT * upright
        figure = Canvas(figsize=(5.4 if len(places) == 1 else 3.6 * len(places), height))
        FigureCanvasSVG(figure)
        for axes, (unit, across, lines) in zip(figure.subplots(1, len(places), squeeze=False)[0], places, strict=True):
            for style, (name, xs, ys) in zip(_styles(len(lines)), lines, strict=True):
                every = max(1, len(xs) // 12)
                axes.plot(xs, ys, label=name, linewidth=1.2, markersize=4, markevery=every, **style)
            axes.set(xlabel=across, ylabel=unit)
            axes.grid(color="#dddddd", linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
            if log_scale:
                _readable_log_scale(axes)
            if whole:
                axes.xaxis.get_major_locator().set_params(integer=True)
            _mark_spans(axes, spans)
            if len(lines) > 1:
                # Under the plot and its label, where it hides no line.
                place = axes.transAxes + ScaledTranslation(0, -0.42, figure.dpi_scale_trans)
                legend = {"fontsize": 8, "frameon": False, "ncols": _legend_columns(lines), "loc": "upper left"}
                axes.legend(bbox_to_anchor=(0, 0), bbox_transform=place, borderaxespad=0, **legend)
        figure.suptitle(title, fontsize=10, fontweight="bold", x=0.02, ha="left")
        figure.tight_layout()
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    words = "; ".join(f"{name}: {ys[-1]:.4g} at {xs[-1]:g}" for _, _, lines in places for name, xs, ys in lines)
    return Figure(
        title.lower().replace(" ", "-").replace("'", "").strip("?"), title, file.getvalue(), words, len(places)
    )


def _readable_log_scale(axes: Any) -> None:
    """A logarithmic axis of y whose ticks are plain numbers at 1, 2 and 5."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator  # pyright: ignore[reportMissingImports]

    axes.set_yscale("log")
    bottom, top = axes.get_ylim()
    steps = (1.0, 2.0, 5.0) if top / bottom < 1000 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}" if value < 1e6 else f"{value:.0e}"))


def _mark_spans(axes: Any, spans: Sequence[tuple[str, float, float]]) -> None:
    """Shows where each stage begins, with its name above the plot; upright where the name is wider than its stage."""
    end = max((stop for _, _, stop in spans), default=0)
    if end:
        axes.set_xlim(-0.02 * end, 1.02 * end)
    upright = _are_upright(spans)
    for number, (name, start, stop) in enumerate(spans):
        if number % 2:
            axes.axvspan(start, stop, color="#f1f1f1", linewidth=0, zorder=0)
        axes.annotate(
            name,
            ((start + stop) / 2, 1.02),
            xycoords=("data", "axes fraction"),
            fontsize=7,
            color="#444444",
            rotation=90 if upright else 0,
            ha="center",
            va="bottom",
        )


def _are_upright(spans: Sequence[tuple[str, float, float]]) -> bool:
    """Whether the name of a stage is wider than the stage."""
    end = max((stop for _, _, stop in spans), default=0)
    return bool(end) and any(len(name) * CHARACTER > (stop - start) / end for name, start, stop in spans)


def _legend_columns(lines: Sequence[Line]) -> int:
    """As many columns as fit under a plot."""
    return 1 if max(len(name) for name, _, _ in lines) > LEGEND_NAME else 2


def _legend_rows(lines: Sequence[Line]) -> int:
    return -(-len(lines) // _legend_columns(lines)) if len(lines) > 1 else 0


def _styles(count: int) -> list[dict[str, Any]]:
    return [STYLES[number % len(STYLES)] for number in range(count)]
