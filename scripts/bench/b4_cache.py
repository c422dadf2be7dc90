"""B4: the teacher on disk: bytes per token, what they keep of the teacher, and how fast they are written and read.

A real teacher (SmolLM2-135M-Instruct, fp32) on real text, Python's language reference, in whole sequences. Everything
goes through mmkd's own build, codec and cache. DistillKit's compression is measured beside it, in the configurations
that its README recommends and one with more exact terms, where `--distillkit PATH` points to a checkout of
https://github.com/arcee-ai/DistillKit (nothing else of it needs to be installed).

The gradients are those of the student's head on a batch of about 2,048 tokens, relative to those of the teacher's
whole distribution. The students are the teacher with noise on its weights: little for a strong one, much for a weak.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from _caching import parsed, plan_of, sequences_of, text_arguments, write_cache
from _measure import Step, add_peer, arguments, interleaved, report, verdict
from datasets import Dataset
from torch import Tensor

from mmkd.cache.codec import Codec, TokenOrder, TokenScores
from mmkd.cache.store import Cache
from mmkd.capture.build_plan import ScorePlan
from mmkd.capture.scorers import LocalScorer, batches
from mmkd.capture.scoring import score_tokens
from mmkd.capture.sequences import TokenSequence
from mmkd.losses.fused import Targets, fused_loss
from mmkd.models.backbone import full_head
from mmkd.models.heads import LMHead
from mmkd.teachers.batch import ONLY, View
from mmkd.teachers.cached import CachedTeacher
from mmkd.teachers.local import LocalTeacher
from mmkd.teachers.signals import DenseSignal, log_one_minus_exp

WIDEST, TOP_KS = 256, (8, 16, 32, 64, 128, 256)
HYBRIDS = ((0, 50), (16, 16), (32, 32))
READS = 4
# Noise on the weights, relative to their standard deviation.
STUDENTS = {"strong": 0.05, "weak": 0.15}
GRADIENT_TOKENS = 2048
GRADIENTS = (
    (64, 0, "renormalise"),
    (32, 0, "bucket"),
    (64, 0, "bucket"),
    (0, 50, "unbiased"),
    (16, 16, "unbiased"),
    (32, 32, "unbiased"),
    (32, 32, "bucket"),
)
_POLYNOMIAL: dict[str, Any] = {"exact_dtype": "bfloat16", "term_dtype": "float32", "residual_bins": []}
DISTILLKIT: dict[str, dict[str, Any]] = {
    "DistillKit k=50": {"k": 50, "exact_k": 1, "polynomial_terms": [0, 1, "sqrt"]},
    "DistillKit k=128": {"k": 128, "exact_k": 16, "polynomial_terms": [0, 1, 2, 3, 4, "sqrt"]},
    "DistillKit k=128, 64 exact": {"k": 128, "exact_k": 64, "polynomial_terms": [0, 1, "sqrt"]},
}


@dataclass(frozen=True)
class Text:
    """Real sequences and the teacher's hidden states at their supervised tokens."""

    sequences: list[TokenSequence]
    signal: DenseSignal
    order: TokenOrder

    @property
    def lengths(self) -> list[int]:
        return [int(one.supervised.sum()) for one in self.sequences]

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def read_text(plan: ScorePlan, args: argparse.Namespace) -> Text:
    """Runs the teacher over the sequences once."""
    engine = plan.scorer
    assert isinstance(engine, LocalScorer)
    assert isinstance(plan.codec, Codec)
    sequences = sequences_of(plan, args.sequences)
    places = [place for batch in batches([len(one.ids) for one in sequences], 8192) for place in batch]
    sequences = [sequences[place] for place in places]
    return Text(sequences, hidden_of(engine.teacher, plan, sequences), plan.codec.order)


def hidden_of(teacher: LocalTeacher, plan: ScorePlan, sequences: list[TokenSequence]) -> DenseSignal:
    """The hidden states of a model at the supervised tokens, and its head."""
    states = []
    for start in range(0, len(sequences), 8):
        inputs, supervised = plan.prepared.batch(sequences[start : start + 8])
        states.append(teacher.ask(inputs, supervised).hidden)
    return DenseSignal(torch.cat(states), full_head(teacher.model).trimmed(teacher.vocab_size))


# What mmkd writes


def exact_scores(text: Text) -> dict[tuple[int, int], TokenScores]:
    """What each format is told about all tokens, by (k, m)."""
    offsets = np.random.default_rng(0).random(text.tokens)
    widest = score_tokens(text.signal, WIDEST, 0, offsets)
    found = {(k, 0): first(widest, k) for k in TOP_KS}
    return found | {(k, m): score_tokens(text.signal, k, m, offsets) for k, m in HYBRIDS}


def first(scores: TokenScores, k: int) -> TokenScores:
    """The k most likely tokens of a wider top-k."""
    log_probs = scores.log_probs[:, :k]
    tail = log_one_minus_exp(torch.from_numpy(log_probs).logsumexp(-1)).numpy()
    return TokenScores(scores.ids[:, :k], log_probs, scores.draws, tail)


def split(scores: TokenScores, lengths: Sequence[int]) -> Iterator[TokenScores]:
    """The scores of each sequence."""
    for stop, length in zip(np.cumsum(lengths), lengths, strict=True):
        rows = slice(stop - length, stop)
        yield TokenScores(scores.ids[rows], scores.log_probs[rows], scores.draws[rows], scores.tail_log_probs[rows])


@dataclass(frozen=True)
class Undecoded(Codec):
    """A codec that reads nothing, to measure what comes before it."""

    def decode(self, blob: bytes | memoryview, tokens: int) -> TokenScores:
        """No scores."""
        nothing = np.zeros((0, 0), dtype=np.int32)
        return TokenScores(nothing, nothing.astype(np.float32), nothing, np.zeros(0, dtype=np.float32))


def writing(text: Text, codec: Codec, parts: list[TokenScores]) -> Step:
    """Encodes and commits all sequences to a new folder."""
    keys = [one.key for one in text.sequences]

    def step() -> float:
        with tempfile.TemporaryDirectory() as folder:
            return write_cache(Path(folder), codec, keys, parts).shards["train"][0].bytes

    return step


def reading(text: Text, cache: Cache) -> Step:
    """Finds and reads every sequence by its key, in a random order, several times."""
    keys = [one.key for one in text.sequences] * READS
    order = np.random.default_rng(0).permutation(len(keys))

    def step() -> float:
        total = 0
        for place in order:
            row = cache.find(keys[place])
            assert row is not None
            total += len(cache.scores(row))
        return total

    return step


def format_rows(text: Text, caches: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of mmkd's formats; leaves their caches behind."""
    writes, reads, bare_reads, rows = {}, {}, {}, {}
    for (k, m), scores in exact_scores(text).items():
        codec, parts = Codec("top_k", k, m, text.order), list(split(scores, text.lengths))
        name, folder = name_of(k, m), folder_of(caches, k, m)
        write_cache(folder, codec, [one.key for one in text.sequences], parts)
        cache, bare = Cache(folder), Cache(folder)
        bare.codec = Undecoded(codec.kind, codec.k, codec.m, codec.order)
        writes[name] = writing(text, codec, parts)
        reads[name], bare_reads[name] = reading(text, cache), reading(text, bare)
        read = [cache.scores(place) for place in range(len(cache))]
        rows[name] = {
            "mass kept": float(np.exp(scores.log_probs).sum(-1).mean()),
            "KL with the tail, nats": encoding_kl(scores, read) if k else 0.0,
            "KL of the top-k, nats": top_k_kl(scores.log_probs, np.concatenate([one.log_probs for one in read])),
        }
    return timed_rows(text, rows, writes, reads, bare_reads, args)


def timed_rows(
    text: Text,
    rows: Mapping[str, dict[str, Any]],
    writes: Mapping[str, Step],
    reads: Mapping[str, Step],
    bare_reads: Mapping[str, Step],
    args: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Adds sizes and speeds: the writing step of a format returns its bytes."""
    written, read, bare = (
        interleaved(steps, dict.fromkeys(steps, int(args.repeats)), "cpu") for steps in (writes, reads, bare_reads)
    )
    count = READS * len(text.sequences)
    return [
        {
            "": name,
            "bytes/token": written[name].value / text.tokens,
            **row,
            "random read, us": 1e6 * read[name].seconds / count,
            "of it before decoding, us": 1e6 * bare[name].seconds / count,
            "write, tokens/s": text.tokens / written[name].seconds,
        }
        for name, row in rows.items()
    ]


def name_of(k: int, m: int) -> str:
    exact = f"top-{k}" if k else ""
    return " + ".join(part for part in (exact, f"{m} draws" if m else "") if part)


def folder_of(caches: Path, k: int, m: int) -> Path:
    return caches / f"{k}-{m}"


def encoding_kl(scores: TokenScores, read: Sequence[TokenScores]) -> float:
    """Mean KL(what the teacher said || what is read), in nats, over the top-k and the tail as one outcome."""
    ours = np.concatenate([scores.log_probs, scores.tail_log_probs[:, None]], axis=1)
    theirs = [np.concatenate([one.log_probs, one.tail_log_probs[:, None]], axis=1) for one in read]
    return top_k_kl(ours, np.concatenate(theirs))


def top_k_kl(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Mean KL of two sets of log-probs of the same outcomes, each made to sum to 1."""
    p, q = (torch.from_numpy(np.asarray(x, dtype=np.float64)).log_softmax(-1) for x in (ours, theirs))
    return float((p.exp() * (p - q)).sum(-1).mean()) if p.shape[-1] else 0.0


# What DistillKit writes


def distillkit_rows(text: Text, path: str, scratch: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """The table of DistillKit's formats, in its Parquet schema and read through `datasets` as by its trainer."""
    sys.path.insert(0, path)
    from distillkit.compression import (  # pyright: ignore[reportMissingImports]
        DistributionQuantizationConfig,
        LogprobCompressor,
    )

    scores = score_tokens(text.signal, 128, 0, np.zeros(text.tokens))
    writes, reads, bare_reads, rows = {}, {}, {}, {}
    for name, settings in DISTILLKIT.items():
        config = DistributionQuantizationConfig(
            **{**_POLYNOMIAL, "d": len(text.order.ids), "delta_encoding": False, **settings}
        )
        compressor, k = LogprobCompressor(config), settings["k"]
        parts = [
            (torch.from_numpy(one.ids[:, :k].astype(np.int64)), torch.from_numpy(one.log_probs[:, :k].copy()))
            for one in split(scores, text.lengths)
        ]
        file = scratch / f"{name}.parquet"
        writes[name] = partial(compress, compressor, parts, scratch / "written.parquet")
        compress(compressor, parts, file)
        stored = Dataset.from_parquet(str(file), cache_dir=str(scratch / "datasets"))
        reads[name] = partial(decompress, stored, compressor.decompress_to_sparse)
        bare_reads[name] = partial(decompress, stored, None)
        rebuilt = [compressor.decompress_to_sparse(tensors(stored[place]))[1] for place in range(len(parts))]
        exact = scores.log_probs[:, :k]
        rows[name] = {
            "mass kept": float(np.exp(exact).sum(-1).mean()),
            "KL with the tail, nats": None,
            "KL of the top-k, nats": top_k_kl(exact, torch.cat(rebuilt).float().numpy()),
        }
    return timed_rows(text, rows, writes, reads, bare_reads, args)


def compress(compressor: Any, parts: Sequence[tuple[Tensor, Tensor]], file: Path) -> float:
    """Compresses all sequences and writes them; returns their bytes before those of the Parquet file."""
    packed = [compressor.compress_from_sparse(*part) for part in parts]
    kind = pa.list_(pa.list_(pa.uint8()))
    names = ("compressed_logprobs", "bytepacked_indices")
    columns = {name: pa.array([one[name].tolist() for one in packed], type=kind) for name in names}
    pq.write_table(pa.table(columns), file)
    return sum(one[name].numel() for one in packed for name in names)


def decompress(stored: Any, decode: Callable[..., Any] | None) -> float:
    """Reads every sequence in a random order, several times."""
    order = np.random.default_rng(0).permutation(len(stored) * READS) % len(stored)
    for place in order:
        row = tensors(stored[int(place)])
        if decode is not None:
            decode(row)
    return len(order)


def tensors(row: Mapping[str, Any]) -> dict[str, Tensor]:
    """A row of a data set, as a collator makes it."""
    return {name: torch.tensor(values) for name, values in row.items()}


# Gradients


def gradient_rows(text: Text, plan: ScorePlan, caches: Path) -> list[dict[str, Any]]:
    """Relative error of the gradient of the student's head for each kind of target, read from the caches."""
    count = max(1, GRADIENT_TOKENS // text.lengths[0])
    asked = text.sequences[:count]
    tokens = sum(text.lengths[:count])
    engine = plan.scorer
    assert isinstance(engine, LocalScorer)
    dense = replace(text.signal, hidden=text.signal.hidden[:tokens])
    rows: dict[str, dict[str, Any]] = {}
    for student, noise in STUDENTS.items():
        noisy = LocalTeacher(with_noise(engine.teacher.model, noise), len(text.order.ids))
        noisy.place(engine.device)
        states = hidden_of(noisy, plan, asked)
        divergence, whole = head_gradient(states, dense)
        title = f"{student} student ({divergence:.2g} nats)"
        for k, m, tail in GRADIENTS:
            teacher = CachedTeacher(folder_of(caches, k, m), tail)
            found = [teacher.cache.find(one.key) for one in asked]
            fields = teacher.tensors([teacher.cache.scores(row) for row in found if row is not None])
            signal: Any = teacher.ask(View({}, torch.zeros(1, 1), targets={ONLY: fields}), torch.ones(tokens).bool())
            _, gradient = head_gradient(states, signal)
            row = rows.setdefault(f"{name_of(k, m)}, {tail}", {"": f"{name_of(k, m)}, {tail}"})
            row[title] = float((gradient - whole).norm() / whole.norm())
    return list(rows.values())


def with_noise(model: Any, noise: float) -> Any:
    """A copy of a model with Gaussian noise on its matrices."""
    noisy = deepcopy(model)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in noisy.parameters():
            if parameter.ndim == 2:
                parameter += noise * parameter.std() * torch.randn_like(parameter)
    return noisy


def head_gradient(student: DenseSignal, targets: Targets) -> tuple[float, Tensor]:
    """Mean forward KL in nats to these targets, and its gradient for the student's head."""
    weight = student.head.weight.detach().clone().requires_grad_()
    head = LMHead(weight, trimmed_to=student.head.trimmed_to)
    labels = torch.zeros(len(student.hidden), dtype=torch.long)
    loss = fused_loss(student.hidden, head, labels, targets)
    loss.total.backward()
    assert weight.grad is not None
    return float(loss.total.detach()) / len(labels), weight.grad


def main() -> None:
    parser = text_arguments(arguments(__doc__, dtypes=["float32"]), sequences=52, length=512)
    add_peer(parser, "distillkit", "arcee-ai/DistillKit")
    parser.add_argument("--no_gradients", action="store_true")
    args = parsed(parser)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        plan = plan_of(scratch / "plan", args)
        text = read_text(plan, args)
        rows = format_rows(text, scratch, args)
        if args.distillkit:
            rows += distillkit_rows(text, args.distillkit, scratch, args)
        else:
            rows.append({**dict.fromkeys(rows[0]), "": "DistillKit: git clone it, and --distillkit PATH"})
        title = f"{text.tokens:,} supervised tokens in {len(text.sequences)} sequences of {args.length}, fp32 teacher"
        tables = {title: rows}
        if not args.no_gradients:
            tables["Relative error of the gradient of the head"] = gradient_rows(text, plan, scratch)
    top64 = next(row for row in rows if row[""] == "top-64")
    verdicts = [
        verdict("bytes per token at k=64", top64["bytes/token"], 125),
        verdict("KL of the encoding at k=64, nats", top64["KL with the tail, nats"], 2e-4),
        verdict("random read at k=64, us per sample", top64["random read, us"], 150),
        verdict("random read at k=64 before decoding, us", top64["of it before decoding, us"], 150),
    ]
    report("b4_cache", "cpu", tables, [] if args.quick else verdicts, vars(args))


if __name__ == "__main__":
    main()
