"""DHO: a supervised and a distillation head on shared features, joined after training (2505.07675)."""

import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import BaseImageProcessor, EvalPrediction, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from mmkd.data.class_rows import ClassCollator, ClassRows, SemiSupervisedSampler
from mmkd.data.classification import HIDDEN
from mmkd.errors import UserError
from mmkd.files import write_file
from mmkd.losses.dual_head_losses import (
    Interpolation,
    distillation_loss,
    gradient_cosine,
    search_interpolation,
    supervised_loss,
)
from mmkd.models.dual_head import (
    DualHeadForImageClassification,
    DualHeadForSequenceClassification,
    DualHeadOutput,
)
from mmkd.preparation.checks import check_precision
from mmkd.teachers.classifiers import ClassTeacher
from mmkd.training.run_trainer import RunTrainer

from .dho_config import DHOConfig as DHOConfig
from .dho_inputs import evaluated_rows, settle_heads, teacher_logits, training_rows

logger = logging.get_logger(__name__)

CHOICE = "interpolation.json"
"""File of a run with the chosen alpha and beta, and every pair that was tried."""


class DHOTrainer(RunTrainer):
    """transformers' Trainer for a dual-head student, with labelled and unlabelled rows in every batch.

    Args:
        model: a `DualHeadForImageClassification` or `DualHeadForSequenceClassification`.
        teacher: a `ClassTeacher`, asked once about every training row, or its logits of them, row by row. None for
            the objective ce, which learns from labels alone.
        args: settings of the method, by default the config's own with the output_dir "dho".
        train_dataset: rows with `image` or `text`, and `label`; a label of -100 is unknown. `labels_per_class` and
            `label_fraction` hide further ones. Or `ClassRows`.
        eval_dataset: validation rows, by which alpha and beta are chosen after training.
        test_dataset: rows that are measured at the end and that nothing is chosen by.
        processing_class: the student's image processor or tokenizer.
        callbacks: callbacks of transformers' Trainer.
        optimizers: an optimizer and a schedule in place of those that args ask for.
        optimizer_cls_and_kwargs: the class of an optimizer and its arguments, in place of `optim` in args.

    Raises UserError when model, teacher, data and settings cannot work together, before any step is taken.
    """

    method: ClassVar[str] = "dho"
    config_class: ClassVar[type[DHOConfig]] = DHOConfig
    needs_teacher: ClassVar[bool] = False
    # `compute_loss` divides by counts of the whole accumulated batch, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    args: DHOConfig
    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: DualHeadForImageClassification | DualHeadForSequenceClassification,
        teacher: ClassTeacher | Float[Tensor, "row class"] | None = None,
        args: DHOConfig | None = None,
        train_dataset: Dataset | ClassRows | None = None,
        eval_dataset: Dataset | ClassRows | None = None,
        test_dataset: Dataset | ClassRows | None = None,
        processing_class: PreTrainedTokenizerBase | BaseImageProcessor | ProcessorMixin | None = None,
        *,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
    ):
        args = self.config_class("dho") if args is None else args
        if not isinstance(args, self.config_class):
            raise UserError(f"{type(self).__name__} takes a DHOConfig, not a {type(args).__name__}.")
        check_precision(args, args.emulated_bf16)
        config: Any = model.config
        self.class_names = [config.id2label[number] for number in range(config.num_labels)]
        train = training_rows(train_dataset, processing_class, args, self.class_names)
        validation = evaluated_rows(eval_dataset, processing_class, args, self.class_names, "validation")
        self.test_dataset = evaluated_rows(test_dataset, processing_class, args, self.class_names, "test")
        args.check_validation(validation is not None)
        logits = teacher_logits(teacher, train, args, self.class_names)
        settle_heads(model, args)
        super().__init__(
            model=model,
            args=args,
            data_collator=ClassCollator(processing_class, logits),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=processing_class,
            compute_metrics=self._accuracies,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.choice: Interpolation | None = None
        self._counts: dict[str, Tensor] = {}

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's. Raises UserError under FSDP."""
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled:
            raise UserError(
                "Students of classes are not trained under FSDP: accelerate cannot cut vision towers. They are small, "
                "so use accelerate_config ddp or zero2.",
                because="upstream",
            )

    # The step

    def get_train_dataloader(self) -> Any:
        """Batches of labelled rows followed by unlabelled ones."""
        args = self.args
        labels, supervised_only = self.train_dataset.labels, args.objective == "ce"
        unlabeled = args.unlabeled_batch_size if (labels == HIDDEN).any() else 0
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = SemiSupervisedSampler(labels, self._train_batch_size, unlabeled, seed, supervised_only)
        return self._get_dataloader(
            dataset=self.train_dataset,
            description="Training",
            batch_size=sampler.batch_size,
            sampler_fn=lambda dataset: sampler,
            is_training=True,
        )

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Collects one accumulated batch and counts its labelled and unlabelled rows over all ranks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        labeled = sum(int((batch["labels"] != HIDDEN).sum()) for batch in batches)
        rows = sum(len(batch["labels"]) for batch in batches)
        counts = self._summed(torch.tensor([labeled, rows - labeled], device=device))
        self._counts = {"labeled": counts[0], "unlabeled": counts[1]}
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the loss of the accumulated batch, each part over its own rows of all ranks."""
        inputs = dict(inputs)
        labels, teacher = inputs.pop("labels"), inputs.pop("teacher_logits", None)
        outputs: DualHeadOutput = model(**inputs)
        supervised, distilled, reports = self.losses(outputs, labels, teacher)
        args = self.args
        weight = {"ce": 1.0, "kd": 0.0}.get(args.objective, args.ce_weight)
        loss = weight * supervised + (1 - weight) * distilled
        if self._measures_conflict():
            assert teacher is not None
            reports |= self._conflict(outputs, labels, teacher)
        self._record(reports)
        # Gradients are averaged over ranks, while the counts are already those of all ranks.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def losses(
        self, outputs: DualHeadOutput, labels: Tensor, teacher_logits: Tensor | None
    ) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Any]]]:
        """The supervised and the distillation loss of a micro-batch, over the rows of the whole batch, and reports.

        L_CE = mean over labelled rows, L_KD = mean over labelled + mean over unlabelled rows (eq. 6 and 8).
        """
        args, shown = self.args, labels != HIDDEN
        assert outputs.ce_logits is not None
        assert outputs.kd_logits is not None
        counts = {name: count.clamp(min=1) for name, count in self._counts.items()}
        zero = outputs.ce_logits.new_zeros((), dtype=torch.float32)
        supervised, distilled = zero, zero
        reports: dict[str, tuple[Tensor, Any]] = {}
        if args.objective != "kd":
            ce = supervised_loss(outputs.ce_logits[shown], labels[shown]).sum()
            supervised = ce / counts["labeled"]
            reports["ce"] = (ce, shown.sum())
        if teacher_logits is not None:
            student = outputs.ce_logits if args.objective == "single_head" else outputs.kd_logits
            kl = distillation_loss(student, teacher_logits, args.temperature)
            distilled = kl[shown].sum() / counts["labeled"] + kl[~shown].sum() / counts["unlabeled"]
            agree = (student.argmax(-1) == teacher_logits.argmax(-1)).sum()
            reports |= {
                "kd_labeled": (kl[shown].sum(), shown.sum()),
                "kd_unlabeled": (kl[~shown].sum(), (~shown).sum()),
                "teacher_agreement": (agree, labels.numel()),
            }
        return supervised, distilled, reports

    def _conflict(
        self, outputs: DualHeadOutput, labels: Tensor, teacher_logits: Tensor
    ) -> dict[str, tuple[Tensor, Any]]:
        """How the two losses pull on the features of the labelled rows, the rows that both of them see."""
        assert outputs.features is not None
        shown = labels != HIDDEN
        # The heads again, on features of their own: wrappers hand out copies that the logits were not computed from.
        features = outputs.features.detach()[shown].requires_grad_()
        with torch.enable_grad(), self.compute_loss_context_manager():
            losses = self.losses(self.model.answer(features), labels[shown], teacher_logits[shown])[:2]
        gradients = [torch.autograd.grad(loss, features, retain_graph=True)[0] for loss in losses]
        whole, rows = gradient_cosine(*gradients)
        return {"gradient_cosine": (whole, 1), "gradient_conflict": ((rows < 0).sum(), len(rows))}

    def _measures_conflict(self) -> bool:
        if self.args.objective not in ("dho", "single_head") or not self.model.training:
            return False
        # Sharded heads exist inside the model's forward only.
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            return False
        every = self.args.conflict_steps or max(1, int(self.state.logging_steps))
        return (self.state.global_step + 1) % every == 0

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Both heads' logits; a loss would need the teacher, which has not seen these rows."""
        inputs = self.on_device(inputs)
        labels = inputs.pop("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs)
        return None, (outputs.ce_logits.float(), outputs.kd_logits.float()), labels

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
        ce, kd = (torch.as_tensor(logits) for logits in prediction.predictions)
        labels, config = torch.as_tensor(prediction.label_ids), self.model.config
        both = search_interpolation(ce, kd, labels, [config.alpha], [config.beta]).accuracy
        metrics = {"accuracy": both}
        if self.args.objective == "dho":
            heads = {"ce_head_accuracy": ce, "kd_head_accuracy": kd}
            metrics |= {name: (logits.argmax(-1) == labels).float().mean().item() for name, logits in heads.items()}
        return metrics

    # After training

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Trains, then chooses alpha and beta on the validation rows and measures the test rows, if there are any."""
        result = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self.state.global_step < self.state.max_steps:
            return result
        if self.args.objective == "dho" and self.args.alpha is None:
            self.choose()
        if self.test_dataset is not None:
            metrics = self.evaluate(self.test_dataset, metric_key_prefix="test")  # pyright: ignore
            self.save_metrics("test", metrics)
        if self.args.plot_conflict and self.is_world_process_zero():
            _plot_conflict(self)
        return result

    def choose(self) -> Interpolation:
        """The alpha and beta with the best accuracy on the validation rows, set in the model's config and written."""
        assert self.eval_dataset is not None
        output = self.predict(self.eval_dataset, metric_key_prefix="eval")
        ce, kd = (torch.as_tensor(logits) for logits in output.predictions)
        labels = torch.as_tensor(output.label_ids)
        self.choice = search_interpolation(ce, kd, labels, self.args.alphas, self.args.betas)
        self.model.config.alpha, self.model.config.beta = self.choice.alpha, self.choice.beta
        if self.is_world_process_zero():
            write_choice(Path(self.args.output_dir or ".") / CHOICE, self.choice, len(labels))
        return self.choice

    def last_evaluation(self) -> dict[str, float] | None:
        """That of the two heads as they are joined now: training's own came before alpha and beta were chosen."""
        return super().last_evaluation() if self.choice is None else None


def write_choice(path: Path, choice: Interpolation, rows: int) -> None:
    """Writes alpha, beta and the whole grid, and by which rows they were chosen."""
    grid = [dict(zip(("alpha", "beta", "accuracy"), point, strict=True)) for point in choice.grid]
    chosen = {"alpha": choice.alpha, "beta": choice.beta, "accuracy": choice.accuracy}
    write_file(path, json.dumps({**chosen, "split": "validation", "rows": rows, "grid": grid}, indent=1))


def _measured(trainer: DHOTrainer, dataset: Any, name: str) -> Any:
    if not isinstance(dataset, Dataset):
        return dataset
    return evaluated_rows(dataset, trainer.processing_class, trainer.args, trainer.class_names, name)


def _plot_conflict(trainer: DHOTrainer) -> None:
    from .conflict_plot import plot_conflict

    if any("gradient_cosine" in entry for entry in trainer.state.log_history):
        plot_conflict({"": trainer.state.log_history}, Path(trainer.args.output_dir or ".") / "gradient_conflict.png")
    else:
        # A run shorter than logging_steps: nothing to draw, and no reason to lose the student.
        logger.warning("No gradient_conflict.png: the run was shorter than logging_steps, so nothing was logged.")
