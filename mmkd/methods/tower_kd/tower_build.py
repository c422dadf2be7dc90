"""The trainer of a recipe of tower_kd: its pictures, its student, and its teachers."""

from pathlib import Path

from transformers.trainer_utils import set_seed

from mmkd.data.picture_source import Pictures, load_pictures
from mmkd.models.vision_towers import load_tower, tower_config
from mmkd.preparation.checks import check_held_out
from mmkd.preparation.picture_batches import PictureRows
from mmkd.recipe.recipe import Run

from .tower_run import (
    check_arguments,
    image_processor,
    layers_of,
    new_student,
    role_of,
    settings_of,
    student_config,
    student_layer,
    student_processor,
    teacher_runs,
)
from .tower_trainer import TeacherTower, TowerKDTrainer


def pictures_of(run: Run) -> Pictures:
    """The pictures of a run's data. Raises UserError where an evaluation is asked for that has none."""
    rows = {"max_train_rows": run.arguments.max_train_rows, "max_eval_rows": run.arguments.max_eval_rows}
    pictures = load_pictures(run.arguments.data, **rows)
    check_held_out(pictures.held_out, run.training)
    return pictures


def build_tower_trainer(run: Run) -> TowerKDTrainer:
    """The trainer of a recipe of method tower_kd. Raises UserError for what a tower's run cannot use."""
    check_arguments(run)
    training, pictures = settings_of(run), pictures_of(run)
    processor = student_processor(run)
    teachers = {name: _teacher(name, own, weight) for name, (own, weight) in teacher_runs(run).items()}
    # The Trainer sets it again when it has its model.
    set_seed(training.seed)
    held_out = pictures.held_out
    return TowerKDTrainer(
        model=new_student(run),
        teachers=teachers,
        args=training,
        train_dataset=PictureRows(pictures.train, training.augmentation),
        eval_dataset=None if held_out is None else PictureRows(held_out),
        processing_class=processor,
        student_layer=student_layer(run),
    )


def _teacher(name: str, run: Run, weight: float) -> TeacherTower:
    arguments, hub = run.arguments, run.hub(run.arguments.teacher_revision)
    assert arguments.teacher is not None
    attention = arguments.teacher_attn_implementation
    settings = {"dtype": arguments.teacher_dtype, "device": run.training.device, "attn_implementation": attention}
    tower = load_tower(arguments.teacher, role_of(name), **settings, **hub)
    return TeacherTower(tower, image_processor(arguments.teacher, role_of(name), **hub), weight)


def write_stand_in(run: Run, folder: Path) -> None:
    """The config and the image processor of the tower that a run will leave."""
    config = student_config(run)
    if run.arguments.student_init == "prune":
        layers = layers_of(run)
        config.num_hidden_layers = layers if isinstance(layers, int) else len(layers)
    config.save_pretrained(folder)
    student_processor(run).save_pretrained(folder)


def check_tower_run(run: Run) -> None:
    """Raises UserError for settings, pictures and towers that training would refuse."""
    check_arguments(run)
    pictures_of(run)
    student_config(run)
    student_processor(run)
    for name, (own, _) in teacher_runs(run).items():
        hub = own.hub(own.arguments.teacher_revision)
        tower_config(str(own.arguments.teacher), role_of(name), **hub)
        image_processor(str(own.arguments.teacher), role_of(name), **hub)
