"""What the benchmarks of the teacher on disk share: the real teacher and text, and caches written as mmkd does."""

import argparse
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars
from transformers.utils import logging

from mmkd.cache.codec import Codec, TokenScores
from mmkd.cache.manifest import Manifest
from mmkd.cache.side_files import TOKEN_ORDER, order_bytes
from mmkd.cache.store import SIGNAL_FEATURES, CacheWriter
from mmkd.capture.build_plan import ScorePlan, make_plan
from mmkd.capture.sequences import TokenSequence, usable
from mmkd.recipe.flags import recipe_of

TEACHER, TEXT = Path(".cache/mmkd/SmolLM2-135M-Instruct"), Path(".cache/mmkd/python_docs/train.jsonl")
RECIPE = "kd/quickstart_cached"


def text_arguments(parser: argparse.ArgumentParser, sequences: int, length: int) -> argparse.ArgumentParser:
    """Adds how much of the real text is read."""
    parser.add_argument("--sequences", type=int, default=sequences, help="sequences of the real text")
    parser.add_argument("--length", type=int, default=length, help="tokens of each of them")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The arguments, with tiny sizes for --quick; ends the program where the real teacher or text is missing."""
    args = parser.parse_args()
    if args.device != "cpu":
        parser.error("this benchmark measures on a CPU only")
    if not (TEACHER.is_dir() and TEXT.is_file()):
        parser.error(
            "the real teacher and text are not there: run scripts/get_teacher.py and scripts/make_python_docs.py"
        )
    if args.quick:
        args.sequences, args.length = 4, 64
    # What is measured here prints thousands of progress bars otherwise.
    disable_progress_bars()
    logging.disable_progress_bar()
    return args


def plan_of(folder: Path, args: argparse.Namespace, *flags: str) -> ScorePlan:
    """What `mmkd cache build` would do with the quickstart's cache recipe, in whole sequences of `length` tokens."""
    # bf16 is about the student; the teacher is to run in its own type.
    sizes = ("--max_length", str(args.length), "--cache_shard_rows", str(args.sequences), "--bf16", "false")
    plan = make_plan(recipe_of(RECIPE, ["--teacher_cache", str(folder), *sizes, *flags]).parse())
    assert isinstance(plan, ScorePlan)
    return plan


def sequences_of(plan: ScorePlan, count: int) -> list[TokenSequence]:
    """The first sequences of the training text."""
    found = [sequence for _, sequence in usable(plan.prepared.splits["train"], range(count))]
    assert len(found) == count, f"the text has {len(found)} sequences of this length; ask for fewer"
    return [sequence for sequence in found if isinstance(sequence, TokenSequence)]


def write_cache(
    folder: Path,
    codec: Codec,
    keys: Sequence[bytes],
    scores: Sequence[TokenScores],
    preparation: Mapping[str, Any] | None = None,
) -> Manifest:
    """Encodes and commits one shard, as `mmkd cache build` does once the teacher has answered."""
    order = order_bytes(codec.order)
    signal = {"kind": codec.kind, "k": codec.k, "tail_draws": codec.m, "vocab_size": len(codec.order.ids)}
    signal["token_order"] = hashlib.sha256(order).hexdigest()
    identity = {"signal": signal, "preparation": dict(preparation or {})}
    with CacheWriter(folder, Manifest(identity, len(keys), {"train": len(keys)}), SIGNAL_FEATURES) as writer:
        (folder / TOKEN_ORDER).write_bytes(order)
        rows = [
            {"key": key, "tokens": len(one), "blob": codec.encode(one), "images": [], "image_tokens": 0}
            for key, one in zip(keys, scores, strict=True)
        ]
        writer.write("train", 0, rows, {}, {})
        writer.finish()
        return writer.manifest
