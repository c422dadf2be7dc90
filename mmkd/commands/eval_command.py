"""`mmkd eval`: tasks and measurements of models, kept per model and printed side by side."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkd.errors import UserError

from .command import Command, add_trust

if TYPE_CHECKING:
    from mmkd.eval.harness import Settings


def add_flags(parser: ArgumentParser) -> None:
    """What to evaluate, on what, and how."""
    add = parser.add_argument
    add("models", nargs="+", metavar="RUN_OR_MODEL", help="a run's folder, another folder, or a Hub id")
    add("--suite", nargs="+", default=[], help="offline, open_llm, math, vlm, or the path of a suite's YAML")
    add("--tasks", nargs="+", default=[], help="tasks of lm-eval or mmkd by name or pattern (arc_*)")
    add("--include_path", nargs="+", default=[], help="folders with tasks of your own, in lm-eval's YAML")
    add(
        "--measures",
        nargs="*",
        help="also cost, generation, own_answers, bytes, acceptance, agreement, calibration (none named: all)",
    )
    add("--data", help="data on whose held-out rows is measured (default: that of the run)")
    add("--teacher", help="model to measure beside, a folder or a Hub id (default: the teacher of the run)")
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
    add_trust(parser)
    add("--output", type=Path, help="folder of the results (default: eval/ in the model's folder)")


def run(options: Namespace) -> int:
    """Evaluates models and prints the tables; 130 when interrupted."""
    from rich.console import Console

    from mmkd.eval import measures
    from mmkd.eval.evaluation import evaluate, show
    from mmkd.eval.model import ensemble_of, find_model
    from mmkd.eval.results import NAME
    from mmkd.eval.suites import suite_names, tasks_of
    from mmkd.publish.as_trained import as_trained

    hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    models = [find_model(name, **hub) for name in options.models]
    if options.ensemble:
        models = [ensemble_of(models)]
    if options.output is not None and len(models) > 1:
        raise UserError(
            "--output is the folder of one model's results; leave it out to evaluate several.", because="meaning"
        )
    tasks = tasks_of(options.suite, options.tasks)
    if not tasks and options.measures is None:
        raise UserError(f"Say what to evaluate: --suite {', '.join(suite_names())}, or --tasks, or --measures.")
    settings = _settings(options)
    held = None
    if options.data:
        held = measures.HeldOut(options.data, options.rows, max_new_tokens=options.max_new_tokens)
    teacher = find_model(options.teacher) if options.teacher else None
    scores, measured = {}, {}
    try:
        for model in models:
            scores[model.name] = evaluate(model, tasks, settings, options.output, options.include_path)
            if options.measures is not None:
                rows, beside = held, teacher
                if options.measures != ["cost"]:
                    rows, beside = as_trained(model, held, teacher, options.rows, options.max_new_tokens)
                measured[model.name] = measures.measure(
                    model, options.measures, rows, settings, beside, options.output
                )
    except KeyboardInterrupt:
        print("\nInterrupted. Finished tasks are kept: the same command goes on with the next one.", file=sys.stderr)
        return 130
    if tasks:
        show(scores, Console())
    for name, entries in measured.items():
        measures.show(name, entries, Console())
    for model in models:
        print(f"{(options.output or model.results_folder) / NAME}")
    return 0


def _settings(options: Namespace) -> "Settings":
    from mmkd.eval.harness import Settings

    return Settings(
        model_type=options.model_type,
        model_args=_model_args(options.model_args),
        dtype=options.dtype,
        batch_size=int(options.batch_size) if options.batch_size.isdigit() else options.batch_size,
        device=options.device,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        chat_template=options.chat_template,
        seed=options.seed,
    )


def _model_args(words: Sequence[str]) -> dict[str, Any]:
    """`key=value` words, values read as YAML. Raises UserError for other words."""
    import yaml

    pairs = [pair for word in words for pair in word.split(",") if pair]
    for pair in pairs:
        if "=" not in pair:
            raise UserError(f"--model_args has {pair!r}; write key=value.")
    return {key: yaml.safe_load(value) for key, _, value in (pair.partition("=") for pair in pairs)}


COMMAND = Command(
    "eval",
    "benchmarks of a run or any model, through lm-eval",
    run,
    add_flags,
    "Runs the tasks of a suite, or tasks by name, on one model or several. What is finished is kept under the run and "
    "not run again. eval/README.md says what the suites are.",
)
