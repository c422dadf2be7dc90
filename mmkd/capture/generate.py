"""The teacher's answers to the data's prompts, as a data set to train on (sequence-level KD) or to score."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from datasets import DatasetDict
from rich.console import Console

from mmkd.cache.kept_answers import KEPT, PAIRS_RECIPE, SUMMARY, summary_lines
from mmkd.cache.manifest import Manifest, Skipped
from mmkd.cache.sequence_keys import image_hash
from mmkd.cache.store import read_shard
from mmkd.data.arrow import encoded_json, read_rows
from mmkd.data.images import read_row
from mmkd.data.prompts import IllustratedText, model_inputs, question_of, with_pictures
from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.generation.chat_generation import ChatGenerator
from mmkd.generation.generator import Advance, Answer, Generator, Prompt, RowError, Sampling
from mmkd.generation.local_generation import LocalGenerator, seed_of
from mmkd.generation.thoughts import BudgetedAnswer, BudgetedGenerator
from mmkd.generation.verifiers import verifier_named
from mmkd.models.load import positions_of
from mmkd.preparation.row_views import RowView
from mmkd.preparation.vision_checks import refusal

from .answer_verdicts import Rulings, Verdicts
from .answering import AskedRow, api_prompt, generator_of, judge_client
from .build_plan import Plan, ShardResult
from .judging import Ratings
from .sequences import UnusableRow
from .traces import Selection, pairs_recipe

DATA_RECIPE = "data.yaml"


@dataclass
class GeneratePlan(Plan):
    """The teacher's answers to the prompts of each row."""

    data: DatasetDict
    processing_class: Any
    """Of the teacher; None for a chat server."""
    view: RowView | None
    """What the teacher is asked in the place of the student's prompt, if it is."""
    _counted: tuple[int, int] = (0, 0)
    """Tokens that a chat server has read and written for the shards that are finished."""

    def __getstate__(self) -> dict[str, Any]:
        # For workers, who load a teacher of their own and verify nothing; connections cannot be sent.
        return {name: value for name, value in vars(self).items() if name not in ("generator", "kinds", "selection")}

    @cached_property
    def generator(self) -> Generator[AskedRow]:
        """Whoever answers; loading the teacher waits until somebody asks."""
        return generator_of(self.run, self.processing_class, self.dtype)

    @cached_property
    def kinds(self) -> list[Verdicts]:
        """The verdicts that the recipe asks for."""
        keys, kinds = self.arguments, list[Verdicts]()
        if keys.cache_verifier is not None:
            verifier = verifier_named(keys.cache_verifier, keys.cache_json_schema, keys.cache_gold_column)
            kinds.append(Rulings(verifier, keys.cache_gold_column, keys.read_columns))
        if keys.cache_judge_server is not None:
            kinds.append(Ratings(judge_client(self.run), keys.cache_gold_column))
        return kinds

    @cached_property
    def selection(self) -> Selection:
        """How answers are chosen from those in the folder."""
        return Selection(self.folder, self.manifest, self.features, self.arguments, self.kinds)

    @property
    def selects(self) -> bool:
        """Whether data.yaml names rows that were chosen, and not the shards themselves."""
        keys = self.arguments
        return keys.cache_keep != "all" or keys.cache_thoughts == "strip" or bool(self.kinds)

    def files(self) -> dict[str, bytes]:
        return {DATA_RECIPE: self._dumped(self._recipe())}

    def summary(self, manifest: Manifest) -> list[str]:
        return [describe_answers(self.folder, manifest)]

    def complete(self, manifest: Manifest, console: Console) -> None:
        """Verifies the answers and writes those that are kept, once all are there."""
        if not self.selects:
            (self.folder / SUMMARY).unlink(missing_ok=True)
            return
        if manifest.part is not None:
            console.print("Answers are verified when all parts are in one folder: merge them, then build again.")
            return
        columns = self.data["train"].column_names
        read = [name for name in columns if name not in ("images", "tools")]
        for kind in self.kinds:
            kind.bring_up_to_date(self.folder, manifest, self.data, read, console)
        selection = replace(self.selection, manifest=manifest)
        summary = selection.write()
        write_file(self.folder / DATA_RECIPE, self._dumped(self._recipe(summary)))
        if self.arguments.cache_pairs:
            write_file(self.folder / PAIRS_RECIPE, pairs_recipe(selection, self._about("pairs"), summary))
        else:
            (self.folder / PAIRS_RECIPE).unlink(missing_ok=True)
        selection.remove_others()
        for kind in self.kinds:
            kind.close()
        for line in summary_lines(summary):
            console.print(line, highlight=False, markup=False)

    def shard(self, split: str, number: int, advance: Advance) -> ShardResult:
        start, span, dataset = time.perf_counter(), self.manifest.span(split, number), self.data[split]
        raw = dict(zip(span, read_rows(dataset.select(span), dataset.column_names), strict=True))
        asked, skipped = [], {}
        for row, values in raw.items():
            request = self._asked(row, values)
            if isinstance(request, UnusableRow):
                skipped[row] = Skipped(request.reason)
            else:
                asked.append(request)
        self.refuse(skipped, split)
        asked = [row for row in asked if not self._too_long(row, skipped)]
        arguments, rows = self.arguments, []
        seed = seed_of(f"{arguments.cache_seed} {split} {number}")
        sampling = Sampling(arguments.cache_max_new_tokens, arguments.cache_temperature, arguments.cache_top_p, seed)
        answered = self.generator.generate(asked, sampling, arguments.cache_samples, advance)
        for row, answers in zip(asked, answered, strict=True):
            if isinstance(answers, RowError):
                skipped[row.row] = Skipped(answers.reason)
            else:
                rows += [self._row(raw[row.row], row, sample, answer) for sample, answer in enumerate(answers)]
        self.refuse(skipped, split)
        cost: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 3)}
        if isinstance(self.generator, ChatGenerator):
            client = self.generator.client
            counted = (client.prompt_tokens, client.completion_tokens)
            read, written = (now - before for now, before in zip(counted, self._counted, strict=True))
            self._counted = counted
            cost |= {"prompt_tokens": read, "completion_tokens": written}
        return ShardResult(split, number, rows, skipped, cost)

    def _too_long(self, row: AskedRow, skipped: dict[int, Skipped]) -> bool:
        """Whether a teacher in this process has no room for a row's prompt and answers; a server says so itself."""
        generator = self.generator
        if isinstance(generator, BudgetedGenerator):
            generator = generator.inner
        if not isinstance(generator, LocalGenerator):
            return False
        positions = positions_of(generator.model.config)
        unusable = too_long_prompt(
            len(row.ids), None if positions is None else positions - self.arguments.cache_max_new_tokens
        )
        if unusable is not None:
            skipped[row.row] = Skipped(unusable.reason)
        return unusable is not None

    def _asked(self, row: int, values: Mapping[str, Any]) -> AskedRow | UnusableRow:
        if not question_of(values):
            return UnusableRow("It asks nothing: its prompt is empty, or no message comes before the assistant's")
        prompt = self._prompt(values)
        if isinstance(prompt, UnusableRow):
            return prompt
        if prompt.images and self.arguments.cache_max_think_tokens is not None:
            raise UserError(
                "cache_max_think_tokens goes on with a prompt in tokens, and rows with images are asked in messages. "
                "Remove it, or use data without images.",
                because="not built",
            )
        images = tuple(image_hash(image) for image in prompt.images)
        # What has no images is not worth making twice.
        make = partial(self._prompt_again, row, values) if images else lambda: prompt
        return AskedRow(row, prompt.ids, images, make)

    def _prompt(self, row: Mapping[str, Any]) -> Prompt | UnusableRow:
        try:
            read = read_row(row if self.view is None else self.view.rewrite(row))
            if isinstance(read, UnusableRow):
                return read
            images = read.get("images")
            asked = with_pictures(question_of(read), images)
        except UserError as error:
            return UnusableRow(str(error))
        if self.run.arguments.teacher_api is not None:
            return api_prompt(asked, images or (), row)
        text = asked.text if isinstance(asked, IllustratedText) and images else None
        if text is not None and self.run.arguments.teacher_server is not None:
            raise UserError(
                "A server is asked about images through messages, but the prompts are plain text. Map them to "
                "messages, or use a local teacher (remove teacher_server).",
                because="not built",
            )
        try:
            ids = model_inputs(self.processing_class, [asked], [row.get("tools")])["input_ids"][0].tolist()
        except Exception:
            # Processors have exceptions of their own for images that they do not take.
            refused = refusal(images or (), self.processing_class)
            if refused is None:
                raise
            return UnusableRow(f"The processor refuses it: {refused}")
        return Prompt(ids, asked if images and isinstance(asked, list) else None, images or (), text)

    def _prompt_again(self, number: int, row: Mapping[str, Any]) -> Prompt:
        prompt = self._prompt(row)
        if isinstance(prompt, UnusableRow):
            raise UserError(f"Row {number} can no longer be read: {prompt.reason}. Its image has changed meanwhile.")
        return prompt

    def _row(self, row: Mapping[str, Any], prompt: AskedRow, sample: int, answer: Answer) -> dict[str, Any]:
        asked = question_of(row)
        completion = answer.text if isinstance(asked, str) else [{"role": "assistant", "content": answer.text}]
        # A chat server makes tokens of its own: there the words are what was asked.
        said: Any = list(map(int, prompt.ids)) or asked
        key = hashlib.blake2b(json.dumps([said, sample]).encode(), digest_size=16)
        for image in prompt.images:
            key.update(bytes.fromhex(image))
        others = {name: row[name] for name in ("images", "tools") if name in row}
        own = {"prompt": asked, "completion": completion, **others}
        own = {name: encoded_json(value, self.features[name]) for name, value in own.items()}
        facts: dict[str, Any] = {"sample": sample, "finish_reason": answer.finish_reason}
        if "thoughts_cut" in self.features:
            facts["thoughts_cut"] = isinstance(answer, BudgetedAnswer) and answer.thoughts_cut
        return {"key": key.digest(), "tokens": answer.tokens, **own, **facts}

    def _about(self, kind: str) -> dict[str, Any]:
        """The name, description and licence of a data recipe of the answers, or of pairs of them."""
        identity = self.manifest.identity
        teacher, data = identity["teacher"]["name"], identity["data"]
        what = "Answers" if kind == "answers" else "Pairs of a kept and a rejected answer"
        description = f"{what} of {teacher} to the prompts of {data['name']}."
        return {"name": f"{data['name']}-{kind}", "description": description, "license": data["license"]}

    def _recipe(self, summary: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A data recipe of the answers that ended by themselves, or where asked of all, with the cut ones marked.

        Where answers are chosen, it is of those that were; `summary` says how many, once that is known.
        """
        columns = {name: name for name in ("prompt", "completion", "images", "tools") if name in self.features}
        keeps_cut = self.arguments.cache_keep_truncated
        columns |= {"truncated": "finish_reason"} if keeps_cut else {}
        about, splits = self._about("answers"), list(self.manifest.total_rows)
        if not self.selects:
            filters = {} if keeps_cut else {"filters": {"equals": {"finish_reason": "stop"}}}
            places = {"source": ".", "splits": {split: split for split in splits}}
            return {**about, **places, "columns": columns, **filters}
        if summary is not None:
            about["description"] += " " + " ".join(summary_lines(summary))
            splits = [split for split in splits if summary["splits"][split]["kept"] or split == "train"]
        return {
            **about,
            "source": "parquet",
            "data_files": {split: self.selection.path(KEPT, split) for split in splits},
            "splits": {split: split for split in splits},
            "columns": columns,
        }

    @staticmethod
    def _dumped(recipe: Mapping[str, Any]) -> bytes:
        return yaml.safe_dump(dict(recipe), sort_keys=False).encode()


def describe_answers(folder: Path, manifest: Manifest) -> str:
    """How many answers a folder holds, how many of them were cut off, and what becomes of those, in one line."""
    reasons: Counter[str] = Counter()
    for split, entries in manifest.shards.items():
        for number, entry in entries.items():
            reasons.update(read_shard(folder, split, number, entry)["finish_reason"].to_pylist())
    total, cut = reasons.total(), reasons["length"]
    if not cut:
        return f"{total:,} answers, none cut off."
    longest = manifest.identity["sampling"]["max_new_tokens"]
    summary = f"{total:,} answers, {cut:,} of them cut off at cache_max_new_tokens {longest}"
    recipe = yaml.safe_load((folder / DATA_RECIPE).read_text(encoding="utf-8")) or {}
    if "data_files" in recipe and "truncated" not in recipe["columns"]:
        return f"{summary}."
    if "filters" in recipe:
        return (
            f"{summary}: {DATA_RECIPE} leaves those out of training. Raise cache_max_new_tokens and name another "
            "folder to get them whole, or build again with cache_keep_truncated: true to train on them up to where "
            "they were cut."
        )
    return f"{summary}, which {DATA_RECIPE} trains on up to where they were cut (cache_keep_truncated)."


def too_long_prompt(tokens: int, room: int | None) -> UnusableRow | None:
    """Why a prompt is too long for a teacher with so much room before its answer; None where it is not."""
    if room is None or tokens <= room:
        return None
    return UnusableRow(
        f"Its prompt has {tokens} tokens, and the teacher has room for {max(room, 0)} before an answer "
        "(max_position_embeddings). Lower cache_max_new_tokens, or leave such rows out (on_error: skip)."
    )
