"""The prompts of assessor and augmentor: text files one can edit, copied into the run that they belong to."""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from mmkd.errors import UserError, nearest
from mmkd.files import write_file

SHIPPED = Path(__file__).with_name("prompts")

FIELDS: Mapping[str, tuple[set[str], set[str]]] = {
    "judge": ({"instruction", "answer_1", "answer_2"}, {"reference"}),
    "judge_again": (set(), set()),
    "augment_hard": ({"instruction"}, set()),
    "augment_easy": ({"instruction"}, set()),
}
"""Name of a prompt -> the fields it must have, and those it may have."""

_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompts:
    """The texts of all prompts, by name."""

    texts: Mapping[str, str]

    @classmethod
    def read(cls, folder: str | Path | None) -> "Prompts":
        """The prompts of a folder, those it lacks from what ships.

        Raises UserError for a folder without any, for a file that is no prompt, and for missing or unknown fields.
        """
        texts = {name: (SHIPPED / f"{name}.txt").read_text(encoding="utf-8") for name in FIELDS}
        if folder is not None:
            own = sorted(Path(folder).glob("*.txt"))
            if not own:
                raise UserError(f"prompts {str(folder)!r} holds no .txt file; copy those of {SHIPPED} to edit them.")
            for path in own:
                if path.stem not in FIELDS:
                    raise UserError(f"{path} is no prompt of comd; did you mean {nearest(path.stem, FIELDS)}.txt?")
                texts[path.stem] = path.read_text(encoding="utf-8")
                _check(path, texts[path.stem])
        return cls(texts)

    def fill(self, name: str, **values: str) -> str:
        """The prompt with its fields filled in; braces of the values are left alone."""
        return _FIELD.sub(lambda match: values.get(match[1], ""), self.texts[name]).strip()

    @property
    def digests(self) -> dict[str, str]:
        """sha256 (hex) of each prompt."""
        return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in self.texts.items()}

    def write(self, folder: Path) -> None:
        """Copies the prompts to a folder."""
        for name, text in self.texts.items():
            write_file(folder / f"{name}.txt", text)


def _check(path: Path, text: str) -> None:
    needed, allowed = FIELDS[path.stem]
    fields = set(_FIELD.findall(text))
    missing, unknown = sorted(needed - fields), sorted(fields - needed - allowed)
    if missing:
        raise UserError(f"The prompt {path} lacks the field {{{missing[0]}}}, without which it asks about nothing.")
    if unknown:
        names = ", ".join(f"{{{name}}}" for name in sorted(needed | allowed)) or "none"
        raise UserError(
            f"The prompt {path} has an unknown field {{{unknown[0]}}}; the fields of {path.name}: {names}."
        )
