"""Answers of several models to the same questions, side by side, with pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.data.images import UnreadableImage, read_image
from mmkd.data.thumbnails import thumbnail_url

from .run_samples import FOLDER, kept_samples
from .runs import RunFiles, read_lines

PER_TASK = 4
"""The number of samples per task: always the first ones, without selection."""

PICTURE = 160
"""The longer side of a thumbnail in pixels."""

PICTURE_BYTES = 1_000_000
"""The total size of all thumbnails of a report in bytes."""

_CHARACTERS = 800


@dataclass(frozen=True)
class SampleAnswer:
    """The answer of a model, and whether it is right, if known."""

    model: str
    text: str
    right: bool | None = None


@dataclass
class ReportSample:
    """A question with the answers of several models."""

    source: str
    prompt: str
    target: str
    answers: list[SampleAnswer]
    images: list[str] = field(default_factory=list)
    """Data URIs, or a sentence in place of a missing picture."""


def samples_of(run: RunFiles) -> list[ReportSample]:
    """The samples of all tasks and generations in the run's results, and of its last round."""
    thumbnails, results = Thumbnails(), run.results
    samples = _kept(run, thumbnails) + _assessed(run.assessed, thumbnails)
    samples += [sample for name, result in results.items() for sample in _generated(name, result, thumbnails)]
    rows_by_task: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for model, result in results.items():
        for entry in result["tasks"].values():
            path = Path(result["folder"], entry["samples"])
            if path.is_file():
                rows_by_task.setdefault(entry["task"], {})[model] = _first(read_lines(path))
    for task, by_model in rows_by_task.items():
        samples += _joined(task, by_model, thumbnails)
    return samples


class Thumbnails:
    """Makes small copies of pictures up to a total size."""

    def __init__(self) -> None:
        self.room = PICTURE_BYTES

    def embedded(self, path: str) -> str:
        """A data URI, or a sentence with the reason why there is none."""
        if not Path(path).is_file():
            return f"{Path(path).name} is not here"
        try:
            image = read_image(path)
        except UnreadableImage:
            return f"{Path(path).name} cannot be read"
        url = thumbnail_url(image, PICTURE)
        if len(url) > self.room:
            return f"{Path(path).name} would make the page too large"
        self.room -= len(url)
        return url


def _kept(run: RunFiles, thumbnails: Thumbnails) -> list[ReportSample]:
    """Those in the run's folder, which `mmkd report` makes."""
    samples = []
    for row in kept_samples(run):
        judged = row.get("right", {})
        answers = [SampleAnswer(side, cut(text), judged.get(side)) for side, text in row["answers"].items()]
        images = [thumbnails.embedded(str(run.folder / FOLDER / Path(name).name)) for name in row["images"]]
        samples.append(ReportSample(row["source"], cut(row["prompt"]), cut(row["target"]), answers, images))
    return samples


def _generated(name: str, result: Mapping[str, Any], thumbnails: Thumbnails) -> list[ReportSample]:
    entries = [entry for entry in result["measures"].values() if entry["measure"] == "generation"]
    samples = []
    for entry in entries[-1:]:
        for row in entry["values"]["samples"][: 2 * PER_TASK]:
            answers = [SampleAnswer(side, cut(row[side])) for side in ("teacher", "student") if side in row]
            images = [thumbnails.embedded(path) for path in row.get("images", [])]
            data = entry["settings"]["held"]["data"]
            source = f"{name} on {data}, greedy"
            samples.append(ReportSample(source, cut(row["prompt"]), cut(row["reference"]), answers, images))
    return samples


def _assessed(folder: Path | None, thumbnails: Thumbnails) -> list[ReportSample]:
    """Hard and easy instructions of a round, with the compared answers."""
    if folder is None:
        return []
    scores = read_lines(folder / "scores.jsonl")
    pool = {row["key"]: row for row in read_lines(folder / "pool.jsonl")}
    kinds = [
        [row for row in scores if row["hard"] is hard and row["key"] in pool][:PER_TASK] for hard in (True, False)
    ]
    samples = []
    for row in (row for rows in kinds for row in rows):
        instruction = pool[row["key"]]
        answers = [SampleAnswer(side, cut(row[f"{side}_answer"])) for side in ("teacher", "student")]
        images = [thumbnails.embedded(path) for path in instruction["images"]]
        messages = instruction["prompt"] if "prompt" in instruction else instruction["messages"][:-1]
        prompt = "\n".join(_words_of(message["content"]) for message in messages)
        source = f"{folder.name}, {'hard' if row['hard'] else 'easy'}: gap {row['gap']:.3g}"
        samples.append(ReportSample(source, cut(prompt), "", answers, images))
    return samples


def _words_of(content: Any) -> str:
    return content if isinstance(content, str) else " ".join(part["text"] for part in content if part.get("text"))


def _first(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first samples; a file has each sample once per filter."""
    chosen: dict[tuple[str, Any], dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: (row["task"], row["doc_id"])):
        chosen.setdefault((row["task"], row["doc_id"]), row)
    return list(chosen.values())[:PER_TASK]


def _joined(task: str, by_model: Mapping[str, Sequence[dict[str, Any]]], thumbnails: Thumbnails) -> list[ReportSample]:
    samples: dict[tuple[str, Any, Any], ReportSample] = {}
    for model, rows in by_model.items():
        for row in rows:
            text = _answer_text(row)
            if text is None:
                continue
            key = (row["task"], row["doc_id"], row.get("doc_hash"))
            if key not in samples:
                images = [thumbnails.embedded(path) for path in row["images"]]
                samples[key] = ReportSample(task, cut(str(row["prompt"])), _target(row), [], images)
            samples[key].answers.append(SampleAnswer(model, cut(text), _right(row)))
    return list(samples.values())


def _answer_text(row: Mapping[str, Any]) -> str | None:
    """The text of an answer, or the most likely choice. None for a task that only uses likelihoods."""
    response = row["response"]
    if row["choices"]:
        scores = [float(log_prob) for log_prob, *_ in response]
        return str(row["choices"][scores.index(max(scores))])
    # lm-eval nests answers by repeats of the request.
    answer = response[0] if isinstance(response, list) and response else response
    answer = answer[0] if isinstance(answer, list) and answer else answer
    return answer if isinstance(answer, str) else None


def _target(row: Mapping[str, Any]) -> str:
    target, choices = row["target"], row["choices"]
    if choices and str(target).isdigit() and int(target) < len(choices):
        return cut(str(choices[int(target)]))
    return cut(str(target))


def _right(row: Mapping[str, Any]) -> bool | None:
    judged = [value for value in row["metrics"].values() if value in (0, 1)]
    return bool(judged[0]) if judged else None


def cut(text: str) -> str:
    """The text, shortened to its beginning and end if it is long."""
    text = text.strip()
    return text if len(text) <= _CHARACTERS else f"{text[: _CHARACTERS // 2]} [...] {text[-_CHARACTERS // 2 :]}"
