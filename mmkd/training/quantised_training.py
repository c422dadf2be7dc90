"""The part of a training in which the student computes as it will when it is quantised, and what is saved of that."""

import json
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import AutoConfig, BitsAndBytesConfig
from transformers.utils import logging

from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.models.backbone import base_of
from mmkd.models.quantised_students import (
    StudentQuantisation,
    quantise_forward,
    quantised_experts,
    record_in_config,
    recorded_beside,
    recorded_in_config,
    replaces_dropout,
)
from mmkd.models.sharded_weights import is_sharded
from mmkd.results.trained_as import BASE, FILE
from mmkd.seams.trainer_seam import HookedTrainer

logger = logging.get_logger(__name__)


_BASE_KEYS = {"load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}
_BASE_KEYS |= {"llm_int8_skip_modules"}
"""What of a quantised base decides its values."""


class QuantisedTrainer(HookedTrainer):
    """transformers' Trainer with a student that may compute with quantised values."""

    # transformers types these as unions with None, for trainers that are still without them.
    args: Any
    model: Any

    def quantise_student(self) -> None:
        """Lets the student compute as the settings say, before it is asked anything.

        Raises UserError for a student that cannot.
        """
        quantisation: StudentQuantisation | None = self.args.quantisation
        before = recorded_in_config(base_of(self.model).config)
        record_in_config(self.model, quantisation)
        if quantisation is None:
            if before is not None:
                logger.warning(
                    f"The student was trained as {before.described()}, and this run trains it in full precision. "
                    f"Set student_quantization: {before.format} to go on as before."
                )
            return
        adapted = isinstance(self.model, PeftModel)
        zero3 = self.is_deepspeed_enabled and is_sharded(self.accelerator)
        if zero3 and quantised_experts(self.model, quantisation):
            raise UserError(
                "student_quantization replaces the weights of experts for a pass, and ZeRO-3 keeps books of weights. "
                "Use accelerate_config fsdp2, zero2 or ddp, or leave the experts out: student_quantization_skip: "
                "[experts, router].",
                because="not built",
            )
        if zero3 and (adapted or quantisation.format == "nvfp4"):
            raise UserError(
                "student_quantization reads weights of several layers at a time, of an adapter or of the layers that "
                "nvfp4 gives one scale, and ZeRO-3 gathers those of one layer. Use accelerate_config fsdp2, zero2 or "
                "ddp.",
                because="upstream",
            )
        quantise_forward(self.model, quantisation)
        if adapted and replaces_dropout(self.model):
            logger.warning(
                "lora_dropout is not applied: with student_quantization the adapter is merged into the weight before "
                "it is rounded, as in deployment. Set lora_dropout: 0 to say so yourself."
            )

    def weights_to_save(self, folder: Path, weights: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """Writes beside an adapter as what the model was trained; a whole student's config.json says it."""
        trained = self._trained_as()
        if trained and isinstance(self.model, PeftModel):
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / FILE, json.dumps(trained, indent=1) + "\n")
        return super().weights_to_save(folder, weights)

    def _trained_as(self) -> dict[str, Any]:
        if self.args.quantisation is not None:
            return self.args.quantisation.as_dict()
        loaded: Any = getattr(base_of(self.model).config, "quantization_config", None)
        if not isinstance(loaded, BitsAndBytesConfig):
            return {}
        return {BASE: {name: value for name, value in loaded.to_dict().items() if name in _BASE_KEYS and value}}

    def before_restoring(self, checkpoint: Path) -> None:
        """Raises UserError for a checkpoint that was trained as something else."""
        super().before_restoring(checkpoint)
        whole = (checkpoint / "config.json").is_file()
        if not whole and not (checkpoint / "adapter_config.json").is_file():
            return
        before = recorded_in_config(AutoConfig.from_pretrained(checkpoint)) if whole else recorded_beside(checkpoint)
        if before != self.args.quantisation:
            was, now = (
                "in full precision" if how is None else f"as {how.described()}"
                for how in (before, self.args.quantisation)
            )
            raise UserError(
                f"{checkpoint} was trained {was}, and this run trains {now}. Resume with the keys "
                "that the run was started with. To go on in another format, name the checkpoint as the student of "
                "a new run.",
                because="meaning",
            )
