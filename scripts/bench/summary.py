"""One table of what the benchmarks were to reach, and plots of how the fused loss scales, from the files of run.sh."""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib
from _measure import exponent, format_cell

HEAD = ("benchmark", "target", "measured", "limit", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="runs/bench")
    folder = parser.parse_args().folder
    files = sorted(folder.glob("b*.txt"), key=lambda path: int(re.sub(r"\D", "", path.stem)))
    if not files:
        parser.error(f"{folder} has no results; `bash scripts/bench/run.sh` writes them")
    rows, machines, scaling = [], [], None
    for path in files:
        text = path.read_text(encoding="utf-8").strip().splitlines() or [""]
        if not text[-1].startswith("{"):
            rows.append((path.stem, f"did not run: {text[-1]}", "", "", ""))
            continue
        data = json.loads(text[-1])
        rows += [row_of(path.stem, target) for target in data["targets"]] or [(path.stem, "no target", "", "", "")]
        machines.append(", ".join(f"{name} {value}" for name, value in data["machine"].items()))
        scaling = data if path.stem == "b7" else scaling
    lines = [HEAD, ("---",) * len(HEAD), *rows]
    text = (
        "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n" + "\n\n".join(dict.fromkeys(machines)) + "\n"
    )
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)
    if scaling is not None:
        print(plot(scaling, folder / "scaling.png"))


def row_of(name: str, target: dict[str, Any]) -> tuple[str, ...]:
    """A target as a line of the table."""
    state = {None: "not measured", True: "met", False: "**missed**"}[target["met"]]
    return name, target["target"], format_cell(target["measured"]), f"{target['limit']:.3g}", state


def plot(data: dict[str, Any], path: Path) -> Path:
    """B7's seconds over tokens, vocabulary and k with their slopes, and the memory beyond the necessary."""
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(data["tables"]), figsize=(4.2 * len(data["tables"]), 3.6), squeeze=False)
    for axis, rows in zip(axes[0], data["tables"].values(), strict=True):
        name = next(iter(rows[0]))
        sizes, seconds = [row[name] for row in rows], [row["s"] for row in rows]
        axis.loglog(sizes, seconds, "ko-")
        axis.set(xlabel=name, ylabel="CPU seconds", title=f"time ~ {name}^{exponent(sizes, seconds):.2f}")
        # Wide enough that what hardly grows looks so.
        middle = math.sqrt(min(seconds) * max(seconds))
        axis.set_ylim(min(0.8 * min(seconds), middle / 4), max(1.25 * max(seconds), 4 * middle))
        if all(row["beyond MB"] is not None for row in rows):
            memory = axis.twinx()
            memory.plot(sizes, [row["beyond MB"] for row in rows], "s--", color="0.5")
            memory.set_ylabel("MB beyond the necessary (dashed)")
            memory.set_ylim(0, max(40, *(1.25 * row["beyond MB"] for row in rows)))
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    return path


if __name__ == "__main__":
    main()
