"""MaKD (2501.13341): a vision-language model's yes or no to questions about images, as probabilities on disk."""

import math
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.errors import UserError

from .chat_api import Chat, ChatClient
from .class_logits import has_rows, read_rows, write_rows
from .vllm_rows import RowError

SHARD_ROWS = 64
"""Images of one file: what a killed build loses at most."""

_ASKED = "{} Answer with yes or no only."
LISTED = 20
"""First tokens that a server lists."""


class AspectTeacher(ABC):
    """Says how probable a yes is, for images and questions."""

    identity: dict[str, Any]
    """What decides its answers besides images and questions, as plain values."""

    @abstractmethod
    def answers(self, images: Sequence[Any], questions: Sequence[str]) -> Float[Tensor, "image question"]:
        """softmax over yes and no of the first token of the answer, its first entry; NaN for neither."""


class LocalAspects(AspectTeacher):
    """A vision-language model in this process."""

    def __init__(self, model: Any, processor: Any, weights: str | None, batch_size: int = 16):
        self.model, self.processor, self.batch_size = model.eval().requires_grad_(False), processor, batch_size
        self.identity = {"name": model.name_or_path, "weights": weights}
        tokenizer = getattr(processor, "tokenizer", processor)
        tokenizer.padding_side = "left"
        self.tokens = [tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in ("Yes", "No")]
        if self.tokens[0] == self.tokens[1]:
            raise UserError(
                f"To the tokenizer of {model.name_or_path}, Yes and No begin with the same token, so its first token "
                "answers nothing. Take another aspects_model.",
                because="meaning",
            )

    @torch.no_grad()
    def answers(self, images: Sequence[Any], questions: Sequence[str]) -> Float[Tensor, "image question"]:
        """Those of the logits of Yes and No as the first token."""
        pairs = [(image, self._prompt(question)) for image in images for question in questions]
        said = []
        for first in range(0, len(pairs), self.batch_size):
            some = pairs[first : first + self.batch_size]
            inputs = self.processor(
                text=[prompt for _, prompt in some],
                images=[[image] for image, _ in some],
                padding=True,
                return_tensors="pt",
            )
            logits = self.model(**inputs.to(self.model.device)).logits[:, -1, self.tokens]
            said.append(logits.float().softmax(-1)[:, 0].cpu())
        return torch.cat(said).view(len(images), len(questions))

    def _prompt(self, question: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": _ASKED.format(question)}]
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )


class ServedAspects(AspectTeacher):
    """A vision-language model behind a chat server that tells log-probs (vLLM, SGLang)."""

    def __init__(self, client: ChatClient):
        self.client = client
        self.identity = {"name": client.model, "served": True}

    def answers(self, images: Sequence[Any], questions: Sequence[str]) -> Float[Tensor, "image question"]:
        """Those of the probabilities of yes and no, however written, among the first tokens that the server lists.

        Raises UserError for a server without log-probs, and for a question that it refuses.
        """
        content = [[{"type": "image"}, {"type": "text", "text": _ASKED.format(question)}] for question in questions]
        chats = [Chat([{"role": "user", "content": parts}], [image]) for image in images for parts in content]
        sampling = {"max_tokens": 1, "temperature": 0, "logprobs": True, "top_logprobs": LISTED}
        said = []
        for reply in self.client.replies(chats, sampling):
            if isinstance(reply, RowError):
                raise UserError(f"The server of aspects refused a question: {reply.reason}")
            if not reply.first_tokens:
                raise UserError(
                    "The server of aspects tells no log-probs of its answers, and aspects are learnt from them. Take "
                    "vLLM or SGLang, or aspects_model."
                )
            said.append(probability_of_yes(reply.first_tokens))
        return torch.tensor(said).view(len(images), len(questions))


def probability_of_yes(tokens: Sequence[tuple[str, float]]) -> float:
    """Yes over yes and no, of tokens with their log-probs; NaN where neither is among them."""
    yes, no = yes_and_no(tokens)
    return yes / (yes + no) if yes + no else math.nan


def yes_and_no(tokens: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """The probabilities of yes and of no, however written, of tokens with their log-probs."""
    yes, no = (
        sum(math.exp(log_prob) for token, log_prob in tokens if token.strip().lower() == word)
        for word in ("yes", "no")
    )
    return yes, no


def build_aspects(
    folder: str | Path,
    teacher: AspectTeacher,
    read: Callable[[int], Any],
    rows: int,
    questions: Sequence[str],
    digest: str,
) -> None:
    """Writes the answers of all rows, file by file; what an earlier build has finished is not asked again.

    Raises UserError where another build's answers lie in the folder.
    """
    identity = {**_expected(questions, digest), "teacher": teacher.identity}
    stems = _stems(rows)
    left = [stem for stem in stems if not has_rows(folder, stem)]
    for stem in stems:
        if stem not in left:
            read_rows(folder, stem, identity, "answers to aspects")
            continue
        first = stems.index(stem) * SHARD_ROWS
        numbers = range(first, min(first + SHARD_ROWS, rows))
        print(f"Asking {len(questions)} questions about images {first:,} to {numbers[-1]:,}", file=sys.stderr)
        answers = teacher.answers([read(row) for row in numbers], questions)
        write_rows(folder, stem, {"answers": answers}, identity)


def has_aspects(folder: str | Path, rows: int) -> bool:
    """Whether a folder holds the answers of so many rows."""
    return all(has_rows(folder, stem) for stem in _stems(rows))


def read_aspects(
    folder: str | Path, rows: int, questions: Sequence[str], digest: str
) -> Float[Tensor, "row question"]:
    """The answers of a folder. Raises UserError where some are missing, damaged, or of other rows or questions."""
    parts = []
    for stem in _stems(rows):
        if not has_rows(folder, stem):
            raise UserError(
                f"{folder} lacks answers to aspects ({stem}). Build them: mmkd cache build RECIPE --job aspects; the "
                "same command goes on with a build that was stopped. It asks aspects_model or aspects_server."
            )
        parts.append(read_rows(folder, stem, _expected(questions, digest), "answers to aspects")[0]["answers"])
    answers = torch.cat(parts)
    silent = answers.isnan()
    if silent.all(0).any():
        question = questions[int(silent.all(0).nonzero()[0])]
        raise UserError(f"No image has a yes or no to the aspect {question!r}. Ask it so that yes or no answers it.")
    if silent.any():
        print(f"{int(silent.sum()):,} of {answers.numel():,} answers to aspects are no yes or no.", file=sys.stderr)
    return answers


def ask_for_questions(client: ChatClient, class_names: Sequence[str], count: int) -> list[str]:
    """So many yes-or-no questions about what tells the classes apart, by a language model.

    Raises UserError where it writes fewer.
    """
    prompt = (
        f"Write {count} different yes-or-no questions about what can be seen in an image, whose answers tell these "
        f"classes apart: {', '.join(class_names)}. Do not name the classes. One question a line, nothing else."
    )
    sampling = {"max_tokens": 40 * count + 100, "temperature": 0}
    reply = next(iter(client.replies([Chat([{"role": "user", "content": prompt}])], sampling)))
    text = "" if isinstance(reply, RowError) else reply.text
    lines = [re.sub(r"^[\s\d.)*-]+", "", line).strip() for line in text.splitlines()]
    questions = list(dict.fromkeys(line for line in lines if line.endswith("?")))[:count]
    if len(questions) < count:
        raise UserError(
            f"The server was asked for {count} questions and wrote {len(questions)}: {text[:200]!r}. Lower "
            "aspects_count, or write the questions yourself."
        )
    return questions


def _expected(questions: Sequence[str], digest: str) -> dict[str, Any]:
    return {"rows": digest, "questions": list(questions)}


def _stems(rows: int) -> list[str]:
    return [f"aspects_{number:05d}" for number in range(-(-rows // SHARD_ROWS))]
