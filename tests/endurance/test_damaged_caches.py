"""Caches with random damage: what is read of them is refused, or is what was written."""

import hashlib
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mmkd.cache.codec import Codec, TokenOrder
from mmkd.cache.embedding_codec import EmbeddingCodec, PairEmbeddings, text_key
from mmkd.cache.manifest import NAME as MANIFEST
from mmkd.cache.manifest import Manifest
from mmkd.cache.side_files import HEAD, TOKEN_ORDER, check_side_files, head_bytes, order_bytes, read_head
from mmkd.cache.state_codec import StateCodec, TokenStates
from mmkd.cache.store import Cache, CacheWriter, read_log
from mmkd.data.picture_views import PictureView
from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.models.heads import LMHead
from tests.endurance.damage import Tally, copied, damage
from tests.teachers.caches import random_scores

COUNT = [pytest.param(600, id="short"), pytest.param(2000, id="long", marks=pytest.mark.slow)]
ROWS = {"train": 9, "eval": 3}
SHARD_ROWS = 4
WIDTH, VOCABULARY = 16, 300
ORDER = TokenOrder(np.random.default_rng(0).permutation(VOCABULARY).astype(np.int32))
HEAD_OF = LMHead(torch.randn(VOCABULARY, WIDTH, generator=torch.Generator().manual_seed(0)))


def key(split: str, row: int) -> bytes:
    return hashlib.blake2b(f"{split} {row}".encode(), digest_size=16).digest()


def top_k() -> tuple[dict[str, Any], dict[str, bytes], Callable[[int], tuple[int, bytes]]]:
    codec = Codec("top_k", 4, 3, ORDER)
    signal = {"kind": "top_k", "k": 4, "tail_draws": 3, "vocab_size": VOCABULARY}
    signal["token_order"] = hashlib.sha256(order_bytes(ORDER)).hexdigest()

    def row(number: int) -> tuple[int, bytes]:
        scores = random_scores(VOCABULARY, 4, 3, tokens=1 + number % 5, seed=number)
        return len(scores), codec.encode(scores)

    return signal, {TOKEN_ORDER: order_bytes(ORDER)}, row


def hidden() -> tuple[dict[str, Any], dict[str, bytes], Callable[[int], tuple[int, bytes]]]:
    codec, head = StateCodec("float32", WIDTH, VOCABULARY, False), head_bytes(HEAD_OF)
    signal = {"kind": "hidden", "dtype": "float32", "width": WIDTH, "vocab_size": VOCABULARY, "visual": False}
    signal |= {"head": hashlib.sha256(head).hexdigest(), "head_dtype": "float32"}
    signal |= {"head_scale": 1.0, "head_softcap": None}

    def row(number: int) -> tuple[int, bytes]:
        states = torch.randn(1 + number % 5, WIDTH, generator=torch.Generator().manual_seed(number))
        return len(states), codec.encode(TokenStates(states))

    return signal, {HEAD: head}, row


def embeddings() -> tuple[dict[str, Any], dict[str, bytes], Callable[[int], tuple[int, bytes]]]:
    codec = EmbeddingCodec("float32", WIDTH)

    def row(number: int) -> tuple[int, bytes]:
        numbers = np.random.default_rng(number)
        count = 1 + number % 3
        firsts, captions = (numbers.normal(size=(n, WIDTH)).astype(np.float32) for n in (1, count))
        keys = tuple(text_key(f"{number} {each}") for each in range(count))
        return 1 + count, codec.encode(PairEmbeddings(firsts, (PictureView.of(np.zeros(5)),), captions, keys))

    return {"kind": "embeddings", "dtype": "float32", "width": WIDTH}, {}, row


def written(folder: Path, kind: Callable[[], Any]) -> Path:
    """A finished cache of a kind."""
    signal, beside, row = kind()
    identity = {"teacher": {"name": "t", "weights": "ab"}, "signal": signal, "data": {"name": "d", "license": None}}
    with CacheWriter(folder, Manifest(identity, SHARD_ROWS, ROWS)) as writer:
        for name, content in beside.items():
            write_file(folder / name, content)
        for split, number in writer.manifest.missing():
            rows = []
            for place in writer.manifest.span(split, number):
                tokens, blob = row(place + 100 * (split == "eval"))
                own = {"key": key(split, place), "tokens": tokens, "blob": blob}
                rows.append({**own, "images": [f"{place:064x}"] * (place % 3 == 0), "image_tokens": 4})
            writer.write(split, number, rows, {}, {"seconds": 0.5})
        writer.finish()
    return folder


def told(folder: Path) -> Any:
    """Everything that a training reads of a cache."""
    cache = Cache(folder)
    read = {"top_k": cache.scores, "hidden": cache.states, "embeddings": cache.embeddings}
    kind = cache.manifest.identity["signal"]["kind"]
    check_side_files(folder, cache.manifest)
    # The log has no checksum, since it decides nothing.
    read_log(folder)
    everything: list[Any] = [len(cache)]
    for split, rows in ROWS.items():
        for row in range(rows):
            place = cache.find(key(split, row))
            if place is None:
                # As CachedTeacher says of a sequence that it looks for and does not find.
                raise UserError(f"The cache does not know {split} {row}.")
            everything.append(plain(vars(read[kind](place))))
    if kind == "hidden":
        everything.append(plain(vars(read_head(folder, cache.manifest))))
    return everything


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: plain(own) for name, own in value.items()}
    if isinstance(value, torch.Tensor | np.ndarray):
        return np.asarray(value).dtype.str, np.asarray(value).tolist()
    return repr(value) if not isinstance(value, list | tuple) else [plain(own) for own in value]


@pytest.fixture(autouse=True)
def no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting for the disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.mark.parametrize("count", COUNT)
def test_a_damaged_cache_is_refused_or_says_what_was_written(count: int, tmp_path: Path) -> None:
    caches = [written(tmp_path / kind.__name__, kind) for kind in (top_k, hidden, embeddings)]
    before = [told(folder) for folder in caches]
    tally = Tally(f"damaged caches, seeds 0 to {count - 1}")
    for seed in range(count):
        chance, number = random.Random(seed), seed % len(caches)
        folder = copied(caches[number], tmp_path / "damaged")
        what = damage(folder, chance, but=(".lock",))
        tally.try_(seed, f"{caches[number].name}: {what}", lambda folder=folder: told(folder), before[number].__eq__)
    tally.end()


def edited(content: Any, chance: random.Random) -> Any:
    """A JSON value in which one place, at any depth, has another value."""
    odd = [None, True, -1, 0, 1, 3, 2**63, 1e300, "", "../..", "x", [], {}, [1], {"a": 1}, {"0": {}}]
    if isinstance(content, dict) and content and chance.random() < 0.85:
        name = chance.choice(list(content))
        if chance.random() < 0.15:
            return {key: value for key, value in content.items() if key != name}
        if chance.random() < 0.1:
            return {**content, chance.choice(["../x", "7", "-1", "new"]): content[name]}
        return {**content, name: edited(content[name], chance)}
    if isinstance(content, list) and content and chance.random() < 0.8:
        place = chance.randrange(len(content))
        return [*content[:place], edited(content[place], chance), *content[place + 1 :]]
    return chance.choice(odd)


@pytest.mark.parametrize("count", COUNT)
def test_a_manifest_that_was_forged_is_refused_or_changes_nothing(count: int, tmp_path: Path) -> None:
    """With a checksum that fits: whoever publishes a cache can write any manifest."""
    caches = [written(tmp_path / kind.__name__, kind) for kind in (top_k, hidden, embeddings)]
    before = [told(folder) for folder in caches]
    tally = Tally(f"forged manifests, seeds 0 to {count - 1}")
    for seed in range(count):
        chance, number = random.Random(seed), seed % len(caches)
        folder = copied(caches[number], tmp_path / "forged")
        content = json.loads((folder / MANIFEST).read_text())
        del content["checksum"]
        new = edited(content, chance)
        if isinstance(new, dict):
            new["checksum"] = hashlib.sha256(json.dumps(new, sort_keys=True).encode()).hexdigest()
        (folder / MANIFEST).write_text(json.dumps(new))
        changes = f"{caches[number].name}: {json.dumps(new)[:1500]}"
        # Who forges a manifest can say other things of the same bytes: of another scale of the head, say. It is read
        # as another cache then; what may not be is an error of Python's own, or a file outside the folder.
        tally.try_(seed, changes, lambda folder=folder: told(folder), lambda value: True)
    tally.end()
    assert before == [told(folder) for folder in caches]
