"""The learnt matrices that take features of the student to the width of the teacher's, apart from the student.

They are no part of the student: files, servers, wrappers and optimizers of the student never see them. Each rank has
all of them; their gradients are averaged over ranks once per optimizer step, in which an AdamW of their own moves them
at the student's learning rate.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmkd.errors import UserError

FILE = "feature_projectors.safetensors"
"""The file of a checkpoint with the projectors and the state of their optimizer."""

_MOMENTS = ("exp_avg", "exp_avg_sq", "step")

Widths = tuple[int, int]
"""(the student's, the teacher's)."""


class FeatureProjectors:
    """By the name of a term, made when its widths are first seen: in every run and on every rank the same.

    Args:
        args: settings of the training, of which those of Adam, the weight decay, the seed and max_grad_norm count.
        names: which terms may have one.
    """

    def __init__(self, args: Any, accelerator: Accelerator, names: Sequence[str]):
        self.args, self.accelerator, self.names = args, accelerator, tuple(names)
        self.widths: dict[str, Widths] = {}
        """Of the terms whose features were seen; once all ranks have agreed on one, it stays."""
        self._weights: dict[str, nn.Parameter] = {}
        self._optimizer: torch.optim.AdamW | None = None
        self._agreed: set[str] = set()

    def projected(self, name: str, features: Tensor, width: int, asked: str | None) -> Tensor:
        """The student's features at the teacher's width; `asked` is what the term says of a projector.

        Raises UserError where the widths differ and the term has no projector, or are others than before.
        """
        widths = (features.shape[-1], width)
        if self.widths.setdefault(name, widths) != widths:
            raise UserError(
                f"The features of feature_{name} are {widths[0]} and {widths[1]} numbers wide, and were "
                f"{self.widths[name][0]} and {self.widths[name][1]} before. Resume a run with the models that it was "
                "started with.",
                because="meaning",
            )
        if asked == "none" and widths[0] != width:
            raise UserError(
                f"feature_{name}: the student's features have {widths[0]} numbers and the teacher's {width}, and "
                "projector is none. Set projector: linear, or kind: relation, which compares any widths.",
                because="meaning",
            )
        if asked == "none" or (asked is None and widths[0] == width):
            return features
        weight = self._weight(name, widths, features.device)
        with torch.autocast(features.device.type, enabled=False):
            return nn.functional.linear(features.to(weight.dtype), weight)

    def _weight(self, name: str, widths: Widths, device: torch.device) -> nn.Parameter:
        if name not in self._weights:
            self._add(name, nn.Parameter(_initial(f"{self.args.seed} {name}", widths).to(device)))
        return self._weights[name]

    def _add(self, name: str, weight: nn.Parameter) -> None:
        self._weights[name] = weight
        if self._optimizer is None:
            args = self.args
            betas, decay = (args.adam_beta1, args.adam_beta2), args.weight_decay
            self._optimizer = torch.optim.AdamW([weight], 0.0, betas, args.adam_epsilon, decay)
        else:
            self._optimizer.add_param_group({"params": [weight]})

    @property
    def count(self) -> int:
        """How many numbers they have together."""
        return sum(weight.numel() for weight in self._weights.values())

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Moves them by the gradients of this optimizer step; all ranks call it together.

        A step whose gradients are not finite is left out, as the student's is in fp16.
        """
        self._agree()
        if self._optimizer is None:
            return
        weights = [self._weights[name] for name in sorted(self._weights)]
        scaler: Any = getattr(self.accelerator, "scaler", None)
        for weight in weights:
            gradient = torch.zeros_like(weight) if weight.grad is None else weight.grad
            if self.accelerator.num_processes > 1:
                gradient = self.accelerator.reduce(gradient, reduction="mean")
            assert isinstance(gradient, Tensor)
            weight.grad = gradient if scaler is None else gradient / scaler.get_scale()
        norm = nn.utils.clip_grad_norm_(weights, self.args.max_grad_norm or float("inf"))
        if norm.isfinite():
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate
            self._optimizer.step()
        self._optimizer.zero_grad()

    def _agree(self) -> None:
        """Ranks that have not seen the features of a term yet, since their rows have no images, hear of its widths."""
        if self.accelerator.num_processes == 1 or self._agreed >= set(self.names):
            return
        known: list[tuple[str, Widths, bool]] = gather_object(
            [(name, widths, name in self._weights) for name, widths in sorted(self.widths.items())]
        )
        for name, widths, learnt in known:
            self.widths.setdefault(name, widths)
            if learnt:
                self._weight(name, widths, self.accelerator.device)
        self._agreed = {name for name, _, _ in known}

    def save(self, folder: Path, writes: bool) -> None:
        """Writes them and the state of their optimizer, on the rank that `writes`; nothing where there are none."""
        if self._optimizer is None or not writes:
            return
        tensors: dict[str, Tensor] = {}
        for name, weight in self._weights.items():
            state = self._optimizer.state.get(weight, {})
            tensors[f"{name}/weight"] = weight.detach().cpu()
            tensors |= {f"{name}/{moment}": state[moment].cpu() for moment in _MOMENTS if moment in state}
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / FILE, metadata={"format": "pt"})

    def load(self, folder: Path) -> None:
        """Takes up those of a checkpoint. Raises UserError where it lacks one that is learnt here."""
        path = folder / FILE
        tensors = load_file(path) if path.is_file() else {}
        device = self.accelerator.device
        saved = sorted({key.rpartition("/")[0] for key in tensors})
        missing = [name for name in self._weights if name not in saved]
        if missing or any(name not in self.names for name in saved):
            name = next(iter([*missing, *(name for name in saved if name not in self.names)]))
            raise UserError(
                f"{path} has {'no' if missing else 'a'} projector for feature_{name}, and this run has "
                f"{'one' if missing else 'none'}: its run had other features. Resume with the keys that the run was "
                "started with, or begin again in another output_dir."
            )
        for name in saved:
            weight = tensors[f"{name}/weight"].to(device)
            if name in self._weights:
                self._weights[name].data.copy_(weight)
            else:
                self.widths[name] = (weight.shape[1], weight.shape[0])
                self._add(name, nn.Parameter(weight))
            moments = {part: tensors[f"{name}/{part}"] for part in _MOMENTS if f"{name}/{part}" in tensors}
            if self._optimizer is not None and moments:
                # The count of steps stays on the CPU, where AdamW keeps it.
                self._optimizer.state[self._weights[name]] = {
                    part: tensor if part == "step" else tensor.to(device) for part, tensor in moments.items()
                }


def _initial(key: str, widths: Widths) -> Tensor:
    """The identity for equal widths, else Xavier's weights, drawn by the key alone."""
    weight = torch.empty(widths[1], widths[0])
    if widths[0] == widths[1]:
        return nn.init.eye_(weight)
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big")
    return nn.init.xavier_uniform_(weight, generator=torch.Generator().manual_seed(seed))
