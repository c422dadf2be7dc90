"""The trainer of a recipe of clip_kd: its pairs, its student, and its teachers."""

from pathlib import Path

from transformers.trainer_utils import set_seed
from trl.trainer.utils import get_peft_config

from mmkd.models.dual_encoder import encoder_config, encoder_processor, kind_of_encoder
from mmkd.recipe.recipe import Run

from .clip_run import (
    check_arguments,
    empty_model,
    empty_student,
    load_teacher,
    new_student,
    pairs_of,
    role_of,
    settings_of,
    small_config,
    student_hub,
    student_name,
    teacher_runs,
)
from .clip_trainer import ContrastiveKDTrainer, TeacherEncoder
from .pair_inputs import check_pairs


def build_clip_trainer(run: Run) -> ContrastiveKDTrainer:
    """The trainer of a recipe of method clip_kd. Raises UserError for what cannot be distilled."""
    check_arguments(run)
    training, (train, held_out) = settings_of(run), pairs_of(run)
    teachers = {
        name: TeacherEncoder(load_teacher(own, name), weight) for name, (own, weight) in teacher_runs(run).items()
    }
    # The Trainer sets it again when it has its model.
    set_seed(training.seed)
    return ContrastiveKDTrainer(
        model=new_student(run),
        teachers=teachers,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=get_peft_config(run.student),
    )


def check_clip_run(run: Run) -> None:
    """Raises UserError for settings, pairs and encoders that training would refuse."""
    check_arguments(run)
    check_pairs(pairs_of(run)[0], settings_of(run))
    empty_student(run)
    for name, (own, _) in teacher_runs(run).items():
        if own.arguments.teacher_cache is not None:
            load_teacher(own, name)
            continue
        empty_model(str(own.arguments.teacher), role_of(name), **own.hub(own.arguments.teacher_revision))


def write_stand_in(run: Run, folder: Path) -> None:
    """The config and the processor of the student that a run will leave."""
    name, hub = student_name(run), student_hub(run)
    if kind_of_encoder(name, **hub) == "transformers":
        small_config(run, encoder_config(name, "student", **hub)).save_pretrained(folder)
        encoder_processor(name, "student", **hub).save_pretrained(folder)
    else:
        new_student(run).save(folder)
