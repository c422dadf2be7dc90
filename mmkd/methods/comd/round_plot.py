"""The plot of a run's rounds: how hard the pool is, how good student and teacher are, how the pool grows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.errors import UserError


def plot_rounds(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Draws the rounds of runs, by the name of their line, to a file.

    Several runs of one kind are `name#1`, `name#2`, and share a colour. `report.read_rounds` reads a run's rounds.
    Raises UserError when there are none.
    """
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    if not any(runs.values()):
        raise UserError("There are no rounds to draw.")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    colors: dict[str, str] = {}
    for name, rounds in runs.items():
        label = name.partition("#")[0]
        line = {"color": colors.setdefault(label, f"C{len(colors)}"), "alpha": 0.8, "marker": "o", "markersize": 3}
        shown = label if name == next(run for run in runs if run.partition("#")[0] == label) else None
        hard = [(entry["round"], entry["hard"] / entry["assessed"]) for entry in rounds if entry.get("assessed")]
        student = [(entry["round"], entry["held_out"]["student"]) for entry in rounds if entry.get("held_out")]
        teacher = [(entry["round"], entry["held_out"]["teacher"]) for entry in rounds if entry.get("held_out")]
        _line(axes[0], hard, label=shown, **line)
        _line(axes[1], student, label=shown, **line)
        _line(axes[1], teacher, **{**line, "marker": "", "linestyle": "--", "color": "black"})
        _line(axes[2], [(entry["round"], entry["pool"]) for entry in rounds], label=shown, **line)
    titles = ("share of hard instructions", "held out (teacher dashed)", "instructions in the pool")
    for place, title in zip(axes, titles, strict=True):
        place.set(xlabel="round", title=title)
        place.xaxis.get_major_locator().set_params(integer=True)
    axes[1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _line(axes: Any, points: Sequence[tuple[float, float]], **style: Any) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), **style)
