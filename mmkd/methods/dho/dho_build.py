"""The trainer of a recipe of method dho: its rows, its student, and its teacher's logits."""

from dataclasses import replace
from typing import Any

from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
from transformers.trainer_utils import set_seed

from mmkd.data.class_rows import ClassRows
from mmkd.data.classification import ClassificationData
from mmkd.errors import UserError
from mmkd.models.dual_head import DualHeadForImageClassification, DualHeadForSequenceClassification
from mmkd.models.load import computed_dtype
from mmkd.recipe.recipe import Run
from mmkd.teachers.class_signals import ClassSignals
from mmkd.teachers.classifiers import ClassTeacher, TipAdapterTeacher, ZeroShotTeacher

from .adapter_start import begin_adapter
from .class_aspects import cached_aspects
from .class_run import check_arguments, load_classes, settings_of
from .class_teacher import cached_signals, runs_of_teachers, unseen_classes, zero_shot
from .dho_trainer import DHOTrainer


def build_dho_trainer(run: Run) -> DHOTrainer:
    """The trainer of a recipe of method dho. Raises UserError for what a classifier's run cannot use."""
    training = settings_of(run)
    check_arguments(run)
    classes = load_classes(run)
    data = classes.data
    processing_class = student_processor(run, classes.is_text)
    rows = ClassRows(
        classes.rows.dataset,
        processing_class,
        augmentation=training.augmentation,
        max_length=training.max_length,
        keep=training.keep_rows,
    )
    signals, teacher = cached_signals(run, classes) if training.asks_teacher else (ClassSignals(), None)
    if training.aspects is not None:
        signals = replace(signals, aspects=cached_aspects(run, classes))
    set_seed(training.seed)
    model = new_student(run, data)
    if training.kd_head == "adapter":
        begin_adapter(model, text_teacher(run, data, teacher).text_weights, rows, training)
    if training.head_init == "text":
        model.init_heads(text_teacher(run, data, teacher).text_embeddings)
    return DHOTrainer(
        model=model,
        teacher=signals,
        args=training,
        train_dataset=rows,
        eval_dataset=data.validation,
        test_dataset=data.test,
        processing_class=processing_class,
        unseen=unseen_classes(run, classes, teacher),
    )


def text_teacher(run: Run, data: ClassificationData, teacher: ClassTeacher | None) -> ZeroShotTeacher:
    """The teacher with texts of the classes, loaded if it is not yet. Raises UserError for one without."""
    if teacher is None:
        teacher = zero_shot(next(iter(runs_of_teachers(run).values())), data)
    embedded = teacher.zero_shot if isinstance(teacher, TipAdapterTeacher) else teacher
    if not isinstance(embedded, ZeroShotTeacher):
        training = settings_of(run)
        key = "kd_head: adapter" if training.kd_head == "adapter" else "head_init: text"
        raise UserError(f"{key} needs a teacher with text embeddings, not {training.teacher_kind}.", because="meaning")
    return embedded


def student_processor(run: Run, text: bool) -> Any:
    """The image processor or tokenizer of the student. Raises UserError when there is none."""
    auto_class: Any = AutoTokenizer if text else AutoImageProcessor
    hub = {"revision": run.student.model_revision, "trust_remote_code": run.training.trust_remote_code}
    try:
        return auto_class.from_pretrained(run.arguments.student, **hub)
    except (OSError, ValueError) as error:
        kind = "tokenizer" if text else "image processor"
        raise UserError(f"The student {run.arguments.student!r} has no loadable {kind} ({error}).") from error


def new_student(run: Run, data: ClassificationData) -> Any:
    """The dual-head student of a recipe, before training."""
    arguments, training, text = run.arguments, settings_of(run), data.recipe.text is not None
    assert arguments.student is not None
    cls: Any = DualHeadForSequenceClassification if text else DualHeadForImageClassification
    hub = {"revision": run.student.model_revision, "trust_remote_code": training.trust_remote_code}
    backbone: Any = arguments.student
    loading: dict[str, Any] = {"dtype": run.student.dtype or "float32", **hub}
    if arguments.student_init == "random":
        backbone, loading = AutoConfig.from_pretrained(arguments.student, **hub), {}
    if run.student.attn_implementation is not None and loading:
        loading["attn_implementation"] = run.student.attn_implementation
    if loading:
        config = AutoConfig.from_pretrained(backbone, **hub)
        loading["dtype"] = computed_dtype(loading["dtype"], config, training.device)
    return cls.from_backbone(
        backbone, list(data.class_names), pooling=training.pooling, kd_head=training.kd_head, **loading
    )
