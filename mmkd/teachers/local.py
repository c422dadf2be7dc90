"""A teacher in this process: a frozen transformers model."""

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel
from trl.models.utils import prepare_deepspeed

from mmkd.models.backbone import allow_consumers, devices_of, full_head

from .base import Teacher
from .signals import DenseSignal


class LocalTeacher(Teacher[DenseSignal]):
    """Answers with hidden states and head, so that its logits exist one chunk at a time, next to the student's."""

    signal_type = DenseSignal

    def __init__(self, model: PreTrainedModel, vocab_size: int | None = None):
        """`vocab_size` trims the padding rows of the teacher's vocabulary: the number of tokens both sides know."""
        self.model = model.eval().requires_grad_(False)
        self.head = full_head(self.model)
        if vocab_size is not None:
            self.head = self.head.trimmed(vocab_size)

    def prepare(self, accelerator: Accelerator) -> None:
        """Moves to the accelerator's device, whole; only DeepSpeed ZeRO-3 shards the teacher like the student.

        Raises ValueError when it cannot move: its weights are on the meta device, or were placed by `device_map`.
        """
        here = _with_index(accelerator.device)
        devices = devices_of(self.model)
        placed = getattr(self.model, "hf_device_map", None) is not None
        if torch.device("meta") in devices or (placed and devices != {here}):
            raise ValueError(
                f"The teacher is on {', '.join(sorted(map(str, devices)))} and cannot be moved to the student's "
                f"device {here}. Load it without device_map, or with device_map="
                f"{{'': '{here}'}}."
            )
        allow_consumers(self.model)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self.wrapped = prepare_deepspeed(self.model, accelerator)
        else:
            if not placed:
                self.model.to(device=here)  # pyright: ignore[reportCallIssue]
            self.wrapped = accelerator.prepare_model(self.model, evaluation_mode=True)
            self.head = full_head(self.model).trimmed(self.head.vocab_size)

    def place(self, device: torch.device) -> None:
        """Moves to a device and answers in its own type, whatever the precision of a training around it."""
        if getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device=device)  # pyright: ignore[reportCallIssue]
        allow_consumers(self.model)
        self.wrapped = self.model
        self.head = full_head(self.model).trimmed(self.head.vocab_size)

    @torch.no_grad()
    def ask(self, inputs: dict[str, Any], supervised: Bool[Tensor, "batch position"]) -> DenseSignal:
        """Raises ValueError when a token is unknown to the teacher, or when it answers with NaN or infinity."""
        hidden = self.wrapped(**self._readable(inputs), consumer=lambda hidden, head: hidden[:, :-1][supervised])
        if not hidden.isfinite().all():
            raise ValueError(
                "The teacher's last hidden state is not finite. In fp16 its activations probably overflow: load it in "
                "bfloat16 or float32. Otherwise its weights are damaged."
            )
        return DenseSignal(hidden, self.head)

    def _readable(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs without padding tokens that only the student's vocabulary has."""
        ids, rows = inputs["input_ids"], self.model.get_input_embeddings().num_embeddings
        unknown = ids >= rows
        if not unknown.any():
            return inputs
        padding = inputs["attention_mask"] == 0 if "attention_mask" in inputs else torch.zeros_like(unknown)
        if (unknown & ~padding).any():
            raise ValueError(
                f"The text holds token {int(ids[unknown & ~padding][0])}, but the teacher has {rows} tokens. Remove "
                "the tokens that only the student knows from the text or its chat template."
            )
        return {**inputs, "input_ids": ids.masked_fill(unknown, 0)}


def _with_index(device: torch.device) -> torch.device:
    """`cuda` as `cuda:0`: the accelerator's own device may lack the index that a parameter's device always has."""
    return torch.empty(0, device=device).device
