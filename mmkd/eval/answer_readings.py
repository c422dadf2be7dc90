"""Answers to prompts as models read them: each in its own tokens, behind its own chat template."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor

from mmkd.data.prompts import RowPrompt, model_inputs, prompt_of
from mmkd.data.teacher_view import TeacherView
from mmkd.generation.generator import RowError, Sampling
from mmkd.generation.row_answers import PromptWithTools, row_generator
from mmkd.models.load import positions_of, tokenizer_of


@dataclass(frozen=True)
class AnsweredPrompt:
    """A prompt and an answer to it."""

    prompt: RowPrompt
    tools: Any
    answer: str
    ids: tuple[int, ...] | None = None
    """The tokens of whoever wrote it, where that was a model."""

    @property
    def size(self) -> int:
        """Bytes of the answer."""
        return len(self.answer.encode())


@dataclass(frozen=True)
class AnswerReader:
    """A model and what makes its tokens."""

    model: Any
    processing_class: Any

    @cached_property
    def tokenizer(self) -> Any:
        return tokenizer_of(self.processing_class)

    @property
    def writes(self) -> bool:
        """Whether it answers prompts itself."""
        return True

    def ids_of(self, text: str) -> list[int]:
        """The tokens of an answer."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def first_tokens(self, text: str, most: int) -> str:
        """The text up to where its first tokens end, between characters."""
        ends = self.ends_of(text)
        return text if len(ends) <= most else text[: ends[most - 1]]

    def ends_of(self, text: str) -> list[int]:
        """After which character of a text each token ends."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [end for _, end in offsets]

    def has_room(self, prompt_tokens: int, answer_tokens: int) -> bool:
        """Whether a prompt and its answer fit into the model's context."""
        positions = positions_of(self.model.config)
        return positions is None or prompt_tokens + answer_tokens <= positions

    @torch.no_grad()
    def log_probs(self, text: AnsweredPrompt, ids: Sequence[int]) -> Float[Tensor, "token vocab"] | None:
        """What the model says of each of these tokens as the answer; None where they do not fit its context."""
        tools = None if text.tools is None else [text.tools]
        asked = model_inputs(self.processing_class, [text.prompt], tools)
        device, count = self.model.device, len(ids)
        start = asked["input_ids"].shape[1]
        if not self.has_room(start, count):
            return None
        inputs = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in dict(asked).items()
        }
        for name, value in inputs.items():
            if isinstance(value, Tensor) and value.shape == asked["input_ids"].shape:
                # Of the prompt's tokens one by one, such as which are of an image: the answer's are of none.
                more = torch.zeros(1, count, dtype=value.dtype, device=device)
                inputs[name] = torch.cat([value, more], dim=1)
        inputs["input_ids"][0, start:] = torch.tensor(list(ids), device=device)
        if "attention_mask" in inputs:
            inputs["attention_mask"][0, start:] = 1
        logits = self.model(**inputs, use_cache=False).logits[0, start - 1 : -1]
        return logits.float().log_softmax(-1)

    def answers(
        self, prompts: Sequence[PromptWithTools], max_new_tokens: int, temperature: float, seed: int = 0
    ) -> Iterator[AnsweredPrompt]:
        """The model's own answers, without the token that ends them."""
        # What is sampled are the model's own probabilities, without a repetition penalty.
        generator = row_generator(self.model, self.processing_class, own_settings=False)
        sampling = Sampling(max_new_tokens, temperature, seed=seed)
        for (prompt, tools), answers in zip(prompts, generator.generate(prompts, sampling), strict=True):
            assert not isinstance(answers, RowError), "a model in this process refuses nothing"
            (answer,) = answers
            ids = answer.ids[:-1] if answer.finish_reason == "stop" else answer.ids
            text = str(self.tokenizer.decode(ids, skip_special_tokens=True))
            yield AnsweredPrompt(prompt, tools, text, tuple(ids))


def answered_rows(rows: Dataset, view: TeacherView | None = None) -> list[AnsweredPrompt]:
    """The prompts of rows, or what a view makes of them, with the rows' own answers, which may be empty."""
    tools = list(rows["tools"]) if "tools" in rows.column_names else [None] * len(rows)
    read = [dict(row) for row in rows]  # pyright: ignore[reportArgumentType, reportCallIssue]
    pairs = [prompt_of(row if view is None else view.rewrite(row)) for row in read]
    return [AnsweredPrompt(prompt, own, answer) for (prompt, answer), own in zip(pairs, tools, strict=True)]
