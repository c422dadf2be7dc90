"""Answers of several models to the same questions, side by side, with the pictures they are about."""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.data.images import UnreadableImage, read_image

from .runs import RunFiles, read_lines

PER_TASK = 4
"""The first ones are shown, not chosen ones."""

PICTURE = 160
"""Pixels of the longer side."""

PICTURE_BYTES = 1_000_000
"""All pictures of a report together."""

_CHARACTERS = 800


@dataclass(frozen=True)
class Answer:
    """What one model said, and whether that is right where that is known."""

    model: str
    text: str
    right: bool | None = None


@dataclass
class Sample:
    """One question."""

    source: str
    prompt: str
    target: str
    answers: list[Answer]
    images: list[str] = field(default_factory=list)
    """Data URIs, or words where a picture is not there."""


def samples_of(run: RunFiles) -> list[Sample]:
    """The samples of all tasks and generations that the run's results hold, and of its last round."""
    pictures, results = Pictures(), run.results
    found = _assessed(run.assessed, pictures)
    found += [sample for name, result in results.items() for sample in _generated(name, result, pictures)]
    asked: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for model, result in results.items():
        for entry in result["tasks"].values():
            path = Path(result["folder"], entry["samples"])
            if path.is_file():
                asked.setdefault(entry["task"], {})[model] = _first(read_lines(path))
    for task, by_model in asked.items():
        found += _joined(task, by_model, pictures)
    return found


class Pictures:
    """Makes small copies of pictures, as long as there is room."""

    def __init__(self) -> None:
        self.room = PICTURE_BYTES

    def embedded(self, path: str) -> str:
        """A data URI, or what to read instead."""
        if not Path(path).is_file():
            return f"{Path(path).name} is not here"
        try:
            image = read_image(path)
        except UnreadableImage:
            return f"{Path(path).name} cannot be read"
        small = max(image.size) <= PICTURE
        image.thumbnail((PICTURE, PICTURE))
        file = io.BytesIO()
        image.save(file, "PNG" if small else "JPEG", **({} if small else {"quality": 80}))
        content = file.getvalue()
        if len(content) > self.room:
            return f"{Path(path).name} would make the page too large"
        self.room -= len(content)
        kind = "png" if small else "jpeg"
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _generated(name: str, result: Mapping[str, Any], pictures: Pictures) -> list[Sample]:
    entries = [entry for entry in result["measures"].values() if entry["measure"] == "generation"]
    found = []
    for entry in entries[-1:]:
        for one in entry["values"]["samples"][: 2 * PER_TASK]:
            answers = [Answer(side, cut(one[side])) for side in ("teacher", "student") if side in one]
            images = [pictures.embedded(path) for path in one.get("images", [])]
            data = entry["settings"]["held"]["data"]
            source = f"{name} on {data}, greedy"
            found.append(Sample(source, cut(one["prompt"]), cut(one["reference"]), answers, images))
    return found


def _assessed(folder: Path | None, pictures: Pictures) -> list[Sample]:
    """Hard and easy instructions of a round, with the answers that were compared."""
    if folder is None:
        return []
    scores = read_lines(folder / "scores.jsonl")
    asked = {row["key"]: row for row in read_lines(folder / "pool.jsonl")}
    kinds = [
        [row for row in scores if row["hard"] is hard and row["key"] in asked][:PER_TASK] for hard in (True, False)
    ]
    found = []
    for row in (row for rows in kinds for row in rows):
        one = asked[row["key"]]
        answers = [Answer(side, cut(row[f"{side}_answer"])) for side in ("teacher", "student")]
        images = [pictures.embedded(path) for path in one["images"]]
        messages = one["prompt"] if "prompt" in one else one["messages"][:-1]
        prompt = "\n".join(_words_of(message["content"]) for message in messages)
        source = f"{folder.name}, {'hard' if row['hard'] else 'easy'}: gap {row['gap']:.3g}"
        found.append(Sample(source, cut(prompt), "", answers, images))
    return found


def _words_of(content: Any) -> str:
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part.get("text"))


def _first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first answers; a file has them once for each filter."""
    chosen: dict[tuple[str, Any], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["task"], row["doc_id"])):
        chosen.setdefault((row["task"], row["doc_id"]), row)
    return list(chosen.values())[:PER_TASK]


def _joined(task: str, by_model: Mapping[str, Sequence[dict[str, Any]]], pictures: Pictures) -> list[Sample]:
    found: dict[tuple[str, Any, Any], Sample] = {}
    for model, rows in by_model.items():
        for row in rows:
            text = _said(row)
            if text is None:
                continue
            key = (row["task"], row["doc_id"], row.get("doc_hash"))
            if key not in found:
                images = [pictures.embedded(path) for path in row["images"]]
                found[key] = Sample(task, cut(str(row["prompt"])), _target(row), [], images)
            found[key].answers.append(Answer(model, cut(text), _right(row)))
    return list(found.values())


def _said(row: Mapping[str, Any]) -> str | None:
    """What was answered; of choices the most likely one. None where nothing was said but a likelihood taken."""
    response = row["response"]
    if row["choices"]:
        scores = [float(one[0]) for one in response]
        return str(row["choices"][scores.index(max(scores))])
    one = response[0] if isinstance(response, list) and response else response
    one = one[0] if isinstance(one, list) and one else one
    return one if isinstance(one, str) else None


def _target(row: Mapping[str, Any]) -> str:
    target, choices = row["target"], row["choices"]
    if choices and str(target).isdigit() and int(target) < len(choices):
        return cut(str(choices[int(target)]))
    return cut(str(target))


def _right(row: Mapping[str, Any]) -> bool | None:
    judged = [value for value in row["metrics"].values() if value in (0, 1)]
    return bool(judged[0]) if judged else None


def cut(text: str) -> str:
    """The text, or its beginning and end where it is long."""
    text = text.strip()
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS // 2]} [...] {text[-_CHARACTERS // 2 :]}"
