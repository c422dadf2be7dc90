"""Where a student comes from: the models and data behind a run, by their published names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError  # pyright: ignore[reportPrivateImportUsage]

from mmkd.results.adapter_base import MERGED
from mmkd.results.own_teacher import SELF, own_form
from mmkd.training.method import BASELINE_METHOD

from .licences import LicensedSource
from .runs import RECORD, parts_of, read_json, record_of, stages_of, tokens_of, with_parts


@dataclass(frozen=True)
class Training:
    """A training on this machine that led to a student."""

    record: Mapping[str, Any]
    folder: Path

    @property
    def tokens(self) -> int:
        """Supervised tokens it saw, in all of its rounds."""
        return tokens_of(parts_of(self.folder)) or 0


def trainings_of(record: Mapping[str, Any], place: Path) -> list[Training]:
    """All trainings on this machine that led to a student, such as its stages, the first one first.

    `record` is that of the last one, `place` the folder of its weights.
    """
    earlier = _start_of(record["keys"], place.parent if place.name.startswith("checkpoint-") else place)
    before = None if earlier is None else training_in(earlier)
    return [*(trainings_of(before.record, before.folder) if before else []), Training(record, place)]


def training_in(folder: Path) -> Training | None:
    """The training of the student in a folder: of a run, its last stage, or a checkpoint; None if there is none."""
    for place in (folder, *reversed(stages_of(folder))):
        # A checkpoint and a merged student have no record of their own but that of their run.
        of = place.parent if place.name.startswith("checkpoint-") or place.name == MERGED else place
        if record := read_json(of / RECORD):
            return Training(record, place)
    record = record_of(folder)
    return Training(record, folder) if record else None


def _start_of(keys: Mapping[str, Any], folder: Path) -> Path | None:
    """The folder from which a training took its student; None for a Hub id or random weights."""
    start = keys.get("student") or keys.get("teacher")
    if keys.get("student_init") == "random" or not start:
        return None
    before = Path(str(start))
    stage = before.parent if before.name == MERGED else before
    # Stages lie side by side, so that the folder is found after the run was moved and from any current folder.
    beside = folder.parent / before.relative_to(stage.parent)
    if _is_stage(folder) and _is_stage(stage) and beside.is_dir():
        return beside
    return before if before.is_dir() else None


def _is_stage(folder: Path) -> bool:
    return re.fullmatch(r"\d+-\w+", folder.name) is not None


def bases_of(first: Mapping[str, Any]) -> list[str]:
    """The models from whose weights a student started, by the keys of the recipe of its first training."""
    made = first.get("student_init", "pretrained")
    if made == "random":
        return []
    named = [first.get("student") or first.get("teacher")]
    if made == "llava":
        named.append(first.get("student_vision_tower"))
    return list(dict.fromkeys(str(name) for name in named if name))


def teachers_of(trainings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of the student's teachers besides itself.

    The teacher of an SFT baseline is only for comparison and left out.
    """
    distilled = [training["keys"] for training in trainings if training["keys"]["method"] != BASELINE_METHOD]
    # Under `teachers`, each teacher has its own keys.
    keys_of_teachers = [own for keys in distilled for own in (keys, *(keys.get("teachers") or {}).values())]
    return list(dict.fromkeys(str(own["teacher"]) for own in keys_of_teachers if own.get("teacher", SELF) != SELF))


def own_forms_of(trainings: Sequence[Mapping[str, Any]]) -> list[str]:
    """What a reader is told of the trainings in which the student taught itself."""
    distilled = [training["keys"] for training in trainings if training["keys"]["method"] != BASELINE_METHOD]
    return list(dict.fromkeys(form for keys in distilled if (form := own_form(keys)) is not None))


def source_of(name: str, published: str | None = None) -> LicensedSource:
    """A model by its Hub id or the name of its folder, with the licence in its card.

    `published` is the Hub id of a model in a local folder.
    """
    license = _stated_here(Path(name)) if Path(name).is_dir() else None
    hub_id = published or (name if not Path(name).is_dir() else None)
    if hub_id is not None and license is None:
        license = _stated_there(hub_id)
    return LicensedSource(hub_id or _name_of(Path(name).resolve()), license)


def _name_of(folder: Path) -> str:
    """The name of a folder; for a stage, that of its run."""
    return folder.parent.name if _is_stage(folder) else folder.name


def data_sources(trainings: Sequence[Mapping[str, Any]]) -> list[LicensedSource]:
    """The data recipes of all trainings with their licences, mixtures before their parts."""
    facts = [recipe for training in trainings for recipe in with_parts(training["data"])]
    return list(dict.fromkeys(LicensedSource(recipe["name"], recipe["license"]) for recipe in facts))


def kept_answers(trainings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of each data set of a teacher's answers, how many were kept and how they were chosen."""
    facts = [recipe for training in trainings for recipe in with_parts(training["data"])]
    return list(dict.fromkeys(recipe["answers"] for recipe in facts if recipe.get("answers")))


def data_ids(trainings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The data sets on the Hub that a student was trained on."""
    sources = [recipe["source"] or "" for training in trainings for recipe in with_parts(training["data"])]
    return [source for source in dict.fromkeys(sources) if source.count("/") == 1 and not Path(source).exists()]


def portable(keys: Mapping[str, Any], published: Mapping[str, str]) -> dict[str, Any]:
    """Keys without this machine's paths: folders are replaced by their Hub ids if known, else by their names."""
    return {key: _portable(value, published) for key, value in keys.items()}


def _portable(value: Any, published: Mapping[str, str]) -> Any:
    if isinstance(value, Mapping):
        return portable(value, published)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_portable(item, published) for item in value]
    if isinstance(value, str) and value in published:
        return published[value]
    if isinstance(value, str) and Path(value).is_absolute():
        return f"./{Path(value).name}"
    return value


def _stated_here(folder: Path) -> str | None:
    card = folder / "README.md"
    return _license(ModelCard.load(card, ignore_metadata_errors=True).data) if card.is_file() else None


def _stated_there(repo_id: str) -> str | None:
    """The licence on the Hub; None without a network or access, where the user has to look it up."""
    if constants.HF_HUB_OFFLINE:
        return None
    try:
        return _license(HfApi().model_info(repo_id, timeout=20).card_data)
    except (HfHubHTTPError, HTTPError, OSError):
        return None


def _license(data: Any) -> str | None:
    stated = getattr(data, "license", None)
    return (getattr(data, "license_name", None) or stated) if stated == "other" else stated
