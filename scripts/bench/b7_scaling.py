"""B7: how the cost of the fused loss grows with tokens, with the vocabulary and with the entries of a top-k signal.

Time should be proportional to tokens and to the vocabulary, and hardly move with k. Memory beyond what must exist (the
gradients of head and hidden states, and one chunk of logits per model) should be flat in all three.
"""

import argparse
from dataclasses import dataclass, replace
from typing import Any

import torch
from _measure import MEGABYTE, Run, alone, arguments, dtype_of, exponent, faster, interleaved, report, verdict
from b1_fused_loss import Case, Sizes, build, make_inputs, make_step

# Runs of more tokens are repeated less; all of it stays within about five minutes of one core.
LONG = 8192


def necessary_megabytes(case: Case) -> float:
    """Gradients of head and hidden states, and one chunk of logits per model."""
    sizes = case.sizes
    models = 1 if case.divergence.startswith("top") else 2
    chunk = models * min(case.chunk_size, sizes.tokens) * sizes.vocab
    return case.dtype.itemsize * (sizes.student_width * (sizes.vocab + sizes.tokens) + chunk) / MEGABYTE


def repeats_of(case: Case, args: argparse.Namespace) -> int:
    """Two runs of long cases and one of the longest; the run that measures memory is among them."""
    return min(args.repeats, 1 if case.sizes.tokens > LONG else 2 if case.sizes.tokens == LONG else args.repeats)


def measure(cases: list[Case], args: argparse.Namespace) -> list[Run]:
    """Each case with inputs of its own, in one order and then in the other."""
    best: dict[Case, Run] = {}
    for turn in range(args.repeats):
        for case in cases if turn % 2 == 0 else reversed(cases):
            if turn < repeats_of(case, args) - args.memory:
                step = make_step(case, make_inputs(case.sizes, case.device, case.dtype))
                best[case] = faster(best.get(case), interleaved({"": step}, {"": 1}, case.device)[""])
    if args.memory:
        best = {case: faster(best.get(case), alone(build, case, case.device)) for case in cases}
    return [best[case] for case in cases]


@dataclass(frozen=True)
class Sweep:
    """Rows of one table, the a of `time ~ size^a`, and how much the memory beyond the necessary grows, in MB."""

    rows: list[dict[str, Any]]
    power: float
    growth: float | None


def sweep(name: str, values: list[int], cases: list[Case], args: argparse.Namespace) -> Sweep:
    """Measures the cases, one for each value of what is called `name`."""
    runs = measure(cases, args)
    rows, beyond = [], []
    for value, case, run in zip(values, cases, runs, strict=True):
        work, necessary = case.sizes.tokens * case.sizes.vocab, necessary_megabytes(case)
        if run.megabytes is not None:
            beyond.append(run.megabytes - necessary)
        row = {name: value, "s": run.seconds, "ns per logit": run.seconds / work * 1e9, "peak MB": run.megabytes}
        rows.append(row | {"necessary MB": necessary, "beyond MB": beyond[-1] if beyond else None})
    growth = max(beyond) - beyond[0] if beyond else None
    return Sweep(rows, exponent(values, [run.seconds for run in runs]), growth)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 1k to 32k")
    parser.add_argument("--vocabs", type=int, nargs="+", help="default: 49,152 to 262,144")
    parser.add_argument("--ks", type=int, nargs="+", help="default: 8 to 256")
    parser.add_argument("--divergence", default="forward_kl", help="of the sweeps over tokens and vocabulary")
    parser.add_argument("--chunk_size", type=int, default=512)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    tokens = args.tokens or ([512, 1024, 2048] if args.quick else [1024, 2048, 4096, 8192, 16384, 32768])
    vocabs = args.vocabs or ([4096, 8192, 16384] if args.quick else [49152, 98304, 151936, 262144])
    ks = args.ks or ([8, 32, 128] if args.quick else [8, 16, 32, 64, 128, 256])
    sizes = Sizes(512, 64, 96, 4096) if args.quick else Sizes(1024, 576, 960, 49152)
    base = Case("mmkd", args.divergence, sizes, 1.0, args.device, args.chunk_size, dtype_of(args))
    wide = replace(sizes, tokens=2 * sizes.tokens)
    sweeps = {
        "tokens": (tokens, [replace(base, sizes=replace(sizes, tokens=value)) for value in tokens]),
        "vocabulary": (vocabs, [replace(base, sizes=replace(sizes, vocab=value)) for value in vocabs]),
        "k": (ks, [replace(base, divergence="top-k", sizes=replace(wide, k=value)) for value in ks]),
    }
    tables, verdicts = {}, []
    for name, (values, cases) in sweeps.items():
        result = sweep(name, values, cases, args)
        tables[f"{args.divergence if name != 'k' else 'top-k'}, time ~ {name}^{result.power:.2f}"] = result.rows
        # 5 % over linear is noise; the number of outcomes of a top-k signal should not matter.
        verdicts.append(verdict(f"exponent of time over {name}", result.power, 0.1 if name == "k" else 1.05))
        verdicts.append(verdict(f"growth of memory beyond the necessary over {name}, MB", result.growth, 32))
    report("b7_scaling", args.device, tables, [] if args.quick else verdicts, {**vars(args), "sizes": sizes})


if __name__ == "__main__":
    main()
