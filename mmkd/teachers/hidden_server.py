"""A teacher whose model a vLLM server runs up to the last hidden state, and whose head is here."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mmkd.errors import UserError
from mmkd.models.heads import LMHead

from .batch import View
from .head_checks import FinalNorm, check_states, drift
from .server import accepted, questions_of, tokens_read
from .server_checks import WIRE_TYPES
from .signals import DenseSignal
from .teacher import DenseTeacher
from .vllm_client import NoAnswer, VLLMClient
from .vllm_rows import ScoreRequest

# Plain text, which any language model finds likelier than a guess.
TEXT = (
    "Rivers run to the sea because water flows downhill. In 1969, three people flew to the moon and came back after "
    "eight days. "
)
# Nats per token. What half types make of another order of sums is below 1e-3; other weights are above 1e-2.
DRIFT = 1e-2


class HiddenServerTeacher(DenseTeacher):
    """Answers with the whole distribution: hidden states from vLLM's pooling runner, and the teacher's own head.

    `head` is what `head_of_checkpoint` reads of the served model, and `norm` what `final_norm_of_checkpoint` does, by
    which a server of another model is recognised. States travel in `dtype`. After `recheck` batches, and after a
    server gave no answer, one row is asked again: other states than at first mean other weights. 0: never. Further
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
        norm: FinalNorm | None = None,
        recheck: int = 100,
        teacher: str | None = None,
        max_length: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processor: ProcessorMixin | None = None,
        **client: Any,
    ):
        if dtype not in WIRE_TYPES or recheck < 0:
            raise UserError(
                f"dtype is {dtype} and recheck {recheck}; states travel in {', '.join(map(str, WIRE_TYPES))}, and "
                "recheck is a number of batches, or 0 for never."
            )
        self.head, self.norm, self.dtype, self.recheck, self.teacher = head, norm, dtype, recheck, teacher
        self._asked = self._failures = 0
        self._absent: set[str] = set()
        self.vocab_size = head.vocab_size if vocab_size is None else min(vocab_size, head.vocab_size)
        self.softcap = head.softcap
        self.max_length, self.tokenizer, self.processor = max_length, tokenizer, processor
        self.client = VLLMClient(base_urls, model, **client)

    @property
    def served(self) -> bool:
        """True."""
        return True

    def read_alike(self, inputs: View) -> list[int] | None:
        """Fewer than all only of rows with images, which a server makes tokens of itself."""
        return tokens_read(self.client, inputs)

    def prepare(self, accelerator: Accelerator) -> None:
        """Takes the head to the accelerator's device and checks the servers.

        Raises UserError as `VLLMClient.check`, and where the servers run another model than the head is of, or differ.
        """
        self.place(accelerator.device)
        self.check()

    def check(self) -> None:
        """What `prepare` checks, with the head where it is."""
        self.facts = self.client.check(self.teacher, 0, self.max_length, self.tokenizer, self.dtype)
        self._probe = probe_of(self.tokenizer, len(self.head.weight), self.facts.max_model_len)
        states = self.client.states_by_url(self._probe, self.dtype)
        first, *others = states
        ids = [int(token) for token in self._probe.ids[:-1]] if self.tokenizer is not None else []
        for url in states:
            check_states(self.head, self.norm, ids, states[url], url)
        for url in others:
            if drift(self.head, states[first], states[url]) > DRIFT:
                raise UserError(
                    f"{first} and {url} give different hidden states for the same text: they run different weights. "
                    "Start both with the same model and revision."
                )
        self._states = states[first]
        self._failures = self.client.failures

    def place(self, device: torch.device) -> None:
        """Moves the head to a device."""
        head = self.head
        bias = None if head.bias is None else head.bias.to(device)
        self.head = replace(head, weight=head.weight.to(device), bias=bias)

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any], supervised: Bool[Tensor, "batch position"]) -> DenseSignal:
        """Asks for every sequence of the batch, padded or packed. Raises UserError when the server refuses one."""
        questions = questions_of(inputs, supervised)
        answers = zip(questions, self.client.states(questions, self.dtype), strict=True)
        states = [accepted(answer, question) for question, answer in answers]
        if not states:
            return self.nothing()
        weight = self.head.weight
        self.check_again()
        hidden = torch.cat(states).to(inputs["input_ids"].device, weight.dtype)
        return DenseSignal(hidden, self.head.trimmed(self.vocab_size))

    def check_again(self) -> None:
        """Asks the probe once more where it is time. Raises UserError for a server with other weights than before.

        Of several servers, those that give no answer are looked at when they are back.
        """
        self._asked += 1
        if not self.recheck:
            return
        due = self.client.failures != self._failures or self._asked % self.recheck == 0
        urls = self.facts.urls if due else tuple(self._absent)
        self._failures = self.client.failures
        for url in urls:
            if url in self._absent and self.client.rests(url):
                continue
            try:
                states = self.client.states_at(url, self._probe, self.dtype, retry=len(self.facts.urls) == 1)
            except NoAnswer:
                if len(self.facts.urls) == 1:
                    raise
                self._absent.add(url)
                continue
            self._absent.discard(url)
            nats = drift(self.head, self._states, states) if states.shape == self._states.shape else float("inf")
            if nats > DRIFT:
                raise UserError(
                    f"{url} gives other hidden states than when the run began ({nats:.2g} nats per token apart, "
                    "on a plain text): it runs other weights by now. Serve the teacher of the beginning again, and "
                    "resume from a checkpoint that was saved before.",
                    because="meaning",
                )

    def nothing(self) -> DenseSignal:
        """The signal about no token at all, without asking."""
        weight = self.head.weight
        return DenseSignal(weight.new_empty(0, weight.shape[1]), self.head.trimmed(self.vocab_size))


def probe_of(tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, room: int) -> ScoreRequest:
    """A row of plain text whose states are all asked for; of the first tokens where there is no tokenizer."""
    ids = list(range(min(vocab_size, 32))) if tokenizer is None else list(tokenizer(TEXT)["input_ids"])
    ids = ids[:room]
    # The last state predicts a token that is not sent.
    return ScoreRequest([*ids, 0], np.arange(len(ids) + 1) > 0)
