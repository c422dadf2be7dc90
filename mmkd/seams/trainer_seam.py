"""The private places of transformers' Trainer in which mmkd takes part, each by a hook with a name."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


class Unlogged(NamedTuple):
    """What the Trainer has seen since its last log."""

    loss: Tensor
    """The sum of this rank's losses."""
    logged_step: int
    """The step of that log."""


class HookedTrainer(Trainer):
    """transformers' Trainer, which calls hooks where its callbacks do not reach.

    A hook does nothing here; a subclass that overrides one calls `super()`'s too. All are called on every rank.
    """

    state_name: ClassVar[str] = ""
    """Under which name checkpoints hold the state of `state_to_save`; without a name they hold none."""

    def before_accelerator(self) -> None:
        """Called before accelerate is set up: it is what decides how models are spread over ranks."""

    def before_wrapping(self, training: bool) -> None:
        """Called before the model is wrapped for its ranks, to train or to be evaluated."""

    def training_starts(self) -> None:
        """Called at the start of every training, before a checkpoint's state is restored."""

    def state_to_save(self) -> dict[str, Any]:
        """What a checkpoint is to hold beside the Trainer's state, as JSON can say it."""
        return {}

    def state_restored(self, state: dict[str, Any] | None) -> None:
        """Called with what `state_to_save` gave the checkpoint that is resumed; None: the checkpoint has none."""

    def before_restoring(self, checkpoint: Path) -> None:
        """Called before the weights of the checkpoint that is resumed replace those of the model."""

    def weights_restored(self, checkpoint: Path) -> None:
        """Called once the weights of a checkpoint, the resumed one or the best, are back in the model."""

    def weights_to_save(self, folder: Path, weights: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
        """The weights to save in a folder; None: those that the model itself gives."""
        return weights

    def saved_otherwise(self, folder: Path, weights: dict[str, Tensor] | None) -> bool:
        """Writes a model that the Trainer cannot, of another package than transformers; False: it is the Trainer's.

        `weights` are those that FSDP or DeepSpeed gathered on the first rank; None: those in the model.
        """
        return False

    def restoring(self, checkpoint: Path) -> AbstractContextManager[Any]:
        """In it, something of a checkpoint that is resumed is read."""
        return nullcontext()

    def checkpoint_saved(self, checkpoint: Path) -> None:
        """Called on every rank when a checkpoint is complete."""

    def restored_otherwise(self, checkpoint: Path) -> bool:
        """Reads the weights of a checkpoint that `saved_otherwise` wrote; False: they are the Trainer's."""
        return False

    def checkpoint_to_save(self, folder: Path) -> None:
        """Called when a checkpoint gets what a training needs to go on, before its state tells that it is complete."""

    def checkpoint_restored(self, folder: Path) -> None:
        """Called when a resumed training takes up what `checkpoint_to_save` stood beside: optimizer and schedule."""

    def before_pushing(self, checkpoint: Path) -> None:
        """Called before a checkpoint is copied to the folder that is pushed to the Hub."""

    def columns_to_keep(self) -> list[str]:
        """Columns of the data that the collator reads besides what the model takes."""
        return []

    def collator_of(self, training: bool) -> Any:
        """What makes batches: of the rows of training, or of those of an evaluation."""
        return self.data_collator

    def on_device(self, inputs: Any) -> Any:
        """A batch on the model's device, as a step takes it; without an override as the Trainer moves it."""
        return super()._prepare_inputs(inputs)

    # Where the Trainer calls them

    def _get_dataloader(self, dataset: Any, description: str, *args: Any, **kwargs: Any) -> Any:
        own: Any = self.data_collator
        self.data_collator = self.collator_of(description == "Training")
        loader = super()._get_dataloader(dataset, description, *args, **kwargs)
        self.data_collator = own
        return loader

    def _prepare_inputs(self, inputs: Any) -> Any:
        return self.on_device(inputs)

    def _build_accelerator_args(self, **kwargs: Any) -> dict[str, Any]:
        self.before_accelerator()
        return super()._build_accelerator_args(**kwargs)

    def _wrap_model(self, model: Any, training: bool = True, *args: Any, **kwargs: Any) -> Any:
        self.before_wrapping(training)
        return super()._wrap_model(model, training, *args, **kwargs)

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        # `on_train_begin` comes after the checkpoint's state is restored.
        self.training_starts()
        return super()._init_training_state(*args, **kwargs)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        # As that of a callback, which is how the state of a checkpoint can be extended. A callback itself is asked for
        # its state on one rank only, where nothing can be summed over ranks.
        callbacks: Any = self.state.stateful_callbacks
        if self.state_name:
            callbacks[self.state_name] = {"args": {}, "attributes": self.state_to_save()}
        super()._save_checkpoint(model, trial)
        callbacks.pop(self.state_name, None)
        folder = self._get_output_dir(trial=trial)
        self.checkpoint_saved(Path(folder, f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"))

    def _load_callback_state(self) -> None:
        # Taken out before the Trainer looks for a callback of this name.
        callbacks: Any = self.state.stateful_callbacks
        entry = callbacks.pop(self.state_name, {"attributes": None})
        super()._load_callback_state()
        self.state_restored(entry["attributes"])

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self.restoring(Path(resume_from_checkpoint)):
            self.before_restoring(Path(resume_from_checkpoint))
            if not self.restored_otherwise(Path(resume_from_checkpoint)):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
            self.weights_restored(Path(resume_from_checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self.restoring(Path(checkpoint or "")):
            super()._load_rng_state(checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.checkpoint_to_save(Path(output_dir))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self.restoring(Path(checkpoint or "")):
            super()._load_optimizer_and_scheduler(checkpoint)
            if checkpoint is not None:
                self.checkpoint_restored(Path(checkpoint))

    def _load_best_model(self) -> None:
        if not self.restored_otherwise(Path(self.state.best_model_checkpoint or "")):
            super()._load_best_model()
        self.weights_restored(Path(self.state.best_model_checkpoint or ""))

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # Comes here with weights where FSDP or DeepSpeed had to gather them.
        folder = Path(output_dir or self.args.output_dir or ".")
        if self.saved_otherwise(folder, state_dict):
            return
        super()._save(output_dir, self.weights_to_save(folder, state_dict))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        self.before_pushing(Path(checkpoint_folder))
        super()._push_from_checkpoint(checkpoint_folder)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in self.columns_to_keep() if name not in columns]

    # What no one may know of the Trainer

    @property
    def unlogged(self) -> Unlogged:
        """What the Trainer has seen since its last log, and forgets when a run is interrupted and resumed."""
        loss: Any = self._tr_loss
        return Unlogged(loss.detach(), self._globalstep_last_logged)

    def restore_unlogged(self, loss: float, logged_step: int) -> None:
        """Goes on from what an earlier session had seen since its last log; call it before the first step."""
        self._tr_loss += loss
        # The mean loss that training returns is that of its own steps.
        self._total_loss_scalar -= loss
        self._globalstep_last_logged = logged_step

    def tensor_on_device(self, values: Any) -> Any:
        """Tensors on the model's device, in the type that DeepSpeed computes in."""
        return self._prepare_input(values)


def take_one_gpu(args: Any) -> None:
    """Keeps the Trainer from splitting batches over all GPUs in sight by nn.DataParallel: a process drives one.

    `TrainingArguments.n_gpu` has no setter, and CUDA_VISIBLE_DEVICES is read before any of our code.
    """
    args._n_gpu = min(args.n_gpu, 1)


def with_json_keys(config: Any, *names: str) -> list[str]:
    """The keys of a config that a command line gives as JSON: those of its class and these.

    For `_VALID_DICT_FIELDS`, which `TrainingArguments` reads and no argument of a field sets.
    """
    return [*config._VALID_DICT_FIELDS, *names]
