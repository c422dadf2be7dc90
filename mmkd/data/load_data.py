"""Rows of a data recipe: load the source, map its columns, filter, hold out eval rows, mix."""

import logging
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, Features, Json, List

from mmkd.errors import UserError

from .arrow import read_rows
from .canonical import CHATS
from .conversion import aligned, is_text, source_rows
from .data_recipe import DataRecipe
from .filters import RowFilter, compared_columns, row_key
from .guessed_types import warn_guessed_types
from .image_columns import download_images
from .layouts import log_layout, read_by_recipe
from .mapping import check_columns, layout_of_source, map_rows
from .named_pictures import check_named_pictures
from .recordings import check_no_recordings
from .sources import left_out_note, load_split

logger = logging.getLogger(__name__)

# The smallest number of rows that are read at once when only some are needed.
_BLOCK = 1000


def load_data(
    name_or_path: str | Path,
    *,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    root: Path | None = None,
    also: Sequence[str] = (),
) -> DatasetDict:
    """The rows of a data recipe in TRL's columns: "train" and, where the recipe has one, "eval".

    Args:
        name_or_path: a recipe's name under `root` (default: those that ship with mmkd), a YAML's path, or the rows
            themselves: a file, a folder, a glob, or owner/name on the Hub.
        max_train_rows: the maximal number of training rows; it does not change which rows are held out for eval.
        max_eval_rows: the maximal number of eval rows.
        also: columns of the source to keep under their own names. Which rows there are does not depend on them.

    Raises UserError if the recipe cannot be read, a file or column is missing, or no row is left.
    """
    recipe = DataRecipe.load(name_or_path, root=root)
    return load_rows(recipe, max_train_rows=max_train_rows, max_eval_rows=max_eval_rows, also=also)


def load_rows(
    recipe: DataRecipe,
    *,
    max_train_rows: int | None = None,
    max_eval_rows: int | None = None,
    also: Sequence[str] = (),
) -> DatasetDict:
    """The rows of a loaded recipe; see `load_data`."""
    for name, rows in (("max_train_rows", max_train_rows), ("max_eval_rows", max_eval_rows)):
        if rows is not None and rows < 1:
            raise UserError(f"{name} is {rows}; give 1 or more, or leave it out for all rows.")
    for note in recipe.notes:
        logger.warning("%s: %s", recipe.name, note)
    caps = [cap for cap in (recipe.max_rows, max_train_rows) if cap is not None]
    load = _mixture_rows if recipe.mixture else _source_rows
    rows = load(recipe, min(caps, default=None), max_eval_rows, also)
    for split, dataset in rows.items():
        if not recipe.mixture:
            check_named_pictures(recipe, dataset, str(split), kept=also)
    if recipe.image_urls:
        rows = DatasetDict({split: download_images(dataset) for split, dataset in rows.items()})
    for split, dataset in rows.items():
        logger.info("%s: %d %s rows", recipe.name, len(dataset), split)
        read_by_recipe(dataset)
    return rows


def _source_rows(recipe: DataRecipe, train_cap: int | None, eval_cap: int | None, also: Sequence[str]) -> DatasetDict:
    raw = {ours: load_split(recipe, theirs) for ours, theirs in recipe.splits.items()}
    for ours, dataset in raw.items():
        if note := left_out_note(recipe, dataset):
            logger.warning("%s: %s: %s", recipe.name, ours, note)
        check_columns(recipe, dataset, also)
        warn_guessed_types(recipe, dataset)
        if not recipe.columns:
            check_no_recordings(dataset, f"{recipe.name}: the {ours} data")
            log_layout(layout_of_source(dataset, recipe, ours, also), f"{recipe.name}: {ours}", len(dataset))
        raw[ours] = dataset if recipe.shuffle_seed is None else dataset.shuffle(seed=recipe.shuffle_seed)
    if not recipe.has_eval:
        return DatasetDict({"train": _sift(raw["train"], recipe, RowFilter(recipe, "train", also=also), train_cap)[0]})
    held_out, train = _hold_out(raw, recipe, also)
    # A row held out of train must not be trained on as a duplicate with another index. An eval split of the source is
    # left as its authors chose it, unless the recipe sets dedupe.
    apart = "eval" not in raw or recipe.filters.dedupe
    compared = compared_columns(held_out, also)
    keys = {row_key(row) for row in read_rows(held_out, compared)} if apart else set()
    kept, _ = _sift(train, recipe, RowFilter(recipe, "train", keys, also), train_cap)
    return DatasetDict({"train": kept, "eval": _cap(held_out, eval_cap)})


def _hold_out(raw: dict[str, Dataset], recipe: DataRecipe, also: Sequence[str]) -> tuple[Dataset, Dataset]:
    """The eval rows, and the remaining source rows for training. Raises UserError if none remain."""
    row_filter, train = RowFilter(recipe, "eval", also=also), raw["train"]
    if "eval" in raw:
        return _sift(raw["eval"], recipe, row_filter, limit=None)[0], train
    if recipe.eval_rows is not None:
        held_out, used = _sift(train, recipe, row_filter, limit=recipe.eval_rows)
    else:
        assert recipe.eval_fraction is not None
        used = min(len(train), max(1, round(recipe.eval_fraction * len(train))))
        held_out, _ = _sift(train.select(range(used)), recipe, row_filter, limit=None)
    if used == len(train):
        raise UserError(
            f"{recipe.name}: holding out {len(held_out)} rows for eval leaves none of {used} to train on; "
            "lower eval_rows or eval_fraction."
        )
    return held_out, train.select(range(used, len(train)))


def _mixture_rows(recipe: DataRecipe, train_cap: int | None, eval_cap: int | None, also: Sequence[str]) -> DatasetDict:
    """The parts in their shares, shuffled, with no row drawn twice. The scarcest part limits the number of rows.

    A row that is in two parts stays twice. Raises UserError if a part has fewer rows than its `rows`.
    """
    exact = recipe.mixture[0].rows is not None
    weights = [Fraction(str(part.rows if exact else part.weight)) for part in recipe.mixture]
    shares = [weight / sum(weights) for weight in weights]
    train_rows = train_cap
    if exact:
        train_rows = min(int(sum(weights)), train_cap or int(sum(weights)))
    # A part has to read at most its share of the cap.
    needs = [(_ceil(share, train_rows), _ceil(share, eval_cap)) for share in shares]
    parts = [
        load_rows(part.recipe, max_train_rows=train, max_eval_rows=held_out, also=also)
        for part, (train, held_out) in zip(recipe.mixture, needs, strict=True)
    ]
    for part, rows, (need, _) in zip(recipe.mixture, parts, needs, strict=True):
        if exact and need is not None and len(rows["train"]) < need:
            raise UserError(
                f"{recipe.name}: {need} rows of {part.data!r} are asked for, but it has {len(rows['train'])}, and no "
                "row is used twice; lower its rows, or give weights."
            )
    for part, rows in zip(recipe.mixture, parts, strict=True):
        if part.domain is not None:
            for split, dataset in rows.items():
                rows[split] = dataset.add_column("domain", [part.domain] * len(dataset))
    mixed = DatasetDict()
    mixed["train"] = _mix([rows["train"] for rows in parts], shares, train_rows, recipe.shuffle_seed)
    if recipe.has_eval:
        mixed["eval"] = _mix([rows["eval"] for rows in parts], shares, eval_cap, recipe.shuffle_seed)
    return mixed


def mixture_counts(sizes: Sequence[int], shares: Sequence[Fraction], cap: int | None = None) -> list[int]:
    """The number of rows of each part: as many as the sizes allow in these shares, to within one row."""
    total = min(math.floor(size / share) for size, share in zip(sizes, shares, strict=True))
    total = total if cap is None else min(total, cap)
    quotas = [share * total for share in shares]
    counts = [math.floor(quota) for quota in quotas]
    largest_remainder = sorted(range(len(quotas)), key=lambda i: counts[i] - quotas[i])
    for i in largest_remainder[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _mix(parts: list[Dataset], shares: list[Fraction], cap: int | None, seed: int | None) -> Dataset:
    counts = mixture_counts([len(part) for part in parts], shares, cap)
    parts = aligned(_of_one_kind(parts))
    first = parts[0].features
    parts = [part if part.features == first else part.cast(first) for part in parts]
    drawn = [part.select(range(count)) for part, count in zip(parts, counts, strict=True)]
    return datasets.concatenate_datasets(drawn).shuffle(seed=seed)


def _of_one_kind(parts: list[Dataset]) -> list[Dataset]:
    """The parts in one format: if some have messages, prompts and completions of others are joined to messages.

    Raises UserError for a mixture of texts and conversations.
    """
    kinds = {_kind_of(part) for part in parts}
    if len(kinds) == 1:
        return parts
    if kinds != {"messages", "prompt and completion of messages"}:
        raise UserError(
            f"The parts of a mixture are of different kinds: {', '.join(sorted(kinds))}. A model learns from them in "
            "different ways, so bring them to one kind with `columns` in the parts' recipes."
        )
    logger.warning(
        "Some parts of the mixture have answers of their own and others are messages: all become messages. Set "
        "assistant_only_loss: true to learn from the answers alone."
    )
    return [part if "messages" in part.column_names else _joined(part) for part in parts]


def _kind_of(rows: Dataset) -> str:
    own = [name for name in ("text", *CHATS) if name in rows.column_names]
    chat = own[0] == "prompt" and not is_text(rows.features["prompt"])
    return " and ".join(own) + (" of messages" if chat else "")


def _joined(rows: Dataset) -> Dataset:
    """Prompts and completions joined to one conversation per row; pictures are not decoded or copied."""
    pair = ["prompt", "completion"]
    prompt, completion = (rows.features[name] for name in pair)
    features = Features({"messages": prompt if prompt == completion else List(Json())})
    talks = rows.select_columns(pair).map(_join, remove_columns=pair, features=features, desc="Joining messages")
    remaining = rows.remove_columns(pair)
    return datasets.concatenate_datasets([talks, remaining], axis=1) if remaining.column_names else talks


def _join(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"messages": [*row["prompt"], *row["completion"]]}


def _ceil(share: Fraction, total: int | None) -> int | None:
    return None if total is None else math.ceil(share * total)


def _cap(dataset: Dataset, rows: int | None) -> Dataset:
    return dataset if rows is None else dataset.select(range(min(rows, len(dataset))))


def _sift(raw: Dataset, recipe: DataRecipe, row_filter: RowFilter, limit: int | None) -> tuple[Dataset, int]:
    """The first `limit` rows that pass the filters, in TRL's columns, and the number of source rows read for them.

    Reads in blocks, so that a few rows of a large data set are read quickly. Raises UserError if no row passes.
    """
    block = max(1, len(raw)) if limit is None else max(4 * limit, _BLOCK)
    parts: list[Dataset] = []
    numbers = source_rows(raw)
    used, missing = 0, limit
    while used < len(raw) and missing != 0:
        span = raw.select(range(used, min(used + block, len(raw))))
        equal = row_filter.equal(span)
        places = [numbers[used + place] for place in equal]
        rows = map_rows(span.select(equal), recipe, row_filter.split, places, row_filter.also)
        kept = row_filter.keep(rows, missing, places)
        parts.append(rows.select(kept))
        missing = None if missing is None else missing - len(kept)
        used += equal[kept[-1]] + 1 if missing == 0 else len(span)
    if not any(len(part) for part in parts):
        raise UserError(
            f"{recipe.name}: no {row_filter.split} row is left of {len(raw)}. {row_filter.describe(used)} Loosen "
            "filters, or check that columns reads the right ones."
        )
    row_filter.warn(used)
    return datasets.concatenate_datasets(aligned([part for part in parts if len(part)])), used
