"""`mmkd eval`: tasks and measurements of models, kept per model and printed side by side."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkd.errors import UserError

from .command import Command, add_trust

if TYPE_CHECKING:
    from mmkd.eval.class_measures import ClassifierModel
    from mmkd.eval.encoder_model import EncoderModel
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
        help="also cost, generation, own_answers, bytes, acceptance, agreement, calibration; of dual encoders "
        "recall, zero_shot, linear_probe; of classifiers of method dho classes (none named: all)",
    )
    add("--data", help="data on whose held-out rows is measured (default: that of the run)")
    add("--teacher", help="model to measure beside, a folder or a Hub id (default: the teacher of the run)")
    add("--rows", type=int, help="held-out rows to measure on (default: 64; of dual encoders and classifiers all)")
    add("--prompts", help="for zero_shot: clip_7, clip_80 or a file of templates (default: those of the data)")
    add("--unseen_classes", nargs="+", default=[], help="for zero_shot: classes to tell apart from those learnt")
    add("--max_new_tokens", type=int, default=64, help="length of generations to measure (default: 64)")
    add(
        "--exported",
        nargs="+",
        default=[],
        metavar="NAME_OR_FILE",
        help="what `mmkd export` made of the model, each by its own runtime: gguf-q4_k_m, a folder, a GGUF file; "
        "--measures compares it with the student itself",
    )
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

    if classifiers := _classifiers(options):
        return _measure_classifiers(options, classifiers)
    if encoders := _encoders(options):
        return _measure_encoders(options, encoders)
    if options.exported:
        return _evaluate_exported(options)
    rows_asked = 64 if options.rows is None else options.rows
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
        held = measures.HeldOut(options.data, rows_asked, max_new_tokens=options.max_new_tokens)
    teacher = find_model(options.teacher) if options.teacher else None
    scores, measured = {}, {}
    try:
        for model in models:
            scores[model.name] = evaluate(model, tasks, settings, options.output, options.include_path)
            if options.measures is not None:
                rows, beside = held, teacher
                if options.measures != ["cost"]:
                    rows, beside = as_trained(model, held, teacher, rows_asked, options.max_new_tokens)
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


def _evaluate_exported(options: Namespace) -> int:
    """Tasks and the comparison with the student of exported files."""
    from rich.console import Console

    from mmkd.eval.evaluation import evaluate, show
    from mmkd.eval.exported_lm import exported_model
    from mmkd.eval.model import find_model
    from mmkd.eval.suites import suite_names, tasks_of
    from mmkd.export.exported import find_exported
    from mmkd.publish.export_student import check_again
    from mmkd.publish.export_table import show_exported
    from mmkd.publish.student_to_export import ExportOptions

    if len(options.models) > 1 or options.ensemble:
        raise UserError(
            "--exported names files of one model; name one run, and leave --ensemble out.", because="meaning"
        )
    (name,) = options.models
    found = [find_exported(name, wanted) for wanted in options.exported]
    tasks = tasks_of(options.suite, options.tasks)
    if not tasks and options.measures is None:
        raise UserError(f"Say what to evaluate: --suite {', '.join(suite_names())}, or --tasks, or --measures.")
    plain, settings = find_model(name, trust_remote_code=options.trust_remote_code), _settings(options)
    scores = {}
    for each in found if tasks else ():
        model = exported_model(f"{name}, {each.name}", each, plain)
        scores[each.name] = evaluate(model, tasks, settings, options.output, options.include_path)
    if tasks:
        show(scores, Console())
    if options.measures is not None:
        rows = 64 if options.rows is None else options.rows
        chosen = ExportOptions(
            data=options.data,
            rows=rows,
            device=options.device or "cpu",
            trust_remote_code=options.trust_remote_code,
        )
        show_exported(None, check_again(name, found, chosen, lambda text: print(text, file=sys.stderr)))
    return 0


def _classifiers(options: Namespace) -> "list[ClassifierModel]":
    """The models as dual-head classifiers; empty for models of other kinds. Raises UserError for some of both."""
    from mmkd.eval.class_measures import CLASSES, find_classifier

    if options.suite or options.tasks or options.ensemble or options.measures is None:
        return []
    if options.measures and CLASSES not in options.measures:
        return []
    hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    models = [find_classifier(name, **hub) for name in options.models]
    found = [model for model in models if model is not None]
    if len(found) < len(models) and (found or CLASSES in options.measures):
        other = options.models[models.index(None)]
        raise UserError(
            f"{other} is no classifier of method dho, and measure {CLASSES} is of those. Evaluate it by itself, with "
            "other measures.",
            because="meaning",
        )
    if found and set(options.measures) - {CLASSES}:
        raise UserError(
            f"{options.models[0]} is a classifier, which has the measure {CLASSES} only; it writes no text.",
            because="meaning",
        )
    return found


def _measure_classifiers(options: Namespace, models: "Sequence[ClassifierModel]") -> int:
    from rich.console import Console

    from mmkd.eval.class_measures import ClassesToMeasure, measure_classifier
    from mmkd.eval.evaluation import show
    from mmkd.eval.results import NAME
    from mmkd.publish.as_trained import class_teacher_as_trained, data_as_trained

    if options.output is not None and len(models) > 1:
        raise UserError(
            "--output is the folder of one model's results; leave it out to evaluate several.", because="meaning"
        )
    if options.unseen_classes:
        raise UserError(
            "--unseen_classes is for dual encoders: those of a classifier are the classes of the data that it does "
            "not know. Remove it.",
            because="meaning",
        )
    scores = {}
    for model in models:
        data, teacher = options.data or data_as_trained(model), options.teacher or class_teacher_as_trained(model)
        on = ClassesToMeasure(data, teacher, options.rows, options.prompts)
        scores[model.name] = measure_classifier(model, on, _settings(options), options.output)
    show(scores, Console())
    for model in models:
        print(f"{(options.output or model.results_folder) / NAME}")
    return 0


def _encoders(options: Namespace) -> "list[EncoderModel]":
    """The models as dual encoders; empty for models that write. Raises UserError for some of both kinds."""
    from mmkd.eval.encoder_measures import ENCODER_MEASURES
    from mmkd.eval.encoder_model import find_encoder, is_encoder

    asked = set(options.measures or []) & {*ENCODER_MEASURES}
    if options.suite or options.tasks or options.ensemble or options.measures is None:
        for flag in ("prompts", "unseen_classes"):
            if getattr(options, flag):
                raise UserError(f"--{flag} is of --measures zero_shot, which is not asked for.", because="meaning")
        return []
    hub = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
    if not asked and options.measures:
        return []
    models = [find_encoder(name, **hub) for name in options.models]
    writing = [model.name for model in models if model.kind != "open_clip" and not is_encoder(model)]
    if asked and writing:
        raise UserError(
            f"{writing[0]} is no dual encoder, and {', '.join(sorted(asked))} compares images with texts. Name a "
            "model such as CLIP or SigLIP.",
            because="meaning",
        )
    if writing and len(writing) < len(models):
        raise UserError(
            f"{writing[0]} writes and other models are dual encoders, which have no measure in common. Evaluate them "
            "one by one.",
            because="meaning",
        )
    return [] if writing else models


def _measure_encoders(options: Namespace, models: "Sequence[EncoderModel]") -> int:
    from rich.console import Console

    from mmkd.eval.encoder_measures import EncoderData, measure_encoder
    from mmkd.eval.evaluation import show
    from mmkd.eval.results import NAME
    from mmkd.publish.as_trained import data_as_trained

    if options.output is not None and len(models) > 1:
        raise UserError(
            "--output is the folder of one model's results; leave it out to evaluate several.", because="meaning"
        )
    scores = {}
    for model in models:
        data = options.data or data_as_trained(model)
        on = EncoderData(data, options.rows, options.prompts, tuple(options.unseen_classes))
        scores[model.name] = measure_encoder(model, options.measures, on, _settings(options), options.output)
    show(scores, Console())
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
