"""The findings of `mmkd doctor`, written down check by check."""

import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from .facts import Finding

Found = TypeVar("Found")


class Book:
    """Findings, written down check by check."""

    def __init__(self):
        self.findings: list[Finding] = []
        self.teacher = ""
        """The one of several that the next checks are about."""

    def attempt(self, name: str, function: Callable[..., Found], *arguments: Any) -> Found | None:
        """What the function returns; None, and a problem written down, when it raises."""
        # What templates, tokenizers, image libraries and trl raise has no common class below Exception.
        try:
            return function(*arguments)
        except ValueError as error:
            self.findings.append(Finding("problem", name, str(error)))
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            self.findings.append(Finding("problem", name, f"{type(error).__name__}: {error} ({where})"))
        return None

    def check(self, name: str, function: Callable[..., list[Finding]], *arguments: Any) -> None:
        """Writes down what a check found; one finding names all of several teachers that it is true of."""
        for finding in self.attempt(name, function, *arguments) or []:
            place = self._place_of_same(finding)
            if place is not None:
                self.findings[place] = replace(finding, name=f"{self.findings[place].name[:-1]}, {self.teacher})")
            else:
                self.findings.append(
                    replace(finding, name=f"{finding.name} ({self.teacher})") if self.teacher else finding
                )

    def _place_of_same(self, finding: Finding) -> int | None:
        """The place of the same finding about another teacher."""
        for place, known in enumerate(self.findings if self.teacher else []):
            if known.name.startswith(f"{finding.name} (") and (known.message, known.advice) == (
                finding.message,
                finding.advice,
            ):
                return place
        return None
