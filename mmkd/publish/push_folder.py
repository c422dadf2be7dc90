"""The published folder of a finished run: weights, processor, recipe, results and card."""

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard
from safetensors import safe_open

from mmkd.errors import UserError
from mmkd.eval.model import EvalModel, find_model
from mmkd.export.exported import FOLDER, Exported, find_exported
from mmkd.export.exported import RECORD as DESCRIPTION
from mmkd.models.adapters import merge_adapter
from mmkd.recipe.recipe import Recipe
from mmkd.recipe.run_record import data_facts
from mmkd.results.adapter_base import MERGED
from mmkd.results.scores import scores_of
from mmkd.results.trained_as import FILE
from mmkd.schema_lines import without_schema_line
from mmkd.training.guard_settings import warnings_of
from mmkd.training.method import METHODS

from .licences import conflicts
from .lineage import (
    bases_of,
    data_ids,
    data_sources,
    kept_answers,
    own_forms_of,
    portable,
    source_of,
    teachers_of,
    trainings_of,
)
from .model_card import Student, model_card
from .runs import COMPARISON, RECORD, Log, comparison_of, parts_of, read_json, read_log, record_of, stages_of

MODEL_FILES = ("*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json")
MODEL_FILES += ("adapter_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*")
MODEL_FILES += ("modules.json", "config_sentence_transformers.json", "sentence_bert_config.json")
MODEL_FILES += ("merges.txt", "*.model", "chat_template*", "*processor*.json", "interpolation.json", "*.py")
MODEL_FILES += (FILE,)
"""The files of a run's folder that are published; optimizer states, pickles and logs are not."""

RECIPE, LOG, SCORES = "training/recipe.yaml", "training/log.jsonl", "eval/scores.json"

# The metrics of the trainer's evaluation that a card shows.
_HELD_OUT = ("perplexity", "kl", "top1_agreement", "bits_per_byte", "chunk_gap", "accuracy", "loss")
_HELD_OUT += ("image_to_text_recall", "text_to_image_recall")
_OF_EACH_TEACHER = ("patch_cosine", "summary_cosine")
"""Metrics of which a training with several teachers has one for each, as METRIC_TEACHER."""


@dataclass(frozen=True)
class PushOptions:
    """The options of `mmkd push`."""

    repo_id: str
    license: str | None = None
    base_model: Sequence[str] = ()
    """Hub ids of the models from which the student started, if these are local folders."""
    teacher: str | None = None
    """Hub id of the teacher, if it is a local folder."""
    recipe: str | None = None
    """Name or path of the recipe, for runs without a record."""
    comparison: Path | None = None
    exported: Sequence[str] = ()
    """Exported students that are published too, by name or place."""


@dataclass(frozen=True)
class Published:
    """The published form of a run."""

    student: Student
    model_folder: Path
    files: list[Path]
    """The files of the model; of an adapter that is published merged into its model, none."""
    log: Log
    card: ModelCard
    keys: dict[str, Any] = field(default_factory=dict)
    """The keys of the recipe, with local paths."""
    exported: Sequence[Exported] = ()

    def write(self, folder: Path) -> None:
        """Writes all files to a folder. Raises UserError if the folder is not empty."""
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"{folder} is not empty. Name another --output, or delete it.")
        self.write_texts(folder)
        with self.model_files() as files:
            for path, place in [*((path, place_in_repository(path)) for path in files), *self.exported_files()]:
                target = folder / place
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)

    def exported_files(self) -> list[tuple[Path, str]]:
        """The files of exported students, with their places in the repository; what describes them is a text."""
        return [
            (each.folder / name, f"{FOLDER}/{each.name}/{name}")
            for each in self.exported
            for name in each.record["files"]
        ]

    @contextmanager
    def model_files(self) -> Iterator[list[Path]]:
        """The files of the model; an adapter that nobody could load is merged into its model, in a folder for now."""
        if self.files:
            yield self.files
            return
        with tempfile.TemporaryDirectory() as scratch:
            merge_adapter(self.model_folder, Path(scratch, MERGED))
            yield _model_files(Path(scratch, MERGED))

    def write_texts(self, folder: Path) -> None:
        """Writes all files but the model, which may be large: card, recipes, log and results."""
        for name in ("training", "eval"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        recipes = {RECIPE: self.student.recipe}
        for number, recipe in enumerate(self.student.earlier, start=1):
            recipes[f"training/recipe-{number}.yaml"] = recipe
        for name, recipe in recipes.items():
            text = yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True)
            (folder / name).write_text(text, encoding="utf-8")
        data = Path(str(self.keys["data"]))
        if is_recipe_file(data):
            text = without_schema_line(data.read_bytes().decode())
            (folder / "training" / data.name).write_bytes(text.encode())
        (folder / LOG).write_text("".join(f"{json.dumps(entry)}\n" for entry in self.log), encoding="utf-8")
        _write(folder / SCORES, {"scores": list(self.student.scores), "held_out": dict(self.student.held_out)})
        if self.student.comparison is not None:
            _write(folder / "eval" / COMPARISON, self.student.comparison)
        for each in self.exported:
            (folder / FOLDER / each.name).mkdir(parents=True, exist_ok=True)
            _write(folder / FOLDER / each.name / DESCRIPTION, portable(each.record, {}))
        self.card.save(folder / "README.md")


def is_recipe_file(data: Path) -> bool:
    """Whether a run's `data` is the file of a data recipe; rows that are named directly are never published."""
    return data.is_file() and data.suffix in (".yaml", ".yml")


def prepare(run: Path, options: PushOptions, measured: bool = True) -> Published:
    """The published form of a run; with `measured`, including results and comparison.

    Raises UserError for a run without weights, an unfinished run, a run with an unknown recipe, and results of other
    weights.
    """
    if not run.is_dir():
        raise UserError(f"There is no folder {run}. Name the output_dir of a finished training.")
    model = find_model(str(run))
    place = Path(model.adapter or model.path)
    files = _model_files(place)
    if not any(path.suffix == ".safetensors" for path in files):
        raise UserError(f"{run} has no weights (*.safetensors) to push. Name the output_dir of a finished training.")
    _check_finished(run, place)
    record = _record_of(place, run, options)
    comparison = comparison_of(run, options.comparison) if measured else None
    held_out = _held_out(place, comparison, model)
    if options.comparison is not None and held_out is None:
        raise UserError(f"{options.comparison} does not compare {place}, so it says nothing about this student.")
    results, log = _results(place, model) if measured else {}, _log_of(place)
    student = _student(model, place, record, options)
    student = replace(
        student,
        scores=[score for entry in results.get("tasks", {}).values() for score in scores_of(entry)],
        held_out=_evaluated(place) if held_out is None else held_out,
        comparison=None if comparison is None or held_out is None else _without_paths(comparison),
    )
    exported = [exported_of_student(str(run), wanted, model) for wanted in options.exported]
    student = replace(
        student,
        exported=exported,
        warnings=conflicts(student.license, options.repo_id, student.base, student.teachers, student.data),
        cautions=[*record.get("cautions", []), *(f"While it was trained, at {w}." for w in warnings_of(log))],
    )
    return Published(
        student, place, [] if _is_merged(model) else files, log, model_card(student), record["keys"], exported
    )


def exported_of_student(run: str, wanted: str, model: EvalModel) -> Exported:
    """An exported student of a run. Raises UserError for one of other weights, and for files that have changed."""
    exported = find_exported(run, wanted)
    if "files" not in exported.record:
        raise UserError(f"{exported.path} was not written by mmkd, so nothing says that it is this student.")
    if exported.record["student"]["weights"] != model.weights:
        raise UserError(f"{exported.folder} was made of other weights than {run} has now. Run `mmkd export` again.")
    exported.check_files()
    return exported


def describe(place: Path, folder: Path, repo_id: str) -> None:
    """Writes the card of a model, with the files it refers to, into a folder that the Trainer uploads.

    `place` is the folder of the model: the uploaded folder, or a checkpoint of its run. Raises UserError as `prepare`.
    """
    # During training, results in the folder are those of earlier weights.
    published = prepare(place, PushOptions(repo_id), measured=False)
    published.write_texts(folder)
    for warning in published.student.warnings if place == folder else ():
        print(f"Mind: {warning}", file=sys.stderr)


def _model_files(place: Path) -> list[Path]:
    files = [path for path in sorted(place.iterdir()) if any(fnmatch(path.name, name) for name in MODEL_FILES)]
    if not (place / "modules.json").is_file():
        return files
    # A model of sentence-transformers has a folder for each module after the first.
    folders = [module["path"] for module in json.loads((place / "modules.json").read_text(encoding="utf-8"))]
    return files + [path for folder in folders if folder for path in sorted((place / folder).iterdir())]


def place_in_repository(path: Path) -> str:
    """Where a file of a model belongs: beside the others, or in the folder of its module of sentence-transformers."""
    nested = (path.parents[1] / "modules.json").is_file() and not (path.parent / "modules.json").is_file()
    return f"{path.parent.name}/{path.name}" if nested else path.name


def _is_merged(model: EvalModel) -> bool:
    """Whether it is an adapter of a folder here, which nobody else has, so that the whole student is published."""
    return model.adapter is not None and Path(model.path).is_dir()


def _student(model: EvalModel, place: Path, record: Mapping[str, Any], options: PushOptions) -> Student:
    """The content of the card without results."""
    adapter = model.adapter is not None and not _is_merged(model)
    keys, lineage = record["keys"], trainings_of(record, place)
    trainings = [training.record for training in lineage]
    bases = [model.path] if adapter else bases_of(trainings[0]["keys"])
    published = list(options.base_model)
    if len(published) not in (0, len(bases)):
        raise UserError(f"--base_model has {len(published)} names, the student began with {len(bases)}: {bases}.")
    base = [source_of(name, published[i] if published else None) for i, name in enumerate(bases)]
    taught, evaluated = teachers_of(trainings), data_ids(trainings[-1:])
    ids = {
        **({taught[0]: options.teacher} if options.teacher and taught else {}),
        **dict(zip(bases, published, strict=False)),
    }
    stated = {source.license for source in base}
    data = Path(str(keys["data"]))
    recipe = {**portable(keys, ids), **({"data": f"training/{data.name}"} if is_recipe_file(data) else {})}
    return Student(
        repo_id=options.repo_id,
        methods=list(dict.fromkeys(training["keys"]["method"] for training in trainings)),
        pipeline_tag=_pipeline_tag(Path(model.path) if _is_merged(model) else place, adapter, str(keys["method"])),
        adapter=adapter,
        trained_as=model.trained_as,
        parameters=_parameters(Path(model.path) if _is_merged(model) else place),
        base=base,
        teachers=[source_of(name, ids.get(name)) for name in taught],
        data=data_sources(trainings),
        datasets=data_ids(trainings),
        answers=kept_answers(trainings),
        license=options.license or (stated.pop() if len(stated) == 1 else None),
        recipe=recipe,
        scores=[],
        held_out={},
        held_out_data=trainings[-1]["data"]["name"],
        held_out_id=evaluated[0] if len(evaluated) == 1 else None,
        comparison=None,
        machine=record.get("machine", {}),
        own_forms=own_forms_of(trainings),
        tokens=[training.tokens for training in lineage],
        earlier=[portable(training["keys"], ids) for training in trainings[:-1]],
    )


def _check_finished(run: Path, place: Path) -> None:
    record = read_json(place / RECORD)
    last = [run, *stages_of(run)][-1]
    rounds = any(last.glob("round-*")) and not (last / "rounds.json").is_file()
    checkpoint = place.name.startswith("checkpoint-") and place != run
    if last != place or rounds or (record and not record["finished"]):
        state = f"its newest checkpoint is {place.name}" if checkpoint else f"{last} did not come to its end"
        raise UserError(
            f"The run {run} is not finished: {state}. Go on with --resume_from_checkpoint true, or name the "
            "checkpoint itself to push it as it is."
        )


def _record_of(place: Path, run: Path, options: PushOptions) -> dict[str, Any]:
    """The record of the run, or the part of it that follows from a recipe."""
    if options.recipe is not None:
        recipe = Recipe.read(options.recipe)
        return {"keys": recipe.keys, "data": data_facts(recipe.method, str(recipe.keys["data"]))}
    # A checkpoint has no record of its own but that of its run.
    record = read_json(place / RECORD) or record_of(run) or read_json(place.parent / RECORD)
    if not record:
        raise UserError(
            f"{run} does not say how it was trained: it has no {RECORD}, which mmkd-train writes. Name its recipe "
            "with --recipe: the card is made from it."
        )
    return record


def _log_of(place: Path) -> Log:
    """The log of a training, or the logs of all rounds, each entry with the name of its round."""
    if not any(place.glob("round-*")):
        return read_log(place)
    return [{"part": part.name, **entry} for part in parts_of(place) for entry in part.log]


def _results(place: Path, model: EvalModel) -> dict[str, Any]:
    # For a folder without a record, which is pushed with --recipe, the results may lie under runs/eval.
    places = [folder / "results.json" for folder in (place / "eval", model.results_folder)]
    path = next((path for path in places if path.is_file()), places[0])
    results = read_json(path)
    if results and results["weights"] != model.weights:
        raise UserError(
            f"{path} is of another revision: it was measured on weights {results['weights'][:12]}, and {place} now "
            f"has {model.weights[:12]}. Delete it and run `mmkd eval` again."
        )
    return results


def _held_out(place: Path, comparison: Mapping[str, Any] | None, model: EvalModel) -> dict[str, float] | None:
    """The metrics of this model in a comparison, not the mean over seeds; None if the model is not part of it.

    Raises UserError if other weights were compared.
    """
    for row in (comparison or {}).get("rows", []):
        folders = [Path(name).resolve() for name in row["folders"]]
        if place.resolve() not in folders:
            continue
        number = folders.index(place.resolve())
        # The first comparisons of 0.1 did not record weights.
        if row.get("weights", [None] * len(folders))[number] not in (None, model.weights):
            raise UserError(
                f"The comparison is of another revision of {place}: its weights have changed since. Run "
                "`mmkd compare` again with another --output."
            )
        return {name: metric["values"][number] for name, metric in row["metrics"].items()}
    return None


def _evaluated(place: Path) -> dict[str, float]:
    """The metrics of the trainer's last evaluation."""
    metrics = read_json(place / "eval_results.json")
    known = {name: metrics[f"eval_{name}"] for name in _HELD_OUT if f"eval_{name}" in metrics}
    each = {name.removeprefix("eval_"): value for name, value in metrics.items()}
    return known | {name: value for name, value in each.items() if name.startswith(_OF_EACH_TEACHER)}


def _without_paths(comparison: Mapping[str, Any]) -> dict[str, Any]:
    rows = [
        {**row, "folders": [Path(name).name for name in row["folders"]], "recipe": Path(row["recipe"]).name}
        for row in comparison["rows"]
    ]
    return {**comparison, "rows": rows, "flags": []}


def _pipeline_tag(place: Path, adapter: bool, method: str) -> str:
    if method in METHODS and METHODS[method].predicts == "features":
        return "image-feature-extraction"
    if method in METHODS and METHODS[method].predicts == "embeddings":
        return "sentence-similarity" if (place / "modules.json").is_file() else "zero-shot-image-classification"
    if adapter:
        return "image-text-to-text" if (place / "processor_config.json").is_file() else "text-generation"
    config = json.loads((place / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or [""])[0]
    if "Classification" in name:
        return "image-classification" if "Image" in name else "text-classification"
    return "image-text-to-text" if "vision_config" in config else "text-generation"


def _parameters(place: Path) -> int:
    """The number of parameters in all files, without reading the weights."""
    total = 0
    for path in place.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118
                size = 1
                for side in file.get_slice(name).get_shape():
                    size *= side
                total += size
    return total


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
