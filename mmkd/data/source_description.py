"""What a source of rows is: its layout, columns, sizes and classes, before anything is trained on it."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from datasets import Dataset

from mmkd.errors import UserError

from .canonical import Layout, image_column_of
from .class_source import direct_classes
from .classification import ClassificationRecipe
from .columns import MessagesColumn, TurnColumns, is_template, template_columns
from .data_recipe import BESIDES, DataRecipe
from .layouts import layout_of, sample_of
from .sources import left_out_note, load_split
from .unknown_layout import unknown_layout

LayoutKind = Literal[
    "chat",
    "sharegpt",
    "llava",
    "alpaca",
    "prompt_completion",
    "preference",
    "captions",
    "text",
    "prompts_only",
    "class_folders",
    "classes",
]

_KINDS: Mapping[str, LayoutKind] = {
    "messages": "chat",
    "ShareGPT": "sharegpt",
    "LLaVA": "llava",
    "OpenAI batch": "chat",
    "OpenAI preference": "preference",
    "prompt and chosen": "preference",
    "prompt and completion": "prompt_completion",
    "text": "text",
    "Alpaca": "alpaca",
    "captions": "captions",
    "prompts": "prompts_only",
}
_SPOKEN: Mapping[LayoutKind, str] = {
    "chat": "conversations",
    "sharegpt": "ShareGPT conversations",
    "llava": "LLaVA conversations about pictures",
    "alpaca": "Alpaca instructions",
    "prompt_completion": "prompts with answers",
    "preference": "preferences, of which the chosen answer is learnt",
    "captions": "pictures with captions",
    "text": "plain text",
    "prompts_only": "prompts without answers",
    "class_folders": "folders of pictures, one for each class",
    "classes": "rows with a class",
}


@dataclass(frozen=True)
class SourceDescription:
    """What a source of rows is."""

    source: str
    """As the user named it."""
    kind: LayoutKind
    container: str
    """What the rows lie in: the `source` of the recipe, such as json, imagefolder or owner/name."""
    rows: Mapping[str, int]
    """The number of rows of each split of the source that is read, before any are left out."""
    columns: tuple[str, ...]
    """The source's columns that are read."""
    unread: tuple[str, ...]
    """The other columns."""
    has_images: bool
    recipe: DataRecipe | None = None
    """For methods over tokens; None where no layout of theirs is known."""
    classes: ClassificationRecipe | None = None
    """For method dho; None for rows without classes."""
    class_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    """What a user should know about the choice of rows, as sentences."""

    @property
    def spoken(self) -> str:
        """The layout in words."""
        return _SPOKEN[self.kind]

    @property
    def needs(self) -> str | None:
        """What these rows can be used for only, as a sentence; None for data that any method over tokens reads."""
        if self.kind == "prompts_only":
            return (
                "Prompts without answers train on-policy (on_policy_fraction: 1) or by CoMD, or after the teacher has "
                "answered them: `mmkd cache build RECIPE --job generate`."
            )
        if self.recipe is None:
            return "Rows with a class train a classifier: method dho."
        return None


def recipe_of(source: str) -> DataRecipe:
    """The data recipe of a name, a YAML, a file, a folder, a glob or a Hub id. Raises UserError for anything else."""
    return DataRecipe.load(source)


def describe(source: str) -> SourceDescription:
    """What a source is: rows that are named directly, or a data recipe.

    Raises UserError for what cannot be read, and for a layout that is not known, with the columns and what to write.
    """
    classes = _classes(source)
    try:
        recipe = DataRecipe.load(source)
    except UserError:
        if classes is None:
            raise
        recipe = None
    return _of_recipes(source, recipe, classes)


def _of_recipes(source: str, recipe: DataRecipe | None, classes: ClassificationRecipe | None) -> SourceDescription:
    if recipe is not None and recipe.mixture:
        return _mixture(source, recipe)
    if recipe is None:
        assert classes is not None
        train, layout = load_split(classes, classes.splits["train"]), None
    else:
        train = load_split(recipe, recipe.splits["train"])
        layout = None if recipe.columns else layout_of(sample_of(train))
        if layout is None and not recipe.columns:
            if classes is None:
                raise UserError(unknown_layout(sample_of(train), source))
            recipe = None
    return _described(source, train, recipe, classes, layout)


def _classes(source: str) -> ClassificationRecipe | None:
    """The recipe of classes of a source; None for other rows."""
    if source.endswith((".yaml", ".yml")) or "classification/" in source:
        with suppress(UserError):
            return ClassificationRecipe.load(source)
        return None
    with suppress(UserError):
        return direct_classes(source)
    return None


def _described(
    source: str,
    train: Dataset,
    recipe: DataRecipe | None,
    classes: ClassificationRecipe | None,
    layout: Layout | None,
) -> SourceDescription:
    kind = _kind(train, recipe, classes, layout)
    ours = classes if kind in ("classes", "class_folders") else recipe
    assert ours is not None
    read = _class_reads(classes) if ours is classes else _reads(train, recipe, layout)
    names: tuple[str, ...] = ()
    if classes is not None:
        declared: Any = train.features.get(classes.label)
        names = classes.class_names or tuple(getattr(declared, "names", ()))
    sizes = {theirs: len(load_split(ours, theirs)) for theirs in ours.splits.values()}
    images = {"image", "images"} & {*train.column_names} or (classes is not None and classes.image is not None)
    return SourceDescription(
        source,
        kind,
        ours.source,
        sizes,
        read,
        tuple(name for name in train.column_names if name not in read),
        bool(images) or _brings_images(sample_of(train)),
        recipe,
        classes,
        names,
        (*ours.notes, *filter(None, [left_out_note(ours, train)])),
    )


def _kind(
    train: Dataset, recipe: DataRecipe | None, classes: ClassificationRecipe | None, layout: Layout | None
) -> LayoutKind:
    if classes is not None and (recipe is None or (layout is not None and layout.name in ("text", "captions"))):
        folders = classes.source == "imagefolder" and {*train.column_names} == {"image", "label"}
        return "class_folders" if folders else "classes"
    if layout is not None:
        # A question and an answer, in columns of any name, or conversations in one.
        return _KINDS.get(layout.name, "prompt_completion" if " and " in layout.name else "chat")
    assert recipe is not None
    own = [name for name in recipe.output_columns if name not in BESIDES]
    written: dict[tuple[str, ...], LayoutKind] = {
        ("text",): "text",
        ("messages",): "chat",
        ("prompt",): "prompts_only",
    }
    return written.get(tuple(own), "prompt_completion")


def _reads(train: Dataset, recipe: DataRecipe | None, layout: Layout | None) -> tuple[str, ...]:
    if layout is not None:
        images = image_column_of(train.column_names, layout)
        return (*layout.reads, *([images] if images is not None else []))
    assert recipe is not None
    names: list[str] = []
    for theirs in recipe.columns.values():
        if isinstance(theirs, MessagesColumn):
            names.append(theirs.column)
        elif isinstance(theirs, TurnColumns):
            names += [*template_columns(theirs.user), *template_columns(theirs.assistant)]
        else:
            names += template_columns(theirs) if is_template(theirs) else [theirs]
    return tuple(dict.fromkeys(names))


def _class_reads(classes: ClassificationRecipe | None) -> tuple[str, ...]:
    assert classes is not None
    return (str(classes.image or classes.text), classes.label)


def _brings_images(value: Any) -> bool:
    """Whether messages hold pictures at any depth."""
    if isinstance(value, Mapping):
        return value.get("type") in ("image", "image_url", "input_image") or any(map(_brings_images, value.values()))
    return isinstance(value, list) and any(map(_brings_images, value))


def _mixture(source: str, recipe: DataRecipe) -> SourceDescription:
    """A mixture is described by its parts; the layout is that of the first."""
    parts = [_of_recipes(part.data, part.recipe, None) for part in recipe.mixture]
    return SourceDescription(
        source,
        parts[0].kind,
        "mixture",
        {f"{part.source} {split}": rows for part in parts for split, rows in part.rows.items()},
        tuple(dict.fromkeys(column for part in parts for column in part.columns)),
        tuple(dict.fromkeys(column for part in parts for column in part.unread)),
        any(part.has_images for part in parts),
        recipe,
        notes=tuple(f"{part.source}: {note}" for part in parts for note in part.notes),
    )
