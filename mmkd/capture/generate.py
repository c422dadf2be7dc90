"""The teacher's answers to the data's prompts, as a data set to train on (sequence-level KD) or to score."""

import hashlib
import json
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from datasets import Dataset, DatasetDict, Features, List, Value
from transformers import GenerationConfig, PreTrainedModel

from mmkd.cache.manifest import Manifest, Skipped
from mmkd.cache.sequence_keys import image_hash
from mmkd.cache.store import read_shard
from mmkd.data.arrow import encoded_json, read_rows
from mmkd.data.images import read_row
from mmkd.data.prompts import IllustratedText, model_inputs, question_of, with_pictures
from mmkd.errors import UserError
from mmkd.generation.local_generation import seed_of, seeded
from mmkd.models.load import positions_of, tokenizer_of
from mmkd.preparation.collation import refusal
from mmkd.recipe.run import Run, load_rows_of, load_teacher, teacher_processing_class
from mmkd.teachers.vllm_client import Answer, Ids, Prompt, RowError, VLLMClient
from mmkd.training.preparing import preparation_of

from .engines import Advance, batches
from .plan import Plan, ShardResult, client_of, described_teacher, folder_of, manifest_of
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


class Generator(ABC):
    """Continues prompts."""

    @abstractmethod
    def generate(self, rows: Sequence[AskedRow], seed: int, advance: Advance) -> list[list[Answer] | UnusableRow]:
        """`cache_samples` answers to every row, in the order of the rows."""


class LocalGenerator(Generator):
    """A model in this process; `generate` takes prompts with images one by one, others in batches of like length."""

    def __init__(self, model: PreTrainedModel, processing_class: Any, run: Run):
        self.model: Any = model.eval()
        if getattr(model, "hf_device_map", None) is None:
            self.model = self.model.to(Accelerator().device)
        self.processing_class, self.tokenizer = processing_class, tokenizer_of(processing_class)
        self.settings = run.cache
        told: Any = self.model.generation_config.eos_token_id
        ends: list[Any] = [told] if isinstance(told, int) else list(told or [])
        ends.append(self.tokenizer.eos_token_id)
        self.stops: list[Any] = sorted(set(ends) - {None})
        # generate() fills what its own settings leave open from the model's, such as a repetition penalty.
        self.model.generation_config = GenerationConfig()

    @torch.no_grad()
    def generate(self, rows: Sequence[AskedRow], seed: int, advance: Advance) -> list[list[Answer] | UnusableRow]:
        settings, positions = self.settings, positions_of(self.model.config)
        room = None if positions is None else positions - settings.cache_max_new_tokens
        answers: list[list[Answer] | UnusableRow] = [too_long_prompt(len(one.ids), room) or [] for one in rows]
        fitting = [place for place, answer in enumerate(answers) if not isinstance(answer, UnusableRow)]
        lengths = [
            (len(rows[place].ids) + settings.cache_max_new_tokens) * settings.cache_samples for place in fitting
        ]
        budget = 0 if any(one.images for one in rows) else settings.cache_batch_tokens
        # The prompts alone would not say which random numbers they get: those are of this shard and batch.
        with seeded(self.model, seed):
            for batch in batches(lengths, budget):
                places = [fitting[place] for place in batch]
                found_of_batch = self.answers([rows[place].prompt() for place in places])
                for place, found in zip(places, found_of_batch, strict=True):
                    answers[place] = found
                    advance(sum(len(answer.ids) for answer in found))
        return answers

    def answers(self, prompts: list[Prompt]) -> list[list[Answer]]:
        """The answers to one batch of prompts, either all with images or all without."""
        settings = self.settings
        sampled = settings.cache_temperature > 0
        stops = self.stops
        config = GenerationConfig(
            max_new_tokens=settings.cache_max_new_tokens,
            num_return_sequences=settings.cache_samples,
            do_sample=sampled,
            temperature=settings.cache_temperature if sampled else None,
            top_p=settings.cache_top_p if sampled else None,
            top_k=0 if sampled else None,
            eos_token_id=stops,
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else stops[0],
        )
        inputs = self.inputs(prompts)
        width = inputs["input_ids"].shape[1]
        output = self.model.generate(**inputs, generation_config=config)[:, width:].tolist()
        found = [self._answer(ids, stops) for ids in output]
        return [found[i : i + settings.cache_samples] for i in range(0, len(found), settings.cache_samples)]

    def inputs(self, prompts: list[Prompt]) -> dict[str, Any]:
        """What the model reads of a batch of prompts, padded on the left."""
        if prompts[0].images:
            asked = [one.messages or IllustratedText(one.text or "", tuple(one.images)) for one in prompts]
            return model_inputs(self.processing_class, asked).to(self.model.device)
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt.ids) :] = torch.tensor(list(prompt.ids))
            mask[row, longest - len(prompt.ids) :] = 1
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def _answer(self, ids: list[int], stops: list[int]) -> Answer:
        end = next((place for place, token in enumerate(ids) if token in stops), None)
        ids = ids if end is None else ids[: end + 1]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return Answer(str(text), ids, "length" if end is None else "stop")


class ServerGenerator(Generator):
    """vLLM over HTTP."""

    def __init__(self, client: VLLMClient, run: Run):
        settings = run.cache
        self.client, self.samples = client, settings.cache_samples
        self.sampling = {
            "max_tokens": settings.cache_max_new_tokens,
            "temperature": settings.cache_temperature,
            "top_p": settings.cache_top_p,
        }

    def generate(self, rows: Sequence[AskedRow], seed: int, advance: Advance) -> list[list[Answer] | UnusableRow]:
        answers: list[list[Answer] | UnusableRow] = []
        prompts = (one.prompt() for one in rows)
        for found in self.client.generate(prompts, {**self.sampling, "seed": seed}, self.samples):
            answers.append(UnusableRow(found.reason) if isinstance(found, RowError) else found)
            advance(0 if isinstance(found, RowError) else sum(len(answer.ids) for answer in found))
        return answers


@dataclass
class GeneratePlan(Plan):
    """The teacher's answers to the prompts of each row."""

    data: DatasetDict
    processing_class: Any

    @cached_property
    def generator(self) -> Generator:
        """Whoever answers; loading the teacher waits until somebody asks."""
        settings = self.run.arguments
        if settings.teacher_server is not None:
            return ServerGenerator(client_of(self.run, self.processing_class), self.run)
        assert settings.teacher is not None
        return LocalGenerator(load_teacher(self.run, settings.teacher, self.dtype), self.processing_class, self.run)

    def files(self) -> dict[str, bytes]:
        return {DATA_RECIPE: yaml.safe_dump(self._recipe(), sort_keys=False).encode()}

    def summary(self, manifest: Manifest) -> list[str]:
        return [describe_answers(self.folder, manifest)]

    def shard(self, split: str, number: int, advance: Advance) -> ShardResult:
        start, span, dataset = time.perf_counter(), self.manifest.span(split, number), self.data[split]
        raw = dict(zip(span, read_rows(dataset.select(span), dataset.column_names), strict=True))
        asked, skipped = [], {}
        for row, values in raw.items():
            one = self._asked(row, values)
            if isinstance(one, UnusableRow):
                skipped[row] = Skipped(one.reason)
            else:
                asked.append(one)
        self.refuse(skipped, split)
        seed = seed_of(f"{self.arguments.cache_seed} {split} {number}")
        rows = []
        for one, answers in zip(asked, self.generator.generate(asked, seed, advance), strict=True):
            if isinstance(answers, UnusableRow):
                skipped[one.row] = Skipped(answers.reason)
            else:
                rows += [self._row(raw[one.row], one, sample, answer) for sample, answer in enumerate(answers)]
        self.refuse(skipped, split)
        return ShardResult(split, number, rows, skipped, {"seconds": round(time.perf_counter() - start, 3)})

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
                "messages, or use a local teacher (remove teacher_server)."
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
        said = answer.text if isinstance(asked, str) else [{"role": "assistant", "content": answer.text}]
        key = hashlib.blake2b(json.dumps([list(map(int, prompt.ids)), sample]).encode(), digest_size=16)
        for image in prompt.images:
            key.update(bytes.fromhex(image))
        others = {name: row[name] for name in ("images", "tools") if name in row}
        own = {"prompt": asked, "completion": said, **others}
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
            "columns to prompt (and completion), or to messages."
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
    said = f"{total:,} answers, {cut:,} of them cut off at cache_max_new_tokens {longest}"
    if "filters" in (yaml.safe_load((folder / DATA_RECIPE).read_text(encoding="utf-8")) or {}):
        return (
            f"{said}: {DATA_RECIPE} leaves those out of training. Raise cache_max_new_tokens and name another folder "
            "to get them whole, or build again with cache_keep_truncated: true to train on them up to where they were "
            "cut."
        )
    return f"{said}, which {DATA_RECIPE} trains on up to where they were cut (cache_keep_truncated)."


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
