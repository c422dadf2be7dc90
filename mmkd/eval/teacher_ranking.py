"""Which of several teachers is worth it for a student: measurements of each, kept as they are made, and an order."""

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table

from mmkd import __version__
from mmkd.data.image_columns import image_column
from mmkd.data.load_data import load_data
from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.results.machine import machine
from mmkd.units import readable_count, readable_size, readable_time

from .answer_readings import AnsweredPrompt, AnswerReader, answered_rows
from .candidates import Candidate, LocalCandidate
from .harness import Settings
from .measures import rows_digest
from .model import EvalModel
from .results import key_of, to_json
from .teacher_fit import TOP_K, Pair, pattern_of, weight_facts

NAME = "teachers.json"

MEASURES = ("fit", "acceptance")
"""fit: how teacher and student go together; acceptance: how many drafted tokens of the student a teacher keeps."""


@dataclass(frozen=True)
class RankSettings:
    """What teachers are ranked on.

    Args:
        data: a data recipe, or rows; held-out rows are taken where it has them.
        rows: so many of them.
        answers: prompts of these that each teacher answers itself.
        max_new_tokens: the student's tokens of an answer that count, and those that are generated.
        draft_tokens: tokens that a draft model proposes at a time.
        measures: of MEASURES.
        seed: of the student's answers and, for acceptance, the teachers'.
    """

    data: str
    rows: int = 256
    answers: int = 16
    max_new_tokens: int = 64
    draft_tokens: int = 4
    measures: tuple[str, ...] = ("fit",)
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("rows", "answers", "max_new_tokens", "draft_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; give 1 or more.")
        unknown = [name for name in self.measures if name not in MEASURES]
        if unknown:
            raise UserError(f"There is no measure {unknown[0]!r}; choose some of {', '.join(MEASURES)}.")

    def load(self) -> Dataset:
        """The rows."""
        data = load_data(self.data, max_train_rows=self.rows, max_eval_rows=self.rows)
        return image_column(data["eval" if "eval" in data else "train"])


class Ranking:
    """Measures teachers one after the other beside a student; what is measured is kept, and not measured again."""

    def __init__(self, model: EvalModel, settings: RankSettings, how: Settings, output: Path | None = None) -> None:
        self.student, self.settings, self.how = LocalCandidate(model), settings, how
        self.path = output or model.results_folder / NAME
        self.rows = settings.load()
        self._kept: dict[str, Any] = {}
        if self.path.is_file():
            self._kept = json.loads(self.path.read_text(encoding="utf-8")).get("kept", {})

    def run(self, teachers: Sequence[Candidate], say: Callable[[str], None]) -> list[dict[str, Any]]:
        """The entries of the teachers, the best first."""
        entries, seconds = [], list[float]()
        keys = [self._key(teacher) for teacher in teachers]
        left = sum(key not in self._kept for key in keys)
        for teacher, key in zip(teachers, keys, strict=True):
            if key not in self._kept:
                about = f", about {readable_time(statistics.fmean(seconds) * left)} left" if seconds else ""
                say(f"{teacher.name}: {left} of {len(teachers)} teachers to measure{about}")
                begun = time.monotonic()
                self._keep(key, self._measured(teacher, say))
                seconds.append(time.monotonic() - begun)
                left -= 1
            entries.append({**self._kept[key], "name": teacher.name})
        entries = ordered(entries)
        self._write({"student": self.student.name, "settings": vars(self.settings), "teachers": entries})
        return entries

    def _key(self, teacher: Candidate) -> str:
        models = [side.identity(self.how) for side in (self.student, teacher)]
        return key_of("rank", __version__, vars(self.settings), rows_digest(self.rows), models)

    def _keep(self, key: str, entry: dict[str, Any]) -> None:
        self._kept[key] = entry
        self._write({})

    def _write(self, result: Mapping[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_file(self.path, to_json({**result, "kept": self._kept}, indent=1) + "\n")

    @cached_property
    def _own(self) -> AnswerReader:
        return self.student.reader(self.how)

    @cached_property
    def _data_answers(self) -> list[AnsweredPrompt]:
        """The data's answers, as far as they count; none of rows that are prompts alone."""
        most = self.settings.max_new_tokens
        return [
            AnsweredPrompt(text.prompt, text.tools, self._own.first_tokens(text.answer, most))
            for text in answered_rows(self.rows)
            if text.answer
        ]

    @cached_property
    def _own_answers(self) -> list[AnsweredPrompt]:
        """What the student answers, drawn from its own distribution."""
        return self._answers(self._own, self.settings.rows, temperature=1)

    def _answers(self, reader: AnswerReader, prompts: int, temperature: float) -> list[AnsweredPrompt]:
        asked = [(text.prompt, text.tools) for text in answered_rows(self.rows)[:prompts]]
        answers = reader.answers(asked, self.settings.max_new_tokens, temperature, self.settings.seed)
        return [text for text in answers if text.answer]

    def _measured(self, teacher: Candidate, say: Callable[[str], None]) -> dict[str, Any]:
        begun = time.monotonic()
        pair = Pair(self._own, teacher.reader(self.how))
        entry: dict[str, Any] = {"weights": weight_facts(pair.teacher), "machine": machine()}
        if "fit" in self.settings.measures:
            own, data = self._own_answers, self._data_answers
            advance = _Told(len(own) + len(data), teacher.name, say)
            entry["on_data"] = pair.compared(data, advance)
            entry["on_own_answers"] = pair.compared(own, advance)
            entry["tokenizers"] = {"same": pair.vocabulary is not None, **pair.tokenizers(data or own)}
            greedy = self.settings.answers
            for side, reader in (("student_pattern", pair.student), ("teacher_pattern", pair.teacher)):
                written = self._answers(reader, greedy, temperature=0) if reader.writes else []
                entry[side] = pattern_of(reader, written)
        if "acceptance" in self.settings.measures:
            sampled, greedy = (self._answers(pair.teacher, self.settings.rows, drawn) for drawn in (1, 0))
            told = _Told(len(sampled) + len(greedy), f"{teacher.name}, acceptance", say)
            entry["acceptance"] = pair.accepted(sampled, greedy, self.settings.draft_tokens, told)
        entry["seconds"] = time.monotonic() - begun
        del pair
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return entry


class _Told:
    """Says now and then how many texts have been read, and how long the others take."""

    EVERY = 15.0

    def __init__(self, total: int, what: str, say: Callable[[str], None]) -> None:
        self.total, self.what, self.say, self.done = total, what, say, 0
        self.begun = self.last = time.monotonic()

    def __call__(self) -> None:
        now = time.monotonic()
        if self.done and now - self.last >= self.EVERY:
            left = (now - self.begun) / self.done * (self.total - self.done)
            self.say(f"{self.what}: text {self.done} of {self.total}, about {readable_time(left)} left")
            self.last = now
        self.done += 1


def ordered(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The entries, the best teacher first, each with the numbers and the words behind its place.

    A teacher is worth what it knows better than the student, in bits per byte of the data's answers, times
    2^-d, where d is how much less likely than the student itself it finds what the student writes, in bits per byte:
    an estimate of KL(student || teacher). Of prompts without answers, d alone decides. A heuristic: no training is
    run.
    """
    judged = []
    for entry in entries:
        score = _score(entry) if "on_own_answers" in entry else _accepted(entry)
        judged.append({**entry, **({} if score is None else score)})
    return sorted(judged, key=lambda entry: -entry.get("score", float("-inf")))


def _accepted(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    rate = entry.get("acceptance", {}).get("acceptance")
    return None if rate is None else {"score": rate, "reasons": [f"keeps {rate:.0%} of the student's drafted tokens"]}


def _score(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    data, own = entry["on_data"], entry["on_own_answers"]
    if "teacher_bits_per_byte" not in own:
        return None
    distance = own["teacher_bits_per_byte"] - own["student_bits_per_byte"]
    reach = 2 ** -max(0.0, distance)
    if "teacher_bits_per_byte" not in data:
        return {"score": -distance, "distance": distance, "reach": reach, "reasons": _reasons(entry, None, distance)}
    gain = data["student_bits_per_byte"] - data["teacher_bits_per_byte"]
    score = gain * reach if gain > 0 else gain
    facts = {"gain": gain, "distance": distance, "reach": reach}
    return {"score": score, **facts, "reasons": _reasons(entry, gain, distance)}


def _reasons(entry: Mapping[str, Any], gain: float | None, distance: float) -> list[str]:
    own, tokenizers = entry["on_own_answers"], entry["tokenizers"]
    reasons = []
    if gain is not None and gain <= 0:
        reasons.append("knows the data's answers no better than the student: there is nothing to learn from it here")
    elif gain is not None:
        reasons.append(f"finds the data's answers likelier than the student does, by {gain:.2f} bits per byte")
    reasons.append(f"finds the student's own answers {distance:.2f} bits per byte less likely than the student does")
    if tokenizers["same"]:
        mass, all_of_it = (own[f"{side}_mass_on_student_top_k"] for side in ("teacher", "student"))
        if mass < 0.9 * all_of_it:
            reasons.append(
                f"puts {mass:.0%} of its probability on the student's {TOP_K} likeliest tokens, on which the student "
                f"puts {all_of_it:.0%}: they go about answers in different ways, and on-policy distillation may not "
                "take (2604.13016)"
            )
    else:
        reasons.append(
            f"has another tokenizer ({tokenizers.get('shared_ends', 0):.0%} of the student's tokens end where one of "
            "its own does): use method alm"
        )
    student, teacher = entry["student_pattern"], entry["teacher_pattern"]
    thinks = [bool(side.get("thinks") or side["template_thinks"]) for side in (student, teacher)]
    if thinks[0] != thinks[1]:
        who = "it thinks before it answers, and the student does not"
        reasons.append(who if thinks[1] else "the student thinks before it answers, and it does not")
    lengths = [side["tokens"] for side in (student, teacher) if "tokens" in side]
    if len(lengths) == 2 and max(lengths) > 2 * max(1.0, min(lengths)):
        reasons.append(f"answers in {teacher['tokens']:.0f} tokens, the student in {student['tokens']:.0f}")
    return reasons


_COLUMNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("gain", "bits per byte by which it finds the data's answers likelier than the student does", ("gain",)),
    ("distance", "bits per byte by which it finds the student's answers less likely than the student", ("distance",)),
    ("agree", "share of places in the data's answers with the same likeliest token", ("on_data", "agreement")),
    ("agree own", "the same in the student's own answers", ("on_own_answers", "agreement")),
    (
        f"top {TOP_K}",
        f"its probability of the student's {TOP_K} likeliest tokens, in the student's own answers",
        ("on_own_answers", "teacher_mass_on_student_top_k"),
    ),
    ("accept", "probability that it keeps a drafted token of the student", ("acceptance", "acceptance")),
    ("per pass", "its tokens per pass with the student's drafts, sampling", ("acceptance", "tokens_per_pass")),
    ("greedy", "the same with greedy decoding", ("acceptance", "tokens_per_pass_greedy")),
)
"""Heading, what it means, and where in an entry the number stands."""


def show_ranking(entries: Sequence[Mapping[str, Any]], console: Console) -> None:
    """A table of the teachers, the best first, what its columns mean, and the reasons."""
    columns = [column for column in _COLUMNS if any(_number(entry, column[2]) is not None for entry in entries)]
    table = Table("", "teacher", "parameters", "weights", *(heading for heading, _, _ in columns))
    for place, entry in enumerate(entries, start=1):
        values = [_number(entry, names) for _, _, names in columns]
        numbers = ["" if value is None else f"{value:.3f}" for value in values]
        sizes = entry["weights"]
        facts = (readable_count(sizes["parameters"]), readable_size(sizes["weight_bytes"])) if sizes else ("", "")
        table.add_row(str(place), entry["name"], *facts, *numbers)
    console.print(table)
    lines = [f"{heading}: {meaning}." for heading, meaning, _ in columns]
    for place, entry in enumerate(entries, start=1):
        reasons = "; ".join(entry.get("reasons", ["no text could be read by both"]))
        lines.append(f"{place}. {entry['name']}: {reasons}.")
    lines.append(
        "The order is a heuristic from one pass over the rows, without any training. mmkd compare with short runs of "
        "the first two decides."
    )
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _number(entry: Mapping[str, Any], names: Sequence[str]) -> float | None:
    value: Any = entry
    for name in names:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value
