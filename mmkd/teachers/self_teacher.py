"""The student as its own teacher: as it was before training, as it is now, or an average of the steps between."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Bool
from peft import PeftModel
from torch import Tensor

from mmkd.models.backbone import full_head
from mmkd.models.kept_weights import KeptWeights
from mmkd.models.quantised_students import quantisation_off
from mmkd.models.sharded_weights import called, is_sharded, reshard
from mmkd.seams.peft_seam import adapters_off, adapts_weights_of_its_own

from .local import ModelTeacher
from .signals import DenseSignal

FORMS = ("base", "live", "ema")


class SelfTeacher(ModelTeacher):
    """The student of the training that it is given to, which needs no second model in memory.

    Args:
        form: `base` is the student before training: a student with an adapter without it, another one with a copy of
            its first weights. `live` is the student of now. `ema` is the exponential moving average of the weights
            that are trained.
        decay: of the average: how much of it is kept at an update.
        every: optimizer steps between updates of the average.
    """

    def __init__(self, form: str = "base", decay: float = 0.95, every: int = 1):
        self.form, self.decay, self.every = form, decay, every

    def reads_with(self, processing_class: Any) -> None:
        """Called with the student's tokenizer or processor, before there is a student."""
        self.processing_class = processing_class

    def bind(self, model: Any, accelerator: Accelerator) -> None:
        """Makes it the teacher of the training of this student; called once, when the student is complete."""
        self.model, self._accelerator, self._sharded = model, accelerator, is_sharded(accelerator)
        head = full_head(model)
        self.vocab_size, self.softcap = head.vocab_size, head.softcap
        self.weights = KeptWeights(model)

    @property
    def switches_off(self) -> bool:
        """Whether it is the student without its adapter, so that nothing is kept for it."""
        return self.form == "base" and isinstance(self.model, PeftModel) and adapts_weights_of_its_own(self.model)

    @property
    def copies(self) -> bool:
        """Whether it keeps copies of the weights that are trained."""
        return self.form == "ema" or (self.form == "base" and not self.switches_off)

    def described(self) -> str:
        """What it is and what it keeps in memory, for a reader."""
        if self.switches_off:
            return "the student without its adapter; keeps no copy"
        what = {"base": "the student before training", "live": "the student as it is now"}
        what["ema"] = f"the average of the student's weights (decay {self.decay:g}, every {self.every} steps)"
        if not self.copies:
            return f"{what[self.form]}; keeps no copy"
        trained = sum(parameter.numel() for parameter in self.model.parameters() if parameter.requires_grad)
        return f"{what[self.form]}; keeps a copy of the {trained:,} parameters that are trained"

    def prepare(self, accelerator: Accelerator) -> None:
        """Nothing: the student takes its place itself."""

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any], supervised: Bool[Tensor, "batch position"]) -> DenseSignal:
        """See `states`."""
        if not (supervised.any() or self._sharded):
            return self.nothing()
        with self._as_it_teaches(), called(self.model, self._accelerator) as call:
            signal = self.states(call, inputs, supervised)
        return signal

    @contextmanager
    def _as_it_teaches(self) -> Iterator[None]:
        """In it the student computes as the teacher does: without dropout, and with the teacher's weights."""
        training = [module for module in self.model.modules() if module.training]
        self.model.eval()
        # Autocast remembers weights in the shorter type, without gradient and by their place in memory.
        torch.clear_autocast_cache()
        self._settle()
        weights = adapters_off(self.model) if self.switches_off else self.weights.in_use()
        # The student before training is the original; what it is now, and an average, are to be quantised as it is.
        precision = quantisation_off(self.model) if self.form == "base" else nullcontext()
        try:
            with weights, precision, self._accelerator.autocast():
                yield
        finally:
            torch.clear_autocast_cache()
            for module in training:
                module.training = True

    def _settle(self) -> None:
        """Frees what FSDP2 keeps gathered, so that the student's parameters are its shards."""
        if self._sharded:
            reshard(self.model)

    # What a training tells it

    def training_changes(self) -> None:
        """Called before the student's weights change for the first time: of the first weights a copy is kept."""
        if self.form == "base" and self.copies and not self.weights.kept:
            self._settle()
            self.weights.keep()

    def training_begins(self, checkpoint: Path | None) -> None:
        """Called when the student's weights are in place: the average begins with them, or goes on as it was saved."""
        self.training_changes()
        if self.form == "ema":
            self._settle()
            if checkpoint is None:
                self.weights.keep(summed=True)
            else:
                self.weights.load(checkpoint)

    def step_ended(self, step: int) -> None:
        """Called after each optimizer step."""
        if self.form == "ema" and step % self.every == 0:
            self._settle()
            self.weights.follow(self.decay)

    def save(self, path: Path, writes: bool) -> None:
        """Saves the average in a file, on the rank that `writes`; all ranks must call it together."""
        if self.form == "ema":
            self._settle()
            self.weights.save(path, writes)
