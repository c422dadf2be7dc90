"""A dual encoder that trains with an adapter or in shards, made the ordinary model again that its package loads."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmkd.errors import UserError

from .dual_encoder import PAIR_HEADS, DualEncoder

_ALL_LINEAR = "all-linear"


def add_adapter(encoder: DualEncoder, config: PeftConfig) -> PeftModel:
    """Freezes an encoder and puts an adapter into its modules, which stay where they are.

    Without target_modules, and with all-linear, every linear layer has one. Raises UserError for modules that the
    encoder does not have.
    """
    for parameter in encoder.model.parameters():
        parameter.requires_grad_(False)
    return put_adapter(encoder.trunk, config, encoder.name)


def put_adapter(model: nn.Module, config: PeftConfig, name: str) -> PeftModel:
    """The same of the modules of an encoder."""
    config = copy.copy(config)
    # PEFT would look for the head of a language model.
    config.task_type = None
    targets, parameters = (getattr(config, key, None) for key in ("target_modules", "target_parameters"))
    if targets == _ALL_LINEAR or (targets is None and parameters is None):
        config.target_modules = linear_layers(model)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        adapted: Any = get_peft_model(model, config)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise UserError(
            f"The student {name} cannot have this adapter: {error} Leave lora_target_modules out: all linear layers "
            "then have one."
        ) from error
    return adapted


def linear_layers(model: nn.Module) -> list[str]:
    """The names of a model's linear layers that an adapter can change the output of."""
    # It multiplies by the weights of its layers without calling them.
    whole = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not any(name.startswith(f"{outer}.") for outer in whole)
    ]


class WholeStudent:
    """The modules of a student as they are before heads and wrappers, without weights.

    Make it before the student is wrapped: FSDP2's modules cannot be copied.
    """

    def __init__(self, student: DualEncoder, adapted: PeftModel | None):
        self._student, self.has_adapter = student, adapted is not None
        # Parameters are looked up before they are copied.
        empty = {id(own): _without_data(own) for own in student.model.parameters()}
        self._modules: Any = copy.deepcopy((student.model, adapted), empty)

    def filled(self, weights: Mapping[str, Tensor]) -> DualEncoder:
        """The student with weights as its modules name them in training, on the CPU, its adapter merged."""
        model, adapted = copy.deepcopy(self._modules)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        own = {
            # FSDP2 takes no tensors without a dimension.
            name: tensor.detach().to("cpu", copy=True).reshape(shapes[name])
            for name, tensor in weights.items()
            if PAIR_HEADS not in name
        }
        model.load_state_dict(own, assign=True)
        if adapted is not None:
            adapted.merge_and_unload()
        whole = copy.copy(self._student)
        whole.model = model
        return whole


def _without_data(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)


def is_of_transformers(student: DualEncoder) -> bool:
    """Whether transformers' Trainer can save and load a student, rather than its own package."""
    return student.trunk is student.model and isinstance(student.model, PreTrainedModel)


def give_dimension(model: nn.Module) -> None:
    """Makes single numbers of a model, such as a scale, tensors of one entry: FSDP2 cuts along the first dimension."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                setattr(module, name, nn.Parameter(parameter.detach().reshape(1), parameter.requires_grad))


def save_trained(model: nn.Module, path: Path) -> None:
    """Writes the weights of a model that are trained, but for heads of its distillation."""
    trained = {name: own.detach().contiguous() for name, own in model.named_parameters() if own.requires_grad}
    save_file({name: own for name, own in trained.items() if PAIR_HEADS not in name}, str(path))


def load_trained(model: nn.Module, path: Path) -> None:
    """Reads what `save_trained` wrote. Raises UserError for a checkpoint without it, and for one of other modules."""
    if not path.is_file():
        raise UserError(
            f"{path.parent} is no checkpoint of a training with an adapter: it has no {path.name}. Resume with the "
            "settings that it was made with."
        )
    weights = load_file(str(path))
    unknown = model.load_state_dict(weights, strict=False).unexpected_keys
    if unknown:
        raise UserError(
            f"{path} has weights of {unknown[0]}, which this student does not train. Resume with the settings of the "
            "adapter that it was made with."
        )
