"""The distillation step, owned once: prepare, ask the teacher, forward, item losses, total. A method adds losses."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from peft import PeftConfig, PeftModel
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_callback import TrainerCallback
from transformers.trainer_utils import TrainOutput
from transformers.utils.quantization_config import QuantizationConfigMixin

from mmkd.models.backbone import allow_consumers
from mmkd.models.heads import LMHead
from mmkd.models.last_block import LastBlock
from mmkd.models.sharded_weights import is_sharded
from mmkd.preparation.checks import check_student
from mmkd.preparation.collation import Collator, views_of
from mmkd.preparation.labelling import LabellingTrainer
from mmkd.preparation.row_names import RowNames
from mmkd.teachers.batch import Batch
from mmkd.teachers.several import SeveralTeachers, served_parts
from mmkd.teachers.signals import RoutedSignal
from mmkd.teachers.teacher import Teacher

from .balance import check_balance
from .config import DistillationConfig
from .fitting import check_fit, check_rows_apart, stop_where_answers_end
from .items import ItemLosses, ReadStudent, Supervised
from .method_trainer import ROUTER, MethodTrainer, Signal
from .on_policy import rollouts_of
from .prepared import Prepared, canonical_rows, unread
from .reports import reports_of
from .run_trainer import RunTrainer
from .self_teaching import taught_by_itself
from .served_rollouts import naming_rows
from .sharding import without_repeated_rows
from .sparse_tuning import SparseTuning
from .teacher_views import columns_for, image_columns, prompts_for, row_views_of
from .teaching import StudentSide, first_rows, packed_apart

Rows = Dataset | IterableDataset | DatasetDict | IterableDatasetDict
"""Rows to evaluate on: one set of them, or several by name."""


class DistillationTrainer(RunTrainer, MethodTrainer[Signal], LabellingTrainer):
    """trl's SFTTrainer with a teacher. A method subclasses it with the signal it reads and implements `item_losses`.

    Args:
        model: the student: a Hub id, a local folder, or a model, with or without a PEFT adapter.
        teacher: a Hub id, a local folder, a model, or a `Teacher`, such as `CachedTeacher`, `ServerTeacher` or
            `SeveralTeachers`. Frozen; quantise and place it as you like. "self" is the student itself, in the form
            that `self_teacher` in args names. None where the method needs no teacher.
        args: settings of the method, by default its config's own with an output_dir named after the student.
        train_dataset: rows in any layout that mmkd knows: chat, prompt and completion, plain text, with images or not.
        eval_dataset: rows to evaluate on, or several sets of them by name.
        processing_class: the student's tokenizer or processor, by default the one beside the student.
        teacher_processing_class: the teacher's tokenizer or processor, by default the one beside the teacher.
        data_collator: makes a batch of prepared rows, by default trl's for text or images. Its labels are what is
            learnt from.
        compute_metrics: metrics of an evaluation, computed from the student's logits.
        callbacks: callbacks besides those of the method.
        optimizers: an optimizer and a schedule in place of those that args ask for.
        optimizer_cls_and_kwargs: the class of an optimizer and its arguments, in place of `optim` in args.
        preprocess_logits_for_metrics: what becomes of logits before `compute_metrics` collects them.
        quantization_config: how a student given by name is quantised when it is loaded.
        peft_config: the adapter that is trained in place of the whole student.
        formatting_func: makes text of a row, for rows in a layout that mmkd does not know.

    Raises UserError when student, teacher, data and settings cannot work together, before any step is taken.
    """

    # `compute_loss` divides by counts of the whole accumulated batch, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    # transformers types these as unions with None, for trainers that are still without them.
    train_dataset: Any
    processing_class: Any
    data_collator: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        teacher: str | PreTrainedModel | PeftModel | Teacher | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Rows | dict[str, Dataset | IterableDataset] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        *,
        data_collator: Callable[[list[Any]], dict[str, Any]] | None = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        quantization_config: QuantizationConfigMixin | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict[str, Any]], str] | None = None,
    ):
        teacher = taught_by_itself(teacher, args)
        # For methods that prepare data for the teacher too, which happens before there is one.
        self._given_teacher = (teacher, teacher_processing_class)
        self._tag_names = ["mmkd", self.method]
        self._name = type(self).__name__.removesuffix("Trainer")
        how = {"peft": peft_config, "formatting": formatting_func, "quantization": quantization_config}
        rows = (train_dataset, eval_dataset)
        prepared = Prepared.of(type(self), model, teacher, args, rows, processing_class, **how)
        self._reads_rows, self._row_names = prepared.reads_rows, RowNames()
        self._start_reports()
        self._counts = {}
        super().__init__(
            model=prepared.model,
            args=prepared.args,
            data_collator=data_collator,
            train_dataset=prepared.train,
            eval_dataset=prepared.evaluation,
            processing_class=prepared.processing_class,
            compute_metrics=compute_metrics,
            callbacks=[self._clock, *self.method_callbacks(prepared.args), *(callbacks or [])],
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            # A student given by name is quantised already; of another one, trl says that it is not.
            quantization_config=None if isinstance(model, str) else quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
        )
        self._start(teacher, teacher_processing_class)

    def _start(self, teacher: Any, teacher_processing_class: Any) -> None:
        """What is left to do once there is a Trainer."""
        # Batches of streams would be cut and put together again field by field, and not all fields are about rows.
        self.accelerator.dataloader_config.dispatch_batches = False
        check_student(self)
        self.quantise_student()
        self._fit(teacher, teacher_processing_class)
        if self.args.sparse_density is not None:
            self.add_callback(SparseTuning(self))
        if self.args.on_policy_fraction:
            self.start_rollouts(rollouts_of(self))

    def _fit(self, teacher: Any, teacher_processing_class: Any) -> None:
        """Fits teacher, student and prepared rows to each other: what is compared, and what makes batches."""
        allow_consumers(self.model)
        self.bind_self(teacher)
        args, rows, collate = self.args, (self.train_dataset, self.eval_dataset), self.data_collator
        views = views_of(collate, rows, args.on_bad_row == "skip", self._row_names)
        side = StudentSide(self.model, self.processing_class, args, self.labelling, *rows, views, self.padding_free)
        teaching = self.build_teacher(side, teacher, teacher_processing_class)
        self.teacher, self.vocab_size = teaching.teacher, teaching.vocab_size
        # A teacher with tokens of its own brings its view.
        own = (served_parts(teaching.teacher), row_views_of(teaching.teacher, args)) if self.one_vocabulary else ()
        self.student_side = side = replace(side, views=views.with_teachers(teaching.processors, *own))
        check_fit(side, teaching)
        stop_where_answers_end(side)
        if args.combine == "gradmag":
            check_balance(self.model, args)
            self._last_block = LastBlock(self.model) if is_sharded(self.accelerator) else None
        shown = image_columns(teacher, args)
        reader = side.views.reader(self.train_dataset, is_sharded(self.accelerator), shown)
        self.data_collator = Collator(side.views, reader, teaching.fill, bool(args.on_policy_fraction))
        if teaching.teacher is not None:
            teaching.teacher.prepare(self.accelerator)
        if self.padding_free:
            check_rows_apart(side, teaching, collate, self.one_vocabulary)
        if teaching.teacher is not None and self.asks_itself_before_training:
            # One that cannot answer fails before training.
            for row in first_rows(teaching.teacher, self.train_dataset):
                with naming_rows(self._row_names):
                    self.ask(self.on_device(self.data_collator([row])))

    # The step

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the loss of the accumulated batch, over the items of all ranks."""
        batch, counts = self.prepare(inputs)
        with naming_rows(self._row_names):
            signal = self.ask(batch) if self.needs_teacher or self._reports_now() else None
        losses = self.forward(model, batch, lambda read: self.rewarded(read, self.losses_of(read, signal)))
        loss = self.total(losses, counts)
        self._record({**losses.reports, **reports_of(batch, losses, None if self.model.training else counts)})
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(**batch.student.inputs)

    def prepare(self, batch: Batch) -> tuple[Batch, dict[str, Tensor]]:
        """The micro-batch as it is learnt from, and by how many items of each kind its losses are divided.

        In training these are those of the accumulated batch on all ranks, counted when it was collected.
        """
        if self.model.training:
            return batch, self._counts
        batch = self.ask_ahead(without_repeated_rows(batch, self.accelerator), True)
        return batch, self.count_items(batch)

    def forward(self, model: Any, batch: Batch, losses_of: Callable[[ReadStudent], ItemLosses]) -> ItemLosses:
        """What `losses_of` makes of the student, inside the wrapper's forward: there sharded weights are whole."""
        view, block = batch.student, self._last_block if self.balances else None

        def consumer(hidden: Tensor, head: LMHead) -> tuple[dict, dict]:
            if block is not None:
                block.ends_in(hidden)

            def read(chosen: Tensor | None) -> Supervised:
                part = view if chosen is None else view.learnt_from(chosen)
                return self.read_student(hidden, head.trimmed(self.vocab_size), part)

            losses = losses_of(read)
            reports = {**losses.reports, **self.rollout_entropy(hidden, head.trimmed(self.vocab_size), view)}
            # Plain containers: wrappers look for tensors in the output, and do not look into our dataclasses.
            return losses.totals, reports

        routed = {"router_loss": True} if self.aux_loss_enabled else {}
        with nullcontext() if block is None else block.recording():
            result = model(**view.inputs, consumer=consumer, **routed)
        if not self.aux_loss_enabled:
            return ItemLosses(*result)
        # A mean over micro-batches: each is balanced for itself, as in transformers and TRL.
        (totals, reports), aux = result
        return ItemLosses({**totals, ROUTER: self.router_aux_loss_coef * aux}, {**reports, "aux_loss": (aux, 1)})

    def losses_of(self, read: ReadStudent, signal: Any) -> ItemLosses:
        """Those of the method; where each of several teachers speaks of its own tokens, their sums."""
        if not isinstance(signal, RoutedSignal):
            return self.part_losses(read, signal)
        parts: Mapping[str, Any] = signal.signals
        losses = {name: self.part_losses(read, part, name, signal.masks[name]) for name, part in parts.items()}
        return ItemLosses.of_parts(losses, self.reports_by_teacher)

    # Around the step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Collects one accumulated batch and counts its items of each kind over all ranks."""
        self._clock.begin()
        with naming_rows(self._row_names):
            batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
            batches = [self.ask_ahead(batch, len(batches) == 1) for batch in batches]
        counts: dict[str, Tensor] = {}
        for batch in batches:
            for kind, count in self.counted(batch).items():
                counts[kind] = counts.get(kind, torch.zeros((), dtype=torch.long, device=device)) + count.to(device)
        self._counts = {kind: self._summed(counts[kind]) for kind in sorted(counts)}
        return batches, num_items

    def on_device(self, inputs: Any) -> Any:
        """The Trainer's, of every tensor of a batch."""
        return inputs.map(self.tensor_on_device) if isinstance(inputs, Batch) else super().on_device(inputs)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """The Trainer's: trains from the start, from the last checkpoint in output_dir (True), or from a given one."""
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; after the last one of an optimizer step, `step_ended`."""
        loss = super().training_step(*args, **kwargs)
        if self.step_means and self.accelerator.sync_gradients:
            means = self._means_of_step()
            # A step without a single item has no mean to learn from.
            if means:
                self.step_ended(means)
        return loss

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's evaluation, of these rows or of those of the constructor."""
        if self._reads_rows and not isinstance(eval_dataset, str):
            eval_dataset = canonical_rows(eval_dataset, "eval", self.args, self._given_teacher[0])
        eval_dataset = unread(eval_dataset, "eval", image_columns(self.teacher, self.args))
        if eval_dataset is not None:
            self._row_names.add(eval_dataset, "eval")
        return super().evaluate(eval_dataset, *args, **kwargs)

    def prepared(self, rows: Any, args: Any, packing: bool, formatting_func: Any, split: str) -> Any:
        """The rows of a split as the collator takes them; packed ones know the teacher of each sequence."""
        prepare = partial(super().prepared, args=args, formatting_func=formatting_func, split=split)
        teacher = self._given_teacher[0]
        told = prompts_for(teacher, self.labelling, args) if self.one_vocabulary else None
        if told is not None:
            return told.beside(rows, args, packing, formatting_func, split)
        if packing and isinstance(teacher, SeveralTeachers) and teacher.column is not None:
            return packed_apart(prepare, rows, args, teacher.column)
        return prepare(rows, packing=packing)

    def columns_to_keep(self) -> list[str]:
        """Those that say whom to ask, and what teachers read, too."""
        return [*super().columns_to_keep(), *columns_for(self._given_teacher[0], self.args, self.labelling.vision)]
