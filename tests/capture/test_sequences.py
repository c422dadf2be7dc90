"""A teacher is asked about exactly the sequences that training with the same settings sees."""

import gc
import io
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Image, List
from PIL import Image as PILImage
from transformers import AutoProcessor

from mmkd.cache.sequence_keys import image_hash, segments, sequence_key
from mmkd.capture.sequences import (
    PreparedSequences,
    Sequences,
    TokenSequence,
    UnusableRow,
    VisionSequences,
    prepare,
    usable,
)
from mmkd.methods.kd import KDConfig, KDTrainer
from mmkd.preparation.collation import Collator, TextViews
from mmkd.preparation.vision_labels import ImageTokens
from mmkd.teachers.batch import ONLY
from mmkd.teachers.cached import with_targets
from scripts.make_tiny_models import sentences
from tests.helpers import Build
from tests.teachers.vlm import make_image, make_vlm


class Asked:
    """A cached teacher that knows every key and notes what it is asked about."""

    def __init__(self, skipped: Sequence[bytes] = ()) -> None:
        self.skipped_keys = set(skipped)
        self.keys: list[bytes] = []

    def look_up(self, ids: Any, supervised: Any, images: Sequence[str] = ()) -> int | None:
        key = sequence_key(ids, supervised, images)
        self.keys.append(key)
        return None if key in self.skipped_keys else len(self.keys) - 1

    def tensors(self, scores: list[int]) -> dict[str, torch.Tensor]:
        return {"rows": torch.tensor(scores)}

    def collator(self, collator: Any) -> Collator:
        return replace(collator, fill=partial(with_targets, teacher=cast(Any, self)))


def prepared_like(trainer: Any, data: DatasetDict) -> PreparedSequences:
    """What a build with the trainer's settings would ask about."""
    return prepare(data, trainer.args, trainer.processing_class)


def text_sequences(prepared: PreparedSequences, split: str = "train") -> list[TokenSequence]:
    sequences = prepared.splits[split]
    assert isinstance(sequences, Sequences)
    found = [cast(TokenSequence, sequences[row]) for row in range(len(sequences))]
    assert sequences.tokens == sum(len(one.ids) for one in found)
    assert sequences.supervised_tokens == sum(int(one.supervised.sum()) for one in found)
    ids = np.concatenate([one.ids for one in found])
    np.testing.assert_array_equal(sequences.counts, np.bincount(ids))
    assert [row for row, _ in usable(sequences, range(len(sequences)))] == list(range(len(sequences)))
    return found


def assert_training_asks_about(sequences: list[TokenSequence], loader: Any, asked: Asked) -> None:
    """Batch by batch, one lookup for every sequence, and as many supervised tokens as the labels have."""
    by_key = {sequence.key: sequence for sequence in sequences}
    assert len(by_key) == len(sequences)
    for batch in loader:
        # The loader is a batch ahead, so that not all keys so far are of this one.
        looked_up = [by_key[asked.keys[place]] for place in batch.student.targets[ONLY]["rows"]]
        assert sum(int(one.supervised.sum()) for one in looked_up) == (batch["labels"][:, 1:] != -100).sum()
    assert set(asked.keys) == set(by_key)


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "text": ("texts", {}),
    "truncated": ("texts", {"max_length": 8}),
    "truncated from the start": ("texts", {"max_length": 8, "truncation_mode": "keep_end"}),
    "padded to a multiple": ("texts", {"pad_to_multiple_of": 16}),
    "shuffled": ("texts", {"shuffle_dataset": True}),
    "completions": ("completions", {}),
    "completions and prompts": ("completions", {"completion_only_loss": False}),
    "completions cut off": ("completions", {"max_length": 20}),
    "chats": ("chats", {}),
    "assistant": ("chats", {"assistant_only_loss": True}),
    "padding free": ("texts", {"padding_free": True, "max_length": None}),
    "padding free to a multiple": ("chats", {"padding_free": True, "max_length": None, "pad_to_multiple_of": 16}),
    "bfd": ("completions", {"packing": True, "max_length": 64}),
    "bfd that truncates": ("texts", {"packing": True, "max_length": 8}),
    "bfd of assistants": ("chats", {"packing": True, "assistant_only_loss": True, "pad_to_multiple_of": 8}),
    "bfd_split": ("texts", {"packing": True, "packing_strategy": "bfd_split", "max_length": 8}),
    "bfd_split of completions": ("completions", {"packing": True, "packing_strategy": "bfd_split", "max_length": 24}),
    "wrapped": ("texts", {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    "wrapped completions": ("completions", {"packing": True, "packing_strategy": "wrapped", "max_length": 9}),
    "wrapped and shuffled": (
        "texts",
        {"packing": True, "packing_strategy": "wrapped", "max_length": 16, "shuffle_dataset": True, "seed": 7},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_build_asks_about_what_training_looks_up(build: Build, name: str, request: pytest.FixtureRequest) -> None:
    kind, settings = CASES[name]
    data = request.getfixturevalue(kind)
    trainer = build(KDTrainer, data, per_device_train_batch_size=5, **settings)
    sequences = text_sequences(prepared_like(trainer, DatasetDict({"train": data})))
    asked = Asked()
    trainer.data_collator = asked.collator(trainer.data_collator)
    assert_training_asks_about(sequences, trainer.get_train_dataloader(), asked)


def test_the_eval_split_is_asked_about_as_it_is_evaluated(build: Build, texts: Dataset) -> None:
    settings = {"packing": True, "eval_packing": False, "max_length": 32, "packing_strategy": "wrapped"}
    held_out = Dataset.from_dict({"text": sentences(7, seed=9)})
    trainer = build(KDTrainer, texts, trainer={"eval_dataset": held_out}, **settings)
    prepared = prepared_like(trainer, DatasetDict({"train": texts, "eval": held_out}))
    asked = Asked()
    trainer.data_collator = asked.collator(trainer.data_collator)
    sequences = text_sequences(prepared, "eval")
    assert len(sequences) == 7
    assert_training_asks_about(sequences, trainer.get_eval_dataloader(), asked)


def test_packing_bfd_asks_what_no_packing_asks(build: Build, completions: Dataset) -> None:
    """So that one cache serves both."""
    keys = []
    for settings in ({}, {"packing": True}, {"padding_free": True, "max_length": None}):
        trainer = build(KDTrainer, completions, **settings)
        prepared = prepared_like(trainer, DatasetDict({"train": completions}))
        keys.append({one.key for one in text_sequences(prepared)})
        assert prepared.preparation["packing"] is None
    assert keys[0] == keys[1] == keys[2]


def test_sequences_that_occur_twice_are_asked_about_once(build: Build) -> None:
    rows = sentences(6)
    data = Dataset.from_dict({"text": [*rows, *rows[::-1], rows[0]]})
    trainer = build(KDTrainer, data)
    sequences = text_sequences(prepared_like(trainer, DatasetDict({"train": data})))
    alone = text_sequences(prepared_like(trainer, DatasetDict({"train": data.select(range(6))})))
    assert [one.key for one in sequences] == [one.key for one in alone]


def test_equal_texts_with_other_supervision_are_two_sequences(build: Build) -> None:
    words = "the cat sat on a mat"
    data = Dataset.from_dict({"prompt": ["the cat", "the cat sat"], "completion": [" sat on a mat", " on a mat"]})
    trainer = build(KDTrainer, data)
    first, second = text_sequences(prepared_like(trainer, DatasetDict({"train": data})))
    assert first.ids.tolist() == second.ids.tolist()
    assert trainer.processing_class.decode(first.ids).startswith(words)
    assert first.key != second.key


def test_batches_are_what_a_model_reads(build: Build, completions: Dataset) -> None:
    trainer = build(KDTrainer, completions)
    prepared = prepared_like(trainer, DatasetDict({"train": completions}))
    sequences = text_sequences(prepared)[:5]
    inputs, supervised = prepared.batch(sequences)
    for row, sequence in enumerate(sequences):
        length = len(sequence.ids)
        assert inputs["attention_mask"][row].sum() == length
        assert inputs["input_ids"][row, :length].tolist() == sequence.ids.tolist()
        # Position i predicts token i + 1.
        assert supervised[row, : length - 1].tolist() == sequence.supervised[1:].tolist()
        assert not supervised[row, length - 1 :].any()


def test_what_training_refuses_a_build_refuses_too(build: Build, chats: Dataset, completions: Dataset) -> None:
    trainer = build(KDTrainer, completions)
    with pytest.raises(ValueError, match="train data set is empty"):
        prepared_like(trainer, DatasetDict({"train": completions.select([])}))
    trainer.args.max_length = 2
    with pytest.raises(ValueError, match="within max_length 2: the prompts fill it"):
        prepared_like(trainer, DatasetDict({"train": completions}))
    trainer.processing_class.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        prepared_like(trainer, DatasetDict({"train": chats}))


def test_sequences_that_were_skipped_teach_nothing(build: Build, completions: Dataset) -> None:
    """Here every second one: their labels go, and the others keep their order."""
    trainer = build(KDTrainer, completions, per_device_train_batch_size=24, packing=True, max_length=64)
    sequences = text_sequences(prepared_like(trainer, DatasetDict({"train": completions})))
    asked = Asked(skipped=[one.key for one in sequences[::2]])
    trainer.data_collator = asked.collator(trainer.data_collator)
    (batch,) = trainer.get_train_dataloader()
    kept = {one.key: int(one.supervised.sum()) for one in sequences[1::2]}
    assert (batch["labels"][:, 1:] != -100).sum() == sum(kept.values())
    assert len(batch.student.targets[ONLY]["rows"]) == len(kept)
    assert len(asked.keys) == len(sequences)


# Keys


def test_keys_tell_tokens_masks_and_images_apart() -> None:
    ids, mask = np.arange(9, dtype=np.int64), np.arange(9) > 4
    image, other = f"{1:064x}", f"{2:064x}"
    changed_ids, changed_mask = ids.copy(), mask.copy()
    changed_ids[0], changed_mask[8] = 5, False
    asked = [
        (ids, mask, ()),
        (changed_ids, mask, ()),
        (ids, changed_mask, ()),
        (ids[:8], mask[:8], ()),
        (np.append(ids, 0), np.append(mask, False), ()),
        (ids[::-1], mask, ()),
        (ids, mask, (image,)),
        (ids, mask, (other,)),
        (ids, mask, (image, other)),
        (ids, mask, (other, image)),
        (ids, mask, (image, image)),
    ]
    keys = [sequence_key(*one) for one in asked]
    assert len(set(keys)) == len(keys)
    assert {len(key) for key in keys} == {16}


def test_keys_do_not_depend_on_types_or_on_the_first_token_being_supervised() -> None:
    ids, mask = np.arange(9, dtype=np.int64), np.arange(9) > 4
    first = mask.copy()
    first[0] = True
    same = [
        sequence_key(ids, mask),
        sequence_key(ids.astype(np.int32), mask),
        sequence_key(np.repeat(ids, 2)[::2], np.repeat(mask, 2)[::2]),
        sequence_key(ids.astype(">i8"), first),
        TokenSequence(ids, first).key,
    ]
    assert len(set(same)) == 1
    assert first[0]
    # Caches that exist would be lost if it changed.
    assert same[0].hex() == "77fe4b5bc3e7c8dddaa1dd49b2969104"
    assert sequence_key(ids, mask, [f"{1:064x}"]).hex() == "d5acc7652d6fae30df3050e6f7206fee"


def test_image_hashes_are_of_pixels_size_and_mode() -> None:
    image = make_image(1)
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    assert image_hash(PILImage.open(buffer)) == image_hash(image)
    different = [image, make_image(2), image.convert("L"), image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)]
    different += [image.resize((32, 48)), PILImage.frombytes("RGB", (image.height, image.width), image.tobytes())]
    hashes = [image_hash(one) for one in different]
    assert len(set(hashes)) == len(hashes)


def test_segments_cover_a_packed_row() -> None:
    assert [list(range(9))[one] for one in segments([0, 4, 5], 9)] == [[0, 1, 2, 3], [4], [5, 6, 7, 8]]
    assert list(segments([0], 3)) == [slice(0, 3)]


# Images


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoProcessor.from_pretrained(make_vlm(tmp_path_factory.mktemp("vlm")))


def image_rows(count: int = 5) -> list[dict[str, Any]]:
    return [
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ],
            "images": [make_image(row, width=64 if row % 2 else 32)],
        }
        for row, (question, answer) in enumerate(zip(sentences(count), sentences(count, seed=5), strict=True))
    ]


def vision(
    rows: Dataset, processor: Any, tmp_path: Path, **settings: Any
) -> tuple[PreparedSequences, VisionSequences]:
    settings = {"max_length": None, **settings}
    config = KDConfig(output_dir=str(tmp_path), report_to="none", bf16=False, **settings)
    prepared = prepare(DatasetDict({"train": rows}), config, processor)
    sequences = prepared.splits["train"]
    assert isinstance(sequences, VisionSequences)
    assert prepared.vision
    return prepared, sequences


@pytest.mark.parametrize("layout", ["messages", "prompt and completion"])
def test_rows_with_images_are_asked_about_as_they_are_looked_up(processor: Any, tmp_path: Path, layout: str) -> None:
    examples = image_rows()
    if layout != "messages":
        examples = [
            {"prompt": m[:1], "completion": m[1:], "images": row["images"]}
            for row in examples
            for m in [row["messages"]]
        ]
    rows = Dataset.from_list(examples)
    prepared, sequences = vision(rows, processor, tmp_path)
    asked = Asked()
    collator = asked.collator(Collator(TextViews(prepared.collator)))
    found = [sequences[row] for row in range(len(rows))]
    assert all(isinstance(one, TokenSequence) for one in found)
    keys = [cast(TokenSequence, one).key for one in found]
    assert len(set(keys)) == len(rows)
    image = ImageTokens.made_by(processor)
    whole = [
        bool((one.supervised | image.of(torch.from_numpy(one.ids)[None])[0].numpy())[1:].all())
        for one in cast(list[TokenSequence], found)
    ]
    assert all(whole) == (layout == "messages")
    for batch in ([0], [4, 1, 2], [3, 0, 1, 2, 4]):
        collator([rows[row] for row in batch])
        assert asked.keys == [keys[row] for row in batch]
        asked.keys.clear()


def test_image_tokens_are_counted(processor: Any, tmp_path: Path) -> None:
    _, sequences = vision(Dataset.from_list(image_rows()), processor, tmp_path)
    for row in range(5):
        one = sequences[row]
        assert isinstance(one, TokenSequence)
        assert one.image_tokens == (one.ids == processor.image_token_id).sum() > 0
        assert len(one.images) == 1


def test_other_images_are_other_sequences_though_the_tokens_are_the_same(processor: Any, tmp_path: Path) -> None:
    (row,) = image_rows(1)
    rows = Dataset.from_list([{**row, "images": [make_image(seed)]} for seed in (1, 2)])
    _, sequences = vision(rows, processor, tmp_path)
    first, second = sequences[0], sequences[1]
    assert isinstance(first, TokenSequence)
    assert isinstance(second, TokenSequence)
    assert first.ids.tolist() == second.ids.tolist()
    assert first.key != second.key


def test_an_image_that_cannot_be_decoded_is_reported_with_its_reason(processor: Any, tmp_path: Path) -> None:
    rows = image_rows(3)
    encoded = []
    for row in rows:
        buffer = io.BytesIO()
        row["images"][0].save(buffer, format="png")
        encoded.append({**row, "images": [{"bytes": buffer.getvalue(), "path": None}]})
    content = encoded[1]["images"][0]["bytes"]
    encoded[1]["images"][0]["bytes"] = content[: len(content) // 2]
    data = Dataset.from_list(encoded).cast_column("images", List(Image()))
    _, sequences = vision(data, processor, tmp_path)
    kinds = [type(one) for _, one in usable(sequences, range(3))]
    assert kinds == [TokenSequence, UnusableRow, TokenSequence]
    broken = sequences[1]
    assert isinstance(broken, UnusableRow)
    assert "truncated" in broken.reason or "cannot identify" in broken.reason


def test_a_reason_does_not_say_where_in_memory_an_image_was(processor: Any, tmp_path: Path) -> None:
    rows = [{**row, "images": [{"bytes": b"no image", "path": None}]} for row in image_rows(1)]
    _, sequences = vision(Dataset.from_list(rows).cast_column("images", List(Image())), processor, tmp_path)
    broken = sequences[0]
    assert isinstance(broken, UnusableRow)
    reason = broken.reason
    assert reason.startswith("images[0]: UnidentifiedImageError: cannot identify image file")
    assert "0x" not in reason
    assert sequences[0] == UnusableRow(reason)


@pytest.mark.parametrize("layout", ["messages", "prompt and completion"])
def test_image_tokens_that_max_length_cuts_off_are_the_reason_given(
    processor: Any, tmp_path: Path, layout: str
) -> None:
    rows = image_rows(3)
    if layout != "messages":
        rows = [{"prompt": m[:1], "completion": m[1:], "images": r["images"]} for r in rows for m in [r["messages"]]]
    data = Dataset.from_list(rows)
    _, whole = vision(data, processor, tmp_path)
    lengths, tokens = zip(*((len(one.ids), one.image_tokens) for one in (whole[0], whole[1])), strict=True)  # pyright: ignore[reportAttributeAccessIssue]
    _, sequences = vision(data, processor, tmp_path, max_length=12)
    for row in range(2):
        cut = sequences[row]
        assert isinstance(cut, UnusableRow)
        assert "Image tokens were truncated: max_length 12 keeps" in cut.reason
        assert f"of {tokens[row]}, in a row of {lengths[row]} tokens. Raise max_length to {lengths[row]}" in cut.reason
    # Text alone may be cut.
    _, sequences = vision(data, processor, tmp_path, max_length=lengths[0] - 1)
    shorter = sequences[0]
    assert isinstance(shorter, TokenSequence)
    assert (len(shorter.ids), shorter.image_tokens) == (lengths[0] - 1, tokens[0])


def test_a_bug_in_the_collator_is_no_unreadable_row(processor: Any, tmp_path: Path) -> None:
    prepared, sequences = vision(Dataset.from_list(image_rows(3)), processor, tmp_path, max_length=1000)
    prepared.collator.processor = None
    with pytest.raises(AttributeError) as raised:
        sequences[2]
    assert raised.value.__notes__ == ["It was raised for row 2 of the data."]


def test_no_image_stays_decoded(processor: Any, tmp_path: Path) -> None:
    """A shard of any size holds the images of one batch at a time."""

    def decoded() -> int:
        gc.collect()
        return sum(isinstance(one, PILImage.Image) for one in gc.get_objects())

    rows = Dataset.from_list(image_rows(8))
    prepared, sequences = vision(rows, processor, tmp_path)
    before = decoded()
    found = [cast(TokenSequence, one) for _, one in usable(sequences, range(8))]
    assert decoded() == before
    inputs, _ = prepared.batch(found[2:5])
    assert decoded() == before
    expected = prepared.collator([dict(row) for row in rows.select(range(2, 5))])
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_preparing_leaves_the_settings_alone(build: Build, completions: Dataset) -> None:
    trainer = build(KDTrainer, completions)
    before = dict(vars(trainer.args))
    prepared_like(trainer, DatasetDict({"train": completions}))
    assert vars(trainer.args) == before
