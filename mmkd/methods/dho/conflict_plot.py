"""The plot of how the supervised and the distillation loss pull on the shared features while a student trains."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmkd.errors import UserError


def plot_conflict(runs: Mapping[str, Sequence[Mapping[str, Any]]], path: str | Path) -> None:
    """Draws the cosine of the two gradients over the optimizer steps to a file, one line per run.

    `runs` holds logs by the name of their line; several runs of one method are `name#1`, `name#2`, and share a colour.
    Raises UserError when no log has a measurement.
    """
    import matplotlib  # pyright: ignore[reportMissingImports]

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # pyright: ignore[reportMissingImports]

    lines = {
        name: [(entry["step"], entry["gradient_cosine"]) for entry in log if "gradient_cosine" in entry]
        for name, log in runs.items()
    }
    if not any(lines.values()):
        raise UserError("No log holds a gradient_cosine; it is measured by objectives dho and single_head.")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    colors: dict[str, str] = {}
    for name, points in lines.items():
        label = name.partition("#")[0]
        first = label not in colors
        colors.setdefault(label, f"C{len(colors)}")
        steps, cosines = zip(*points, strict=True)
        axes.plot(steps, cosines, color=colors[label], alpha=0.8, label=label if first and label else None)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set(xlabel="optimizer step", ylabel="cosine of the gradients of CE and KD\non the features")
    if any(colors):
        axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)
