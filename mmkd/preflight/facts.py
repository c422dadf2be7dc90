"""What `mmkd doctor` looks at: two models as their files describe them, and a sample of rows as their tokens."""

import copy
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, GenerationConfig, LlavaConfig, PreTrainedConfig

from mmkd.capture.sequences import PreparedSequences, Sequences, TokenSequence, UnusableRow, prepare
from mmkd.data.data_recipe import OUTPUT_COLUMNS, DataRecipe
from mmkd.data.image_columns import image_column
from mmkd.data.images import read_row
from mmkd.data.load_data import load_data
from mmkd.errors import UserError
from mmkd.models.load import image_token_of, tokenizer_of
from mmkd.preparation.fit import Misfit
from mmkd.preparation.prompt_rows import prompts_only
from mmkd.recipe.recipe import Run
from mmkd.recipe.run_models import check_student, student_processing_class, teacher_processing_class
from mmkd.training.config import DistillationConfig
from mmkd.training.method import METHODS
from mmkd.training.preparing import sequences_of

TRAIN_ROWS = 256
EVAL_ROWS = 32
# Every row with images goes through an image processor, three times for each side.
VISION_ROWS = 32


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    severity: str
    """ok, warning or problem; a run with a problem is not sound."""
    name: str
    message: str
    advice: str = ""


def finding_of(misfit: Misfit, name: str) -> Finding:
    """What a check of training found, a problem where training refuses it."""
    return Finding("problem" if misfit.fatal else "warning", name, misfit.message, misfit.advice)


@dataclass(frozen=True)
class Side:
    """The student or the teacher without its weights."""

    role: str
    name: str
    config: PreTrainedConfig
    generation: GenerationConfig | None
    processing_class: Any
    rows: int
    """Of the model's vocabulary, padding included."""

    @property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.processing_class)

    @property
    def is_vision(self) -> bool:
        return hasattr(self.config, "vision_config")

    def stops(self) -> set[int]:
        """The ids at which the model's own generation ends."""
        configs = [self.generation] if self.generation is not None else [self.config, self.config.get_text_config()]
        # The config of some vision-language models leaves it to that of their language model.
        ids = {index for config in configs for index in _ids(getattr(config, "eos_token_id", None))}
        return ids | set(_ids(self.tokenizer.eos_token_id))

    def prepared_as(self, rendered: "Rendered", run: Run) -> "Side":
        """This side with the tokenizer as preparation leaves it, and the vocabulary that trl then gives the model."""
        rows = len(rendered.tokenizer.get_vocab()) if clones_template(run.training) else self.rows
        return replace(self, processing_class=rendered.prepared.processing_class, rows=rows)


def student_side(run: Run) -> Side:
    """Raises UserError when its config or tokenizer cannot be loaded, or nothing could be trained or saved of it."""
    check_student(run)
    arguments = run.arguments
    if arguments.student is not None:
        name, revision = arguments.student, run.student.model_revision
    else:
        assert arguments.teacher is not None
        name, revision = arguments.teacher, arguments.teacher_revision
    side = _side(run, "student", name, revision, student_processing_class(run))
    if arguments.student_init != "llava":
        return side
    config = _llava_config(run, side)
    return replace(side, config=config, rows=config.get_text_config().vocab_size)


def _llava_config(run: Run, side: Side) -> LlavaConfig:
    """That of the model which `assemble_llava` will make of a tower and the language model of a side."""
    trust, name = run.training.trust_remote_code, run.arguments.student_vision_tower
    assert name is not None
    if hasattr(side.config, "vision_config"):
        raise UserError(
            f"{side.name} is a vision-language model already; use it as the student itself.", because="meaning"
        )
    tower = AutoConfig.from_pretrained(name, trust_remote_code=trust)
    config = LlavaConfig(
        vision_config=getattr(tower, "vision_config", tower).to_dict(),
        text_config=side.config.to_dict(),
        image_token_index=side.processing_class.image_token_id,
        tie_word_embeddings=side.config.tie_word_embeddings,
    )
    # The embeddings get a row for the image token where the language model has none to spare.
    config.get_text_config().vocab_size = max(side.rows, len(side.tokenizer))
    config.dtype = side.config.dtype
    return config


def teacher_side(run: Run) -> Side:
    """Raises UserError when its config or tokenizer cannot be loaded."""
    name = run.arguments.teacher
    assert name is not None
    return _side(run, "teacher", name, run.arguments.teacher_revision, teacher_processing_class(run))


def _side(run: Run, role: str, name: str, revision: str | None, processing_class: Any) -> Side:
    hub: dict[str, Any] = {"trust_remote_code": run.training.trust_remote_code}
    if revision is not None:
        hub["revision"] = revision
    config = AutoConfig.from_pretrained(name, **hub)
    try:
        generation = GenerationConfig.from_pretrained(name, revision=revision or "main")
    except OSError:
        # Many models have none; they stop as their config says.
        generation = None
    return Side(role, name, config, generation, processing_class, config.get_text_config().vocab_size)


@dataclass(frozen=True)
class Sample:
    """The first rows of a run's data."""

    rows: DatasetDict
    totals: dict[str, int | None]
    """Split -> rows that the run will use, at most; None where nobody knows."""
    unreadable: dict[int, str]
    """Training rows that cannot be decoded, and why; they are not among `rows`."""
    assumed_answer: int | None = None
    """Tokens of the stand-in for the answer that the teacher will write, where rows are prompts only."""

    @property
    def has_images(self) -> bool:
        return "images" in self.rows["train"].column_names


def take_sample(run: Run) -> Sample:
    """The first rows of the data recipe. Raises UserError when it cannot be read or none of them can be decoded."""
    arguments, recipe = run.arguments, DataRecipe.load(run.arguments.data)
    most = VISION_ROWS if "images" in recipe.output_columns else TRAIN_ROWS
    asked = {
        "train": min(most, arguments.max_train_rows or most),
        "eval": min(EVAL_ROWS, arguments.max_eval_rows or EVAL_ROWS),
    }
    # Columns that answers are verified with belong to no layout, and nobody trains on them.
    verified = run.cache.read_columns if run.cache.job == "generate" else []
    also = [*dict.fromkeys((*run.columns_read, *verified))]
    rows = load_data(arguments.data, max_train_rows=asked["train"], max_eval_rows=asked["eval"], also=also)
    rows = rows.remove_columns([name for name in verified if name not in (*run.columns_read, *OUTPUT_COLUMNS)])
    caps = {"train": [recipe.max_rows, arguments.max_train_rows], "eval": [arguments.max_eval_rows]}
    totals: dict[str, int | None] = {}
    for split, dataset in rows.items():
        # Fewer than asked for are all there are.
        complete = len(dataset) < asked[str(split)]
        known = len(dataset) if complete else _documented(recipe, str(split), dataset)
        totals[str(split)] = min([count for count in [known, *caps[str(split)]] if count is not None], default=None)
    unreadable: dict[int, str] = {}
    if "images" in rows["train"].column_names:
        unreadable_rows = {str(split): _unreadable(dataset) for split, dataset in rows.items()}
        unreadable = unreadable_rows["train"]
        for split, bad in unreadable_rows.items():
            rows[split] = rows[split].select([row for row in range(len(rows[split])) if row not in bad])
        if not len(rows["train"]):
            first = next(iter(unreadable.values()))
            raise UserError(f"None of the first {len(unreadable)} rows of {recipe.name} can be decoded: {first}")
    method, assumed = METHODS[arguments.method], None
    generates = run.cache.job == "generate"
    if (method.answer_tokens is not None or generates) and prompts_only(rows["train"].column_names):
        tokens = method.answer_tokens
        assumed = tokens(run.training) if tokens is not None else run.cache.cache_max_new_tokens
        for split, dataset in rows.items():
            rows[split] = dataset.map(_with_answer, fn_kwargs={"tokens": assumed}, keep_in_memory=True)
    return Sample(rows, totals, unreadable, assumed)


def _with_answer(row: dict[str, Any], tokens: int) -> dict[str, Any]:
    """The answer of a prompt that has none yet: about so many tokens, in the form of the prompt."""
    text, prompt = " ".join(["a"] * tokens), row["prompt"]
    if isinstance(prompt, str):
        return {"completion": f" {text}"}
    content = text if isinstance(prompt[-1]["content"], str) else [{"type": "text", "text": text}]
    return {"completion": [{"role": "assistant", "content": content}]}


def _documented(recipe: DataRecipe, split: str, dataset: Dataset) -> int | None:
    """How many rows a split has at most, before filters, as far as its source or its recipe say."""
    if recipe.mixture:
        counts = [part.rows for part in recipe.mixture if part.rows is not None]
        exact = split == "train" and len(counts) == len(recipe.mixture)
        return sum(counts) if exact else recipe.rows.get(split)
    splits: Any = dataset.info.splits or {}
    source = recipe.splits.get(split, recipe.splits["train"])
    if source not in splits:
        return recipe.rows.get(split)
    rows = splits[source].num_examples
    held_out = recipe.eval_rows or round((recipe.eval_fraction or 0) * rows)
    return rows - held_out if split == "train" else held_out or rows


def _unreadable(rows: Dataset) -> dict[int, str]:
    read = enumerate(map(read_row, image_column(rows)))
    return {number: row.reason for number, row in read if isinstance(row, UnusableRow)}


@dataclass(frozen=True)
class Rendered:
    """The training rows of a sample as the tokens of one side, whole: neither cut nor packed."""

    sequences: list[TokenSequence | UnusableRow]
    """One per row of the sample."""
    prepared: PreparedSequences
    image_token: int | None
    """The id that stands for a piece of an image, where the processor names it."""

    @classmethod
    def of(cls, prepared: PreparedSequences) -> "Rendered":
        """The training rows of prepared data."""
        split = prepared.splits["train"]
        image_token = image_token_of(prepared.processing_class)
        if not isinstance(split, Sequences):
            return cls([split[row] for row in range(len(split))], prepared, image_token)
        # All rows, while `Sequences` itself leaves out equal ones and those without a supervised token.
        located = sequences_of(split.dataset)
        return cls(
            [TokenSequence(part.ids.astype(np.int32), part.supervised) for part in located], prepared, image_token
        )

    @property
    def tokenizer(self) -> Any:
        """With the settings that preparation makes: a template from elsewhere, another EOS, a pad token."""
        return tokenizer_of(self.prepared.processing_class)

    @cached_property
    def usable(self) -> list[TokenSequence]:
        return [sequence for sequence in self.sequences if isinstance(sequence, TokenSequence)]

    @cached_property
    def counts(self) -> tuple[Counter[int], Counter[int]]:
        """How often each id occurs, and how often supervised."""
        everything: Counter[int] = Counter()
        supervised: Counter[int] = Counter()
        for sequence in self.usable:
            everything.update(sequence.ids.tolist())
            supervised.update(sequence.ids[sequence.supervised].tolist())
        return everything, supervised


def render(run: Run, side: Side, sample: Sample) -> Rendered:
    """The training rows as trl prepares them for a student like this side. Raises UserError where training would."""
    args = whole(run.training)
    if side.role == "teacher":
        # These are the student's. Masks are too: only tokens are compared, and many templates cannot mark answers.
        args.chat_template_path = args.eos_token = args.pad_token = None
        args.assistant_only_loss = False
    rows = DatasetDict({"train": sample.rows["train"]})
    # Preparation changes the template and special tokens of what it is given.
    return Rendered.of(
        prepare(rows, args, copy.deepcopy(side.processing_class), judges_template=side.role == "student")
    )


def whole(training: DistillationConfig) -> DistillationConfig:
    """The same settings without those that cut, pack or shuffle."""
    args = copy.copy(training)
    args.max_length = None
    args.packing = args.shuffle_dataset = False
    args.eval_packing = args.padding_free = False
    return args


def clones_template(training: DistillationConfig) -> bool:
    """Whether the chat template is another model's, which brings that model's EOS and added tokens with it."""
    template = training.chat_template_path
    return template is not None and not template.endswith((".jinja", ".j2"))


def _ids(value: int | list[int] | None) -> list[int]:
    return [] if value is None else [value] if isinstance(value, int) else list(value)


def listed(items: Iterable[str], most: int = 3) -> str:
    """The first few of many things for a reader."""
    names = list(items)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
