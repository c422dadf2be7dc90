"""The answers that are kept, and pairs for DPO, as data sets beside the answers that were generated.

    FOLDER/kept/DIGEST/train.parquet     what data.yaml trains on
    FOLDER/pairs/DIGEST/train.parquet    what pairs.yaml and TRL's DPOTrainer train on
    FOLDER/traces.json                   how many were kept, and why the others were not

The digest is of everything that chooses them: data.yaml never names rows of another choice than its own.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from datasets import Dataset, Features, Value

from mmkd.cache.kept_answers import KEPT, PAIRS, SUMMARY
from mmkd.cache.manifest import Manifest
from mmkd.cache.store import read_shard
from mmkd.data.arrow import encoded_json
from mmkd.files import new_folder, write_file
from mmkd.recipe.cache_arguments import CacheArguments

from .answer_verdicts import Verdicts, by_row, stored_answers
from .selection import ACCEPTED, JudgedAnswer, Tally, judged, learnt_text, pairs_of

# Columns of the shards that say nothing to a student.
_INTERNAL = ("key", "crc32")


@dataclass(frozen=True)
class Selection:
    """The answers of a folder, and how they are chosen: the keys of a recipe and the verdicts they ask for."""

    folder: Path
    manifest: Manifest
    features: Features
    keys: CacheArguments
    kinds: Sequence[Verdicts]

    @property
    def digest(self) -> str:
        """Of everything that decides what is kept, and how it is written."""
        keys = self.keys
        chosen = {
            name: getattr(keys, name)
            for name in ("cache_keep", "cache_keep_truncated", "cache_thoughts", "cache_pairs")
        }
        chosen |= {"cache_majority": keys.cache_majority} if keys.cache_keep == "majority" else {}
        chosen |= {"cache_judge_min": keys.cache_judge_min} if keys.cache_keep == "judge" else {}
        chosen["verdicts"] = [kind.folder(self.folder).name for kind in self.kinds]
        return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def kept_features(self) -> Features:
        """The types of the rows that are kept."""
        own = {name: feature for name, feature in self.features.items() if name not in _INTERNAL}
        return Features({**own, **{name: feature for kind in self.kinds for name, feature in kind.own.items()}})

    @property
    def pair_features(self) -> Features:
        """The types of the pairs, with TRL's names."""
        completion = self.features["completion"]
        others = {name: self.features[name] for name in ("images", "tools") if name in self.features}
        answers = {"chosen": completion, "rejected": completion, "reason": Value("string")}
        return Features({"prompt": self.features["prompt"], **answers, **others})

    def path(self, kind: str, split: str) -> str:
        """Where the rows of a split stand, from the folder: `kind` is kept or pairs."""
        return f"{kind}/{self.digest}/{split}.parquet"

    def write(self) -> dict[str, Any]:
        """Writes the rows that are kept, the pairs and the summary; returns the summary."""
        writes_pairs = self.keys.cache_pairs > 0
        tallies = {split: Tally() for split in self.manifest.total_rows}
        with new_folder(self.folder / KEPT / self.digest) as kept:
            for split, tally in tallies.items():
                self._write_split(split, tally, kept / f"{split}.parquet")
        if writes_pairs:
            with new_folder(self.folder / PAIRS / self.digest) as pairs:
                for split in tallies:
                    self._write_pairs(split, pairs / f"{split}.parquet")
        keys = self.keys
        summary = {
            "keep": keys.cache_keep,
            "thoughts": keys.cache_thoughts,
            "verdicts": {kind.name: kind.facts() for kind in self.kinds},
            "splits": {split: tally.facts() for split, tally in tallies.items()},
        }
        write_file(self.folder / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        return summary

    def remove_others(self) -> None:
        """Deletes the rows of earlier choices, once no recipe names them any more."""
        for kind in (KEPT, PAIRS):
            for path in (self.folder / kind).glob("*"):
                if path.name != self.digest or (kind == PAIRS and not self.keys.cache_pairs):
                    shutil.rmtree(path, ignore_errors=True)

    def shards(self, split: str) -> Iterator[tuple[pa.Table, list[list[JudgedAnswer]]]]:
        """Shard after shard: its table, and its answers by prompt, in the order of its rows."""
        read = [(kind.folder(self.folder), kind) for kind in self.kinds]
        manifests = [(folder, kind, Manifest.read(folder)) for folder, kind in read]
        for number in sorted(self.manifest.shards[split]):
            answers = stored_answers(self.folder, self.manifest, split, number)
            verdicts: list[dict[str, Any]] = [{} for _ in answers]
            for folder, kind, manifest in manifests:
                for verdict, own in zip(verdicts, kind.read(folder, manifest, split, number), strict=True):
                    verdict |= {name: own[name] for name in kind.own}
            groups, first = [], 0
            for _, group in by_row(answers):
                groups.append(judged(group, verdicts[first : first + len(group)], self.keys))
                first += len(group)
            yield read_shard(self.folder, split, number, self.manifest.shards[split][number]), groups

    def _write_split(self, split: str, tally: Tally, path: Path) -> None:
        with pq.ParquetWriter(path, self.kept_features.arrow_schema, compression="zstd") as writer:
            for table, groups in self.shards(split):
                for group in groups:
                    tally.count(group, len(pairs_of(group, self.keys.cache_pairs)))
                flat = [own for group in groups for own in group]
                places = [place for place, own in enumerate(flat) if own.reason == ACCEPTED]
                writer.write_table(self._kept(_rows(table, places), [flat[place] for place in places]))

    def _kept(self, table: pa.Table, kept: Sequence[JudgedAnswer]) -> pa.Table:
        """The rows of kept answers; what does not change keeps its bytes, images among it."""
        features, verdicts = self.kept_features, [own.verdict for own in kept]
        texts = [self._completion(learnt_text(own.answer, self.keys.cache_thoughts)) for own in kept]
        made = {"completion": texts, **{n: [v[n] for v in verdicts] for kind in self.kinds for n in kind.own}}
        new = _table(made, Features({name: features[name] for name in made}))
        return pa.table(
            [new[name] if name in made else table[name] for name in features], schema=features.arrow_schema
        )

    def _write_pairs(self, split: str, path: Path) -> None:
        features, limit = self.pair_features, self.keys.cache_pairs
        with pq.ParquetWriter(path, features.arrow_schema, compression="zstd") as writer:
            for table, groups in self.shards(split):
                first, places, pairs = 0, [], []
                for group in groups:
                    own = pairs_of(group, limit)
                    places += [first + group.index(chosen) for chosen, _ in own]
                    pairs += own
                    first += len(group)
                made = {
                    "chosen": [self._learnt(chosen) for chosen, _ in pairs],
                    "rejected": [self._learnt(rejected) for _, rejected in pairs],
                    "reason": [rejected.reason for _, rejected in pairs],
                }
                new, table = _table(made, Features({name: features[name] for name in made})), _rows(table, places)
                columns = [new[name] if name in made else table[name] for name in features]
                writer.write_table(pa.table(columns, schema=features.arrow_schema))

    def _learnt(self, own: JudgedAnswer) -> Any:
        return self._completion(learnt_text(own.answer, self.keys.cache_thoughts))

    def _completion(self, text: str) -> Any:
        feature = self.features["completion"]
        if isinstance(feature, Value):
            return text
        return encoded_json([{"role": "assistant", "content": text}], feature)


def _rows(table: pa.Table, places: Sequence[int]) -> pa.Table:
    # The type of no places at all is not known from them.
    return table.take(pa.array(places, pa.int64()))


def _table(columns: Mapping[str, Sequence[Any]], features: Features) -> pa.Table:
    return Dataset.from_dict({name: list(values) for name, values in columns.items()}, features=features).data.table


def pairs_recipe(selection: Selection, about: Mapping[str, Any], summary: Mapping[str, Any]) -> bytes:
    """A data recipe of the pairs: mmkd trains on the chosen answers, TRL's DPOTrainer on both."""
    splits = [split for split, facts in summary["splits"].items() if facts["pairs"] or split == "train"]
    recipe = {
        **about,
        "source": "parquet",
        "data_files": {split: selection.path(PAIRS, split) for split in splits},
        "splits": {split: split for split in splits},
    }
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode()
