"""The flags of the commands that have many."""

import argparse
from pathlib import Path


def add_eval_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `mmkd eval`."""
    add = parser.add_argument
    add("models", nargs="+", metavar="RUN_OR_MODEL", help="a run's folder, another folder, or a Hub id")
    add("--suite", nargs="+", default=[], help="offline, open_llm, math, vlm, or the path of a suite's YAML")
    add("--tasks", nargs="+", default=[], help="tasks of lm-eval or mmkd by name or pattern (arc_*)")
    add("--include_path", nargs="+", default=[], help="folders with tasks of your own, in lm-eval's YAML")
    add("--measures", nargs="*", help="also cost, generation, bytes, agreement, calibration (none named: all)")
    add("--data", help="data recipe on whose held-out rows is measured")
    add("--teacher", help="model to measure beside, a folder or a Hub id")
    add("--rows", type=int, default=64, help="held-out rows to measure on (default: 64)")
    add("--max_new_tokens", type=int, default=64, help="length of generations to measure (default: 64)")
    add("--ensemble", action="store_true", help="the models as one: the average of their log-probs")
    add("--model_type", default="auto", help="of lm-eval: hf, hf-multimodal, vllm, vllm-vlm, local-completions")
    add("--model_args", nargs="+", default=[], metavar="KEY=VALUE", help="further arguments of that model type")
    add(
        "--dtype",
        default="auto",
        help="type of the weights (default: as saved; float32 on a CPU without instructions for it)",
    )
    add("--batch_size", default="8", help="requests at a time, or auto (default: 8)")
    add("--device", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--limit", type=float, help="at most so many items of each task, or below 1 a share of them: to try out")
    add("--num_fewshot", type=int, help="examples before each question, instead of what the suite says")
    add("--chat_template", default="auto", help="auto: where the model has one and the task wants it; on; off")
    add("--seed", type=int, help="of few-shot examples and of sampling (default: lm-eval's own)")
    add("--revision", help="branch, tag or commit of a Hub id")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    add("--output", type=Path, help="folder of the results (default: eval/ in the model's folder)")


def add_compare_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `mmkd compare` beside the keys of recipes."""
    add = parser.add_argument
    add("recipes", nargs="+", metavar="RECIPE", help="recipes to compare, by name or path")
    add("--seeds", nargs="+", type=int, default=[0], help="each recipe is trained with each (default: 0)")
    add("--baseline", help="recipe of method sft, or none (default: the one given, else made of the first recipe)")
    add("--judge", help="recipe whose trainer evaluates all students (default: each one's own)")
    add("--suite", nargs="+", default=[], help="also evaluate all of them on a suite, as `mmkd eval` does")
    add("--tasks", nargs="+", default=[], help="also evaluate all of them on tasks, by name or pattern")
    add("--include_path", nargs="+", default=[], help="folders with tasks of your own, in lm-eval's YAML")
    add("--limit", type=float, help="at most so many items of each task, or below 1 a share of them")
    add("--output", type=Path, default=Path("runs/compare"), help="folder to write (default: runs/compare)")


def add_push_flags(parser: argparse.ArgumentParser) -> None:
    """Those of `mmkd push`."""
    add = parser.add_argument
    add("run_folder", metavar="RUN", help="output_dir of a finished training")
    add("--repo", required=True, metavar="ORG/NAME", help="the model repository to write")
    add("--public", action="store_true", help="everyone can read it (default: only you and your organisation)")
    add("--dry_run", action="store_true", help="write the folder that would be pushed, and push nothing")
    add("--output", type=Path, help="folder of --dry_run (default: push/ in the run's)")
    add("--collection", metavar="TITLE", help="put the student, and its teacher's cache, in this collection")
    add("--cache", metavar="ORG/NAME", help="the cache on the Hub (default: the recipe's teacher_cache)")
    add("--license", help="of the student (default: that of the models it began with)")
    add("--base_model", nargs="+", default=[], metavar="ORG/NAME", help="what the student's folder is on the Hub")
    add("--teacher", metavar="ORG/NAME", help="what the teacher's folder is on the Hub")
    add("--recipe", help="the recipe of a run that has no run.json")
    add("--comparison", type=Path, help="of `mmkd compare` (default: the run's, or one that names it)")
