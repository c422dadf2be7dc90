"""What the student of a run is measured on and beside: the data and the teacher of its own training."""

import sys
from pathlib import Path

from mmkd.errors import UserError
from mmkd.eval.measures import HeldOut
from mmkd.eval.model import EvalModel, find_model
from mmkd.results.own_teacher import with_teacher_named
from mmkd.training.method import METHODS

from .runs import record_of


def as_trained(
    model: EvalModel, held: HeldOut | None, teacher: EvalModel | None, rows: int, max_new_tokens: int
) -> tuple[HeldOut | None, EvalModel | None]:
    """Rows and teacher as given, or else so many held-out rows of the data of the model's run, and its teacher.

    Prints what it takes of the run, and what of it cannot be had any more.
    """
    record = record_of(Path(model.name)) if Path(model.name).is_dir() else {}
    keys, method = record.get("keys", {}), str(record.get("method"))
    if method not in METHODS or METHODS[method].predicts != "tokens":
        return held, teacher
    if held is None and keys.get("data"):
        held = _held_out(model, HeldOut(str(keys["data"]), rows, max_new_tokens=max_new_tokens))
    if teacher is None and keys.get("teacher"):
        named = with_teacher_named(keys)
        beside = find_model(str(named["teacher"]), named.get("teacher_revision"), model.trust_remote_code)
        teacher = _teacher(model, beside)
    return held, teacher


def data_as_trained(model: EvalModel) -> str:
    """The data of the run that a model comes from. Raises UserError where there is none."""
    keys = record_of(Path(model.name)).get("keys", {}) if Path(model.name).is_dir() else {}
    if not keys.get("data"):
        raise UserError(
            f"{model.name} comes from no run, whose data it could be measured on: name a data recipe of captions or "
            "of classes with --data."
        )
    print(f"{model.name}: measured on the held-out rows of {keys['data']}; --data names others.", file=sys.stderr)
    return str(keys["data"])


def class_teacher_as_trained(model: EvalModel) -> str | None:
    """The CLIP-like teacher of the run that a classifier comes from; None where it names none."""
    keys = record_of(Path(model.name)).get("keys", {}) if Path(model.name).is_dir() else {}
    several = keys.get("teachers")
    first = next(iter(several.values())) if isinstance(several, dict) else keys
    kind = first.get("teacher_kind", keys.get("teacher_kind", "zero_shot"))
    return str(first["teacher"]) if first.get("teacher") and kind in ("zero_shot", "tip_adapter") else None


def _held_out(model: EvalModel, held: HeldOut) -> HeldOut | None:
    try:
        held.load()
    except UserError as error:
        print(f"{model.name}: not measured on the data of its run. {error}", file=sys.stderr)
        return None
    print(f"{model.name}: measured on the held-out rows of {held.data}; --data names others.", file=sys.stderr)
    return held


def _teacher(model: EvalModel, teacher: EvalModel) -> EvalModel | None:
    try:
        # Weights that are no longer there say so here.
        _ = teacher.weights
    except (UserError, OSError) as error:
        print(f"{model.name}: not measured beside its teacher. {error}", file=sys.stderr)
        return None
    print(f"{model.name}: measured beside {teacher.name}; --teacher names another.", file=sys.stderr)
    return teacher
