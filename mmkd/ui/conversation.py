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
from mmkd.generation.generator import Sampling
from mmkd.generation.local_generation import LocalGenerator
from mmkd.generation.row_answers import PromptWithTools, row_generator
from mmkd.publish.run_sides import RunSide, sides_of
from mmkd.publish.runs import is_run, read_run
from mmkd.results.parameters import parameters_of

MODEL = "model"
"""The name of the only side of what is no run."""

Message = Mapping[str, Any]
"""`role` and `content`, text."""


def sides_named(name: str) -> dict[str, RunSide]:
    """The models behind a name: student and teachers of a run's folder, or the model of another folder or a Hub id.

    Raises UserError for a name that leads to no model.
    """
    if Path(name).is_dir() and is_run(Path(name)):
        return sides_of(read_run(Path(name)))
    model = find_model(name)
    return {MODEL: RunSide(MODEL, model, parameters_of(model.adapter or model.path, model.revision))}


@dataclass
class LoadedModels:
    """The models that are in memory, by where they lie."""

    generators: dict[str, LocalGenerator[PromptWithTools]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    """Parameters."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Held while a model is loaded or answers: one at a time."""

    def reply(
        self, side: RunSide, messages: Sequence[Message], images: Sequence[Image], sampling: Sampling
    ) -> Iterator[str]:
        """The side's answer to the last message, in pieces. Raises UserError for images that it cannot see."""
        with self.lock:
            generator = self._generator(side)
            yield from generator.stream((_prompt(generator.processing_class, messages, images), None), sampling)

    def unload(self) -> int:
        """Frees the memory of all models; returns how many there were."""
        with self.lock:
            count = len(self.generators)
            self._free()
        return count

    def _generator(self, side: RunSide) -> LocalGenerator[PromptWithTools]:
        key = f"{side.model.adapter or side.model.path} {side.model.revision} {side.dtype}"
        if key not in self.generators:
            size = side.parameters or 0
            if self.generators and not side.fits_beside(sum(self.sizes.values())):
                self._free()
            self.generators[key] = row_generator(side.load(), side.model.processing_class)
            self.sizes[key] = size
        return self.generators[key]

    def _free(self) -> None:
        self.generators.clear()
        self.sizes.clear()
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
