"""TokenPieces: the bytes of every family's tokens, where they lie in a text, and what is refused."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from mmkd.alignment.markers import markers_of
from mmkd.alignment.pieces import TokenPieces, boundary_mask
from tests.alignment.tiny_tokenizers import CHATTERS, byte_level, metaspace, unigram, wordpiece

PLAIN = "The quick brown fox, café 日本 🙂\n\n  def f():\n\treturn  1"


def ids_of(tokenizer: Any, text: str) -> np.ndarray:
    return np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)


def covered(pieces: TokenPieces, ids: np.ndarray, text: str, offsets: Any = None) -> list[bytes]:
    starts, ends = pieces.spans(ids, text, offsets)
    return [text.encode()[start:end] for start, end in zip(starts, ends, strict=True)]


# The bytes of tokens

LOSSLESS = {
    "byte-level": lambda: byte_level(320),
    "256 bytes": lambda: byte_level(256),
    "Gemma": lambda: metaspace(420, scheme="never"),
    "Mistral": lambda: metaspace(420, scheme="first"),
    "Llama 2": lambda: metaspace(420, scheme="normalizer"),
    "Llama 2 without legacy": lambda: metaspace(420, scheme="always"),
    "ByT5": ByT5Tokenizer,
}


@pytest.mark.parametrize("family", LOSSLESS)
def test_pieces_add_up_to_the_text(family):
    tokenizer = LOSSLESS[family]()
    pieces = TokenPieces.of(tokenizer)
    ids = ids_of(tokenizer, PLAIN)
    assert pieces.lossless
    joined = b"".join(pieces[i] for i in ids)
    spaces = 1 if family in ("Mistral", "Llama 2", "Llama 2 without legacy") else 0
    assert joined == b" " * spaces + PLAIN.encode()
    assert pieces.lengths.dtype == np.int32
    assert len(pieces) == max(tokenizer.get_vocab().values()) + 1


@pytest.mark.parametrize("family", LOSSLESS)
@settings(max_examples=40, deadline=None)
@given(text=st.text(max_size=30).filter(lambda text: "▁" not in text and "\r" not in text))
def test_spans_partition_any_text(family, text):
    tokenizer = LOSSLESS[family]()
    pieces, ids = TokenPieces.of(tokenizer), ids_of(tokenizer, text)
    starts, ends = pieces.spans(ids, text)
    assert (starts[1:] == ends[:-1]).all()
    assert (starts <= ends).all()
    assert not len(ids) or (starts[0], ends[-1]) == (0, len(text.encode()))


def test_a_token_may_be_a_part_of_a_character():
    pieces = TokenPieces.of(byte_level(256))
    assert covered(pieces, ids_of(byte_level(256), "é"), "é") == [b"\xc3", b"\xa9"]
    sentencepiece = metaspace(420, scheme="never")
    ids = ids_of(sentencepiece, "Ω")
    assert sentencepiece.convert_ids_to_tokens(ids.tolist()) == ["<0xCE>", "<0xA9>"]
    assert covered(TokenPieces.of(sentencepiece), ids, "Ω") == [b"\xce", b"\xa9"]


def test_special_tokens_cover_nothing_and_other_added_ones_their_content():
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=byte_level(320).backend_tokenizer, eos_token="<eos>")
    tokenizer.add_tokens(["<think>"])
    pieces = TokenPieces.of(tokenizer)
    eos, think = tokenizer.convert_tokens_to_ids(["<eos>", "<think>"])
    assert (pieces[eos], pieces[think]) == (b"", b"<think>")
    assert pieces.special[[eos, think]].tolist() == [True, False]
    assert pieces.added[[eos, think]].tolist() == [True, True]
    text = "<think>The<eos>dog"
    ids = ids_of(tokenizer, text)
    assert b"".join(covered(pieces, ids, text)) == b"<think>Thedog"
    starts, ends = pieces.spans(ids, text)
    place = ids.tolist().index(eos)
    assert starts[place] == ends[place] == text.index("<eos>")
    assert ends[-1] == len(text)


def test_special_tokens_may_be_missing_from_the_text():
    tokenizer: Any = CHATTERS["gemma"]()
    pieces = TokenPieces.of(tokenizer)
    ids = np.concatenate([[tokenizer.bos_token_id], ids_of(tokenizer, "The dog"), [tokenizer.eos_token_id]])
    starts, ends = pieces.spans(ids, "The dog")
    assert (starts[0], ends[0], starts[-1], ends[-1]) == (0, 0, 7, 7)


def test_without_a_text_spans_are_those_of_the_joined_pieces():
    pieces = TokenPieces.of(byte_level(320))
    ids = ids_of(byte_level(320), PLAIN)
    for with_text, without in zip(pieces.spans(ids, PLAIN), pieces.spans(ids), strict=True):
        np.testing.assert_array_equal(with_text, without)


def test_a_cut_tokenisation_covers_the_beginning_of_its_text():
    pieces = TokenPieces.of(byte_level(320))
    ids = ids_of(byte_level(320), PLAIN)
    assert b"".join(covered(pieces, ids[:4], PLAIN)) == b"".join(pieces[i] for i in ids[:4])


# Tokenizers that change the text


@pytest.mark.parametrize("make", [wordpiece, unigram])
def test_offsets_place_tokens_of_a_normalised_text(make):
    text = "The Café,  doesn't ½ it?"
    encoding = make()(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, pieces = np.array(encoding["input_ids"]), TokenPieces.of(make())
    starts, ends = pieces.spans(ids, text, encoding["offset_mapping"])
    # Without gaps: a token covers the space before it, as tokens of other families do.
    assert (starts[1:] == ends[:-1]).all()
    assert (starts[0], ends[-1]) == (0, len(text.encode()))


def test_offsets_of_a_shared_character_give_it_to_the_last_of_its_tokens():
    tokenizer = byte_level(256, nfc=True)
    # The sign for Ångström, which becomes the letter of two bytes, each a token.
    text = "\u212b!"
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert len(encoding["input_ids"]) == 3
    spans = covered(TokenPieces.of(tokenizer), np.array(encoding["input_ids"]), text, encoding["offset_mapping"])
    assert spans == [b"", "\u212b".encode(), b"!"]


def test_normalised_text_without_offsets_is_refused_with_a_sample():
    tokenizer = byte_level(256, nfc=True)
    pieces = TokenPieces.of(tokenizer)
    assert pieces.lossless
    with pytest.raises(ValueError, match=r"(?s)do not add up.*return_offsets_mapping=True.*'Cafe\u0301'"):
        pieces.spans(ids_of(tokenizer, "Cafe\u0301"), "Cafe\u0301")


def test_lossy_pieces_have_no_places_without_their_texts():
    pieces = TokenPieces.of(wordpiece())
    assert not pieces.lossless
    ids = ids_of(wordpiece(), "the dog")
    with pytest.raises(ValueError, match=r"lack spaces or capitals.*Pass the texts"):
        pieces.spans(ids)
    # Aligned they are all the same, in a form that lacks spaces and capitals on both sides.
    assert pieces.form.spaces
    assert pieces.form.case
    tokens = pieces.cover(ids, np.array([len(ids)]))
    assert b"".join(pieces[index] for index in tokens.ids) == b"thedog"


def test_tokenizer_without_bytes_or_offsets_is_refused_by_name():
    slow = SimpleNamespace(
        name_or_path="org/slow",
        is_fast=False,
        get_vocab=lambda: {"the": 0, "dog": 1},
        added_tokens_decoder={},
        all_special_ids=[],
    )
    with pytest.raises(ValueError, match=r"org/slow.*neither the bytes.*Load a fast tokenizer"):
        TokenPieces.of(slow)


# Boundaries and rows


def test_words_of_wordpiece_begin_where_nothing_says_that_they_continue():
    tokenizer = wordpiece()
    mask = boundary_mask(TokenPieces.of(tokenizer))
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(mask))))
    assert mask.tolist() == [not token.startswith("##") for token in tokens]
    assert {True, False} == set(mask.tolist())


def test_boundary_tokens_begin_with_whitespace_or_are_special():
    tokenizer = CHATTERS["llama"]()
    pieces = TokenPieces.of(tokenizer)
    mask = boundary_mask(pieces)
    assert mask.shape == (len(pieces),)
    for index, flag in enumerate(mask.tolist()):
        assert flag == (pieces[index][:1] in (b" ", b"\t", b"\n") or bool(pieces.special[index]))


def test_rows_are_covered_alike_with_and_without_their_texts():
    tokenizer = metaspace(420, scheme="never")
    pieces, texts = TokenPieces.of(tokenizer), ["The quick", "", "café 日本 dog"]
    rows = [ids_of(tokenizer, text) for text in texts]
    ids, lengths = np.concatenate(rows), np.array([len(row) for row in rows])
    plain, placed = pieces.cover(ids, lengths), pieces.cover(ids, lengths, texts)
    np.testing.assert_array_equal(plain.rows, placed.rows)
    for tokens in (plain, placed):
        spans = zip(tokens.starts, tokens.starts + tokens.lengths, strict=True)
        assert b"".join(tokens.data[start:end].tobytes() for start, end in spans) == "".join(texts).encode()


# Markers


def names(tokenizer: Any) -> dict[str, set[str]]:
    return {role: {tokenizer.decode(ids) for ids in marks} for role, marks in markers_of(tokenizer).items()}


def test_markers_are_read_from_the_chat_template():
    assert names(CHATTERS["chatml"]()) == {
        # What this tokenizer calls bos begins its headers, as in SmolLM2, and is none.
        "eos": {"<|im_end|>"},
        "pad": {"<|endoftext|>"},
        "system": {"<|im_start|>system\n"},
        "user": {"<|im_start|>user\n"},
        "assistant": {"<|im_start|>assistant\n"},
        "end of system": {"<|im_end|>\n", "<|im_end|>"},
        "end of user": {"<|im_end|>\n", "<|im_end|>"},
        "end of assistant": {"<|im_end|>\n", "<|im_end|>"},
    }


def test_a_template_that_refuses_a_role_has_no_marker_for_it():
    assert names(CHATTERS["gemma"]()) == {
        "bos": {"<bos>"},
        "eos": {"<eos>"},
        "user": {"<start_of_turn>user\n"},
        "assistant": {"<start_of_turn>model\n"},
        "end of user": {"<end_of_turn>\n", "<end_of_turn>"},
        "end of assistant": {"<end_of_turn>\n", "<end_of_turn>"},
    }


def test_without_a_template_markers_are_the_named_special_tokens():
    assert markers_of(byte_level(320)) == {}
    tokenizer = CHATTERS["mistral"]()
    assert names(tokenizer)["end of user"] == {"[/INST]"}
    assert "assistant" not in names(tokenizer)


def test_thoughts_that_a_template_adds_to_the_last_answer_belong_to_its_header():
    tokenizer: Any = PreTrainedTokenizerFast(tokenizer_object=CHATTERS["chatml"]().backend_tokenizer)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if loop.last and message['role'] == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ message['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    header = "<|im_start|>assistant\n"
    assert names(tokenizer)["assistant"] == {header, header + "<think>\n\n</think>\n\n"}
