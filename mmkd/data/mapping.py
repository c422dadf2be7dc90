"""A source's rows in our columns, and the filters that decide which of them stay."""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Image, Json, List, Value

from mmkd.data.arrow import BATCH, decoded_json, is_struct_list, plain_rows, storage
from mmkd.data.columns import ROLES, MessagesColumn, TurnColumns, is_template, nearest, template_columns
from mmkd.data.image_columns import check_images, image_counts, image_lists
from mmkd.data.recipe import CONVERSION, DataRecipe
from mmkd.data.templates import filled, filled_answer


def check_columns(recipe: DataRecipe, raw: Dataset) -> None:
    """Raises ValueError for a column the source lacks, or that holds something else than the recipe needs."""
    named = [(f"columns.{ours}", column) for ours, theirs in recipe.columns.items() for column in _reads(theirs)]
    for where, column in [*named, *(("filters.equals", column) for column in recipe.filters.equals)]:
        if column not in raw.column_names:
            raise ValueError(
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
        elif ours in ("text", "prompt", "completion", "domain") and not is_template(theirs):
            feature = raw.features[theirs]
            chat = ours in ("prompt", "completion") and is_struct_list(feature)
            if getattr(feature, "dtype", None) not in ("string", "large_string", "string_view") and not chat:
                raise ValueError(
                    f"{recipe.name}: columns.{ours} reads {theirs!r}, which holds {feature} and not text; "
                    f"write a template, {ours}: '{{{theirs}}}', to turn it into text."
                )


def _check_messages(recipe: DataRecipe, ours: str, theirs: MessagesColumn, feature: Any) -> None:
    if is_struct_list(feature):
        for option in _keys_of(theirs):
            _check_key(theirs, option, list(feature.feature))
    elif not isinstance(getattr(feature, "feature", feature), Json):
        raise ValueError(
            f"{recipe.name}: columns.{ours} reads {theirs.column!r}, which holds {feature} and no list of messages; "
            "map it to text, prompt or completion."
        )


def _keys_of(theirs: MessagesColumn) -> tuple[str, str]:
    return ("role_key", "content_key") if theirs.user_key is None else ("user_key", "assistant_key")


def _check_key(theirs: MessagesColumn, option: str, keys: list[str]) -> None:
    key = getattr(theirs, option)
    if key not in keys:
        raise ValueError(
            f"the messages in {theirs.column!r} have no {key!r}; set {option} to one of their keys: {', '.join(keys)}."
        )


def _reads(theirs: str | MessagesColumn | TurnColumns) -> list[str]:
    if isinstance(theirs, MessagesColumn):
        return [theirs.column]
    if isinstance(theirs, TurnColumns):
        return [*template_columns(theirs.user), *template_columns(theirs.assistant)]
    return template_columns(theirs) if is_template(theirs) else [theirs]


def map_rows(raw: Dataset, recipe: DataRecipe) -> Dataset:
    """The rows in our columns and no others."""
    columns = {ours: recipe.columns[ours] for ours in recipe.output_columns}
    parts = "images" in columns
    features = Features({ours: _feature(ours, theirs, raw.features, parts) for ours, theirs in columns.items()})
    renamed = {theirs: ours for ours, theirs in columns.items() if isinstance(theirs, str)}
    if (
        len(renamed) == len(columns)
        and recipe.image_folder is None
        and all(features[b] == raw.features.get(a) for a, b in renamed.items())
    ):
        # Only names change: no row is copied, which matters for tens of gigabytes of text.
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


_PARTS = List({"type": Value("string"), "text": Value("string")})


def _feature(ours: str, theirs: str | MessagesColumn | TurnColumns, source: Features, images: bool) -> Any:
    if isinstance(theirs, TurnColumns):
        return List({"role": Value("string"), "content": _PARTS if images else Value("string")})
    if isinstance(theirs, MessagesColumn):
        if theirs.user_key is not None or theirs.image_token is not None:
            return List({"role": Value("string"), "content": _PARTS if images else Value("string")})
        keys = getattr(source[theirs.column], "feature", None)
        content = keys[theirs.content_key] if isinstance(keys, dict) else Value("string")
        return List({"role": Value("string"), "content": content})
    if ours == "images":
        return List(Image())
    # Views are what polars writes, and little else reads.
    return Value("string") if is_template(theirs) or source[theirs] == Value("string_view") else source[theirs]


def _convert(
    table: pa.Table,
    columns: Mapping[str, str | MessagesColumn | TurnColumns],
    source: Features,
    features: Features,
    folder: str | None,
    conversion: int,
) -> pa.Table:
    """A batch in our columns. It stays in Arrow, so that no image is decoded on the way.

    `conversion` is read by nothing but the cache key of `map`, which else would not notice that this function changed.
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
            rows = table.column(theirs.column).to_pylist()
            ragged = not is_struct_list(source[theirs.column])
            if ragged:
                rows = [decoded_json(row, source[theirs.column]) for row in rows]
            type_ = storage(features.arrow_schema.field(ours).type)
            found = [_messages(row, theirs, ragged) for row in rows]
            if images is not None and (theirs.user_key is not None or theirs.image_token is not None):
                found = [_in_parts(row, theirs, count) for row, count in zip(found, counts, strict=True)]
            arrays[ours] = pa.array(found, type=type_)
        elif is_template(theirs):
            names = template_columns(theirs)
            rows = plain_rows(table.select(list(dict.fromkeys(names))), source)
            fill = filled if ours in ("prompt", "domain") else filled_answer
            arrays[ours] = pa.array([fill(theirs, row) for row in rows], type=pa.string())
        else:
            arrays[ours] = table.column(theirs)
    return pa.table({ours: arrays[ours] for ours in columns})


def _messages(row: list[dict[str, Any]] | None, theirs: MessagesColumn, ragged: bool) -> list[dict[str, Any]]:
    """Messages with the keys `role` and `content`.

    Raises ValueError for a missing key, a role that chat templates do not know, and content without a type of its own.
    """
    messages = []
    for message in row or []:
        if theirs.user_key is not None and theirs.assistant_key is not None:
            for role, key in (("user", theirs.user_key), ("assistant", theirs.assistant_key)):
                messages.append({"role": role, "content": message[key]})
            continue
        for option in ("role_key", "content_key"):
            _check_key(theirs, option, list(message))
        if ragged and not isinstance(message[theirs.content_key], str | None):
            raise ValueError(
                f"the messages in {theirs.column!r} differ in their keys ({', '.join(message)}, ...) and hold more "
                "than text; give all of them the same keys in the file."
            )
        role = theirs.role_map.get(message[theirs.role_key], message[theirs.role_key])
        if role not in ROLES:
            raise ValueError(
                f"the messages in {theirs.column!r} have the role {role!r}; map it to one of {', '.join(ROLES)} "
                f"with role_map: {{{role}: {nearest(role, ROLES)}}}."
            )
        messages.append({"role": role, "content": message[theirs.content_key]})
    return messages


def _turns(theirs: TurnColumns, row: Mapping[str, Any], images: int, parts: bool) -> list[dict[str, Any]]:
    question, answer = filled(theirs.user, row).strip(), filled_answer(theirs.assistant, row).strip()
    if not parts:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    asked = [*({"type": "image", "text": None} for _ in range(images)), {"type": "text", "text": question}]
    return [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def _in_parts(messages: list[dict[str, Any]], theirs: MessagesColumn, images: int) -> list[dict[str, Any]]:
    """The messages with content in parts; images stand where the source marks them, else before the first question."""
    found = []
    unmarked = images if theirs.image_token is None else 0
    for message in messages:
        pieces = (message["content"] or "").split(theirs.image_token) if theirs.image_token else [message["content"]]
        parts: list[dict[str, Any]] = []
        if message["role"] == "user" and unmarked:
            parts, unmarked = [{"type": "image", "text": None}] * unmarked, 0
        for number, piece in enumerate(pieces):
            if number:
                parts.append({"type": "image", "text": None})
            text = (piece or "").strip("\n") if theirs.image_token else piece or ""
            if text or len(pieces) == 1:
                parts.append({"type": "text", "text": text})
        found.append({"role": message["role"], "content": parts})
    return found
