"""A teacher in this process: a frozen transformers model."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel
from trl.models.utils import prepare_deepspeed

from mmkd.errors import UserError
from mmkd.models.backbone import allow_consumers, base_of, devices_of, full_head
from mmkd.models.heads import LMHead
from mmkd.models.sharded_weights import gathered, is_quantized, is_sharded, loads_on_one_rank, reshard, shard_frozen

from .signals import DenseSignal
from .teacher import DenseTeacher


class ModelTeacher(DenseTeacher):
    """A model in this process, which answers with hidden states and head: its logits exist one chunk at a time."""

    model: Any
    _sharded: bool = False
    """Whether each rank holds only a part of each weight, so that all must ask together."""

    def nothing(self) -> DenseSignal:
        """The signal about no token at all, without a forward pass."""
        head = full_head(self.model).trimmed(self.vocab_size)
        return DenseSignal(head.weight.new_empty(0, head.weight.shape[1]), head)

    def states(
        self, call: Callable[..., Tensor], inputs: Mapping[str, Any], supervised: Bool[Tensor, "batch position"]
    ) -> DenseSignal:
        """What a pass of `call`, the model or a wrapper of it, says at the supervised positions.

        Raises UserError when a token is unknown to the model, or when it answers with NaN or infinity.
        """
        heads: list[LMHead] = []

        def consumer(hidden: Tensor, head: LMHead) -> Tensor:
            # Aside, since wrappers look into the output. A sharded head is whole in here only, and gathered once.
            head = head.trimmed(self.vocab_size)
            heads.append(gathered(head) if self._sharded else head.detached())
            return hidden[:, :-1][supervised]

        hidden = call(**self._readable(inputs), consumer=consumer)
        if not hidden.isfinite().all():
            raise UserError(
                "The teacher's last hidden state is not finite. In fp16 its activations probably overflow: load it in "
                "bfloat16 or float32. Otherwise its weights are damaged."
            )
        return DenseSignal(hidden, heads[0])

    def _readable(self, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The inputs without padding tokens that only the student's vocabulary has."""
        ids, rows = inputs["input_ids"], base_of(self.model).get_input_embeddings().num_embeddings
        unknown = ids >= rows
        if not unknown.any():
            return inputs
        padding = inputs["attention_mask"] == 0 if "attention_mask" in inputs else torch.zeros_like(unknown)
        if (unknown & ~padding).any():
            raise UserError(
                f"The text holds token {int(ids[unknown & ~padding][0])}, but the teacher has {rows} tokens. Remove "
                "the tokens that only the student knows from the text or its chat template."
            )
        return {**inputs, "input_ids": ids.masked_fill(unknown, 0)}


class LocalTeacher(ModelTeacher):
    """A frozen model beside the student."""

    def __init__(self, model: PreTrainedModel, vocab_size: int | None = None):
        """`vocab_size` trims the padding rows of the teacher's vocabulary: the number of tokens both sides know."""
        self.model = model.eval().requires_grad_(False)
        head = full_head(self.model)
        self.vocab_size = head.vocab_size if vocab_size is None else vocab_size
        self.softcap = head.softcap

    def prepare(self, accelerator: Accelerator) -> None:
        """Takes its place on the accelerator's device: sharded where the student is (FSDP2, ZeRO-3), else whole.

        A quantised teacher stays whole on every rank under FSDP2, which cannot cut its weights. Raises UserError when
        it cannot come: its weights are on the meta device, or were placed by `device_map`.
        """
        sharded, here = is_sharded(accelerator), _with_index(accelerator.device)
        devices = devices_of(self.model)
        placed = getattr(self.model, "hf_device_map", None) is not None
        awaited = sharded and loads_on_one_rank(accelerator) and not accelerator.is_local_main_process
        if (torch.device("meta") in devices and not awaited) or (placed and devices != {here}):
            raise UserError(
                f"The teacher is on {', '.join(sorted(map(str, devices)))} and cannot be moved to the student's "
                f"device {here}. Load it without device_map, or with device_map="
                f"{{'': '{here}'}}.",
                because="not built",
            )
        if accelerator.distributed_type == DistributedType.DEEPSPEED and sharded and is_quantized(self.model):
            raise UserError(
                "The teacher is quantised, and ZeRO-3 cannot cut its weights. Use accelerate_config fsdp2, which "
                "leaves it whole on every rank, or zero2, or load the teacher in bfloat16.",
                because="upstream",
            )
        allow_consumers(self.model)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._sharded = sharded
            self.wrapped = prepare_deepspeed(self.model, accelerator)
        elif sharded and not is_quantized(self.model):
            self._sharded = True
            self.wrapped = shard_frozen(self.model, accelerator)
        else:
            if not placed:
                self.model.to(device=here)  # pyright: ignore[reportCallIssue]
            self.wrapped = accelerator.prepare_model(self.model, evaluation_mode=True)

    def place(self, device: torch.device) -> None:
        """Moves to a device and answers in its own type, whatever the precision of a training around it."""
        if getattr(self.model, "hf_device_map", None) is None:
            self.model.to(device=device)  # pyright: ignore[reportCallIssue]
        allow_consumers(self.model)
        self.wrapped = self.model

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any], supervised: Bool[Tensor, "batch position"]) -> DenseSignal:
        """See `states`."""
        if not (supervised.any() or self._sharded):
            return self.nothing()
        return self.differentiable(inputs, supervised)

    def differentiable(self, inputs: Mapping[str, Any], supervised: Bool[Tensor, "batch position"]) -> DenseSignal:
        """See `states`. Without `no_grad`, the states carry the gradient of what hooks put into the pass."""
        signal = self.states(self.wrapped, inputs, supervised)
        if self._sharded:
            reshard(self.model)
        return signal


def _with_index(device: torch.device) -> torch.device:
    """`cuda` as `cuda:0`: the accelerator's own device may lack the index that a parameter's device always has."""
    return torch.empty(0, device=device).device
