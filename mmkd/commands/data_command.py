"""`mmkd data`: look at rows before anything is trained on them."""

from argparse import ArgumentParser, Namespace

from .command import Command, CommandGroup


def add_preview_flags(parser: ArgumentParser) -> None:
    """Of `mmkd data preview`."""
    add = parser.add_argument
    add(
        "source",
        help="a file (.jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, .tar), a folder of them or of pictures, a "
        "glob in quotes, owner/name[:config] on the Hub, or a data recipe",
    )
    add("--rows", type=int, default=5, help="how many rows to show (default: 5)")
    add("--model", help="show the rows through the chat template and tokenizer of this student: a Hub id or a folder")
    add(
        "--assistant_only_loss",
        choices=("true", "false"),
        default="true",
        help="with --model, whether a run learns from the assistant's turns alone (default: true) or from all tokens "
        "of a conversation",
    )
    add("--chat_template_path", metavar="PATH", help="with --model, another chat template: a Jinja file or a model")
    add("--html", metavar="PAGE.html", help="write a page with thumbnails of the pictures too")
    add("--write", metavar="DATA.yaml", help="write the data recipe of the source, with comments, to edit")
    add(
        "--check_rows",
        type=int,
        default=10_000,
        help="how many rows to read for what is left out and why (default: 10,000)",
    )


def preview(options: Namespace) -> int:
    """Shows rows as a student will read them."""
    from pathlib import Path

    from rich.console import Console

    from mmkd.data.recipe_writing import write_data_recipe
    from mmkd.errors import UserError
    from mmkd.preflight.data_preview import preview_data
    from mmkd.preflight.preview_page import print_preview, write_page

    for flag in ("rows", "check_rows"):
        if getattr(options, flag) < 1:
            raise UserError(f"--{flag} is {getattr(options, flag)}; give 1 or more.")
    reader = None
    if options.model is not None:
        from mmkd.preflight.token_preview import reader_of

        reader = reader_of(options.model, options.assistant_only_loss == "true", options.chat_template_path)
    shown = preview_data(options.source, rows=options.rows, checked=options.check_rows, reader=reader)
    print_preview(shown, Console(soft_wrap=True))
    if options.html is not None:
        write_page(shown, Path(options.html))
        print(f"Page: {options.html}")
    if options.write is not None:
        write_data_recipe(shown.description, Path(options.write))
        print(f"Data recipe: {options.write} (in the recipe of a run: data: {_as_path(options.write)})")
    return 0


def _as_path(name: str) -> str:
    return name if "/" in name else f"./{name}"


COMMAND = CommandGroup(
    "data",
    "look at rows before training: layout, what is learnt, pictures, what is left out",
    (
        Command(
            "preview",
            "show rows as the student will read them, and write their data recipe",
            preview,
            add_preview_flags,
            description="Shows what a source of rows is and how a student reads it: the recognised layout, the part "
            "of each row that is learnt, the sizes of pictures, and how many rows are left out and why. The same "
            "SOURCE can stand in a recipe: `data: rows.jsonl`.",
        ),
    ),
)
