"""TransEncoderTrainer: a bi- or a cross-encoder that learns scores of pairs of sentences."""

from typing import Any, ClassVar

import numpy as np
import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers.trainer_callback import TrainerCallback

from mmkd.errors import UserError
from mmkd.training.run_trainer import RunTrainer

from .trans_encoder_config import TransEncoderConfig as TransEncoderConfig

COLUMNS = ("sentence1", "sentence2", "score")


def is_cross_encoder(model: Any) -> bool:
    """Whether a model of sentence-transformers reads both sentences at once."""
    from sentence_transformers import CrossEncoder

    return isinstance(model, CrossEncoder)


class PairCollator:
    """Rows -> what an encoder reads, with the scores under `labels`."""

    def __init__(self, model: Any):
        self.model, self.cross = model, is_cross_encoder(model)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        first, second = ([row[name] for row in rows] for name in COLUMNS[:2])
        # Both sides in one batch are one pass through the model, which wrappers of it insist on.
        texts: list[Any] = list(zip(first, second, strict=True)) if self.cross else [*first, *second]
        inputs = {key: value for key, value in self.model.preprocess(texts).items() if isinstance(value, Tensor)}
        return {**inputs, "labels": torch.tensor([row["score"] for row in rows], dtype=torch.float32)}


def pair_losses(outputs: Any, labels: Tensor, cross: bool) -> Float[Tensor, "pair"]:
    """The loss of each pair: cross-entropy of the cross-encoder's logit, squared error of the bi-encoder's cosine.

    Two different losses are what lets each learn something of the other (Trans-Encoder, 2109.13059, section 3).
    """
    if cross:
        logits = outputs["scores"].float().view(-1)
        return functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    first, second = outputs["sentence_embedding"].float().chunk(2)
    return (functional.cosine_similarity(first, second, dim=-1) - labels).square()


class TransEncoderTrainer(RunTrainer):
    """transformers' Trainer for one half of a cycle: an encoder of sentence-transformers learns scores of pairs.

    Args:
        model: a SentenceTransformer, or a CrossEncoder with one label.
        args: settings of the method.
        train_dataset: rows with sentence1, sentence2 and a score in [0, 1].
        callbacks: callbacks of transformers' Trainer.

    Raises UserError for rows without these columns, and for scores outside of [0, 1].
    """

    method = "trans_encoder"
    config_class: ClassVar[type[TransEncoderConfig]] = TransEncoderConfig
    needs_teacher: ClassVar[bool] = False
    accepts: ClassVar[tuple[type, ...]] = ()
    one_vocabulary: ClassVar[bool] = False
    # `compute_loss` divides by the pairs of the whole accumulated batch, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    args: TransEncoderConfig

    def __init__(
        self,
        model: Any,
        args: TransEncoderConfig,
        train_dataset: Dataset,
        callbacks: list[TrainerCallback] | None = None,
    ):
        missing = [name for name in COLUMNS if name not in train_dataset.column_names]
        if missing:
            raise UserError(f"The pairs have no column {missing[0]}: give them {', '.join(COLUMNS)}.")
        scores = np.asarray(train_dataset.with_format("numpy")["score"][:])
        if not ((scores >= 0) & (scores <= 1)).all():
            raise UserError(
                f"Scores are between {scores.min():g} and {scores.max():g}. Cross-entropy has no minimum outside of "
                "[0, 1]: clamp them."
            )
        self.cross = is_cross_encoder(model)
        self._pairs: Tensor
        super().__init__(
            model=model, args=args, train_dataset=train_dataset, data_collator=PairCollator(model), callbacks=callbacks
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Collects one accumulated batch and counts its pairs over all ranks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._pairs = self._summed(torch.tensor(sum(len(batch["labels"]) for batch in batches), device=device))
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This part's share of the mean over the pairs of an accumulated batch of all ranks."""
        labels = inputs.pop("labels")
        outputs = model(inputs)
        # Gradients are averaged over ranks, while the count is already that of all ranks.
        loss = pair_losses(outputs, labels, self.cross).sum() / self._pairs * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss
