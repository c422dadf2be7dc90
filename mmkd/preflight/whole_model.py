"""Memory and work of training a model whole, such as a classifier or a tower, counted on a model without data."""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from mmkd.seams.torch_seam import storage_key, without_data

from .count import counted
from .estimate import optimizer_bytes


def training_state(student: PreTrainedModel, args: TrainingArguments) -> dict[str, float]:
    """Bytes that stay on a device from step to step, by what they are for."""
    tensors = [*student.parameters(), *student.buffers()]
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    return {
        "student weights": sum(tensor.numel() * tensor.element_size() for tensor in tensors),
        "gradients": sum(parameter.numel() * parameter.element_size() for parameter in trained),
        "optimizer": optimizer_bytes(args) * sum(parameter.numel() for parameter in trained),
    }


def training_pass(model: Any, shapes: dict[str, tuple[int, ...]], bf16: bool) -> tuple[float, float]:
    """FLOPs of a forward and a backward pass of a model without data, and the bytes kept between the two."""
    with without_data():
        model.to_empty(device="cpu")
        model.train()
        weights = {storage_key(part) for part in (*model.parameters(), *model.buffers())}
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            if storage_key(tensor) not in weights:
                saved[storage_key(tensor)] = tensor.untyped_storage().nbytes()
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
            torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        ):
            output, forward = counted(lambda: model(**zeros_of(shapes)))
        total = torch.stack([part.sum() for part in _tensors(output)]).sum()
        backward = counted(total.backward)[1]
    return forward + backward, float(sum(saved.values()))


def _tensors(output: Any) -> list[Tensor]:
    return [part for part in output.values() if isinstance(part, Tensor) and part.requires_grad]


def zeros_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """Inputs of a model, by name and shape."""
    return {
        name: torch.zeros(shape, dtype=torch.long if name == "input_ids" else torch.float32)
        for name, shape in shapes.items()
    }
