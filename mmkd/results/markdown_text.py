"""Text that others have written, in Markdown: it is read as text, and makes no tags, links, pictures or headings."""

import html
import re

# An underscore within a word is one; others, as the rest of these, begin or end something.
_MARKS = re.compile(r"[\\`*\[\]|~]|(?<![^\W_])_|_(?![^\W_])")


def cell(text: object) -> str:
    """Text of our own for a cell of a table, whose names may be those of a user."""
    return html.escape(str(text), quote=False).replace("|", "\\|").replace("\r", "").replace("\n", "<br>")


def said(text: object) -> str:
    """What data or a model has said, in one line."""
    escaped = _MARKS.sub(r"\\\g<0>", html.escape(str(text), quote=False))
    return escaped.replace("\r", "").replace("\n", "<br>")


def code(text: object) -> str:
    """A name as code in a line."""
    plain = " ".join(str(text).replace("`", "'").split())
    return f"`{plain}`"


def fenced(text: str, language: str) -> str:
    """A block of code, which nothing in the text ends."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
