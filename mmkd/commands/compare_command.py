"""`mmkd compare`: was distillation worth it?"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from .command import Command

if TYPE_CHECKING:
    from mmkd.eval.compare import Asked
    from mmkd.recipe.recipe import Recipe


def add_flags(parser: ArgumentParser) -> None:
    """Those that are no keys of the recipes."""
    add = parser.add_argument
    add("recipes", nargs="+", metavar="RECIPE", help="recipes to compare, by name or path")
    add("--seeds", nargs="+", type=int, default=[0], help="each recipe is trained with each (default: 0)")
    add("--baseline", help="recipe that distils nothing, or none (default: the one given, else made of the first)")
    add("--controls", nargs="+", default=[], help="also train a method's own controls; its card says which there are")
    add(
        "--schedules",
        nargs="+",
        default=[],
        metavar="STAGE-STAGE[:KEY=VALUE,...]",
        help="compare these schedules of a recipe in stages; keys are for all stages that distil (beta=0) or for one "
        "(DFT.beta=0)",
    )
    add(
        "--test",
        type=Path,
        help="file of questions whose answers are measured; look at it last. Recipes in stages or rounds are asked "
        "the held-out rows of their data without it",
    )
    add("--max_questions", type=int, help="ask at most so many (default: all)")
    add(
        "--equal",
        choices=("steps", "time"),
        default="steps",
        help="what all trainings have as much of: the steps of their recipes, or the time of the training that takes "
        "most. Time is that of the steps, of all cores or GPUs; the first seed is trained once to measure it "
        "(default: steps)",
    )
    add(
        "--own_answers",
        type=int,
        metavar="N",
        help="also measure what students say themselves: sampled answers to N held-out prompts, which the teacher "
        "reads (default: not measured)",
    )
    add("--judge", help="recipe whose trainer evaluates all students (default: each one's own)")
    add("--suite", nargs="+", default=[], help="also evaluate all of them on a suite, as `mmkd eval` does")
    add("--tasks", nargs="+", default=[], help="also evaluate all of them on tasks, by name or pattern")
    add("--include_path", nargs="+", default=[], help="folders with tasks of your own, in lm-eval's YAML")
    add("--limit", type=float, help="at most so many items of each task, or below 1 a share of them")
    add("--batch_size", type=int, default=8, help="questions of tasks that are asked at a time (default: 8)")
    add(
        "--exported",
        nargs="+",
        default=[],
        metavar="FORMAT[:QUANTIZATION]",
        help="also export every trained student as `mmkd export` does, with a row for each format: gguf:q4_k_m",
    )
    add("--exported_rows", type=int, default=32, help="held-out rows on which exports are checked (default: 32)")
    add("--output", type=Path, default=Path("runs/compare"), help="folder to write (default: runs/compare)")


def run(options: Namespace) -> int:
    """Trains, evaluates and prints; returns 130 when interrupted, after which the same command goes on."""
    from mmkd.eval.compare import Asked
    from mmkd.eval.harness import Settings
    from mmkd.eval.suites import tasks_of
    from mmkd.export.formats import specs_of
    from mmkd.recipe.flags import recipe_of

    # A format that does not exist is said before hours of training.
    specs_of(options.exported, [])
    recipes = [recipe_of(name, options.flags) for name in options.recipes]
    baseline = options.baseline
    asked = Asked(
        judge=None if options.judge is None else recipe_of(options.judge, options.flags),
        baseline=baseline if baseline in (None, "none") else recipe_of(baseline, options.flags),
        controls=options.controls,
        schedules=options.schedules,
        test=options.test,
        max_questions=options.max_questions,
        equal=options.equal,
        own_answers=options.own_answers,
        tasks=tasks_of(options.suite, options.tasks),
        include=options.include_path,
        settings=Settings(
            batch_size=options.batch_size,
            device="cpu" if recipes[0].keys.get("use_cpu") else None,
            limit=options.limit,
        ),
    )
    status = _compare(recipes, options.seeds, options.output, asked)
    return _export(options) if options.exported and status == 0 else status


def _export(options: Namespace) -> int:
    """Exports the students of a comparison, and adds a row for each format."""
    import json
    import sys

    from mmkd.eval.compare import NAME, PAGE
    from mmkd.export.formats import specs_of
    from mmkd.publish.compared_exports import add_to_comparison, compare_exported, show_compared
    from mmkd.publish.student_to_export import ExportOptions

    comparison = json.loads((options.output / NAME).read_text(encoding="utf-8"))
    chosen = ExportOptions(rows=options.exported_rows)
    lines = compare_exported(
        comparison, specs_of(options.exported, []), chosen, lambda text: print(text, file=sys.stderr)
    )
    add_to_comparison(lines, options.output / NAME, options.output / PAGE)
    show_compared(lines)
    return 0


def with_baseline(recipe: "Recipe") -> int:
    """`mmkd-train RECIPE --with_baseline`: the comparison of one recipe, with its own seed, under its output_dir."""
    training = recipe.parse().training
    return _compare([recipe], [training.seed], Path(training.output_dir or "runs/compare"))


def _compare(recipes: "list[Recipe]", seeds: list[int], output: Path, asked: "Asked | None" = None) -> int:
    import importlib.util

    from mmkd.eval.compare import NAME, PAGE, compare
    from mmkd.eval.compare_progress import LOG_NAME, quiet
    from mmkd.publish.report_page import write_report
    from mmkd.results.tables import show, table_console

    from .train import train

    known = set(output.glob("measured/*"))
    try:
        comparison = compare(recipes, seeds, output, train, asked)
    except KeyboardInterrupt:
        print("\nInterrupted. Finished trainings are kept: the same command goes on with the next one.")
        return 130
    show(comparison, table_console())
    for name in (NAME, PAGE, *([comparison["picture"]] if "picture" in comparison else [])):
        print(output / name)
    # A comparison of hours ends well without a package that draws.
    if set(output.glob("measured/*")) > known and importlib.util.find_spec("matplotlib") is not None:
        with quiet(output / LOG_NAME):
            page, _ = write_report(output)
        print(f"The report, with curves and samples: {page}")
    else:
        print(f"`mmkd report {output}` makes a page of it, with curves and samples.")
    return 0


COMMAND = Command(
    "compare",
    "train recipes and their SFT baseline over seeds; say whether distillation was worth it",
    run,
    add_flags,
    "Trains recipes and a baseline without a teacher for as many steps, measures them with the teacher, and writes "
    "OUTPUT/comparison.json, .md and a report. Recipes may be of one training, in stages, in rounds (comd) or of "
    "classes (dho). Every key of the recipes is a flag. What is finished is kept: the same command goes on.",
    recipe="recipes",
    # Or --seed, which is a recipe's key, would be read as --seeds.
    allow_abbrev=False,
)
