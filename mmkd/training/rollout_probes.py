"""What a server that carries the student is asked: the prompts of rows, and probes that tell whose weights it has."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from mmkd.data.images import UnusableRow, read_row
from mmkd.data.prompts import RowPrompt, model_inputs, pictures_of, question_of, with_pictures
from mmkd.errors import UserError
from mmkd.generation.generator import Prompt
from mmkd.models.load import image_token_of
from mmkd.models.sharded_weights import called
from mmkd.teachers.cached import images_of
from mmkd.teachers.vllm_client import PROBE, ScoreRequest

from .rollouts import RolloutPrompt

_PROBED = 48
_LOOKED_AT = 64


@dataclass(frozen=True)
class Probe:
    """A text, with images or not, that student and server both score.

    Args:
        name: as errors call it.
        question: as the server is asked.
        inputs: as the student reads it.
    """

    name: str
    question: ScoreRequest
    inputs: Mapping[str, Any]

    @torch.no_grad()
    def log_probs(self, model: Any, accelerator: Accelerator) -> np.ndarray:
        """The student's log-prob of each token that the question asks about; all ranks must call it together."""
        training = model.training
        model.eval()
        device = accelerator.device
        inputs = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in self.inputs.items()}
        with called(model, accelerator) as forward, accelerator.autocast():
            log_probs = forward(**inputs).logits[0, :-1].float().log_softmax(-1)
        model.train(training)
        told = log_probs.gather(-1, inputs["input_ids"][0, 1:, None])[:, 0].cpu().numpy()
        return told[self.question.supervised[1:]]


def probes_of(tokenizer: Any, processing_class: Any, train: Iterable[Mapping[str, Any]], vision: bool) -> list[Probe]:
    """A text of many scripts, and for a student with images the first row of the data that has one.

    Raises UserError for rows that a server cannot be asked about.
    """
    ids = tokenizer(PROBE, add_special_tokens=False)["input_ids"][:_PROBED]
    question = ScoreRequest(ids, np.arange(len(ids)) > 0)
    probes = [Probe(f"a text of {len(ids)} tokens", question, {"input_ids": torch.tensor([ids])})]
    first = next((row for row, _ in zip(train, range(_LOOKED_AT), strict=False) if images_of(row)), None)
    if vision and first is not None:
        probes.append(_with_images(first, processing_class))
    return probes


def _with_images(row: Mapping[str, Any], processor: Any) -> Probe:
    question = _asked(row)
    messages = _messages(question)
    inputs = dict(model_inputs(processor, [question], answering=False))
    ids = inputs["input_ids"][0].numpy()
    places = np.flatnonzero(ids == image_token_of(processor))
    # What is said after an image depends on what was seen in it. The probe ends in the question's own text.
    after = np.arange(len(ids)) > places[-1] if places[-1] + 1 < len(ids) else np.arange(len(ids)) > places[0]
    request = ScoreRequest(ids, after, messages, pictures_of(question))
    return Probe("a question about an image of the data", request, inputs)


def served_prompt(prompt: RolloutPrompt) -> Prompt:
    """The prompt as a server takes it: its tokens, or where it has images the messages that they stand in.

    Raises UserError for plain text with images.
    """
    if not images_of(prompt.example):
        return Prompt(prompt.ids)
    question = _asked(prompt.example)
    return Prompt(prompt.ids, _messages(question), pictures_of(question))


def _asked(example: Mapping[str, Any]) -> RowPrompt:
    """What stands before the last answer of a row, with its images."""
    read = read_row(example)
    if isinstance(read, UnusableRow):
        raise UserError(f"An image of the data cannot be read: {read.reason}. Correct the row or remove it.")
    row = dict(read)
    if "messages" in row:
        turns = list(row["messages"])
        # A turn after the last answer is not a part of what it answers.
        while turns and turns[-1]["role"] != "assistant":
            turns.pop()
        row["messages"] = turns or row["messages"]
    return with_pictures(question_of(row), row.get("images"))


def _messages(question: RowPrompt) -> list[dict[str, Any]]:
    if not isinstance(question, list):
        raise UserError(
            "vLLM servers take images in messages only, and the prompts of these rows are plain text with images. Map "
            "the data to messages, or generate in this process (remove rollout_server).",
            because="upstream",
        )
    return question
