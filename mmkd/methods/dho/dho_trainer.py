"""DHO: a supervised and a distillation head on shared features, joined after training (2505.07675)."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import BaseImageProcessor, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_callback import TrainerCallback

from mmkd.data.class_rows import ClassCollator, ClassRows, SemiSupervisedSampler
from mmkd.data.classification import HIDDEN
from mmkd.errors import UserError
from mmkd.losses.dual_head_losses import gradient_cosine, supervised_loss
from mmkd.models.dual_head import (
    DualHeadForImageClassification,
    DualHeadForSequenceClassification,
    DualHeadOutput,
)
from mmkd.models.sharded_weights import called
from mmkd.preparation.checks import check_precision
from mmkd.teachers.class_signals import ClassSignals
from mmkd.teachers.classifiers import ClassTeacher
from mmkd.training.gradient_cache import buffers_kept, surrogate

from .class_evaluation import DualHeadTrainer
from .class_terms import ClassTerms, Counts, Reports, RowsSaid
from .compared_parts import ComparedParts, told_of
from .dho_config import DHOConfig as DHOConfig
from .dho_inputs import class_signals, evaluated_rows, measured_rows, settle_heads, training_rows
from .student_heads import prepare_heads
from .unseen_classes import UnseenClasses

HEADS_FILE = "training_heads.safetensors"
"""The file of a checkpoint with the heads that only the training needs."""


class DHOTrainer(DualHeadTrainer):
    """transformers' Trainer for a dual-head student, with labelled and unlabelled rows in every batch.

    Args:
        model: a `DualHeadForImageClassification` or `DualHeadForSequenceClassification`.
        teacher: a `ClassTeacher`, asked once about every training row, or its logits of them, row by row. Or
            `ClassSignals`: logits of several teachers, embeddings, and answers to aspects. None for the objective ce,
            which learns from labels alone.
        args: settings of the method, by default the config's own with the output_dir "dho".
        train_dataset: rows with `image` or `text`, and `label`; a label of -100 is unknown. `labels_per_class` and
            `label_fraction` hide further ones. Or `ClassRows`.
        eval_dataset: validation rows, by which alpha and beta are chosen after training.
        test_dataset: rows that are measured at the end and that nothing is chosen by.
        unseen: rows of classes that are not the student's and the teacher's texts of them, measured at the end.
        processing_class: the student's image processor or tokenizer.
        callbacks: callbacks of transformers' Trainer.
        optimizers: an optimizer and a schedule in place of those that args ask for.
        optimizer_cls_and_kwargs: the class of an optimizer and its arguments, in place of `optim` in args.

    Raises UserError when model, teacher, data and settings cannot work together, before any step is taken.
    """

    method: ClassVar[str] = "dho"
    config_class: ClassVar[type[DHOConfig]] = DHOConfig
    needs_teacher: ClassVar[bool] = False
    takes_several: ClassVar[bool] = True
    teacher_keys: ClassVar[tuple[str, ...]] = (
        "teacher_kind",
        "teacher_question",
        "normalize_prompt_mean",
        "tip_alpha",
        "tip_beta",
        "mask_layer",
        "mask_student",
        "mask_epochs",
        "mask_learning_rate",
    )
    # `compute_loss` divides by counts of the whole accumulated batch, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: DualHeadForImageClassification | DualHeadForSequenceClassification,
        teacher: ClassTeacher | Float[Tensor, "row *teacher class"] | ClassSignals | None = None,
        args: DHOConfig | None = None,
        train_dataset: Dataset | ClassRows | None = None,
        eval_dataset: Dataset | ClassRows | None = None,
        test_dataset: Dataset | ClassRows | None = None,
        processing_class: PreTrainedTokenizerBase | BaseImageProcessor | ProcessorMixin | None = None,
        *,
        unseen: UnseenClasses | None = None,
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
        self.signals = class_signals(teacher, train, args, self.class_names)
        self.unseen = (
            None if unseen is None else UnseenClasses(measured_rows(unseen.rows, processing_class, args), unseen.text)
        )
        settle_heads(model, args)
        prepare_heads(model, args, self.signals, train)
        super().__init__(
            model=model,
            args=args,
            data_collator=ClassCollator(processing_class, self.signals.logits, self.signals.by_row),
            train_dataset=train,
            eval_dataset=validation,
            processing_class=processing_class,
            compute_metrics=self._accuracies,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )
        self.terms = ClassTerms(args, self.signals)
        self._counts: Counts
        self._parts: ComparedParts

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
        labels, supervised_only = self.train_dataset.labels, not (args.asks_teacher or args.aspects is not None)
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
        """Collects one accumulated batch and counts its rows of each kind over all ranks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._counts = Counts(*self._summed(self.terms.counts(batches, device)).unbind())
        self._parts = ComparedParts(self.terms, list(batches), self._counts)
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the loss of the accumulated batch, each part over its own rows of all ranks."""
        said = told_of(inputs)
        labels, teacher = said["labels"], said.get("teacher_logits")
        outputs, across, compared = self._answered(model, inputs)
        supervised, distilled, reports = self.losses(outputs, labels, teacher)
        args = self.args
        weight = {"ce": 1.0, "kd": 0.0}.get(args.objective, args.ce_weight)
        loss = weight * supervised + (1 - weight) * distilled
        others, own = self.terms.others(outputs, said, self._counts)
        loss = torch.stack([loss, *(own for own in (others, across) if own is not None)]).sum()
        if self._measures_conflict():
            assert teacher is not None
            own |= self._conflict(outputs, labels, teacher)
        self._record(reports | own | compared)
        # Gradients are averaged over ranks, while the counts are already those of all ranks.
        loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def _answered(self, model: Any, inputs: dict[str, Any]) -> tuple[DualHeadOutput, Tensor | None, Reports]:
        """What the student says of a part, its share of the terms that compare rows, and their reports.

        Rows are compared with those of all accumulated parts, which are read once more for it.
        """
        said = told_of(inputs)
        given = {name: values for name, values in inputs.items() if name not in said}
        if not self._parts.apart:
            outputs = model(**given)
            return outputs, *self.terms.across(self.terms.compared(outputs), said, self._counts)
        with buffers_kept(self.model):
            share, reports = self._parts.next_share(self._read, self.args.device)
        with share.state.again():
            outputs = model(**given)
        return outputs, surrogate(self.terms.compared(outputs).known, [], share), reports

    def _read(self, part: Mapping[str, Tensor]) -> RowsSaid:
        inputs = self.on_device({name: values for name, values in part.items() if name not in told_of(part)})
        with called(self.model, self.accelerator) as model:
            return self.terms.compared(model(**inputs))

    def losses(
        self, outputs: DualHeadOutput, labels: Tensor, teacher_logits: Tensor | None
    ) -> tuple[Tensor, Tensor, Reports]:
        """The supervised and the distillation loss of a micro-batch, over the rows of the whole batch, and reports.

        L_CE = mean over labelled rows, L_KD = mean over labelled + mean over unlabelled rows (eq. 6 and 8). Inner
        stages learn as the distillation head does.
        """
        args, shown = self.args, labels != HIDDEN
        assert outputs.ce_logits is not None
        assert outputs.kd_logits is not None
        zero = outputs.ce_logits.new_zeros((), dtype=torch.float32)
        supervised, distilled = zero, zero
        reports: Reports = {}
        if args.objective != "kd":
            ce = supervised_loss(outputs.ce_logits[shown], labels[shown]).sum()
            supervised = ce / self._counts.labeled.clamp(min=1)
            reports["ce"] = (ce, shown.sum())
        if teacher_logits is not None:
            student = outputs.ce_logits if args.objective == "single_head" else outputs.kd_logits
            extra = outputs.extra or {}
            rows = self.terms.distilled(student, teacher_logits, labels, extra)
            distilled = self._counts.mean(rows, shown)
            first = teacher_logits if teacher_logits.ndim == 2 else teacher_logits.softmax(-1).mean(1)
            agree = (student.argmax(-1) == first.argmax(-1)).sum()
            reports |= {
                "kd_labeled": (rows[shown].sum(), shown.sum()),
                "kd_unlabeled": (rows[~shown].sum(), (~shown).sum()),
                "teacher_agreement": (agree, labels.numel()),
            }
            stages = self.terms.stages(extra, teacher_logits, labels)
            if stages is not None:
                distilled = distilled + args.stage_weight * self._counts.mean(stages, shown)
                reports["kd_stages"] = (stages.sum(), labels.numel())
        return supervised, distilled, reports

    def _conflict(self, outputs: DualHeadOutput, labels: Tensor, teacher_logits: Tensor) -> Reports:
        """How the two losses pull on the features of the labelled rows, the rows that both of them see."""
        assert outputs.features is not None
        shown = labels != HIDDEN
        # The heads again, on features of their own: wrappers hand out copies that the logits were not computed from.
        features = outputs.features.detach()[shown].requires_grad_()
        gate = (outputs.extra or {}).get("gate")
        with torch.enable_grad(), self.compute_loss_context_manager():
            answer = self.model.answer(features)
            answer.extra = None if gate is None else {"gate": gate.detach()[shown]}
            losses = self.losses(answer, labels[shown], teacher_logits[shown])[:2]
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

    # Checkpoints

    def checkpoint_to_save(self, folder: Path) -> None:
        """Keeps the heads of the training, which the student's own files leave out."""
        super().checkpoint_to_save(folder)
        heads = self.model.training_heads
        if heads is not None and self.args.should_save:
            weights = {name: tensor.contiguous() for name, tensor in heads.state_dict().items()}
            save_file(weights, str(folder / HEADS_FILE))

    def weights_restored(self, checkpoint: Path) -> None:
        """Loads the heads of the training from a checkpoint, too. Raises UserError for one without them."""
        super().weights_restored(checkpoint)
        heads, path = self.model.training_heads, checkpoint / HEADS_FILE
        if heads is None:
            return
        tensors = load_file(str(path)) if path.is_file() else {}
        ours = {name: values.shape for name, values in heads.state_dict().items()}
        if {name: values.shape for name, values in tensors.items()} != ours:
            raise UserError(
                f"{checkpoint} has other heads than stage_heads, aspects and mixing ask for now: its run had other "
                "settings. Resume with those, or begin again in another output_dir."
            )
        heads.load_state_dict(tensors)
