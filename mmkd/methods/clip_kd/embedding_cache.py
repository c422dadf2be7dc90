"""`mmkd cache build` of a recipe of clip_kd: a teacher's embeddings of views of every picture and of every caption."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Features, Value
from rich.console import Console

from mmkd import __version__
from mmkd.cache.embedding_codec import EMBEDDINGS, EmbeddingCodec, PairEmbeddings, pair_key, text_key
from mmkd.cache.identity import weights_sha256
from mmkd.cache.manifest import Manifest, Skipped
from mmkd.capture.build import build
from mmkd.capture.build_plan import Plan, ShardResult, check_place, folder_of
from mmkd.data.caption_source import CaptionedSplit
from mmkd.data.data_recipe import DataRecipe
from mmkd.data.picture_views import PictureView
from mmkd.errors import UserError, first_line
from mmkd.generation.generator import Advance
from mmkd.losses.contrastive_losses import unit
from mmkd.models.dual_encoder import OPEN_CLIP, DualEncoder
from mmkd.precision import name_of_dtype
from mmkd.preparation.pair_batches import PairRows
from mmkd.recipe.recipe import Run

from .clip_run import check_arguments, load_teacher, pairs_of, role_of, settings_of

EMBEDDING_FEATURES = Features(
    {"key": Value("binary"), "tokens": Value("int32"), "crc32": Value("uint32"), "blob": Value("binary")}
)


@dataclass
class EmbeddingPlan(Plan):
    """A teacher's pass over pairs."""

    teacher: DualEncoder
    splits: dict[str, PairRows]
    codec: EmbeddingCodec
    counted: ClassVar[str] = "embeddings"
    asked: dict[str, int] = field(default_factory=dict)

    def shard(self, split: str, number: int, advance: Advance) -> ShardResult:
        """The embeddings of the pairs of a shard. Raises UserError for a picture that cannot be read."""
        start, rows, skipped = time.perf_counter(), self.splits[split], {}
        read: list[tuple[Any, tuple[str, ...]]] = []
        for row in self.manifest.span(split, number):
            try:
                read.append(rows.split[row])
            except UserError as error:
                skipped[row] = Skipped(first_line(error))
        self.refuse(skipped, split)
        views = self.manifest.identity["signal"]["views"] if split == "train" else 1
        augmentation = rows.augmentation if split == "train" else "none"
        encoded = [self._row(first, captions, views, augmentation) for first, captions in read]
        written = self._embedded(encoded, advance)
        cost = {"seconds": round(time.perf_counter() - start, 3)}
        return ShardResult(split, number, written, skipped, cost)

    def _row(
        self, first: Any, captions: Sequence[str], views: int, augmentation: str
    ) -> tuple[bytes, list[Any], tuple[PictureView, ...], tuple[str, ...]]:
        """What finds a pair, its views as they are shown, how they are made, and its different captions."""
        key = pair_key(first, captions)
        if isinstance(first, str):
            return key, [first], (PictureView(),), tuple(captions)
        # Of the pair and the seed alone, so that a build that goes on, or other data with this pair, has the same.
        seed = [self.manifest.identity["signal"]["seed"], *np.frombuffer(key, dtype=np.uint32).tolist()]
        random = np.random.default_rng(seed)
        drawn = tuple(PictureView.drawn(augmentation, random) for _ in range(views))
        return key, [view.show(first) for view in drawn], drawn, tuple(captions)

    def _embedded(self, encoded: Sequence[Any], advance: Advance) -> list[dict[str, Any]]:
        """The rows of a shard, embedded together."""
        firsts = [shown for _, own, _, _ in encoded for shown in own]
        captions = [caption for *_, own in encoded for caption in own]
        images, texts = self._vectors(firsts), self._vectors(captions)
        advance(len(images) + len(texts))
        rows, of_images, of_texts = [], 0, 0
        for key, own, views, said in encoded:
            pair = PairEmbeddings(
                images[of_images : of_images + len(own)],
                views,
                texts[of_texts : of_texts + len(said)],
                tuple(map(text_key, said)),
            )
            of_images, of_texts = of_images + len(own), of_texts + len(said)
            rows.append({"key": key, "tokens": len(pair), "blob": self.codec.encode(pair)})
        return rows

    @torch.no_grad()
    def _vectors(self, sides: Sequence[Any]) -> np.ndarray:
        """The embeddings of pictures or texts, of length 1."""
        size, teacher = settings_of(self.run).per_device_eval_batch_size, self.teacher
        parts = []
        for first in range(0, len(sides), size):
            own = sides[first : first + size]
            if isinstance(own[0], str):
                features = teacher.encode_texts(teacher.prepare_texts(own))
            else:
                features = teacher.encode_images(teacher.prepare_images(own))
            parts.append(unit(features.float()).cpu().numpy())
        vectors = np.concatenate([np.zeros((0, self.codec.width), np.float32), *parts])
        if not np.isfinite(vectors).all():
            raise UserError(f"{teacher.name} gives an embedding with NaN or infinity; it cannot teach.")
        return vectors


def build_embedding_cache(run: Run) -> Path:
    """Writes what is missing of the caches of a run's teachers; the folder of the last one.

    Raises UserError for a recipe without a teacher to ask or a place to write to, and as `build` does.
    """
    check_arguments(run)
    if run.cache.engine == "ray":
        raise UserError(
            "engine: ray spreads a pass over tokens. Build embeddings in parts with shard: i/n, one on each machine.",
            because="not built",
        )
    parts = {name: own for name, own in run.by_teacher().items() if own.arguments.teacher_cache is not None}
    parts = {name: own for name, own in parts.items() if own.arguments.teacher is not None}
    if not parts:
        raise UserError(
            "A cache needs `teacher` (whose embeddings they are) and `teacher_cache` (the folder to write)."
        )
    for own in parts.values():
        check_place(own)
    folders = [build(embedding_plan(own, name), Console(stderr=True)) for name, own in parts.items()]
    for folder in folders[:-1]:
        print(folder)
    return folders[-1]


def embedding_plan(run: Run, name: str = "") -> EmbeddingPlan:
    """The plan of a cache of one teacher's embeddings."""
    settings = settings_of(run)
    train, held_out = pairs_of(replace(run, arguments=replace(run.arguments, teacher_cache=None)))
    splits = {"train": train} | ({} if held_out is None else {"eval": held_out})
    teacher = load_teacher(replace(run, arguments=replace(run.arguments, teacher_cache=None)), name)
    teacher.model.eval()
    if train.has_images and not teacher.has_images:
        raise UserError(f"The {role_of(name)} {teacher.name} is an encoder of sentences and the data has pictures.")
    bias = teacher.logit_bias
    signal = {
        "kind": EMBEDDINGS,
        "dtype": settings.cache_embedding_dtype,
        "width": teacher.width,
        "views": settings.cache_views if train.has_images else 1,
        "captions": max(rows.caption_counts[1] for rows in splits.values()),
        "augmentation": settings.augmentation if train.has_images else "none",
        "seed": train.seed,
        "logit_scale": teacher.logit_scale.item(),
        "logit_bias": None if bias is None else bias.item(),
    }
    if settings.augmentation == "none" and settings.cache_views > 1:
        raise UserError(
            f"cache_views is {settings.cache_views}, and without an augmentation all views of a picture are equal. "
            "Set augmentation to flip or crop_flip, or leave cache_views out.",
            because="meaning",
        )
    manifest = Manifest(
        _identity(run, teacher, splits, signal),
        run.cache.cache_shard_rows,
        {split: len(rows) for split, rows in splits.items()},
        part=run.cache.part,
    )
    codec = EmbeddingCodec(signal["dtype"], signal["width"])
    return EmbeddingPlan(run, folder_of(run), manifest, EMBEDDING_FEATURES, teacher, splits, codec)


def _identity(run: Run, teacher: DualEncoder, splits: dict[str, PairRows], signal: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the embeddings."""
    arguments, data = run.arguments, DataRecipe.load(run.arguments.data)
    name = str(arguments.teacher)
    # open_clip keeps its weights in files of its own; its names are precise.
    weights = None if name.startswith(OPEN_CLIP) else weights_sha256(name, arguments.teacher_revision)
    dtype = next(teacher.model.parameters()).dtype
    return {
        "job": "embed",
        "mmkd": __version__,
        "teacher": {
            "name": name,
            "revision": arguments.teacher_revision,
            "weights": weights,
            "backend": "transformers",
            "dtype": name_of_dtype(dtype),
            "quantization": None,
        },
        "data": {
            "name": data.name,
            "fingerprint": data.fingerprint,
            "license": data.license,
            "rows": {split: _content(rows) for split, rows in splits.items()},
        },
        "batch_tokens": settings_of(run).per_device_eval_batch_size,
        "signal": signal,
        "preparation": {"image_processor": type(teacher).__name__ if splits["train"].has_images else None},
    }


def _content(rows: PairRows) -> str:
    """Changes with any pair."""
    digest = hashlib.blake2b(digest_size=16)
    split = rows.split
    firsts = split.pictures.identities if isinstance(split, CaptionedSplit) else split.firsts
    for first, captions in zip(firsts, split.captions, strict=True):
        digest.update(repr((first, captions)).encode())
    return digest.hexdigest()
