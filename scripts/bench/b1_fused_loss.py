"""B1: the loss over the vocabulary, beside its peers: time over four bare matrix products, and peak memory.

Student head, teacher head, divergence, forward and backward, from hidden states to the gradients of hidden states and
head. mmkd drops the positions without a supervised token before the head; peers mask after it, and are measured so.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace
from typing import Any, cast

import torch
from _measure import Step, alone, arguments, dtype_of, faster, installed, interleaved, ratio, report, verdict
from torch import Tensor

from mmkd.losses.divergences import forward_kl
from mmkd.losses.fused import Objective, Targets, fused_loss
from mmkd.methods.kd import DIVERGENCES, KDConfig
from mmkd.methods.taid import TAIDTrainer
from mmkd.models.heads import LMHead
from mmkd.teachers.signals import DenseSignal, TopKSignal

IGNORED = -100


@dataclass(frozen=True)
class Sizes:
    """Supervised and unsupervised tokens, widths of student and teacher, vocabulary, entries of a top-k signal."""

    tokens: int
    student_width: int
    teacher_width: int
    vocab: int
    k: int = 64

    @property
    def title(self) -> str:
        return f"N={self.tokens:,}, {self.student_width}/{self.teacher_width}, V={self.vocab:,}"


# SmolLM2-135M under 360M, Qwen2.5-0.5B under a 1.5B-like width, Gemma 3 270M under 1B.
COLUMNS = (Sizes(4096, 576, 960, 49152), Sizes(2048, 896, 1024, 151936), Sizes(1024, 640, 1152, 262144))
QUICK = (Sizes(256, 64, 96, 4096), Sizes(128, 64, 96, 8192), Sizes(64, 64, 96, 16384))
WARM_UP = Sizes(64, 64, 64, 1024, 8)
TARGETS = (1.6, 1.4, 1.4)


@dataclass(frozen=True)
class Case:
    """One cell of the table: what runs (`kind`), with which divergence, on what, and where."""

    kind: str
    divergence: str
    sizes: Sizes
    share: float = 1.0
    device: str = "cpu"
    chunk_size: int = 512
    dtype: torch.dtype = torch.bfloat16

    @property
    def name(self) -> str:
        share = "" if self.share == 1 else f", {self.share:g} supervised"
        return f"{self.kind} {self.divergence}{share}".strip()

    @property
    def floor(self) -> str:
        return "floor, 3 matmuls" if self.divergence.startswith("top") else "floor, 4 matmuls"


@dataclass
class Inputs:
    """Hidden states and heads; the student's carry gradients."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    top_k: TopKSignal

    def masked_labels(self, share: float) -> Tensor:
        """Labels with all but `share` of the positions ignored, in runs of 64 as prompts and answers would be."""
        period = round(64 / share)
        position = torch.arange(len(self.labels), device=self.labels.device)
        return self.labels.masked_fill(position % period >= 64, IGNORED)


def make_inputs(sizes: Sizes, device: str, dtype: torch.dtype) -> Inputs:
    """Random heads whose logits have a standard deviation of 2, a little less than a real model's."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(shape, dtype=dtype, device=device)
        return values.normal_(0, scale, generator=generator)

    def head(width: int) -> Tensor:
        return normal(sizes.vocab, width, scale=2 / math.sqrt(width))

    def tokens(*shape: int) -> Tensor:
        return torch.randint(sizes.vocab, shape, device=device, generator=generator)

    log_probs = normal(sizes.tokens, sizes.k).float().log_softmax(-1) + math.log(0.9)
    top_k = TopKSignal(tokens(sizes.tokens, sizes.k), log_probs, torch.full_like(log_probs[:, 0], math.log(0.1)))
    return Inputs(
        normal(sizes.tokens, sizes.student_width).requires_grad_(),
        head(sizes.student_width).requires_grad_(),
        normal(sizes.tokens, sizes.teacher_width),
        head(sizes.teacher_width),
        tokens(sizes.tokens),
        top_k,
    )


# What runs


def make_step(case: Case, inputs: Inputs) -> Step:
    """The run of one case; its value is the mean divergence in nats, or 0 for the floor."""
    labels = inputs.masked_labels(case.share)
    run = RUNS[case.kind](case, inputs, labels)

    def step() -> float:
        inputs.hidden.grad = inputs.weight.grad = None
        loss = run()
        if loss is None:
            return 0.0
        loss.backward()
        return loss.item()

    return step


def _floor(case: Case, inputs: Inputs, labels: Tensor) -> Callable[[], Tensor | None]:
    hidden, weight = inputs.hidden.detach(), inputs.weight.detach()
    with_teacher = case.divergence == "4 matmuls"

    def run() -> None:
        logits = hidden.new_empty(case.chunk_size, case.sizes.vocab)
        teacher_logits = torch.empty_like(logits) if with_teacher else None
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for start in range(0, len(hidden), case.chunk_size):
            rows = slice(start, min(start + case.chunk_size, len(hidden)))
            chunk = logits[: len(hidden[rows])]
            torch.mm(hidden[rows], weight.T, out=chunk)
            if teacher_logits is not None:
                torch.mm(inputs.teacher_hidden[rows], inputs.teacher_weight.T, out=teacher_logits[: len(chunk)])
            torch.mm(chunk, weight, out=grad_hidden[rows])
            grad_weight.addmm_(chunk.T, hidden[rows])

    return run


def _mmkd(case: Case, inputs: Inputs, labels: Tensor) -> Callable[[], Tensor]:
    objective = make_objective(case.divergence)
    supervised = None if case.share == 1 else labels != IGNORED
    labels = _rows(labels, supervised)
    targets: Targets = DenseSignal(_rows(inputs.teacher_hidden, supervised), LMHead(inputs.teacher_weight))
    if case.divergence.startswith("top"):
        top_k = inputs.top_k
        targets = TopKSignal(*(_rows(part, supervised) for part in (top_k.ids, top_k.log_probs, top_k.tail_log_probs)))

    def run() -> Tensor:
        # The student's rows are picked in the step, since that is differentiated, too.
        hidden, head = _rows(inputs.hidden, supervised), LMHead(inputs.weight)
        return fused_loss(hidden, head, labels, targets, objective, chunk_size=case.chunk_size).total / len(labels)

    return run


def _rows(values: Tensor, supervised: Tensor | None) -> Tensor:
    return values if supervised is None else values[supervised]


def make_objective(name: str) -> Objective:
    """The objective that the trainers of mmkd pass to the fused loss."""
    if name == "taid":
        schedule, args = SimpleNamespace(t=0.4), SimpleNamespace(progress_measure="cross_entropy")
        trainer = cast(Any, SimpleNamespace(schedule=schedule, args=args))
        return lambda student, teacher: TAIDTrainer._objective(trainer, student, teacher)
    if name.startswith("top"):
        return forward_kl
    # The class itself holds the defaults of its fields.
    return DIVERGENCES[name](cast(Any, KDConfig))


def _liger(case: Case, inputs: Inputs, labels: Tensor) -> Callable[[], Tensor]:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss  # pyright: ignore[reportMissingImports]

    compiled = case.kind == "Liger compiled"
    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=PEER_BETA[case.divergence], compiled=compiled)
    return lambda: loss(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, labels)


def _liger_triton(case: Case, inputs: Inputs, labels: Tensor) -> Callable[[], Tensor]:
    from liger_kernel.transformers import LigerFusedLinearJSD  # pyright: ignore[reportMissingImports]

    loss = LigerFusedLinearJSD(PEER_BETA[case.divergence])
    return lambda: loss(inputs.hidden, inputs.weight, inputs.teacher_hidden, inputs.teacher_weight, labels)


def _trl_gkd(case: Case, inputs: Inputs, labels: Tensor) -> Callable[[], Tensor]:
    from trl.experimental.gkd import GKDTrainer

    def run() -> Tensor:
        logits = (inputs.hidden @ inputs.weight.T)[None]
        with torch.no_grad():
            teacher_logits = (inputs.teacher_hidden @ inputs.teacher_weight.T)[None]
        beta = PEER_BETA[case.divergence]
        return GKDTrainer.generalized_jsd_loss(logits, teacher_logits, labels[None], beta)

    return run


def _trl_chunked(case: Case, inputs: Inputs, labels: Tensor) -> Callable[[], Tensor]:
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    hidden, teacher_hidden, mask = inputs.hidden[None], inputs.teacher_hidden[None], (labels != IGNORED)[None]
    beta = PEER_BETA[case.divergence]
    return lambda: _chunked_divergence_loss(hidden, teacher_hidden, inputs.weight, inputs.teacher_weight, mask, beta)[
        0
    ]


PEER_BETA = {"forward_kl": 0.0, "jsd": 0.5}
RUNS: dict[str, Callable[[Case, Inputs, Tensor], Callable[[], Tensor | None]]] = {
    "floor,": _floor,
    "mmkd": _mmkd,
    "Liger eager": _liger,
    "Liger compiled": _liger,
    "Liger Triton": _liger_triton,
    "TRL GKD": _trl_gkd,
    "TRL chunked": _trl_chunked,
}


def build(case: Case) -> tuple[Step, Step]:
    """A tiny run and the run of one case, each with inputs of its own."""
    small = replace(case, sizes=WARM_UP, share=1.0)
    warm_up = make_step(small, make_inputs(WARM_UP, case.device, case.dtype))
    return warm_up, make_step(case, make_inputs(case.sizes, case.device, case.dtype))


# What is compared


def cases_of(sizes: Sizes, args: argparse.Namespace, shares: tuple[float, ...]) -> list[Case]:
    """Floors, every divergence of mmkd and the peers; in the first column also with fewer supervised tokens."""
    base = Case("mmkd", "forward_kl", sizes, 1.0, args.device, args.chunk_size, dtype_of(args))
    floors = [replace(base, kind="floor,", divergence=f"{count} matmuls") for count in (4, 3)]
    names = args.divergences or [*DIVERGENCES, "taid", f"top-{sizes.k}"]
    peers = [replace(base, kind=kind, divergence=name) for kind in _peers(args) for name in PEER_BETA]
    shared = [replace(base, kind=kind, share=share) for kind in ("mmkd", *_peers(args)) for share in shares]
    return [*floors, *(replace(base, divergence=name) for name in names), *peers, *shared]


def _peers(args: argparse.Namespace) -> list[str]:
    kinds = [] if args.no_peers else ["Liger eager", "TRL GKD"]
    if args.device == "cuda" and not args.no_peers:
        kinds.append("Liger Triton")
    if args.compiled:
        kinds.append("Liger compiled")
    if args.slow_peers or (args.device == "cuda" and not args.no_peers):
        kinds.append("TRL chunked")
    return [kind for kind in kinds if installed(_package(kind))]


def _package(kind: str) -> str:
    return {"Liger": "liger_kernel", "TRL": "trl"}[kind.split()[0]]


def measure_column(cases: list[Case], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the table: seconds, over the floor, peak MB and the loss."""
    inputs = make_inputs(cases[0].sizes, args.device, dtype_of(args))
    steps = {case.name: make_step(case, inputs) for case in cases}
    repeats = {case.name: args.repeats if case.kind in ("floor,", "mmkd") else args.peer_repeats for case in cases}
    # The run that measures memory is one of the repeats.
    runs = interleaved(steps, {name: count - args.memory for name, count in repeats.items()}, args.device)
    del steps, inputs
    if args.memory:
        runs = {case.name: faster(runs.get(case.name), alone(build, case, args.device)) for case in cases}
    rows = []
    for case in cases:
        run = runs[case.name]
        row = {"": case.name, "s": run.seconds, "over floor": run.seconds / runs[case.floor].seconds}
        rows.append(row | {"peak MB": run.megabytes, "nats": None if case.kind == "floor," else run.value})
    if not args.no_peers and not installed("liger_kernel"):
        rows.append({"": "Liger: not installed", "s": None, "over floor": None, "peak MB": None, "nats": None})
    return rows


def judge(rows: list[dict[str, Any]], column: int, shares: tuple[float, ...]) -> list[dict[str, Any]]:
    """The targets of PERFORMANCE.md for one column."""
    by_name = {row[""]: row for row in rows}

    def get(name: str, key: str) -> float | None:
        return by_name[name][key] if name in by_name else None

    place = f"column {column + 1}"
    own = [row for row in rows if row[""].startswith("mmkd") and "supervised" not in row[""]]
    verdicts = [verdict(f"{place}: {row['']} over floor", row["over floor"], TARGETS[column]) for row in own]
    for name in PEER_BETA:
        own_peak = get(f"mmkd {name}", "peak MB")
        for peer, limit in (("Liger eager", 1 / 4), ("TRL GKD", 1 / 15)):
            memory = ratio(own_peak, get(f"{peer} {name}", "peak MB"))
            verdicts.append(verdict(f"{place}: {name}, peak MB over {peer}", memory, limit))
    for share in shares:
        relative = ratio(get(f"mmkd forward_kl, {share:g} supervised", "s"), get("mmkd forward_kl", "s"))
        # Not everything shrinks with the tokens: the gradient of the head is cleared and scaled whole.
        verdicts.append(verdict(f"{place}: time at {share:g} supervised over all", relative, share * 1.15))
    return verdicts


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--columns", type=int, nargs="+", choices=[1, 2, 3], default=[1, 2, 3])
    parser.add_argument("--tokens", type=int, help="tokens of every column, instead of 4096, 2048 and 1024")
    parser.add_argument("--chunk_size", type=int, default=512)
    parser.add_argument("--divergences", nargs="+", help="of mmkd; default: all, taid and top-64")
    parser.add_argument("--peer_repeats", type=int, help="runs of each peer; default: --repeats")
    parser.add_argument("--no_peers", action="store_true")
    parser.add_argument("--no_shares", action="store_true", help="leave out the runs with fewer supervised tokens")
    parser.add_argument("--compiled", action="store_true", help="Liger with torch.compile, too: needs a C++ compiler")
    parser.add_argument("--slow_peers", action="store_true", help="TRL's chunked divergence on a CPU, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.peer_repeats = args.peer_repeats or args.repeats
    tables, verdicts = {}, []
    for place, column in enumerate(number - 1 for number in args.columns):
        sizes = (QUICK if args.quick else COLUMNS)[column]
        sizes = replace(sizes, tokens=args.tokens) if args.tokens else sizes
        # What changes with the supervised share is the same in every column.
        shares = (0.5, 0.25) if place == 0 and not args.no_shares else ()
        rows = measure_column(cases_of(sizes, args, shares), args)
        tables[sizes.title] = rows
        if not args.quick:
            verdicts += judge(rows, column, shares)
    settings = {**vars(args), "sizes": [asdict(sizes) for sizes in COLUMNS]}
    report("b1_fused_loss", args.device, tables, verdicts, settings)


if __name__ == "__main__":
    main()
