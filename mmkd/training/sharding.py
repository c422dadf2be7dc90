"""What trainers share about sharded models: FSDP2 as it should be, and checkpoints that become one student."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch.distributed.fsdp import StateDictType

from mmkd.models.sharded_weights import (
    allow_fsdp_on_cpu,
    checkpoint_under_adapters,
    cut_by_layers,
    is_cut,
    reshard,
    settle_fsdp,
)
from mmkd.seams.trainer_seam import HookedTrainer
from mmkd.teachers.batch import Batch


class ShardedTrainer(HookedTrainer):
    """transformers' Trainer under FSDP2 and ZeRO-3."""

    # transformers types these as unions with None, for trainers that are still without them.
    model: Any
    optimizer: Any
    processing_class: Any

    def before_accelerator(self) -> None:
        """Lets FSDP2 run without a GPU too."""
        super().before_accelerator()
        allow_fsdp_on_cpu(bool(self.args.fsdp))

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's; FSDP2 also without a GPU, with its own activation checkpointing."""
        checkpoints, self.args.activation_checkpointing = self.args.activation_checkpointing, False
        super().create_accelerator_and_postprocess()
        settle_fsdp(self.accelerator, bool(checkpoints))
        self.args.activation_checkpointing = checkpoints and not self.is_fsdp_enabled

    def before_wrapping(self, training: bool) -> None:
        """Tells FSDP how to cut the student."""
        super().before_wrapping(training)
        if training:
            # An evaluation leaves weights whole that accelerate would not find again among the optimizer's.
            reshard(self.model)
        cut_by_layers(self.accelerator, self.model)
        checkpoint_under_adapters(self.accelerator, self.model)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; a student that FSDP2 is to shard is sharded before its first training, too."""
        if self.is_fsdp_enabled and not is_cut(self.model):
            self._cut_early()
        return super().evaluation_loop(*args, **kwargs)

    def _cut_early(self) -> None:
        """Shards the student as a training does it: accelerate takes it together with its optimizer only."""
        self.before_wrapping(False)
        self.create_optimizer()
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped = self.model
        # It has been applied, and a training after this would wrap every layer once more.
        plugin: Any = self.accelerator.state.fsdp_plugin
        plugin.activation_checkpointing = False

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The Trainer's, which leaves a student in sharded checkpoints alone.

        Such a checkpoint gets what `mmkd consolidate` needs besides the shards; what a user asks for is the whole.
        """
        plugin: Any = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
        if plugin is None or plugin.state_dict_type != StateDictType.SHARDED_STATE_DICT:
            super().save_model(output_dir, _internal_call)
        elif not _internal_call:
            plugin.state_dict_type = StateDictType.FULL_STATE_DICT
            super().save_model(output_dir)
            plugin.state_dict_type = StateDictType.SHARDED_STATE_DICT
        elif self.args.should_save:
            folder = Path(output_dir or self.args.output_dir or ".")
            folder.mkdir(parents=True, exist_ok=True)
            model: Any = self.accelerator.unwrap_model(self.model)
            # A folder with both configs would be taken for one with a whole model.
            config = model.active_peft_config if isinstance(model, PeftModel) else model.config
            config.save_pretrained(str(folder))
            self.processing_class.save_pretrained(folder)


def without_repeated_rows(batch: Batch, accelerator: Accelerator) -> Batch:
    """The batch without the labels of rows that ranks repeat to make the last batch of an evaluation even."""
    state, labels, lengths = accelerator.gradient_state, batch.student.labels, batch.row_lengths
    if accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return batch
    rows = int((lengths > 0).sum())
    real = max(0, state.remainder - accelerator.process_index * rows)
    kept = torch.zeros_like(labels, dtype=torch.bool)
    if len(labels) == len(lengths):
        kept[:real] = True
    else:
        kept[:, : lengths[:real].sum()] = True
    return batch.with_labels(labels.masked_fill(~kept, -100))
