"""Sparse fine-tuning (LT-SFT): only the weights that a full fine-tuning moved most are trained.

LT-SFT (Ansell et al., ACL 2022, 2110.07560) fine-tunes everything, goes back to the beginning, and trains again what
had moved most. The first of these is a training of its own, whose result is `sparse_from`.
"""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter
from transformers.trainer_callback import TrainerCallback

from mmkd.errors import UserError
from mmkd.models.load import load_model
from mmkd.models.sharded_weights import is_sharded

FILE = "sparse_difference.safetensors"
"""For each weight NAME that has changed, NAME.places (of the flattened weight) and NAME.changes, to be added."""

_HALVINGS = 60


class SparseTuning(TrainerCallback):
    """Holds all other weights of a student at what they were, and writes the difference in the end.

    Raises UserError for a student with an adapter, one that is cut over devices, and a `sparse_from` of other shapes.
    """

    def __init__(self, trainer: Any):
        args, model = trainer.args, trainer.model
        if isinstance(model, PeftModel):
            raise UserError(
                "sparse_density trains some of the student's own weights, and use_peft trains none of them. Remove "
                "one of the two.",
                because="meaning",
            )
        if is_sharded(trainer.accelerator):
            raise UserError(
                "sparse_density compares whole weights, which FSDP2 and ZeRO-3 have cut. Use accelerate_config ddp or "
                "zero2.",
                because="not built",
            )
        self._trained: dict[str, Parameter] = {
            name: weight for name, weight in model.named_parameters() if weight.requires_grad
        }
        self._start = {name: weight.detach().clone() for name, weight in self._trained.items()}
        self._chosen = chosen_weights(self._start, _weights_of(args.sparse_from, self._start), args.sparse_density)
        for name, weight in self._trained.items():
            weight.register_hook(self._chosen[name].mul)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Puts back what weight decay moved."""
        with torch.no_grad():
            for name, weight in self._trained.items():
                weight.copy_(torch.where(self._chosen[name], weight, self._start[name]))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Writes the difference beside the student."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            save_file(self.difference(), folder / FILE)

    def difference(self) -> dict[str, Tensor]:
        """Places and changes of the weights that are trained."""
        tensors: dict[str, Tensor] = {}
        for name, weight in self._trained.items():
            places = self._chosen[name].flatten().nonzero()[:, 0]
            if len(places):
                changes = (weight.detach() - self._start[name]).flatten()[places]
                tensors |= {f"{name}.places": places.cpu(), f"{name}.changes": changes.cpu()}
        return tensors


def chosen_weights(start: dict[str, Tensor], tuned: dict[str, Tensor], density: float) -> dict[str, Tensor]:
    """Which entries are among the share `density` of all that differ most between the two.

    Raises UserError where nothing differs.
    """
    moved = {name: (tuned[name].to(weight) - weight).detach().abs() for name, weight in start.items()}
    most = max(float(change.max()) for change in moved.values())
    if most == 0:
        raise UserError(
            "sparse_from has the student's own weights, so that none of them has moved. Name the result of a "
            "training that began with this student.",
            because="meaning",
        )
    wanted = density * sum(change.numel() for change in moved.values())
    low, high = 0.0, most
    # Halving the interval needs no list of all changes, which would take more memory than the model.
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        count = sum(int((change >= middle).sum()) for change in moved.values())
        low, high = (middle, high) if count > wanted else (low, middle)
    return {name: change >= high for name, change in moved.items()}


def _weights_of(name: str, start: dict[str, Tensor]) -> dict[str, Tensor]:
    model = load_model(name, "sparse_from", dtype="auto")
    weights = {key: weight.detach() for key, weight in model.named_parameters()}
    for key, own in start.items():
        if key not in weights or weights[key].shape != own.shape:
            raise UserError(
                f"sparse_from {name} is no student of the same shape: {key} differs. Name the result of a training "
                "that began with this student.",
                because="meaning",
            )
    return weights
