"""What a recipe of tower_kd says: its student tower, its teachers, and what it must not set."""

from typing import Any

from transformers import AutoImageProcessor

from mmkd.errors import UserError, first_line
from mmkd.models.vision_towers import cut_tower, load_tower, new_tower, tower_config
from mmkd.recipe.arguments import VIEW
from mmkd.recipe.recipe import Run
from mmkd.recipe.unread_keys import check_read, unread_keys

from .tower_config import TowerKDConfig

# What a recipe of every method may set, and a tower's run reads.
_READ = {"method", "data", "teacher", "teacher_revision", "teacher_dtype", "teacher_attn_implementation", "teachers"}
_READ |= {"student", "student_init", "student_vision_tower", "student_vision_layer", "student_layers"}
_READ |= {"max_train_rows", "max_eval_rows", "dry_run"}


def settings_of(run: Run) -> TowerKDConfig:
    """The settings of the method."""
    config: Any = run.training
    assert isinstance(config, TowerKDConfig)
    return config


def student_name(run: Run) -> str:
    """The tower that is trained: student_vision_tower, else `student`, else the teacher's where that one is cut."""
    arguments = run.arguments
    name = arguments.student_vision_tower or arguments.student or arguments.teacher
    assert name is not None
    return name


def student_layer(run: Run) -> int | None:
    """The hidden layer that is trained: the one that a LLaVA-style student will read; None for the output."""
    if run.arguments.student_init == "llava":
        return run.arguments.student_vision_layer
    return run.keys.get("student_vision_layer")


def check_arguments(run: Run) -> None:
    """Raises UserError for keys of tokens, and for a student or a teacher that is none."""
    arguments = run.arguments
    why = "it is about tokens. Remove it, or set it to null in this stage of a recipe in stages."
    check_read(arguments, _READ, why)
    if run.student.use_peft or run.student.load_in_4bit or run.student.load_in_8bit:
        raise UserError(
            "Method tower_kd trains the whole tower. Remove use_peft, load_in_4bit and load_in_8bit, or set them to "
            "null in this stage of a recipe in stages.",
            because="not built",
        )
    teachers: Any = arguments.teachers or {}
    viewing = next((name for name, keys in teachers.items() if keys.get(VIEW) is not None), None)
    if viewing is not None:
        raise UserError(
            f"teachers.{viewing} has a teacher_view, which is about the text that a teacher reads. Remove it.",
            because="meaning",
        )
    for name, own in run.by_teacher().items():
        if own.arguments.teacher is None:
            raise UserError(
                f"The features of teacher {name} come from its model; set its `teacher` to a Hub id or a folder. "
                "Caches and servers hold what a teacher says of tokens.",
                because="not built",
            )


def unused_keys() -> dict[str, str]:
    """The keys of every recipe that one of vision towers has no use for -> why."""
    return unread_keys(_READ, "It is about tokens.", "The whole tower is trained.")


def student_hub(run: Run) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for the student's tower."""
    made_of_teacher = run.arguments.student_vision_tower is None and run.arguments.student is None
    return run.hub(run.arguments.teacher_revision if made_of_teacher else run.student.model_revision)


def student_config(run: Run) -> Any:
    """The config of the student's tower, before layers are cut."""
    return tower_config(student_name(run), "student", **student_hub(run))


def new_student(run: Run) -> Any:
    """The student's tower before training."""
    arguments, training = run.arguments, settings_of(run)
    if arguments.student_init == "random":
        return new_tower(student_config(run))
    dtype, attention = run.student.dtype or "float32", run.student.attn_implementation
    settings = {"dtype": dtype, "device": training.device, "attn_implementation": attention, **student_hub(run)}
    tower = load_tower(student_name(run), "student", **settings)
    if arguments.student_init != "prune":
        return tower
    return cut_tower(tower, layers_of(run))


def layers_of(run: Run) -> Any:
    """The layers to keep of a tower that is cut. Raises UserError for other sizes."""
    arguments = run.arguments
    if arguments.student_layers is None:
        raise UserError(
            "Of a vision tower, student_init: prune leaves out layers only: set student_layers.", because="not built"
        )
    layers = arguments.student_layers
    return layers[0] if len(layers) == 1 else layers


def image_processor(name: str, role: str, **hub: Any) -> Any:
    """The image processor of a tower. Raises UserError when there is none."""
    try:
        return AutoImageProcessor.from_pretrained(name, **hub)
    except (OSError, ValueError, ImportError) as error:
        reason = first_line(error)
        raise UserError(f"The {role} {name!r} has no loadable image processor ({reason}).") from error


def student_processor(run: Run) -> Any:
    """The image processor of the student."""
    return image_processor(student_name(run), "student", **student_hub(run))


def teacher_runs(run: Run) -> dict[str, tuple[Run, float]]:
    """The run as it would be with each teacher alone, by name, and the teacher's weight."""
    teachers: Any = run.arguments.teachers or {}
    return {name: (own, teachers.get(name, {}).get("weight", 1.0)) for name, own in run.by_teacher().items()}


def role_of(name: str) -> str:
    """How messages call a teacher."""
    return f"teacher {name}".strip()
