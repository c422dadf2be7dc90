"""Memory and work of training a model whole, such as a classifier or a tower, counted on a model without data."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, TrainingArguments

from mmkd.seams.torch_seam import storage_key, without_data

from .count import counted
from .estimate import optimizer_bytes
from .hardware import GIB, USABLE, Device


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


@dataclass(frozen=True)
class WholePlan:
    """What a training of a whole model takes on each of some devices."""

    parts: Mapping[str, float]
    """Bytes on one device by what they are for."""
    seconds: float
    """Of computing an optimizer step."""
    steps: int
    left_out: str = ""
    """What is not among the parts."""
    first: Mapping[str, str] = field(default_factory=dict[str, str])
    """Rows of the table before the seconds."""
    of_step: Mapping[str, str] = field(default_factory=dict[str, str])
    """Rows about a step, after the seconds."""
    once: Mapping[str, str] = field(default_factory=dict[str, str])
    """Rows about what is done once, before the cost."""
    hours_once: float = 0.0
    """Device-hours of it."""

    def show(
        self, recipe: str, batch: str, device: Device, devices: int, price: float | None, console: Console
    ) -> int:
        """Prints the plan of a recipe and what a device has of a batch; returns 0 when it fits one, 1 when not."""
        total = sum(self.parts.values())
        fits = total <= USABLE * device.memory
        hours = self.steps * self.seconds * devices / 3600
        rows = {f"GiB on one device: {name}": f"{size / GIB:,.2f}" for name, size in self.parts.items()}
        rows |= {f"in all{self.left_out}": f"{total / GIB:,.2f}", "fits": "yes" if fits else "no"}
        rows |= {**self.first, "seconds computing a step": f"{self.seconds:,.3g}", **self.of_step}
        rows |= {"steps of the run": f"{self.steps:,}", "device-hours of the run": f"{hours:,.3g}", **self.once}
        if price is not None:
            rows["cost"] = f"{price * (hours + self.hours_once):,.2f}"
        table = Table(box=box.SIMPLE, show_header=False)
        for name, value in rows.items():
            table.add_row(name, value, style="bold" if name.startswith("in all") else None)
        console.print(
            f"mmkd plan {recipe}: {devices} x {device.name} ({device.memory / GIB:.0f} GiB), {batch}.", highlight=False
        )
        console.print(table)
        console.print("Reading and decoding pictures is not counted, which small students often wait for.")
        return 0 if fits else 1
