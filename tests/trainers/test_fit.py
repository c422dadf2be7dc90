"""Tokens and positions that a model lacks are said before training, alike by doctor and trainers."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import (
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
from mmkd.models.load import learns_positions, positions_of
from mmkd.trainers.alm import ALMTrainer
from mmkd.trainers.fit import Extent, add_stops, answer_ends, lacking_positions, lacking_tokens
from mmkd.trainers.kd import KDTrainer
from mmkd.trainers.sft import SFTBaselineTrainer
from scripts.make_tiny_models import make_tokenizer, sentences
from tests.alignment.tiny_tokenizers import CHATTERS
from tests.helpers import Build


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
