"""The common layouts of data sets, recognised by columns and first rows, and converted to TRL's columns."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
from datasets import Dataset, IterableDataset

from mmkd.errors import UserError

from .arrow import read_rows
from .canonical import CHATS, OURS, Layout
from .conversion import Conversion
from .left_out import LeftOut
from .messages import Message
from .recordings import check_no_recordings
from .streams import converted_stream
from .unknown_layout import unknown_layout

logger = logging.getLogger(__name__)

CARRIED = ("tools",)
"""Columns that belong to the messages of a row and are passed to the chat template with them."""

_READ: WeakSet[Dataset] = WeakSet()
"""Data sets that a recipe has already converted; it may keep empty rows on purpose (drop_empty: false)."""

_TALKS = ("conversations", "conversation", "dialogue", "dialog", "chat", "turns")
_ANSWERS = ("output", "response", "answer", "completion", "target", "solution", "assistant")
_QUESTIONS = ("question", "query", "prompt", "input", "instruction", "problem", "user")
# Columns about the origin or quality of a row. Any other column beside a question may be a part of the question.
_ABOUT = ("id", "idx", "index", "uuid", "row_id", "source", "dataset", "category", "domain", "topic", "type", "task")
_ABOUT += (
    "language",
    "lang",
    "split",
    "license",
    "url",
    "model",
    "score",
    "difficulty",
    "level",
    "hash",
    "timestamp",
    "truncated",
)
# Columns that TRL, transformers or mmkd would read although they belong to another layout than the recognised one.
_MISLEADING = ("text", *CHATS, *_TALKS, "chosen", "rejected", "image", "labels", "completion_mask", "assistant_masks")
_LOOKED_AT = 100


def recognised(sample: Mapping[str, Any], subject: str, text_field: str = "text") -> Layout:
    """The layout of rows like `sample`, which has a value of some row for each column.

    Raises UserError with the names of the columns if no layout fits. `subject` begins the message: whose rows they
    are.
    """
    layout = layout_of(sample, text_field)
    if layout is not None:
        return layout
    raise UserError(unknown_layout(sample, subject))


def layout_of(sample: Mapping[str, Any], text_field: str = "text") -> Layout | None:
    """The layout of rows like `sample`, or None for one that is not known."""
    readers = (_messages, _talk, _batch, _openai_preference, _preference, _pair_of_ours, _caption)
    readers = (*readers, partial(_text, text_field=text_field), _alpaca, _question, _prompt)
    return next((layout for reader in readers if (layout := reader(sample)) is not None), None)


def _carried(sample: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(name for name in CARRIED if sample.get(name) is not None)


def _messages(sample: Mapping[str, Any]) -> Layout | None:
    value = sample.get("messages")
    if "messages" not in sample or (isinstance(value, str) and not value.lstrip().startswith("[")):
        return None
    reads = ("messages", *_carried(sample))
    return Layout("messages", reads, partial(_picked, names=reads), as_is=True)


def _talk(sample: Mapping[str, Any]) -> Layout | None:
    name = next((column for column in _TALKS if _is_chat(sample.get(column))), None)
    if name is None and all(value is None for value in sample.values()):
        name = next((column for column in _TALKS if column in sample), None)
    if name is None:
        return None
    extra = tuple(column for column in ("system", "system_prompt") if isinstance(sample.get(column), str))[:1]
    carried = _carried(sample)
    images = "image" in sample or "images" in sample
    shared = "from" in dict(sample[name][0]) if sample[name] is not None else True
    title = ("LLaVA" if images else "ShareGPT") if shared else name
    return Layout(title, (name, *extra, *carried), partial(_read_talk, name=name, system=extra, carried=carried))


def _read_talk(row: Mapping[str, Any], name: str, system: tuple[str, ...], carried: tuple[str, ...]) -> dict[str, Any]:
    messages = row[name]
    system_prompt = next((row[column] for column in system if row[column]), None)
    if system_prompt and messages is not None:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    return {"messages": messages, **_picked(row, carried)}


def _batch(sample: Mapping[str, Any]) -> Layout | None:
    body = sample.get("body")
    if not isinstance(body, Mapping) or "messages" not in body:
        return None
    answered = sample.get("response") is not None
    reads = ("body", *(("response",) if answered else ()))
    return Layout("OpenAI batch", reads, partial(_read_batch, answered=answered))


def _read_batch(row: Mapping[str, Any], answered: bool) -> dict[str, Any]:
    body, response = row["body"] or {}, row.get("response") or {}
    messages = body.get("messages")
    if not answered:
        return {"messages": messages, "tools": body.get("tools")}
    choices = (response.get("body") or response).get("choices") or []
    answer = [choices[0].get("message")] if choices else None
    return {"prompt": messages, "completion": answer, "tools": body.get("tools")}


def _openai_preference(sample: Mapping[str, Any]) -> Layout | None:
    request = sample.get("input")
    if not isinstance(request, Mapping) or "messages" not in request or "preferred_output" not in sample:
        return None
    unread = ("non_preferred_output",) if "non_preferred_output" in sample else ()
    return Layout("OpenAI preference", ("input", "preferred_output"), _read_openai_preference, unread)


def _read_openai_preference(row: Mapping[str, Any]) -> dict[str, Any]:
    request = row["input"] or {}
    return {"prompt": request.get("messages"), "completion": row["preferred_output"], "tools": request.get("tools")}


def _preference(sample: Mapping[str, Any]) -> Layout | None:
    if "chosen" not in sample or ("prompt" not in sample and not _is_chat(sample["chosen"])):
        return None
    carried = _carried(sample)
    reads = ("prompt",) if "prompt" in sample else ()
    unread = ("rejected",) if "rejected" in sample else ()
    return Layout(
        "prompt and chosen", (*reads, "chosen", *carried), partial(_read_preference, carried=carried), unread
    )


def _read_preference(row: Mapping[str, Any], carried: tuple[str, ...]) -> dict[str, Any]:
    prompt, chosen = row.get("prompt"), row["chosen"]
    carried_values = _picked(row, carried)
    # Many data sets have the whole conversation in `chosen`, including the prompt.
    if _is_chat(chosen) and any(_role_of(message) != "assistant" for message in chosen):
        return {"messages": chosen, **carried_values}
    return {"prompt": prompt, "completion": chosen, **carried_values}


def _pair_of_ours(sample: Mapping[str, Any]) -> Layout | None:
    if not {"prompt", "completion"} <= sample.keys():
        return None
    reads = ("prompt", "completion", *_carried(sample))
    return Layout("prompt and completion", reads, partial(_picked, names=reads), as_is=True)


def _text(sample: Mapping[str, Any], text_field: str) -> Layout | None:
    if not isinstance(sample.get(text_field), str | None) or text_field not in sample:
        return None
    if text_field == "text":
        return Layout("text", ("text",), partial(_picked, names=("text",)), as_is=True)
    return Layout(text_field, (text_field,), partial(_renamed, names={"text": text_field}))


def _alpaca(sample: Mapping[str, Any]) -> Layout | None:
    answers = [name for name in ("output", "response", "completion") if name in sample]
    if "instruction" not in sample or len(answers) != 1:
        return None
    optional = tuple(name for name in ("input", "context", "system", "history") if name in sample)
    reads = ("instruction", answers[0], *optional, *_carried(sample))
    return Layout("Alpaca", reads, partial(_read_alpaca, answer=answers[0]))


def _read_alpaca(row: Mapping[str, Any], answer: str) -> dict[str, Any]:
    messages: list[Message] = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    for turn in row["history"] if row.get("history") is not None else []:
        question, answered = turn
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answered}]
    questions = [row[name] for name in ("instruction", "input", "context") if row.get(name)]
    messages.append({"role": "user", "content": "\n".join(questions)})
    # Prompt and completion stay separate, as in the file, so that only the answer is learnt with any chat template.
    return {"prompt": messages, "completion": row[answer], **_picked(row, CARRIED)}


def _question(sample: Mapping[str, Any]) -> Layout | None:
    questions = [name for name in _QUESTIONS if isinstance(sample.get(name), str)]
    answers = [name for name in _ANSWERS if isinstance(sample.get(name), str)]
    others = sample.keys() - {*questions, *answers, *_ABOUT, *CARRIED, "image", "images", "system"}
    if len(questions) != 1 or len(answers) != 1 or others:
        return None
    system = ("system",) if "system" in sample else ()
    reads = (questions[0], answers[0], *system, *_carried(sample))
    name = f"{questions[0]} and {answers[0]}"
    return Layout(name, reads, partial(_read_question, question=questions[0], answer=answers[0]))


def _read_question(row: Mapping[str, Any], question: str, answer: str) -> dict[str, Any]:
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    prompt = [*system, {"role": "user", "content": row[question]}]
    return {"prompt": prompt, "completion": row[answer], **_picked(row, CARRIED)}


def _prompt(sample: Mapping[str, Any]) -> Layout | None:
    """Prompts without answers, for a student or a teacher that answers them itself."""
    if any(name in sample for name in _ANSWERS):
        return None
    if "prompt" in sample:
        reads = ("prompt", *_carried(sample))
        return Layout("prompts", reads, partial(_picked, names=reads), as_is=True)
    questions = [name for name in _QUESTIONS if isinstance(sample.get(name), str)]
    others = sample.keys() - {*questions, *_ABOUT, *CARRIED, "image", "images"}
    if len(questions) != 1 or others:
        return None
    return Layout("prompts", (questions[0], *_carried(sample)), partial(_read_prompt, question=questions[0]))


def _read_prompt(row: Mapping[str, Any], question: str) -> dict[str, Any]:
    asked = None if row[question] is None else [{"role": "user", "content": row[question]}]
    return {"prompt": asked, **_picked(row, CARRIED)}


def _caption(sample: Mapping[str, Any]) -> Layout | None:
    """What one picture shows, as the answer to the picture alone: LLaVA's pre-training."""
    name = next((name for name in ("caption", "text") if isinstance(sample.get(name), str)), None)
    if name is None or "image" not in sample or sample.keys() - {name, "image", *_ABOUT}:
        return None
    # A text with a mark such as <image> says itself where its picture is.
    if name == "text" and any(bracket in sample[name] for bracket in "<["):
        return None
    return Layout("captions", (name,), partial(_read_caption, name=name))


def _read_caption(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "completion": row[name]}


def _picked(row: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    return {name: row[name] for name in names if name in row}


def _renamed(row: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: row[theirs] for ours, theirs in names.items()}


def _is_chat(value: Any) -> bool:
    if not isinstance(value, list | tuple | np.ndarray) or not len(value):
        return False
    return isinstance(value[0], Mapping) and any(key in value[0] for key in ("role", "from", "speaker"))


def _role_of(message: Mapping[str, Any]) -> Any:
    return message.get("role") or message.get("from")


# Data sets of any layout


def canonical(
    data: Any,
    split: str = "train",
    *,
    skip: bool = False,
    text_field: str = "text",
    folders: Sequence[Path] = (),
    keep: Sequence[str] = (),
) -> Any:
    """A data set's rows in TRL's columns: `text`, `messages`, or `prompt` and `completion`, with `images` and `tools`.

    Args:
        data: a Dataset or IterableDataset, or a dict of them by name. Rows that are tokens already stay as they are.
        split: the name of the rows in log messages and errors.
        skip: whether unreadable rows are left out and counted, as rows without text always are.
        text_field: the column of plain text.
        folders: where relative paths of images within messages start; by default the current folder.
        keep: columns that stay even if the layout reads them.

    Columns outside the layout are kept. Raises UserError for an unknown layout, for the first unreadable row (unless
    `skip`), and if no row is left.
    """
    if isinstance(data, dict):
        return {
            name: canonical(part, str(name), skip=skip, text_field=text_field, folders=folders, keep=keep)
            for name, part in data.items()
        }
    if not isinstance(data, Dataset | IterableDataset) or data in _READ:
        return data
    sample = sample_of(data)
    if not sample or "input_ids" in sample:
        return data
    check_no_recordings(data if isinstance(data, Dataset) else sample, f"The {split} data")
    layout = recognised(sample, f"The {split} data", text_field)
    conversion = Conversion(split, LeftOut(split), skip, tuple(folders))
    kept = _kept(sample, layout, split)
    kept += [name for name in keep if name in sample and name not in kept]
    if isinstance(data, IterableDataset):
        log_layout(layout, split, None)
        return converted_stream(data, layout, kept, conversion, list(sample))
    rows = conversion.converted(data, layout, kept)
    assert conversion.left_out is not None
    log_layout(layout, split, len(data))
    if not len(rows):
        raise UserError(f"{conversion.left_out.describe(len(data))} None is left to train on.")
    conversion.left_out.warn(len(data))
    return rows


def read_by_recipe(rows: Dataset) -> None:
    """Marks rows as converted by a recipe, so that `canonical` leaves them unchanged."""
    _READ.add(rows)


def sample_of(data: Dataset | IterableDataset) -> dict[str, Any]:
    """Each column with its first value that is not null among the first rows, or None. Empty for no rows."""
    if isinstance(data, Dataset):
        if data.format["type"] == "custom":
            # The rows are the output of a transform that the user has set.
            return dict(next(iter(data), {}))
        names = [name for name in data.column_names if name not in ("image", "images")]
        rows: Iterable[Mapping[str, Any]] = read_rows(data.select(range(min(len(data), _LOOKED_AT))), names)
        sample: dict[str, Any] = dict.fromkeys(data.column_names) if len(data) else {}
    else:
        rows, sample = islice(iter(data), 1), {}
    for row in rows:
        for name, value in row.items():
            if sample.get(name) is None or (isinstance(value, list) and not sample[name]):
                sample[name] = value
    return sample


def _kept(sample: Mapping[str, Any], layout: Layout, split: str) -> list[str]:
    """The columns to keep besides those of the layout."""
    columns = [name for name in sample if name not in layout.reads]
    dropped = [name for name in columns if name in (*_MISLEADING, *layout.unread)]
    if "images" not in columns and "image" in dropped:
        dropped.remove("image")
    if dropped:
        logger.warning("%s: rows are read as %s, without %s.", split, layout.name, ", ".join(dropped))
    return [name for name in columns if name not in (*dropped, "image", "images", *OURS)]


def log_layout(layout: Layout, split: str, rows: int | None) -> None:
    """Logs the recognised layout, unless the columns already have TRL's names."""
    if not layout.as_is:
        count = "rows" if rows is None else "1 row" if rows == 1 else f"{rows:,} rows"
        columns = ", ".join(layout.reads)
        logger.warning("%s: %s read as %s (%s).", split, count, layout.name, columns)
