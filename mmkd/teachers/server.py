"""A teacher that is served by vLLM and asked while the student trains."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, Self, TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from mmkd.errors import UserError
from mmkd.losses.divergences import log_one_minus_exp

from .batch import View
from .signals import LabelSignal, TopKSignal
from .teacher import Teacher
from .vllm_client import Answer as Answer
from .vllm_client import Prompt as Prompt
from .vllm_client import RowError as RowError
from .vllm_client import ScoreRequest as ScoreRequest
from .vllm_client import ServerFacts as ServerFacts
from .vllm_client import TopK as TopK
from .vllm_client import VLLMClient as VLLMClient

Answered = TypeVar("Answered")

IMAGE_INPUTS = ("pixel_values", "pixel_values_videos", "image_grid_thw", "pixel_attention_mask")


class ServerTeacher(Teacher[TopKSignal]):
    """Answers with the k most likely tokens and the tail's mass, from one or several vLLM servers of one model.

    `teacher` is the folder or Hub name that must be behind the URLs, `model` the served name where a server offers
    several, and `tokenizer` the teacher's, all checked by `prepare`. `processor` is what it reads images with.
    `vocab_size`, the number of tokens that teacher and student share, keeps padding rows of the teacher's vocabulary
    out of the k; their probability goes to the tail.
    Further settings are `VLLMClient`'s.
    """

    signal_type = TopKSignal
    can_temper = False

    def __init__(
        self,
        base_urls: str | Sequence[str],
        k: int = 64,
        model: str | None = None,
        vocab_size: int | None = None,
        *,
        teacher: str | None = None,
        max_length: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        processor: ProcessorMixin | None = None,
        **client: Any,
    ):
        if k < 1 or (vocab_size is not None and k > vocab_size):
            raise UserError(f"k={k} must be at least 1 and at most the {vocab_size or 'number of'} shared tokens.")
        self.k, self.vocab_size, self.teacher = k, vocab_size, teacher
        self.max_length, self.tokenizer, self.processor = max_length, tokenizer, processor
        self.client = VLLMClient(base_urls, model, **client)

    def over_tokens(self, vocab_size: int) -> Self:
        """The same teacher over the first tokens only."""
        teacher = copy(self)
        teacher.vocab_size = vocab_size
        return teacher

    def prepare(self, accelerator: Accelerator) -> None:
        """Checks the servers; raises UserError when one is down or not what is wanted (`VLLMClient.check`)."""
        self.facts = self.client.check(self.teacher, self.k, self.max_length, self.tokenizer)

    @property
    def served(self) -> bool:
        """True."""
        return True

    def read_alike(self, inputs: View) -> list[int] | None:
        """Fewer than all only of rows with images, which a server may have to make tokens of itself."""
        return tokens_read(self.client, inputs)

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any], supervised: Bool[Tensor, "batch position"]) -> TopKSignal:
        """Asks for every sequence of the batch, padded or packed (`position_ids` that start again at 0).

        Raises UserError when the server refuses a sequence.
        """
        top = self.answers(inputs, supervised)
        device = inputs["input_ids"].device
        ids = np.concatenate([signal.ids for signal in top] or [np.empty((0, self.k), np.int32)])
        log_probs = np.concatenate([signal.log_probs for signal in top] or [np.empty((0, self.k), np.float32)])
        on_device = torch.from_numpy(log_probs).to(device)
        tail = log_one_minus_exp(on_device.logsumexp(-1))
        return TopKSignal(torch.from_numpy(ids).to(device, torch.int64), on_device, tail, _of_labels(top, device))

    def answers(self, inputs: Mapping[str, Any], supervised: Bool[Tensor, "batch position"]) -> list[TopK]:
        """What the servers say of every sequence of the batch. Raises UserError when one is refused."""
        questions = questions_of(inputs, supervised)
        answers = zip(questions, self.client.score(questions, self.k, self.vocab_size), strict=True)
        return [accepted(answer, question) for question, answer in answers]


class LabelServerTeacher(Teacher[LabelSignal]):
    """Answers with the log-prob of each supervised token, in the teacher's own tokens, and of no other token."""

    signal_type = LabelSignal
    can_temper = False

    def __init__(self, server: ServerTeacher):
        """`server` is asked for one token per position, besides the one that is there."""
        self.server = copy(server)
        self.server.k = 1

    @property
    def served(self) -> bool:
        """True."""
        return True

    def prepare(self, accelerator: Accelerator) -> None:
        """Checks the servers as `ServerTeacher` does."""
        self.server.prepare(accelerator)

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any], supervised: Bool[Tensor, "batch position"]) -> LabelSignal:
        """Asks for every sequence of the batch. Raises UserError when the server refuses one."""
        return LabelSignal(_of_labels(self.server.answers(inputs, supervised), inputs["input_ids"].device))


def _of_labels(answers: Sequence[TopK], device: torch.device) -> Float[Tensor, "token"]:
    own = [answer.label_log_probs for answer in answers]
    return torch.from_numpy(np.concatenate([np.empty(0, np.float32), *own]).astype(np.float32)).to(device)


class RefusedRow(UserError):
    """A server does not answer about a row of a batch."""

    def __init__(self, question: ScoreRequest, reason: str):
        super().__init__(f"The teacher's server refused a sequence of the batch: {reason}")
        self.key, self.reason = question.key, reason


def accepted(answer: Answered | RowError, question: ScoreRequest) -> Answered:
    """The answer to a question. Raises RefusedRow where there is none."""
    if isinstance(answer, RowError):
        raise RefusedRow(question, answer.reason)
    return answer


def tokens_read(client: VLLMClient, view: View) -> list[int] | None:
    """How many of each row's first tokens the servers read as they are; None where they read all of all rows."""
    if view.served is None or not any(view.served):
        return None
    counts = [view.labels.shape[1]] * len(view.labels)
    rows = view.supervised.any(1).nonzero()[:, 0].tolist()
    questions = questions_of(view, view.supervised)
    for row, question, count in zip(rows, questions, client.tokens_read(questions), strict=True):
        counts[row] = accepted(count, question)
    return counts


def questions_of(inputs: Mapping[str, Any], supervised: Bool[Tensor, "batch position"]) -> list[ScoreRequest]:
    """One question per sequence of a batch that has a supervised token, in row-major order.

    Raises UserError for rows with images that do not say what a server is to be asked with.
    """
    served = inputs.served if isinstance(inputs, View) else None
    tensors = [name for name in IMAGE_INPUTS if inputs.get(name) is not None]
    if served is None and tensors:
        raise UserError(
            f"A served teacher cannot be asked from {', '.join(tensors)}: a vLLM server takes pictures, which these "
            "inputs do not hold. Ask about batches of mmkd's own collator, build a cache of this teacher (mmkd cache "
            "build), or use a local teacher."
        )
    ids = inputs["input_ids"].cpu().numpy()
    scored = np.zeros(ids.shape, bool)
    # Position i predicts token i + 1.
    scored[:, 1:] = supervised.cpu().numpy()
    real = np.ones(ids.shape, bool)
    if inputs.get("attention_mask") is not None:
        real = inputs["attention_mask"].cpu().numpy().astype(bool)
    begins = np.zeros(ids.shape, bool)
    if inputs.get("position_ids") is not None:
        begins = inputs["position_ids"].expand(ids.shape).cpu().numpy() == 0
    questions = []
    for row in range(len(ids)):
        sequence = np.cumsum(begins[row][real[row]])
        cuts = np.flatnonzero(np.diff(sequence)) + 1
        for tokens, flags in zip(
            np.split(ids[row][real[row]], cuts), np.split(scored[row][real[row]], cuts), strict=True
        ):
            if flags.any():
                questions.append(ScoreRequest.of(tokens, flags, None if served is None else served[row]))
    assert sum(int(q.supervised.sum()) for q in questions) == int(scored.sum()), "padding is never supervised"
    return questions
