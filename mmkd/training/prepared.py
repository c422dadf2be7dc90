"""Prepared: what of a training can be known before its Trainer exists, made from the arguments of a constructor."""

from collections.abc import Collection
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

from peft import PeftModel
from transformers import PreTrainedModel

from mmkd.data.image_columns import image_column, second_image_column
from mmkd.data.layouts import canonical
from mmkd.errors import UserError
from mmkd.models.backbone import name_of
from mmkd.models.load import load_model, load_processing_class, tokenizer_of
from mmkd.models.parts import train_only
from mmkd.precision import say_emulated
from mmkd.preparation.checks import check_held_out, check_precision, check_training_data
from mmkd.preparation.prepared_rows import skips_preparation
from mmkd.preparation.prompt_rows import answered, with_open_answers
from mmkd.seams.bitsandbytes_seam import keep_differentiable

from .config import DistillationConfig
from .rewards import with_rated_rows
from .rollouts import check_rollouts
from .self_teaching import itself_in
from .teacher_views import image_columns, teacher_views_of
from .teaching import check_teachers


@dataclass(frozen=True)
class Prepared:
    """Settings, rows and student of a training, checked against each other and the method."""

    args: DistillationConfig
    model: Any
    processing_class: Any
    train: Any
    evaluation: Any
    reads_rows: bool
    """Whether rows may have any layout, and not only one that the collator takes."""

    @classmethod
    def of(
        cls,
        trainer: Any,
        model: str | PreTrainedModel | Any,
        teacher: Any,
        args: DistillationConfig | None,
        rows: tuple[Any, Any],
        processing_class: Any,
        quantization: Any = None,
        peft: Any = None,
        formatting: Any = None,
    ) -> Self:
        """From what the constructor of a trainer's class is given, which stays as it is; `rows` train and evaluate.

        Raises UserError when student, teacher, data and settings cannot work together.
        """
        if teacher is None and trainer.needs_teacher:
            raise UserError(f"Method {trainer.method} needs a teacher: pass a Hub id, a folder, a model or a Teacher.")
        # The Trainer writes into its settings, and trl warns of this one beside a student that is loaded.
        settings = settings_of(trainer, model, args)
        args = copy(settings)
        reads_rows = formatting is None and not skips_preparation(args)
        train, evaluation = rows
        if reads_rows:
            train, evaluation = (
                canonical_rows(data, split, args, teacher) for data, split in ((train, "train"), (evaluation, "eval"))
            )
        if args.answers_everything:
            train, evaluation = with_open_answers(train), answered(evaluation)
        if args.reward is not None:
            train = with_rated_rows(train)
        check_held_out(evaluation, args)
        check_teachers(trainer, teacher, args, {"train": train, "eval": evaluation})
        if args.on_policy_fraction:
            check_rollouts(teacher)
        if isinstance(model, str):
            model, processing_class = _load_student(model, settings, processing_class, quantization)
            args.model_init_kwargs = None
        if processing_class is None:
            processing_class = load_processing_class(name_of(model), "student")
        for own in itself_in(teacher):
            own.reads_with(processing_class)
        check_precision(args, args.emulated_bf16)
        say_emulated("student", model.dtype, args.device)
        keep_differentiable(model)
        columns = image_columns(teacher, args)
        train, evaluation = unread(train, "train", columns), unread(evaluation, "eval", columns)
        check_training_data(train, evaluation, args, tokenizer_of(processing_class))
        if args.trainable is not None:
            if peft is not None or isinstance(model, PeftModel):
                raise UserError(
                    "trainable and PEFT both say what is trained: choose target_modules, or no adapter.",
                    because="meaning",
                )
            train_only(model, args.trainable)
        return cls(args, model, processing_class, train, evaluation, reads_rows)


def settings_of(trainer: Any, student: Any, args: DistillationConfig | None) -> DistillationConfig:
    """The settings, or the default ones of a trainer's class. Raises UserError for those of another method."""
    if args is None:
        name = (student if isinstance(student, str) else name_of(student)).rstrip("/").split("/")[-1]
        args = trainer.config_class(f"{name or 'student'}-{trainer.method}")
    if not isinstance(args, DistillationConfig) or not isinstance(args, trainer.config_class):
        raise UserError(f"{trainer.__name__} takes a {trainer.config_class.__name__}, not a {type(args).__name__}.")
    return args


def canonical_rows(data: Any, split: str, args: DistillationConfig, teacher: Any = None) -> Any:
    """The rows in TRL's columns, whatever layout they have, with those that a teacher's view reads."""
    read = dict.fromkeys(name for view in teacher_views_of(teacher, args).values() for name in view.reads)
    skip = args.on_bad_row == "skip"
    return canonical(data, split, skip=skip, text_field=args.dataset_text_field, keep=list(read))


def unread(data: Any, split: str, more: Collection[str] = ()) -> Any:
    """The rows with their images as they are stored: `ImageReader` reads them, and says what is wrong with one.

    `more` names other columns with images. Raises UserError where there is no such column.
    """
    if isinstance(data, dict):
        return {name: unread(rows, str(name), more) for name, rows in data.items()}
    data = image_column(data)
    for name in more:
        data = second_image_column(data, name, split)
    return data


def _load_student(
    name: str, args: DistillationConfig, processing_class: Any, quantization: Any
) -> tuple[PreTrainedModel, Any]:
    settings = args.model_init_kwargs or {}
    assert isinstance(settings, dict)
    init: dict[str, Any] = {"dtype": "float32", "trust_remote_code": args.trust_remote_code, **settings}
    init["quantization_config"] = quantization or init.get("quantization_config")
    if processing_class is None:
        hub = {key: init.get(key) for key in ("revision", "trust_remote_code")}
        processing_class = load_processing_class(name, "student", **hub)
    return load_model(name, "student", device=args.device, **init), processing_class
