"""Settings that methods share whose Trainer is transformers' own: the whole model is trained, and not on text."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from mmkd.field_docs import DocumentedFields
from mmkd.preparation.checks import without_emulated_bf16
from mmkd.schema import check_fields
from mmkd.seams.trainer_seam import take_one_gpu


@dataclass
class WholeModelConfig(DocumentedFields, TrainingArguments):
    """Settings of a training of a whole model."""

    trust_remote_code: bool = field(
        default=False,
        metadata={
            "help": "Run code that comes with models from the Hub. Default: false, since that code can do anything."
        },
    )

    emulated_bf16: bool = field(
        init=False,
        default=False,
        metadata={"help": "Whether bf16 was asked for and is computed in fp32, since this CPU would only emulate it."},
    )

    def __post_init__(self) -> None:
        check_fields(self, besides=TrainingArguments)
        # transformers wants this said before it allows bf16 on a machine without an accelerator.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        # The collator reads columns that no model takes.
        self.remove_unused_columns = False
        super().__post_init__()
        take_one_gpu(self)
        self.emulated_bf16 = without_emulated_bf16(self)
