"""shared_vocabulary: how many leading token ids two tokenizers share, or why they share none."""

from collections.abc import Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmkd.alignment.vocab import shared_tokens, shared_vocabulary

WORDS = ["<pad>", "the", "cat", "sat", "on", "mat"]
RESERVED = [f"<reserved_{i}>" for i in range(128)]


def vocabulary(tokens: list[str], start: int = 0) -> dict[str, int]:
    return {token: index for index, token in enumerate(tokens, start)}


def both_orders(student: dict[str, int], teacher: dict[str, int], added: Collection[str] = ()) -> int:
    """The result, which is the same whoever is the student."""
    shared = shared_vocabulary(student, teacher, added)
    assert shared_vocabulary(teacher, student, added) == shared
    return shared


def refused_in_both_orders(
    student: dict[str, int], teacher: dict[str, int], unrelated: int, added: Collection[str] = ()
) -> None:
    why = rf"(?s)different vocabularies: {unrelated} tokens are missing or have another id.*method alm"
    for pair in ((student, teacher), (teacher, student)):
        with pytest.raises(ValueError, match=why):
            shared_vocabulary(*pair, added)


# Shared


def test_equal_vocabularies_share_all_tokens():
    assert both_orders(vocabulary(WORDS), vocabulary(WORDS)) == len(WORDS)


def test_order_of_the_mapping_does_not_matter():
    assert both_orders(vocabulary(WORDS), dict(reversed(vocabulary(WORDS).items()))) == len(WORDS)


@pytest.mark.parametrize("added", [["<image>"], RESERVED])
def test_added_tokens_at_the_end_of_one_side_are_left_out(added):
    assert both_orders(vocabulary(WORDS), vocabulary(WORDS + added), added) == len(WORDS)


def test_different_added_tokens_at_the_end_of_both_sides_are_left_out():
    student, teacher = vocabulary([*WORDS, "<image>"]), vocabulary([*WORDS, "<tool>", "<call>"])
    assert both_orders(student, teacher, {"<image>", "<tool>", "<call>"}) == len(WORDS)


def test_added_tokens_of_another_id_at_the_end_are_left_out():
    student, teacher = vocabulary([*WORDS, "<image>", "<tool>"]), vocabulary([*WORDS, "<tool>", "<image>"])
    assert both_orders(student, teacher, {"<image>", "<tool>"}) == len(WORDS)


def test_added_tokens_that_both_have_are_shared():
    both = vocabulary([*WORDS, "<image>"])
    assert both_orders(both, both, {"<image>"}) == len(WORDS) + 1


def test_added_tokens_after_a_gap_of_ids_are_left_out():
    assert both_orders(vocabulary(WORDS), vocabulary(WORDS) | {"<image>": 1000}, ["<image>"]) == len(WORDS)


def test_ids_that_no_token_has_are_no_difference():
    gapped = vocabulary(WORDS[:3]) | vocabulary(WORDS[3:], start=10)
    assert both_orders(gapped, gapped) == 13


@given(
    shared=st.lists(st.text(max_size=4), min_size=1, max_size=12, unique=True),
    student_extra=st.integers(0, 3),
    teacher_extra=st.integers(0, 3),
)
def test_shared_tokens_are_counted_whatever_is_added(shared, student_extra, teacher_extra):
    student_added = [f"student {i}" for i in range(student_extra)]
    teacher_added = [f"teacher {i}" for i in range(teacher_extra)]
    student, teacher = vocabulary(shared + student_added), vocabulary(shared + teacher_added)
    assert both_orders(student, teacher, student_added + teacher_added) == len(shared)


# Refused


@pytest.mark.parametrize("extra", [["dog"], [f"dog{i}" for i in range(128)]])
def test_ordinary_tokens_at_the_end_of_one_side_are_refused(extra):
    # Text splits into them, so the other side would see other tokens.
    refused_in_both_orders(vocabulary(WORDS), vocabulary(WORDS + extra), len(extra))


def test_permuted_vocabulary_is_refused():
    permuted = [WORDS[0], *reversed(WORDS[1:])]
    refused_in_both_orders(vocabulary(WORDS), vocabulary(permuted), 8)


def test_two_exchanged_tokens_are_enough_to_refuse():
    refused_in_both_orders(vocabulary(WORDS), vocabulary([*WORDS[:-2], WORDS[-1], WORDS[-2]]), 4)


def test_shifted_vocabulary_is_refused():
    refused_in_both_orders(vocabulary(WORDS), vocabulary(WORDS, start=1), 12)


def test_foreign_vocabulary_is_refused():
    refused_in_both_orders(vocabulary(WORDS), vocabulary([f"▁{word}" for word in WORDS]), 12)


def test_foreign_vocabulary_with_one_token_in_common_is_refused():
    foreign = vocabulary([WORDS[0], *(f"▁{word}" for word in WORDS[1:])])
    refused_in_both_orders(vocabulary(WORDS), foreign, 10)
    refused_in_both_orders(vocabulary(WORDS), foreign, 10, [WORDS[0]])


def test_vocabularies_of_different_added_tokens_only_are_refused():
    refused_in_both_orders({"<image>": 0}, {"<tool>": 0}, 0, ["<image>", "<tool>"])


def test_token_replaced_in_the_middle_is_refused_even_if_added():
    student, teacher = vocabulary(WORDS), vocabulary([*WORDS[:2], "<image>", *WORDS[3:]])
    refused_in_both_orders(student, teacher, 2)
    refused_in_both_orders(student, teacher, 2, ["<image>"])
    refused_in_both_orders(student, teacher, 2, ["<image>", "cat"])


def test_token_missing_in_the_middle_is_refused():
    missing = {token: index for token, index in vocabulary(WORDS).items() if token != "cat"}
    refused_in_both_orders(vocabulary(WORDS), missing, 1)


def test_empty_vocabulary_is_refused():
    refused_in_both_orders(vocabulary(WORDS), {}, len(WORDS))


def test_message_gives_sizes_and_examples():
    teacher = vocabulary([*WORDS[:3], "dog", *WORDS[4:], "hat"])
    with pytest.raises(
        ValueError, match=r"Student \(6 tokens\) and teacher \(7 tokens\).*'sat', 'dog', 'hat', \.\.\."
    ):
        shared_vocabulary(vocabulary(WORDS), teacher)


def test_shared_tokens_are_no_more_than_the_models_have_rows():
    class Tokenizer:
        def __init__(self, words: list[str], added: list[str]):
            self.words, self.added = words, added

        def get_vocab(self) -> dict[str, int]:
            return vocabulary([*self.words, *self.added])

        def get_added_vocab(self) -> dict[str, int]:
            return {token: index for token, index in self.get_vocab().items() if token in self.added}

    student, teacher = Tokenizer(WORDS, ["<own>"]), Tokenizer(WORDS, ["<image>", "<tool>"])
    assert shared_tokens(student, teacher) == len(WORDS)
    assert shared_tokens(student, teacher, 128, len(WORDS) - 1) == len(WORDS) - 1
