"""Gradients in the last block of a decoder before the backward pass, where FSDP2 or ZeRO-3 have put it away."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from mmkd.errors import UserError
from mmkd.seams.deepspeed_seam import whole_for_now
from mmkd.seams.torch_seam import without_hooks

from .backbone import base_of, last_layer


class LastBlock:
    """The last block of a sharded model, run once more from what it was given, with whole weights.

    The hooks of FSDP2 and ZeRO-3 expect one backward pass per forward pass, in which they gather, reduce and free. A
    gradient that is taken before goes around them: from a loss to the last hidden state, where only the head is in
    between, and from there through a second pass of the block and of what follows it.
    """

    def __init__(self, model: PreTrainedModel | PeftModel):
        self._model, self._block = model, last_layer(model)
        self._call: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self._tail: list[nn.Module] = []
        self._random: tuple[Tensor, Tensor | None] | None = None
        self._hidden: Tensor | None = None
        self._recording = self._checked = False
        self._block.register_forward_pre_hook(self._begins, with_kwargs=True)
        for child in base_of(model).get_decoder().children():
            if not isinstance(child, nn.ModuleList):
                child.register_forward_hook(self._follows)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """A forward pass in it is one whose gradients may be asked for; it keeps what the block was given."""
        self._recording = True
        try:
            yield
        finally:
            self._recording = False
            self._call = self._random = self._hidden = None
            self._tail = []

    def ends_in(self, hidden: Tensor) -> None:
        """Takes the last hidden state of this pass, of which the losses are made."""
        self._hidden = hidden

    def gradients_of(self, losses: Sequence[Tensor]) -> Float[Tensor, "loss parameter"]:
        """The gradient of each loss with respect to what is trained in the block, in one row; the graph is kept."""
        assert self._hidden is not None, "the pass is not recorded"
        assert self._call is not None, "the last block was not run"
        seeds = [torch.autograd.grad(loss, self._hidden, retain_graph=True, materialize_grads=True) for loss in losses]
        with self._whole():
            hidden = self._again(*self._call)
            self._check(hidden)
            parameters = [parameter for parameter in self._block.parameters() if parameter.requires_grad]
            return torch.stack([self._row(hidden, parameters, seed) for (seed,) in seeds])

    @staticmethod
    def _row(hidden: Tensor, parameters: Sequence[Tensor], seed: Tensor) -> Tensor:
        gradients = torch.autograd.grad(hidden, parameters, seed, retain_graph=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in gradients])

    def _begins(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._recording and self._hidden is None:
            self._call, self._tail, self._random = (args, kwargs), [], _random_state()

    def _follows(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._recording and self._hidden is None and self._call is not None:
            self._tail.append(module)

    def _again(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The last hidden state; with the random numbers of the first pass, which dropout took."""
        assert self._random is not None
        processor, accelerator = self._random
        here = [] if accelerator is None else [torch.accelerator.current_device_index()]
        kind = "cuda" if accelerator is None else _accelerator().type
        with torch.enable_grad(), torch.random.fork_rng(here, device_type=kind):
            torch.set_rng_state(processor)
            if accelerator is not None:
                torch.get_device_module(kind).set_rng_state(accelerator)
            # `forward`, since a block that checkpoints its activations does so in its call.
            output = self._block.forward(*args, **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            for module in self._tail:
                output = module.forward(output)
        return output

    def _check(self, hidden: Tensor) -> None:
        """Raises UserError where the model does more after its last block than to call modules of its decoder."""
        ours, theirs = hidden.detach().float(), self._hidden
        assert theirs is not None
        if self._checked:
            return
        if ours.shape != theirs.shape or (ours - theirs.detach().float()).abs().max() > 0.02 * ours.abs().max():
            raise UserError(
                f"combine: gradmag compares gradients in the last layer, which {type(base_of(self._model)).__name__} "
                "does not run as its decoder's last block and the layers after it. Set combine: weights, or train "
                "with accelerate_config ddp or zero2.",
                because="not built",
            )
        self._checked = True

    @contextmanager
    def _whole(self) -> Iterator[None]:
        parts = [self._block, *self._tail]
        parameters = [parameter for part in parts for parameter in part.parameters()]
        owner = self._owner() if any(isinstance(parameter, DTensor) for parameter in parameters) else None
        with without_hooks(parts), whole_for_now(parameters):
            if owner is not None:
                owner.unshard()
            try:
                yield
            finally:
                if owner is not None:
                    owner.reshard()

    def _owner(self) -> FSDPModule:
        """What gathers the block: itself, or what FSDP wraps around it to checkpoint activations."""
        owners = [module for module in self._model.modules() if isinstance(module, FSDPModule)]
        return [owner for owner in owners if any(part is self._block for part in owner.modules())][-1]


def _accelerator() -> torch.device:
    device = torch.accelerator.current_accelerator()
    assert device is not None
    return device


def _random_state() -> tuple[Tensor, Tensor | None]:
    """Those of the processor and of the accelerator, if there is one."""
    if not torch.accelerator.is_available():
        return torch.get_rng_state(), None
    return torch.get_rng_state(), torch.get_device_module(_accelerator().type).get_rng_state()
