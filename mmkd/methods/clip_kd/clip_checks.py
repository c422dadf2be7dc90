"""Checks of `mmkd doctor` on a recipe of method clip_kd: pairs, student, teachers, and memory."""

from collections import Counter
from typing import Any

from PIL import Image

from mmkd.models.dual_encoder import DualEncoder, encoder_config, encoder_processor, kind_of_encoder
from mmkd.preflight.book import Book
from mmkd.preflight.costs import device_memory
from mmkd.preflight.facts import Finding
from mmkd.preflight.picture_checks import readable_pictures
from mmkd.preflight.whole_model import training_state
from mmkd.preparation.pair_batches import PairRows
from mmkd.recipe.recipe import Run
from mmkd.recipe.run import check_surroundings
from mmkd.teachers.cached_encoder import CachedEncoder
from mmkd.units import readable_size

from .clip_run import (
    check_arguments,
    empty_model,
    empty_student,
    load_teacher,
    pairs_of,
    role_of,
    settings_of,
    student_hub,
    student_name,
    teacher_runs,
)
from .pair_inputs import check_kinds, check_pairs

_MANY = 0.05
"""The share of pairs with a caption that another pair of the batch has, from which doctor warns."""


def examine_clip(run: Run, sharded: bool) -> list[Finding]:
    """What all checks of a recipe of pairs found; a check that cannot be made is a problem."""
    book = Book()
    book.attempt("settings", check_surroundings, run)
    book.attempt("settings", check_arguments, run)
    if sharded and settings_of(run).learns_masks:
        text = "accelerate_config cuts weights up over devices, and inherit: auto masks what whole modules compute."
        book.findings.append(Finding("problem", "settings", text, "Use ddp or zero2."))
    pairs = book.attempt("data", pairs_of, run)
    if pairs is not None:
        book.check("data", _data, run, *pairs)
        if pairs[0].has_images:
            book.check("images", readable_pictures, len(pairs[0]), lambda row: pairs[0].split[row])
    book.check("student", _student, run, pairs)
    for book.teacher, (own, _) in teacher_runs(run).items():
        book.check("teacher", _teacher, own, book.teacher, pairs)
    return book.findings


def pairs_in_step(run: Run) -> int:
    """The pairs of an optimizer step of all processes."""
    args = settings_of(run)
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


def shared_captions(rows: PairRows, batch: int) -> float:
    """The share of pairs that are expected to have the caption of another pair of their batch."""
    captions = Counter(caption for own in rows.split.captions for caption in own[:1])
    pairs = sum(captions.values())
    alone = sum(count * (1 - (count - 1) / max(1, pairs - 1)) ** (batch - 1) for count in captions.values())
    return 1 - alone / pairs


def _data(run: Run, train: PairRows, held_out: PairRows | None) -> list[Finding]:
    check_pairs(train, settings_of(run))
    measured = "none to measure on" if held_out is None else f"{len(held_out):,} to measure on"
    kind = "pictures with captions" if train.has_images else "pairs of texts"
    findings = [Finding("ok", "data", f"{len(train):,} {kind} to learn, {measured}.")]
    splits = [train, *([] if held_out is None else [held_out])]
    findings += [Finding("ok", "data", note) for own in splits for note in own.split.notes]
    share = shared_captions(train, pairs_in_step(run))
    if share <= _MANY:
        return findings
    text = f"About {share:.0%} of the pairs of a batch have a caption that another pair has too."
    if settings_of(run).same_caption == "negative" and _is_siglip(run):
        text += " SigLIP's loss takes them for wrong answers to each other and for right ones at once."
        return [*findings, Finding("warning", "data", text, "Set same_caption: positive, or ignore.")]
    return [*findings, Finding("ok", "data", f"{text} Their loss cannot reach 0.")]


def _is_siglip(run: Run) -> bool:
    name, hub = str(run.arguments.student), student_hub(run)
    if kind_of_encoder(name, **hub) != "transformers":
        return False
    return encoder_config(name, "student", **hub).model_type.startswith("siglip")


def _student(run: Run, pairs: tuple[PairRows, Any] | None) -> list[Finding]:
    name, hub, model = student_name(run), student_hub(run), empty_student(run)
    total = sum(training_state(model, settings_of(run)).values())
    device, room = device_memory()
    text = f"{_described(name, 'student', model, pairs, **hub)}. Weights, gradients and optimizer take "
    text += f"{readable_size(total)} of the {readable_size(room)} of {device}."
    return [Finding("ok" if total < 0.8 * room else "warning", "student", text)]


def _teacher(run: Run, name: str, pairs: tuple[PairRows, Any] | None) -> list[Finding]:
    if run.arguments.teacher_cache is not None:
        encoder = load_teacher(run, name)
        if pairs is not None:
            check_kinds(encoder.name, role_of(name), encoder.has_images, pairs[0])
        return [Finding("ok", "teacher", f"{described_encoder(encoder)}.")]
    own, hub = str(run.arguments.teacher), run.hub(run.arguments.teacher_revision)
    model = empty_model(own, role_of(name), **hub)
    return [Finding("ok", "teacher", f"{own}: {_described(own, role_of(name), model, pairs, **hub)}.")]


def _described(name: str, role: str, model: Any, pairs: tuple[PairRows, Any] | None, **hub: Any) -> str:
    """An encoder in words. Raises UserError where it cannot read the pairs."""
    kind = kind_of_encoder(name, **hub)
    if pairs is not None:
        check_kinds(name, role, kind != "sentence", pairs[0])
    count = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    if kind != "transformers":
        what = "encoder of sentences" if kind == "sentence" else "model of open_clip"
        return (
            f"an {what} of {count:.2f} M parameters" if kind == "sentence" else f"a {what}, {count:.2f} M parameters"
        )
    config, processor = encoder_config(name, role, **hub), encoder_processor(name, role, **hub)
    shape = processor.image_processor(images=[Image.new("RGB", (96, 96))], return_tensors="pt")["pixel_values"].shape
    seen = f"{shape[-2]} x {shape[-1]} pixels" if len(shape) == 4 else f"{shape[-2]} patches"
    return f"a {config.model_type} of {count:.2f} M parameters, images of {seen}"


def described_encoder(encoder: DualEncoder) -> str:
    """An encoder that is loaded, in words."""
    if isinstance(encoder, CachedEncoder):
        signal = encoder.pairs.signal
        return f"the cache {encoder.name}: {signal['views']} views of each pair, {signal['width']} channels"
    name = getattr(getattr(encoder.model, "config", None), "model_type", type(encoder.model).__name__)
    return f"{name}, {encoder.parameter_count / 1e6:.2f} M parameters, features of {encoder.width} channels"
