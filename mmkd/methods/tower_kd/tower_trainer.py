"""TowerKDTrainer: a vision tower that learns the features of one or several teacher towers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate.utils import broadcast
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerCallback

from mmkd.data.image_columns import image_column
from mmkd.data.picture_source import picture_split
from mmkd.errors import UserError
from mmkd.losses.standardisation import Moments
from mmkd.models.tower_heads import HEADS, TeacherHead, Widths, add_heads, head_of_teacher, let_towers_be_read
from mmkd.models.vision_towers import TowerView, image_side, look
from mmkd.preparation.checks import check_precision
from mmkd.preparation.picture_batches import PIXELS, TEACHER_PIXELS, PictureCollator, PictureRows, Pixels
from mmkd.training.run_trainer import RunTrainer

from .tower_config import TowerKDConfig as TowerKDConfig
from .tower_losses import view_cosines, view_terms

HEADS_FILE = "tower_heads.safetensors"
"""The heads in a checkpoint, with the scales of the teachers."""

_MEASURED = 16
"""Pictures that teachers are measured with at a time, whatever the batches: where there are fewer pictures than
channels, the last bit of a feature decides about a rotation."""


@dataclass(frozen=True)
class TeacherTower:
    """A teacher: a vision tower, what makes its pixels, and its share of the loss."""

    tower: PreTrainedModel
    processor: Any
    """Its image processor."""
    weight: float = 1.0


class TowerKDTrainer(RunTrainer):
    """transformers' Trainer for a vision tower without text.

    Args:
        model: the student, a vision tower of transformers.
        teachers: a `TeacherTower`, or several by name.
        args: settings of the method, by default the config's own with the output_dir "tower_kd".
        train_dataset: rows with a column `image` or `images`, whatever else they have; or `PictureRows`.
        eval_dataset: rows to measure on, in the same form.
        processing_class: the student's image processor.
        student_layer: the hidden layer of the student that is trained, such as the -2 that LLaVA reads. None: its
            output.
        callbacks: callbacks of transformers' Trainer.
        optimizers: an optimizer and a schedule in place of those that args ask for.
        optimizer_cls_and_kwargs: the class of an optimizer and its arguments, in place of `optim` in args.

    Raises UserError when student, teachers, data and settings cannot work together, before any step is taken.
    """

    method = "tower_kd"
    config_class: ClassVar[type[TowerKDConfig]] = TowerKDConfig
    takes_several: ClassVar[bool] = True
    accepts: ClassVar[tuple[type, ...]] = ()
    one_vocabulary: ClassVar[bool] = False
    # `compute_loss` divides by counts of the whole accumulated batch, so the Trainer must not divide again.
    loss_is_scaled_for_ga = True

    args: TowerKDConfig
    model: Any
    train_dataset: Any

    def __init__(
        self,
        model: PreTrainedModel,
        teachers: TeacherTower | Mapping[str, TeacherTower],
        args: TowerKDConfig | None = None,
        train_dataset: Dataset | PictureRows | None = None,
        eval_dataset: Dataset | PictureRows | None = None,
        processing_class: Any = None,
        *,
        student_layer: int | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        optimizer_cls_and_kwargs: tuple[type[Optimizer], dict[str, Any]] | None = None,
    ):
        args = self.config_class("tower_kd") if args is None else args
        if not isinstance(args, self.config_class):
            raise UserError(f"{type(self).__name__} takes a TowerKDConfig, not a {type(args).__name__}.")
        check_precision(args, args.emulated_bf16)
        if train_dataset is None or processing_class is None:
            raise UserError(
                "TowerKDTrainer needs train_dataset, and the student's image processor as processing_class."
            )
        train_dataset = _rows(train_dataset, "train", args.augmentation)
        named = {"": teachers} if isinstance(teachers, TeacherTower) else dict(teachers)
        whole = sum(teacher.weight for teacher in named.values())
        self.shares = {name: teacher.weight / whole for name, teacher in named.items()}
        self.towers: dict[str, Any] = {name: teacher.tower for name, teacher in named.items()}
        for tower in self.towers.values():
            tower.to(args.device).eval().requires_grad_(False)
        self.student_layer, self.teacher_layer = student_layer, args.teacher_layer
        student = Pixels(processing_class, image_side(model.config), "student")
        pixels = {
            name: Pixels(teacher.processor, image_side(teacher.tower.config), f"teacher {name}".strip())
            for name, teacher in named.items()
        }
        self.collate = PictureCollator(student, pixels)
        self._add_heads(model, args, train_dataset)
        self._images = torch.zeros(())
        self._measured = False
        super().__init__(
            model=model,
            args=args,
            data_collator=self.collate,
            train_dataset=train_dataset,
            eval_dataset=None if eval_dataset is None else _rows(eval_dataset, "eval", "none"),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
        )

    def _add_heads(self, model: PreTrainedModel, args: TowerKDConfig, rows: PictureRows) -> None:
        """Gives the student a head for each teacher, of the widths that both show on a first picture."""
        first = self.collate([rows[0]])
        with torch.no_grad():
            ours = Widths.of(look(model.eval(), first[PIXELS].to(model.device, model.dtype), self.student_layer))
            views = {
                name: self._look(name, first[TEACHER_PIXELS][name].to(tower.device))
                for name, tower in self.towers.items()
            }
        model.train()
        heads = {
            name: TeacherHead(ours, Widths.of(view), args.adaptor, args.adaptor_width) for name, view in views.items()
        }
        add_heads(model, heads)
        let_towers_be_read(model)

    def create_accelerator_and_postprocess(self) -> None:
        """The Trainer's. Raises UserError where weights would be cut over devices."""
        super().create_accelerator_and_postprocess()
        plugin = self.accelerator.state.deepspeed_plugin if self.is_deepspeed_enabled else None
        if self.is_fsdp_enabled or (plugin is not None and plugin.zero_stage == 3):
            raise UserError(
                "Vision towers are not trained under FSDP2 and ZeRO-3. They are small: use accelerate_config ddp "
                "or zero2.",
                because="not built",
            )

    # The step

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Collects one accumulated batch and counts its images over all ranks."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        images = sum(len(batch[PIXELS]) for batch in batches)
        self._images = self._summed(torch.tensor(images, device=device))
        return batches, num_items

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The micro-batch's share of the loss of the accumulated batch, over the images of all ranks."""
        views = self.ask(inputs)
        total, reports = model(
            pixel_values=inputs[PIXELS],
            reader=lambda student: self.losses(student, views),
            layer=self.student_layer,
        )
        self._record(reports)
        # Gradients are averaged over ranks, while the count is already that of all ranks.
        loss = total.sum() / self._images.clamp(min=1) * self.accelerator.num_processes
        return (loss, total) if return_outputs else loss

    @torch.no_grad()
    def ask(self, inputs: Mapping[str, Any]) -> dict[str, TowerView]:
        """What each teacher says of a batch, on its scale."""
        return {
            name: head_of_teacher(self.model, name).scaled(self._look(name, inputs[TEACHER_PIXELS][name]))
            for name in self.towers
        }

    def _look(self, name: str, pixels: Tensor) -> TowerView:
        return look(self.towers[name], pixels.to(self.towers[name].dtype), self.teacher_layer)

    def losses(self, student: TowerView, views: Mapping[str, TowerView]) -> tuple[Tensor, dict[str, Any]]:
        """The loss of each image, and reports."""
        weights, images = self.args.term_weights, len(student.patches)
        total = student.summary.new_zeros(images, dtype=torch.float32)
        reports: dict[str, tuple[Tensor, int]] = {}
        for name, view in views.items():
            head = head_of_teacher(self.model, name)
            terms = view_terms(student, view, head, self.args)
            total = total + self.shares[name] * sum(weights[term] * value for term, value in terms.items())
            reports |= {_report(f"{term}_loss", name): (value.sum(), images) for term, value in terms.items()}
        return total, reports

    # Evaluation

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor | None, Any, Any]:
        """Records the loss, and the cosine between student and each teacher, of a batch."""
        inputs = self.on_device(inputs)
        real = self._real(len(inputs[PIXELS]))

        def reader(student: TowerView) -> tuple[Tensor, dict[str, Any]]:
            total = self.losses(student, views)[0]
            cosines = {
                _report(measure, name): value
                for name, view in views.items()
                for measure, value in view_cosines(student, view, head_of_teacher(self.model, name)).items()
            }
            return total, {name: (value[:real].sum(), real) for name, value in {**cosines, "loss": total}.items()}

        with torch.no_grad(), self.compute_loss_context_manager():
            views = self.ask(inputs)
            _, reports = model(pixel_values=inputs[PIXELS], reader=reader, layer=self.student_layer)
        self._record(reports, "eval")
        return None, None, None

    def _real(self, images: int) -> int:
        """The images of a batch that ranks do not repeat to make the last batch of an evaluation even."""
        state = self.accelerator.gradient_state
        if self.accelerator.num_processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return images
        return min(images, max(0, state.remainder - self.accelerator.process_index * images))

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The Trainer's, also of rows as the constructor takes them."""
        if isinstance(eval_dataset, Dataset):
            eval_dataset = _rows(eval_dataset, "eval", "none")
        return super().get_eval_dataloader(eval_dataset)

    def collator_of(self, training: bool) -> Any:
        """The same of both."""
        return self.collate

    # Scales and heads

    def training_starts(self) -> None:
        """Measures the teachers' scales, unless a checkpoint brings them."""
        super().training_starts()
        self.measure_scales()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's; one before any training needs the scales, too."""
        self.measure_scales()
        return super().evaluation_loop(*args, **kwargs)

    def measure_scales(self) -> None:
        """Mean and variance of each teacher's features, over the first pictures of the training data as they are."""
        if self._measured:
            return
        self._measured = True
        if self.args.normalize_features == "none":
            return
        rows = PictureRows(self.train_dataset.split)
        chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: self.args.normalize_images]
        moments: dict[str, tuple[Moments, Moments]] = {}
        for numbers in chosen.split(_MEASURED):
            shown = self.collate([rows[int(number)] for number in numbers])[TEACHER_PIXELS]
            for name in self.towers:
                with torch.no_grad(), self.compute_loss_context_manager():
                    view = self._look(name, shown[name].to(self.args.device))
                kinds = (view.patches.flatten(0, 2), view.summary)
                if name not in moments:
                    moments[name] = (Moments(kinds[0].shape[-1]), Moments(kinds[1].shape[-1]))
                for counted, features in zip(moments[name], kinds, strict=True):
                    counted.add(features)
        for name, (patches, summary) in moments.items():
            head = head_of_teacher(self.model, name)
            head.patch_scale.measure(patches, self.args.normalize_features)
            head.summary_scale.measure(summary, self.args.normalize_features)
            for buffer in head.buffers():
                buffer.copy_(cast(Any, broadcast(buffer)))

    def checkpoint_to_save(self, folder: Path) -> None:
        """Keeps the heads and scales, which the student's own files leave out."""
        super().checkpoint_to_save(folder)
        if self.args.should_save:
            weights = {name: tensor.contiguous() for name, tensor in getattr(self.model, HEADS).state_dict().items()}
            save_file(weights, str(folder / HEADS_FILE))

    def weights_restored(self, checkpoint: Path) -> None:
        """Loads the heads and scales of a checkpoint, too."""
        super().weights_restored(checkpoint)
        path = checkpoint / HEADS_FILE
        if path.is_file():
            getattr(self.model, HEADS).load_state_dict(load_file(str(path)))
            self._measured = True


def _rows(dataset: Dataset | PictureRows, split: str, augmentation: str) -> PictureRows:
    """The pictures of rows. Raises UserError where they have none."""
    if isinstance(dataset, PictureRows):
        return dataset
    listed = image_column(dataset)
    if "images" not in listed.column_names:
        raise UserError(
            f"The {split} rows have no column `image` or `images`; they have {', '.join(listed.column_names)}."
        )
    return PictureRows(picture_split(listed.select_columns(["images"]), f"{split}_dataset", split), augmentation)


def _report(measure: str, teacher: str) -> str:
    return f"{measure}_{teacher}" if teacher else measure
