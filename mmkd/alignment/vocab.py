"""The number of tokens that two tokenizers share, if they have the same vocabulary."""

from collections.abc import Collection, Mapping
from typing import Any

from mmkd.errors import UserError


def shared_tokens(student: Any, teacher: Any, *rows: int) -> int:
    """The number of leading token ids that two tokenizers share, and no more than the `rows` that their models have.

    Models pad their vocabularies to a round number: rows beyond the tokens mean nothing. Raises UserError as
    `shared_vocabulary` does.
    """
    added = {*student.get_added_vocab(), *teacher.get_added_vocab()}
    return min([shared_vocabulary(student.get_vocab(), teacher.get_vocab(), added), *rows])


def shared_vocabulary(student: Mapping[str, int], teacher: Mapping[str, int], added: Collection[str] = ()) -> int:
    """The number of leading token ids that mean the same to student and teacher.

    A vocabulary may end with `added` tokens that the other one lacks (a padding token, for example). No text is split
    into them, and they are left out of every comparison. Raises UserError if other tokens differ.
    """
    common = {token for token, index in student.items() if teacher.get(token) == index}
    end = max((student[token] for token in common), default=-1) + 1
    different = [token for token in (*student, *teacher) if token not in common]
    unrelated = [
        token for token in different if token not in added or min(_ids(token, student, teacher), default=end) < end
    ]
    if unrelated or not common:
        examples = ", ".join(repr(token) for token in unrelated[:3])
        raise UserError(
            f"Student ({len(student)} tokens) and teacher ({len(teacher)} tokens) have different vocabularies: "
            f"{len(unrelated)} tokens are missing or have another id on one side ({examples}, ...). A divergence per "
            "token would compare unrelated tokens. Use a teacher of the same family, or method alm, which distils "
            "across tokenizers.",
            because="meaning",
        )
    return end


def _ids(token: str, *vocabularies: Mapping[str, int]) -> list[int]:
    return [vocabulary[token] for vocabulary in vocabularies if token in vocabulary]
