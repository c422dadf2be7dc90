"""What a data recipe is: where its rows come from, how they become TRL's columns, and which of them are kept.

One YAML under `data_recipes/` is one data set or one mixture of recipes. `mmkd.data.load_data` turns it into rows.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.errors import UserError, nearest

from .columns import MessagesColumn, TurnColumns, is_template, template_columns
from .credentials import refuse_user_info
from .filter_options import DataFilters

BUILDERS = ("json", "csv", "parquet", "text", "arrow", "imagefolder", "webdataset")
LAYOUTS = (("text",), ("messages",), ("prompt", "completion"), ("prompt",))
BESIDES = ("images", "tools", "domain", "truncated")
OUTPUT_COLUMNS = ("text", "messages", "prompt", "completion", *BESIDES)

# Raise it when the same recipe starts to give other rows: caches are keyed by it, and `datasets` knows a function of
# ours by its name only, so neither would notice.
# 2: what CSV cells and templates say is what the file says.
CONVERSION = 2

# The fields that decide which rows come out. The others only describe, so that mending a typo keeps every cache.
IDENTITY = ("source", "config", "revision", "data_files", "splits", "columns", "filters")
IDENTITY += ("eval_rows", "eval_fraction", "max_rows", "shuffle_seed")
_MIXTURE_FIELDS = (
    "name",
    "description",
    "license",
    "homepage",
    "rows",
    "max_rows",
    "shuffle_seed",
    "mixture",
    "folder",
    "notes",
)


@dataclass(frozen=True)
class MixturePart:
    """One recipe of a mixture, with its share of the mixture (`weight`) or its number of training rows (`rows`).

    A `domain` stands in the column of that name of all its rows, for whom several teachers are told apart by it.
    """

    data: str
    recipe: "DataRecipe"
    weight: float | None = None
    rows: int | None = None
    domain: str | None = None

    @property
    def output_columns(self) -> tuple[str, ...]:
        """The columns that its rows have in the mixture."""
        own = self.recipe.output_columns
        return own if self.domain is None or "domain" in own else (*own, "domain")


@dataclass(frozen=True)
class DataRecipe:
    """One data set or mixture: everything that decides its rows, and what a reader should know about them."""

    name: str = field(metadata={"help": "The name of the data. Default: the file's name.", "yaml": str})
    description: str = field(default="", metadata={"help": "What the rows are, in a sentence or two.", "yaml": str})
    license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the rows: an SPDX id, or what the authors say. It stands on the student's card.",
            "yaml": str,
        },
    )
    homepage: str | None = field(default=None, metadata={"help": "Where to read about the data.", "yaml": str})
    prepare: str | None = field(
        default=None,
        metadata={"help": "The command that makes data_files. It is quoted if they are missing.", "yaml": str},
    )
    rows: Mapping[str, int] = field(
        default_factory=dict,
        metadata={
            "help": "{train: ..., eval: ...}: the numbers of rows that the source documents. Shown, not checked.",
            "yaml": dict,
        },
    )
    source: str = field(
        default="",
        metadata={
            "help": "Where the rows are: owner/name on the Hub, a kind of file (json, csv, parquet, text, arrow, "
            "webdataset), imagefolder (folders of pictures), or a folder of save_to_disk.",
            "yaml": str,
        },
    )
    config: str | None = field(
        default=None, metadata={"help": "Configuration (subset) of a data set on the Hub.", "yaml": str}
    )
    revision: str | None = field(
        default=None,
        metadata={
            "help": "Commit of a data set on the Hub. Pin one, or the rows change when its authors push.",
            "yaml": str,
        },
    )
    data_files: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict,
        metadata={
            "help": "{source split: path, glob or list of them}. Relative paths start at the current folder, then "
            "at the YAML's.",
            "yaml": dict,
        },
    )
    splits: Mapping[str, str] = field(
        default_factory=lambda: {"train": "train"},
        metadata={
            "help": "{train: source split, eval: source split}. Without eval, set eval_rows or eval_fraction to "
            "hold rows out.",
            "yaml": dict,
        },
    )
    columns: Mapping[str, str | MessagesColumn | TurnColumns] = field(
        default_factory=dict,
        metadata={
            "help": "{column of mmkd: source column, '{a} {b}' template, or options of messages}. Columns that are "
            "not named are left out, except the tools of messages. `truncated` (true or false, or a "
            "server's finish_reason) marks answers that were cut off, whose end is not learnt. Without "
            "`columns` the layout is recognised (messages, ShareGPT, Alpaca, LLaVA, ...).",
            "yaml": dict,
        },
    )
    image_folder: str | None = field(
        default=None,
        metadata={
            "help": "Folder in which relative paths of images start. Relative to the current folder.",
            "yaml": str,
        },
    )
    image_urls: bool = field(
        default=False,
        metadata={"help": "Download images that are http(s) URLs, each once, from public addresses.", "yaml": bool},
    )
    filters: DataFilters = field(default_factory=DataFilters, metadata={"help": "Which rows are kept.", "yaml": dict})
    eval_rows: int | None = field(
        default=None, metadata={"help": "Number of rows to hold out of train if there is no eval split.", "yaml": int}
    )
    eval_fraction: float | None = field(
        default=None, metadata={"help": "Share of rows to hold out of train if there is no eval split.", "yaml": float}
    )
    max_rows: int | None = field(default=None, metadata={"help": "Use at most this many training rows.", "yaml": int})
    shuffle_seed: int | None = field(
        default=0,
        metadata={
            "help": "Seed of the shuffle before rows are held out, limited or mixed. null: no shuffle.",
            "yaml": int,
        },
    )
    mixture: tuple[MixturePart, ...] = field(
        default=(),
        metadata={
            "help": "Several data recipes instead of a source: [{data: name or path, weight: share}, ...]. rows: N "
            "instead of weight takes so many rows; domain: NAME fills the column `domain`, by which "
            "several teachers can be told apart.",
            "yaml": list,
        },
    )
    folder: Path | None = field(default=None, compare=False, metadata={"help": "The YAML's folder."})
    notes: tuple[str, ...] = field(default=(), compare=False, metadata={"help": "Sentences to log with the rows."})

    def __post_init__(self) -> None:
        """Raises UserError where fields contradict each other or leave the rows undecided."""
        for split, count in self.rows.items():
            if not isinstance(count, int):
                raise UserError(f"{self.name}: rows has {split}: {count!r}, but a number of rows is a whole number.")
        for key in ("eval_rows", "max_rows"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise UserError(f"{self.name}: {key} is {getattr(self, key)}; give 1 or more, or leave it out.")
        if self.mixture:
            _check_mixture(self)
        else:
            _check_source(self)
            _check_columns(self)
            _check_held_out(self)

    @classmethod
    def load(cls, name_or_path: str | Path, *, root: Path | None = None) -> "DataRecipe":
        """The recipe of that name under `root` (default: the shipped `data_recipes/`), or at that path.

        A file of rows, a folder, a glob and a data set on the Hub (owner/name) may be named directly: see
        `mmkd.data.direct_source`. Raises UserError when there is none of them, when it cannot be read, and when a YAML
        asks for something that cannot be.
        """
        from .recipe_yaml import read_recipe

        return read_recipe(str(name_or_path), root=root)

    @property
    def has_eval(self) -> bool:
        """Whether this recipe gives eval rows too."""
        if self.mixture:
            return self.mixture[0].recipe.has_eval
        return "eval" in self.splits or self.eval_rows is not None or self.eval_fraction is not None

    @property
    def output_columns(self) -> tuple[str, ...]:
        """The columns of this recipe's rows; empty where they are recognised when the rows are read."""
        if self.mixture:
            return next((part.output_columns for part in self.mixture if part.recipe.output_columns), ())
        return tuple(column for column in OUTPUT_COLUMNS if column in self.columns)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) over what decides the rows, mixtures included; not over the files behind `data_files`."""
        return self._fingerprint(CONVERSION)

    @property
    def fingerprints(self) -> tuple[str, ...]:
        """This recipe's, and those under which earlier versions kept rows, most of which are the same today.

        A cache finds an answer by the tokens of its row, so that a row that is another today is missed, not mistaken.
        """
        return tuple(dict.fromkeys(self._fingerprint(number) for number in range(CONVERSION, 0, -1)))

    def _fingerprint(self, conversion: int) -> str:
        content: dict[str, Any] = {key: getattr(self, key) for key in IDENTITY}
        # A part without a domain is written as before there were any, which keeps the fingerprints of its caches.
        content["mixture"] = [
            [
                part.recipe._fingerprint(conversion),
                part.weight,
                part.rows,
                *([part.domain] if part.domain is not None else []),
            ]
            for part in self.mixture
        ]
        # Only cells of CSV files and templates give other rows since 2: caches of all others stay what they are.
        changed = self.source == "csv" or any(_fills_template(theirs) for theirs in self.columns.values())
        content["conversion"] = conversion if changed else 1
        text = json.dumps(content, sort_keys=True, default=_plain)
        return hashlib.sha256(text.encode()).hexdigest()

    def describe(self) -> str:
        """A few lines for a reader: what it is, where from, under which licence, and which rows and columns."""
        if self.mixture:
            origin = " + ".join(
                part.data + (f" {part.rows:,} rows" if part.rows else f" {part.weight:g}") for part in self.mixture
            )
        else:
            origin = f"{self.source}@{self.revision}" if self.revision else f"{self.source}"
            origin += f" ({self.config})" if self.config else ""
        rows = [f"{split} {count:,}" for split, count in self.rows.items()] or ["not stated"]
        rows += [f"{self.eval_rows:,} held out for eval"] if self.eval_rows else []
        rows += [f"{self.eval_fraction:.0%} held out for eval"] if self.eval_fraction else []
        rows += [f"at most {self.max_rows:,} for train"] if self.max_rows else []
        lines = {
            "mixture" if self.mixture else "source": origin,
            "licence": self.license or "not stated",
            "homepage": self.homepage,
            "rows": ", ".join(rows),
            "columns": ", ".join(self.output_columns),
            "made by": self.prepare,
        }
        title = f"{self.name}: {' '.join(self.description.split())}" if self.description else self.name
        return "\n".join([title, *(f"  {key:<9} {value}" for key, value in lines.items() if value)])


def _fills_template(theirs: str | MessagesColumn | TurnColumns) -> bool:
    return isinstance(theirs, TurnColumns) or (isinstance(theirs, str) and is_template(theirs))


def _plain(value: Any) -> Any:
    # YAML reads 2024-01-31 as a date, which json cannot write.
    if not isinstance(value, (DataFilters, MessagesColumn, TurnColumns)):
        return str(value)
    # Options that came later leave the fingerprint of recipes without them, and so their caches, as it was.
    fields = dataclasses.asdict(value)
    later = ("image_token", "user_key", "assistant_key")
    return {key: one for key, one in fields.items() if key not in later or one is not None}


def _check_source(recipe: DataRecipe) -> None:
    if not recipe.source:
        raise UserError(
            f"{recipe.name}: no source and no mixture; give `source:` (owner/name on the Hub, one of "
            f"{', '.join(BUILDERS)}, or a folder), or a `mixture:` of other recipes."
        )
    for name in (recipe.source, *(name for names in recipe.data_files.values() for name in names)):
        refuse_user_info(name, f"{recipe.name}: a source")
    if recipe.source in BUILDERS and not recipe.data_files:
        raise UserError(f"{recipe.name}: source {recipe.source!r} needs data_files: {{train: path/to/file}}.")
    for split, theirs in recipe.splits.items():
        if split not in ("train", "eval") or not isinstance(theirs, str):
            raise UserError(
                f"{recipe.name}: splits has {split!r}: {theirs!r}; write {{train: their split, eval: their split}} "
                f"(the nearest of the two is {nearest(split, ('train', 'eval'))!r})."
            )
    if "train" not in recipe.splits:
        raise UserError(f"{recipe.name}: splits names no train split; write splits: {{train: their split}}.")
    if len(set(recipe.splits.values())) < len(recipe.splits):
        raise UserError(
            f"{recipe.name}: splits reads train and eval from the same rows ({recipe.splits['train']!r}); hold some "
            "out with eval_rows or eval_fraction instead."
        )
    for theirs in recipe.splits.values():
        if recipe.data_files and theirs not in recipe.data_files:
            raise UserError(
                f"{recipe.name}: splits asks for {theirs!r}, which data_files does not list; "
                f"did you mean {nearest(theirs, list(recipe.data_files))!r}?"
            )


def _check_columns(recipe: DataRecipe) -> None:
    if not recipe.columns:
        # Recognised by the rows themselves.
        return
    for ours, mapping in recipe.columns.items():
        if ours not in OUTPUT_COLUMNS:
            raise UserError(
                f"{recipe.name}: columns has {ours!r}; did you mean {nearest(ours, OUTPUT_COLUMNS)!r}? "
                f"Our columns are {', '.join(OUTPUT_COLUMNS)}, and the source's stand on the right."
            )
        if isinstance(mapping, TurnColumns) and ours != "messages":
            raise UserError(f"{recipe.name}: columns.{ours} cannot be a question and an answer; map it to `messages`.")
        if isinstance(mapping, MessagesColumn) and ours in ("text", "images", "tools", "domain", "truncated"):
            raise UserError(f"{recipe.name}: columns.{ours} cannot be a list of messages; map it to `messages`.")
        if isinstance(mapping, str) and is_template(mapping):
            template_columns(mapping)
            if ours in ("messages", "images", "tools", "truncated"):
                raise UserError(f"{recipe.name}: columns.{ours} cannot be a template; name the source's column.")
    layout = tuple(column for column in recipe.output_columns if column not in BESIDES)
    if layout not in LAYOUTS:
        raise UserError(
            f"{recipe.name}: columns gives {', '.join(layout) or 'no text'}; TRL reads `text`, or `messages`, or "
            "`prompt` with `completion` (or alone, where a run answers it), each optionally with `images`, `tools`, "
            "`domain` and `truncated`."
        )
    for key in ("min_chars", "max_chars"):
        if layout == ("prompt",) and getattr(recipe.filters, key) is not None:
            raise UserError(f"{recipe.name}: filters.{key} is about answers, and these rows are prompts; remove it.")


def _check_held_out(recipe: DataRecipe) -> None:
    asked = [key for key in ("eval_rows", "eval_fraction") if getattr(recipe, key) is not None]
    if recipe.eval_fraction is not None and not 0 < recipe.eval_fraction < 1:
        raise UserError(f"{recipe.name}: eval_fraction is {recipe.eval_fraction}; it is a share between 0 and 1.")
    if len(asked) == 2:
        raise UserError(f"{recipe.name}: eval_rows and eval_fraction both say how many rows to hold out; keep one.")
    if asked and "eval" in recipe.splits:
        raise UserError(
            f"{recipe.name}: {asked[0]} holds rows out of train, but splits has an eval split already; remove one."
        )
    if asked and recipe.shuffle_seed is None:
        raise UserError(
            f"{recipe.name}: {asked[0]} needs a shuffle_seed, or it would hold out the source's first rows."
        )


def _shared(columns: tuple[str, ...]) -> list[str]:
    # Parts without tools, or without answers that were cut off, have none in the mixture's rows.
    return [column for column in columns if column not in ("tools", "truncated")]


def _check_mixture(recipe: DataRecipe) -> None:
    for f in dataclasses.fields(recipe):
        key, default = f.name, f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if key not in _MIXTURE_FIELDS and getattr(recipe, key) != default:
            raise UserError(
                f"{recipe.name}: a mixture takes its rows from other recipes, so it has no {key}; set {key} in those."
            )
    if recipe.shuffle_seed is None:
        raise UserError(f"{recipe.name}: a mixture needs a shuffle_seed, or its parts would follow one another.")
    if len({part.weight is None for part in recipe.mixture}) > 1:
        raise UserError(f"{recipe.name}: give every part of the mixture a weight, or every part rows; not both kinds.")
    for part in recipe.mixture:
        if (part.weight is None) == (part.rows is None):
            raise UserError(f"{recipe.name}: the part {part.data!r} needs either a weight or rows, and not both.")
        if not 0 < (part.rows or part.weight or 0) < float("inf"):
            raise UserError(f"{recipe.name}: the share of {part.data!r} must be above 0; leave the part out instead.")
        if part.domain is not None and "domain" in part.recipe.output_columns:
            raise UserError(
                f"{recipe.name}: {part.data!r} maps a column domain itself; remove that column, or the part's domain."
            )
        if _shared(part.output_columns) != _shared(recipe.output_columns) and part.recipe.output_columns:
            raise UserError(
                f"{recipe.name}: {part.data!r} gives {', '.join(part.output_columns)} but another part "
                f"gives {', '.join(recipe.output_columns)}; parts must share their columns."
            )
        if part.recipe.has_eval != recipe.has_eval:
            without = part if recipe.has_eval else recipe.mixture[0]
            raise UserError(
                f"{recipe.name}: some parts have eval rows, but {without.data!r} has none; give it an eval split, "
                "eval_rows or eval_fraction."
            )
