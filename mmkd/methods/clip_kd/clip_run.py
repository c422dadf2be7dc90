"""What a recipe of clip_kd says: its student, its teachers, its pairs, and what it must not set."""

from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from transformers import AutoModel
from trl.trainer.utils import get_peft_config

from mmkd.cache.hub import local_cache
from mmkd.cache.identity import is_same_teacher, weights_sha256
from mmkd.data.caption_source import load_captions
from mmkd.data.data_recipe import DataRecipe
from mmkd.data.picture_source import picture_column
from mmkd.data.sources import load_split
from mmkd.data.text_pairs import load_text_pairs, pair_columns
from mmkd.errors import UserError
from mmkd.models.dual_encoder import (
    DualEncoder,
    encoder_config,
    kind_of_encoder,
    load_dual_encoder,
    new_dual_encoder,
)
from mmkd.models.inherit import inherit_config, inherit_model, tower_sizes
from mmkd.models.whole_student import put_adapter
from mmkd.preparation.checks import check_held_out
from mmkd.preparation.pair_batches import PairRows
from mmkd.recipe.arguments import VIEW
from mmkd.recipe.recipe import Run
from mmkd.recipe.unread_keys import check_read, unread_keys
from mmkd.teachers.cached_encoder import CachedEncoder

from .clip_config import ContrastiveKDConfig

# What a recipe of every method may set, and one of pairs reads.
_READ = {"method", "data", "teacher", "teacher_revision", "teacher_dtype", "teacher_attn_implementation", "teachers"}
_READ |= {"student", "student_init", "max_train_rows", "max_eval_rows", "dry_run", "teacher_cache"}

# What `mmkd cache build` reads of a recipe of pairs.
_CACHE = {"cache_shard_rows", "on_error", "max_skipped", "shard", "engine"}

_INITS = ("pretrained", "random", "inherit")


def settings_of(run: Run) -> ContrastiveKDConfig:
    """The settings of the method."""
    config: Any = run.training
    assert isinstance(config, ContrastiveKDConfig)
    return config


def check_arguments(run: Run) -> None:
    """Raises UserError for keys of tokens, and for a student or a teacher that is none."""
    arguments = run.arguments
    check_read(arguments, _READ, "it is about tokens. Remove it.")
    if run.student.load_in_4bit or run.student.load_in_8bit:
        raise UserError(
            "Method clip_kd does not quantise its student. Remove load_in_4bit and load_in_8bit; use_peft trains an "
            "adapter beside weights as they are.",
            because="not built",
        )
    if run.student.use_peft and settings_of(run).learns_masks:
        raise UserError(
            "inherit: auto finds out which weights a training needs least, and use_peft trains none of them. Use "
            "inherit: manual, or train the whole student.",
            because="meaning",
        )
    if arguments.student_init not in _INITS:
        raise UserError(
            f"student_init: {arguments.student_init} is not for dual encoders. Choose one of {', '.join(_INITS)}.",
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
        if arguments.teachers is not None and own.arguments.teacher is None and own.arguments.teacher_cache is None:
            raise UserError(
                f"teachers.{name} has no `teacher` and no teacher_cache. Name its model: a Hub id or a folder.",
                because="meaning",
            )
    _check_inherit(run)
    settings_of(run).weights_with(bool(teacher_runs(run)))


def unused_keys() -> dict[str, str]:
    """The keys of every recipe that one of pairs has no use for -> why."""
    return unread_keys(_READ, "It is about tokens.", "The student is not quantised.", _CACHE, adapters=True)


def _check_inherit(run: Run) -> None:
    """Raises UserError where student_init: inherit and inherit_target do not come together."""
    inherits = run.arguments.student_init == "inherit"
    if inherits != (settings_of(run).inherit_target is not None):
        raise UserError(
            "student_init: inherit and inherit_target (how much is kept) go together: set both or neither.",
            because="meaning",
        )
    if inherits and kind_of_encoder(student_name(run), **student_hub(run)) != "transformers":
        raise UserError(
            f"student_init: inherit takes weights of models of transformers, and {student_name(run)} is none. Name a "
            "CLIP, SigLIP or VisionTextDualEncoder.",
            because="not built",
        )


def student_name(run: Run) -> str:
    """The encoder that is trained, or whose weights it inherits: `student`, else the teacher."""
    name = run.arguments.student or run.arguments.teacher
    assert name is not None
    return name


def student_hub(run: Run) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` for the student."""
    of_teacher = run.arguments.student is None
    return run.hub(run.arguments.teacher_revision if of_teacher else run.student.model_revision)


def new_student(run: Run) -> DualEncoder:
    """The student before training."""
    name, hub = student_name(run), student_hub(run)
    if run.arguments.student_init == "random":
        return new_dual_encoder(name, **hub)
    settings = {"dtype": run.student.dtype or "float32", "device": run.training.device}
    student = load_dual_encoder(
        name, role="student", attn_implementation=run.student.attn_implementation, **settings, **hub
    )
    if run.arguments.student_init == "inherit" and settings_of(run).inherit == "manual":
        student.model = inherit_model(small_config(run, student.model.config), student.model).to(run.training.device)
    return student


def small_config(run: Run, config: Any) -> Any:
    """The config of a student that inherits of a model with this one; other students keep it."""
    if run.arguments.student_init != "inherit":
        return config
    return inherit_config(config, settings_of(run).sizes_within(tower_sizes(config)))


def empty_student(run: Run) -> Any:
    """The modules of the student without weights, as it begins."""
    name, hub = student_name(run), student_hub(run)
    if run.arguments.student_init != "inherit" or settings_of(run).inherit == "auto":
        model = empty_model(name, "student", **hub)
    else:
        with init_empty_weights(include_buffers=False):
            model = AutoModel.from_config(small_config(run, encoder_config(name, "student", **hub)))
    adapter: Any = get_peft_config(run.student)
    if adapter is not None:
        with init_empty_weights(include_buffers=False):
            put_adapter(model, adapter, name)
    return model


def load_teacher(own: Run, name: str) -> DualEncoder:
    """A teacher of a run in which it is the only one, from its cache where it has one."""
    arguments = own.arguments
    if arguments.teacher_cache is not None:
        return _cached_teacher(own, arguments.teacher_cache)
    return load_dual_encoder(
        str(arguments.teacher),
        role=role_of(name),
        dtype=arguments.teacher_dtype,
        device=own.training.device,
        attn_implementation=arguments.teacher_attn_implementation,
        **own.hub(arguments.teacher_revision),
    )


def teacher_runs(run: Run) -> dict[str, tuple[Run, float]]:
    """The run as it would be with each teacher alone, by name, and the teacher's weight; empty without a teacher."""
    teachers: Any = run.arguments.teachers or {}
    return {
        name: (own, teachers.get(name, {}).get("weight", 1.0))
        for name, own in run.by_teacher().items()
        if own.arguments.teacher is not None or own.arguments.teacher_cache is not None
    }


def _cached_teacher(own: Run, name: str) -> CachedEncoder:
    """A teacher's cache. Raises UserError where it is one of another teacher than the recipe names."""
    encoder, arguments = CachedEncoder(local_cache(name)), own.arguments
    built = encoder.pairs.cache.manifest.identity["teacher"]
    if arguments.teacher is not None:
        weights = weights_sha256(arguments.teacher) if Path(arguments.teacher).is_dir() else None
        named = {"name": arguments.teacher, "revision": arguments.teacher_revision, "weights": weights}
        if not is_same_teacher(named, built):
            raise UserError(
                f"The cache {name} is of the teacher {built['name']!r}, and the recipe names {arguments.teacher!r}. "
                "Correct `teacher`, or build a cache of it.",
                because="meaning",
            )
    return encoder


def role_of(name: str) -> str:
    """How messages call a teacher."""
    return f"teacher {name}".strip()


def pairs_of(run: Run) -> tuple[PairRows, PairRows | None]:
    """The pairs to learn, and those to measure on. Raises UserError where an evaluation is asked for that has none."""
    arguments, args = run.arguments, settings_of(run)
    rows = {"max_train_rows": arguments.max_train_rows, "max_eval_rows": arguments.max_eval_rows}
    load = load_text_pairs if _has_two_texts(arguments.data) else load_captions
    pairs = load(arguments.data, **rows)
    check_held_out(pairs.held_out, run.training)
    seed = args.seed if args.data_seed is None else args.data_seed
    held_out = None if pairs.held_out is None else PairRows(pairs.held_out, seed)
    return PairRows(pairs.train, seed, args.augmentation), held_out


def _has_two_texts(name: str) -> bool:
    """Whether data are pairs of texts, by the columns of their rows."""
    recipe = DataRecipe.load(name)
    if recipe.mixture or recipe.columns:
        return False
    rows = load_split(recipe, recipe.splits["train"])
    return picture_column(rows) is None and pair_columns(rows.column_names) is not None


def empty_model(name: str, role: str, **hub: Any) -> Any:
    """The modules of an encoder, without weights where it is one of transformers; of another package, with them."""
    if kind_of_encoder(name, **hub) != "transformers":
        return load_dual_encoder(name, role=role, **hub).trunk
    with init_empty_weights(include_buffers=False):
        return AutoModel.from_config(encoder_config(name, role, **hub))
