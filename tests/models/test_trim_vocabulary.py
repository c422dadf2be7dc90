"""trim-vocabulary: what is kept is cut, embedded and predicted as before."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from mmkd.commands import main as cli
from mmkd.errors import UserError
from mmkd.models.trim_vocabulary import Trimming, chosen_tokens
from mmkd.models.trimmed_model import vocabulary_of
from tests.alignment.tiny_tokenizers import CHATTERS, TEXTS, byte_level, metaspace, unigram, wordpiece

KEPT = "The capital of France is Paris."
SPECIAL = ("<|im_start|>", "<|im_end|>")


def clip_like() -> PreTrainedTokenizerFast:
    """BPE of bytes with a mark at the end of words, as CLIP has."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "removed"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def bert_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer.from_str(wordpiece(300).backend_tokenizer.to_str())
    ids: Any = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.BertProcessing(ids[1], ids[0])
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


FAMILIES: dict[str, Any] = {
    "bytes": lambda: byte_level(420, SPECIAL),
    "sentencepiece": lambda: metaspace(460, SPECIAL),
    "unigram": lambda: unigram(220),
    "wordpiece": bert_tokenizer,
    "end_of_word": clip_like,
}


def test_a_merged_token_brings_what_it_is_merged_from() -> None:
    tokenizer = byte_level(420)
    vocabulary = vocabulary_of(tokenizer)
    token = max(vocabulary.ids, key=len)
    closed = {str(tokenizer.convert_ids_to_tokens(number)) for number in vocabulary.closed([vocabulary.ids[token]])}
    assert {token, *token} <= closed
    assert len(closed) > len({token, *token})


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_of_kept_tokens_are_cut_as_before(family: str, tmp_path: Path) -> None:
    tokenizer = FAMILIES[family]()
    folder, out = tmp_path / "model", tmp_path / "trimmed"
    model = llama(tokenizer, padding=7)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (tmp_path / "texts.txt").write_text("\n\n".join([KEPT, "The lazy dog is in France."]), encoding="utf-8")
    assert trim(folder, tmp_path / "texts.txt", out, "--min_frequency", "1e-6") == 0
    smaller = AutoTokenizer.from_pretrained(out)
    assert len(smaller) < len(tokenizer)
    for text in (KEPT, "The dog is Paris.", "lazy capital"):
        old, new = tokenizer(text)["input_ids"], smaller(text)["input_ids"]
        assert smaller.convert_ids_to_tokens(new) == tokenizer.convert_ids_to_tokens(old)
        assert smaller.decode(new) == tokenizer.decode(old)
        assert logits_alike(model, AutoModelForCausalLM.from_pretrained(out), old, new, tokenizer, smaller)
    report = json.loads((out / "trim_report.json").read_text())
    assert report["sample_lines_alike"] == report["sample_lines"] == 2
    assert report["largest_difference"] < 1e-5
    assert report["rows_before"] == len(tokenizer) + 7


def test_texts_with_tokens_that_are_gone_are_still_read() -> None:
    for name in ("bytes", "sentencepiece"):
        tokenizer = FAMILIES[name]()
        vocabulary = vocabulary_of(tokenizer)
        trimmed = vocabulary.without_others(vocabulary.closed(vocabulary.always))
        smaller = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(trimmed.state)))
        text = "Größe: 日本語 🙂"
        assert str(smaller.decode(smaller(text)["input_ids"])).strip() == text


def llama(tokenizer: Any, tied: bool = True, padding: int = 0) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer) + padding,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=tied,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )
    return with_weights(LlamaForCausalLM(config))


def with_weights(model: Any) -> Any:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def trim(model: Path, texts: Path | str, out: Path, *flags: str) -> int:
    return cli.main(["trim-vocabulary", str(model), "--texts", str(texts), "--output", str(out), *flags])


@torch.no_grad()
def logits_alike(before: Any, after: Any, old: list[int], new: list[int], source: Any, smaller: Any) -> bool:
    names = smaller.convert_ids_to_tokens(list(range(len(smaller))))
    kept = source.convert_tokens_to_ids(names)
    further: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    if before.config.is_encoder_decoder:
        further = ({"decoder_input_ids": torch.tensor([old])}, {"decoder_input_ids": torch.tensor([new])})
    ours = after(input_ids=torch.tensor([new]), **further[1]).logits[..., : len(smaller)]
    theirs = before(input_ids=torch.tensor([old]), **further[0]).logits[..., kept]
    return torch.allclose(ours, theirs, atol=1e-5)


def small_bert(tokenizer: Any) -> Any:
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
    }
    config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, **shape)
    return with_weights(BertForMaskedLM(config))


def small_t5(tokenizer: Any) -> Any:
    shape: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return with_weights(T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer) + 3, pad_token_id=0, **shape)))


MODELS: dict[str, Any] = {
    "untied": (AutoModelForCausalLM, lambda tokenizer: llama(tokenizer, tied=False), "bytes"),
    "masked_with_bias": (AutoModelForMaskedLM, small_bert, "wordpiece"),
    "encoder_and_decoder": (AutoModelForSeq2SeqLM, small_t5, "unigram"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_models_of_all_kinds_predict_the_kept_tokens_as_before(kind: str, tmp_path: Path) -> None:
    auto_class, build, family = MODELS[kind]
    tokenizer = FAMILIES[family]()
    model = build(tokenizer)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text(KEPT, encoding="utf-8")
    flags = ("--min_frequency", "0.001", "--pad_to_multiple_of", "8")
    assert trim(tmp_path / "model", tmp_path / "texts.txt", tmp_path / "out", *flags) == 0
    after, smaller = auto_class.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    assert after.config.vocab_size % 8 == 0
    assert len(smaller) <= after.config.vocab_size < model.config.vocab_size
    old, new = tokenizer(KEPT)["input_ids"], smaller(KEPT)["input_ids"]
    assert logits_alike(model, after, old, new, tokenizer, smaller)


def test_an_encoder_keeps_its_sentence_transformers_files_and_its_states(tmp_path: Path) -> None:
    tokenizer, folder = bert_tokenizer(), tmp_path / "encoder"
    model = small_bert(tokenizer).bert
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "1_Pooling").mkdir()
    (folder / "modules.json").write_text("[]")
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (tmp_path / "texts.txt").write_text(KEPT, encoding="utf-8")
    assert trim(folder, tmp_path / "texts.txt", tmp_path / "out", "--min_frequency", "0.001") == 0
    assert (tmp_path / "out" / "modules.json").is_file()
    assert (tmp_path / "out" / "1_Pooling" / "config.json").is_file()
    after, smaller = AutoModel.from_pretrained(tmp_path / "out"), AutoTokenizer.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        states = [
            encoder(**reader(KEPT, return_tensors="pt")).last_hidden_state
            for encoder, reader in ((model, tokenizer), (after.eval(), smaller))
        ]
    assert torch.allclose(*states, atol=1e-6)
    # [CLS] and [SEP] stand around a text under their new ids.
    ids = smaller(KEPT)["input_ids"]
    assert (ids[0], ids[-1]) == (smaller.cls_token_id, smaller.sep_token_id)


@pytest.mark.parametrize("chatter", ["chatml", "gemma", "llama"])
def test_a_conversation_is_rendered_and_cut_as_before(chatter: str, tmp_path: Path) -> None:
    tokenizer: Any = CHATTERS[chatter]()
    llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("lazy", encoding="utf-8")
    assert trim(tmp_path / "model", tmp_path / "texts.txt", tmp_path / "out", "--min_frequency", "0.001") == 0
    smaller = AutoTokenizer.from_pretrained(tmp_path / "out")
    turns = [{"role": "user", "content": "lazy"}, {"role": "assistant", "content": "lazy"}]
    old, new = (each.apply_chat_template(turns, return_dict=False) for each in (tokenizer, smaller))
    assert smaller.convert_ids_to_tokens(new) == tokenizer.convert_ids_to_tokens(old)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.eos_token_id == smaller.eos_token_id


def test_keep_gives_the_number_of_tokens_and_not_less_than_is_needed() -> None:
    vocabulary = vocabulary_of(byte_level(420, SPECIAL))
    counts = [Counter(byte_level(420, SPECIAL)(" ".join(TEXTS))["input_ids"])]
    assert len(chosen_tokens(vocabulary, counts, set(), Trimming(keep=300))) in (299, 300)
    with pytest.raises(UserError, match="258 tokens must stay"):
        chosen_tokens(vocabulary, counts, set(), Trimming(keep=200))
    with pytest.raises(UserError, match=r"most frequent one makes up 0\.\d+"):
        chosen_tokens(vocabulary, counts, set(), Trimming(min_frequency=0.9))
    everything = [Counter(vocabulary.ids.values())]
    with pytest.raises(UserError, match="All 422 tokens would be kept"):
        chosen_tokens(vocabulary, everything, set(), Trimming(min_frequency=1e-6))


def test_a_token_counts_where_it_is_most_frequent() -> None:
    """As in BiStil: frequent in one language is enough."""
    vocabulary = vocabulary_of(byte_level(420))
    token = max(vocabulary.ids.values())
    rare, common = Counter({5: 999, token: 1}), Counter({token: 1, 5: 1})
    assert token not in chosen_tokens(vocabulary, [rare], set(), Trimming(min_frequency=0.01))
    assert token in chosen_tokens(vocabulary, [rare, common], set(), Trimming(min_frequency=0.01))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--min_frequency", "2"), "above 0 and below 1"),
        (("--keep", "0"), "--keep is 0"),
        (("--keep", "5"), "tokens must stay"),
        (("--keep", "300", "--held_out", "none.txt"), "none.txt cannot be read"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(
    flags: tuple[str, ...], message: str, tmp_path: Path, capsys: Any
) -> None:
    tokenizer = byte_level(420, SPECIAL)
    llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "texts.txt").write_text(KEPT, encoding="utf-8")
    assert trim(tmp_path / "model", tmp_path / "texts.txt", tmp_path / "out", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_texts_that_are_none_are_refused(tmp_path: Path, capsys: Any) -> None:
    tokenizer = byte_level(420, SPECIAL)
    llama(tokenizer).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty.txt").write_text("\n\n")
    for name, message in (("bytes.txt", "no UTF-8 text"), ("empty.txt", "has no text")):
        assert trim(tmp_path / "model", tmp_path / name, tmp_path / "out", "--keep", "300") == 2
        assert message in capsys.readouterr().err
