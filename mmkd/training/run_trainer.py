"""What running a recipe needs of a trainer, whatever its method predicts."""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedModel, TrainingArguments

from mmkd.models.restore import renamed_on_disk, restore
from mmkd.seams.peft_seam import is_adapted

from .checkpoint_files import check_checkpoint, damage_named, write_checksums
from .counts import CountingTrainer
from .log import RunLog
from .progress import show_progress
from .publishing import PublishingTrainer
from .sharding import ShardedTrainer


class RunTrainer(PublishingTrainer, ShardedTrainer, CountingTrainer):
    """transformers' Trainer with reports, a log on disk, students restored whole, FSDP2, and cards of what it made."""

    method: ClassVar[str]
    config_class: ClassVar[type[TrainingArguments]]
    needs_teacher: ClassVar[bool] = True
    """Whether its loss is nothing without a teacher."""

    takes_several: ClassVar[bool] = False
    """Whether several teachers may teach at a time."""

    teacher_keys: ClassVar[tuple[str, ...]] = ()
    """Of its settings, those that each of several teachers may have for itself."""

    def __init__(self, *args: Any, callbacks: list[Any] | None = None, **kwargs: Any):
        super().__init__(*args, callbacks=[RunLog(), *(callbacks or [])], **kwargs)
        self._progress = show_progress(self)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; an error leaves the terminal as it was."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._progress is not None:
                self._progress.close()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; one that stands alone leaves the terminal as it was."""
        try:
            return super().evaluation_loop(*args, **kwargs)
        finally:
            if self._progress is not None and not self.is_in_train:
                self._progress.close()

    def checkpoint_saved(self, checkpoint: Path) -> None:
        """Notes what its files are, when all ranks have written theirs."""
        super().checkpoint_saved(checkpoint)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            write_checksums(checkpoint)

    def before_restoring(self, checkpoint: Path) -> None:
        """Raises UserError for a checkpoint that is damaged."""
        check_checkpoint(checkpoint, self.accelerator.process_index, self.accelerator.num_processes)
        super().before_restoring(checkpoint)

    def restoring(self, checkpoint: Path) -> AbstractContextManager[Any]:
        """Errors of reading name the checkpoint."""
        return damage_named(checkpoint)

    def weights_restored(self, checkpoint: Path) -> None:
        """Loads what the Trainer, which looks for the model's own names, silently left out."""
        super().weights_restored(checkpoint)
        # Weights that are in shards, or hold an adapter, come from files of their own.
        elsewhere = self.is_fsdp_enabled or self.is_deepspeed_enabled or any(map(is_adapted, self.model.modules()))
        if isinstance(self.model, PreTrainedModel) and not elsewhere and renamed_on_disk(self.model, checkpoint):
            restore(self.model, checkpoint)
