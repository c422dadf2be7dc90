"""Batches larger than memory: features first, the gradient of their loss, then each part of the batch again with it.

The loss of a contrastive batch is no sum over its parts, so that accumulating gradients would change it. Its gradient
by the features is computed of all parts at once, and each part is then given its share (GradCache, 2101.06983).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class RandomState:
    """The state of the random numbers that dropout reads, before a part of a batch was embedded."""

    device: torch.device
    cpu: Tensor
    own: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        """The state on the CPU and on a device."""
        own = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
        return cls(device, torch.get_rng_state(), own)

    @contextmanager
    def again(self) -> Iterator[None]:
        """What is computed in here draws the same numbers; what comes after goes on where it was."""
        devices = [] if self.own is None else [self.device]
        with torch.random.fork_rng(devices, device_type=self.device.type if devices else "cuda"):
            torch.set_rng_state(self.cpu)
            if self.own is not None:
                torch.get_device_module(self.device).set_rng_state(self.own, self.device)
            yield


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """What is computed in here leaves no trace: the means of batch normalisation would move once more by each part."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in kept:
                buffer.copy_(values)


@dataclass(frozen=True)
class PartGradients:
    """What the loss of the whole batch says of one of its parts."""

    features: Sequence[Tensor]
    """By its features."""
    parameters: Sequence[Tensor]
    """By parameters that the loss reads directly: the part's share of them."""
    state: RandomState
    value: Tensor
    """Its share of the loss, which is logged."""


def surrogate(features: Sequence[Tensor], parameters: Sequence[Tensor], given: PartGradients) -> Tensor:
    """A number with the value of the part's share of the loss, and with its gradient."""
    pairs = [*zip(features, given.features, strict=True), *zip(parameters, given.parameters, strict=True)]
    products = [(tensor.float() * gradient.float()).sum() for tensor, gradient in pairs if tensor.requires_grad]
    total = torch.stack(products).sum()
    return total - total.detach() + given.value


def shares(
    loss: Tensor,
    features: Sequence[Tensor],
    parameters: Sequence[Tensor],
    sizes: Sequence[int],
    states: Sequence[RandomState],
) -> list[PartGradients]:
    """The gradients of a loss of all parts, cut into the parts, which have so many rows each."""
    wanted = [tensor for tensor in (*features, *parameters) if tensor.requires_grad]
    computed = torch.autograd.grad(loss, wanted, allow_unused=True)
    known = {id(tensor): gradient for tensor, gradient in zip(wanted, computed, strict=True) if gradient is not None}
    by_features = [known.get(id(tensor), torch.zeros_like(tensor)).split(list(sizes)) for tensor in features]
    parts = len(sizes)
    by_parameters = [known.get(id(tensor), torch.zeros_like(tensor)) / parts for tensor in parameters]
    value = loss.detach() / parts
    return [
        PartGradients([each[part] for each in by_features], by_parameters, states[part], value)
        for part in range(parts)
    ]
