"""B6: what it costs to find the chunks that two tokenisations agree on, beside TRL's GOLD trainer and tokenkit.

Rows of Python's documentation, tokenised by real tokenizers and by one trained on it; no model is run. Every library
does the whole job once per run, from tokens to groups of tokens. mmkd starts from the token ids and masks of both
sides and ends with a chunk number for every token: bytes of the tokens, markers, comparison of the bytes, counts.

TRL's alignment is what its trainer does in every step: byte offsets of both sides while tokenising, which only
byte-level tokenizers allow, their tensors, and a loop over groups. Tokenising itself is measured apart and taken off.
"TRL's loop" is the loop alone, given mmkd's offsets. tokenkit starts from token strings in the alphabet of bytes,
which are not counted.
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
from _measure import Step, add_peer, arguments, interleaved, ratio, report, verdict
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from trl.experimental.gold.gold_trainer import ULDLoss
from trl.experimental.utils import encode_with_byte_offsets, pad_byte_offsets

from mmkd.alignment.pieces import TokenPieces
from mmkd.alignment.spans import Aligner

LIMIT, ADVANTAGE = 0.15, 25
REPEATS = 20
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


def groups_of_trl(teacher: list[torch.Tensor], student: list[torch.Tensor]) -> float:
    """The number of groups that TRL finds in rows of byte offsets."""
    rows = zip(student, teacher, strict=True)
    return sum(len(ULDLoss._align_by_byte_offsets(ours.tolist(), theirs.tolist())[0]) for ours, theirs in rows)


def by_trl(teacher: Side, student: Side, texts: list[str]) -> float:
    """The number of groups that TRL finds in the texts."""
    padded = []
    for side in (teacher, student):
        offsets = [spans for _, spans in encode_with_byte_offsets(side.tokenizer.backend_tokenizer, texts)]
        width = max(map(len, offsets))
        batch = torch.stack([pad_byte_offsets(spans, width, padding_side="right") for spans in offsets])
        padded.append([row[: len(spans)] for row, spans in zip(batch, offsets, strict=True)])
    return groups_of_trl(*padded)


def tokenised(teacher: Side, student: Side, texts: list[str]) -> float:
    """Tokenises the texts for both sides as TRL does; returns the number of tokens."""
    backends = [side.tokenizer.backend_tokenizer for side in (teacher, student)]
    batches = [backend.encode_batch(texts, add_special_tokens=False) for backend in backends]
    return sum(len(one.ids) for batch in batches for one in batch)


def by_tokenkit(align: Callable[..., Any], kind: Any, teacher: Side, student: Side) -> Step:
    """A run of tokenkit's alignment over all rows, which changes its input; returns the number of chunks."""
    rows = list(zip(teacher.strings(), student.strings(), strict=True))
    side = SimpleNamespace(model_kind_cls=kind)
    return lambda: sum(len(align(list(ours), list(theirs), side, side)[0]) for ours, theirs in rows)


def trained(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer of at most 16,384 tokens made for these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=1 << 14, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


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
        "mmkd": partial(by_mmkd, aligner, teacher, student, masks),
        "TRL's loop": partial(groups_of_trl, teacher.spans, student.spans),
    }
    if args.tokenkit:
        sys.path.insert(0, args.tokenkit)
        from tokenkit.align import get_alignment_indices  # pyright: ignore[reportMissingImports]
        from tokenkit.model_kinds import GPT2ModelKind  # pyright: ignore[reportMissingImports]

        steps["tokenkit"] = by_tokenkit(get_alignment_indices, GPT2ModelKind(), teacher, student)
    if all("ByteLevel" in str(side.tokenizer.backend_tokenizer.decoder) for side in (teacher, student)):
        steps["TRL's alignment"] = partial(by_trl, teacher, student, texts)
        steps["tokenising"] = partial(tokenised, teacher, student, texts)
    runs = interleaved(steps, {name: args.repeats for name in steps}, "cpu")
    seconds = {name: run.seconds for name, run in runs.items()}
    if "tokenising" in seconds:
        seconds["TRL's alignment"] -= seconds.pop("tokenising")
    return [
        {
            "": f"{names[0]} -> {names[1]}, {name}",
            "student tokens": len(student.ids),
            "chunks": int(runs[name].value),
            "us/token": 1e6 * seconds[name] / len(student.ids),
            "over mmkd": seconds[name] / seconds["mmkd"],
        }
        for name in seconds
    ]


def main() -> None:
    parser = arguments(__doc__, dtypes=["float32"])
    parser.add_argument("--sequences", type=int, default=32, help="rows of text in the batch")
    parser.add_argument("--length", type=int, default=512, help="tokens of each of them, about")
    parser.add_argument(
        "--tokenizers",
        metavar="NAME=FOLDER",
        nargs="+",
        default=[f"SmolLM2={SMOLLM2}", f"Gemma={GEMMA}"],
        help="tokenizers; each is aligned with every one after it, as its teacher's, and one trained on the text",
    )
    add_peer(parser, "tokenkit", "bminixhofer/tokenkit")
    parser.set_defaults(repeats=REPEATS)
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
    tokenizers: dict[str, Any] = {name: AutoTokenizer.from_pretrained(folder) for name, folder in folders.items()}
    tokenizers["trained"] = trained(texts)
    sides = {name: Side.of(one, TokenPieces.of(one), texts) for name, one in tokenizers.items()}
    pairs = [(teacher, student) for i, student in enumerate(sides) for teacher in list(sides)[i + 1 :]]
    rows = [row for pair in pairs for row in pair_rows(pair, sides, texts, args)]
    if not args.tokenkit:
        rows.append({column: None for column in rows[0]} | {"": "tokenkit: git clone it, and --tokenkit PATH"})
    slowest = max(row["us/token"] for row in rows if row[""].endswith(", mmkd"))
    least = {
        name: min((row["over mmkd"] for row in rows if row[""].endswith(name) and row["over mmkd"]), default=None)
        for name in ("TRL's alignment", "tokenkit")
    }
    verdicts = [
        verdict("us per student token", slowest, LIMIT),
        *(
            verdict(f"time over {name}, 1/{ADVANTAGE}", ratio(1, value), 1 / ADVANTAGE)
            for name, value in least.items()
        ),
    ]
    title = f"{len(texts)} rows of {4 * args.length:,} characters"
    report("b6_alignment", "cpu", {title: rows}, [] if args.quick else verdicts, vars(args))


if __name__ == "__main__":
    main()
