"""One question to the user: answered by a flag, by its default, or on the terminal."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rich.console import Console
from rich.text import Text

from mmkd.errors import UserError


def any_text(text: str) -> str:
    """The text itself. Raises UserError for an empty one."""
    if not text.strip():
        raise UserError("Write something, or press Enter for what stands in brackets.")
    return text.strip()


@dataclass(frozen=True)
class Question:
    """What is asked, and what counts as an answer."""

    flag: str
    text: str
    default: str | None = None
    choices: Mapping[str, str] = field(default_factory=dict)
    """Answer -> what it means, where only some answers are possible."""
    check: Callable[[str], str] = any_text
    """The answer as it is meant. Raises UserError for one that cannot be."""
    hint: str = ""
    """What else could be answered, in a line."""

    def read(self, text: str) -> str:
        """The answer that a text gives: one of the choices, by its name or its number from 1."""
        if not self.choices:
            return self.check(text)
        names = list(self.choices)
        text = text.strip()
        if text.isdecimal() and 1 <= int(text) <= len(names):
            return names[int(text) - 1]
        if text not in names:
            raise UserError(f"{self.flag} {text!r} is none of {', '.join(names)}.")
        return self.check(text)


@dataclass(frozen=True)
class Asker:
    """How questions are answered in one run of `mmkd init`."""

    console: Console
    takes_defaults: bool
    """--yes: what has a default is not asked."""
    interactive: bool
    """Whether somebody sits at a terminal."""

    def ask(self, question: Question, given: str | None) -> str:
        """The answer, from a flag where it was given.

        Raises UserError for a flag that is no answer, and without a terminal for a question without one.
        """
        if given is not None:
            return question.read(given)
        if self.takes_defaults and question.default is not None:
            answer = question.read(question.default)
            self.console.print(Text(f"{question.flag} {answer} (the default)", style="dim"))
            return answer
        if not self.interactive:
            advice = f"Give {question.flag}"
            if question.choices:
                advice += f", one of {', '.join(question.choices)}"
            if question.default is not None:
                advice += f", or --yes, which takes {question.default} and every other default"
            reason = "No default answers this" if self.takes_defaults else "There is no terminal to ask on"
            raise UserError(f"{reason}: {question.text} {advice}.")
        return self._on_terminal(question)

    def confirm(self, question: Question, given: bool | None) -> bool:
        """A question of yes or no."""
        asked = Question(question.flag, question.text, question.default, {"yes": "", "no": ""})
        return self.ask(asked, None if given is None else "yes" if given else "no") == "yes"

    def _on_terminal(self, question: Question) -> str:
        self.console.print()
        self.console.print(Text(question.text, style="bold"))
        for number, (name, meaning) in enumerate(question.choices.items(), start=1):
            if meaning:
                line = Text.assemble((f"  {number}  ", "dim"), (name.ljust(17), "cyan"), meaning)
                self.console.print(line)
        if question.hint:
            self.console.print(Text(question.hint, style="dim"))
        # readline draws the line anew when it is edited, so that input() has to print the prompt: after one that rich
        # has printed before, Backspace would wipe it away.
        prompt = "> " if question.default is None else f"[{question.default}] > "
        while True:
            typed = input(prompt).strip() or question.default or ""
            try:
                return question.read(typed)
            except UserError as error:
                self.console.print(Text(str(error), style="red"))


def is_terminal() -> bool:
    """Whether somebody can be asked."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def edit_lines() -> None:
    """Gives the questions arrow keys where the system has readline; without it a line is typed and can be deleted."""
    try:
        import readline  # noqa: F401  # input() uses it once it is imported
    except ImportError:
        return
