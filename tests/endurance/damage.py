"""Damage to files, drawn at random, and the count of what came of it."""

import os
import random
import shutil
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmkd.errors import UserError


@dataclass
class Tally:
    """How many trials there were, and what came of each: refused, as before, or one of the two that may not be."""

    name: str
    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def try_(self, seed: object, what: str, read: Callable[[], Any], same: Callable[[Any], bool]) -> None:
        """Reads once; only a UserError, or what was there before, may come of it."""
        self.counts["tried"] += 1
        try:
            value = read()
        except UserError as error:
            self.counts["refused" if str(error).strip() else "silent"] += 1
            return
        except Exception as error:
            self.counts["tracebacks"] += 1
            last = traceback.extract_tb(error.__traceback__)[-3:]
            where = " <- ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(last))
            self.wrong.append(f"seed {seed}: {type(error).__name__}: {str(error)[:200]} ({where})\n  {what}")
            return
        if same(value):
            self.counts["as before"] += 1
        else:
            self.counts["silent"] += 1
            self.wrong.append(f"seed {seed}: read as something else, and nothing said: {value!r:.300}\n  {what}")

    def end(self) -> None:
        """Prints the count, and fails where a trial ended as none may."""
        shown = ", ".join(f"{self.counts[key]} {key}" for key in ("tried", "refused", "as before"))
        print(f"{self.name}: {shown}, {self.counts['tracebacks']} tracebacks, {self.counts['silent']} silent")
        assert not self.wrong, "\n".join([f"{len(self.wrong)} of {self.counts['tried']}:", *self.wrong[:20]])
        assert self.counts["refused"], "no trial was refused, so that nothing was damaged"


def damage(folder: Path, chance: random.Random, but: tuple[str, ...] = ()) -> str:
    """Damages one or two files below a folder, and says how."""
    return "; ".join(_damage_one(folder, chance, but) for _ in range(chance.choice((1, 1, 1, 2))))


def _damage_one(folder: Path, chance: random.Random, but: tuple[str, ...]) -> str:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in but]
    if not files:
        return "nothing is left to damage"
    path = chance.choice(files)
    name, content = path.relative_to(folder).as_posix(), path.read_bytes()
    kind = chance.choice(("bit", "bit", "byte", "cut", "grow", "empty", "delete", "rename", "swap", "double", "zeros"))
    place = chance.randrange(len(content)) if content else 0
    match kind:
        case "bit" | "byte" if content:
            flipped = 1 << chance.randrange(8) if kind == "bit" else chance.randrange(1, 256)
            path.write_bytes(content[:place] + bytes([content[place] ^ flipped]) + content[place + 1 :])
        case "cut":
            path.write_bytes(content[:place])
        case "grow":
            path.write_bytes(content + chance.randbytes(chance.randrange(1, 100)))
        case "delete":
            path.unlink()
        case "rename":
            path.rename(path.with_name(f"{chance.randrange(10**5):05d}{path.suffix}"))
        case "swap":
            other = chance.choice(files)
            mine, theirs = content, other.read_bytes()
            path.write_bytes(theirs)
            other.write_bytes(mine)
            name += f" and {other.relative_to(folder).as_posix()}"
        case "double":
            chance.choice(files).with_name(f"{chance.randrange(3):05d}{path.suffix}").write_bytes(content)
        case "zeros" if content:
            length = min(len(content) - place, chance.randrange(1, 200))
            path.write_bytes(content[:place] + bytes(length) + content[place + length :])
        case _:
            path.write_bytes(b"")
    return f"{kind} of {name} at {place}"


def copied(source: Path, target: Path) -> Path:
    """A copy of a folder in the place of the last one; files are linked, and written to only as new ones."""
    if target.exists():
        shutil.rmtree(target)
    return Path(shutil.copytree(source, target, copy_function=_copy))


def _copy(source: str, target: str) -> str:
    shutil.copyfile(source, target)
    os.chmod(target, 0o644)
    return target
