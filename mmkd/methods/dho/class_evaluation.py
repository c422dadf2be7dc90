"""The half of DHO's trainer that measures: heads joined by validation rows, test rows, and classes never seen."""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import EvalPrediction
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from mmkd.data.class_rows import ClassCollator
from mmkd.files import write_file
from mmkd.losses.dual_head_losses import Interpolation, search_interpolation
from mmkd.losses.open_vocabulary import text_logits
from mmkd.models.training_heads import drop_training_heads
from mmkd.teachers.class_signals import ClassSignals
from mmkd.training.run_trainer import RunTrainer

from .dho_config import DHOConfig
from .dho_inputs import evaluated_rows
from .unseen_classes import UnseenClasses, mean_class_accuracy

logger = logging.get_logger(__name__)

CHOICE = "interpolation.json"
"""File of a run with the chosen alpha and beta, and every pair that was tried."""


class DualHeadTrainer(RunTrainer):
    """transformers' Trainer that predicts with two heads, and joins them when training ends."""

    config_class: ClassVar[type[DHOConfig]] = DHOConfig

    args: DHOConfig
    model: Any
    train_dataset: Any
    eval_dataset: Any
    test_dataset: Any
    class_names: list[str]
    choice: Interpolation | None = None
    unseen: UnseenClasses | None = None
    signals: ClassSignals

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Both heads' logits and the embeddings; a loss would need the teacher, which has not seen these rows."""
        inputs = self.on_device(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        predictions = [outputs.ce_logits, outputs.kd_logits, *([] if outputs.embeds is None else [outputs.embeds])]
        return None, tuple(values.float() for values in predictions), labels

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's, also of rows as the constructor takes them."""
        return super().get_eval_dataloader(_measured(self, eval_dataset, "eval"))

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The Trainer's, also of rows as the constructor takes them."""
        return super().get_test_dataloader(_measured(self, test_dataset, "test"))

    def collator_of(self, training: bool) -> Any:
        """Only training rows have teacher logits."""
        return super().collator_of(training) if training else ClassCollator(self.processing_class)

    def _accuracies(self, prediction: EvalPrediction) -> dict[str, float]:
        """Accuracy of the prediction and of each head that was trained."""
        ce, kd, *embeds = (torch.as_tensor(values) for values in prediction.predictions)
        labels, config = torch.as_tensor(prediction.label_ids), self.model.config
        both = search_interpolation(ce, kd, labels, [config.alpha], [config.beta]).accuracy
        metrics = {"accuracy": both}
        if self.args.objective == "dho":
            heads = {"ce_head_accuracy": ce, "kd_head_accuracy": kd}
            metrics |= {name: (logits.argmax(-1) == labels).float().mean().item() for name, logits in heads.items()}
        if embeds and self.signals.embeddings is not None:
            metrics["seen_class_accuracy"] = mean_class_accuracy(
                text_logits(embeds[0], self.signals.embeddings.text), labels
            )
        return metrics

    # After training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains, then chooses alpha and beta on the validation rows and measures the test rows, if there are any.

        Heads that only the training needed are dropped from the model.
        """
        result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self.state.global_step < self.state.max_steps:
            return result
        drop_training_heads(self.model)
        if self.args.objective == "dho" and self.args.alpha is None:
            self.choose()
        if self.test_dataset is not None:
            metrics = self.evaluate(self.test_dataset, metric_key_prefix="test")  # pyright: ignore
            self.save_metrics("test", metrics)
        if self.unseen is not None:
            metrics = {"unseen_class_accuracy": self.unseen_accuracy()}
            self.log(dict(metrics))
            self.save_metrics("unseen", metrics)
        if self.args.plot_conflict and self.is_world_process_zero():
            _plot_conflict(self)
        return result

    def choose(self) -> Interpolation:
        """The alpha and beta with the best accuracy on the validation rows, set in the model's config and written."""
        assert self.eval_dataset is not None
        output = self.predict(self.eval_dataset, metric_key_prefix="eval")
        ce, kd = (torch.as_tensor(logits) for logits in output.predictions[:2])
        labels = torch.as_tensor(output.label_ids)
        self.choice = search_interpolation(ce, kd, labels, self.args.alphas, self.args.betas)
        self.model.config.alpha, self.model.config.beta = self.choice.alpha, self.choice.beta
        if self.is_world_process_zero():
            write_choice(Path(self.args.output_dir or ".") / CHOICE, self.choice, len(labels))
        return self.choice

    def seen_accuracy(self, rows: Any) -> float:
        """The mean accuracy per class of rows of the trained classes, by the texts of these classes."""
        assert self.signals.embeddings is not None
        return self._text_accuracy(rows, self.signals.embeddings.text)

    def unseen_accuracy(self) -> float:
        """The mean accuracy per class of rows whose classes training has not seen, by the texts of these classes."""
        assert self.unseen is not None
        return self._text_accuracy(self.unseen.rows, self.unseen.text)

    def _text_accuracy(self, rows: Any, text: Tensor) -> float:
        output: Any = self.predict(rows)
        embeds, labels = torch.as_tensor(output.predictions[2]), torch.as_tensor(output.label_ids)
        return mean_class_accuracy(text_logits(embeds, text), labels)

    def last_evaluation(self) -> dict[str, float] | None:
        """That of the two heads as they are joined now: training's own came before alpha and beta were chosen."""
        return super().last_evaluation() if self.choice is None else None


def write_choice(path: Path, choice: Interpolation, rows: int) -> None:
    """Writes alpha, beta and the whole grid, and by which rows they were chosen."""
    grid = [dict(zip(("alpha", "beta", "accuracy"), point, strict=True)) for point in choice.grid]
    chosen = {"alpha": choice.alpha, "beta": choice.beta, "accuracy": choice.accuracy}
    write_file(path, json.dumps({**chosen, "split": "validation", "rows": rows, "grid": grid}, indent=1))


def _measured(trainer: DualHeadTrainer, dataset: Any, name: str) -> Any:
    if not isinstance(dataset, Dataset):
        return dataset
    return evaluated_rows(dataset, trainer.processing_class, trainer.args, trainer.class_names, name)


def _plot_conflict(trainer: DualHeadTrainer) -> None:
    from .conflict_plot import plot_conflict

    if any("gradient_cosine" in entry for entry in trainer.state.log_history):
        plot_conflict({"": trainer.state.log_history}, Path(trainer.args.output_dir or ".") / "gradient_conflict.png")
    else:
        # A run shorter than logging_steps: nothing to draw, and no reason to lose the student.
        logger.warning("No gradient_conflict.png: the run was shorter than logging_steps, so nothing was logged.")
