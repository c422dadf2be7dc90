"""A teacher whose model a vLLM server runs up to the last hidden state, and whose head is here."""

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, Self

import torch
from accelerate import Accelerator
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mmkd.errors import UserError
from mmkd.models.heads import LMHead

from .server import questions_of
from .signals import DenseSignal
from .teacher import DenseTeacher
from .vllm_client import VLLMClient
from .vllm_rows import RowError


class HiddenServerTeacher(DenseTeacher):
    """Answers with the whole distribution: hidden states from vLLM's pooling runner, and the teacher's own head.

    `head` is what `head_of_checkpoint` reads of the served model, `dtype` the type in which states travel. Further
    settings are as of `ServerTeacher`.
    """

    def __init__(
        self,
        base_urls: str | Sequence[str],
        head: LMHead,
        model: str | None = None,
        vocab_size: int | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        recheck: int = 100,
        teacher: str | None = None,
        max_length: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **client: Any,
    ):
        self.head, self.dtype, self.recheck, self.teacher = head, dtype, recheck, teacher
        self.vocab_size = head.vocab_size if vocab_size is None else min(vocab_size, head.vocab_size)
        self.softcap = head.softcap
        self.max_length, self.tokenizer = max_length, tokenizer
        self.client = VLLMClient(base_urls, model, **client)

    @property
    def served(self) -> bool:
        """True."""
        return True

    def over_tokens(self, vocab_size: int) -> Self:
        """The same teacher over the first tokens only."""
        teacher = copy(self)
        teacher.vocab_size = vocab_size
        return teacher

    def prepare(self, accelerator: Accelerator) -> None:
        """Takes the head to the accelerator's device and checks the servers (`VLLMClient.check`)."""
        self.place(accelerator.device)
        self.facts = self.client.check(self.teacher, 0, self.max_length, self.tokenizer)

    def place(self, device: torch.device) -> None:
        """Moves the head to a device."""
        head = self.head
        bias = None if head.bias is None else head.bias.to(device)
        self.head = replace(head, weight=head.weight.to(device), bias=bias)

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any], supervised: Bool[Tensor, "batch position"]) -> DenseSignal:
        """Asks for every sequence of the batch, padded or packed. Raises UserError when the server refuses one."""
        states = []
        for answer in self.client.states(questions_of(inputs, supervised), self.dtype):
            if isinstance(answer, RowError):
                raise UserError(f"The teacher's server refused a sequence of the batch: {answer.reason}")
            states.append(answer)
        if not states:
            return self.nothing()
        weight = self.head.weight
        hidden = torch.cat(states).to(inputs["input_ids"].device, weight.dtype)
        return DenseSignal(hidden, self.head.trimmed(self.vocab_size))

    def nothing(self) -> DenseSignal:
        """The signal about no token at all, without asking."""
        weight = self.head.weight
        return DenseSignal(weight.new_empty(0, weight.shape[1]), self.head.trimmed(self.vocab_size))
