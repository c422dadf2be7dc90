"""The teacher's answers to the data's prompts, as a data set to train on (sequence-level KD) or to score."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DatasetDict, Features, List, Value

from mmkd.cache.manifest import Manifest, Skipped
from mmkd.cache.sequence_keys import image_hash
from mmkd.cache.store import read_shard
from mmkd.data.arrow import encoded_json, read_rows
from mmkd.data.images import read_row
from mmkd.data.prompts import IllustratedText, model_inputs, question_of, with_pictures
from mmkd.errors import UserError
from mmkd.generation.generator import Advance, Answer, Generator, Prompt, RowError, Sampling
from mmkd.generation.local_generation import LocalGenerator, on_device, prompt_inputs, seed_of
from mmkd.generation.served_generation import ServerGenerator
from mmkd.models.load import positions_of, tokenizer_of
from mmkd.preparation.vision_checks import refusal
from mmkd.recipe.recipe import Run
from mmkd.recipe.run import load_rows_of
from mmkd.recipe.run_models import load_teacher, teacher_processing_class
from mmkd.teachers.vllm_client import Ids
from mmkd.training.preparing import preparation_of

from .build_plan import Plan, ShardResult, folder_of, manifest_of
from .captured_teacher import client_of, described_teacher
from .scorers import batches
from .sequences import UnusableRow

DATA_RECIPE = "data.yaml"


@dataclass(frozen=True)
class AskedRow:
    """A row to be answered: the tokens of its prompt, and how to make the prompt itself.

    Decoded, the images of all rows of a shard would not fit into memory.
    """

    row: int
    ids: Ids
    images: tuple[str, ...]
    """Hashes of the images."""
    prompt: Callable[[], Prompt]


@dataclass
class GeneratePlan(Plan):
    """The teacher's answers to the prompts of each row."""

    data: DatasetDict
    processing_class: Any

    @cached_property
    def generator(self) -> Generator[AskedRow]:
        """Whoever answers; loading the teacher waits until somebody asks."""
        settings = self.run.arguments
        if settings.teacher_server is not None:
            return ServerGenerator(client_of(self.run, self.processing_class), lambda row: row.prompt())
        assert settings.teacher is not None
        teacher = on_device(load_teacher(self.run, settings.teacher, self.dtype))

        def inputs(rows: list[AskedRow]) -> Mapping[str, Any]:
            return prompt_inputs(self.processing_class, [row.prompt() for row in rows])

        return LocalGenerator(teacher, self.processing_class, inputs, self._batches)

    def _batches(self, rows: Sequence[AskedRow]) -> Iterator[list[int]]:
        """Prompts with images one by one, others in batches of like length."""
        arguments = self.arguments
        lengths = [(len(row.ids) + arguments.cache_max_new_tokens) * arguments.cache_samples for row in rows]
        return batches(lengths, 0 if any(row.images for row in rows) else arguments.cache_batch_tokens)

    def files(self) -> dict[str, bytes]:
        return {DATA_RECIPE: yaml.safe_dump(self._recipe(), sort_keys=False).encode()}

    def summary(self, manifest: Manifest) -> list[str]:
        return [describe_answers(self.folder, manifest)]

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
        return ShardResult(split, number, rows, skipped, {"seconds": round(time.perf_counter() - start, 3)})

    def _too_long(self, row: AskedRow, skipped: dict[int, Skipped]) -> bool:
        """Whether a teacher in this process has no room for a row's prompt and answers; a server says so itself."""
        if not isinstance(self.generator, LocalGenerator):
            return False
        positions = positions_of(self.generator.model.config)
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
        images = tuple(image_hash(image) for image in prompt.images)
        # What has no images is not worth making twice.
        make = partial(self._prompt_again, row, values) if images else lambda: prompt
        return AskedRow(row, prompt.ids, images, make)

    def _prompt(self, row: Mapping[str, Any]) -> Prompt | UnusableRow:
        read = read_row(row)
        if isinstance(read, UnusableRow):
            return read
        images = read.get("images")
        try:
            asked = with_pictures(question_of(read), images)
        except UserError as error:
            return UnusableRow(str(error))
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
        key = hashlib.blake2b(json.dumps([list(map(int, prompt.ids)), sample]).encode(), digest_size=16)
        for image in prompt.images:
            key.update(bytes.fromhex(image))
        others = {name: row[name] for name in ("images", "tools") if name in row}
        own = {"prompt": asked, "completion": completion, **others}
        own = {name: encoded_json(value, self.features[name]) for name, value in own.items()}
        facts = {"sample": sample, "finish_reason": answer.finish_reason}
        return {"key": key.digest(), "tokens": len(answer.ids), **own, **facts}

    def _recipe(self) -> dict[str, Any]:
        """A data recipe of the answers that ended by themselves, or where asked of all, with the cut ones marked."""
        identity = self.manifest.identity
        teacher, data = identity["teacher"]["name"], identity["data"]
        columns = {name: name for name in ("prompt", "completion", "images", "tools") if name in self.features}
        return {
            "name": f"{data['name']}-answers",
            "description": f"Answers of {teacher} to the prompts of {data['name']}.",
            "license": data["license"],
            "source": ".",
            "splits": {split: split for split in self.manifest.total_rows},
            **(
                {"columns": {**columns, "truncated": "finish_reason"}}
                if self.arguments.cache_keep_truncated
                else {"columns": columns, "filters": {"equals": {"finish_reason": "stop"}}}
            ),
        }


def make_generate_plan(run: Run) -> GeneratePlan:
    """The plan of a cache of answers. Raises UserError for data without prompts and settings that cannot be."""
    settings, arguments = run.arguments, run.cache
    if settings.teacher is None or settings.teacher_cache is None:
        raise UserError(
            "Generating needs `teacher` (who answers; with teacher_server too) and `teacher_cache` (the folder to "
            "write)."
        )
    data = load_rows_of(run)
    columns = data["train"].column_names
    if "text" in columns:
        raise UserError(
            f"The data {settings.data!r} is plain text without prompts, so there is nothing to answer. Map its "
            "columns to prompt (and completion), or to messages.",
            because="meaning",
        )
    processing_class = teacher_processing_class(run)
    # vLLM has to have room for prompt and answer; how long prompts are is not known before they are rendered.
    teacher = described_teacher(run, tokenizer_of(processing_class), 0, arguments.cache_max_new_tokens)
    facts = preparation_of(processing_class, run.training)
    rendering = {name: facts[name] for name in ("tokenizer", "chat_template", "image_processor")}
    sampling = {
        "samples": arguments.cache_samples,
        "max_new_tokens": arguments.cache_max_new_tokens,
        "temperature": arguments.cache_temperature,
        "top_p": arguments.cache_top_p,
        "seed": arguments.cache_seed,
    }
    rows = {str(split): len(dataset) for split, dataset in data.items()}
    manifest = manifest_of(run, teacher, data, rows, signal={"kind": "text"}, preparation=rendering, sampling=sampling)
    return GeneratePlan(run, folder_of(run), manifest, _features(data["train"]), data, processing_class)


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
    if "filters" in (yaml.safe_load((folder / DATA_RECIPE).read_text(encoding="utf-8")) or {}):
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


def _features(data: Dataset) -> Features:
    prompt = data.features["prompt" if "prompt" in data.column_names else "messages"]
    others = {name: data.features[name] for name in ("images", "tools") if name in data.column_names}
    message = {"role": Value("string"), "content": Value("string")}
    return Features(
        {
            "key": Value("binary"),
            "tokens": Value("int32"),
            "crc32": Value("uint32"),
            "prompt": prompt,
            "completion": prompt if isinstance(prompt, Value) else List(message),
            **others,
            "sample": Value("int32"),
            "finish_reason": Value("string"),
        }
    )
