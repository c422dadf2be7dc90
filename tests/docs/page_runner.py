"""Runs a page of the documentation from top to bottom, as its reader would, in an empty folder."""

import ast
import importlib
import inspect
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from mmkd.commands.main import main
from mmkd.recipe.flags import recipe_of
from mmkd.recipe.stages import parsed_plan
from scripts.site_pages import all_commands, parser_of
from tests.docs.page_blocks import FILES, Block, PageText
from tests.helpers import environment

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
SETUP = (
    "pip install",
    "python3 -m venv",
    "python -m venv",
    "git clone",
    "cd ",
    "source ",
    "bash scripts/",
    "deactivate",
)
"""How commands begin that make a place to work in: they are looked at and not run."""


class PageError(AssertionError):
    """What a page shows does not work."""


class PageRunner:
    """A page's reader, who works in the current folder."""

    def __init__(self, name: str, page: PageText, run: bool = True):
        self.name = name
        self.page = page
        self.run = run
        """Whether commands are run: of method cards they are only checked."""
        self.printed = ""
        """By the last block that was run."""
        self.typed: list[str] = []
        """Every command up to here."""
        self.module = types.ModuleType("page")

    def play(self) -> None:
        """Runs or checks every block. Raises PageError, with the page's line, for the first that does not work."""
        for block in self.page.blocks:
            try:
                self._block(block)
            except PageError as error:
                raise PageError(f"{self.name}:{block.line}: {error}\n{self.printed[-3000:]}") from error

    def _block(self, block: Block) -> None:
        checked = block.skip is not None or not self.run
        if block.output:
            if self.run:
                expect_output(block.text, self.printed)
        elif block.title is not None and block.language in FILES:
            write(Path(block.title), block.text)
            check_recipe(Path(block.title))
        elif block.language in ("bash", "sh", "console"):
            self._shell(block.text, checked)
        elif block.language == "python":
            self._python(block, checked)
        elif block.language == "yaml":
            yaml.safe_load(block.text)

    def _shell(self, text: str, checked: bool) -> None:
        self.printed = ""
        whole = is_program(text)
        for command in [text] if whole else commands_of(text):
            words = shlex.split(command, comments=True)
            ours = not whole and bool(words) and words[0] in ("mmkd", "mmkd-train") and not {"|", ">", "&&"} & {*words}
            if ours:
                words = ["train", *words[1:]] if words[0] == "mmkd-train" else words[1:]
                harmless = words[:1] == ["recipes"]
                if checked and not harmless:
                    self._check(words)
                else:
                    self._mmkd(words)
            elif command.startswith(SETUP):
                check_setup(words)
            elif not checked:
                self._bash(command)
            self.typed.append(command)

    def _mmkd(self, words: list[str]) -> None:
        """Runs a command of mmkd in this process, which has imported everything already."""
        keys = {key: value for key, value in self.page.settings.items() if key != "slow"}
        if words[0] == "train":
            words = [*words, *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]
        status, printed = captured(lambda: main(words))
        self.printed += printed
        if status != 0:
            raise PageError(f"`mmkd {shlex.join(words)}` ended with status {status}")

    def _check(self, words: list[str]) -> None:
        """Whether a command's flags are flags, and the keys of its recipe keys."""
        found = [entry for entry in all_commands() if tuple(words[: len(entry[0])]) == entry[0]]
        if not found:
            raise PageError(f"mmkd has no command `{' '.join(words[:2])}`")
        name, command = found[0]
        # The parsers know flags with underscores.
        rest = [
            re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)
            for word in words[len(name) :]
        ]
        try:
            with redirect_stderr(io.StringIO()) as complaint:
                options, flags = parser_of(name, command).parse_known_args(rest)
        except SystemExit as error:
            if error.code == 0:
                return
            raise PageError(f"`mmkd {shlex.join(words)}`: {complaint.getvalue().splitlines()[-1]}") from error
        if command.recipe is None:
            if flags:
                raise PageError(f"`mmkd {shlex.join(words)}`: unknown words {flags}")
            return
        names = getattr(options, command.recipe)
        for recipe in [names] if isinstance(names, str) else names:
            if not Path(recipe).exists() and self._made_before(recipe):
                continue
            # Some commands also take models and runs, which are not there.
            if command.recipe == "target" and not recipe.endswith((".yaml", ".yml")) and not is_shipped(recipe):
                continue
            status, printed = captured(lambda recipe=recipe: parse(recipe, flags))
            self.printed += printed
            if status is not None:
                raise PageError(f"`mmkd {shlex.join(words)}`: {status}")

    def _made_before(self, path: str) -> bool:
        """Whether a command above, which was not run, makes a file."""
        return any(path in command for command in self.typed)

    def _bash(self, text: str) -> None:
        folder = Path(os.environ["MMKD_PAGE_COMMANDS"])
        variables = {**environment(), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
        command = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=240, env=variables
        )
        self.printed += done.stdout
        if done.returncode != 0:
            raise PageError(f"`{text.strip()}` ended with status {done.returncode}")

    def _python(self, block: Block, checked: bool) -> None:
        tree = ast.parse(block.text)
        if checked:
            resolve_names(tree)
            return
        sys.modules[self.module.__name__] = self.module
        ast.increment_lineno(tree, block.line - 1)
        code = compile(tree, self.name, "exec")
        try:
            _, self.printed = captured(lambda: exec(code, vars(self.module)))
        except Exception as error:
            raise PageError(f"the block raises {type(error).__name__}: {error}") from error


def captured(call: Any) -> tuple[Any, str]:
    """What a call returns, and what it prints on either stream."""
    with io.StringIO() as written:
        with redirect_stdout(written), redirect_stderr(written):
            result = call()
        return result, written.getvalue()


def parse(recipe: str, flags: list[str]) -> str | None:
    """What is wrong with a recipe's keys."""
    try:
        read = recipe_of(recipe, flags)
        parsed_plan(read) if read.in_stages else read.parse()
    except ValueError as error:
        return str(error)
    return None


def check_recipe(path: Path) -> None:
    """A file that is a recipe has keys that its method knows."""
    if path.suffix not in (".yaml", ".yml"):
        return
    keys = yaml.safe_load(path.read_text(encoding="utf-8"))
    if isinstance(keys, dict) and "method" in keys and (reason := captured(lambda: parse(str(path), []))[0]):
        raise PageError(f"{path}: {reason}")


def is_shipped(name: str) -> bool:
    return any((ROOT / "trainers" / f"{name.removesuffix('.yaml')}{end}").exists() for end in (".yaml", "/README.md"))


def check_setup(words: list[str]) -> None:
    """Scripts are there, and extras exist."""
    if words[:2] == ["pip", "install"]:
        for extra in re.findall(r"mmkd\[([\w,]+)\]", " ".join(words)):
            if missing := set(extra.split(",")) - EXTRAS:
                raise PageError(f"mmkd has no extra {sorted(missing)}")
    elif words[0] == "bash" and not (ROOT / words[1]).is_file():
        raise PageError(f"there is no {words[1]}")


def resolve_names(tree: ast.AST) -> None:
    """What a block imports from mmkd is there, and takes the keywords that it is called with."""
    imported: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mmkd":
            module = importlib.import_module(node.module or "")
            for name in node.names:
                if not hasattr(module, name.name):
                    raise PageError(f"{node.module} has no {name.name}")
                imported[name.asname or name.name] = getattr(module, name.name)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "mmkd"
            and not hasattr(importlib.import_module("mmkd"), node.attr)
        ):
            raise PageError(f"mmkd has no {node.attr}")
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    for call in calls:
        if (name := ast.unparse(call.func)) in imported:
            keywords = {keyword.arg: None for keyword in call.keywords if keyword.arg is not None}
            try:
                inspect.signature(imported[name]).bind_partial(**keywords)
            except TypeError as error:
                raise PageError(f"{name}: {error}") from error


def is_program(text: str) -> bool:
    """Whether lines of a block are no commands by themselves."""
    return bool(re.search(r"<<|^\s*(for|while|if) |^\s*do\b|\$\(", text, re.MULTILINE))


def commands_of(text: str) -> Iterator[str]:
    """The commands of a block, one a line; a backslash joins lines, and a prompt is no part of them."""
    for line in text.replace("\\\n", " ").splitlines():
        command = line.strip().removeprefix("$ ")
        if command and not command.startswith("#"):
            yield command


def expect_output(expected: str, printed: str) -> None:
    """Raises PageError unless the lines were printed; `...` stands for anything."""
    pattern = ".*?".join(re.escape(part.strip()) for part in squeezed(expected).split("..."))
    if not re.search(pattern, squeezed(printed), re.DOTALL):
        raise PageError(f"the page promises\n{expected}\nand what was printed is another:")


def squeezed(text: str) -> str:
    """The text without the spaces at the ends of its lines."""
    return "\n".join(line.rstrip() for line in text.strip("\n").splitlines())


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
