"""What a user can mend: the command line prints it in one line, everything else keeps its traceback."""


class UserError(ValueError):
    """Bad input: the message says what it is, why it cannot be, and what to do instead."""
