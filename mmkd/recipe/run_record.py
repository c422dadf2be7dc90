"""What a run leaves about itself in its folder: its recipe with flags, its data and their licences, its versions."""

import json
import logging
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerCallback

from mmkd.cache.kept_answers import KEPT, chosen_by, read_summary, summary_lines
from mmkd.data.data_recipe import DataRecipe
from mmkd.files import write_file
from mmkd.results.machine import machine
from mmkd.results.places import RECORD
from mmkd.training.method import METHODS

from .cautions import cautions_of
from .recipe import Run

logger = logging.getLogger(__name__)

SCHEMA = 1


class RunRecord(TrainerCallback):
    """Writes the record when training begins, and how it ended."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the record of a run that goes on."""
        if state.is_world_process_zero:
            cautions = cautions_of(self.run)
            for caution in cautions:
                logger.warning(str(caution))
            begin(self.run, Path(args.output_dir), [caution.message for caution in cautions])

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Says whether it came to its end."""
        if state.is_world_process_zero and state.global_step >= state.max_steps:
            finish(Path(args.output_dir))


def begin(run: Run, folder: Path, cautions: Sequence[str] = ()) -> None:
    """Writes the record of a run that trains into a folder from now on, with what the literature warns of in it."""
    content = {
        "schema": SCHEMA,
        "method": run.arguments.method,
        "recipe": run.recipe.place,
        "keys": run.keys,
        "data": data_facts(run.arguments.method, run.arguments.data),
        "machine": machine(),
        "started": datetime.now(UTC).isoformat("T", "seconds"),
        "finished": None,
        **({"cautions": list(cautions)} if cautions else {}),
    }
    _write(folder / RECORD, content)


def finish(folder: Path) -> None:
    """Notes that the run of a folder came to its end."""
    path = folder / RECORD
    content = json.loads(path.read_text(encoding="utf-8"))
    _write(path, {**content, "finished": datetime.now(UTC).isoformat("T", "seconds")})


def data_facts(method: str, name: str) -> dict[str, Any]:
    """Name, source, licence and homepage of a data recipe, and those of its parts."""
    own = METHODS[method].data_facts
    if own is not None:
        return own(name)
    return _facts(DataRecipe.load(name))


def _facts(recipe: DataRecipe) -> dict[str, Any]:
    facts: dict[str, Any] = {key: getattr(recipe, key) for key in ("name", "license", "homepage", "source")}
    parts = [{**_facts(part.recipe), "weight": part.weight, "rows": part.rows} for part in recipe.mixture]
    answers = _kept_answers(recipe)
    own = {**({"parts": parts} if parts else {}), **({"answers": answers} if answers else {})}
    return {**facts, "revision": recipe.revision, **own}


def _kept_answers(recipe: DataRecipe) -> str:
    """Which of a teacher's answers a data recipe of `mmkd cache build` holds; nothing of other data."""
    summary = None if recipe.folder is None else read_summary(recipe.folder)
    if summary is None or not any(file.startswith(f"{KEPT}/") for own in recipe.data_files.values() for file in own):
        return ""
    return " ".join([*summary_lines(summary), f"({chosen_by(summary)})"])


def _write(path: Path, content: dict[str, Any]) -> None:
    write_file(path, json.dumps(content, indent=1, ensure_ascii=False, default=str) + "\n")
