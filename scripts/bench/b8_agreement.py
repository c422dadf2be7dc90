"""B8: held-out agreement with the teacher over the time that training takes: SFT, KD, TAID and KD from a cache.

The quickstart's recipes, each trained to the end of its schedule with several numbers of steps, and judged by the live
teacher. SFT and the cache, which leave the teacher out of the step, take more steps in about the same time. SFT's
agreement at another's time is interpolated. The cache is built before, which costs once what its row says.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _measure import arguments, dtype_of, report, verdict
from rich.console import Console

from mmkd.capture.build import build
from mmkd.capture.build_plan import make_plan
from mmkd.eval.trainings import measure
from mmkd.recipe.flags import recipe_of
from mmkd.results.compared import ComparedModel

ARMS = {
    "sft": ("sft/quickstart", 1.6),
    "kd": ("kd/quickstart", 1.0),
    "taid": ("taid/quickstart", 1.0),
    "kd, cached": ("kd/quickstart_cached", 1.6),
}
"""Name -> recipe, and its steps for one step with a teacher."""

STEPS = (10, 20, 40)


def trained(recipe: str, steps: int, seed: int, rows: list[str]) -> ComparedModel:
    """A student of so many steps, measured and forgotten."""
    flags = ["--max_steps", str(steps), "--seed", str(seed), *rows]
    # The results are read from what is printed; how each training went is not a part of them.
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        return measure(recipe_of(recipe, flags), "trained", Path(folder) / "student", None, False)


def interpolated(curve: list[tuple[float, float]], moment: float) -> float:
    """The value of a curve of (time, value) at a time; beyond its ends, that of the nearer end."""
    if moment <= curve[0][0]:
        return curve[0][1]
    for (before, low), (after, high) in pairwise(curve):
        if moment <= after:
            return low + (high - low) * (moment - before) / (after - before)
    return curve[-1][1]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS), help="of the arms with a teacher")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("this benchmark measures on a CPU only")
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as cache:
        measure_arms(args, cache)


def measure_arms(args: argparse.Namespace, cache: str) -> None:
    """Prints the table; the teacher's answers are written to `cache`."""
    steps, few = (
        ([1, 2], ["--max_train_rows", "8", "--max_eval_rows", "2"]) if args.quick else (sorted(args.steps), [])
    )
    half = dtype_of(args) == torch.bfloat16
    few += ["--bf16", str(half).lower(), "--teacher_dtype", "bfloat16" if half else "float32"]
    begun = time.process_time()
    recipe = recipe_of(ARMS["kd, cached"][0], [*few, "--teacher_cache", cache])
    build(make_plan(recipe.parse()), Console(stderr=True))
    rows: list[dict[str, Any]] = [{"arm": "the cache", "steps": None, "tokens": None}]
    rows[0] |= {"CPU min": (time.process_time() - begun) / 60, "agreement": None, "KL": None, "perplexity": None}
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in ARMS}
    for count in steps:
        for name, (recipe, factor) in ARMS.items():
            place = ["--teacher_cache", cache] if "cached" in name else []
            one = trained(recipe, round(factor * count), args.seed, [*few, *place])
            assert one.cost is not None
            minutes, agreement = 60 * one.cost["hours"], one.metrics["top1_agreement"]
            curves[name].append((minutes, agreement))
            facts = {"agreement": agreement, "KL": one.metrics["kl"], "perplexity": one.metrics["perplexity"]}
            rows.append(
                {"arm": name, "steps": round(factor * count), "tokens": one.tokens, "CPU min": minutes, **facts}
            )
    rows.sort(key=lambda row: (["the cache", *ARMS].index(row["arm"]), row["steps"]))
    verdicts = []
    for name in () if args.quick else [name for name in ARMS if name != "sft"]:
        gains = [interpolated(curves["sft"], moment) / agreement for moment, agreement in curves[name]]
        verdicts.append(verdict(f"SFT's agreement over that of {name} in equal time, at most", max(gains), 1.0))
    report("b8_agreement", "cpu", {"held-out agreement with the teacher": rows}, verdicts, vars(args))


if __name__ == "__main__":
    main()
