"""Aligner: chunks of two tokenisations against the authors' alignments, by their properties, and case by case."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmkd.alignment.markers import marker_tables
from mmkd.alignment.pieces import TokenPieces, Tokens
from mmkd.alignment.spans import Aligner, Chunks
from tests.alignment.tiny_tokenizers import CHATTERS, byte_level, metaspace, of_tokens, unigram, wordpiece

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "ALM_losses.npz")

# The authors' tables: roles and the tokens that mark them.
_CHAT = {"system": ["system"], "user": ["user"], "assistant": ["assistant"]}
KINDS: list[dict[str, list[str]]] = [
    {"pad": ["<|endoftext|>"], "eos": ["<|endoftext|>"], "eot": ["<|endoftext|>"]},
    {
        **_CHAT,
        "start": ["<|im_start|>"],
        "end": ["Ċ"],
        "eot": ["<|im_end|>", "Ċ"],
        "pad": ["<|endoftext|>"],
        "eos": ["<|endoftext|>"],
    },
    {
        **_CHAT,
        "bos": ["<|begin_of_text|>"],
        "pad": ["<|end_of_text|>"],
        "start": ["<|start_header_id|>"],
        "end": ["<|end_header_id|>", "ĊĊ"],
        "eos": ["<|eot_id|>"],
        "eot": ["<|eot_id|>"],
    },
    {
        "bos": ["<bos>"],
        "pad": ["<pad>"],
        "start": ["<start_of_turn>"],
        "end": ["Ċ"],
        "eos": ["<eos>"],
        "eot": ["<end_of_turn>", "Ċ"],
        "system": ["user"],
        "user": ["user"],
        "assistant": ["model"],
    },
]


def decoded(name: str) -> list[str]:
    return ["".join(chr(point) for point in row if point) for row in GOLDEN[name]]


def rows_of(pieces: TokenPieces, *rows: list[int]) -> Tokens:
    return pieces.cover(
        np.array([index for row in rows for index in row], np.int64), np.array([len(row) for row in rows])
    )


def quadruples(chunks: Chunks) -> list[list[int]]:
    return np.concatenate([chunks.teacher, chunks.student], axis=1).tolist()


# Golden


def golden_chunks(number: int) -> Chunks:
    """The chunks of one of the authors' alignments, with the markers of their tables."""
    sides = []
    for side, kind in zip(("teacher", "student"), GOLDEN[f"align{number}_kinds"].tolist(), strict=True):
        tokens = decoded(f"align{number}_{side}_codepoints")
        tokenizer = of_tokens([*tokens, *(token for marker in KINDS[kind].values() for token in marker)])
        vocabulary = tokenizer.get_vocab()
        markers = {role: [tuple(vocabulary[token] for token in ids)] for role, ids in KINDS[kind].items()}
        sides.append((TokenPieces.of(tokenizer), markers, [vocabulary[token] for token in tokens]))
    (teacher, teacher_markers, teacher_ids), (student, student_markers, student_ids) = sides
    tables = marker_tables(teacher_markers, student_markers, teacher, student)
    return Aligner(teacher, student, *tables).align(rows_of(teacher, teacher_ids), rows_of(student, student_ids))


@pytest.mark.parametrize("number", range(6))
def test_alignment_is_that_of_the_authors(number):
    found = np.array(quadruples(golden_chunks(number)))
    # Their spans take in the skipped tokens before a chunk (a bos without partner); ours begin with its first token.
    found[1:, 0], found[1:, 2] = found[:-1, 1], found[:-1, 3]
    found[0, [0, 2]] = 0
    np.testing.assert_array_equal(found, GOLDEN[f"align{number}_indices"])


def test_marker_without_partner_does_not_stop_the_alignment_as_it_does_the_authors():
    assert GOLDEN["align6_indices"].tolist() == [[0, 1, 0, 2]]
    assert quadruples(golden_chunks(6)) == [[0, 1, 0, 2], [2, 3, 2, 4]]


# Two tokenisations of a text

PAIRS = [
    (lambda: byte_level(320), lambda: byte_level(600)),
    (lambda: metaspace(420, scheme="never"), lambda: byte_level(320)),
    (lambda: metaspace(380, scheme="always"), lambda: byte_level(256)),
    (lambda: metaspace(380, scheme="normalizer"), lambda: metaspace(420, scheme="first")),
]
PIECES = st.sampled_from(
    ["The", " quick", "brown ", "Paris", "café", "日本", "🙂", "\n", "  ", "\t", " ", "x", "def f(", "1"]
)
TEXT = st.lists(PIECES, max_size=12).map("".join)


def aligner(pair: int) -> tuple[Aligner, Any, Any]:
    teacher, student = (make() for make in PAIRS[pair])
    return Aligner.of(teacher, student), teacher, student


def encoded(tokenizer: Any, pieces: TokenPieces, texts: list[str]) -> Tokens:
    return rows_of(pieces, *(tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts))


def align_texts(pair: int, texts: list[str]) -> Chunks:
    both, teacher, student = aligner(pair)
    return both.align(encoded(teacher, both.teacher, texts), encoded(student, both.student, texts))


def two_pointers(teacher: list[bytes], student: list[bytes]) -> list[list[int]]:
    """The same by the book, for tokens that add up to the same bytes."""
    found, i, j, start = [], 0, 0, (0, 0)
    left = right = 0
    while i < len(teacher) or j < len(student):
        if left <= right and i < len(teacher):
            left, i = left + len(teacher[i]), i + 1
        else:
            right, j = right + len(student[j]), j + 1
        if left == right:
            found.append([start[0], i, start[1], j])
            start = (i, j)
    return found


@pytest.mark.parametrize("pair", [0, 1])
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXT, max_size=4))
def test_chunks_are_those_of_two_pointers(pair, texts):
    both, teacher, student = aligner(pair)
    found, starts = [], (0, 0)
    for text in texts:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for tokenizer in (teacher, student)]
        pieces = [[both.teacher[i] for i in ids[0]], [both.student[i] for i in ids[1]]]
        found += [[i + starts[k // 2] for k, i in enumerate(chunk)] for chunk in two_pointers(*pieces)]
        starts = starts[0] + len(ids[0]), starts[1] + len(ids[1])
    assert quadruples(align_texts(pair, texts)) == found


@pytest.mark.parametrize("pair", range(len(PAIRS)))
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=4))
def test_chunks_are_increasing_cover_everything_and_have_the_same_bytes(pair, texts):
    both, teacher, student = aligner(pair)
    sides = encoded(teacher, both.teacher, texts), encoded(student, both.student, texts)
    chunks = both.align(*sides)
    for spans, tokens in ((chunks.teacher, sides[0]), (chunks.student, sides[1])):
        edges = spans.ravel()
        assert (np.diff(edges) >= 0).all()
        assert (spans[:, 1] > spans[:, 0]).all()
        # Disjoint and without gaps, so that they partition the tokens.
        assert (edges[1:-1:2] == edges[2::2]).all()
        covered = np.diff(spans).sum() if len(spans) else 0
        # Only tokens that are nothing but a space that the tokenizer added can be left over.
        assert covered >= len(tokens.ids) - (0 if both.teacher.lossless and pair < 2 else 2 * len(texts))
    for ours, theirs in zip(chunks.teacher, chunks.student, strict=True):
        left = b"".join(both.teacher[i] for i in sides[0].ids[slice(*ours)])
        right = b"".join(both.student[i] for i in sides[1].ids[slice(*theirs)])
        assert left == right or (pair >= 2 and left.lstrip(b" ") == right.lstrip(b" "))
    assert chunks.counts.differing.tolist() == [0] * len(texts)


@settings(max_examples=40, deadline=None)
@given(text=TEXT, other=TEXT)
def test_different_bytes_are_never_paired(text, other):
    both, teacher, student = aligner(0)
    left, right = encoded(teacher, both.teacher, [text]), encoded(student, both.student, [other])
    chunks = both.align(left, right)
    for ours, theirs in zip(chunks.teacher, chunks.student, strict=True):
        one = b"".join(both.teacher[i] for i in left.ids[slice(*ours)])
        two = b"".join(both.student[i] for i in right.ids[slice(*theirs)])
        assert one.lstrip(b" ") == two.lstrip(b" ")
    assert chunks.counts.chunks.tolist() == [len(chunks)]


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXT, max_size=5))
def test_the_teacher_as_student_has_one_chunk_per_token(texts):
    tokenizer = byte_level(320)
    both = Aligner.of(tokenizer, tokenizer)
    tokens = encoded(tokenizer, both.teacher, texts)
    chunks = both.align(tokens, tokens)
    np.testing.assert_array_equal(chunks.chunk_of_teacher_token, np.arange(len(tokens.ids)))
    np.testing.assert_array_equal(chunks.chunk_of_student_token, np.arange(len(tokens.ids)))


@pytest.mark.parametrize("pair", range(len(PAIRS)))
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(TEXT, min_size=1, max_size=5))
def test_rows_are_aligned_as_if_each_were_alone(pair, texts):
    together, alone = align_texts(pair, texts), [align_texts(pair, [text]) for text in texts]
    teacher = student = 0
    expected = []
    for one in alone:
        expected += [[i + teacher, j + teacher, k + student, n + student] for i, j, k, n in quadruples(one)]
        teacher, student = teacher + len(one.chunk_of_teacher_token), student + len(one.chunk_of_student_token)
    assert quadruples(together) == expected
    assert together.row.tolist() == [row for row, one in enumerate(alone) for _ in range(len(one))]
    assert together.at_boundary.tolist() == [flag for one in alone for flag in one.at_boundary.tolist()]
    assert together.counts.student_aligned.tolist() == [one.counts.student_aligned[0] for one in alone]


def test_chunk_numbers_of_tokens_are_the_spans():
    chunks = align_texts(1, ["The quick brown café", "Paris 🙂"])
    for spans, chunk_of in (
        (chunks.teacher, chunks.chunk_of_teacher_token),
        (chunks.student, chunks.chunk_of_student_token),
    ):
        assert chunk_of.dtype == np.int32
        np.testing.assert_array_equal(chunk_of, np.repeat(np.arange(len(chunks)), np.diff(spans)[:, 0]))


def test_spaces_that_only_one_side_has_at_the_start_are_overlooked():
    plain, spaced = byte_level(320), metaspace(380, scheme="normalizer")
    both = Aligner.of(spaced, plain)
    text = "  double start and more"
    tokens = encoded(spaced, both.teacher, [text])
    assert both.teacher[tokens.ids[0]].startswith(b" ")
    chunks = both.align(tokens, encoded(plain, both.student, [text]))
    assert chunks.counts.student_unaligned.tolist() == [0]
    assert chunks.counts.teacher_unaligned.tolist() == [0]


def test_a_cut_side_ends_the_alignment():
    both, teacher, student = aligner(0)
    text = "The quick brown fox jumps over the lazy dog"
    whole, ids = encoded(teacher, both.teacher, [text]), student(text, add_special_tokens=False)["input_ids"]
    full, cut = both.align(whole, rows_of(both.student, ids)), both.align(whole, rows_of(both.student, ids[:5]))
    assert 0 < len(cut) < len(full)
    assert quadruples(cut) == quadruples(full)[: len(cut)]
    assert cut.counts.differing.tolist() == [0]
    assert cut.at_boundary[-1]


def test_texts_that_differ_are_aligned_up_to_the_difference_and_counted():
    both, teacher, student = aligner(0)
    left, right = "The quick brown fox", "The quick green fox"
    chunks = both.align(encoded(teacher, both.teacher, [left, left]), encoded(student, both.student, [right, left]))
    aligned = [
        both.teacher[i] for i in encoded(teacher, both.teacher, [left]).ids[: chunks.teacher[chunks.row == 0, 1].max()]
    ]
    assert b"The quick ".startswith(b"".join(aligned)[:9])
    assert chunks.counts.differing.tolist() == [1, 0]
    assert chunks.counts.student_unaligned[0] > 0
    assert chunks.counts.student_unaligned[1] == 0


def test_only_chunks_supervised_on_both_sides_are_kept():
    text = "The quick brown fox jumps"
    both, teacher, student = aligner(0)
    tokens = encoded(teacher, both.teacher, [text]), encoded(student, both.student, [text])
    full = both.align(*tokens)
    split = next(i for i, (a, b) in enumerate(full.student) if b - a > 1) if (np.diff(full.student) > 1).any() else 1
    ours, theirs = np.ones(len(tokens[0].ids), bool), np.ones(len(tokens[1].ids), bool)
    ours[full.teacher[split, 0]] = False
    theirs[full.student[-1, 1] - 1] = False
    chunks = both.align(*tokens, ours, theirs)
    kept = [i for i in range(len(full)) if i not in (split, len(full) - 1)]
    assert quadruples(chunks) == [quadruples(full)[i] for i in kept]
    assert (chunks.chunk_of_teacher_token[slice(*full.teacher[split])] == -1).all()
    # What is supervised but in no chunk, as its chunk lost another token.
    assert chunks.counts.teacher_unaligned.tolist() == [int(np.diff(full.teacher[[split, -1]]).sum()) - 1]
    assert chunks.counts.student_unaligned.tolist() == [int(np.diff(full.student[[split, -1]]).sum()) - 1]


def test_boundaries_are_where_whitespace_or_nothing_follows():
    chunks = align_texts(0, ["The quick\tdog,\nfox"])
    both, teacher, _ = aligner(0)
    tokens = encoded(teacher, both.teacher, ["The quick\tdog,\nfox"])
    text = b"The quick\tdog,\nfox"
    ends = np.cumsum(tokens.lengths)[chunks.teacher[:, 1] - 1]
    assert chunks.at_boundary.tolist() == [end == len(text) or text[end] in b" \t\n" for end in ends]
    assert 2 <= chunks.at_boundary.sum() < len(chunks)


@pytest.mark.parametrize("make", [wordpiece, unigram])
def test_tokenizers_that_change_the_text_are_aligned_by_their_offsets(make):
    text, student = "The quick Café, doesn't it?  It does: ½", byte_level(256)
    both = Aligner.of(make(), student)
    encoding = make()(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = np.array(encoding["input_ids"])
    teacher = both.teacher.cover(ids, np.array([len(ids)]), [text], [encoding["offset_mapping"]])
    chunks = both.align(teacher, encoded(student, both.student, [text]))
    # Bytes end wherever the teacher's tokens do. Only the parts of ½ share one chunk.
    assert len(chunks) == np.count_nonzero(teacher.lengths) >= len(ids) - 3
    assert chunks.counts.student_unaligned.tolist() == [0]


def test_no_rows_and_empty_rows_have_no_chunks():
    assert len(align_texts(0, [])) == 0
    empty = align_texts(0, ["", "Paris", ""])
    assert empty.counts.chunks.tolist() == [0, len(empty), 0]
    assert len(empty) > 0


# Chat templates

TALK = [
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": "Paris, naïve café user 🙂.\n\nThe end"},
    {"role": "user", "content": "And \n the\ndog?"},
    {"role": "assistant", "content": "def add(one):\n    return 日本"},
]


def chat(tokenizer: Any, pieces: TokenPieces, messages: list[dict[str, str]]) -> Tokens:
    return encoded(tokenizer, pieces, [tokenizer.apply_chat_template(messages, tokenize=False)])


def chunk_bytes(chunks: Chunks, tokens: Tokens, pieces: TokenPieces) -> bytes:
    """The bytes of the chunks of texts of the student."""
    return b"".join(b"".join(pieces[i] for i in tokens.ids[slice(*span)]) for span in chunks.student[~chunks.marker])


@pytest.mark.parametrize("student", CHATTERS)
@pytest.mark.parametrize("teacher", CHATTERS)
def test_contents_and_ends_of_turns_are_aligned_under_any_two_templates(teacher, student):
    left, right = CHATTERS[teacher](), CHATTERS[student]()
    both = Aligner.of(left, right)
    tokens = chat(left, both.teacher, TALK), chat(right, both.student, TALK)
    chunks = both.align(*tokens)
    said = "".join(message["content"] for message in TALK).encode().replace(b" ", b"")
    text = chunk_bytes(chunks, tokens[1], both.student).replace(b" ", b"")
    # The system prompt that ChatML adds is a text too if both have it.
    assert text.removeprefix(b"Youareahelpfulassistant.") == said
    assert chunks.counts.differing.tolist() == [0]
    # Ends of four turns and headers of the user, at least.
    assert chunks.marker.sum() >= 6


def test_headers_and_ends_are_paired_by_role():
    gemma, chatml = CHATTERS["gemma"](), CHATTERS["chatml"]()
    both = Aligner.of(gemma, chatml)
    tokens = chat(gemma, both.teacher, TALK), chat(chatml, both.student, TALK)
    chunks = both.align(*tokens)
    pairs = {
        (gemma.decode(tokens[0].ids[slice(*ours)]), chatml.decode(tokens[1].ids[slice(*theirs)]))
        for ours, theirs in zip(chunks.teacher[chunks.marker], chunks.student[chunks.marker], strict=True)
    }
    assert pairs == {
        ("<start_of_turn>user\n", "<|im_start|>user\n"),
        ("<start_of_turn>model\n", "<|im_start|>assistant\n"),
        ("<end_of_turn>\n", "<|im_end|>\n"),
    }
    # The system prompt that only one template adds, and the bos that only the other has.
    assert chatml.decode(tokens[1].ids[chunks.chunk_of_student_token < 0]) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    )
    assert gemma.decode(tokens[0].ids[chunks.chunk_of_teacher_token < 0]) == "<bos>"


def test_a_marker_is_aligned_by_those_of_its_tokens_that_are_supervised():
    gemma, chatml = CHATTERS["gemma"](), CHATTERS["chatml"]()
    both = Aligner.of(gemma, chatml)
    tokens = chat(gemma, both.teacher, TALK[:2]), chat(chatml, both.student, TALK[:2])
    end, newline = chatml.convert_tokens_to_ids("<|im_end|>"), len(tokens[1].ids) - 1
    assert tokens[1].ids[newline - 1] == end
    supervised = np.zeros(len(tokens[1].ids), bool)
    supervised[-12:-1] = True
    chunks = both.align(*tokens, None, supervised)
    assert chunks.marker.tolist().count(True) == 1
    assert chunks.student[-1].tolist() == [newline - 1, newline]
    assert np.diff(chunks.teacher[-1]).tolist() == [2]
    assert chunks.chunk_of_student_token[newline] == -1
    assert chunks.counts.student_unaligned.sum() <= 4


def test_a_cut_conversation_is_aligned_as_far_as_it_goes():
    llama, chatml = CHATTERS["llama"](), CHATTERS["chatml"]()
    both = Aligner.of(llama, chatml)
    teacher, student = chat(llama, both.teacher, TALK), chat(chatml, both.student, TALK)
    full = both.align(teacher, student)
    for count in (20, 40, 60, 70):
        cut = both.align(rows_of(both.teacher, teacher.ids[:count].tolist()), student)
        whole = [chunk for chunk in quadruples(full) if chunk[1] <= count]
        assert quadruples(cut)[: len(whole)] == whole
        assert len(cut) <= len(whole) + 1
