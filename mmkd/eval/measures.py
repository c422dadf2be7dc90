"""Measurements beyond benchmarks, on the held-out rows of a data recipe: beside the teacher where there is one."""

import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from rich.console import Console
from rich.table import Table

from mmkd import __version__
from mmkd.alignment.vocab import shared_tokens
from mmkd.data.image_columns import image_column
from mmkd.data.load_data import load_data
from mmkd.data.prompts import prompt_of, text_of, words_of
from mmkd.errors import UserError
from mmkd.models.load import tokenizer_of
from mmkd.results.machine import machine
from mmkd.seams.lm_eval_seam import model_class, rolling_log_likelihoods

from . import speed
from .answer_readings import AnswerReader, answered_rows
from .answer_statistics import AnswerStatistics, greedy_answers, summary
from .harness import Settings, device_of
from .model import EvalModel
from .own_answers import means_of, read_own_answers
from .results import Results, key_of
from .teacher_fit import Pair
from .tokens import Calibration, TokenAgreement, batches, beliefs_of

MEASURES = ("cost", "generation", "own_answers", "bytes", "acceptance", "agreement", "calibration")
"""In the order in which they are taken: the last two prepare the model for training's own batches."""

_WITH_TEACHER = ("own_answers", "acceptance", "agreement")
"""Those that compare with a teacher."""

DRAFT_TOKENS = 4
"""Tokens of a draft, for acceptance."""

SAMPLES = 16
"""Generations that are kept to be read."""


@dataclass(frozen=True)
class HeldOut:
    """What is measured on, and how much of it."""

    data: str
    rows: int = 64
    max_length: int = 512
    max_new_tokens: int = 64

    def load(self) -> Dataset:
        """The held-out rows. Raises UserError for a recipe without any."""
        data = load_data(self.data, max_eval_rows=self.rows, max_train_rows=1)
        if "eval" not in data:
            raise UserError(
                f"The data recipe {self.data} holds nothing out, so there is nothing fair to measure on.",
                because="meaning",
            )
        return image_column(data["eval"])


def measure(
    model: EvalModel,
    names: Sequence[str],
    held: HeldOut | None,
    settings: Settings,
    teacher: EvalModel | None = None,
    output: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """The entries of measurements by name, from the model's results where they are known.

    Without `names`, all that are possible. Raises UserError for unknown names, and for those that need a teacher, the
    same vocabulary or held-out rows that are not given.
    """
    _check(names, held, teacher, model)
    rows = None if held is None else held.load()
    chosen = [name for name in MEASURES if name in names] if names else _possible(model, rows, teacher)
    results = Results.of(model, output)
    measurements = Measurements(model, teacher, rows, held, settings)
    entries: dict[str, dict[str, Any]] = {}
    device = device_of(settings)
    types = [side.computed_dtype(settings.dtype, device) for side in measurements.sides.values()]
    for name in chosen:
        conditions = {
            "device": device,
            # Of both sides, where the CPU emulates the type of one of them.
            "dtype": types[0] if len(set(types)) == 1 else types,
            # Of no consequence to what is not measured on rows.
            "held": None if held is None or name == "cost" else vars(held),
            "teacher": None if teacher is None else {"name": teacher.name, "weights": teacher.weights},
        }
        key = key_of("measure", __version__, name, conditions, None if name == "cost" else rows_digest(rows))
        entry = results.measure(key)
        if entry is None:
            values = getattr(measurements, name)()
            date = datetime.now(UTC).isoformat("T", "seconds")
            entry = {"measure": name, "settings": conditions, "values": values, "machine": machine(), "date": date}
            entry = results.add_measure(key, entry)
        entries[name] = entry
    return entries


class Measurements:
    """Takes measurements; each is a method that returns `{"student": ..., "teacher": ...}` or what they share."""

    def __init__(
        self,
        model: EvalModel,
        teacher: EvalModel | None,
        rows: Dataset | None,
        held: HeldOut | None,
        settings: Settings,
    ) -> None:
        self.sides = {"student": model} | ({} if teacher is None else {"teacher": teacher})
        self.rows, self.held, self.settings = rows, held, settings
        self._models: dict[str, Any] = {}

    def model(self, side: str) -> Any:
        """The loaded model of a side."""
        if side not in self._models:
            self._models[side] = self.sides[side].load(self.settings.dtype, device_of(self.settings))
        return self._models[side]

    @property
    def _readers(self) -> tuple[AnswerReader, AnswerReader]:
        """The student, and its teacher."""
        student, teacher = (AnswerReader(self.model(side), own.processing_class) for side, own in self.sides.items())
        return student, teacher

    def cost(self) -> dict[str, Any]:
        """What each side needs to be used."""
        return {side: speed.cost_of(self.model(side)) for side in self.sides}

    def generation(self) -> dict[str, Any]:
        """What each side writes on the same prompts."""
        assert self.rows is not None
        assert self.held is not None
        pairs = [prompt_of(dict(row)) for row in self.rows]  # pyright: ignore
        prompts = [prompt for prompt, _ in pairs]
        tools = list(self.rows["tools"]) if "tools" in self.rows.column_names else None
        tokens = self.held.max_new_tokens
        written: dict[str, list[AnswerStatistics]] = {
            side: greedy_answers(self.model(side), model.processing_class, prompts, tokens, tools=tools)
            for side, model in self.sides.items()
        }
        samples = [
            {"prompt": words_of(prompt), "reference": reference}
            | {side: answers[place].text for side, answers in written.items()}
            for place, (prompt, reference) in enumerate(pairs[:SAMPLES])
        ]
        return {**{side: summary(answers) for side, answers in written.items()}, "samples": samples}

    def own_answers(self) -> dict[str, Any]:
        """How likely the teacher finds what the student says, and how it says it."""
        assert self.rows is not None
        assert self.held is not None
        means = means_of(read_own_answers(*self._readers, self.rows, self.held.max_new_tokens))
        return {**{name.removeprefix("own_"): value for name, value in means.items()}, "answers": len(self.rows)}

    def bytes(self) -> dict[str, Any]:
        """Bits per byte of the rows' text, each side in its own tokens, as lm-eval's rolling log-likelihood."""
        kind = model_class("hf")
        assert self.rows is not None
        texts = [_text(dict(row)) for row in self.rows]  # pyright: ignore
        size = sum(len(text.encode()) for text in texts)
        sides = {}
        for side, model in self.sides.items():
            tokenizer: Any = tokenizer_of(model.processing_class)
            lm = kind(pretrained=self.model(side), tokenizer=tokenizer, batch_size=1)
            total = sum(rolling_log_likelihoods(lm, texts))
            tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts)
            sides[side] = {"bits_per_byte": -total / size / math.log(2), "bytes": size, "tokens": tokens}
        return sides

    def acceptance(self) -> dict[str, Any]:
        """How many tokens the teacher keeps of what the student drafts, on texts that the teacher has sampled."""
        assert self.rows is not None
        assert self.held is not None
        pair = Pair(*self._readers)
        asked = [(text.prompt, text.tools) for text in answered_rows(self.rows)]
        sampled, greedy = ([*pair.teacher.answers(asked, self.held.max_new_tokens, drawn)] for drawn in (1, 0))
        return pair.accepted(sampled, greedy, DRAFT_TOKENS)

    def agreement(self) -> dict[str, Any]:
        """How far the student is from the teacher, per token."""
        return self._beliefs[0].result()

    def calibration(self) -> dict[str, Any]:
        """How well each side knows what it knows, about the next token."""
        return {side: calibration.result() for side, calibration in self._beliefs[1].items()}

    @cached_property
    def _beliefs(self) -> tuple[TokenAgreement, dict[str, Calibration]]:
        """What both sides believe of every supervised token, read once."""
        assert self.rows is not None
        assert self.held is not None
        model, teacher = self.sides["student"], self.sides.get("teacher")
        size = None
        if teacher is not None:
            size = shared_tokens(tokenizer_of(model.processing_class), tokenizer_of(teacher.processing_class))
        agreement, calibrations = TokenAgreement(), {side: Calibration() for side in self.sides}
        for batch in batches(self.model("student"), model.processing_class, self.rows, self.held.max_length, teacher):
            beliefs = {"student": beliefs_of(self.model("student").eval(), batch.ours, size)}
            if teacher is not None:
                beliefs["teacher"] = beliefs_of(self.model("teacher"), batch.theirs, size)
                agreement.add(beliefs["student"], beliefs["teacher"])
            for side, belief in beliefs.items():
                calibrations[side].add(belief.confidence, belief.right)
        return agreement, calibrations


def show(model: str, entries: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """One line per number, a column for each side."""
    table = Table("measure", "", "student", "teacher", title=model, title_justify="left")
    for name, entry in entries.items():
        values = entry["values"]
        sides = [side for side in ("student", "teacher") if isinstance(values.get(side), dict)]
        if not sides:
            for key, value in values.items():
                table.add_row(name, key, _number(value), "")
            continue
        lines = {side: _flat(values[side]) for side in sides}
        for key in lines["student"]:
            table.add_row(name, key, *(_number(lines[side].get(key)) for side in sides))
    console.print(table)


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in values.items() if not isinstance(value, list)}
    for timing in values.get("speed", []):
        batch = timing["batch_size"]
        flat |= {
            f"{key}, batch {batch}": value for key, value in timing.items() if key.endswith(("seconds", "second"))
        }
        flat[f"peak_bytes, batch {batch}"] = timing["peak_bytes"]
    return flat


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "")


def _check(names: Sequence[str], held: HeldOut | None, teacher: EvalModel | None, model: EvalModel) -> None:
    for name in names:
        if name not in MEASURES:
            raise UserError(f"There is no measure {name!r}; choose some of {', '.join(MEASURES)}.")
        if name != "cost" and held is None:
            raise UserError(f"Measure {name} needs held-out rows: name a data recipe with --data.")
    for name in _WITH_TEACHER:
        if name in names and teacher is None:
            raise UserError(f"Measure {name} compares with a teacher: name it with --teacher.")
    if model.members:
        raise UserError(
            "Measurements are of one model; an ensemble is evaluated with --suite or --tasks.", because="not built"
        )


def _possible(model: EvalModel, rows: Dataset | None, teacher: EvalModel | None) -> list[str]:
    """All measures that can be taken; says which cannot."""
    if rows is None:
        return ["cost"]
    left_out: dict[str, str] = {}
    if teacher is None:
        left_out |= dict.fromkeys(_WITH_TEACHER, "there is no --teacher")
    if "images" in rows.column_names:
        left_out |= dict.fromkeys(("own_answers", "bytes"), "rows have images")
    ours = tokenizer_of(model.processing_class).get_vocab()
    if teacher is not None and ours != tokenizer_of(teacher.processing_class).get_vocab():
        different = "student and teacher have different vocabularies"
        left_out |= dict.fromkeys((*_WITH_TEACHER, "calibration"), different)
    for name, reason in left_out.items():
        print(f"Measure {name} is left out: {reason}.", file=sys.stderr)
    return [name for name in MEASURES if name not in left_out]


def rows_digest(rows: Dataset | None) -> str:
    """Of the rows' words and pictures."""
    if rows is None:
        return ""
    words = rows.to_list()
    if "images" in rows.column_names:
        words = [{**row, "images": [_picture(image) for image in row["images"] or []]} for row in words]
    return hashlib.sha256(json.dumps(words, default=str).encode()).hexdigest()


def _picture(image: Mapping[str, Any] | None) -> str | None:
    """What a stored picture is known by: its content, or where it lies."""
    if image is None or image["bytes"] is None:
        return None if image is None else image["path"]
    return hashlib.sha256(image["bytes"]).hexdigest()


def _text(row: Mapping[str, Any]) -> str:
    if "text" in row:
        return row["text"]
    if isinstance(row.get("prompt"), str):
        return row["prompt"] + row["completion"]
    messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
    return "\n".join(text_of(message.get("content")) for message in messages)
