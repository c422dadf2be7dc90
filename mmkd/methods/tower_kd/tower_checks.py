"""Checks of `mmkd doctor` on a recipe of method tower_kd: pictures, student, teachers, and memory."""

from accelerate import init_empty_weights
from PIL import Image

from mmkd.data.picture_source import Pictures
from mmkd.models.vision_towers import cut_tower, grid_of, image_side, new_tower, tower_config
from mmkd.preflight.book import Book
from mmkd.preflight.costs import device_memory
from mmkd.preflight.facts import Finding
from mmkd.preflight.picture_checks import readable_pictures
from mmkd.preflight.whole_model import training_state
from mmkd.preparation.picture_batches import Pixels
from mmkd.recipe.recipe import Run
from mmkd.recipe.run import check_surroundings
from mmkd.units import readable_size

from .tower_build import pictures_of
from .tower_run import (
    check_arguments,
    image_processor,
    layers_of,
    role_of,
    settings_of,
    student_config,
    student_processor,
    teacher_runs,
)


def examine_tower(run: Run, sharded: bool) -> list[Finding]:
    """What all checks of a recipe of towers found; a check that cannot be made is a problem."""
    book = Book()
    book.attempt("settings", check_surroundings, run)
    book.attempt("settings", check_arguments, run)
    if sharded:
        text = "accelerate_config spreads weights over devices, and vision towers are trained whole."
        book.findings.append(Finding("problem", "settings", text, "Use ddp or zero2."))
    pictures = book.attempt("data", pictures_of, run)
    if pictures is not None:
        book.check("data", _data, pictures)
        book.check("images", readable_pictures, len(pictures.train), pictures.train.__getitem__)
    book.check("student", _student, run)
    for book.teacher, (own, _) in teacher_runs(run).items():
        if own.arguments.teacher is not None:
            book.check("teacher", _teacher, own, book.teacher)
    return book.findings


def empty_tower(run: Run) -> object:
    """The student without weights, cut as the recipe asks."""
    config = student_config(run)
    with init_empty_weights(include_buffers=False):
        tower = new_tower(config)
        return cut_tower(tower, layers_of(run)) if run.arguments.student_init == "prune" else tower


def _data(pictures: Pictures) -> list[Finding]:
    held_out = pictures.held_out
    measured = "none to measure on" if held_out is None else f"{len(held_out):,} to measure on"
    findings = [Finding("ok", "data", f"{len(pictures.train):,} different pictures to learn, {measured}.")]
    splits = [pictures.train, *([] if held_out is None else [held_out])]
    return findings + [Finding("ok", "data", note) for split in splits for note in split.notes]


def _student(run: Run) -> list[Finding]:
    config = student_config(run)
    seen = _seen(Pixels(student_processor(run), image_side(config), "student"), config)
    tower = empty_tower(run)
    total = sum(training_state(tower, settings_of(run)).values())  # pyright: ignore[reportArgumentType]
    device, room = device_memory()
    count = sum(parameter.numel() for parameter in tower.parameters())  # pyright: ignore[reportAttributeAccessIssue]
    text = f"A {config.model_type} of {count / 1e6:.2f} M parameters, {seen}. Weights, gradients and optimizer take "
    text += f"{readable_size(total)} of the {readable_size(room)} of {device}."
    return [Finding("ok" if total < 0.8 * room else "warning", "student", text)]


def _teacher(run: Run, name: str) -> list[Finding]:
    arguments, hub = run.arguments, run.hub(run.arguments.teacher_revision)
    assert arguments.teacher is not None
    config = tower_config(arguments.teacher, role_of(name), **hub)
    processor = image_processor(arguments.teacher, role_of(name), **hub)
    seen = _seen(Pixels(processor, image_side(config), role_of(name)), config)
    return [Finding("ok", "teacher", f"{arguments.teacher} is a {config.model_type}, {seen}.")]


def _seen(pixels: Pixels, config: object) -> str:
    """What a tower makes of a picture, in words. Raises UserError where it cannot read one."""
    height, width = pixels([Image.new("RGB", (96, 96))]).shape[-2:]
    patch = getattr(config, "patch_size", None)
    if not isinstance(patch, int):
        return f"images of {height} x {width} pixels"
    rows, columns, _ = grid_of((height // patch) * (width // patch), (height, width), patch)
    return f"images of {height} x {width} pixels, {rows} x {columns} patches"
