"""Where results of a model are kept; loads neither torch nor a model."""

import hashlib
import re
from pathlib import Path

RECORD = "run.json"
"""File of a run's folder that says what it is."""

RESULTS, COMPARISON = "eval/results.json", "comparison.json"


def results_folder(model: str | Path) -> Path:
    """Where `mmkd eval` keeps the results of a model: in the folder of a run, for any other one under runs/eval."""
    own = Path(model)
    if not own.is_dir():
        return Path("runs/eval", re.sub(r"[^\w.+@-]+", "--", str(model)).strip("-"))
    if _is_of_a_run(own):
        return own / "eval"
    # Whatever it is called from here; other folders have the same name.
    place = own.resolve()
    return Path("runs/eval", f"{place.name}-{hashlib.sha256(str(place).encode()).hexdigest()[:8]}")


def results_before(model: str | Path) -> Path | None:
    """Where earlier versions of mmkd kept results of a folder that is not theirs; None where there are none."""
    own = Path(model) / "eval"
    return own if (own / Path(RESULTS).name).is_file() and own != results_folder(model) else None


def _is_of_a_run(folder: Path) -> bool:
    """Whether mmkd made a folder: that of a run, or a checkpoint, stage, round or measured student in one."""
    places = [folder, *list(folder.resolve().parents)[:3]]
    return any((place / name).exists() for place in places for name in (RECORD, "stage.json", COMPARISON, "measured"))
