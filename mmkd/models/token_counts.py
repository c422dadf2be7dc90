"""How often texts use each token of a tokenizer, and which tokens a chat template needs."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase

from mmkd.data.data_recipe import DataRecipe
from mmkd.data.load_data import load_rows
from mmkd.errors import UserError

_AT_ONCE = 256
HELD_OUT = 20
"""One in so many texts is held out of the counting where a source has no rows for evaluation."""

_TURNS = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Thanks"},
]
_ROLES = ("system", "user", "assistant", "tool")


def texts_of(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
    """The texts of a file or a data recipe: those to count, and those that are held out.

    A .txt file has paragraphs, divided by empty lines. Conversations are texts as the chat template writes them. Held
    out is what the recipe holds out for evaluation, or else every 20th text. Raises UserError where there is no text.
    """
    if name.endswith(".txt"):
        texts, held_out = _paragraphs(Path(name)), list[str]()
    else:
        rows: Any = load_rows(DataRecipe.load(name))
        split = {part: [text for row in rows[part] for text in _texts(row, tokenizer)] for part in rows}
        texts, held_out = split["train"], split.get("eval", [])
    if not texts:
        raise UserError(f"{name} has no text. Name a file or a data recipe with texts, prompts or conversations.")
    if not held_out and len(texts) >= HELD_OUT:
        held_out = texts[HELD_OUT - 1 :: HELD_OUT]
        texts = [text for number, text in enumerate(texts) if number % HELD_OUT != HELD_OUT - 1]
    return texts, held_out


def _paragraphs(path: Path) -> list[str]:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}. Name a file or a data recipe.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no UTF-8 text (byte {error.start:,}). Convert it to UTF-8.") from error
    return [paragraph for paragraph in content.split("\n\n") if paragraph.strip()]


def _texts(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts of a row in TRL's columns."""
    conversations = [value for value in row.values() if _is_conversation(value)]
    plain = [value for value in row.values() if isinstance(value, str) and value.strip()]
    if not conversations:
        return plain
    # A prompt and its answer are one conversation; two answers to a prompt are two.
    prompt: list[Any] = row["prompt"] if _is_conversation(row.get("prompt")) else []
    answers = [value for key, value in row.items() if key != "prompt" and _is_conversation(value)]
    whole = [[*prompt, *answer] for answer in answers] if answers else [prompt]
    return [*plain, *(text for messages in whole for text in _written(messages, tokenizer))]


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping) and "role" in value[0]


def _written(messages: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase) -> list[str]:
    if tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
        return [str(text)]
    contents = [message.get("content") for message in messages]
    parts = [part for content in contents for part in (content if isinstance(content, list) else [content])]
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    return [text for text in texts if isinstance(text, str) and text.strip()]


def count_tokens(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, advance: Callable[[int], None] = lambda _: None
) -> Counter[int]:
    """How often each token stands in the texts, special tokens around them left out; `advance` is told of texts."""
    counts = Counter[int]()
    for start in range(0, len(texts), _AT_ONCE):
        part = texts[start : start + _AT_ONCE]
        for ids in tokenizer(list(part), add_special_tokens=False)["input_ids"]:
            counts.update(ids)
        advance(len(part))
    return counts


def frequencies(counts: Sequence[Counter[int]]) -> dict[int, float]:
    """Of each token, its largest share of the tokens of one of the sources."""
    shares: dict[int, float] = {}
    for own in counts:
        total = max(1, own.total())
        for token, count in own.items():
            shares[token] = max(shares.get(token, 0.0), count / total)
    return shares


def template_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens of all texts that a chat template has in it, and of short conversations as it writes them."""
    template = tokenizer.chat_template
    if template is None:
        return set()
    sources = list(template.values()) if isinstance(template, Mapping) else [template]
    texts: list[str] = list(_ROLES)
    for source in sources:
        for _, kind, value in jinja2.Environment().lex(source):
            if kind in ("data", "string"):
                texts.append(value if kind == "data" else _unquoted(value))
    for turns in (_TURNS, _TURNS[:1], [{"role": "system", "content": "Hello"}, *_TURNS]):
        # A template may refuse some roles, or know no prompt for an answer.
        with suppress(jinja2.TemplateError, KeyError, TypeError, ValueError):
            texts.append(str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)))
    return set(count_tokens([text for text in texts if text], tokenizer))


def _unquoted(value: str) -> str:
    return value[1:-1].encode("ascii", "backslashreplace").decode("unicode_escape")
