"""Conversations with the models of a run: loaded when they are first asked, kept while memory lasts."""

import gc
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from transformers import ProcessorMixin

from mmkd.data.prompts import RowPrompt, text_of, with_pictures
from mmkd.errors import UserError
from mmkd.eval.model import find_model
from mmkd.generation.generator import Generator, Sampling
from mmkd.generation.row_answers import PromptWithTools
from mmkd.publish.run_sides import RunSide, sides_of, silent_teachers
from mmkd.publish.runs import is_run, read_run
from mmkd.results.parameters import parameters_of

MODEL = "model"
"""The name of the only side of what is no run."""

Message = Mapping[str, Any]
"""`role` and `content`, text."""


def sides_named(name: str, trust_remote_code: bool = False) -> dict[str, RunSide]:
    """The models behind a name: student and teachers of a run's folder, or the model of another folder or a Hub id.

    Raises UserError for a name that leads to no model.
    """
    if Path(name).is_dir() and is_run(Path(name)):
        return sides_of(read_run(Path(name)), trust_remote_code)
    model = find_model(name, trust_remote_code=trust_remote_code)
    return {MODEL: RunSide(MODEL, model, parameters_of(model.adapter or model.path, model.revision))}


def silent_side(name: str) -> str:
    """Why the teacher of a run cannot answer, as a sentence; empty if it can, and for what is no run."""
    return silent_teachers(read_run(Path(name))) if Path(name).is_dir() and is_run(Path(name)) else ""


@dataclass(frozen=True)
class Speaker:
    """Who answers, and the tokenizer or processor that renders the questions."""

    generator: Generator[PromptWithTools]
    processing_class: Any
    size: float
    """Bytes of this machine's device."""


@dataclass
class LoadedModels:
    """The models that are in memory, and the servers that are connected."""

    loaded: dict[str, Speaker] = field(default_factory=dict)
    served: dict[str, Speaker] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a model is loaded or answers: one at a time."""

    def reply(
        self, side: RunSide, messages: Sequence[Message], images: Sequence[Image], sampling: Sampling
    ) -> Iterator[str]:
        """The side's answer to the last message, in pieces. Raises UserError for images that it cannot see."""
        with self.lock:
            speaker = self._speaker(side)
            prompt = _prompt(speaker.processing_class, messages, images)
            yield from speaker.generator.stream((prompt, None), sampling)

    def unload(self) -> int:
        """Frees the memory of all models; returns how many there were."""
        with self.lock:
            count = len(self.loaded)
            self._free()
        return count

    def _speaker(self, side: RunSide) -> Speaker:
        speakers = self.loaded if side.server is None else self.served
        where = side.server or side.model.adapter or (side.exported and side.exported.path) or side.model.path
        key = f"{where} {side.model.revision} {side.dtype} {side.bits}"
        if key not in speakers:
            if not side.fits_beside(sum(speaker.size for speaker in self.loaded.values())):
                self._free()
            speakers[key] = Speaker(side.generator(), side.model.processing_class, side.size)
        return speakers[key]

    def _free(self) -> None:
        self.loaded.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _prompt(processing_class: Any, messages: Sequence[Message], images: Sequence[Image]) -> RowPrompt:
    """The conversation as the model reads it: by its chat template, or else the last message as plain text."""
    if images and not isinstance(processing_class, ProcessorMixin):
        raise UserError("This model reads text only: it has no processor for images. Ask without an image.")
    if not getattr(processing_class, "chat_template", None):
        text = text_of(messages[-1]["content"])
        return text if not images else with_pictures(text, images)
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return with_pictures(plain, images) if images else plain
