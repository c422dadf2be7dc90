"""What a verifier or a judge said of every answer, in shards of their own beside the answers.

    FOLDER/verdicts/NAME-DIGEST/manifest.json, train/00000.arrow, ...

They are kept as a cache is: a shard per shard of answers, with checksums, so that a stopped verification goes on.
The folder is named by what decides the verdicts. Another choice among the answers asks nobody again.
"""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from datasets import Dataset, Features, Value
from rich.console import Console

from mmkd import __version__
from mmkd.cache.manifest import Manifest
from mmkd.cache.store import CacheWriter, read_shard
from mmkd.data.arrow import plain_rows, read_rows
from mmkd.data.prompts import text_of
from mmkd.data.teacher_view import answer_of
from mmkd.errors import UserError
from mmkd.generation.thoughts import thought_of
from mmkd.generation.verifiers import Verifier

VERDICTS = "verdicts"
_ABOUT = {
    "key": Value("binary"),
    "tokens": Value("int32"),
    "crc32": Value("uint32"),
    "row": Value("int32"),
    "sample": Value("int32"),
}
_TEXT = ("prompt", "completion")


@dataclass(frozen=True)
class StoredAnswer:
    """An answer as it lies in a shard, with the number of its row in the data."""

    key: bytes
    row: int
    sample: int
    tokens: int
    prompt: str | list[dict[str, Any]]
    text: str
    finish_reason: str

    def verdict_key(self, read: Sequence[Any]) -> bytes:
        """Of a verdict on this text by these values of the row.

        A shard that was generated anew may hold another text, and another right answer may stand in the data.
        """
        return hashlib.blake2b(self.key + self.text.encode() + repr(read).encode(), digest_size=16).digest()

    @property
    def final_part(self) -> str:
        """The answer without thoughts; nothing where they do not end."""
        return thought_of(self.text).answer


def stored_answers(folder: Path, manifest: Manifest, split: str, number: int) -> list[StoredAnswer]:
    """The answers of a finished shard in their order."""
    table = read_shard(folder, split, number, manifest.shards[split][number])
    columns = ["key", "tokens", *_TEXT, "sample", "finish_reason"]
    rows = plain_rows(table.select(columns), Features.from_arrow_schema(table.schema))
    samples = manifest.identity["sampling"]["samples"]
    answered = [row for row in manifest.span(split, number) if row not in manifest.skipped[split]]
    assert len(rows) == len(answered) * samples, "one row for each answer"
    return [
        StoredAnswer(
            own["key"],
            answered[place // samples],
            own["sample"],
            own["tokens"],
            own["prompt"],
            _text(own["completion"]),
            own["finish_reason"],
        )
        for place, own in enumerate(rows)
    ]


def _text(completion: str | Sequence[Mapping[str, Any]]) -> str:
    return completion if isinstance(completion, str) else text_of(completion[0]["content"])


def gold_of(row: Mapping[str, Any], column: str | None) -> Any:
    """The right answer of a row: the value of a column, or the answer that the row has; None without one."""
    return row[column] if column is not None else thought_of(answer_of(row)).answer or None


def check_gold_column(columns: Sequence[str], column: str | None) -> None:
    """Raises UserError for a column of right answers that the rows do not have."""
    if column is not None and column not in columns:
        raise UserError(
            f"cache_gold_column is {column!r}, which the rows lack; they have {', '.join(columns)}. Name one of them; "
            "a data recipe with `columns` maps the right answer to one."
        )


class Verdicts(ABC):
    """Verdicts on all answers of a folder, of one kind."""

    name: ClassVar[str]
    reads: Sequence[str] = ()
    """The columns of the data that a verdict depends on, besides those that the answers are of."""
    own: ClassVar[Mapping[str, Any]]
    """The columns of this kind's verdicts, with their types."""

    @property
    def features(self) -> Features:
        return Features({**_ABOUT, **self.own})

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What decides the verdicts."""

    def close(self) -> None:  # noqa: B027
        """Gives back connections."""

    @abstractmethod
    def of(self, answers: Sequence[StoredAnswer], rows: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The verdict on each answer; `rows` are those of the data, by number."""

    def folder(self, answers: Path) -> Path:
        """Where the verdicts on the answers of a folder lie."""
        digest = hashlib.sha256(json.dumps(self.facts(), sort_keys=True).encode()).hexdigest()[:12]
        return answers / VERDICTS / f"{self.name}-{digest}"

    def bring_up_to_date(
        self, answers: Path, manifest: Manifest, data: Mapping[Any, Dataset], columns: Sequence[str], console: Console
    ) -> None:
        """Gives the verdicts that are missing. `columns` are those of the data that are read."""
        identity = {
            "job": "verify",
            "mmkd": __version__,
            "teacher": manifest.identity["teacher"],
            "verification": self.facts(),
        }
        empty = Manifest(identity, manifest.shard_rows, manifest.total_rows)
        with CacheWriter(self.folder(answers), empty, self.features) as writer:
            planned = writer.manifest.planned()
            for done, (split, number) in enumerate(planned, start=1):
                stored = stored_answers(answers, manifest, split, number)
                start, span = time.perf_counter(), manifest.span(split, number)
                own = [name for name in columns if name in data[split].column_names]
                rows = dict(zip(span, read_rows(data[split].select(span), own), strict=True))
                keys = [answer.verdict_key([rows[answer.row][name] for name in self.reads]) for answer in stored]
                if self._is_there(writer, split, number, keys):
                    continue
                given = zip(keys, stored, self.of(stored, rows), strict=True)
                verdicts = [
                    {"key": key, "tokens": answer.tokens, "row": answer.row, "sample": answer.sample, **verdict}
                    for key, answer, verdict in given
                ]
                writer.write(split, number, verdicts, {}, {"seconds": round(time.perf_counter() - start, 3)})
                console.print(f"{self.name}: {split} shard {number}, {done} of {len(planned)}.", highlight=False)

    def _is_there(self, writer: CacheWriter, split: str, number: int, keys: Sequence[bytes]) -> bool:
        if number not in writer.manifest.shards[split]:
            return False
        return [row["key"] for row in self.read(writer.folder, writer.manifest, split, number)] == list(keys)

    @staticmethod
    def read(folder: Path, manifest: Manifest, split: str, number: int) -> list[dict[str, Any]]:
        """The verdicts of a shard, in the order of its answers."""
        return read_shard(folder, split, number, manifest.shards[split][number]).to_pylist()


class Rulings(Verdicts):
    """What a verifier says: the final answer, whether it is right, and how many answers to the prompt share it."""

    name = "verifier"
    own: ClassVar = {
        "final": Value("string"),
        "gold": Value("string"),
        "right": Value("bool"),
        "votes": Value("int32"),
    }

    def __init__(self, verifier: Verifier, gold_column: str | None, reads: Sequence[str]):
        self.verifier, self.gold_column, self.reads = verifier, gold_column, reads

    def facts(self) -> dict[str, Any]:
        return {**self.verifier.facts(), "gold_column": self.gold_column, "columns": list(self.reads)}

    def of(self, answers: Sequence[StoredAnswer], rows: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
        verdicts = []
        for row, own in by_row(answers):
            gold = gold_of(rows[row], self.gold_column) if self.verifier.reads_gold else None
            rulings = [self.verifier.rule(answer.final_part, rows[row], gold) for answer in own]
            classes = self.verifier.classes([ruling.final for ruling in rulings])
            verdicts += [
                {
                    "final": None if ruling.final is None else ruling.final.words,
                    "gold": ruling.gold,
                    "right": ruling.right,
                    "votes": 0 if of_class is None else classes.count(of_class),
                }
                for ruling, of_class in zip(rulings, classes, strict=True)
            ]
        return verdicts


def by_row(answers: Sequence[StoredAnswer]) -> Iterator[tuple[int, list[StoredAnswer]]]:
    """The answers to each prompt together, with the number of its row."""
    group: list[StoredAnswer] = []
    for answer in answers:
        if group and answer.row != group[0].row:
            yield group[0].row, group
            group = []
        group.append(answer)
    if group:
        yield group[0].row, group
