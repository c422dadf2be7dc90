"""Instructions: what is asked, about which pictures, under a name made of its content."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from datasets import Dataset
from PIL import Image

from mmkd.cache.sequence_keys import image_hash
from mmkd.data.arrow import read_rows
from mmkd.data.images import STORED, UnreadableImage, read_image
from mmkd.data.messages import without_nulls
from mmkd.errors import UserError
from mmkd.files import write_file

from .text import normalised, words

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Instruction:
    """A prompt to be answered, with the paths of its images; `reference` is the data's own answer where it has one."""

    prompt: tuple[Message, ...]
    images: tuple[str, ...]
    key: str
    """Hex digest of what it says and of the pixels it shows."""
    reference: str | None = field(default=None, compare=False)
    kind: str = field(default="seed", compare=False)
    """seed, or what it was made of: hard, easy or any."""
    parent: str | None = field(default=None, compare=False)
    round: int = field(default=0, compare=False)
    """The round in which it joins the pool."""

    @cached_property
    def text(self) -> str:
        """What the last message of the user says."""
        return text_of(next(message for message in reversed(self.prompt) if message["role"] == "user"))

    @cached_property
    def words(self) -> list[str]:
        return words(self.text)

    def type_of(self, count: int) -> str:
        """Its type: its first words, in lower case."""
        return " ".join(self.words[:count])


class ImageStore:
    """The images of a run: paths stay as they are, bytes are written to a folder, named by their content."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._digests: dict[str, str] = {}

    def path_of(self, image: Any) -> str:
        """The path of an image as a data set stores it: a path, or `{"path": ..., "bytes": ...}`."""
        if isinstance(image, str):
            return image
        content = image.get("bytes")
        if content is None:
            return image["path"]
        suffix = Path(image.get("path") or "").suffix or ".png"
        path = self.folder / f"{hashlib.blake2b(content, digest_size=16).hexdigest()}{suffix}"
        if not path.is_file():
            write_file(path, content)
        return str(path)

    def digest(self, path: str) -> str:
        """The hash of an image's pixels. Raises UserError for a file that is no image."""
        if path not in self._digests:
            self._digests[path] = image_hash(open_image(path))
        return self._digests[path]

    def instruction(self, prompt: Sequence[Message], images: Sequence[str], **facts: Any) -> Instruction:
        """The instruction of a prompt and images."""
        turns = [[message["role"], normalised(text_of(message))] for message in prompt]
        content = json.dumps([turns, [self.digest(path) for path in images]], ensure_ascii=False)
        key = hashlib.blake2b(content.encode(), digest_size=16).hexdigest()
        return Instruction(tuple(prompt), tuple(images), key, **facts)

    def reworded(
        self, parent: Instruction, text: str, images: Sequence[str] | None = None, **facts: Any
    ) -> Instruction:
        """A child of an instruction: the user's last message says something else, of these images or the parent's."""
        prompt = [dict(message) for message in parent.prompt]
        last = max(place for place, message in enumerate(prompt) if message["role"] == "user")
        prompt[last] = with_text(prompt[last], text)
        own = parent.images if images is None else images
        return self.instruction(prompt, own, parent=parent.key, **facts)


def read_instructions(dataset: Dataset, store: ImageStore) -> list[Instruction]:
    """The instructions of a data set in its order, each once.

    Raises UserError for plain text: a judge or an augmentor is asked through messages.
    """
    columns = dataset.column_names
    if "text" in columns or any(isinstance(row, str) for row in dataset[:1].get("prompt", [])):
        raise UserError(
            "comd asks a teacher through messages, but the data holds plain text. Map its columns to messages, such "
            "as `messages: {user: '{question}', assistant: '{answer}'}`. Prompts without answers are rows such as "
            '{"prompt": [{"role": "user", "content": "..."}]}.',
            because="not built",
        )
    instructions: dict[str, Instruction] = {}
    for row in read_rows(dataset, columns):
        prompt = list(row["prompt"] if "prompt" in row else row["messages"])
        answers = list(row.get("completion") or [])
        while prompt and prompt[-1]["role"] == "assistant":
            answers.insert(0, prompt.pop())
        if row.get("tools"):
            raise UserError(
                "A row has tools, which the judge and the augmentor of comd would not see. Leave such rows out, "
                "or take the column `tools` out of the data.",
                because="not built",
            )
        if not any(message["role"] == "user" for message in prompt):
            raise UserError("A row asks nothing: it has no message of a user. Leave such rows out with filters.")
        images = [store.path_of(image) for image in row.get("images") or []]
        reference = text_of(answers[-1]) if answers else None
        instruction = store.instruction([_plain(message) for message in prompt], images, reference=reference)
        instructions.setdefault(instruction.key, instruction)
    return list(instructions.values())


def apart_from(instructions: Iterable[Instruction], held_out: Iterable[Instruction]) -> list[Instruction]:
    """The instructions that are not held out."""
    keys = {instruction.key for instruction in held_out}
    return [instruction for instruction in instructions if instruction.key not in keys]


def text_of(message: Message) -> str:
    """What a message says, its images left out."""
    content = message.get("content")
    if isinstance(content, str) or content is None:
        return content or ""
    return "\n".join(part["text"] for part in content if part["type"] == "text" and part.get("text"))


def with_text(message: Message, text: str) -> dict[str, Any]:
    """The message with another text after its images."""
    if isinstance(message["content"], str):
        return {**message, "content": text}
    images = [part for part in message["content"] if part["type"] == "image"]
    return {**message, "content": [*images, {"type": "text", "text": text}]}


def answered(prompt: Sequence[Message], answer: str) -> list[Message]:
    """The conversation with an answer, in the form of its messages."""
    parts = any(not isinstance(message["content"], str) for message in prompt)
    content = [{"type": "text", "text": answer}] if parts else answer
    return [*prompt, {"role": "assistant", "content": content}]


def open_image(path: str) -> Image.Image:
    """The image of a file as models read it. Raises UserError for a file that is none."""
    try:
        image = read_image(path)
    except UnreadableImage as error:
        raise UserError(f"{path} is no image that can be read ({error}). Correct the data's images.") from error
    # Instructions are named by the pixels in RGB, whatever the file has.
    image.info.pop(STORED, None)
    return image


def row_of(instruction: Instruction, answer: str) -> dict[str, Any]:
    """A line of the pool: what is trained on, and where it comes from."""
    messages = answered(instruction.prompt, answer)
    facts = {
        "key": instruction.key,
        "kind": instruction.kind,
        "parent": instruction.parent,
        "round": instruction.round,
    }
    return {"prompt": messages[:-1], "completion": messages[-1:], "images": list(instruction.images), **facts}


def child_of_round(instruction: Instruction, number: int) -> Instruction:
    """The instruction as one that joins the pool in a round."""
    return replace(instruction, round=number)


def _plain(message: Message) -> dict[str, Any]:
    """The message without null keys, its parts with type and text alone: columns of a data set hold much null."""
    content = message.get("content")
    if not isinstance(content, str) and content is not None:
        content = [{"type": part["type"], "text": part.get("text")} for part in content]
    return {**without_nulls(message), "content": content or ""}
