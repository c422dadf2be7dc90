"""What can be trained, as `mmkd init` asks for it, and the models it suggests for a GPU."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

PREPARED = Path(".cache/mmkd/SmolLM2-135M-Instruct")
"""A teacher that `mmkd prepare` makes where there is no Hub."""

PRUNE = "prune"
"""In place of a student's name: a new one of some of the teacher's layers."""


@dataclass(frozen=True)
class Pair:
    """A teacher and a student of one family that a device can hold."""

    memory: float
    """GiB of the device from which on it is suggested; 0 is a machine without a GPU."""
    teacher: str
    student: str


@dataclass(frozen=True)
class Task:
    """A kind of distillation."""

    name: str
    label: str
    method: str
    pairs: tuple[Pair, ...]
    """From the smallest device to the largest."""
    images: Literal["unread", "possible", "needed"] = "unread"
    """Whether rows of text may have pictures, which both models then have to see."""
    takes_prompts: bool = False
    """Whether rows of prompts alone are enough."""
    rollouts: bool = False
    """Whether the student learns from answers of its own."""
    prunes: bool = True
    """Whether the student can be made of the teacher's layers."""

    def pair(self, memory: float) -> Pair:
        """The suggestion for a device of so many GiB, 0 for none."""
        fitting = [pair for pair in self.pairs if pair.memory <= memory]
        chosen = fitting[-1] if fitting else self.pairs[0]
        if not memory and chosen.student == _SMALL[0].student and PREPARED.is_dir():
            return Pair(0, str(PREPARED), PRUNE)
        return chosen


_SMALL = (Pair(0, "HuggingFaceTB/SmolLM2-360M-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),)
_CHAT = (
    *_SMALL,
    Pair(12, "Qwen/Qwen2.5-3B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
    Pair(22, "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
    Pair(75, "Qwen/Qwen2.5-14B-Instruct", "Qwen/Qwen2.5-1.5B-Instruct"),
)
_VISION = (
    Pair(0, "HuggingFaceTB/SmolVLM-500M-Instruct", "HuggingFaceTB/SmolVLM-256M-Instruct"),
    Pair(38, "Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-3B-Instruct"),
)
_CLASSES = (
    Pair(0, "openai/clip-vit-base-patch32", "microsoft/resnet-18"),
    Pair(12, "openai/clip-vit-large-patch14", "microsoft/resnet-50"),
)
_OTHER = (
    Pair(0, "Qwen/Qwen2.5-0.5B-Instruct", "HuggingFaceTB/SmolLM2-135M-Instruct"),
    Pair(12, "Qwen/Qwen2.5-1.5B-Instruct", "HuggingFaceTB/SmolLM2-360M-Instruct"),
    Pair(38, "Qwen/Qwen2.5-7B-Instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct"),
)
_SERVED = (
    *_SMALL,
    Pair(12, "Qwen/Qwen2.5-32B-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"),
    Pair(38, "Qwen/Qwen2.5-72B-Instruct", "Qwen/Qwen2.5-3B-Instruct"),
)

OTHER_TOKENIZER = Task(
    "other-tokenizer", "a language model whose teacher has another tokenizer", "alm", _OTHER, prunes=False
)
"""Its method also takes the place of one that compares token by token, where the tokenizers turn out to differ."""

TASKS = {
    task.name: task
    for task in (
        Task("text", "a language model, from chats, instructions or plain text", "kd", _CHAT),
        Task("vlm", "a vision-language model, from pictures with text", "llava_kd", _VISION, images="needed"),
        Task("classify", "a classifier of pictures or texts, from classes", "dho", _CLASSES, prunes=False),
        Task(
            "comd",
            "rounds: the teacher asks more of what the student fails at",
            "comd",
            _CHAT,
            images="possible",
            takes_prompts=True,
        ),
        OTHER_TOKENIZER,
        Task(
            "served-teacher",
            "a language model whose teacher runs on a vLLM server",
            "kd",
            _SERVED,
            images="possible",
        ),
        Task(
            "on-policy",
            "a language model that answers itself and is corrected",
            "kd",
            _CHAT,
            images="possible",
            takes_prompts=True,
            rollouts=True,
        ),
    )
}

SERVER = "http://127.0.0.1:8000"


def named(words: Sequence[str]) -> str:
    """Words as a list for a reader."""
    return f"{', '.join(words[:-1])} or {words[-1]}" if len(words) > 1 else words[0]
