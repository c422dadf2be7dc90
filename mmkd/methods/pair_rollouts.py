"""What the student said, as a teacher with another tokenizer and another chat template reads it."""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from datasets import Dataset

from mmkd.alignment.common_runs import shared_length
from mmkd.data.teacher_view import TeacherView
from mmkd.errors import UserError
from mmkd.models.load import tokenizer_of
from mmkd.preparation.pairs import QUESTION
from mmkd.training.answer_text import answered, turn, without_answer

logger = logging.getLogger(__name__)

_ASKED = ("prompt", "messages", "tools", "chat_template_kwargs")


def questions_of(dataset: Dataset, prompt_tokens: int | None, views: Sequence[TeacherView] = ()) -> list[str]:
    """The prompt of each row as JSON, with what its chat template takes; nothing for rows of plain text.

    With what teachers' `views` make prompts of, too. Raises UserError where `rollout_prompt_tokens` would cut a
    conversation.
    """
    names = asked_columns(dataset.column_names, prompt_tokens, views)
    rows: Any = dataset.select_columns(names) if names else [{}] * len(dataset)
    return [question_of(row, names) for row in rows]


def question_of(row: Mapping[str, Any], names: Sequence[str]) -> str:
    """The prompt of a row, which is in these of its columns, as JSON."""
    return json.dumps({name: row[name] for name in names})


def asked_columns(columns: Sequence[str], prompt_tokens: int | None, views: Sequence[TeacherView] = ()) -> list[str]:
    """Those of the columns that hold prompts, what chat templates take, and what `views` read.

    Raises UserError as `questions_of` does.
    """
    names = [name for name in _ASKED if name in columns]
    if prompt_tokens is not None and names:
        raise UserError(
            f"rollout_prompt_tokens cuts rows of plain text, but these have {', '.join(names)}: the teacher's chat "
            "template cannot render a part of a conversation. Remove it; with messages set assistant_only_loss: true.",
            because="meaning",
        )
    # A view may show the data's own answer.
    theirs = ("completion", *(name for view in views for name in view.columns)) if views else ()
    return [*names, *dict.fromkeys(name for name in theirs if name in columns)]


def as_teacher_reads(example: Mapping[str, Any], text: str, whole: str, ended: bool, teacher: Any) -> dict[str, Any]:
    """A row of paired data with this text as the answer, in the tokens that a `TeacherReader` makes of rows.

    They stand in its columns, behind what its view makes of the prompt.

    Rows with images are made tokens by the reader's collator, so that they get the text alone.
    """
    if QUESTION not in example:
        return answered(example, text)
    reader, view, prefix = teacher.rows.labelling, teacher.view, teacher.prefix
    question = json.loads(example[QUESTION])
    question = question if view is None else view.rewrite(question)
    tokenizer: Any = tokenizer_of(reader.processing_class)
    conversation = question.get("messages", question.get("prompt"))
    end = tokenizer.eos_token if ended else ""
    if conversation is None:
        ids, start = tokenizer(whole + end)["input_ids"], 0
    elif isinstance(conversation, str):
        before, ids = tokenizer(conversation)["input_ids"], tokenizer(conversation + text + end)["input_ids"]
        start = shared_length(before, ids)
    else:
        asked = without_answer(conversation)
        template = {
            "chat_template": reader.chat_template or reader.processing_class.chat_template,
            "tools": json.loads(tools) if isinstance(tools := question.get("tools"), str) else tools,
            "tokenize": True,
            "return_dict": True,
            **(question.get("chat_template_kwargs") or {}),
        }
        before = tokenizer.apply_chat_template(asked, add_generation_prompt=True, **template)["input_ids"]
        ids = tokenizer.apply_chat_template([*asked, turn(text, asked)], **template)["input_ids"]
        start = shared_length(before, ids)
    longest = reader.args.max_length
    if longest is not None and len(ids) > longest:
        _say_cut(longest)
        ids = ids[:longest]
    labels = [-100] * min(start, len(ids)) + ids[start:]
    return {**example, f"{prefix}input_ids": ids, f"{prefix}labels": labels}


@cache
def _say_cut(longest: int) -> None:
    """Logs a warning, once per process, that teachers do not read all answers to their ends."""
    logger.warning(
        "Some of the student's own answers are longer in the teacher's tokens, behind its prompt, than the %s that it "
        "reads. What is beyond is not taught. Raise teacher_max_length, or max_length where that is not set, or lower "
        "rollout_max_tokens.",
        longest,
    )
