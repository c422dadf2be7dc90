"""bitsandbytes: what its layers do to a student that is trained."""

from typing import Any

from torch import nn


def keep_differentiable(model: nn.Module) -> None:
    """Keeps layers of 4 bits as they are when a model is evaluated on a CPU.

    On CPUs with instructions for bf16, bitsandbytes packs the weights of such a layer in its first forward pass in
    evaluation mode, for a kernel that has no gradient. Training after it goes on without an error, and without the
    gradients that pass through the layer.
    """
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "support_avx512bf16_for_cpu")]
    for layer in layers:
        layer.support_avx512bf16_for_cpu = False
