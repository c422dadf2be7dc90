"""A judge: another model, behind a chat server, that rates each answer from 1 to 10."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from datasets import Value

from mmkd.data.prompts import words_of
from mmkd.generation.thoughts import thought_of
from mmkd.teachers.chat_api import Chat, ChatClient, ChatReply
from mmkd.teachers.vllm_rows import RowError

from .answer_verdicts import StoredAnswer, Verdicts, gold_of

QUESTION = """\
An assistant was given an instruction. Rate how well it followed it: is the answer right, to the point, precise, and \
as detailed as the instruction asks for?

Instruction:
{instruction}
{reference}
Answer of the assistant:
{answer}

Rate the answer with a whole number from 1 (useless) to 10 (perfect). Write the number on the first line. Then \
explain your rating in one sentence."""
REFERENCE = """
The right answer, which the assistant did not see:
{gold}
"""
AGAIN = """\
Your reply did not begin with a number. Reply with nothing but one whole number from 1 to 10: the rating of the \
answer."""
TRIES = 3
"""How often a judge is asked for a rating that can be read."""
REPLY_TOKENS = 1024
"""Of a judge; one that thinks needs them before its rating."""

_RATING = re.compile(r"\s*(?:rating|score)?\s*:?\s*\**\s*(10|[1-9])(?![\d.]*\d)(?:\s*/\s*10)?", re.IGNORECASE)


class Ratings(Verdicts):
    """The rating of each answer and what the judge said; no rating where none could be read after three tries.

    Pictures are not shown to the judge. An answer that was cut off or is empty is not shown to it either.
    """

    name = "judge"
    own: ClassVar = {"rating": Value("int32"), "said": Value("string")}

    def __init__(self, client: ChatClient, gold_column: str | None):
        self.client, self.gold_column = client, gold_column
        self.reads = () if gold_column is None else (gold_column,)

    def facts(self) -> dict[str, Any]:
        question = hashlib.sha256("".join((QUESTION, REFERENCE, AGAIN)).encode()).hexdigest()[:16]
        return {"judge": self.client.model, "question": question, "gold_column": self.gold_column}

    def close(self) -> None:
        self.client.close()

    def of(self, answers: Sequence[StoredAnswer], rows: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
        verdicts: list[dict[str, Any]] = [{"rating": None, "said": None} for _ in answers]
        chats: dict[int, list[dict[str, Any]]] = {
            place: [{"role": "user", "content": self._question(answer, rows)}]
            for place, answer in enumerate(answers)
            if answer.finish_reason == "stop" and answer.final_part
        }
        for attempt in range(TRIES):
            asked = list(chats)
            sampling = {"max_tokens": REPLY_TOKENS, "temperature": 0}
            replies = self.client.replies([Chat(chats[place], seed=attempt) for place in asked], sampling)
            for place, reply in zip(asked, replies, strict=True):
                verdicts[place] = _verdict(reply)
                if verdicts[place]["rating"] is not None or isinstance(reply, RowError):
                    del chats[place]
                else:
                    said = {"role": "assistant", "content": reply.text}
                    chats[place] = [chats[place][0], said, {"role": "user", "content": AGAIN}]
        return verdicts

    def _question(self, answer: StoredAnswer, rows: Mapping[int, Mapping[str, Any]]) -> str:
        gold = None if self.gold_column is None else gold_of(rows[answer.row], self.gold_column)
        reference = "" if gold is None else REFERENCE.format(gold=gold)
        return QUESTION.format(instruction=words_of(answer.prompt), reference=reference, answer=answer.final_part)


def _verdict(reply: ChatReply | RowError) -> dict[str, Any]:
    if isinstance(reply, RowError):
        return {"rating": None, "said": f"refused: {reply.reason}"}
    return {"rating": rating_in(thought_of(reply.text).answer), "said": reply.text.strip()}


def rating_in(text: str) -> int | None:
    """The rating with which a judge's reply begins; None where it begins with something else."""
    match = _RATING.match(text)
    return None if match is None else int(match[1])
