"""What `--help_keys` prints: the keys of a method, or of all, in groups."""

import difflib
import textwrap
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.text import Text

from mmkd.errors import UserError
from mmkd.training.method import METHODS

from .key_format import Key, print_key
from .key_groups import GROUPS
from .key_reference import keys_of, keys_of_all
from .recipe import Recipe

ALL = "all"
"""The word after --help_keys that shows keys without a use here too."""


def page() -> Console:
    """Where keys are printed: in colours where it is a terminal."""
    return Console(highlight=False)


def print_keys_of(recipe: Recipe, words: Sequence[str]) -> int:
    """Prints the keys of a recipe's method as `print_keys` does."""
    return print_keys(page(), recipe.method, words)


def print_keys(console: Console, method: str | None, words: Sequence[str]) -> int:
    """Prints the keys of a method (None: of all), or those that all words are about; returns the exit status.

    The word `all` shows keys without a use here, which are hidden otherwise. Raises UserError where nothing matches.
    """
    keys = keys_of_all() if method is None else keys_of(method)
    words = [word.lstrip("-") for word in words]
    everything, words = ALL in words, [word for word in words if word != ALL]
    matching = [key for key in keys if key.matches(words)]
    if not matching:
        raise UserError(_nothing_matches(words, keys, method))
    shown = matching if everything or words else [key for key in matching if not key.unused]
    whose = "all methods" if method is None else f"method {method}"
    said = "" if not words else f" with {' and '.join(repr(word) for word in words)}"
    intro = f"Keys of {whose}{said}. Set them in the recipe (key: value) or as flags (--key value)."
    _print_note(console, intro)
    console.print()
    for title, group in _in_groups(shown, method):
        console.print(Text(title, "bold underline"))
        for key in group:
            print_key(console, key, whole=bool(words))
        console.print()
    hidden = len(matching) - len(shown)
    if hidden:
        _print_note(console, f"{hidden} keys without a use here are hidden. --help_keys {ALL} shows them.")
    if not words:
        _print_note(console, "--help_keys WORD ... shows the keys with these words, such as --help_keys lora.")
    return 0


def _print_note(console: Console, text: str) -> None:
    console.print(Text(textwrap.fill(text, console.width), "dim"))


def _in_groups(keys: Iterable[Key], method: str | None) -> list[tuple[str, list[Key]]]:
    groups: dict[str, list[Key]] = {}
    for key in keys:
        of_method = key.method and method is None
        groups.setdefault(f"Method {key.method}" if of_method else GROUPS[key.group], []).append(key)
    if method is not None and GROUPS["method"] in groups:
        return [(f"Method {method}" if title == GROUPS["method"] else title, group) for title, group in groups.items()]
    return list(groups.items())


def _nothing_matches(words: Sequence[str], keys: Sequence[Key], method: str | None) -> str:
    names = list(dict.fromkeys(key.name for key in keys))
    near = [name for word in words for name in difflib.get_close_matches(word, names, n=3, cutoff=0.5)]
    of = "any method" if method is None else f"method {method}"
    hint = f" The nearest names are {', '.join(dict.fromkeys(near))}." if near else " Try a shorter word."
    others = [] if method is None else [name for name in METHODS if any(key.matches(words) for key in keys_of(name))]
    elsewhere = f" Method {', '.join(others)} has such a key." if others else ""
    return f"No key of {of} has {' and '.join(map(repr, words))} in its name or description.{elsewhere or hint}"
