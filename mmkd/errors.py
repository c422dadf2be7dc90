"""What a user can mend: the command line prints it in one line, everything else keeps its traceback."""

import difflib
from collections.abc import Iterable
from typing import Literal

Because = Literal["meaning", "upstream", "not built"]
"""Why settings that are good each cannot be set together: that has no meaning; transformers, trl, PEFT, vLLM or the
like forbid it; or nobody wrote it. `scripts/combinations.py` makes the table of these from the source."""


class UserError(ValueError):
    """Bad input: the message says what it is, why it cannot be, and what to do instead.

    `because` is given where a combination of settings is refused, and None for a bad value, path or row.
    """

    def __init__(self, message: str, *, because: Because | None = None) -> None:
        super().__init__(message)
        self.because: Because | None = because


def first_line(error: BaseException) -> str:
    """What an error of another package says in its first line, for a message; its name where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_line(text: str) -> str:
    """What another program says last, for a message; empty where it says nothing."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def nearest(word: object, choices: Iterable[str]) -> str:
    """The choice spelled most like `word`, for a message; `choices` must not be empty."""
    return difflib.get_close_matches(str(word), list(choices), n=1, cutoff=0.0)[0]
