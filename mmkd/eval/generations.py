"""What models write on held-out prompts: how long, whether they stop, how much they repeat; kept to be read."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from mmkd.models.load import tokenizer_of

PROMPT_CHARACTERS = 200
"""How much of a plain text is given to go on from."""


@dataclass(frozen=True)
class Answer:
    """One generation."""

    text: str
    tokens: int
    """Without the end-of-sequence token."""
    ended: bool
    repeated: float
    """Share of its 4-grams of tokens that were there before."""


def prompt_of(row: Mapping[str, Any]) -> tuple[Any, str]:
    """What a row asks, as messages or as text, and what it answers itself."""
    if "messages" in row:
        messages = list(row["messages"])
        last = max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=len(messages))
        images = iter(row.get("images") or [])
        asked = [_with_images(message, images) for message in messages[:last]]
        return asked, text_of(messages[last]["content"]) if last < len(messages) else ""
    if "prompt" in row:
        prompt, completion = row["prompt"], row["completion"]
        return prompt, completion if isinstance(completion, str) else text_of(completion[-1]["content"])
    start = row["text"][:PROMPT_CHARACTERS]
    # Whole words, so that no tokenizer is asked to go on within one.
    start = start.rpartition(" ")[0] or start
    return start, row["text"][len(start) :]


def text_of(content: Any) -> str:
    """The words of a message's content."""
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part.get("text"))


@torch.no_grad()
def generate(
    model: Any, processing_class: Any, prompts: Sequence[Any], max_new_tokens: int, batch_size: int = 8
) -> list[Answer]:
    """Greedy answers. Prompts are texts, or messages that go through the chat template."""
    tokenizer: Any = tokenizer_of(processing_class)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    side, tokenizer.padding_side = tokenizer.padding_side, "left"
    ends = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id} if ends is None else {*([ends] if isinstance(ends, int) else ends)}
    found: list[Answer] = []
    for start in range(0, len(prompts), batch_size):
        inputs = _inputs(processing_class, list(prompts[start : start + batch_size])).to(model.device)
        ids = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        for row in ids[:, inputs["input_ids"].shape[1] :].tolist():
            found.append(_answer(row, ends, tokenizer))
    tokenizer.padding_side = side
    return found


def summary(answers: Sequence[Answer]) -> dict[str, float]:
    """Means over answers: tokens, characters, and the shares that ended by themselves, are empty, are repeated."""
    return {
        "answers": len(answers),
        "tokens": statistics.fmean(answer.tokens for answer in answers),
        "characters": statistics.fmean(len(answer.text) for answer in answers),
        "ended": statistics.fmean(answer.ended for answer in answers),
        "empty": statistics.fmean(not answer.text.strip() for answer in answers),
        "repeated": statistics.fmean(answer.repeated for answer in answers),
    }


def _inputs(processing_class: Any, prompts: list[Any]) -> Any:
    if isinstance(prompts[0], str):
        return tokenizer_of(processing_class)(prompts, padding=True, return_tensors="pt")
    options: dict[str, Any] = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    if hasattr(processing_class, "tokenizer"):
        options["processor_kwargs"] = {"padding": True}
    else:
        options["padding"] = True
    return processing_class.apply_chat_template(prompts, add_generation_prompt=True, **options)


def _answer(ids: list[int], ends: set[int], tokenizer: Any) -> Answer:
    stop = next((place for place, token in enumerate(ids) if token in ends), None)
    own = ids if stop is None else ids[:stop]
    grams = [tuple(own[place : place + 4]) for place in range(len(own) - 3)]
    repeated = 1 - len(set(grams)) / len(grams) if grams else 0.0
    return Answer(tokenizer.decode(own, skip_special_tokens=True), len(own), stop is not None, repeated)


def _with_images(message: Mapping[str, Any], images: Any) -> dict[str, Any]:
    if isinstance(message["content"], str):
        return dict(message)
    content = [
        {"type": "image", "image": _opened(next(images))} if part["type"] == "image" else dict(part)
        for part in message["content"]
    ]
    return {"role": message["role"], "content": content}


def _opened(image: Any) -> Image.Image:
    return (Image.open(image) if isinstance(image, str) else image).convert("RGB")
