"""The distillation step, owned once: shift, mask, ask the teacher, sum, normalise, log. A method adds item losses."""

from collections.abc import Callable, Mapping
from copy import copy
from itertools import islice
from typing import Any, ClassVar

import torch
from datasets import Dataset, IterableDataset
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from mmkd.data.image_columns import image_column
from mmkd.data.layouts import canonical
from mmkd.errors import UserError
from mmkd.losses.divergences import forward_kl
from mmkd.losses.fused import Objective, fused_loss
from mmkd.models.backbone import allow_consumers, name_of
from mmkd.models.heads import LMHead
from mmkd.models.load import load_model, load_processing_class, tokenizer_of
from mmkd.models.parts import train_only
from mmkd.models.sharded_weights import is_sharded
from mmkd.precision import say_emulated
from mmkd.preparation.checks import check_precision, check_stream, check_student, check_training_data
from mmkd.preparation.collation import BAD_ROWS, Collator, ImageReader, TextViews, VisionViews
from mmkd.preparation.labelling import LabellingTrainer
from mmkd.preparation.prepared_rows import skips_preparation
from mmkd.preparation.prompt_rows import with_open_answers
from mmkd.preparation.row_names import RowNames
from mmkd.preparation.vision_labels import VisionLabels
from mmkd.teachers.base import Teacher
from mmkd.teachers.batch import Batch, View
from mmkd.teachers.cached import images_of
from mmkd.teachers.signals import DenseSignal, RoutedSignal, TopKSignal

from .config import DistillationConfig
from .items import ItemLosses, Supervised
from .on_policy import OnPolicyTrainer
from .progress import DistillationProgress
from .rollouts import check_rollouts
from .run_trainer import RunTrainer
from .sharding import without_repeated_rows
from .teaching import TaughtTrainer, check_teachers


class DistillationTrainer(RunTrainer, TaughtTrainer, OnPolicyTrainer, LabellingTrainer):
    """trl's SFTTrainer with a teacher. A method subclasses it and implements `item_losses`.

    Args:
        model: student: a Hub id, a local folder, or a (PEFT) model.
        teacher: a Hub id, a local folder, a model, or a `Teacher`, such as `SeveralTeachers`. Frozen; quantise and
            place it as you like.
        teacher_processing_class: the teacher's tokenizer, to compare vocabularies; by default found by its name.
        args, train_dataset, eval_dataset, processing_class, peft_config, ...: as in SFTTrainer.

    Raises UserError when student, teacher, data and settings cannot work together, before any step is taken.
    """

    config_class: ClassVar[type[DistillationConfig]] = DistillationConfig
    accepts: ClassVar[tuple[type, ...]] = (DenseSignal, TopKSignal)
    # `compute_loss` divides by counts of the whole accumulated batch, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel | Any,
        teacher: str | PreTrainedModel | Teacher | None = None,
        args: DistillationConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        **kwargs: Any,
    ):
        # For methods that prepare data for the teacher too, which happens before there is one.
        self._given_teacher = (teacher, teacher_processing_class)
        self._tag_names = ["mmkd", self.method]
        self._name = type(self).__name__.removesuffix("Trainer")
        if teacher is None and self.needs_teacher:
            raise UserError(f"Method {self.method} needs a teacher: pass a Hub id, a folder, a model or a Teacher.")
        # What the Trainer writes into its settings does not concern those who gave them.
        args = copy(self._settings_of(model, args))
        self._reads_rows = kwargs.get("formatting_func") is None and not skips_preparation(args)
        if self._reads_rows:
            train_dataset, eval_dataset = (
                _canonical(train_dataset, "train", args),
                _canonical(eval_dataset, "eval", args),
            )
        if args.on_policy_fraction == 1:
            train_dataset = with_open_answers(train_dataset)
        check_teachers(type(self), teacher, args, {"train": train_dataset, "eval": eval_dataset})
        if args.on_policy_fraction:
            check_rollouts(teacher, train_dataset)
        if isinstance(model, str):
            quantization = kwargs.pop("quantization_config", None)
            model, processing_class = self._load_student(model, args, processing_class, quantization)
            # Else trl warns that it does not read them.
            args.model_init_kwargs = None
        if processing_class is None:
            processing_class = load_processing_class(name_of(model), "student")
        check_precision(args, args.emulated_bf16)
        say_emulated("student", model.dtype, args.device)
        # Read by `ImageReader`, which can say what is wrong with an image.
        train_dataset, eval_dataset = _unread(train_dataset), _unread(eval_dataset)
        check_training_data(train_dataset, eval_dataset, args, tokenizer_of(processing_class))
        self._start_reports()
        if args.trainable is not None:
            _train_parts(model, args.trainable, kwargs.get("peft_config"))
        self._counts: dict[str, Tensor] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=[self._clock, *self.method_callbacks(args), *(kwargs.pop("callbacks", None) or [])],
            **kwargs,
        )
        check_student(self)
        self._get_ready(teacher, teacher_processing_class)

    # What a method implements

    def item_losses(self, student: Supervised, signal: Any) -> ItemLosses:
        """The losses of one micro-batch; runs inside the student's forward. `signal` is None without a teacher."""
        raise NotImplementedError

    @classmethod
    def check_teacher(cls, teacher: Teacher, args: Any) -> None:
        """Raises UserError when the teacher does not answer with a signal that this method can learn from."""
        if not issubclass(teacher.signal_type, cls.accepts):
            accepted = " or ".join(signal.__name__ for signal in cls.accepts)
            raise UserError(
                f"{type(teacher).__name__} answers with {teacher.signal_type.__name__}, method {cls.method} needs "
                f"{accepted}. Use another teacher or another method."
            )

    def method_callbacks(self, args: Any) -> list[TrainerCallback]:
        """Callbacks of the method; those that are ExportableState are saved in and restored from the trainer state."""
        return []

    def ask(self, batch: Batch) -> Any:
        """The teacher's signal about a batch; None where nobody is asked."""
        if self.teacher is None:
            return None
        batch.check_answers()
        view = batch.teacher_view()
        return self.teacher.ask(view, view.supervised)

    def ask_ahead(self, batch: Batch, alone: bool) -> Batch:
        """The batch with what the teacher must have said before its items can be counted: nothing, in most methods.

        `alone` says that it is the only one of its optimizer step, so that what it holds lives no longer than that.
        """
        return batch

    def step_ended(self, means: dict[str, float]) -> None:
        """Called once per optimizer step with this step's mean over all ranks of the reports named in `step_means`.

        Without such names it is not called.
        """

    def read_student(self, hidden: Float[Tensor, "batch position width"], head: LMHead, view: View) -> Supervised:
        """What `item_losses` learns of the student; runs inside its forward."""
        supervised = view.supervised
        return Supervised(hidden[:, :-1][supervised], head, view.labels[:, 1:][supervised])

    def count_items(self, batch: Batch) -> dict[str, Tensor]:
        """How many items of each kind a micro-batch of this rank has."""
        return {"token": batch.student.supervised.sum()}

    # What methods share

    def fused(
        self,
        student: Supervised,
        signal: Any,
        objective: Objective = forward_kl,
        temperature: float = 1.0,
        ce_weight: float | None = None,
    ) -> ItemLosses:
        """The item losses of a token-level divergence mixed with cross-entropy, with all reports."""
        args = self.args
        loss = fused_loss(
            student.hidden,
            student.head,
            student.labels,
            signal,
            objective,
            temperature=temperature,
            ce_weight=args.ce_weight if ce_weight is None else ce_weight,
            chunk_size=args.chunk_size,
            precise=args.precise_logits,
            diagnostics=self._reports_now(),
            repeatable=args.combine == "gradmag",
        )
        sums = loss.sums
        if self.logs_apart and "divergence" in sums:
            # Of the tokens that "kl" is about; "divergence" itself is of all steps since the last log.
            sums = {**sums, "step_divergence": sums["divergence"]}
        tokens = len(student.labels)
        return ItemLosses({"token": loss.total}, {name: (total, tokens) for name, total in sums.items()})

    # Construction

    @classmethod
    def _settings_of(cls, student: Any, args: DistillationConfig | None) -> DistillationConfig:
        """The settings, or the default ones. Raises UserError for those of another method."""
        if args is None:
            name = (student if isinstance(student, str) else name_of(student)).rstrip("/").split("/")[-1]
            args = cls.config_class(f"{name or 'student'}-{cls.method}")
        if not isinstance(args, cls.config_class):
            raise UserError(f"{cls.__name__} takes a {cls.config_class.__name__}, not a {type(args).__name__}.")
        return args

    def _load_student(
        self, name: str, args: DistillationConfig, processing_class: Any, quantization: Any
    ) -> tuple[PreTrainedModel, Any]:
        given = args.model_init_kwargs or {}
        assert isinstance(given, dict)
        init: dict[str, Any] = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **given}
        init["quantization_config"] = quantization or init.get("quantization_config")
        if processing_class is None:
            hub = {key: init.get(key) for key in ("revision", "trust_remote_code")}
            processing_class = load_processing_class(name, "student", **hub)
        return load_model(name, "student", device=args.device, **init), processing_class

    def _get_ready(self, teacher: Any, teacher_processing_class: Any) -> None:
        """Makes the teacher and what turns rows into batches, and asks once before training."""
        args = self.args
        collate = self.data_collator
        self._row_names = RowNames()
        self.views = self._views_by(collate)
        allow_consumers(self.model)
        teaching = self.build_teacher(teacher, teacher_processing_class)
        self.teacher, self.vocab_size = teaching.teacher, teaching.vocab_size
        if isinstance(self.views, VisionViews) and teaching.processor is not None:
            self.views = self.views.with_teacher(teaching.processor)
        self._check_fit()
        self._stop_where_answers_end()
        self.data_collator = Collator(self.views, self._image_reader(), teaching.fill, bool(args.on_policy_fraction))
        if args.on_bad_row == "skip" and isinstance(self.views, VisionViews):
            # Finds a row to put in the place of others before the first batch, which may hold none.
            self.data_collator([dict(row) for row in islice(self.train_dataset, 8)])
        if self.teacher is not None:
            self.teacher.prepare(self.accelerator)
        if self.padding_free:
            self._check_packing(collate)
        if self.teacher is not None:
            for row in self._first_rows(self.teacher):
                # A teacher that cannot answer fails before training.
                self.ask(self._prepare_inputs(self.data_collator([row])))
        if args.on_policy_fraction:
            self._start_rollouts(Collator(self.views))
        if any(isinstance(callback, ProgressCallback) for callback in self.callback_handler.callbacks):
            self.remove_callback(ProgressCallback)
            self.add_callback(DistillationProgress)

    def _views_by(self, collate: Any) -> TextViews | VisionViews:
        if not isinstance(collate, VisionLabels):
            return TextViews(collate)
        self._row_names.add(self.train_dataset, "train")
        self._row_names.add(self.eval_dataset, "eval")
        return VisionViews(collate, self.args.on_bad_row == "skip", self._row_names)

    def _image_reader(self) -> ImageReader | None:
        """What decodes the images of rows, if they have any."""
        if not isinstance(self.views, VisionViews):
            return None
        companion = None
        if is_sharded(self.accelerator):
            companion = next((row for row in self.train_dataset if images_of(row)), None)
        return ImageReader(self.args.on_bad_row == "skip", companion, self._row_names)

    # The step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Collects one accumulated batch and counts its items of each kind over all ranks."""
        self._clock.begin()
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if 0 < len(batches) < num_batches:
            # A stream ends. The Trainer takes no step of too few, and would add their gradient to the next epoch's.
            check_stream(len(batches), num_batches, self.state.global_step)
            batches = []
        if self.rollouts is not None:
            batches = self._answered(batches)
        batches = [self.ask_ahead(batch, len(batches) == 1) for batch in batches]
        counts: dict[str, Tensor] = {}
        for batch in batches:
            for kind, count in self.count_items(batch).items():
                counts[kind] = counts.get(kind, torch.zeros((), dtype=torch.long, device=device)) + count.to(device)
        self._counts = {kind: self._summed(counts[kind]) for kind in sorted(counts)}
        return batches, num_items

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The Trainer's, of every tensor of a batch."""
        return inputs.map(self._prepare_input) if isinstance(inputs, Batch) else super()._prepare_inputs(inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-batch; after the last one of an optimizer step, `step_ended`."""
        loss = super().training_step(*args, **kwargs)
        last = self.accelerator.sync_gradients
        if self.step_means and last:
            means = self._means(self._step_sums)
            self._step_sums = {}
            # A step without a single item has no mean to learn from.
            if means:
                self.step_ended(means)
        return loss

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the loss of the accumulated batch, over the items of all ranks."""
        batch, counts = self.prepare(inputs)
        signal = self.ask(batch) if self.needs_teacher or self._reports_now() else None
        losses = self.forward(model, batch, lambda student: self.losses_of(student, signal))
        loss = self.total(losses, counts)
        self._record({**losses.reports, **self._reports_of(batch, losses, counts)})
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

    def forward(self, model: Any, batch: Batch, losses_of: Callable[[Supervised], ItemLosses]) -> ItemLosses:
        """What `losses_of` makes of the student, inside the wrapper's forward: there sharded weights are whole."""
        view = batch.student

        def consumer(hidden: Tensor, head: LMHead) -> tuple[dict, dict]:
            losses = losses_of(self.read_student(hidden, head.trimmed(self.vocab_size), view))
            # Plain containers: wrappers look for tensors in the output, and do not look into our dataclasses.
            return losses.totals, losses.reports

        return ItemLosses(*model(**view.inputs, consumer=consumer))

    def losses_of(self, student: Supervised, signal: Any) -> ItemLosses:
        """Those of the method; where each of several teachers speaks of its own tokens, their sums."""
        if not isinstance(signal, RoutedSignal):
            return self.item_losses(student, signal)
        return ItemLosses.of_parts(
            {name: self.item_losses(student.only(tokens), part) for name, (tokens, part) in signal.parts.items()}
        )

    def total(self, losses: ItemLosses, counts: Mapping[str, Tensor]) -> Tensor:
        """The sum of the kinds' means, each over its own count."""
        means = [total / counts[kind].clamp(min=1) for kind, total in losses.totals.items()]
        # Gradients are averaged over ranks, while the counts are already those of all ranks.
        return torch.stack(means).sum() * (self.accelerator.num_processes if self.model.training else 1)

    def _reports_of(self, batch: Batch, losses: ItemLosses, counts: Mapping[str, Tensor]) -> dict[str, Any]:
        """The reports that do not depend on the method."""
        reports: dict[str, Any] = {"supervised_tokens": (batch.student.supervised.sum(), 1)}
        if not self.model.training:
            reports |= {f"loss/{kind}": (total, counts[kind]) for kind, total in losses.totals.items()}
        if batch.skipped is not None:
            reports |= {name: (count, 1) for name, count in zip(BAD_ROWS, batch.skipped, strict=True)}
        return reports

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's evaluation, of these rows or of those of the constructor."""
        if self._reads_rows and not isinstance(eval_dataset, str):
            eval_dataset = _canonical(eval_dataset, "eval", self.args)
        eval_dataset = _unread(eval_dataset)
        if isinstance(self.views, VisionViews) and eval_dataset is not None:
            self._row_names.add(eval_dataset, "eval")
        return super().evaluate(eval_dataset, *args, **kwargs)


def _canonical(data: Any, split: str, args: Any) -> Any:
    return canonical(data, split, skip=args.on_bad_row == "skip", text_field=args.dataset_text_field)


def _train_parts(model: Any, parts: Any, peft_config: Any) -> None:
    if peft_config is not None or isinstance(model, PeftModel):
        raise UserError("trainable and PEFT both say what is trained: choose target_modules, or no adapter.")
    train_only(model, parts)


def _unread(data: Any) -> Any:
    if isinstance(data, dict):
        return {name: _unread(one) for name, one in data.items()}
    return image_column(data)
