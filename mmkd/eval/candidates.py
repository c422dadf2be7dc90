"""Teachers to choose from: models that are loaded, and servers of hidden states."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from mmkd.data.prompts import model_inputs, pictures_of
from mmkd.errors import UserError
from mmkd.generation.row_answers import PromptWithTools
from mmkd.models.load import load_processing_class, tokenizer_of
from mmkd.teachers.batch import View
from mmkd.teachers.hidden_server import HiddenServerTeacher
from mmkd.teachers.served_head import final_norm_of_checkpoint, head_of_checkpoint
from mmkd.teachers.vllm_client import VLLMClient

from .answer_readings import AnsweredPrompt, AnswerReader
from .harness import Settings, device_of
from .model import EvalModel, find_model

SERVER = "server:"


class Candidate(Protocol):
    """A teacher that may be chosen."""

    @property
    def name(self) -> str:
        """As the user named it."""
        ...

    def identity(self, how: Settings) -> Any:
        """What decides the numbers that are measured of it."""
        ...

    def reader(self, how: Settings) -> AnswerReader:
        """The model, ready to read."""
        ...


def candidate(name: str, trust_remote_code: bool = False) -> Candidate:
    """The candidate of a folder, a Hub id, or server:URL. Raises UserError where there is none."""
    if name.startswith(SERVER):
        return ServedCandidate(name, trust_remote_code)
    return LocalCandidate(find_model(name, trust_remote_code=trust_remote_code))


@dataclass(frozen=True)
class LocalCandidate:
    """A model that is loaded here."""

    model: EvalModel

    @property
    def name(self) -> str:
        return self.model.name

    def identity(self, how: Settings) -> Any:
        device = device_of(how)
        return self.model.weights, self.model.computed_dtype(how.dtype, device), device

    def reader(self, how: Settings) -> AnswerReader:
        return AnswerReader(self.model.load(how.dtype, device_of(how)), self.model.processing_class)


@dataclass(frozen=True)
class ServedCandidate:
    """A model behind vLLM's pooling runner; its tokenizer and head are read from its folder or the Hub."""

    name: str
    trust_remote_code: bool = False

    @cached_property
    def _root(self) -> str:
        with VLLMClient(self.name.removeprefix(SERVER)) as client:
            root = client.check().root
            if client.signal() != "hidden":
                raise UserError(
                    f"{self.name} generates, and tells its most likely tokens only. Ranking reads whole "
                    "distributions: serve the hidden states (scripts/serve_teacher.sh MODEL --signal hidden).",
                    because="not built",
                )
        return root

    def identity(self, how: Settings) -> Any:
        # A server does not tell its weights.
        return self.name, self._root

    def reader(self, how: Settings) -> AnswerReader:
        trust = self.trust_remote_code
        processing_class = load_processing_class(self._root, "teacher", trust_remote_code=trust)
        head = head_of_checkpoint(self._root, None, how.dtype, trust, device_of(how))
        norm = final_norm_of_checkpoint(self._root, None, trust)
        tokenizer: Any = tokenizer_of(processing_class)
        urls = self.name.removeprefix(SERVER)
        teacher = HiddenServerTeacher(urls, head, dtype=head.weight.dtype, norm=norm, tokenizer=tokenizer)
        teacher.place(torch.device(device_of(how)))
        teacher.check()
        return ServedReader(None, processing_class, teacher)


@dataclass(frozen=True)
class ServedReader(AnswerReader):
    """A model behind a server of hidden states, which reads text and writes nothing."""

    teacher: HiddenServerTeacher

    @property
    def writes(self) -> bool:
        return False

    @torch.no_grad()
    def log_probs(self, text: AnsweredPrompt, ids: Sequence[int]) -> Float[Tensor, "token vocab"] | None:
        """What the model says of each of these tokens as the answer; None where they do not fit its context."""
        if not isinstance(text.prompt, str) and pictures_of(text.prompt):
            raise UserError(
                "Rows with images are ranked with teachers that are loaded here. Name the teacher's folder or Hub id.",
                because="not built",
            )
        tools = None if text.tools is None else [text.tools]
        prompt = model_inputs(self.processing_class, [text.prompt], tools)["input_ids"]
        start = prompt.shape[1]
        if start + len(ids) > self.teacher.facts.max_model_len:
            return None
        whole = torch.cat([prompt, torch.tensor([list(ids)])], dim=1)
        labels = whole.clone()
        labels[:, :start] = -100
        view = View({"input_ids": whole, "attention_mask": torch.ones_like(whole)}, labels)
        signal = self.teacher.ask(view, view.supervised)
        return signal.head.log_probs(signal.hidden)

    def answers(
        self, prompts: Sequence[PromptWithTools], max_new_tokens: int, temperature: float, seed: int = 0
    ) -> Iterator[AnsweredPrompt]:
        """Raises UserError."""
        raise UserError(
            "acceptance is measured on what the teacher writes, and a server of hidden states writes nothing. Name "
            "the teacher's folder or Hub id.",
            because="upstream",
        )
