"""A few held-out questions, answered by a run's student and teacher: kept in the run's folder and read from there."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.training.method import METHODS
from mmkd.units import readable_count

from .runs import RunFiles, read_lines

if TYPE_CHECKING:
    from mmkd.generation.row_answers import PromptWithTools

    from .run_sides import RunSide

FOLDER, NAME = "samples", "samples.jsonl"
"""Of a run's folder: where its samples are, and their file."""

SAMPLES, MAX_NEW_TOKENS = 4, 48
"""Of what a report makes by itself."""

LARGEST = {"cpu": 1_000_000_000, "cuda": 20_000_000_000}
"""The largest model, in parameters, that answers for a report unasked. Loading a larger one takes minutes."""


def kept_samples(run: RunFiles) -> list[dict[str, Any]]:
    """The samples in a run's folder; none if its weights were written after them."""
    path = run.folder / FOLDER / NAME
    weights = [file.stat().st_mtime for file in run.student_folder.glob("*.safetensors")]
    if not path.is_file() or max(weights, default=0.0) > path.stat().st_mtime:
        return []
    return read_lines(path)


def make_samples(run: RunFiles, count: int | None, trust_remote_code: bool = False) -> str:
    """Writes samples of a run's student into its folder; says why there are none, else nothing.

    `count` is None for as many as a report has by itself: then the models must be small enough, and the run finished.
    """
    unasked = count is None
    if count == 0:
        return "Left out, as asked for."
    if unasked and not run.finished:
        return "The run is not finished. `mmkd report RUN --samples 4` asks its newest checkpoint."
    if not any(run.student_folder.rglob("*.safetensors")):
        return f"There is no student in {run.student_folder}."
    try:
        rows, note = _answered(run, SAMPLES if count is None else count, unasked, trust_remote_code)
    except (UserError, OSError, ImportError, RuntimeError) as error:
        # The page is worth having without them: a device may be too small, or the data on another machine.
        return f"None could be made: {error}"
    if rows:
        text = "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        write_file(run.folder / FOLDER / NAME, text)
    return note


def _answered(run: RunFiles, count: int, unasked: bool, trust_remote_code: bool) -> tuple[list[dict[str, Any]], str]:
    method = str(run.record.get("method", ""))
    if method not in METHODS or "data" not in run.keys:
        return [], "The run's record names no method and data."
    if METHODS[method].predicts == "classes":
        return _classified(run, count), ""
    from mmkd.data.prompts import pictures_of, prompt_of, words_of

    from .run_sides import STUDENT, device_here, is_at_hand, sides_of, silent_teachers

    sides = sides_of(run, trust_remote_code)
    largest = LARGEST[device_here()]
    asked = {
        name: side
        for name, side in sides.items()
        if not unasked or (is_at_hand(side) and side.fits and (side.parameters or 0) <= largest)
    }
    if STUDENT not in asked:
        size = readable_count(sides[STUDENT].parameters or 0)
        return [], f"The student has {size} parameters. `mmkd report RUN --samples 4` lets it answer all the same."
    rows, split = _rows(run, count)
    pairs = [prompt_of(row) for row in rows]
    questions = [(prompt, row.get("tools")) for (prompt, _), row in zip(pairs, rows, strict=True)]
    written: dict[str, list[str]] = {}
    missing = [silent_teachers(run)]
    for name, side in asked.items():
        print(f"Samples: {len(rows)} answers of the {name} ...", file=sys.stderr)
        try:
            written[name] = _answers(side, questions)
        except (UserError, OSError, RuntimeError) as error:
            if name == STUDENT:
                raise
            # The student's answers are worth showing where a server is down or a teacher too large.
            missing.append(f"Without {name}: {error} `mmkd report RUN --samples {count}` asks again.")
    samples = [
        {
            "source": f"{run.keys['data']}, {split}, greedy, at most {MAX_NEW_TOKENS} tokens",
            "prompt": words_of(prompt),
            "target": answer,
            "answers": {name: texts[number] for name, texts in written.items()},
            "images": _saved(run.folder / FOLDER, number, pictures_of(prompt)),
        }
        for number, (prompt, answer) in enumerate(pairs)
    ]
    large = ", ".join(name for name in sides if name not in asked)
    missing.append(f"Without {large}, which is too large to load unasked." if large else "")
    return samples, " ".join(filter(None, missing))


def _answers(side: "RunSide", questions: "Sequence[PromptWithTools]") -> list[str]:
    """What a model answers greedily, or why its server refused the question."""
    from mmkd.generation.generator import RowError, Sampling

    replies = side.generator().generate(questions, Sampling(MAX_NEW_TOKENS))
    return [f"Refused: {reply.reason}" if isinstance(reply, RowError) else reply[0].text for reply in replies]


def _rows(run: RunFiles, count: int) -> tuple[list[dict[str, Any]], str]:
    """The first held-out rows of the run's data; its first rows if it holds none out."""
    from mmkd.data.image_columns import image_column
    from mmkd.data.load_data import load_data

    data = load_data(str(run.keys["data"]), max_train_rows=count, max_eval_rows=count)
    split = "eval" if "eval" in data else "train"
    rows: list[dict[str, Any]] = [dict(row) for row in image_column(data[split])]  # pyright: ignore
    return rows, "held-out rows" if split == "eval" else "rows it was trained on"


def _classified(run: RunFiles, count: int) -> list[dict[str, Any]]:
    """Rows of a classification recipe with the classes that the student predicts."""
    from transformers import pipeline

    from mmkd.data.classification import ClassificationRecipe, load_classification, read_cell

    recipe = ClassificationRecipe.load(str(run.keys["data"]))
    data = load_classification(recipe, max_eval_rows=count)
    rows = data.test if data.test is not None else data.validation
    split = "held-out rows"
    if rows is None:
        rows, split = data.train.shuffle(seed=0).select(range(min(count, len(data.train)))), "rows it was trained on"
    is_text = "text" in rows.column_names
    cells = [row["text"] if is_text else read_cell(row["image"], "A sample") for row in rows]  # pyright: ignore
    task: Any = "text-classification" if is_text else "image-classification"
    predicted: Any = pipeline(task, model=str(run.student_folder))
    samples = []
    for number, (row, cell) in enumerate(zip(rows, cells, strict=True)):
        best: Any = predicted(cell, top_k=1)[0]
        target = data.class_names[row["label"]]  # pyright: ignore[reportCallIssue, reportArgumentType]
        samples.append(
            {
                "source": f"{run.keys['data']}, {split}",
                "prompt": cell if is_text else "",
                "target": target,
                "answers": {"student": f"{best['label']} ({best['score']:.0%})"},
                "right": {"student": best["label"] == target},
                "images": [] if is_text else _saved(run.folder / FOLDER, number, [cell]),
            }
        )
    return samples


def _saved(folder: Path, number: int, pictures: Sequence[Any]) -> list[str]:
    """The names of pictures, saved into the folder."""
    names = []
    for place, picture in enumerate(pictures):
        folder.mkdir(parents=True, exist_ok=True)
        names.append(f"{number}-{place}.png")
        picture.convert("RGB").save(folder / names[-1])
    return names
