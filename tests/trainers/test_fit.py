"""Tokens and positions that a model lacks are said before training, alike by doctor and trainers."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    BertConfig,
    BloomConfig,
    FalconConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from mmkd.errors import UserError
from mmkd.methods.alm import ALMTrainer
from mmkd.methods.kd import KDTrainer
from mmkd.methods.sft import SFTBaselineTrainer
from mmkd.models.load import learns_positions, positions_of
from mmkd.preparation.fit import Extent, add_stops, answer_ends, lacking_positions, lacking_tokens
from mmkd.preparation.sampled import SAMPLED, SampledRow, sample_of
from mmkd.teachers.batch import ONLY
from mmkd.training.fitting import sample_seen_by
from scripts.make_tiny_models import make_tokenizer, sentences
from tests.alignment.tiny_tokenizers import CHATTERS
from tests.families import made, model_of
from tests.helpers import Build
from tests.vlms import make_llava, picture, vision_rows


@pytest.fixture
def tokenizer() -> Any:
    return make_tokenizer()


def gpt2(tokenizer: Any, positions: int, **settings: Any) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    sizes = {"vocab_size": len(tokenizer), "n_positions": positions, "n_embd": 16, "n_layer": 1, "n_head": 1}
    return GPT2LMHeadModel(GPT2Config(**{**sizes, **ids, **settings}))


def long_rows(words: int) -> Dataset:
    return Dataset.from_list([{"prompt": "the cat", "completion": " " + " ".join(["dog"] * words)}] * 4)


def with_new_token() -> Dataset:
    rows = [{"prompt": "the cat", "completion": " sat"}] * 7
    return Dataset.from_list([*rows, {"prompt": "a", "completion": "<new>"}])


# Positions


@pytest.mark.parametrize(
    ("config", "positions", "learnt"),
    [
        (GPT2Config(n_positions=64), 64, True),
        (OPTConfig(max_position_embeddings=64), 64, True),
        (BertConfig(max_position_embeddings=64), 64, True),
        (RobertaConfig(max_position_embeddings=66, pad_token_id=1), 64, True),
        (LlamaConfig(max_position_embeddings=64), 64, False),
        (FalconConfig(max_position_embeddings=64, alibi=True), 64, False),
        (BloomConfig(), None, False),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_the_places_of_a_family_are_those_that_its_sequences_can_have(
    config: Any, positions: int | None, learnt: bool
) -> None:
    assert positions_of(config) == positions
    assert learns_positions(config) == learnt


def test_a_learnt_table_has_as_many_places_as_are_said() -> None:
    sizes: dict[str, Any] = {"hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = OPTConfig(vocab_size=32, word_embed_proj_dim=16, max_position_embeddings=64, **sizes)
    model = OPTForCausalLM(config)
    ids = torch.ones((1, 65), dtype=torch.long) * 5
    model(input_ids=ids[:, :64])
    with pytest.raises(IndexError):
        model(input_ids=ids)


@pytest.mark.parametrize("max_length", [512, None])
@pytest.mark.parametrize("role", ["model", "teacher"])
def test_rows_longer_than_a_learnt_table_are_refused(
    build: Build, tokenizer: Any, role: str, max_length: int | None
) -> None:
    trainer = {
        "model": gpt2(tokenizer, 512),
        "teacher": gpt2(tokenizer, 512),
        "processing_class": tokenizer,
        "teacher_processing_class": tokenizer,
        role: gpt2(tokenizer, 64),
    }
    name = "student" if role == "model" else "teacher"
    with pytest.raises(UserError, match=rf"The {name} is made for 64 tokens.*no place for the others.*max_length: 64"):
        build(KDTrainer, long_rows(100), trainer=trainer, max_length=max_length)
    evaluation = {**trainer, "eval_dataset": long_rows(100)}
    with pytest.raises(UserError, match=f"The {name} is made for 64 tokens"):
        build(KDTrainer, long_rows(10), trainer=evaluation, max_length=max_length)
    # What fits is trained, whatever max_length would allow.
    assert build(KDTrainer, long_rows(10), trainer=trainer, max_length=max_length, max_steps=1).train()


def test_packs_are_as_long_as_their_longest_row_unless_they_are_read_as_one(build: Build, tokenizer: Any) -> None:
    trainer = {"model": gpt2(tokenizer, 64), "processing_class": tokenizer, "teacher": None}
    packed: dict[str, Any] = {"packing": True, "max_length": 256, "trainer": trainer}
    build(SFTBaselineTrainer, long_rows(20), **packed)
    with pytest.raises(UserError, match="The student is made for 64 tokens, the data has sequences of 1"):
        build(SFTBaselineTrainer, long_rows(20), **packed, packing_strategy="wrapped")


def test_rotary_positions_are_warned_of(build: Build, tokenizer: Any) -> None:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=0,
    )
    (one,) = lacking_positions("student", config, 100, None)
    assert not one.fatal
    trainer = {"model": LlamaForCausalLM(config), "processing_class": tokenizer, "teacher": None}
    assert build(SFTBaselineTrainer, long_rows(100), trainer=trainer, max_length=None, max_steps=1).train()


# Tokens


def test_a_token_without_a_row_is_refused_before_training(build: Build, tokenizer: Any) -> None:
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<new>"])
    rows = Dataset.from_list(
        [{"prompt": "the cat", "completion": " sat"}] * 7 + [{"prompt": "a", "completion": "<new>"}]
    )
    trainer = {"model": gpt2(tokenizer, 64), "processing_class": larger, "teacher": None}
    size = len(tokenizer)
    with pytest.raises(
        UserError, match=f"The student has embeddings for {size} tokens.*a token of the data is {size}"
    ):
        build(SFTBaselineTrainer, rows, trainer=trainer)
    # Without the row that has it nobody minds.
    build(SFTBaselineTrainer, rows.select(range(7)), trainer=trainer)


def test_a_padding_token_without_a_row_is_refused(build: Build, tokenizer: Any) -> None:
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"pad_token": "<padding>"})
    trainer = {"model": gpt2(tokenizer, 64), "processing_class": larger, "teacher": None}
    with pytest.raises(UserError, match=f"the padding token is {len(tokenizer)}"):
        build(SFTBaselineTrainer, long_rows(10), trainer=trainer)


def test_an_answer_that_the_teacher_cannot_know_is_refused(build: Build, tokenizer: Any) -> None:
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<new>"])
    rows = Dataset.from_list(
        [{"prompt": "the cat", "completion": " sat"}] * 7 + [{"prompt": "a", "completion": "<new>"}]
    )
    trainer = {
        "model": gpt2(larger, 64),
        "teacher": gpt2(larger, 64),
        "processing_class": larger,
        "teacher_processing_class": tokenizer,
    }
    with pytest.raises(UserError, match=r"the answers hold '<new>' \(\d+\), which the teacher does not know"):
        build(KDTrainer, rows, trainer=trainer)


def test_the_sequences_of_both_sides_of_alm_are_measured(build: Build, tokenizer: Any) -> None:
    theirs: Any = CHATTERS["gemma"]()
    theirs.pad_token = theirs.eos_token
    rows = Dataset.from_list([{"text": " ".join(sentences(12, 3))}] * 4)
    trainer = {
        "model": gpt2(tokenizer, 512),
        "processing_class": tokenizer,
        "teacher": gpt2(theirs, 64),
        "teacher_processing_class": theirs,
    }
    with pytest.raises(UserError, match="The teacher is made for 64 tokens"):
        build(ALMTrainer, rows, trainer=trainer, max_length=None)


def test_the_extent_of_rows_is_that_of_the_rows_in_use() -> None:
    rows = [{"input_ids": [1, 2, 9], "labels": [-100, 2, -100]}, {"input_ids": [3] * 5, "labels": [3] * 5}]
    dataset = Dataset.from_list(rows)
    assert Extent.of(dataset) == Extent(5, 9, 3)
    assert Extent.of(dataset.select([1])) == Extent(5, 3, 3)
    assert Extent.of(dataset.add_column("seq_lengths", [[1, 2], [4, 1]])) == Extent(4, 9, 3)
    assert Extent.of(iter(rows)) == Extent()
    assert lacking_tokens("student", 10, 9, {"pad": None}) == []


# The end of answers


def test_padding_with_eos_keeps_the_eos_of_rows_supervised(build: Build, tokenizer: Any) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    rows = Dataset.from_list([{"prompt": "the", "completion": " cat"}, {"prompt": "a", "completion": " dog" * 9}] * 2)
    trainer = {"model": gpt2(tokenizer, 64), "processing_class": tokenizer, "teacher": None}
    built = build(SFTBaselineTrainer, rows, trainer=trainer)
    batch = next(iter(built.get_train_dataloader()))
    supervised = (batch["labels"] == tokenizer.eos_token_id).sum(1)
    assert supervised.tolist() == [1, 1, 1, 1]


def chatty(tokenizer: Any) -> Any:
    """The tiny tokenizer with ChatML's template and an EOS that the template never writes, as base models have it."""
    one: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    one.pad_token = tokenizer.pad_token
    one.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    one.chat_template = (
        "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    return one


def test_a_saved_chat_student_stops_where_its_template_ends_an_answer(
    build: Build, tokenizer: Any, tmp_path: Path
) -> None:
    chat = chatty(tokenizer)
    end = chat.convert_tokens_to_ids("<|im_end|>")
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on a mat"}]
    trainer = {"model": gpt2(chat, 64, eos_token_id=chat.eos_token_id), "processing_class": chat, "teacher": None}
    built = build(SFTBaselineTrainer, Dataset.from_list([{"messages": talk}] * 4), trainer=trainer, max_steps=1)
    assert {end, chat.eos_token_id} == set(built.model.generation_config.eos_token_id)
    built.train()
    built.save_model(str(tmp_path / "saved"))
    saved = GPT2LMHeadModel.from_pretrained(tmp_path / "saved")
    assert end in saved.generation_config.eos_token_id


def test_what_ends_answers_is_special_and_ends_most_of_them(tokenizer: Any) -> None:
    chat = chatty(tokenizer)
    end, eos = chat.convert_tokens_to_ids("<|im_end|>"), chat.eos_token_id
    newline = chat("\n", add_special_tokens=False)["input_ids"]
    word = chat("cat", add_special_tokens=False)["input_ids"]

    def rows(*lists: list[int]) -> Any:
        return ((np.array(ids), np.ones(len(ids), bool)) for ids in lists)

    assert answer_ends(rows([*word, end, *newline], [*word, end]), chat) == [end]
    assert answer_ends(rows([*word, *word], word), chat) == []
    assert answer_ends(rows([*word, end], [*word, eos], [*word, eos]), chat) == [eos]
    generation = copy.deepcopy(gpt2(chat, 8, eos_token_id=eos).generation_config)
    assert add_stops(generation, [eos]) == []
    assert add_stops(generation, [end]) == [end]
    assert generation.eos_token_id == [eos, end]


# Rows that are not read before training: with images, or of a stream


def eyes(family: str, folder: Path) -> tuple[Any, Any]:
    """A vision-language model and its processor, whose template ends answers with a token that is not EOS."""
    if family == "LLaVA":
        path = make_llava(folder)
        model, processor = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
        processor.chat_template = made("Idefics3")[1].chat_template
    else:
        make, processor = made(family)
        model = model_of(make, 0)
    processor.tokenizer.add_tokens(["<|im_end|>"], special_tokens=True)
    processor.chat_template = processor.chat_template.replace("<|end|>{% endgeneration", "<|im_end|>{% endgeneration")
    return model, processor


@pytest.mark.parametrize("family", ["LLaVA", "Idefics3", "Qwen2.5-VL"])
def test_rows_with_images_fit_like_others(build: Build, family: str, tmp_path: Path) -> None:
    model, processor = eyes(family, tmp_path / "model")
    trainer = {"model": model, "processing_class": processor, "teacher": None}
    settings: dict[str, Any] = {"trainer": trainer, "assistant_only_loss": True, "max_length": 256}
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    rows = vision_rows([1, 1, 2, 1])
    trainer["model"] = copy.deepcopy(model)
    if model.get_input_embeddings().num_embeddings <= end:
        with pytest.raises(UserError, match=f"The student has embeddings for .* a token of the data is {end}"):
            build(SFTBaselineTrainer, rows, **settings)
    model.resize_token_embeddings(end + 1)
    trainer["model"] = model
    eos = processor.tokenizer.eos_token_id
    model.generation_config.eos_token_id = eos
    built = build(SFTBaselineTrainer, rows, **settings)
    assert built.model.generation_config.eos_token_id == [eos, end]
    # The line of counts is about the same rows, which are read once.
    sample = built.sampled_rows()
    assert built.sampled_rows() is sample
    counts = built.count_tokens()
    assert counts is not None
    assert (counts.rows, counts.longest) == (4, max(len(row.ids) for row in sample))


@pytest.mark.parametrize("stream", [False, True])
def test_images_count_as_positions(build: Build, vlms: Any, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """16 patches and some words do not fit into a table of 24 positions, unless max_length cuts the answer."""
    monkeypatch.setattr("mmkd.preparation.fit.learns_positions", lambda config: True)
    model = AutoModelForImageTextToText.from_pretrained(vlms["fine"])
    model.config.text_config.max_position_embeddings = 24
    answer = [{"type": "text", "text": " ".join(["dog"] * 20)}]
    question = [{"type": "image", "text": None}, {"type": "text", "text": "cat"}]
    talk = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rows: Any = Dataset.from_list([{"messages": talk, "images": [picture(0)]}] * 4)
    rows = rows.to_iterable_dataset() if stream else rows
    trainer = {"model": model, "processing_class": AutoProcessor.from_pretrained(vlms["fine"]), "teacher": None}
    with pytest.raises(UserError, match=r"The student is made for 24 tokens, the data has .* no place"):
        build(SFTBaselineTrainer, rows, trainer=trainer, max_length=None)
    build(SFTBaselineTrainer, rows, trainer=trainer, max_length=24)


def test_of_many_images_a_sample_is_read(build: Build, vlms: Any) -> None:
    trainer = {"model": str(vlms["student"]), "teacher": str(vlms["fine"])}
    built = build(KDTrainer, vision_rows([1] * 40), trainer=trainer, assistant_only_loss=True, max_length=128)
    ours, theirs = (sample_seen_by(built.student_side, role) for role in (None, ONLY))
    assert len(ours) == len(theirs) <= SAMPLED
    # The teacher's grid is finer: 16 patches for 4.
    assert {len(other.ids) - len(mine.ids) for mine, other in zip(ours, theirs, strict=True)} == {12}


def test_a_stream_fits_by_its_first_rows(build: Build, tokenizer: Any) -> None:
    trainer = {"model": gpt2(tokenizer, 64), "processing_class": tokenizer, "teacher": None}
    with pytest.raises(UserError, match="The student is made for 64 tokens"):
        build(SFTBaselineTrainer, long_rows(100).to_iterable_dataset(), trainer=trainer, max_length=None)
    chat = chatty(tokenizer)
    talk = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on a mat"}]
    stream = Dataset.from_list([{"messages": talk}] * 40).to_iterable_dataset()
    trainer = {"model": gpt2(tokenizer, 64), "processing_class": chat, "teacher": None}
    with pytest.raises(UserError, match="a token of the data is"):
        build(SFTBaselineTrainer, stream, trainer=trainer)
    trainer["model"] = gpt2(chat, 64, eos_token_id=chat.eos_token_id)
    built = build(SFTBaselineTrainer, stream, trainer=trainer, max_steps=1)
    assert chat.convert_tokens_to_ids("<|im_end|>") in built.model.generation_config.eos_token_id
    assert built.train()


def test_a_stream_of_packs_is_taken_apart() -> None:
    row = {"input_ids": [5, 6, 7, 8], "labels": [5, 6, -100, 8], "seq_lengths": [3, 1]}
    assert [[*map(list, one)] for one in sample_of(iter([row] * 40), None)[:2]] == [
        [[5, 6, 7], [False, True, False]],
        [[8], [False]],
    ]
    empty = SampledRow(np.array([], int), np.array([], bool))
    assert Extent.of_rows([empty]) == Extent()
