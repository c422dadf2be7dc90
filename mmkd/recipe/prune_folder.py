"""`mmkd prune`: a student that is cut out of a model, saved with a report of what went and why."""

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from rich.console import Console
from transformers import PreTrainedModel

from mmkd.errors import UserError
from mmkd.files import new_folder, write_file
from mmkd.models.parts import part_of
from mmkd.models.prune_axes import GROUPS, VISION
from mmkd.models.prune_calibration import Batches, perplexity
from mmkd.shipped import find_recipe

from .calibration_rows import calibration_batches, has_rows
from .flags import recipe_of
from .recipe import Recipe, Run
from .run_models import load_teacher, pruned_student, saved_student, student_processing_class
from .run_pruning import Pruning

REPORT, PAGE = "prune_report.json", "prune_report.md"
"""What is written beside the weights."""

_MEASURED = 128
"""Held-out rows on which perplexity is measured."""

_NAMES = {"queries": "attention heads", "groups": "key/value heads", "hidden": "channels of the hidden state"}
_NAMES |= {"ffn": "FFN neurons", "experts": "experts", "expert_ffn": "neurons of experts"}


_LAYERS = {
    "even": "number, evenly spread, or as the recipe lists them",
    "block_influence": "block influence: 1 - the cosine of a layer's input and output",
    "loss": "the rise of the loss without each of them",
}


def prune_recipe(name: str, flags: Sequence[str]) -> Recipe:
    """The recipe that makes the student: a recipe's, or that of a model's name and the flags after it."""
    try:
        find_recipe(name)
    except UserError:
        if name.endswith((".yaml", ".yml")):
            raise
    else:
        return recipe_of(name, flags)
    keys = {"method": "sft", "student": name, "student_init": "prune", "dtype": "auto", "output_dir": "."}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "prune.yaml"
        path.write_text(yaml.safe_dump(keys), encoding="utf-8")
        return recipe_of(path, flags)


def prune_folder(recipe: Recipe, output: str, console: Console) -> dict[str, Any]:
    """Writes the student that a recipe begins with to a folder, and returns what its report says.

    Raises UserError for a recipe that prunes nothing, and if the folder exists.
    """
    folder = Path(output)
    if folder.exists():
        raise UserError(f"{folder} exists already. Name another folder, or delete it first.")
    if recipe.keys.get("data") is None:
        raise UserError(
            "Importance and perplexity are measured on rows: name them with --data FILE, such as --data texts.txt."
        )
    with new_folder(folder) as scratch:
        run = recipe.with_(output_dir=str(scratch)).parse()
        if run.arguments.student_init != "prune":
            raise UserError(
                f"{recipe.name} prunes nothing: its student_init is {run.arguments.student_init}. Set --student_init "
                "prune and the sizes to keep.",
                because="meaning",
            )
        source = saved_student(run) if run.arguments.student is not None else _teacher(run)
        source.eval()
        pruning, student = pruned_student(run, source)
        held_out = _held_out(run)
        console.print("Measuring perplexity before any training ...")
        report = _report(run, source, student.eval(), pruning, held_out)
        student.save_pretrained(scratch)
        student_processing_class(run).save_pretrained(scratch)
        write_file(scratch / REPORT, json.dumps(report, indent=1))
        write_file(scratch / PAGE, page_of(report))
    for line in summary_lines(report, folder):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return report


def _teacher(run: Run) -> PreTrainedModel:
    assert run.arguments.teacher is not None
    return load_teacher(run, run.arguments.teacher)


def _held_out(run: Run) -> Batches:
    """Rows that are held out from training; none where the data hold none."""
    if not has_rows(run, "eval"):
        return []
    return calibration_batches(run, student_processing_class(run), _MEASURED, "eval")


def _report(
    run: Run, source: PreTrainedModel, student: PreTrainedModel, pruning: Pruning, held_out: Batches
) -> dict[str, Any]:
    arguments = run.arguments
    by_data = arguments.prune_importance != "weights" or arguments.ranks_layers
    report: dict[str, Any] = {
        "source": arguments.student or arguments.teacher,
        "data": arguments.data,
        "importance": arguments.prune_importance,
        "layer_importance": arguments.prune_layer_importance,
        "calibration_rows": arguments.prune_calibration_rows if by_data else 0,
        "sizes": {name: _plain(value) for name, value in pruning.cut.sizes.given.items()},
        "parameters": {"before": parameters_of_parts(source), "after": parameters_of_parts(student)},
        "layers": _layers(pruning),
        "units": _units(pruning),
        "candidates": pruning.candidates,
    }
    if held_out:
        tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in held_out)
        values = [perplexity(model.to(run.training.device), held_out) for model in (source, student)]  # pyright: ignore
        report["perplexity"] = {"before": values[0], "after": values[1], "tokens": tokens}
    return report


def parameters_of_parts(model: PreTrainedModel) -> dict[str, int]:
    """The parameters of a model in all, and of each part of a vision-language model."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    return {"all": sum(counts.values()), **(counts if len(counts) > 1 else {})}


def _layers(pruning: Pruning) -> dict[str, Any]:
    """Of each part whose layers were cut: which are kept, which are gone, and the scores of all."""
    layers: dict[str, Any] = {}
    for part in pruning.cut.axes.parts:
        kept = pruning.cut.layers[part.mark]
        if len(kept) == part.depth:
            continue
        entry: dict[str, Any] = {"kept": kept, "removed": [i for i in range(part.depth) if i not in kept]}
        scores = None if pruning.scores is None else pruning.scores.layers.get(part.mark)
        if scores is not None:
            entry["scores"] = [round(value, 6) for value in scores.tolist()]
        layers["vision" if part.mark else "text"] = entry
    return layers


def _units(pruning: Pruning) -> list[dict[str, Any]]:
    """Of each place whose units were cut: how many there were, which are kept, and their share of the scores."""
    cut, entries = pruning.cut, []
    for (kind, layer), kept in cut.units.items():
        plain, mark = kind.removeprefix(VISION), VISION if kind.startswith(VISION) else ""
        total = cut.axes.part(mark).size(cut.axes.config, plain)
        if total is None or kept.shape[-1] == total or plain == GROUPS:
            continue
        entry: dict[str, Any] = {"kind": kind, "layer": layer, "before": total, "kept": kept.tolist()}
        scores = cut.scores.units.get((kind, layer))
        if scores is not None:
            taken = scores.cpu().gather(-1, kept)
            entry["importance_kept"] = round(float(taken.sum() / scores.sum().clamp(min=1e-30)), 6)
            entry["scores"] = scores.float().tolist()
        entries.append(entry)
    return entries


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) else value


def summary_lines(report: dict[str, Any], folder: Path) -> list[str]:
    """What a report says, in lines."""
    counts = report["parameters"]
    before, after = counts["before"]["all"], counts["after"]["all"]
    lines = [f"Parameters: {before:,} -> {after:,} ({1 - after / before:.1%} fewer)."]
    if "perplexity" in report:
        values = report["perplexity"]
        lines.append(
            f"Perplexity on {values['tokens']:,} held-out tokens: {values['before']:,.2f} -> {values['after']:,.2f} "
            "before any training."
        )
    else:
        lines.append("The data hold no held-out rows, so that perplexity was not measured.")
    return [*lines, f"{folder} loads in plain transformers. {folder / PAGE} says what was removed."]


def page_of(report: dict[str, Any]) -> str:
    """The report for readers, in Markdown."""
    how = {
        "weights": "the magnitude of weights, without data",
        "activations": "activations on calibration rows (Minitron)",
        "gradients": "|weight x gradient| of the loss on calibration rows",
    }[report["importance"]]
    lines = [f"# Pruned from {report['source']}", ""]
    if report["units"]:
        lines.append(f"- Units are chosen by {how}.")
    if report["layers"]:
        lines.append(f"- Layers are chosen by {_LAYERS[report['layer_importance']]}.")
    if report["calibration_rows"]:
        lines.append(f"- Calibration: {report['calibration_rows']} training rows of {report['data']}.")
    lines += ["", "| | before | after |", "|---|---|---|"]
    counts = report["parameters"]
    for name in counts["before"]:
        title = "parameters" if name == "all" else f"parameters, {name.replace('_', ' ')}"
        lines.append(f"| {title} | {counts['before'][name]:,} | {counts['after'].get(name, 0):,} |")
    if "perplexity" in report:
        values = report["perplexity"]
        lines.append(f"| perplexity, before training | {values['before']:,.2f} | {values['after']:,.2f} |")
    for part, entry in report["layers"].items():
        lines += ["", f"## Layers of the {'vision tower' if part == 'vision' else 'language model'}", ""]
        lines += [f"Kept: {entry['kept']}. Removed: {entry['removed']}.", ""]
        if "scores" in entry:
            lines += ["| layer | score | |", "|---|---|---|"]
            for number, score in enumerate(entry["scores"]):
                lines.append(f"| {number} | {score:.4f} | {'kept' if number in entry['kept'] else 'removed'} |")
    lines += _unit_lines(report["units"])
    if report["candidates"]:
        names = list(dict.fromkeys(name for each in report["candidates"] for name in each))
        lines += ["", "## Candidates", "", f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
        lines += [f"| {' | '.join(str(each.get(name, '')) for name in names)} |" for each in report["candidates"]]
        lines += ["", "The first was taken."]
    return "\n".join(lines) + "\n"


def _unit_lines(units: list[dict[str, Any]]) -> list[str]:
    if not units:
        return []
    lines = [
        "",
        "## Units",
        "",
        "| what | layer | before | kept | share of importance kept |",
        "|---|---|---|---|---|",
    ]
    for entry in units:
        vision = entry["kind"].startswith(VISION)
        name = _NAMES[entry["kind"].removeprefix(VISION)] + (" (vision)" if vision else "")
        kept = entry["kept"][0] if isinstance(entry["kept"][0], list) else entry["kept"]
        share = f"{entry['importance_kept']:.1%}" if "importance_kept" in entry else ""
        layer = "all" if entry["layer"] is None else entry["layer"]
        lines.append(f"| {name} | {layer} | {entry['before']:,} | {len(kept):,} | {share} |")
    return [*lines, "", f"`{REPORT}` has the scores of all units, and which are kept."]
