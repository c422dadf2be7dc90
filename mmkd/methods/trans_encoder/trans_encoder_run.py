"""What a recipe of trans_encoder says: its pairs, its students, and what it must not set."""

from typing import Any

from mmkd.data.sentence_pairs import SentencePairs, load_pairs
from mmkd.errors import UserError
from mmkd.recipe.recipe import Run
from mmkd.recipe.unread_keys import check_read, unread_keys

from .trans_encoder_config import TransEncoderConfig

# What a recipe of every method may set, and one of sentence encoders reads.
_READ = {"method", "data", "student", "max_train_rows", "dry_run"}


def settings_of(run: Run) -> TransEncoderConfig:
    """The settings of the method."""
    config: Any = run.training
    assert isinstance(config, TransEncoderConfig)
    return config


def check_arguments(run: Run) -> None:
    """Raises UserError for keys that mean nothing here, and without a student."""
    arguments, training = run.arguments, settings_of(run)
    check_read(arguments, _READ, "its teachers are the encoders themselves. Remove it.")
    if arguments.student is None:
        raise UserError("trans_encoder needs student: the bi-encoder that it begins with, a Hub id or a folder.")
    if run.student.use_peft or run.student.load_in_4bit or run.student.load_in_8bit:
        raise UserError(
            "Method trans_encoder trains whole encoders. Remove use_peft, load_in_4bit and load_in_8bit.",
            because="not built",
        )
    if training.push_to_hub:
        raise UserError(
            "push_to_hub would publish each training of a cycle. Remove it, and publish the student with `mmkd push`.",
            because="not built",
        )


def unused_keys() -> dict[str, str]:
    """The keys of every recipe that one of sentence encoders has no use for -> why."""
    return unread_keys(_READ, "The encoders are each other's teachers.", "Whole encoders are trained.")


def members_of(run: Run) -> dict[str, tuple[str, str]]:
    """The students by name, of one alone without a name: its bi-encoder, and what cross-encoders begin with."""
    args, student = settings_of(run), run.arguments.student
    assert student is not None
    first = (student, args.cross_encoder or student)
    if args.mutual_student is None:
        return {"": first}
    return {"first": first, "second": (args.mutual_student, args.mutual_cross_encoder or args.mutual_student)}


def pairs_of(run: Run) -> SentencePairs:
    """The pairs that encoders say scores of."""
    return load_pairs(run.arguments.data, max_rows=run.arguments.max_train_rows)
