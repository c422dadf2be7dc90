"""The card of what the Trainer publishes: that of who knows the whole run, or none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers.trainer_utils import HubStrategy

from mmkd.seams.trainer_seam import HookedTrainer

Describe = Callable[[Path, Path, str], None]
"""(folder of a model, folder that is uploaded, Hub id): writes the model's card, and what it speaks of."""


class PublishingTrainer(HookedTrainer):
    """transformers' Trainer without a card that says less than is known.

    TRL's own names neither teacher nor data, and where the student came from a folder calls it a fine-tuned version of
    [None]. It also writes one with every checkpoint, published or not.
    """

    # transformers types it as a union with None, for trainers that are still without it.
    model: Any

    describe: Describe | None = None
    """Set by who runs a recipe. Without it, as in Python, a card of TRL is better than none where it has a base."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The card beside the model in the output folder, once that is a repository of the Hub."""
        repo_id, output = self.hub_model_id, Path(self.args.output_dir or ".")
        if repo_id is None or not self.is_world_process_zero():
            return
        if self.describe is None:
            name = self.model.config.name_or_path
            if name and not Path(name).is_dir():
                super().create_model_card(*args, **kwargs)
        elif self._final:
            self.describe(output, output, repo_id)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, of the student in the output folder."""
        self._final = True
        return super().push_to_hub(*args, **kwargs)

    _final = False
    """Whether the output folder holds the student to be published, and not yet a state of its training."""

    def before_pushing(self, checkpoint: Path) -> None:
        """Writes the card: TRL does before there is a checkpoint, and ours reads what it describes."""
        super().before_pushing(checkpoint)
        repo_id = self.hub_model_id
        pushes = self.is_world_process_zero() and self.args.hub_strategy != HubStrategy.END
        # A checkpoint in shards holds no student that somebody could load, and is not copied to the output folder.
        if pushes and self.describe is not None and repo_id is not None and any(checkpoint.glob("*.safetensors")):
            self.describe(checkpoint, Path(self.args.output_dir or "."), repo_id)
