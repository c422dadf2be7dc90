"""Alignment where one side rewrites what it reads: it goes on after what was rewritten, in every script."""

import unicodedata
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, normalizers

from mmkd.alignment.common_runs import common_runs
from mmkd.alignment.normal_form import NormalForm
from mmkd.alignment.pieces import TokenPieces, Tokens
from mmkd.alignment.spans import Aligner, Chunks
from tests.alignment.tiny_tokenizers import byte_level, metaspace, normalising, unigram, wordpiece

SENTENCES = [
    "A resistor of 5 \u2126 and a gap of 3 \u212b are used here.",
    "Ein Gro\u00dfh\u00e4ndler fu\u0308r Stra\u00dfen, \ufb01ne caf\u00e9s.",
    unicodedata.normalize("NFD", "Tôi yêu tiếng Việt và cà phê sữa đá ở Hà Nội."),
    unicodedata.normalize("NFD", "저는 커피를 정말 좋아합니다"),
    "저는 커피를 정말 좋아합니다",
    "\u0958\u093f\u0932\u093e और हिन्दी में लिखा गया पाठ",
    "日本語 ﾊﾝｶｸ ＦＵＬＬ　ｗｉｄｔｈ １２３ か\u3099",
    "\uf900 中文文本和日常对话",
    "İstanbul'da IŞIK ve ışık, ΟΔΟΣ και οδός",
    "Family \U0001f469\u200d\U0001f469\u200d\U0001f467 and \U0001f1f3\U0001f1f4 \u2764\ufe0f",
    "می\u200cخواهم مرحبا بالعالم",
    "two  spaces,\ttabs\n\nand   lines ",
    "plain text that both sides read in the very same way",
]
TEXT = st.lists(st.sampled_from([part for text in SENTENCES for part in (text, *text.split(" "))]), max_size=6).map(
    " ".join
)

TOKENIZERS = {
    "bytes": lambda: byte_level(256),
    "byte-level": lambda: byte_level(320),
    "Gemma": lambda: metaspace(420, scheme="never"),
    "Llama 2": lambda: metaspace(380, scheme="normalizer"),
    "NFC": lambda: byte_level(340, nfc=True),
    "NFD": lambda: normalising(normalizers.NFD()),
    "NFKC": lambda: normalising(normalizers.NFKC()),
    "small letters": lambda: normalising(normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])),
    "no accents": lambda: normalising(
        normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    ),
    "one space": lambda: normalising(
        normalizers.Sequence([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    ),
    "stripped": lambda: normalising(normalizers.Strip()),
    "BERT": lambda: normalising(normalizers.BertNormalizer(lowercase=True)),
}


@cache
def aligner(teacher: str, student: str) -> tuple[Aligner, Any, Any]:
    sides = TOKENIZERS[teacher](), TOKENIZERS[student]()
    return Aligner.of(*sides), *sides


def tokens_of(tokenizer: Any, pieces: TokenPieces, text: str) -> Tokens:
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"], np.int64)
    return pieces.cover(ids, np.array([len(ids)]))


def loosest(data: bytes) -> str:
    """What is left of a text in the form that no tokenizer here rewrites."""
    text = unicodedata.normalize("NFKD", data.decode("utf-8", "surrogateescape").replace("\u2581", " ")).casefold()
    kept = "".join(one for one in text if unicodedata.category(one)[0] not in "MCZ" and not one.isspace())
    return unicodedata.normalize("NFC", kept)


def both_texts(chunks: Chunks, teacher: Tokens, student: Tokens) -> list[tuple[bytes, bytes]]:
    def text(side: Tokens, span: Any) -> bytes:
        return b"".join(side.pieces[i] for i in side.ids[slice(*span)])

    return [(text(teacher, a), text(student, b)) for a, b in zip(chunks.teacher, chunks.student, strict=True)]


@settings(max_examples=150, deadline=None)
@given(teacher=st.sampled_from(list(TOKENIZERS)), student=st.sampled_from(list(TOKENIZERS)), text=TEXT)
def test_all_of_a_text_is_aligned_whatever_either_side_rewrites(teacher, student, text):
    both, *tokenizers = aligner(teacher, student)
    sides = tokens_of(tokenizers[0], both.teacher, text), tokens_of(tokenizers[1], both.student, text)
    chunks = both.align(*sides)
    for one, other in both_texts(chunks, *sides):
        assert loosest(one) == loosest(other)
    assert chunks.counts.differing.tolist() == [0]
    # At most what ends a text and is nothing to the other side: spaces, joiners.
    for tokens, chunk_of in (
        (sides[0], chunks.chunk_of_teacher_token),
        (sides[1], chunks.chunk_of_student_token),
    ):
        lost = b"".join(tokens.pieces[i] for i in tokens.ids[chunk_of < 0])
        assert not loosest(lost), lost


@pytest.mark.parametrize(
    ("tokenizer", "expected"),
    [
        ("byte-level", NormalForm()),
        ("Gemma", NormalForm(metaspace=True)),
        ("Llama 2", NormalForm(metaspace=True)),
        ("NFC", NormalForm(canonical=True)),
        ("NFKC", NormalForm(canonical=True, compatible=True)),
        ("small letters", NormalForm(canonical=True, case=True)),
        ("no accents", NormalForm(canonical=True, compatible=True, case=True, accents=True, marks=True)),
        ("stripped", NormalForm(spaces=True)),
        ("BERT", NormalForm(canonical=True, case=True, accents=True, spaces=True, invisible=True)),
    ],
)
def test_what_a_tokenizer_rewrites_is_read_off(tokenizer, expected):
    assert TokenPieces.of(TOKENIZERS[tokenizer]()).form == expected


def shares(teacher: Any, student: Any, text: str) -> tuple[float, list[tuple[bytes, bytes]], Chunks]:
    """The share of the student's tokens in chunks, and the chunks as both sides spell them."""
    both = Aligner.of(teacher, student)
    sides = tokens_of(teacher, both.teacher, text), tokens_of(student, both.student, text)
    chunks = both.align(*sides)
    return float((chunks.chunk_of_student_token >= 0).mean()), both_texts(chunks, *sides), chunks


REST = " is used here, and the rest of this long answer is plain text."


@pytest.mark.parametrize(
    "sign", ["\u2126", "\u212b", "e\u0301", "\u0958\u093f", "\uf900", "\u1112\u1161\u11ab", "o\u0323\u0302"]
)
def test_one_sign_that_nfc_rewrites_is_a_chunk_and_all_others_stay(sign):
    teacher, student = byte_level(256, nfc=True), byte_level(256)
    share, texts, chunks = shares(teacher, student, f"A {sign}{REST}")
    assert share == 1
    # The sign itself may be several chunks, which together are the same text to the teacher.
    before, after = (b"".join(part) for part in zip(*texts[: -len(REST)], strict=True))
    assert (before.decode(), after.decode()) == (unicodedata.normalize("NFC", f"A {sign}"), f"A {sign}")
    assert len(texts) - len(REST) > 2
    # Every byte of the rest is a chunk.
    assert texts[-len(REST) :] == [(bytes([byte]),) * 2 for byte in REST.encode()]
    assert chunks.counts.differing.tolist() == [0]


def test_a_tokenizer_of_small_letters_without_accents_and_spaces_is_aligned_by_its_ids():
    share, texts, chunks = shares(wordpiece(), byte_level(320), "The Brown  Fox\njumps over the Café, doesn't it?")
    assert share == 1
    assert (b"the", b"The") in texts
    # Where a word ends says the side that has spaces: not before the comma.
    comma = next(i for i, (one, _) in enumerate(texts) if one == b",")
    assert not chunks.at_boundary[comma - 1]
    assert chunks.at_boundary[comma]


@pytest.mark.parametrize("make", [wordpiece, unigram])
def test_an_unknown_token_is_left_out_and_what_follows_is_aligned(make):
    text = "The quick brown fox жук jumps over the lazy dog, and the model answers the user ж in one line."
    share, texts, chunks = shares(make(), byte_level(256), text)
    unknown = len("жукж".encode()) / len(text.encode())
    assert 1 - 4 * unknown < share <= 1 - unknown
    assert not any("ж".encode() in one + other for one, other in texts)
    assert all(loosest(one) == loosest(other) for one, other in texts)
    assert loosest(b"".join(one for one, _ in texts)).endswith("line.")
    assert chunks.counts.differing.tolist() == [1]


def test_unknown_tokens_of_both_sides_are_no_pair():
    _, texts, _ = shares(wordpiece(), wordpiece(150), "the quick brown fox жук jumps over the lazy dog")
    assert b"" not in [one for one, _ in texts]
    assert loosest(b"".join(one for one, _ in texts)) == "thequickbrownfoxjumpsoverthelazydog"


def test_what_differs_is_left_out_and_what_follows_is_aligned():
    both, teacher, student = aligner("byte-level", "NFC")
    left, right = "The quick brown fox jumps over the lazy dog", "The quick green fox jumps over the lazy dog"
    sides = tokens_of(teacher, both.teacher, left), tokens_of(student, both.student, right)
    chunks = both.align(*sides)
    joined = b"".join(one for one, _ in both_texts(chunks, *sides))
    assert b"".join(other for _, other in both_texts(chunks, *sides)) == joined
    assert joined.startswith(b"The quick")
    assert joined.endswith(b"jumps over the lazy dog")
    assert chunks.counts.differing.tolist() == [1]


def runs_of(one: str, other: str) -> list[tuple[str, str]]:
    left, right = (np.frombuffer(text.encode(), np.uint8) for text in (one, other))
    runs = common_runs(left, right, (0xFE, 0xFF))
    texts = [(left[i : i + n].tobytes().decode(), right[j : j + n].tobytes().decode()) for i, j, n in runs]
    assert [run[:2] for run in runs] == sorted(run[:2] for run in runs)
    return texts


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.text("abcdeé日", max_size=30), max_size=5), other=st.text("abcdeé日", max_size=60))
def test_runs_are_the_same_text_in_order_without_overlap(parts, other):
    changed = "".join(part + other[:3] for part in parts)
    for one, two in (("".join(parts), changed), ("".join(parts), other)):
        for left, right in runs_of(one, two):
            assert left == right


def test_runs_go_on_after_differences_and_end_at_whole_characters():
    assert runs_of("same and so on", "same and so") == [("same and so",) * 2]
    assert runs_of("one two three é four five six", "one two three ĩ four five six") == [
        ("one two three ",) * 2,
        (" four five six",) * 2,
    ]
    # The order of the two parts differs: one of them is found.
    assert len(runs_of("x first part second half", "y second half first part")) == 1
