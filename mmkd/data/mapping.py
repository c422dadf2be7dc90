"""Mapping of a source's rows to TRL's columns by a recipe."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Image, Json, LargeList, List, Value

from mmkd.errors import UserError, nearest

from .arrow import BATCH, is_struct_list, plain_rows, storage
from .canonical import CHATS, PARTS, Layout, image_column_of
from .columns import ROLES, MessagesColumn, TurnColumns, is_template, template_columns
from .conversion import Conversion
from .data_recipe import CONVERSION, OUTPUT_COLUMNS, DataRecipe
from .image_columns import check_images, image_counts, image_lists
from .layouts import CARRIED, layout_of, recognised, sample_of
from .messages import CONTENT_KEYS
from .templates import filled, filled_answer

Column = str | MessagesColumn | TurnColumns
_ABOUT = ("domain", "truncated")
"""Columns with metadata of a row that are kept besides its text."""


def check_columns(recipe: DataRecipe, raw: Dataset, also: Sequence[str] = ()) -> None:
    """Raises UserError for a column that is missing in the source or has a type that the recipe cannot use.

    `also` are columns that are wanted under their own names; those of TRL's names may come of others.
    """
    for column in also:
        if column not in raw.column_names and column not in OUTPUT_COLUMNS:
            raise UserError(
                f"{recipe.name}: the run reads the column {column!r}, which the source does not have; did you mean "
                f"{nearest(column, raw.column_names)!r}? Its columns are {', '.join(raw.column_names)}."
            )
    named = [(f"columns.{ours}", column) for ours, theirs in recipe.columns.items() for column in _reads(theirs)]
    for where, column in [*named, *(("filters.equals", column) for column in recipe.filters.equals)]:
        if column not in raw.column_names:
            raise UserError(
                f"{recipe.name}: {where} reads {column!r}, which the source does not have; did you mean "
                f"{nearest(column, raw.column_names)!r}? Its columns are {', '.join(raw.column_names)}."
            )
    for ours, theirs in recipe.columns.items():
        if isinstance(theirs, TurnColumns):
            continue
        if isinstance(theirs, MessagesColumn):
            _check_messages(recipe, ours, theirs, raw.features[theirs.column])
        elif ours == "images":
            check_images(raw.features[theirs], f"{recipe.name}: columns.images reads {theirs!r}, which")
        elif ours == "truncated":
            feature = raw.features[theirs]
            if getattr(feature, "dtype", None) not in ("bool", "null", "string", "large_string"):
                raise UserError(
                    f"{recipe.name}: columns.truncated reads {theirs!r}, which holds {feature}, and must say true or "
                    "false, or why a server stopped (finish_reason)."
                )
        elif ours in ("text", "prompt", "completion", "domain") and not is_template(theirs):
            feature = raw.features[theirs]
            chat = ours in ("prompt", "completion") and is_struct_list(feature)
            if getattr(feature, "dtype", None) not in ("string", "large_string", "string_view") and not chat:
                raise UserError(
                    f"{recipe.name}: columns.{ours} reads {theirs!r}, which holds {feature} and not text; "
                    f"write a template, {ours}: '{{{theirs}}}', to turn it into text."
                )


def _check_messages(recipe: DataRecipe, ours: str, theirs: MessagesColumn, feature: Any) -> None:
    if is_struct_list(feature):
        for option in _keys_of(theirs):
            _check_key(theirs, option, list(feature.feature))
    elif not isinstance(getattr(feature, "feature", feature), Json):
        raise UserError(
            f"{recipe.name}: columns.{ours} reads {theirs.column!r}, which holds {feature} and no list of messages; "
            "map it to text, prompt or completion."
        )


def _keys_of(theirs: MessagesColumn) -> tuple[str, str]:
    return ("role_key", "content_key") if theirs.user_key is None else ("user_key", "assistant_key")


def _check_key(theirs: MessagesColumn, option: str, keys: list[str]) -> None:
    key = getattr(theirs, option)
    if key not in keys:
        raise UserError(
            f"the messages in {theirs.column!r} have no {key!r}; set {option} to one of their keys: {', '.join(keys)}"
        )


def _reads(theirs: Column) -> list[str]:
    if isinstance(theirs, MessagesColumn):
        return [theirs.column]
    if isinstance(theirs, TurnColumns):
        return [*template_columns(theirs.user), *template_columns(theirs.assistant)]
    return template_columns(theirs) if is_template(theirs) else [theirs]


def map_rows(
    raw: Dataset, recipe: DataRecipe, split: str, numbers: Sequence[int], also: Sequence[str] = ()
) -> Dataset:
    """The rows with TRL's columns, and under their own names those of the source that are wanted too (`also`).

    `numbers` are the numbers of the rows in the source.

    Raises UserError for the first row whose messages cannot be read.
    """
    if not len(raw):
        return raw
    folders = [Path(recipe.image_folder)] if recipe.image_folder is not None else [Path.cwd(), recipe.folder]
    conversion = Conversion(
        f"{recipe.name}: {split}", folders=tuple(folder for folder in folders if folder is not None)
    )
    layout = None if recipe.columns else layout_of_source(raw, recipe, split, also)
    if layout is not None and not layout.as_is:
        conversion = replace(conversion, image_folder=recipe.image_folder)
        return conversion.converted(raw, layout, (*_ABOUT, *also), numbers)
    own = _columns_of(recipe, raw, layout)
    columns = {**own, **{name: name for name in also if name not in own}}
    mapped = _in_our_columns(raw, recipe, columns)
    return conversion.converted(mapped, _layout_of(own), (*_ABOUT, *also), numbers)


def layout_of_source(raw: Dataset, recipe: DataRecipe, split: str, also: Sequence[str] = ()) -> Layout:
    """The layout of the rows of a recipe without `columns`. Raises UserError if it is not recognised.

    Columns that are wanted besides (`also`) may be part of it, and do not hide it.
    """
    sample = sample_of(raw)
    others = {name: value for name, value in sample.items() if name not in also}
    beside = layout_of(others) if others and layout_of(sample) is None else None
    return beside or recognised(sample, f"{recipe.name}: {split}")


def _columns_of(recipe: DataRecipe, raw: Dataset, layout: Layout | None) -> Mapping[str, Column]:
    """The recipe's columns, or else those of the layout, with the columns that belong to messages (tools)."""
    columns = dict(recipe.columns) if layout is None else {name: _by_name(raw, name) for name in layout.reads}
    if layout is not None:
        images = image_column_of(raw.column_names, layout)
        columns |= {"images": images} if images is not None else {}
        columns |= {name: name for name in _ABOUT if name in raw.column_names}
    read = {name for theirs in columns.values() for name in _reads(theirs)}
    chats = any(_is_chat(columns[name], raw.features) for name in CHATS if name in columns)
    for name in CARRIED:
        if chats and name in raw.column_names and name not in columns and name not in read:
            columns[name] = name
    return {name: columns[name] for name in OUTPUT_COLUMNS if name in columns}


def _by_name(raw: Dataset, name: str) -> Column:
    return name if name not in CHATS or not _is_chat(name, raw.features) else MessagesColumn(name)


def _is_chat(theirs: Column, source: Features) -> bool:
    if not isinstance(theirs, str):
        return isinstance(theirs, MessagesColumn)
    feature = None if is_template(theirs) else source[theirs]
    return isinstance(feature, List | LargeList | Json)


def _layout_of(columns: Mapping[str, Column]) -> Layout:
    """The layout of mapped rows: the columns are TRL's, but messages may still have other keys and roles."""
    chats = {ours: theirs for ours, theirs in columns.items() if isinstance(theirs, MessagesColumn)}
    turns = any(isinstance(theirs, TurnColumns) for theirs in columns.values())
    pairs = any(theirs.user_key is not None for theirs in chats.values())
    marks = [theirs.image_token for theirs in chats.values() if theirs.image_token is not None]
    return Layout(
        "the recipe's columns",
        tuple(name for name in columns if name not in ("images", *_ABOUT)),
        partial(_read_mapped, chats=chats),
        mark=marks[0] if marks else None,
        parts="images" in columns and (turns or pairs or bool(marks)),
        as_is=not marks and all(theirs == MessagesColumn(theirs.column) for theirs in chats.values()),
    )


def _read_mapped(row: Mapping[str, Any], chats: Mapping[str, MessagesColumn]) -> dict[str, Any]:
    return {name: _messages(value, chats[name]) if name in chats else value for name, value in row.items()}


def _in_our_columns(raw: Dataset, recipe: DataRecipe, columns: Mapping[str, Column]) -> Dataset:
    """The rows with TRL's names of columns; messages keep the source's keys and roles."""
    parts = "images" in columns
    features = Features({ours: _feature(ours, theirs, raw.features, parts) for ours, theirs in columns.items()})
    sources = {ours: _reads(theirs)[0] for ours, theirs in columns.items() if _is_named(theirs)}
    renamed = {theirs: ours for ours, theirs in sources.items()}
    if (
        len(renamed) == len(columns)
        and recipe.image_folder is None
        and all(features[b] == raw.features.get(a) for a, b in renamed.items())
    ):
        # Only names change, so that no row is copied: data sets may have tens of gigabytes of text.
        return raw.select_columns(list(renamed)).rename_columns(renamed)
    return (
        raw.with_format("arrow")
        .map(
            _convert,
            batched=True,
            batch_size=BATCH,
            fn_kwargs={
                "columns": columns,
                "source": raw.features,
                "features": features,
                "folder": recipe.image_folder,
                "conversion": CONVERSION,
            },
            remove_columns=raw.column_names,
            features=features,
            desc=f"Mapping {recipe.name}",
        )
        .with_format(None)
    )


def _is_named(theirs: Column) -> bool:
    return isinstance(theirs, MessagesColumn) or (isinstance(theirs, str) and not is_template(theirs))


def _feature(ours: str, theirs: Column, source: Features, images: bool) -> Any:
    if isinstance(theirs, TurnColumns):
        return List({"role": Value("string"), "content": PARTS if images else Value("string")})
    if isinstance(theirs, MessagesColumn):
        return source[theirs.column]
    if ours == "images":
        return List(Image())
    # polars writes string views, which few libraries read.
    return Value("string") if is_template(theirs) or source[theirs] == Value("string_view") else source[theirs]


def _convert(
    table: pa.Table,
    columns: Mapping[str, Column],
    source: Features,
    features: Features,
    folder: str | None,
    conversion: int,
) -> pa.Table:
    """A batch in TRL's columns. It stays in Arrow, so that no image is decoded.

    `conversion` only enters the cache key of `map`, which would otherwise not notice a change of this function.
    """
    arrays: dict[str, Any] = {}
    images = columns.get("images")
    counts = [0] * len(table)
    if isinstance(images, str):
        arrays["images"] = image_lists(table.column(images), folder, feature=source[images], embed=True)
        counts = image_counts(arrays["images"])
    for ours, theirs in columns.items():
        if ours == "images":
            continue
        if isinstance(theirs, TurnColumns):
            rows = plain_rows(table.select(list(dict.fromkeys(_reads(theirs)))), source)
            turns = [_turns(theirs, row, count, images is not None) for row, count in zip(rows, counts, strict=True)]
            arrays[ours] = pa.array(turns, type=storage(features.arrow_schema.field(ours).type))
        elif isinstance(theirs, MessagesColumn):
            arrays[ours] = table.column(theirs.column)
        elif is_template(theirs):
            names = template_columns(theirs)
            rows = plain_rows(table.select(list(dict.fromkeys(names))), source)
            fill = filled if ours in ("prompt", "domain") else filled_answer
            arrays[ours] = pa.array([fill(theirs, row) for row in rows], type=pa.string())
        else:
            arrays[ours] = table.column(theirs)
    return pa.table({ours: arrays[ours] for ours in columns})


def _messages(row: Any, theirs: MessagesColumn) -> list[Any] | None:
    """Messages with the keys `role` and `content`; all other keys stay.

    Raises UserError for a missing key, and for a role that the recipe does not map.
    """
    if row is None:
        return None
    messages = []
    for place, message in enumerate(row):
        if not isinstance(message, Mapping):
            # `canonical_messages` reports this error, in the same words for all layouts.
            messages.append(message)
            continue
        if theirs.user_key is not None and theirs.assistant_key is not None:
            for role, key in (("user", theirs.user_key), ("assistant", theirs.assistant_key)):
                messages.append({"role": role, "content": message[key]})
            continue
        _check_key(theirs, "role_key", list(message))
        entries = {key: value for key, value in message.items() if key not in (theirs.role_key, theirs.content_key)}
        if theirs.content_key in message:
            entries["content"] = message[theirs.content_key]
        elif not any(entries.get(key) for key in CONTENT_KEYS):
            if any(isinstance(value, Mapping) and theirs.content_key in value for value in row[:place]):
                # Messages before have the key, so that the recipe is right and this message is broken.
                raise UserError(
                    f"{theirs.column}[{place}] has no {theirs.content_key!r}; write what the "
                    f"{message[theirs.role_key]} says, or remove the message"
                )
            _check_key(theirs, "content_key", list(message))
        role = theirs.role_map.get(message[theirs.role_key], message[theirs.role_key])
        if theirs.role_map and role not in ROLES:
            raise UserError(
                f"the messages in {theirs.column!r} have the role {role!r}; map it to one of {', '.join(ROLES)} "
                f"with role_map: {{{role}: {nearest(role, ROLES)}}}"
            )
        messages.append({"role": role, **entries})
    return messages


def _turns(theirs: TurnColumns, row: Mapping[str, Any], images: int, parts: bool) -> list[dict[str, Any]]:
    question, answer = filled(theirs.user, row).strip(), filled_answer(theirs.assistant, row).strip()
    if not parts:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    content = [*({"type": "image", "text": None} for _ in range(images)), {"type": "text", "text": question}]
    return [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]
