"""What a user can mend: the command line prints it in one line, everything else keeps its traceback."""

import traceback
from pathlib import Path


class UserError(ValueError):
    """Bad input: the message says what it is, why it cannot be, and what to do instead."""


def is_for_users(error: ValueError) -> bool:
    """Whether mmkd raised it, in words that say what to change; what others raise needs its traceback."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, UserError) or Path(raised_in).is_relative_to(Path(__file__).parent)
