"""inherit: auto in a training: masks that are learnt beside the student, decided on the way, and cut in the end."""

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from mmkd.models.dual_encoder import DualEncoder
from mmkd.models.shrinking import Shrinking
from mmkd.models.shrinking_cut import cut_model
from mmkd.training.gathering import ranks

from .inherit_config import InheritConfig

MASKS_FILE = "learnt_masks.pt"
"""Masks and their optimizers in a checkpoint."""

_RATE, _WAY = 0.02, 20.0
"""TinyCLIP's learning rate, and the way that a mask's logit goes from open to closed, with room to spare."""


class LearntMasks(TrainerCallback):
    """The masks of a student, their two optimizers, and when they are decided."""

    def __init__(self, model: Any, settings: InheritConfig, seed: int, device: torch.device):
        self.model, self.settings, self.seed = model, settings, seed
        self.shrinking = Shrinking(model, settings.targets).to(device)
        self.progress = 0.0
        self._optimizers: list[torch.optim.Optimizer] = []
        self._restored: list[dict[str, Any]] = []

    @classmethod
    def of(cls, student: DualEncoder, args: Any) -> "LearntMasks | None":
        """Those that settings ask for. Raises UserError for a student whose modules have no masks."""
        if not args.learns_masks:
            return None
        return cls(student.model, args, args.seed, args.device)

    def kept_share(self) -> Tensor:
        """The expected share of the layers' weights that is left, mean of both towers."""
        shares = [self.shrinking.masks_of(tower).expected_share() for tower in self.shrinking.towers]
        return torch.stack(shares).mean().detach()

    def penalty(self) -> Tensor:
        """The constraint's part of the loss of a step."""
        return self.shrinking.penalty(self.progress)

    def on_train_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Makes the optimizers, as a checkpoint has them."""
        self._make(state.max_steps)
        for optimizer, kept in zip(self._optimizers, self._restored, strict=False):
            optimizer.load_state_dict(kept)
        self._restored = []

    def on_step_begin(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Draws the masks of the step, or decides them."""
        done = state.global_step / max(1, state.max_steps)
        self.progress = done / self.settings.inherit_ramp
        if done >= self.settings.inherit_freeze:
            self.shrinking.freeze()
        self.shrinking.sample(self.seed, state.global_step)

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Moves masks down and multipliers up, by the mean gradient of all ranks."""
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if ranks() > 1 and parameter.requires_grad:
                        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                        dist.all_reduce(gradient)
                        parameter.grad = gradient / ranks()
            if not bool(self.shrinking.frozen):
                optimizer.step()
            optimizer.zero_grad()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Decides the masks of a training that was ended early."""
        self.shrinking.freeze()

    def cut(self, student: DualEncoder) -> DualEncoder:
        """The smaller student. Masks that are not decided yet are decided as they stand."""
        small = copy.copy(student)
        small.model = cut_model(self.model, self.shrinking)
        return small

    def save(self, folder: Path) -> None:
        """Writes masks and optimizers into a checkpoint."""
        optimizers = [optimizer.state_dict() for optimizer in self._optimizers]
        torch.save({"masks": self.shrinking.state_dict(), "optimizers": optimizers}, folder / MASKS_FILE)

    def restore(self, folder: Path) -> None:
        """Reads them again."""
        path = folder / MASKS_FILE
        if not path.is_file():
            return
        kept = torch.load(path, map_location="cpu", weights_only=True)
        self.shrinking.load_state_dict(kept["masks"])
        self._restored = kept["optimizers"]

    def _make(self, max_steps: int) -> None:
        named = dict(self.shrinking.named_parameters())
        multipliers = [parameter for name, parameter in named.items() if name.endswith("multipliers")]
        logits = [parameter for name, parameter in named.items() if not name.endswith("multipliers")]
        ramp = max(1.0, max_steps * self.settings.inherit_ramp)
        rate = self.settings.inherit_learning_rate or max(_RATE, _WAY / ramp)
        # Open masks have gradients far below the usual eps, which would hold them back.
        down = torch.optim.AdamW(logits, lr=rate, weight_decay=0, betas=(0.8, 0.99), eps=1e-15)
        self._optimizers = [down, torch.optim.AdamW(multipliers, lr=rate, weight_decay=0, maximize=True)]
