"""B6: what it costs to find the chunks that two tokenisations agree on, beside TRL's GOLD trainer and tokenkit.

Rows of Python's documentation, tokenised by real tokenizers; no model is run. mmkd starts from the token ids and masks
of both sides and ends with a chunk number for every token: bytes of the tokens, markers, comparison of the bytes,
counts of rows. TRL's groups start from byte offsets of both sides. It computes them in every step while tokenising,
which only byte-level tokenizers allow; with others its loop over groups is given ours. tokenkit starts from token
strings in the alphabet of bytes, which are not counted.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from _caching import TEACHER as SMOLLM2
from _caching import TEXT
from _measure import Step, arguments, interleaved, ratio, report, verdict
from transformers import AutoTokenizer
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.experimental.utils import encode_with_byte_offsets

from mmkd.alignment.pieces import TokenPieces
from mmkd.alignment.spans import Aligner

LIMIT, ADVANTAGE = 0.15, 20
# Batches in one timed run, as a data set is aligned batch after batch.
PASSES = 10
GEMMA = Path(".cache/mmkd/gemma-3-270m")


@dataclass(frozen=True)
class Side:
    """A tokenizer, the ids of all rows and the byte spans of their tokens."""

    tokenizer: Any
    pieces: TokenPieces
    ids: np.ndarray
    lengths: np.ndarray
    spans: list[torch.Tensor]

    @classmethod
    def of(cls, tokenizer: Any, pieces: TokenPieces, texts: list[str]) -> "Side":
        """The rows as a tokenizer splits them, without special tokens."""
        rows = [np.array(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
        spans = [torch.from_numpy(np.stack(pieces.spans(*row), -1)) for row in zip(rows, texts, strict=True)]
        return cls(tokenizer, pieces, np.concatenate(rows), np.array([len(row) for row in rows]), spans)

    def strings(self) -> list[list[str]]:
        """The tokens of all rows in the printable alphabet of bytes."""
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        others = [byte for byte in range(256) if byte not in printable]
        alphabet = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
        tokens = ["".join(alphabet[byte] for byte in self.pieces[index]) for index in self.ids]
        edges = [0, *np.cumsum(self.lengths).tolist()]
        return [tokens[start:stop] for start, stop in pairwise(edges)]


def by_mmkd(aligner: Aligner, teacher: Side, student: Side, masks: tuple[np.ndarray, np.ndarray]) -> float:
    """The number of chunks that mmkd finds."""
    sides = aligner.teacher.cover(teacher.ids, teacher.lengths), aligner.student.cover(student.ids, student.lengths)
    return len(aligner.align(*sides, *masks))


def repeated(step: Step) -> float:
    """A batch `PASSES` times over; the value of the last."""
    return [step() for _ in range(PASSES)][-1]


def by_trl(teacher: Side, student: Side) -> float:
    """The number of groups that TRL finds."""
    rows = zip(student.spans, teacher.spans, strict=True)
    return sum(len(ULDLoss._align_by_byte_offsets(ours.tolist(), theirs.tolist())[0]) for ours, theirs in rows)


def by_tokenkit(align: Callable[..., Any], kind: Any, teacher: Side, student: Side) -> Step:
    """A run of tokenkit's alignment over all rows, which changes its input; returns the number of chunks."""
    rows = list(zip(teacher.strings(), student.strings(), strict=True))
    side = SimpleNamespace(model_kind_cls=kind)
    return lambda: sum(len(align(list(ours), list(theirs), side, side)[0]) for ours, theirs in rows)


def tokenised_by_trl(sides: tuple[Side, Side], texts: list[str], offsets: bool) -> float:
    """Tokenises the rows for both sides, with or without TRL's byte offsets; returns the number of tokens."""
    backends = [side.tokenizer.backend_tokenizer for side in sides]
    if offsets:
        return sum(len(ids) for backend in backends for ids, _ in encode_with_byte_offsets(backend, texts))
    batches = [backend.encode_batch(texts, add_special_tokens=False) for backend in backends]
    return sum(len(one.ids) for batch in batches for one in batch)


def read_rows(args: argparse.Namespace) -> list[str]:
    """Texts of about so many characters."""
    everything = "\n\n".join(json.loads(line)["text"] for line in TEXT.read_text().splitlines())
    size = 4 * args.length
    return [everything[place : place + size] for place in range(0, len(everything) - size, size)][: args.sequences]


def pair_rows(
    names: tuple[str, str], sides: dict[str, Side], texts: list[str], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """One pair of tokenizers: us per token of the student for every implementation."""
    teacher, student = sides[names[0]], sides[names[1]]
    aligner = Aligner.of(teacher.tokenizer, student.tokenizer)
    masks = np.ones(len(teacher.ids), bool), np.ones(len(student.ids), bool)
    steps: dict[str, Step] = {
        "mmkd": partial(repeated, partial(by_mmkd, aligner, teacher, student, masks)),
        "TRL's groups": partial(by_trl, teacher, student),
    }
    if args.tokenkit:
        sys.path.insert(0, args.tokenkit)
        from tokenkit.align import get_alignment_indices  # pyright: ignore[reportMissingImports]
        from tokenkit.model_kinds import GPT2ModelKind  # pyright: ignore[reportMissingImports]

        steps["tokenkit"] = by_tokenkit(get_alignment_indices, GPT2ModelKind(), teacher, student)
    both = (teacher, student)
    byte_level = all("ByteLevel" in str(side.tokenizer.backend_tokenizer.decoder) for side in both)
    tokenising = {offsets: partial(tokenised_by_trl, both, texts, offsets) for offsets in (False, True)}
    if byte_level:
        steps |= {str(offsets): step for offsets, step in tokenising.items()}
    runs = interleaved(steps, {name: args.repeats for name in steps}, "cpu")
    seconds = {name: run.seconds / (PASSES if name == "mmkd" else 1) for name, run in runs.items()}
    chunks = {name: int(run.value) for name, run in runs.items()}
    if byte_level:
        extra = seconds.pop("True") - seconds.pop("False")
        seconds["TRL's groups and offsets"] = seconds["TRL's groups"] + extra
        chunks["TRL's groups and offsets"] = chunks["TRL's groups"]
    return [
        {
            "": f"{names[0]} -> {names[1]}, {name}",
            "student tokens": len(student.ids),
            "chunks": chunks[name],
            "us/token": 1e6 * seconds[name] / len(student.ids),
            "over mmkd": seconds[name] / seconds["mmkd"],
        }
        for name in seconds
    ]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--sequences", type=int, default=32, help="rows of text in the batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of each of them, about")
    parser.add_argument(
        "--tokenizers",
        metavar="NAME=FOLDER",
        nargs="+",
        default=[f"SmolLM2={SMOLLM2}", f"Gemma={GEMMA}"],
        help="tokenizers; each is aligned with every one after it, as its teacher's",
    )
    parser.add_argument("--tokenkit", metavar="PATH", help="a checkout of bminixhofer/tokenkit, to measure beside")
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("this benchmark measures on a CPU only")
    folders = dict(item.split("=", 1) for item in args.tokenizers)
    if missing := [folder for folder in [*folders.values(), TEXT] if not Path(folder).exists()]:
        parser.error(
            f"{', '.join(map(str, missing))}: not there; run scripts/get_teacher.py and scripts/make_python_docs.py, "
            "or name other --tokenizers"
        )
    if args.quick:
        args.sequences, args.length = 2, 64
    torch.set_num_threads(args.threads)
    texts = read_rows(args)
    sides = {}
    for name, folder in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        sides[name] = Side.of(tokenizer, TokenPieces.of(tokenizer), texts)
    pairs = [(teacher, student) for i, student in enumerate(sides) for teacher in list(sides)[i + 1 :]]
    rows = [row for pair in pairs for row in pair_rows(pair, sides, texts, args)]
    if not args.tokenkit:
        rows.append({**dict.fromkeys(rows[0]), "": "tokenkit: git clone it, and --tokenkit PATH"})
    slowest = max(row["us/token"] for row in rows if row[""].endswith(", mmkd"))
    trl = [row["over mmkd"] for row in rows if row[""].endswith("and offsets")]
    share = ratio(1, min(trl, default=None))
    verdicts = [
        verdict("us per student token", slowest, LIMIT),
        verdict(f"time over TRL's groups and offsets (1/{ADVANTAGE})", share, 1 / ADVANTAGE),
    ]
    title = f"{len(texts)} rows of {4 * args.length:,} characters"
    report("b6_alignment", "cpu", {title: rows}, [] if args.quick else verdicts, vars(args))


if __name__ == "__main__":
    main()
