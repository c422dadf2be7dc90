"""The card of a distilled student: its origin, its results, and the requirements of licences."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from mmkd import __version__
from mmkd.cache.cache_card import hub_license
from mmkd.export.exported import WEIGHTS, Exported
from mmkd.results.markdown_text import cell, code, fenced, said
from mmkd.results.scores import is_partial, items_of
from mmkd.results.tables import markdown
from mmkd.training.method import BASELINE_METHOD

from .export_table import markdown_of
from .licences import LicensedSource

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Student:
    """The content of the card of a student."""

    repo_id: str
    methods: Sequence[str]
    """The methods of all its trainings."""
    pipeline_tag: str
    adapter: bool
    parameters: int
    base: Sequence[LicensedSource]
    teachers: Sequence[LicensedSource]
    data: Sequence[LicensedSource]
    datasets: Sequence[str]
    """Hub ids of the data."""
    license: str | None
    recipe: Mapping[str, Any]
    scores: Sequence[Mapping[str, Any]]
    """The scores of benchmarks, as `mmkd eval` stores them."""
    held_out: Mapping[str, float]
    """Metric -> value on the held-out rows of the last training's data."""
    held_out_data: str
    """The name of that data's recipe."""
    held_out_id: str | None
    """Its Hub id, or None."""
    comparison: Mapping[str, Any] | None
    machine: Mapping[str, Any]
    tokens: Sequence[int]
    """The supervised tokens of each of its trainings, in order; 0 if they are not counted."""
    earlier: Sequence[Mapping[str, Any]] = ()
    """The recipes of earlier trainings."""
    warnings: Sequence[str] = ()
    own_forms: Sequence[str] = ()
    """As what it taught itself, for a reader."""
    cautions: Sequence[str] = ()
    """Sentences about how it was trained that its users should know."""
    trained_as: str = ""
    """As what it was trained with quantised values, for a reader; empty: in the precision of its weights."""
    exported: Sequence[Exported] = ()
    """The same student in formats of other runtimes, which are published with it."""
    answers: Sequence[str] = ()
    """Of each data set of a teacher's answers, how many were kept and how they were chosen."""


def is_hub_id(name: str) -> bool:
    """Whether a name may stand in a card's `base_model` or `datasets`."""
    return _HUB_ID.fullmatch(name) is not None


def model_card(student: Student) -> ModelCard:
    """The card (Markdown with a YAML header). Its `model-index` and `base_model` are those of the student."""
    base = [source.name for source in student.base if is_hub_id(source.name)]
    results = eval_results(student)
    header = ModelCardData(
        **hub_license(student.license),
        library_name=_library(student),
        pipeline_tag=student.pipeline_tag,
        base_model=base[0] if len(base) == 1 else base or None,
        base_model_relation="adapter" if student.adapter else "finetune" if base else None,
        datasets=list(student.datasets) or None,
        tags=["mmkd", "distillation", *student.methods],
        model_name=student.repo_id.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        header,
        template_str=files("mmkd.publish").joinpath("model_card.md").read_text(encoding="utf-8"),
        title=student.repo_id.rpartition("/")[2],
        summary=_summary(student),
        usage=_usage(student),
        lineage={name: cell(value) for name, value in _lineage(student).items()},
        results=_results(student),
        exported=_exported(student),
        recipe=fenced(yaml.safe_dump(dict(student.recipe), sort_keys=False, allow_unicode=True), "yaml"),
        training=_training(student),
        licences=[(role, said(name), said(licence)) for role, name, licence in _licences(student)],
        warnings=[cell(warning) for warning in student.warnings],
        limitations=_limitations(student),
    )
    assert isinstance(card, ModelCard)
    return card


def eval_results(student: Student) -> list[EvalResult]:
    """The results for the Hub's `model-index`: of complete tasks only, the last result of each."""
    whole = {(score["task"], score["metric"]): score for score in student.scores if not is_partial(score)}
    results = [
        EvalResult(
            task_type=student.pipeline_tag,
            dataset_type=score["task"],
            dataset_name=score["task"],
            metric_type=score["metric"].partition(",")[0],
            metric_name=score["metric"].removesuffix(",none"),
            metric_value=score["value"],
        )
        for score in whole.values()
    ]
    results += [
        EvalResult(
            task_type=student.pipeline_tag,
            dataset_type=student.held_out_id or student.held_out_data,
            dataset_name=f"{student.held_out_data}, held-out rows",
            # Without a split, the Hub's client merges it with a benchmark of the same name.
            dataset_split="eval",
            metric_type=name,
            metric_value=value,
        )
        for name, value in student.held_out.items()
    ]
    return results


def _library(student: Student) -> str:
    """The package that loads the student."""
    if student.adapter:
        return "peft"
    return "sentence-transformers" if student.pipeline_tag == "sentence-similarity" else "transformers"


def _summary(student: Student) -> str:
    taught = f" from {_taught_by(student)}" if _taught_by(student) else ""
    baseline = list(student.methods) == [BASELINE_METHOD]
    subject = "A baseline, fine-tuned" if baseline else f"A student, distilled{taught}"
    start = f", starting at {_names(student.base)}" if student.base else ", starting at random weights"
    millions = student.parameters / 1e6
    size = "" if student.adapter else f" It has {millions:{',.1f' if millions >= 1 else '.2g'}} million parameters."
    methods = " and ".join(f"`{method}`" for method in student.methods)
    return f"{subject} with {methods} of mmkd {__version__}{start}.{size}"


def _names(sources: Sequence[LicensedSource]) -> str:
    return " and ".join(code(source.name) for source in sources)


def _taught_by(student: Student) -> str:
    """Its teachers, itself among them; empty if there are none."""
    return " and ".join([*(code(source.name) for source in student.teachers), *student.own_forms])


def _own_prompts(recipes: Sequence[Mapping[str, Any]]) -> str:
    """What teachers read in the place of the student's prompt, by recipes; empty if they read that."""
    taught = [recipe for recipe in recipes if recipe.get("method") != BASELINE_METHOD]
    parts = [recipe.get(name) for recipe in taught for name in ("teachers", "stages")]
    keys = [*taught, *(own for part in parts if isinstance(part, Mapping) for own in part.values())]
    views = [own["teacher_view"] for own in keys if isinstance(own, Mapping) and own.get("teacher_view")]
    shown = [view if isinstance(view, str) else json.dumps(view, ensure_ascii=False) for view in views]
    return " and ".join(code(view) for view in dict.fromkeys(shown))


def _usage(student: Student) -> str:
    if student.pipeline_tag == "text-generation":
        classes, loader = "AutoModelForCausalLM, AutoTokenizer", "tokenizer = AutoTokenizer"
    elif student.pipeline_tag == "image-text-to-text":
        classes, loader = "AutoModelForImageTextToText, AutoProcessor", "processor = AutoProcessor"
    elif student.pipeline_tag == "image-feature-extraction":
        classes, loader = "AutoModel, AutoImageProcessor", "processor = AutoImageProcessor"
    elif student.pipeline_tag == "zero-shot-image-classification":
        classes, loader = "AutoModel, AutoProcessor", "processor = AutoProcessor"
    elif student.pipeline_tag == "sentence-similarity":
        line = f'model = SentenceTransformer("{student.repo_id}")'
        return f"```python\nfrom sentence_transformers import SentenceTransformer\n\n{line}\n```"
    else:
        line = f'classify = pipeline("{student.pipeline_tag}", model="{student.repo_id}")'
        imports = "import mmkd  # makes its dual head known to transformers\nfrom transformers import pipeline"
        return f"```python\n{imports}\n\n{line}\n```"
    model = f'model = {classes.partition(",")[0]}.from_pretrained("{student.repo_id}")'
    also = "It is an adapter: `pip install peft` too.\n\n" if student.adapter else ""
    if student.trained_as:
        also += (
            f"It was trained as {student.trained_as}, and its results are those of that. Loaded as below it computes "
            "with its weights in full precision, which is another model: quantise it in the same format.\n\n"
        )
    code = f'from transformers import {classes}\n\n{model}\n{loader}.from_pretrained("{student.repo_id}")'
    return f"{also}```python\n{code}\n```"


def _lineage(student: Student) -> dict[str, str]:
    prompts = _own_prompts([*student.earlier, student.recipe])
    return {
        "Base model": _names(student.base) or "none: random weights",
        **({"Teacher": _taught_by(student)} if _taught_by(student) else {}),
        **({"The teacher's own prompt": prompts} if prompts else {}),
        "Methods": ", ".join(f"`{method}`" for method in student.methods),
        **({"Trained as": student.trained_as} if student.trained_as else {}),
        "Data": _names(student.data),
        **({"Answers it learnt from": " ".join(student.answers)} if student.answers else {}),
        "Made with": f"mmkd {student.machine.get('mmkd', __version__)}",
    }


def _results(student: Student) -> str:
    parts = []
    if student.comparison is not None:
        parts.append(markdown(student.comparison).strip())
    elif student.held_out:
        lines = "\n".join(f"| {name} | {value:.4f} |" for name, value in student.held_out.items())
        parts.append(f"On held-out rows of {code(student.held_out_data)}:\n\n| metric | value |\n|---|---|\n{lines}")
    if student.scores:
        lines = "\n".join(_score(score) for score in student.scores)
        parts.append(f"Benchmarks, by `mmkd eval`:\n\n| task | metric | items | value |\n|---|---|---|---|\n{lines}")
    return "\n\n".join(parts) or "Not measured: `mmkd eval` and `mmkd compare` do that."


def _exported(student: Student) -> str:
    """The files for other runtimes, how each differs from the student, and their checksums; empty without any."""
    if not student.exported:
        return ""
    checked = [each for each in student.exported if "kl" in each.check]
    text = "How each file differs from the student, by the runtime that reads it"
    if checked:
        first = checked[0].check
        where = code(Path(str(checked[0].record["conditions"]["data"])).name)
        text += f", on {first['tokens']:,} tokens of {first['rows']} held-out rows of {where}: KL is "
        text += f"in nats per token, and the student's perplexity is {first['student_perplexity']:.4g} there"
    warnings = [f"- {each.name}: {note}" for each in student.exported for note in each.remarks]
    sums = [
        f"| `exported/{each.name}/{name}` | `{facts['sha256']}` |"
        for each in student.exported
        for name, facts in each.record["files"].items()
        if name.endswith(WEIGHTS)
    ]
    parts = [f"{text}.", markdown_of(student.exported), "\n".join(warnings)]
    parts += ["| file | sha256 |\n|---|---|\n" + "\n".join(sums)]
    return "\n\n".join(part for part in parts if part)


def _score(score: Mapping[str, Any]) -> str:
    sign = "↑" if score["higher_is_better"] else "↓"
    spread = f" ± {score['stderr']:.4f}" if score["stderr"] is not None else ""
    metric = score["metric"].removesuffix(",none")
    return f"| {score['task']} | {metric} {sign} | {items_of(score)} | {score['value']:.4f}{spread} |"


def _training(student: Student) -> str:
    versions = ", ".join(f"{name} {installed}" for name, installed in student.machine.get("versions", {}).items())
    names = ", ".join(f"`training/recipe-{number}.yaml`" for number in range(1, len(student.earlier) + 1))
    before = f"Before it, in this order: {names}. " if names else ""
    whole, last = sum(student.tokens), student.tokens[-1] if student.tokens else 0
    share = f", {last:,} of them in the last training" if last != whole else ""
    seen = f"It saw {whole:,} supervised tokens{share}. " if whole else ""
    return f"{before}{seen}Versions: {versions or 'not recorded'}."


def _licences(student: Student) -> list[tuple[str, str, str]]:
    rows = [("this student", student.repo_id, student.license or "not stated")]
    rows += [("base model", source.name, source.license or "not stated") for source in student.base]
    rows += [("teacher", source.name, source.license or "not stated") for source in student.teachers]
    return rows + [("data", source.name, source.license or "not stated") for source in student.data]


def _limitations(student: Student) -> str:
    sentences = [
        "A student inherits its teacher's errors and biases, and those of its data, and knows less than its teacher."
        if student.teachers
        else "A student that taught itself keeps the errors and biases that it had, and takes on those of its data."
        if student.own_forms
        else "The model has the errors and biases of its data.",
        "It was measured on nothing but what stands above, and not for safety."
        if student.scores or student.held_out or student.comparison
        else "It was not measured.",
    ]
    length = student.recipe.get("max_length")
    if length:
        sentences.append(f"It was trained on sequences of at most {length:,} tokens.")
    seeds = (student.comparison or {}).get("seeds", [])
    if student.comparison is not None and len(seeds) < 5:
        number = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
        sentences.append(f"The comparison has {number}: it says little about other seeds.")
    return " ".join([*sentences, *student.cautions])
