"""Prints, as a Markdown table, the combinations of settings that mmkd refuses and why, read from its source."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import mmkd
from mmkd.errors import Because

_SOURCE = Path(mmkd.__file__).parent
# A sentence ends before a capital, so that `e.g.`, `0.5` and names of files do not end one.
_SENTENCE_END = re.compile(r"(?<=[.:])\s+(?=[A-Z])")


@dataclass(frozen=True)
class Refusal:
    """A place of the source that refuses a combination of settings."""

    because: str
    file: str
    sentence: str
    """The first sentence of the message, {...} where it names what was given."""


def refusals(source: Path = _SOURCE) -> list[Refusal]:
    """All refusals with a `because` under a folder, by that and then by file. One passed on is where it came from."""
    order = {why: place for place, why in enumerate(get_args(Because))}
    listed = [refusal for path in sorted(source.rglob("*.py")) for refusal in _in_file(path, source)]
    return sorted(listed, key=lambda refusal: (order.get(refusal.because, -1), refusal.file, refusal.sentence))


def _in_file(path: Path, source: Path) -> Iterator[Refusal]:
    for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "UserError":
            continue
        for keyword in call.keywords:
            if keyword.arg == "because" and isinstance(keyword.value, ast.Constant):
                sentence = _SENTENCE_END.split(_text(call.args[0]), maxsplit=1)[0]
                yield Refusal(str(keyword.value.value), path.relative_to(source.parent).as_posix(), sentence)


def _text(node: ast.expr) -> str:
    """What a message says, as far as the source tells: an expression stands as {...}, of two choices the first."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) for part in parts)
        case ast.BinOp(left=left, right=right):
            return _text(left) + _text(right)
        case ast.IfExp(body=body):
            return _text(body)
    return "{...}"


def table(rows: list[Refusal]) -> str:
    """Refusals as a Markdown table."""
    cells = [(row.because, f"`{row.file}`", row.sentence.replace("|", "\\|")) for row in rows]
    lines = [("Because", "File", "Message"), ("---", "---", "---"), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    print(table(refusals()))
