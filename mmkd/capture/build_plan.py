"""What a build will do, from a recipe: its shards and everything that goes into the manifest. No one is asked yet."""

import hashlib
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from datasets import Dataset, DatasetDict, Features
from jaxtyping import Bool
from rich.console import Console

from mmkd import __version__
from mmkd.alignment.pieces import TokenPieces, boundary_mask, set_sha256
from mmkd.cache.codec import Codec, TokenOrder, TokenScores
from mmkd.cache.hub import is_hub_id
from mmkd.cache.manifest import Manifest, Skipped
from mmkd.cache.side_files import HEAD, TOKEN_ORDER, head_bytes, order_bytes
from mmkd.cache.state_codec import StateCodec, TokenStates
from mmkd.cache.store import SIGNAL_FEATURES
from mmkd.data.arrow import read_rows
from mmkd.data.data_recipe import DataRecipe
from mmkd.data.filters import row_key
from mmkd.errors import UserError
from mmkd.generation.generator import Advance
from mmkd.models.heads import LMHead
from mmkd.models.load import image_token_of, tokenizer_of
from mmkd.recipe.cache_arguments import CacheArguments
from mmkd.recipe.recipe import Run
from mmkd.recipe.run import load_rows_of
from mmkd.recipe.run_models import load_teacher, student_processing_class, teacher_processing_class
from mmkd.recipe.run_teacher import server_signal
from mmkd.training.method import METHODS

from .captured_teacher import (
    check_loaded_head,
    check_top_k_server,
    client_of,
    described_teacher,
    hidden_teacher,
    shared_rows,
    states_signal,
    teacher_head,
)
from .scorers import HiddenServerScorer, LocalScorer, ScoreFormat, Scorer, ServerScorer
from .sequences import PreparedSequences, TokenSequence, UnusableRow, prepare, usable


@dataclass
class ShardResult:
    """What one shard holds, before it is written."""

    split: str
    number: int
    rows: list[dict[str, Any]]
    skipped: dict[int, Skipped]
    cost: dict[str, Any]


@dataclass
class Plan(ABC):
    """A build before it starts; a recipe gives the same plan on all machines that compute in the same type."""

    run: Run
    folder: Path
    manifest: Manifest
    features: Features
    counted: ClassVar[str] = "supervised tokens"
    """What the shards hold, in words."""

    @abstractmethod
    def shard(self, split: str, number: int, advance: Advance) -> ShardResult:
        """Asks the teacher about one shard. Raises UserError for a row it cannot read, unless those are skipped."""

    def files(self) -> dict[str, bytes]:
        """What lies beside the shards from the start."""
        return {}

    def summary(self, manifest: Manifest) -> list[str]:
        """What to say of the rows once they are written, in lines."""
        return []

    def complete(self, manifest: Manifest, console: Console) -> None:  # noqa: B027
        """Does what needs all rows, once all shards are there."""

    @property
    def arguments(self) -> CacheArguments:
        return self.run.cache

    @property
    def dtype(self) -> str:
        """The type that a local teacher is loaded in wherever a shard is computed: the one that is recorded."""
        recorded = self.manifest.identity["teacher"]["dtype"]
        return "float32" if recorded == "float32" else self.run.arguments.teacher_dtype

    def refuse(self, skipped: dict[int, Skipped], split: str) -> None:
        """Raises UserError for rows that would have to be left out when that was not asked for."""
        if skipped and self.arguments.on_error == "fail":
            row, entry = min(skipped.items())
            raise UserError(
                f"Row {row} of the {split} data cannot be used: {entry.reason} ({len(skipped)} such rows in this "
                "shard). Correct it, or set on_error: skip to leave such rows out."
            )


@dataclass
class ScorePlan(Plan):
    """The teacher's distributions over given answers."""

    prepared: PreparedSequences
    codec: Codec | StateCodec
    served: str | None = None
    """The signal of the servers that are asked; None for a teacher in this process."""

    @cached_property
    def scorer(self) -> Scorer:
        """Whoever answers; loading the teacher waits until somebody asks."""
        run = self.run
        if self.served == "hidden":
            return HiddenServerScorer(hidden_teacher(run, self._tokenizer), self.score_format)
        if self.served is not None:
            return ServerScorer(client_of(run, self.prepared.processing_class), self.score_format)
        assert run.arguments.teacher is not None
        model = load_teacher(run, run.arguments.teacher, self.dtype)
        if self.codec.kind == "hidden":
            check_loaded_head(model, self.head())
        return LocalScorer(model, self.prepared, self.score_format, self.arguments.cache_batch_tokens)

    @property
    def score_format(self) -> ScoreFormat:
        """What is asked about every supervised token."""
        codec, vocab_size = self.codec, self.manifest.identity["signal"]["vocab_size"]
        if isinstance(codec, StateCodec):
            visual = image_token_of(self.prepared.processing_class) if codec.visual else None
            return ScoreFormat(codec.kind, 0, 0, vocab_size, visual_token=visual)
        boundaries = _boundaries_of(self.prepared.processing_class) if codec.boundaries else None
        return ScoreFormat(codec.kind, codec.k, codec.m, vocab_size, boundaries)

    def head(self) -> LMHead:
        """The teacher's head, over the tokens that the cache speaks of."""
        return teacher_head(self.run, self.manifest.identity["signal"]["vocab_size"])

    @property
    def _tokenizer(self) -> Any:
        return tokenizer_of(self.prepared.processing_class)

    def files(self) -> dict[str, bytes]:
        if isinstance(self.codec, StateCodec):
            return {HEAD: head_bytes(self.head())}
        return {TOKEN_ORDER: order_bytes(self.codec.order)} if self.codec.kind == "top_k" else {}

    def encoded(self, answer: TokenScores | TokenStates) -> bytes:
        """The blob of an answer."""
        if isinstance(self.codec, StateCodec):
            assert isinstance(answer, TokenStates)
            return self.codec.encode(answer)
        assert isinstance(answer, TokenScores)
        return self.codec.encode(answer)

    def shard(self, split: str, number: int, advance: Advance) -> ShardResult:
        start, teacher_start = time.perf_counter(), self.scorer.teacher_seconds
        sequences = list(usable(self.prepared.splits[split], self.manifest.span(split, number)))
        asked = [(row, sequence) for row, sequence in sequences if isinstance(sequence, TokenSequence)]
        skipped = {row: Skipped(sequence.reason) for row, sequence in sequences if isinstance(sequence, UnusableRow)}
        self.refuse(skipped, split)
        rows = []
        answers = self.scorer.score([sequence for _, sequence in asked], advance)
        for (row, sequence), scores in zip(asked, answers, strict=True):
            if isinstance(scores, UnusableRow):
                skipped[row] = Skipped(scores.reason, sequence.key.hex())
                continue
            rows.append(
                {
                    "key": sequence.key,
                    "tokens": len(scores),
                    "blob": self.encoded(scores),
                    "images": list(sequence.images),
                    "image_tokens": sequence.image_tokens,
                }
            )
        self.refuse(skipped, split)
        teacher_seconds = self.scorer.teacher_seconds - teacher_start
        cost = {"seconds": time.perf_counter() - start, "teacher_seconds": teacher_seconds}
        return ShardResult(split, number, rows, skipped, {name: round(value, 3) for name, value in cost.items()})


def make_plan(run: Run) -> Plan:
    """The plan of a run's `job`. Raises UserError for settings that cannot be, before anything is written."""
    if run.cache.job == "aspects":
        raise UserError(
            f"job: aspects asks questions about images to classify, and method {run.arguments.method} predicts "
            "tokens. Set job: score or generate.",
            because="meaning",
        )
    if run.cache.job == "generate":
        from .generate_plan import make_generate_plan

        return make_generate_plan(run)
    return make_score_plan(run)


def make_score_plan(run: Run) -> ScorePlan:
    """The plan of a cache of scores. Raises UserError as `make_plan` does."""
    settings, arguments = run.arguments, run.cache
    check_settings(run)
    served = None if settings.teacher_server is None else server_signal(run, settings.teacher_server)
    if served == "top_k":
        check_top_k_server(run)
    keeps_states = arguments.cache_signal == "hidden"
    teacher_class = teacher_processing_class(run)
    method = METHODS[settings.method].trainer
    # Log-probs are for students of another tokenizer: they are of the teacher's own tokens.
    across = arguments.cache_signal == "log_probs" or (keeps_states and not method.one_vocabulary)
    processing_class = teacher_class if across else student_processing_class(run)
    data = load_rows_of(run)
    prepared = prepare(data, run.training.for_teacher(), processing_class, view=run.training.view)
    vocab_size = shared_rows(run, prepared.processing_class, teacher_class)
    rows = {split: len(sequences) for split, sequences in prepared.splits.items()}
    k, m = {"log_probs": (1, 0), "hidden": (0, 0)}.get(
        arguments.cache_signal, (settings.teacher_top_k, arguments.cache_tail_draws)
    )
    if k + m > vocab_size:
        raise UserError(
            f"teacher_top_k {k} and cache_tail_draws {m} are more than the {vocab_size} tokens that student and "
            "teacher share. Lower them."
        )
    teacher = described_teacher(run, tokenizer_of(teacher_class), k, run.training.teacher_length, served)
    if keeps_states:
        signal = states_signal(run, vocab_size, prepared.vision and method.reads_visual_tokens)
        codec = StateCodec(signal["dtype"], signal["width"], vocab_size, signal["visual"])
        manifest = manifest_of(run, teacher, data, rows, signal=signal, preparation=prepared.preparation)
        return ScorePlan(run, folder_of(run), manifest, SIGNAL_FEATURES, prepared, codec, served)
    counts = np.zeros(vocab_size, dtype=np.int64)
    for sequences in prepared.splits.values():
        known = sequences.counts[:vocab_size]
        counts[: len(known)] += known
    boundaries = across and run.training.needs_boundaries
    codec = Codec(arguments.cache_signal, k, m, TokenOrder.of(counts), boundaries)
    signal = {"kind": codec.kind, "k": k, "tail_draws": m, "vocab_size": vocab_size}
    if not across:
        signal["token_order"] = hashlib.sha256(order_bytes(codec.order)).hexdigest()
    if boundaries:
        signal["boundaries"] = set_sha256(_boundaries_of(teacher_class))
    manifest = manifest_of(run, teacher, data, rows, signal=signal, preparation=prepared.preparation)
    return ScorePlan(run, folder_of(run), manifest, SIGNAL_FEATURES, prepared, codec, served)


def manifest_of(
    run: Run, teacher: dict[str, Any], loaded: DatasetDict, rows: dict[str, int], **identity: Any
) -> Manifest:
    """An empty manifest with everything that decides the rows of a run's cache."""
    data = DataRecipe.load(run.arguments.data)
    content = {str(split): _content(dataset) for split, dataset in loaded.items()}
    identity = {
        "job": run.cache.job,
        "mmkd": __version__,
        "teacher": teacher,
        "data": {"name": data.name, "fingerprint": data.fingerprint, "license": data.license, "rows": content},
        "batch_tokens": run.cache.cache_batch_tokens,
        **identity,
    }
    return Manifest(identity, run.cache.cache_shard_rows, rows, part=run.cache.part)


def _content(dataset: Dataset) -> str:
    """Changes with any row, unlike the fingerprint of a recipe, which knows the names of files only."""
    digest = hashlib.blake2b(digest_size=16)
    for row in read_rows(dataset, dataset.column_names):
        digest.update(row_key(row))
    return digest.hexdigest()


def folder_of(run: Run) -> Path:
    """Where a run's cache, or its part of it, is written."""
    folder = run.arguments.teacher_cache
    assert folder is not None
    return part_folder(folder, run.cache.part)


def check_settings(run: Run) -> None:
    """Raises UserError for settings that contradict each other or lack a teacher or a place."""
    settings, arguments = run.arguments, run.cache
    if settings.teacher_api is not None and settings.teacher is None:
        raise UserError(
            "A cache of scores needs probabilities of given tokens, and teacher_api writes text only. Set job: "
            "generate for its answers, or use a local teacher or vLLM (teacher_server).",
            because="upstream",
        )
    if settings.teacher is None or settings.teacher_cache is None:
        raise UserError(
            "A cache needs `teacher` (whose answers they are; with teacher_server too) and `teacher_cache` (the "
            "folder to write)."
        )
    exact = settings.teacher_top_k if arguments.cache_signal == "top_k" else 1
    if exact == 0 and arguments.cache_tail_draws == 0:
        raise UserError(
            "teacher_top_k and cache_tail_draws are both 0: nothing would be kept. Raise one of them.",
            because="meaning",
        )
    if settings.teacher_server is not None and settings.teacher_server_signal == "top_k":
        check_top_k_server(run)


def check_place(run: Run) -> None:
    """Raises UserError where a build would make a folder that hides a cache on the Hub from all later runs."""
    name = run.arguments.teacher_cache
    if name is not None and is_hub_id(name) and not folder_of(run).parent.is_dir():
        raise UserError(
            f"teacher_cache {name!r} reads as a Hub id, and a folder of that name would hide it. Write ./{name} for a "
            f"folder (or make {Path(name).parent} first); to publish a cache as {name}, build it in a folder and "
            "`mmkd cache push` it."
        )


def part_folder(folder: str | Path, part: tuple[int, int] | None) -> Path:
    """Where a build, or one of its parts, is written."""
    return Path(folder) if part is None else Path(f"{folder}.part-{part[0]}-of-{part[1]}")


def _boundaries_of(processing_class: Any) -> Bool[np.ndarray, "vocab"]:
    """The tokens that begin a word."""
    return boundary_mask(TokenPieces.of(tokenizer_of(processing_class)))
