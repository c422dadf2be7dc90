"""A preview of data in the terminal, and as an HTML page that needs no other file."""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image
from rich.console import Console
from rich.text import Text

from mmkd import __version__
from mmkd.data.thumbnails import thumbnail_url
from mmkd.files import write_file
from mmkd.units import with_noun

from .data_preview import DataPreview, PreviewPicture, PreviewRow

PAGE = "preview_page.html"
_THUMBNAIL = 224
_WIDTH = 4000
"""Characters of a row that the terminal shows."""


def print_preview(preview: DataPreview, console: Console) -> None:
    """Prints a preview; what is learnt is bold and green, or between [[ and ]] where there is no colour."""
    plain = console.color_system is None or console.no_color
    for name, value in facts_of(preview):
        console.print(Text.assemble((f"{name:<10}", "bold"), " ", value))
    for number, row in enumerate(preview.rows, 1):
        title = f"\nrow {number} of {len(preview.rows)} shown" + (f": {row.note}" if row.note else "")
        console.print(Text(title, style="bold"))
        for picture in row.pictures:
            console.print(Text(f"  picture: {described(picture)}", style="dim"))
        console.print(_text_of(row, plain))
    console.print()
    marks = plain and any(piece.supervised for row in preview.rows for piece in row.pieces)
    where = " Marked text stands between [[ and ]]." if marks else ""
    console.print(Text(preview.marked + where, style="dim"))


def facts_of(preview: DataPreview) -> list[tuple[str, str]]:
    """What is known of the source, as names and sentences."""
    about = preview.description
    rows = ", ".join(f"{count:,} {split}" for split, count in about.rows.items())
    facts = [
        ("source", f"{about.source} ({about.container})"),
        ("layout", about.spoken),
        ("columns", ", ".join(about.columns) + (f"; not read: {', '.join(about.unread)}" if about.unread else "")),
        ("rows", rows),
    ]
    if about.class_names:
        facts.append(("classes", f"{len(about.class_names)}: {_listed(about.class_names)}"))
    # The layout is said above.
    remarks = [note for note in preview.remarks if " read as " not in note]
    facts += [("note", note) for note in (*about.notes, *remarks)]
    if about.needs is not None:
        facts.append(("use", about.needs))
    if about.kind == "classes" and about.recipe is not None:
        facts.append(("use", "Method dho learns the class. Other methods read the text alone, without the class."))
    if not any("left out" in note or "filters" in note for note in preview.remarks):
        facts.append(("left out", f"none of the {preview.checked:,} rows checked"))
    return facts


def described(picture: PreviewPicture) -> str:
    """A picture in words: its size, or why it cannot be read."""
    return picture if isinstance(picture, str) else f"{picture.width} x {picture.height} pixels"


def write_page(preview: DataPreview, path: Path) -> None:
    """Writes the preview as one HTML file with thumbnails. Raises UserError for a path that cannot be written."""
    environment = ImmutableSandboxedEnvironment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    template = files("mmkd.preflight").joinpath(PAGE).read_text(encoding="utf-8")
    rows = [
        {
            "note": row.note,
            "pieces": row.pieces,
            "pictures": [
                {"url": thumbnail_url(picture, _THUMBNAIL) if isinstance(picture, Image.Image) else None}
                | {"words": described(picture)}
                for picture in row.pictures
            ],
        }
        for row in preview.rows
    ]
    page = environment.from_string(template).render(
        title=f"Preview of {preview.description.source}",
        facts=facts_of(preview),
        rows=rows,
        shown=with_noun(len(rows), "row"),
        marked=preview.marked,
        version=__version__,
    )
    write_file(path, page)


def _text_of(row: PreviewRow, plain: bool) -> Text:
    text = Text()
    for piece in row.pieces:
        marked = piece.supervised and bool(piece.text)
        shown = f"[[{piece.text}]]" if marked and plain else piece.text
        text.append(shown, style="bold green" if marked else "")
        if len(text) > _WIDTH:
            text.truncate(_WIDTH)
            text.append(" ... (cut here; the HTML page shows all)", style="dim")
            break
    return text


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
