"""The names of verifiers, for those who read recipes without loading anything."""

VERIFIERS = ("number", "math", "choice", "json")
PYTHON = "python:"
"""What the name of a function of the user's own begins with."""
