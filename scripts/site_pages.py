"""Hooks of mkdocs.yml: pages made from files of the repository, and links to such files.

Method cards, CONTRIBUTING.md and CHANGELOG.md are pages of the site. The reference of the command line is made from
the parsers, and the page of combinations from what is tested. A link to any other file of the repository leads to a
page with that file. All of them are made while the site is built: nothing is copied in the checkout.
"""

import json
import os
import re
import sys
from argparse import ArgumentParser, HelpFormatter
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pymdownx.slugs import slugify

from mmkd.commands.command import Command, CommandGroup
from mmkd.commands.main import COMMANDS
from mmkd.seams.upstream_messages import keep_back_messages

ROOT = Path(__file__).resolve().parents[1]
# mkdocs loads this file by its path.
sys.path.insert(0, str(ROOT))

# What packages print when they are imported is no news about the site.
keep_back_messages()
from scripts.combination_page import combination_page  # noqa: E402
from scripts.site_keys import data_key_page, key_page  # noqa: E402

ARCHITECTURE = "How the house is built"
"""The section of CONTRIBUTING.md that is a page of its own."""

PAGES = {
    **{
        f"trainers/{card.parent.name}/README.md": f"methods/{card.parent.name}.md"
        for card in ROOT.glob("trainers/*/README.md")
    },
    "eval/README.md": "reference/suites.md",
    "scripts/bench/README.md": "reference/benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
}
"""Where a Markdown file of the repository is read on the site."""

NOTEBOOKS = sorted(ROOT.glob("docs/notebooks/*.ipynb"))

_LINK = re.compile(r"(?P<before>\]\()(?P<target>[^)\s#]*)(?P<anchor>#[^)\s]*)?(?P<after>\)|\s+\"[^\"]*\"\))")
_FENCE = re.compile(r"^(?P<indent> *)(?P<ticks>`{3,}).*?^(?P=indent)(?P=ticks) *$", re.MULTILINE | re.DOTALL)
_INSTRUCTION = re.compile(r"^ *<!-- test: [^>]*-->\n", re.MULTILINE)
_LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".json": "json", ".toml": "toml"}
_slug = slugify(case="lower")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that are made, and those of files they link to."""
    made = {"reference/cli.md": command_reference(), "architecture.md": section_of("CONTRIBUTING.md", ARCHITECTURE)}
    made |= {"reference/keys.md": key_page(), "reference/data_keys.md": data_key_page()}
    made["reference/combinations.md"] = combination_page()
    made |= {f"notebooks/{path.stem}.md": notebook_page(path) for path in NOTEBOOKS}
    made |= {place: read(path) for path, place in PAGES.items() if place not in files.src_uris}
    made["contributing.md"] = made["contributing.md"].replace(section_of("CONTRIBUTING.md", ARCHITECTURE), "")
    for place, text in made.items():
        files.append(File.generated(config, place, content=text))
    waiting = [source for place in files.src_uris if (source := source_of(place)).endswith(".md")]
    seen = {*waiting}
    while waiting:
        source = waiting.pop()
        for target in linked_files(source):
            place = place_of(target)
            if target in seen or place in files.src_uris or target.startswith("docs/"):
                continue
            seen.add(target)
            if Path(target).suffix in {".png", ".svg", ".ipynb"}:
                files.append(File.generated(config, place, abs_src_path=str(ROOT / target)))
            else:
                files.append(File.generated(config, place, content=file_page(target)))
            if target.endswith(".md"):
                waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links to files of the repository lead to their pages; what the tests read of a page is no part of it."""
    place = page.file.src_uri
    rewrite = partial(_rewritten, source=source_of(place), place=place)
    return _INSTRUCTION.sub("", outside_code(markdown, lambda text: _LINK.sub(rewrite, text)))


def source_of(place: str) -> str:
    """The repository's file that a page of the site shows."""
    if place == "architecture.md":
        return "CONTRIBUTING.md"
    if place.startswith("repository/"):
        return place.removeprefix("repository/").removesuffix(".md")
    if place.startswith("notebooks/"):
        return f"docs/{place.removesuffix('.md')}.ipynb"
    if (ROOT / "docs" / place).is_file():
        return f"docs/{place}"
    return next((source for source, shown in PAGES.items() if shown == place), f"docs/{place}")


def place_of(source: str, anchor: str = "") -> str:
    """Where the site shows a file of the repository."""
    if source == "CONTRIBUTING.md" and anchor.removeprefix("#") in architecture_anchors():
        return "architecture.md"
    if source in PAGES:
        return PAGES[source]
    if source.startswith("docs/notebooks/"):
        return source.removeprefix("docs/").replace(".ipynb", ".md")
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    whole = Path(source).suffix in {".png", ".svg", ".ipynb"}
    return f"repository/{source}" if whole else f"repository/{source}.md"


def linked_files(source: str) -> Iterator[str]:
    """Files of the repository that a Markdown file links to."""
    if not (ROOT / source).is_file():
        return
    text = _FENCE.sub("", read(source))
    for link in _LINK.finditer(text):
        if target := target_of(link["target"], source):
            yield target


def target_of(link: str, source: str) -> str | None:
    """The repository's file that a relative link in another file means, the README of a folder; None for all else."""
    if not link or "://" in link or link.startswith(("/", "mailto:")):
        return None
    path = PurePosixPath(os.path.normpath(PurePosixPath(source).parent / link)).as_posix()
    if (ROOT / path / "README.md").is_file():
        path = f"{path}/README.md"
    return path if (ROOT / path).is_file() and not path.startswith("..") else None


def _rewritten(link: re.Match[str], source: str, place: str) -> str:
    anchor = link["anchor"] or ""
    target = target_of(link["target"], source)
    if target is None and not link["target"] and source == "CONTRIBUTING.md":
        target = source
    if target is None:
        return link[0]
    shown = os.path.relpath(place_of(target, anchor), PurePosixPath(place).parent)
    return f"{link['before']}{shown}{anchor}{link['after']}"


def outside_code(text: str, change: Any) -> str:
    """The text, changed where it is not in a fenced block."""
    parts, end = [], 0
    for fence in _FENCE.finditer(text):
        parts += [change(text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*parts, change(text[end:])])


def read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def section_of(path: str, title: str) -> str:
    """A section of second level with its heading."""
    section = re.search(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", read(path), re.MULTILINE | re.DOTALL)
    if section is None:
        raise ValueError(f"{path} has no section '{title}'.")
    return section[0]


def architecture_anchors() -> set[str]:
    headings = re.findall(r"^#+ (.*)$", section_of("CONTRIBUTING.md", ARCHITECTURE), re.MULTILINE)
    return {_slug(heading, "-") for heading in headings}


def file_page(path: str) -> str:
    """A page with a file of the repository. Markdown is shown as a page, everything else as code."""
    if path.endswith(".md"):
        return read(path)
    ticks = "`" * max([3, *(len(run) + 1 for run in re.findall(r"^`{3,}", read(path), re.MULTILINE))])
    language = _LANGUAGES.get(Path(path).suffix, "text")
    head = f"---\nsearch: {{exclude: true}}\ntitle: {Path(path).name}\n---\n\n# `{path}`\n"
    return f"{head}\n{ticks}{language}\n{read(path)}{ticks}\n"


def notebook_page(path: Path) -> str:
    """A page with the cells of a notebook, and a link to the notebook itself."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    texts = ["".join(cell["source"]) for cell in cells]
    parts = [
        text if cell["cell_type"] == "markdown" else f"```python\n{text}\n```"
        for cell, text in zip(cells, texts, strict=True)
    ]
    title, _, rest = parts[0].partition("\n")
    download = f'<a href="../{path.name}" download>Download this notebook</a>'
    return "\n\n".join([title, download, rest.strip(), *parts[1:], ""])


def all_commands() -> Iterator[tuple[tuple[str, ...], Command]]:
    """Every command with its words after `mmkd`."""
    for command in COMMANDS:
        if isinstance(command, CommandGroup):
            yield from (((command.name, inner.name), inner) for inner in command.commands)
        else:
            yield (command.name,), command


def parser_of(words: tuple[str, ...], command: Command) -> ArgumentParser:
    """The parser of a command by itself."""
    narrow = partial(HelpFormatter, width=78, max_help_position=26)
    settings = {**command.of_parser, "description": command.description or command.help}
    parser = ArgumentParser(" ".join(["mmkd", *words]), formatter_class=narrow, **settings)
    command.add_flags(parser)
    return parser


def command_reference() -> str:
    """The page of all commands: what --help prints of each."""
    lines = [
        "# Command line",
        "",
        "`mmkd COMMAND --help` prints what stands here. `mmkd-train RECIPE` is short for `mmkd train RECIPE`. "
        "Commands that take a recipe also take its keys as flags, and flags win: "
        "`mmkd-train mine.yaml --learning_rate 1e-5`. Dashes and underscores in flags mean the same.",
        "",
        "| command | what it does |",
        "|---|---|",
    ]
    entries = [("mmkd " + " ".join(words), words, command) for words, command in all_commands()]
    lines += [f"| [`{name}`](#{_slug(name, '-')}) | {cell(command.help)} |" for name, _, command in entries]
    for name, words, command in entries:
        help_text = parser_of(words, command).format_help().rstrip()
        lines += ["", f"## {name}", "", "```text", help_text, "```"]
    return "\n".join([*lines, ""])


def cell(text: str) -> str:
    """Text that stands in a table: with its first letter large, and a full stop."""
    text = text.replace("|", "\\|")
    return text[:1].upper() + text[1:].removesuffix(".") + "."
