"""`mmkd init`: from answers to a recipe that is checked and explained."""

from pathlib import Path

from rich.text import Text

from .init_answers import InitFlags, gather
from .questions import Asker


def init(flags: InitFlags, asker: Asker) -> int:
    """Asks what is not given, writes the recipe, checks it and says what comes next; the exit status of doctor.

    Raises UserError for what cannot be, before anything is written; an interruption leaves nothing either.
    """
    written: Path | None = None
    try:
        answers = gather(asker, flags)
        # What follows takes seconds to import.
        from .init_recipe import check_recipe, write_recipe

        draft = write_recipe(answers, asker.console)
        written = answers.output
        return check_recipe(draft, answers, asker.console)
    except (KeyboardInterrupt, EOFError):
        left = "Nothing was written." if written is None else f"{written} is written, and not checked."
        asker.console.print(Text(f"\nInterrupted. {left}"))
        return 130
